"""Quality of slides: planted blur, ink, bubbles and specks are measured, real sections are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import skimage
import spatialdata as sd
import squidpy as sq
from scipy import stats
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from stimage_sd import contract, datasets, io, pp
from stimage_sd.image import quality
from stimage_sd.io._raster import raster_from_array

#: micrometers a pixel of the second level of the real sections, on which artifacts are painted
MPP = 1.38
#: light that inks let through, of 255, as markers look on slides
INKS = {
    "blue": (37, 95, 160),
    "teal": (60, 125, 120),
    "green": (40, 120, 60),
    "red": (190, 30, 45),
    "black": (25, 25, 30),
}

COLUMNS = [
    "blurry_fraction",
    "small_regions",
    "pixels_to_use",
    "tissue_pixels",
    "pen_pixels",
    "bubble_pixels",
    "sharpness",
    "brightness",
    "contrast",
    "hematoxylin",
    "eosin",
    "dark_fraction",
    "pixel_um",
    "keep",
    "reason",
]


@pytest.fixture(scope="module")
def real(data_dir: Path, _session_cache: None) -> np.ndarray:
    """A real section at half its resolution, ``uint8 (y, x, 3)``."""
    section = io.slide(data_dir / "her2st" / "C2" / "image.jpg", mpp=MPP / 2)
    level = contract.levels(section, "he")[1].data.compute()
    return np.ascontiguousarray(np.moveaxis(level, 0, -1))


@pytest.fixture(scope="module")
def tissue(real: np.ndarray, make_slide: Callable[..., SpatialData]) -> np.ndarray:
    """Where its tissue is."""
    sdata = make_slide(real, mpp=MPP)
    pp.tissue_mask(sdata)
    mask, _ = contract.tissue(sdata)
    return cv2.resize(mask.astype(np.uint8), real.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0


def blur_half(image: np.ndarray, tissue: np.ndarray, sigma_um: float) -> tuple[np.ndarray, float]:
    """Blur what lies left of the tissue's middle, then add the noise of a camera; and the share that is blurred."""
    middle = int(np.median(np.nonzero(tissue)[1]))
    altered = image.copy()
    if sigma_um > 0:
        altered[:, :middle] = cv2.GaussianBlur(image, (0, 0), sigma_um / MPP)[:, :middle]
    noise = 2 * np.random.default_rng(0).standard_normal(image.shape, dtype=np.float32)
    return np.clip(altered + noise, 0, 255).astype(np.uint8), float(tissue[:, :middle].sum() / tissue.sum())


