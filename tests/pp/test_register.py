from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata
from skimage.color import rgb2hed
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import contract, datasets, io, pp

#: micrometers a pixel of the real H&E
MPP = 0.69
SIDE = 1500


# --------------------------------------------------------------------------------------------------
# synthetic runs: from the reader to cells on the H&E


@pytest.fixture(scope="module")
def xenium_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xenium") / "run"
    return datasets.synthetic_xenium(folder, size_um=500.0, n_genes=6, align=False, pixel_um=0.425)


@pytest.fixture(scope="module")
def codex_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codex") / "run"
    return datasets.synthetic_codex(folder, n_spots=30, n_genes=6, n_proteins=3)


def read_xenium(run: Path) -> SpatialData:
    return io.xenium(run, he_image=run / "he_image.ome.tif")


def read_codex(run: Path) -> SpatialData:
    return io.codex(run / "cells.csv", run / "multiplex.ome.tif", he_image=run / "he.tif")


def off_by_um(table: Any, alignment: Path, pixel_um: float) -> np.ndarray:
    """How far each unit lies from where the alignment, H&E px to instrument px, puts it; µm on an H&E of 0.5 µm/px."""
    to_he = np.linalg.inv(pd.read_csv(alignment, header=None).to_numpy())
    pixels = table.obsm["spatial_um"] / pixel_um
    expected = pixels @ to_he[:2, :2].T + to_he[:2, 2]
    return np.linalg.norm(table.obsm["spatial"] - expected, axis=1) * 0.5


def placed(sdata: SpatialData) -> dict[str, dict[str, np.ndarray]]:
    """All transformations of all elements, as matrices."""
    return {
        name: {
            system: np.asarray(one.to_affine_matrix(("x", "y"), ("x", "y")))
            for system, one in get_transformation(element, get_all=True).items()
        }
        for _, name, element in sdata.gen_spatial_elements()
    }


def assert_same_places(mine: SpatialData, theirs: SpatialData, *, atol: float = 1e-9) -> None:
    one, two = placed(mine), placed(theirs)
    assert {name: set(systems) for name, systems in one.items()} == {name: set(sys) for name, sys in two.items()}
    for name, systems in one.items():
        for system, matrix in systems.items():
            np.testing.assert_allclose(matrix, two[name][system], atol=atol, err_msg=f"{name} {system}")


def test_a_xenium_run_without_alignment_is_placed_on_its_he(xenium_run: Path, tmp_path: Path) -> None:
    sdata = read_xenium(xenium_run)
    with pytest.raises(ValueError, match=r"pp\.register"):
        contract.find_units(sdata).positions(sdata)
    found = pp.register(sdata)
    table = sdata.tables["counts"]
    assert (found.moving, found.fixed, found.source) == ("dapi", "he", "instrument")
    assert found.facts()["patches"].startswith(f"{found.n_inliers} of {found.n_patches} agree")
    assert np.median(off_by_um(table, xenium_run / "truth_alignment.csv", 0.425)) < 1.0
    assert found.residual_um < 1.0
    assert found.n_inliers >= 20
    # cells, nuclei and transcripts lie on the H&E as the table's positions say
    cells = sdata.transform_element_to_coordinate_system("cells", "global")
    centers = np.column_stack([cells.geometry.centroid.x, cells.geometry.centroid.y])
    order = [list(cells.index).index(number) for number in table.obs["instance_id"]]
    assert np.median(np.linalg.norm(centers[order] - table.obsm["spatial"], axis=1)) < 8.0
    for name in ("cells", "nuclei", "transcripts", "dapi"):
        assert {"global", "instrument", "microns"} <= set(placed(sdata)[name])
    # pictures: what squidpy looks for
    scalefactors = table.uns["spatial"][contract.sample(sdata)]["scalefactors"]
    assert 5 < scalefactors["spot_diameter_fullres"] * 0.5 < 30

    sdata.write(tmp_path / "section.zarr")
    again = spatialdata.read_zarr(tmp_path / "section.zarr")
    assert_same_places(again, sdata)
    np.testing.assert_array_equal(again.tables["counts"].obsm["spatial"], table.obsm["spatial"])
    stored = again.attrs["stimage_sd"]["registration"]
    np.testing.assert_allclose(stored["matrix"], found.matrix)
    assert stored["n_inliers"] == found.n_inliers
    assert again.attrs["stimage_sd"]["history"][-1]["step"] == "pp.register"
    assert contract.counts(again).n_obs == table.n_obs
    # and from the store once more
    assert pp.register(again) == found


@pytest.fixture(scope="module")
def registered(codex_run: Path) -> tuple[SpatialData, pp.Registration]:
    """A CODEX section that was read without an alignment, and what was found."""
    sdata = read_codex(codex_run)
    return sdata, pp.register(sdata)


