"""Stain normalization of sections: lazy, whatever the reference, blind to the lamp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import spatialdata
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import contract, pp
from stimage_sd.pp._stain import METHODS, StainReference, fit_section, fit_thumbnail, white_point

STAINED = {"n_spots": 40, "n_genes": 6, "seed": 3}


def pixels(sdata: SpatialData, name: str, level: int = 0) -> np.ndarray:
    return np.moveaxis(np.asarray(contract.levels(sdata, name)[level].data), 0, -1)


def stained_glass(
    height: int = 480,
    width: int = 520,
    *,
    turned: float = 0.0,
    seed: int = 0,
    gains: tuple[float, float] = (1.2, 1.6),
) -> np.ndarray:
    """Two stains in smooth amounts, with a frame of glass, ``float (y, x, 3)`` of transmission, 0 to 1."""
    matrix = np.array([[0.65, 0.70, 0.29], [0.07 + turned, 0.99, 0.11 + turned]])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    random = np.random.default_rng(seed)
    amounts = [
        cv2.GaussianBlur(random.gamma(0.4, 1.0, (height, width)), (0, 0), sigma) * gain
        for sigma, gain in zip((2, 6), gains, strict=True)
    ]
    amounts = np.stack(amounts, axis=-1)
    amounts[:60], amounts[-60:], amounts[:, :60], amounts[:, -60:] = 0, 0, 0, 0
    return np.exp(-amounts @ matrix)


def scanned(transmission: np.ndarray, *, lamp: float = 248.0) -> np.ndarray:
    return np.clip(np.round(transmission * (lamp + 1) - 1), 0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# laziness


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_full_resolution_is_computed(counted_image: Callable, make_slide: Callable, method: str) -> None:
    image = counted_image(0, 0, image=scanned(stained_glass(2048, 1536)), chunk=256, n_levels=3)
    sdata = make_slide(image.levels, mpp=0.5)
    pp.stain_normalize(sdata, method=method)
    assert image.full_reads() == 0
    # and then only what is asked for
    contract.levels(sdata, "he_normalized")[0].data[:, :256, :256].compute()
    assert image.full_reads() == 1


def test_the_added_image_has_the_form_of_its_source(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(scanned(stained_glass(1500, 1300)), mpp=0.5)
    pp.stain_normalize(sdata)
    ours, source = contract.levels(sdata, "he_normalized"), contract.levels(sdata, "he")
    assert [level.shape for level in ours] == [level.shape for level in source]
    assert {level.dtype for level in ours} == {np.dtype("uint8")}
    assert set(get_transformation(sdata.images["he_normalized"], get_all=True)) == {"global", "microns"}
    assert contract.working_image_name(sdata) == "he_normalized"
    assert contract.image_name(sdata) == "he"


# --------------------------------------------------------------------------------------------------
# what it does


@pytest.mark.parametrize("method", METHODS)
def test_normalizing_to_oneself_changes_nothing(make_slide: Callable[..., SpatialData], method: str) -> None:
    sdata = make_slide(scanned(stained_glass()))
    pp.stain_normalize(sdata, method=method)
    difference = pixels(sdata, "he_normalized").astype(int) - pixels(sdata, "he")
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_running_again_gives_the_same(make_slide: Callable[..., SpatialData], method: str) -> None:
    reference = make_slide(scanned(stained_glass(turned=0.15, seed=5)))
    sdata = make_slide(scanned(stained_glass()))
    pp.stain_normalize(sdata, reference, method=method)
    once = pixels(sdata, "he_normalized")
    pp.stain_normalize(sdata, reference, method=method)
    np.testing.assert_array_equal(pixels(sdata, "he_normalized"), once)
    assert sorted(sdata.images) == ["he", "he_normalized"]


@pytest.mark.parametrize("method", ["vahadane", "macenko"])
def test_bright_and_dim_scan_of_one_slide_agree(make_slide: Callable[..., SpatialData], method: str) -> None:
    transmission = stained_glass()
    reference = make_slide(scanned(stained_glass(turned=0.15, seed=5)))
    images = []
    for lamp in (248.0, 0.8 * 248.0):
        sdata = make_slide(scanned(transmission, lamp=lamp))
        pp.stain_normalize(sdata, reference, method=method)
        images.append(pixels(sdata, "he_normalized").astype(float))
    assert np.abs(scanned(transmission).astype(float) - scanned(transmission, lamp=198.4)).mean() > 30
    assert np.abs(images[0] - images[1]).mean() < 1.5
    assert np.percentile(np.abs(images[0] - images[1]), 99) <= 5


def test_matching_scales_concentrations_and_keeping_does_not(make_slide: Callable[..., SpatialData]) -> None:
    transmission = stained_glass()
    reference = make_slide(scanned(transmission))
    pale = make_slide(scanned(transmission**0.6))
    targets = {}
    for concentrations in ("match", "keep"):
        pp.stain_normalize(pale, reference, method="macenko", concentrations=concentrations)
        targets[concentrations] = pixels(pale, "he_normalized").astype(float)
    truth = pixels(reference, "he").astype(float)
    assert np.abs(targets["match"] - truth).mean() < 2
    assert np.abs(targets["keep"] - pixels(pale, "he")).mean() < 2


@pytest.mark.parametrize(("method", "share"), [("vahadane", 0.75), ("macenko", 0.2), ("reinhard", 0.2)])
def test_different_stains_come_closer(synthetic: Callable[..., SpatialData], method: str, share: float) -> None:
    one, other = synthetic(**STAINED), synthetic(**STAINED, stain_seed=8)
    pp.stain_normalize(other, one, method=method)
    mask, _ = contract.tissue(other)
    level = len(contract.levels(one, "he")) - 1
    inside = (
        cv2.resize(mask.astype(np.uint8), pixels(one, "he", level).shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
    )
    colors = [
        pixels(*source, level)[inside].mean(axis=0) for source in ((one, "he"), (other, "he"), (other, "he_normalized"))
    ]
    before, after = (np.linalg.norm(colors[0] - color) for color in colors[1:])
    assert before > 5
    assert after < share * before
    # and, of the stains themselves, the vectors
    if method != "reinhard":
        wanted = np.array(fit_section(one, method=method).stain_matrix)
        found = np.array(fit_section(other, method=method, image_key="he_normalized").stain_matrix)
        raw = np.array(fit_section(other, method=method).stain_matrix)
        assert np.abs(found - wanted)[:, :2].max() < 0.6 * np.abs(raw - wanted)[:, :2].max()


def test_glass_becomes_the_references_glass(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(scanned(stained_glass(), lamp=220.0))
    pp.stain_normalize(sdata, make_slide(scanned(stained_glass(seed=2), lamp=250.0)))
    np.testing.assert_allclose(pixels(sdata, "he_normalized")[:40], 249, atol=1)


# --------------------------------------------------------------------------------------------------
# references


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_reference_gives_the_same(
    make_slide: Callable[..., SpatialData], tmp_path: Path, method: str
) -> None:
    image = scanned(stained_glass(240, 260, turned=0.15, seed=5))
    fitted = fit_thumbnail(image, np.ones(image.shape[:2], bool), method=method)
    file, saved = tmp_path / "reference.png", tmp_path / "reference.json"
    assert cv2.imwrite(str(file), image[..., ::-1])
    fitted.save(saved)
    for group in (
        [image, file, str(file), np.moveaxis(image, -1, 0)],
        [fitted, saved, str(saved), asdict(fitted), contract.plain(asdict(fitted))],
    ):
        results = []
        for reference in group:
            sdata = make_slide(scanned(stained_glass(240, 260)))
            returned = pp.stain_normalize(sdata, reference, method=method)
            assert isinstance(returned, StainReference)
            assert returned.method == method
            results.append(pixels(sdata, "he_normalized"))
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])


def test_what_is_returned_is_a_reference_for_the_next(make_slide: Callable[..., SpatialData], tmp_path: Path) -> None:
    first, second = (make_slide(scanned(stained_glass(seed=seed, turned=0.1 * seed))) for seed in (0, 1))
    reference = pp.stain_normalize(first)
    assert pp.stain_normalize(second, reference) == reference
    reference.save(tmp_path / "s.json")
    assert pp.stain_normalize(second, tmp_path / "s.json") == reference


def test_a_cohort_is_normalized_to_its_first(make_slide: Callable[..., SpatialData]) -> None:
    cohort = {str(turn): make_slide(scanned(stained_glass(turned=0.1 * turn))) for turn in range(3)}
    reference = pp.stain_normalize(cohort)
    assert reference == fit_section(cohort["0"], method="vahadane")
    assert all(contract.info(sdata)["stain"]["method"] == "vahadane" for sdata in cohort.values())


def test_it_survives_the_disk(make_slide: Callable[..., SpatialData], tmp_path: Path) -> None:
    sdata = make_slide(scanned(stained_glass()))
    pp.stain_normalize(sdata, make_slide(scanned(stained_glass(turned=0.15, seed=5))))
    sdata.write(tmp_path / "s.zarr")
    back = spatialdata.read_zarr(tmp_path / "s.zarr")
    assert contract.info(back)["stain"] == contract.info(sdata)["stain"]
    assert contract.working_image_name(back) == "he_normalized"
    np.testing.assert_array_equal(pixels(back, "he_normalized"), pixels(sdata, "he_normalized"))
    StainReference.from_dict(contract.info(back)["stain"]["reference"])


# --------------------------------------------------------------------------------------------------
# refusals


def test_bad_input_is_refused_and_leaves_the_section_as_it_was(
    make_slide: Callable[..., SpatialData], tmp_path: Path
) -> None:
    sdata = make_slide(scanned(stained_glass()), sample="s")
    macenko = fit_section(sdata, method="macenko")
    pp.tissue_mask(sdata)
    before = dict(contract.info(sdata))
    for error, match, arguments in [
        (ValueError, r"one of \['vahadane', 'macenko', 'reinhard'\], found 'he'", {"method": "he"}),
        (ValueError, '"match" or "keep", found \'scale\'', {"concentrations": "scale"}),
        (ValueError, "fitted by 'macenko', found `method='vahadane'`", {"reference": macenko}),
        (ValueError, r"saved stain reference .* found .*color", {"reference": {"color": 1}}),
        (
            ValueError,
            r"saved stain reference .*stain_matrix",
            {"reference": {"method": "vahadane", "white_point": [1]}},
        ),
        (FileNotFoundError, "No saved stain reference at .*none.json", {"reference": tmp_path / "none.json"}),
        (FileNotFoundError, "none.png", {"reference": tmp_path / "none.png"}),
        (ValueError, "Expected an RGB image", {"reference": np.zeros((9, 9), np.uint8)}),
        (ValueError, "tissue to fit the stains on, found none", {"reference": np.full((99, 99, 3), 255, np.uint8)}),
        (KeyError, "No image 'x'", {"image_key": "x"}),
        (ValueError, r"`key_added` to be another name .* found 'he'", {"key_added": "he"}),
    ]:
        with pytest.raises(error, match=match):
            pp.stain_normalize(sdata, **arguments)
        assert sorted(sdata.images) == ["he"]
        assert contract.info(sdata) == before


def test_a_reference_file_that_is_no_reference_is_refused(make_slide: Callable, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"method": "vahadane", "white_po')
    with pytest.raises(ValueError, match=r"saved stain reference at .*broken.json"):
        pp.stain_normalize(make_slide(scanned(stained_glass())), tmp_path / "broken.json")


def test_a_blank_section_is_refused(make_slide: Callable[..., SpatialData]) -> None:
    with pytest.raises(ValueError, match="no tissue"):
        pp.stain_normalize(make_slide(np.full((300, 300, 3), 255, np.uint8)))


def test_a_single_color_has_no_two_stains(make_slide: Callable[..., SpatialData]) -> None:
    green = np.full((300, 300, 3), 250, np.uint8)
    green[60:240, 60:240] = (60, 200, 90)
    sdata = make_slide(green)
    with pytest.raises(ValueError, match=r"stains could not be fitted by 'vahadane'.*method=\"reinhard\""):
        pp.stain_normalize(sdata)
    assert "he_normalized" not in sdata.images


# --------------------------------------------------------------------------------------------------
# white point


def test_white_point_is_the_glass_and_not_the_dirt_on_it() -> None:
    image = np.full((200, 200, 3), (240, 238, 244), np.uint8)
    mask = np.zeros((200, 200), bool)
    mask[60:140, 60:140] = True
    image[mask] = (170, 90, 160)
    image[:50] = (40, 40, 60)  # a pen
    np.testing.assert_array_equal(white_point(image, mask), (240, 238, 244))


def test_white_point_of_a_picture_full_of_tissue_is_its_brightest(picture: Callable) -> None:
    image = picture(100, 100)
    point = white_point(image, np.ones((100, 100), bool))
    np.testing.assert_allclose(point, np.percentile(image.reshape(-1, 3), 99.9, axis=0))


# --------------------------------------------------------------------------------------------------
# one stain alone


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gains", [(0.0, 1.6), (0.04, 1.6), (1.2, 0.0)], ids=["eosin", "hardly any H", "hematoxylin"])
def test_one_stain_alone_is_refused_by_every_method(
    make_slide: Callable[..., SpatialData], method: str, gains: tuple[float, float]
) -> None:
    """Vectors that coincide made green of pink."""
    noise = np.random.default_rng(1).normal(0, 1.5, (480, 520, 3))
    image = np.clip(np.round(stained_glass(gains=gains) * 249 - 1 + noise), 0, 255).astype(np.uint8)
    sdata, both = make_slide(image, mpp=0.5), make_slide(scanned(stained_glass()), mpp=0.5)
    with pytest.raises(ValueError, match=r"(two stains|stains could not be fitted)"):
        pp.stain_normalize(sdata, both, method=method)
    assert "he_normalized" not in sdata.images
    with pytest.raises(ValueError, match=r"(two stains|stains could not be fitted)"):
        pp.stain_normalize(both, sdata, method=method)


@pytest.mark.parametrize("method", ["vahadane", "macenko"])
def test_a_saved_reference_of_one_stain_is_refused(make_slide: Callable[..., SpatialData], method: str) -> None:
    good = asdict(fit_section(make_slide(scanned(stained_glass())), method=method))
    eosin = np.array([0.07, 0.99, 0.11])
    matrix = np.stack([eosin + np.array([0.0, 0.0, 0.005]), eosin, [1.0, 0.0, 0.0]], axis=1)
    with pytest.raises(ValueError, match=r"cannot be told apart: the vectors .* are 0.3 degrees apart"):
        StainReference.from_dict({**good, "stain_matrix": matrix.tolist()})
    with pytest.raises(ValueError, match=r"cannot be told apart"):
        pp.stain_normalize(
            make_slide(scanned(stained_glass())),
            StainReference(**{**good, "stain_matrix": tuple(map(tuple, matrix))}),
            method=method,
        )