def small_slide(seed: int, *, specks: int = 0, side: int = 100) -> np.ndarray:
    """A square of sharp "tissue" and some specks on glass, 320 px of 2 µm."""
    image = np.full((320, 320, 3), 245, np.uint8)
    random = np.random.default_rng(seed)
    image[20 : 20 + side, 20 : 20 + side] = np.clip(random.normal((150, 90, 180), 30, (side, side, 3)), 0, 255)
    for number in range(specks):
        cv2.circle(image, (20 + 40 * (number % 7), 300 - 40 * (number // 7)), 13, (150, 90, 180), -1)
    return image


# --------------------------------------------------------------------------------------------------
# blur


@pytest.mark.parametrize("sigma_um", [3.0, 5.0, 10.0, 20.0])
def test_the_blurred_half_of_a_real_section_is_half(
    real: np.ndarray, tissue: np.ndarray, make_slide: Callable, sigma_um: float
) -> None:
    image, share = blur_half(real, tissue, sigma_um)
    row = pp.slide_qc(make_slide(image, mpp=MPP)).iloc[0]
    assert row["blurry_fraction"] == pytest.approx(share, abs=0.03)
    assert row["keep"]


@pytest.mark.slow
def test_blur_is_monotone_and_a_wholly_blurred_slide_is_dropped(
    real: np.ndarray, tissue: np.ndarray, make_slide: Callable
) -> None:
    everywhere = np.zeros_like(tissue)
    everywhere[:, -1] = True  # so that all left of the last column is blurred
    cohort = {str(sigma): make_slide(blur_half(real, everywhere, sigma)[0], mpp=MPP) for sigma in (0, 1, 1.5, 3, 6)}
    table = pp.slide_qc(cohort)
    blurry = table["blurry_fraction"].to_numpy()
    assert (np.diff(blurry) > -1e-3).all()
    assert blurry[0] < 0.01
    assert blurry[-1] > 0.99
    assert (np.diff(table["sharpness"]) < 0).all()
    assert table["keep"].tolist() == [True, True, True, False, False]
    assert table["reason"].iloc[-1].endswith("100% of the tissue is blurry")


@pytest.mark.slow
def test_blur_does_not_depend_on_where_the_tissue_lies_or_how_it_is_chunked(
    real: np.ndarray, tissue: np.ndarray, make_slide: Callable
) -> None:
    image, _ = blur_half(real, tissue, 4.0)
    shifted = cv2.copyMakeBorder(image, 413, 0, 1171, 0, cv2.BORDER_REFLECT_101)
    lazy = da.moveaxis(da.from_array(image, chunks=(700, 611, 3)), -1, 0)
    shift = np.zeros(shifted.shape[:2], bool)
    shift[413:, 1171:] = tissue
    found = []
    for levels, mask in ((raster_from_array(image), tissue), (raster_from_array(shifted), shift), ([lazy], tissue)):
        sdata = make_slide(levels, mpp=MPP)
        contract.write_tissue(sdata, mask, downsample=(1.0, 1.0))
        found.append(pp.slide_qc(sdata)["blurry_fraction"].iloc[0])
    assert found[1] == pytest.approx(found[0], abs=0.01)
    assert found[2] == pytest.approx(found[0], abs=0.01)


def histoqc_blurry(image: np.ndarray, tissue: np.ndarray) -> float:
    """HistoQC's published rule, at 2.5 x (4 µm a pixel), with its defaults: radius 7 px, threshold 0.1."""
    size = tuple(round(side * MPP / 4.0) for side in image.shape[1::-1])
    gray = skimage.color.rgb2gray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    mask = cv2.resize(tissue.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    return float((skimage.filters.gaussian(np.abs(skimage.filters.laplace(gray)), sigma=7) <= 0.1)[mask].mean())


@pytest.mark.slow
def test_blur_agrees_with_histoqc_but_a_pale_slide_is_not_blurry(
    real: np.ndarray, tissue: np.ndarray, make_slide: Callable
) -> None:
    image, _ = blur_half(real, tissue, 5.0)
    ours = pp.slide_qc(make_slide(image, mpp=MPP))["blurry_fraction"].iloc[0]
    assert ours == pytest.approx(histoqc_blurry(image, tissue), abs=0.1)
    pale = (255 - 0.35 * (255.0 - real)).astype(np.uint8)
    assert histoqc_blurry(pale, tissue) > 0.5
    assert pp.slide_qc(make_slide(pale, mpp=MPP))["blurry_fraction"].iloc[0] < 0.05


def test_squidpys_sharpness_is_lower_on_every_tile_that_is_called_blurry(
    real: np.ndarray, tissue: np.ndarray, make_slide: Callable
) -> None:
    image, _ = blur_half(real, tissue, 4.0)
    sdata = make_slide(image, mpp=MPP)
    pp.slide_qc(sdata)
    side = 200
    flat = SpatialData(images={"he": Image2DModel.parse(np.moveaxis(image, -1, 0), dims=("c", "y", "x"))})
    metric = sq.experimental.im.QCMetric.VAR_OF_LAPLACIAN
    options = {"detect_outliers": False, "detect_tissue": False, "progress": False, "preview": False}
    sq.experimental.im.qc_image(flat, "he", metrics=metric, tile_size=(side, side), **options)
    table = flat.tables["qc_img_he"]
    classes = cv2.resize(np.asarray(sdata.labels["quality"]), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    starts = (table.obsm["spatial"] - side / 2).astype(int)
    tiles = [classes[y : y + side, x : x + side] for y, x in starts]
    theirs = np.asarray(table.X)[:, 0]
    blurry, sharp = (theirs[[bool((tile == value).all()) for tile in tiles]] for value in (2, 1))
    assert min(len(blurry), len(sharp)) > 15
    area = stats.mannwhitneyu(sharp, blurry).statistic / (len(sharp) * len(blurry))
    assert area > 0.99


@pytest.mark.parametrize("section", ["C2", "C3", "C4", "C5"])
def test_real_sections_are_kept(data_dir: Path, section: str) -> None:
    sdata = datasets.her2st(section)
    table = pp.slide_qc(sdata)
    row = table.iloc[0]
    assert list(table.columns) == COLUMNS
    assert row["keep"]
    # C3 and C4 have a smear of eosin beside the tissue, which has nothing in it to be sharp
    assert row["blurry_fraction"] < (0.15 if section in ("C3", "C4") else 0.02)
    assert row["pen_pixels"] == 0
    assert row["bubble_pixels"] == 0
    assert row["sharpness"] > 1.1
    assert row["hematoxylin"] > row["eosin"]


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "CropBreastSlide.tiff"])
def test_real_slides_are_kept(data_dir: Path, name: str) -> None:
    sdata = io.slide(data_dir / "slides" / name)
    row = pp.slide_qc(sdata).iloc[0]
    assert row["keep"]
    assert row["blurry_fraction"] < 0.1
    assert row["pen_pixels"] + row["bubble_pixels"] == 0
    assert np.isnan(row["pixel_um"]) == (contract.info(sdata)["mpp"] is None)


def test_painted_sections_are_kept(synthetic: Callable[..., SpatialData]) -> None:
    row = pp.slide_qc(synthetic(seed=3)).iloc[0]
    assert row["keep"]
    assert row["blurry_fraction"] < 0.05
    assert row["pen_pixels"] + row["bubble_pixels"] == 0


# --------------------------------------------------------------------------------------------------
# ink, bubbles, specks


@pytest.mark.parametrize("color", INKS)
@pytest.mark.parametrize("width_um", [200.0, 600.0])
def test_pen_strokes_of_known_area(
    real: np.ndarray, tissue: np.ndarray, make_slide: Callable, color: str, width_um: float
) -> None:
    drawn = np.zeros(real.shape[:2], np.uint8)
    path = np.array([(300, 400), (1800, 700), (2600, 2000), (2300, 3600)], np.int32)  # over glass and tissue
    cv2.polylines(drawn, [path], False, 1, round(width_um / MPP), cv2.LINE_8)
    image = real.copy()
    image[drawn > 0] = (real[drawn > 0] * (np.array(INKS[color]) / 255.0)).astype(np.uint8)
    sdata = make_slide(image, mpp=MPP)
    contract.write_tissue(sdata, tissue, downsample=(1.0, 1.0))
    row = pp.slide_qc(sdata).iloc[0]
    assert row["pen_pixels"] * row["pixel_um"] ** 2 == pytest.approx(drawn.sum() * MPP**2, rel=0.12)
    lost = (tissue & (drawn > 0)).sum() / tissue.sum()
    assert row["pixels_to_use"] / row["tissue_pixels"] == pytest.approx(1 - lost, abs=0.03)
    assert row["blurry_fraction"] < 0.03


@pytest.mark.parametrize("radius_um", [300.0, 900.0])
def test_a_bubble_on_glass_is_its_rim_and_what_it_encloses(
    real: np.ndarray, make_slide: Callable, radius_um: float
) -> None:
    image = real.copy()
    cv2.circle(image, (1000, 1000), round(radius_um / MPP), (95, 93, 98), round(35 / MPP), cv2.LINE_AA)
    row = pp.slide_qc(make_slide(image, mpp=MPP)).iloc[0]
    assert row["bubble_pixels"] * 64 == pytest.approx(np.pi * (radius_um + 17.5) ** 2, rel=0.1)
    assert row["pen_pixels"] == 0
    assert row["small_regions"] == pytest.approx(pp.slide_qc(make_slide(real, mpp=MPP))["small_regions"].iloc[0], abs=2)


def test_specks_are_counted(real: np.ndarray, tissue: np.ndarray, make_slide: Callable) -> None:
    image = real.copy()
    image[~tissue] = 245
    before = pp.slide_qc(make_slide(image, mpp=MPP))["small_regions"].iloc[0]
    for number in range(30):  # 50 µm across, then three of 200 µm, which are no specks
        cv2.circle(image, (200 + 130 * number, 200 + 17 * (number % 5)), round(25 / MPP), (170, 100, 170), -1)
    for number in range(3):
        cv2.circle(image, (400 + 500 * number, 4500), round(100 / MPP), (170, 100, 170), -1)
    after = pp.slide_qc(make_slide(image, mpp=MPP))["small_regions"].iloc[0]
    assert after - before == 30


# --------------------------------------------------------------------------------------------------
# which are kept


@pytest.fixture(scope="module")
def cohort(make_slide: Callable[..., SpatialData]) -> dict[str, SpatialData]:
    images = [small_slide(seed, specks=seed % 5, side=90 + 2 * seed) for seed in range(22)]
    images[7] = small_slide(7, specks=20)
    images[11] = small_slide(11, side=60)
    images[3] = cv2.GaussianBlur(images[3], (0, 0), 6.0)
    return {f"s{seed}": make_slide(image, mpp=2.0, sample=f"s{seed}") for seed, image in enumerate(images)}


def test_a_cohort_is_judged_by_its_percentiles(cohort: dict[str, SpatialData]) -> None:
    table = pp.slide_qc(cohort)
    regions, pixels = table["small_regions"].to_numpy(), table["pixels_to_use"].to_numpy()
    assert regions.max() >= 20
    fails = (
        (table["blurry_fraction"].to_numpy() >= 0.9)
        | (regions > np.percentile(regions, 97.5))
        | (pixels < np.percentile(pixels, 5))
    )
    np.testing.assert_array_equal(table["keep"], ~fails)
    assert table.index[fails].tolist() == ["s3", "s7", "s11"]
    assert "blurry" in table.loc["s3", "reason"]
    assert table.loc["s7", "reason"].startswith(f"{regions[7]} small regions, more than ")
    assert table.loc["s11", "reason"].startswith(f"{pixels[11]} pixels to use, fewer than ")
    assert (table.loc[~fails, "reason"] == "").all()
    kept = contract.info(cohort["s7"])["quality"]
    assert kept["keep"] is False
    assert kept["limits"]["max_regions"] == pytest.approx(np.percentile(regions, 97.5))


def test_a_few_slides_are_not_judged_against_each_other(cohort: dict[str, SpatialData]) -> None:
    few = {name: cohort[name] for name in ("s3", "s7", "s11")}
    table = pp.slide_qc(few)
    assert table["keep"].tolist() == [False, True, True]
    assert contract.info(few["s7"])["quality"]["limits"] == {"max_blurry": 0.9, "max_regions": None, "min_pixels": None}
    asked = pp.slide_qc(few, min_cohort=3)
    assert asked["keep"].tolist() == [False, False, True]
    alone = pp.slide_qc(cohort["s7"], min_cohort=1)
    assert alone["keep"].tolist() == [True]
    assert alone.index.tolist() == ["s7"]
    assert pp.slide_qc(few, max_blurry=1.0, max_regions_percentile=100)["keep"].sum() >= 2


def test_unknown_resolution_among_known_ones_is_said(make_slide: Callable[..., SpatialData]) -> None:
    slides = {"a": make_slide(small_slide(0), mpp=2.0), "b": make_slide(small_slide(1))}
    with pytest.warns(UserWarning, match=r"1 of 2 slides have no known resolution, such as 'b'"):
        table = pp.slide_qc(slides, min_cohort=2)
    assert np.isnan(table.loc["b", "pixel_um"])
    assert contract.info(slides["b"])["quality"]["pixel_um"] is None


@pytest.mark.parametrize("value", [255, 128, 0])
def test_a_blank_slide_has_no_tissue_and_is_dropped(make_slide: Callable[..., SpatialData], value: int) -> None:
    sdata = make_slide(np.full((400, 300, 3), value, np.uint8), mpp=2.0)
    row = pp.slide_qc(sdata).iloc[0]
    assert np.isnan(row["blurry_fraction"])
    assert row["pixels_to_use"] == 0
    assert not row["keep"]
    assert row["reason"] == "no tissue"


# --------------------------------------------------------------------------------------------------
# what is written, what is read, what is refused


def test_labels_and_figures_survive_writing(make_slide: Callable[..., SpatialData], tmp_path: Path) -> None:
    sdata = make_slide(small_slide(0, specks=4, side=300), mpp=2.0)
    table = pp.slide_qc(sdata)
    before = np.asarray(sdata.labels["quality"])
    sdata.write(tmp_path / "slide.zarr")
    back = sd.read_zarr(tmp_path / "slide.zarr")
    np.testing.assert_array_equal(np.asarray(back.labels["quality"]), before)
    assert before.dtype == np.uint8
    assert set(np.unique(before)) <= {0, 1, 2, 3, 4}
    for system, scale in (("global", 4.0), ("microns", 8.0)):
        matrix = get_transformation(back.labels["quality"], system).to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(np.diag(matrix), [scale, scale, 1.0])
    figures = contract.info(back)["quality"]
    for name in COLUMNS:
        assert figures[name] == table[name].iloc[0]
    assert (before == 1).sum() == figures["pixels_to_use"]
    assert contract.info(back)["history"][-1]["step"] == "pp.slide_qc"
    assert "tissue" not in back.labels


def test_the_same_every_time_and_the_tissue_is_the_sections_own(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(small_slide(0, specks=4), mpp=2.0)
    first, labels = pp.slide_qc(sdata), np.asarray(sdata.labels["quality"])
    pd.testing.assert_frame_equal(pp.slide_qc(sdata), first)
    np.testing.assert_array_equal(np.asarray(sdata.labels["quality"]), labels)
    mask = np.zeros((320, 320), bool)
    mask[40:80, 40:80] = True
    contract.write_tissue(sdata, mask, downsample=(1.0, 1.0))
    assert pp.slide_qc(sdata)["tissue_pixels"].iloc[0] == 100


def test_only_the_coarsest_sufficient_level_is_read_and_once(counted_image: Callable, make_slide: Callable) -> None:
    image = counted_image(0, 0, image=cv2.resize(small_slide(0), None, fx=4, fy=4), n_levels=4, chunk=128)
    pp.slide_qc(make_slide(image.levels, mpp=0.5))
    assert {level for level, _, _ in image.reads} == {2}
    assert set(image.reads.values()) == {1}


def test_a_failing_section_leaves_the_cohort_as_it_was(make_slide: Callable[..., SpatialData]) -> None:
    good, coarse = make_slide(small_slide(0), mpp=2.0), make_slide(small_slide(0), mpp=20.0, sample="coarse")
    with pytest.raises(ValueError, match=r"'coarse' has 20 µm per pixel, too coarse .* `working_um=20`"):
        pp.slide_qc({"good": good, "coarse": coarse})
    assert "quality" not in good.labels
    assert "quality" not in contract.info(good)
    assert pp.slide_qc(coarse, working_um=20.0)["pixel_um"].iloc[0] == 80.0


def test_what_is_no_he_is_refused(make_slide: Callable[..., SpatialData]) -> None:
    with pytest.raises(KeyError, match="Found no RGB image among"):
        pp.slide_qc(SpatialData())
    fluorescence = Image2DModel.parse(np.zeros((1, 64, 64), np.uint16), dims=("c", "y", "x"))
    with pytest.raises(ValueError, match=r"to be 8-bit RGB .* found 1 channel\(s\) of uint16"):
        pp.slide_qc(SpatialData(images={"dapi": fluorescence}), image_key="dapi")
    with pytest.raises(TypeError, match="Expected a SpatialData section or a dict"):
        pp.slide_qc("slide.svs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"working_um": 0.0}, "`working_um` to be a positive number"),
        ({"working_um": float("nan")}, "`working_um` to be a positive number"),
        ({"max_blurry": 0.0}, "`max_blurry` to be over 0 and at most 1"),
        ({"max_regions_percentile": 101}, "`max_regions_percentile` to be a percentile"),
        ({"min_pixels_percentile": -1}, "`min_pixels_percentile` to be a percentile"),
    ],
)
def test_thresholds_out_of_range_are_refused(make_slide: Callable, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pp.slide_qc(make_slide(small_slide(0), mpp=2.0), **options)


# --------------------------------------------------------------------------------------------------
# the rules by themselves


@pytest.mark.parametrize("gain", [0.2, 0.5, 1.0])
def test_the_ratio_does_not_depend_on_contrast(gain: float) -> None:
    gray = skimage.color.rgb2gray(skimage.data.immunohistochemistry()).astype(np.float32)
    inside = np.ones((gray.shape[0] // 4, gray.shape[1] // 4), bool)
    one, _, _ = quality.sharpness(*quality.edge_energy(gray), inside)
    other, _, _ = quality.sharpness(*quality.edge_energy(gain * gray), inside)
    np.testing.assert_allclose(other, one, rtol=2e-3)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_blurred_by_a_working_pixel_is_the_limit_at_every_scale(real: np.ndarray, scale: int) -> None:
    middle = real[1800:3800, 1800:3000]
    ratios = []
    for sigma in (0.7, 1.6):
        smooth = cv2.GaussianBlur(middle, (0, 0), sigma * 2 * scale)
        gray = cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        size = tuple(side // (2 * scale) // 4 * 4 for side in gray.shape[::-1])
        working = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
        inside = np.ones((size[1] // 4, size[0] // 4), bool)
        ratios.append(np.median(quality.sharpness(*quality.edge_energy(working), inside)[0]))
    assert ratios[0] > quality.LEAST_SHARPNESS > ratios[1]


def test_neither_red_cells_nor_violet_nuclei_are_ink() -> None:
    glass = np.array([245.0, 245.0, 245.0])
    for color in ((205, 105, 125), (70, 55, 125), (100, 80, 150), (225, 150, 190)):
        image = np.full((80, 80, 3), color, np.uint8)
        assert not quality.ink(image, glass, thickness=11, least_area=100).any()
    thin = np.full((80, 80, 3), 245, np.uint8)
    cv2.line(thin, (5, 5), (75, 60), INKS["blue"], 3)
    assert not quality.ink(thin, glass, thickness=11, least_area=100).any()