def test_a_codex_run_without_alignment_is_placed_on_its_he(
    registered: tuple[SpatialData, pp.Registration], codex_run: Path, tmp_path: Path
) -> None:
    sdata, found = registered
    table = sdata.tables["proteins"]
    assert (found.moving, found.fixed) == ("multiplex", "he")
    assert np.median(off_by_um(table, codex_run / "he_alignment.csv", 0.8)) < 1.0
    assert table.uns["spatial"]
    sdata.write(tmp_path / "section.zarr")
    again = spatialdata.read_zarr(tmp_path / "section.zarr")
    assert_same_places(again, sdata)
    np.testing.assert_array_equal(again.tables["proteins"].obsm["spatial"], table.obsm["spatial"])


def test_registering_again_gives_the_same(registered: tuple[SpatialData, pp.Registration], codex_run: Path) -> None:
    once, found = registered
    twice = read_codex(codex_run)
    assert pp.register(twice) == found
    assert pp.register(twice) == found
    assert_same_places(once, twice, atol=0)
    np.testing.assert_array_equal(once.tables["proteins"].obsm["spatial"], twice.tables["proteins"].obsm["spatial"])


def test_either_image_may_be_named_as_moving(registered: tuple[SpatialData, pp.Registration], codex_run: Path) -> None:
    sdata = read_codex(codex_run)
    found = pp.register(sdata, "he")
    assert (found.moving, found.fixed, found.source) == ("he", "multiplex", "instrument")
    np.testing.assert_allclose(found.matrix, registered[1].matrix, atol=0.5)
    np.testing.assert_array_equal(placed(sdata)["he"]["global"], np.eye(3))


def test_another_tissue_is_refused_and_nothing_is_written(
    codex_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = datasets.synthetic_codex(tmp_path_factory.mktemp("other") / "run", n_spots=30, n_proteins=3, seed=1)
    sdata = io.codex(codex_run / "cells.csv", codex_run / "multiplex.ome.tif", he_image=other / "he.tif")
    before, attrs = placed(sdata), copy.deepcopy(dict(sdata.attrs))
    keys = set(sdata.tables["proteins"].obsm), set(sdata.tables["proteins"].uns)
    with pytest.raises(ValueError, match=r"no good alignment of 'multiplex' with 'he'.*inliers.*same section"):
        pp.register(sdata)
    after = placed(sdata)
    assert before.keys() == after.keys()
    for name, systems in before.items():
        assert systems.keys() == after[name].keys()
        for system, matrix in systems.items():
            np.testing.assert_array_equal(matrix, after[name][system])
    assert dict(sdata.attrs) == attrs
    assert (set(sdata.tables["proteins"].obsm), set(sdata.tables["proteins"].uns)) == keys


# --------------------------------------------------------------------------------------------------
# a real H&E, and a DAPI image made from it


@pytest.fixture(scope="module")
def real(data_dir: Path) -> np.ndarray:
    """A field of a real section, ``uint8 (y, x, 3)``."""
    whole = cv2.imread(str(data_dir / "her2st" / "C2" / "image.jpg"), cv2.IMREAD_COLOR_RGB)
    return np.ascontiguousarray(whole[3500 : 3500 + SIDE, 3500 : 3500 + SIDE])


@pytest.fixture(scope="module")
def stain(real: np.ndarray) -> np.ndarray:
    """The hematoxylin of that field, 0 to 1; scikit-image's, not this package's."""
    values = np.maximum(rgb2hed(real)[..., 0], 0).astype(np.float32)
    return np.clip(values / np.percentile(values, 99.9), 0, 1)


def turn(angle: float, scale: float, *, before: np.ndarray | None = None) -> np.ndarray:
    """A matrix from the field to an image of `scale` times 1.5 as many pixels a side, about both middles."""
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = linear if before is None else linear @ before
    return np.vstack([np.column_stack([linear, 0.75 * SIDE * scale - linear @ [SIDE / 2, SIDE / 2]]), [0, 0, 1.0]])


def make_dapi(stain: np.ndarray, matrix: np.ndarray, scale: float, *, inverted: bool = False) -> np.ndarray:
    """What a fluorescence microscope may show of the stain: blurred, unevenly lit, noisy; ``uint16 (1, y, x)``."""
    side = int(1.5 * SIDE * scale)
    center = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    smooth = cv2.GaussianBlur(stain, (0, 0), max(0.4 / scale, 0.3))
    light = cv2.warpAffine(smooth, (np.linalg.inv(center) @ matrix @ center)[:2], (side, side))
    light = cv2.GaussianBlur(light, (0, 0), 1.0) ** 0.8 + 0.05
    light *= np.linspace(0.6, 1.4, side, dtype=np.float32)
    light += 0.05 * np.sqrt(light) * np.random.default_rng(0).standard_normal(light.shape, np.float32)
    light = np.clip(light, 0, 2) * 2000
    return (4000 - light if inverted else light).astype(np.uint16)[None]


def section(
    real: np.ndarray | list[da.Array],
    dapi: np.ndarray,
    *,
    pixel_um: float,
    mpp: float | None = MPP,
    channels: tuple[str, ...] = ("DAPI",),
) -> SpatialData:
    he = [da.from_array(np.moveaxis(real, -1, 0), chunks=(3, 512, 512))] if isinstance(real, np.ndarray) else real
    lazy = [da.from_array(dapi, chunks=(1, 512, 512))]
    sdata = SpatialData(
        images={
            "he": contract.build_image(he),
            "multiplex": contract.build_multichannel(lazy, channels=list(channels), pixel_um=pixel_um),
        }
    )
    return contract.register(sdata, sample="real", platform="codex", image="he", mpp=mpp)


def error_um(sdata: SpatialData, matrix: np.ndarray, pixel_um: float) -> float:
    """Median distance on the H&E between where the truth and the section's transformation put points."""
    points = np.random.default_rng(0).uniform(0.1 * SIDE, 0.9 * SIDE, (300, 2))
    found = contract.instrument_matrix(sdata)
    assert found is not None
    there = (points @ matrix[:2, :2].T + matrix[:2, 2]) * pixel_um
    return float(np.median(np.linalg.norm(there @ found[:2, :2].T + found[:2, 2] - points, axis=1)) * MPP)


@pytest.mark.parametrize(("angle", "scale", "inverted"), [(-2.9, 0.5, True), (1.1, 0.8, False), (0.3, 1.9, True)])
def test_a_similarity_of_a_real_section_is_found_within_two_micrometers(
    real: np.ndarray, stain: np.ndarray, angle: float, scale: float, inverted: bool
) -> None:
    matrix = turn(angle, scale)
    sdata = section(real, make_dapi(stain, matrix, scale, inverted=inverted), pixel_um=MPP / scale)
    found = pp.register(sdata)
    assert error_um(sdata, matrix, MPP / scale) < 0.5
    assert found.residual_um < 2.0
    assert found.inverted == inverted


@pytest.fixture(scope="module")
def turned(stain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and the DAPI image that lies so."""
    matrix = turn(0.7, 1.0)
    return matrix, make_dapi(stain, matrix, 1.0)


def test_an_unknown_resolution_follows_from_the_instruments(
    real: np.ndarray, turned: tuple[np.ndarray, np.ndarray]
) -> None:
    matrix, dapi = turned
    sdata = section(real, dapi, pixel_um=MPP, mpp=None)
    pp.register(sdata)
    assert contract.require_mpp(sdata, purpose="this test") == pytest.approx(MPP, rel=2e-3)
    assert error_um(sdata, matrix, MPP) < 0.5
    pp.register(sdata)  # begins at the right resolution now
    assert error_um(sdata, matrix, MPP) < 0.5


def test_a_wrong_resolution_is_told(real: np.ndarray, turned: tuple[np.ndarray, np.ndarray]) -> None:
    matrix, dapi = turned
    sdata = section(real, dapi, pixel_um=MPP, mpp=0.25)
    with pytest.warns(UserWarning, match=r"stated to have 0.25 µm per pixel.* found 0\.6[89]"):
        pp.register(sdata)
    assert error_um(sdata, matrix, MPP) < 0.5
    assert contract.info(sdata)["mpp"] == 0.25


def test_a_slide_from_behind_is_laid_on_its_front(real: np.ndarray, stain: np.ndarray) -> None:
    matrix = turn(2.0, 0.9, before=np.diag([-1.0, 1.0]))
    sdata = section(real, make_dapi(stain, matrix, 0.9), pixel_um=MPP / 0.9)
    found = pp.register(sdata)
    assert found.mirrored
    assert np.linalg.det(np.array(found.matrix)[:2, :2]) < 0
    assert error_um(sdata, matrix, MPP / 0.9) < 0.5


def test_an_affine_follows_a_sheared_image(real: np.ndarray, stain: np.ndarray) -> None:
    matrix = turn(0.4, 1.0, before=np.array([[1.03, 0.03], [0.0, 1.0]]))
    dapi = make_dapi(stain, matrix, 1.0)
    sdata = section(real, dapi, pixel_um=MPP)
    assert pp.register(sdata, transform="affine").transform == "affine"
    assert error_um(sdata, matrix, MPP) < 0.5


def test_only_the_level_worked_at_is_read(
    real: np.ndarray, turned: tuple[np.ndarray, np.ndarray], counted_image: Callable[..., Any]
) -> None:
    matrix, dapi = turned
    large = cv2.resize(real, (2 * SIDE, 2 * SIDE), interpolation=cv2.INTER_LINEAR)
    image = counted_image(*large.shape[:2], n_levels=3, chunk=512, image=large)
    sdata = section(image.levels, dapi, pixel_um=MPP, mpp=MPP / 2)
    pp.register(sdata, working_um=0.69)
    assert {level for level, _, _ in image.reads} == {1}
    assert max(image.reads.values()) == 1
    found = contract.instrument_matrix(sdata)
    assert found is not None
    expected = np.diag([2, 2, 1]) @ np.linalg.inv(np.diag([MPP, MPP, 1]) @ matrix)
    np.testing.assert_allclose(found[:2, :2], expected[:2, :2], atol=0.01)


def test_an_image_that_no_instrument_measured_is_laid_on_another(real: np.ndarray, stain: np.ndarray) -> None:
    matrix = turn(1.2, 1.0)
    side = int(1.5 * SIDE)
    center = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    other = cv2.warpAffine(
        real, (np.linalg.inv(center) @ matrix @ center)[:2], (side, side), borderValue=(240, 240, 240)
    )
    lazy = {
        name: [da.from_array(np.moveaxis(image, -1, 0), chunks=(3, 512, 512))]
        for name, image in (("he", real), ("restained", other))
    }
    sdata = SpatialData(images={name: contract.build_image(levels) for name, levels in lazy.items()})
    contract.register(sdata, sample="two", platform="slide", image="he", mpp=MPP)
    found = pp.register(sdata, "restained", "he")
    assert found.source == "restained"
    np.testing.assert_allclose(placed(sdata)["restained"]["global"], np.linalg.inv(matrix), atol=0.5)
    np.testing.assert_array_equal(placed(sdata)["restained"]["global"], found.matrix)
    np.testing.assert_allclose(placed(sdata)["restained"]["microns"], np.diag([MPP, MPP, 1]) @ found.matrix)
    np.testing.assert_array_equal(placed(sdata)["he"]["global"], np.eye(3))


# --------------------------------------------------------------------------------------------------
# what is refused


@pytest.fixture
def blank() -> SpatialData:
    return section(np.full((600, 600, 3), 240, np.uint8), np.full((1, 600, 600), 100, np.uint16), pixel_um=MPP)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "orb"}, ValueError, "`method` to be \"sift\", found 'orb'"),
        ({"transform": "rigid"}, ValueError, '"similarity" or "affine", found \'rigid\''),
        ({"working_um": 0}, ValueError, "`working_um` to be positive, found 0"),
        ({"max_residual_um": float("nan")}, ValueError, "`max_residual_um` to be positive, found nan"),
        ({"min_inliers": -1}, ValueError, "`min_inliers` to be positive, found -1"),
        ({"moving": "nothing"}, KeyError, r"No image 'nothing' .*\['he', 'multiplex'\]"),
        ({"moving": "he", "fixed": "he"}, ValueError, "two images to lay on each other, found 'he' twice"),
        ({"channel": "CD3"}, KeyError, r"no channel CD3 in image 'multiplex'; its channels: \['DAPI'\]"),
        ({}, ValueError, "found that it shows nothing"),
    ],
)
def test_what_cannot_be_is_refused(
    blank: SpatialData, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = copy.deepcopy(dict(blank.attrs))
    with pytest.raises(error, match=message):
        pp.register(blank, **options)
    assert dict(blank.attrs) == before
    assert set(placed(blank)["multiplex"]) == {"instrument"}


def test_a_section_without_an_instruments_image_is_told_to_name_one(blank: SpatialData) -> None:
    del blank.images["multiplex"]
    with pytest.raises(KeyError, match=r"no image 'dapi' or 'multiplex'.*`moving=`"):
        pp.register(blank)


def test_three_stains_of_eight_bit_are_no_colors(real: np.ndarray) -> None:
    stains = np.moveaxis(real, -1, 0)
    sdata = section(real, stains, pixel_um=MPP, channels=("CD3", "CD4", "CD8"))
    with pytest.raises(KeyError, match=r"such as DAPI or Hoechst.*\['CD3', 'CD4', 'CD8'\].*`channel=`"):
        pp.register(sdata)


def test_the_channel_may_be_named(real: np.ndarray, turned: tuple[np.ndarray, np.ndarray]) -> None:
    matrix, dapi = turned
    noise = np.random.default_rng(0).integers(0, 4000, dapi.shape, dtype=np.uint16)
    sdata = section(real, np.concatenate([noise, dapi]), pixel_um=MPP, channels=("CD3", "stain 2"))
    found = pp.register(sdata, channel="stain 2")
    assert error_um(sdata, matrix, MPP) < 0.5
    assert sdata.attrs["stimage_sd"]["history"][-1]["parameters"]["channel"] == "stain 2"
    assert asdict(found)["residual_um"] < 1.0
