"""Synthetic slides: Aperio's format as OpenSlide sees it, a truth that can be found again, the same for a seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile
from scipy import ndimage

from stimage_sd import contract
from stimage_sd.datasets import synthetic_slide, synthetic_visium
from stimage_sd.datasets._pyramid_writer import level_sides, write_pyramid
from stimage_sd.datasets._tissue_painter import Tissue
from stimage_sd.datasets._truth import FIELDS, log_mean
from stimage_sd.io import slide
from stimage_sd.pp import tile

SIZE = 4500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_slide(tmp_path_factory.mktemp("slide") / "run", size=SIZE, seed=1, blur=0.4, pen=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_slide(tmp_path_factory.mktemp("slide") / "plain", size=SIZE, seed=1)


def picture_of(folder: Path) -> np.ndarray:
    return np.moveaxis(contract.levels(slide(folder / "slide.svs"), "he")[0].data.compute(), 0, -1)


def test_openslide_takes_it_for_an_aperio_slide(folder: Path) -> None:
    with openslide.OpenSlide(folder / "slide.svs") as found:
        assert found.properties["openslide.vendor"] == "aperio"
        assert found.properties["openslide.mpp-x"] == "0.5"
        assert found.properties["openslide.objective-power"] == "20"
        assert found.level_dimensions == ((SIZE, SIZE), (SIZE // 4, SIZE // 4))
        thumbnail = np.asarray(found.associated_images["thumbnail"].convert("RGB").resize((100, 100)), dtype=float)
        coarse = found.read_region((0, 0), 1, (SIZE // 4, SIZE // 4)).convert("RGB").resize((100, 100))
    assert np.abs(thumbnail - np.asarray(coarse)).mean() < 5.0


def test_own_reader_and_tiles(folder: Path) -> None:
    sdata = slide(folder / "slide.svs")
    assert contract.info(sdata)["mpp"] == 0.5
    tile(sdata, size_um=100.0)
    tiles = contract.tiles(sdata)
    truth = pd.read_csv(folder / "truth_points.csv")
    # The truth has a point every 100 µm too: as many on tissue as there are tiles more on it than off.
    on_tissue = int((tiles.obs["tissue_fraction"] > 0.5).sum())
    assert on_tissue == pytest.approx(truth["in_tissue"].sum(), rel=0.08)


def test_truth_is_the_tissues(folder: Path) -> None:
    about = json.loads((folder / "truth_slide.json").read_text())
    points = pd.read_csv(folder / "truth_points.csv")
    genes = pd.read_csv(folder / "truth_genes.csv", index_col="gene")
    tissue = Tissue(about["size"], about["mpp"], about["seed"])
    again = np.stack([tissue.at(name, points[["x", "y"]].to_numpy()) for name in FIELDS], axis=1)
    np.testing.assert_allclose(points[list(FIELDS)], again, atol=1e-6)
    expected = genes["intercept"].to_numpy() + (again - 0.5) * np.sqrt(12.0) @ genes[list(FIELDS)].to_numpy().T
    np.testing.assert_allclose(log_mean(tissue, points[["x", "y"]].to_numpy(), genes), expected)


def test_genes_are_those_of_the_synthetic_visium(folder: Path, tmp_path: Path) -> None:
    visium = synthetic_visium(tmp_path / "visium", n_spots=5)
    assert (visium / "truth_genes.csv").read_text() == (folder / "truth_genes.csv").read_text()


def test_the_picture_shows_the_truth(plain: Path) -> None:
    """Darkness about a point goes with the nuclei drawn there."""
    points = pd.read_csv(plain / "truth_points.csv").query("in_tissue == 1")
    nuclear = ndimage.uniform_filter((picture_of(plain)[..., 0] < 140).astype(np.float32), 201)
    found = nuclear[points["y"].astype(int), points["x"].astype(int)]
    covered = (900.0 + 8600.0 * points["density"]) * (2.3 + 2.6 * points["size"]) ** 2
    assert np.corrcoef(found, covered)[0, 1] > 0.75


def test_blur_and_pen_are_where_the_truth_says(folder: Path, plain: Path) -> None:
    points = pd.read_csv(folder / "truth_points.csv")
    spoiled, clean = picture_of(folder).astype(float), picture_of(plain).astype(float)
    x, y = points["x"].astype(int), points["y"].astype(int)
    detail = np.hypot(*np.gradient(ndimage.gaussian_filter(spoiled[..., 1], 1.0)))
    sharpness = ndimage.uniform_filter(detail, 101)[y, x]
    tissue = points["in_tissue"].eq(1) & points["pen"].eq(0)
    blurred, sharp = tissue & points["blurred"].eq(1), tissue & points["blurred"].eq(0)
    assert np.median(sharpness[blurred]) < 0.4 * np.median(sharpness[sharp])
    dimmed = spoiled.mean(axis=2)[y, x] / clean.mean(axis=2)[y, x]
    assert (dimmed[points["pen"].eq(1)] < 0.7).mean() > 0.9
    assert points["pen"].sum() > 3
    untouched = points["pen"].eq(0) & points["blurred"].eq(0)
    assert abs(np.median(dimmed[untouched]) - 1.0) < 0.02
    assert json.loads((folder / "truth_slide.json").read_text())["blurred_px"] == round(0.4 * SIZE)


def test_blur_has_no_seams(folder: Path) -> None:
    """Rows on both sides of a strip's border differ as little as other two rows."""
    strokes = json.loads((folder / "truth_slide.json").read_text())["pen"]
    free = min(min(x for x, _ in stroke["points"]) - stroke["width_px"] for stroke in strokes)
    assert 0 < free < 0.4 * SIZE
    rows = picture_of(folder)[:, :free, 1].astype(float)
    steps = np.abs(np.diff(rows, axis=0)).mean(axis=1)
    assert steps[511::512].max() < 1.5 * np.median(steps[500:3500]) + 0.5


def test_levels_are_the_picture_reduced(plain: Path) -> None:
    with tifffile.TiffFile(plain / "slide.svs") as tiff:
        assert [level.shape for level in tiff.series[0].levels] == [(SIZE, SIZE, 3), (1125, 1125, 3)]
        finest, coarse = (level.asarray().astype(float) for level in tiff.series[0].levels)
    # Of the light alone: JPEG keeps colors at half the resolution.
    reduced = finest.mean(axis=2).reshape(1125, 4, 1125, 4).mean(axis=(1, 3))
    assert np.abs(reduced - coarse.mean(axis=2)).mean() < 2.0


@pytest.mark.parametrize("size", [1024, 5000, 8191, 40_000])
def test_level_sides(size: int) -> None:
    sides = level_sides(size)
    assert sides == {1024: [1024], 5000: [5000, 1250], 8191: [8191, 2047], 40_000: [40_000, 10_000, 2500]}[size]


def test_pyramid_of_a_side_that_nothing_divides(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(100, 200, (17, 17, 3), dtype=np.uint8)
    image = np.kron(image, np.ones((257, 257, 1), dtype=np.uint8))  # 4369 px
    coarsest = write_pyramid(
        tmp_path / "a.tif", (image[top : top + 512] for top in range(0, 4369, 512)), size=4369, mpp=0.5
    )
    assert coarsest.shape == (1092, 1092, 3)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert np.abs(tiff.pages[0].asarray().astype(float) - image).mean() < 2.0
        assert np.abs(tiff.pages[1].asarray().astype(float) - coarsest).mean() < 2.0
    assert contract.info(slide(tmp_path / "a.tif"))["mpp"] == pytest.approx(0.5)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        hashlib.sha256((synthetic_slide(tmp_path / name, size=1024, seed=seed) / "slide.svs").read_bytes()).hexdigest()
        for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    assert first == second != other


def test_stain_changes_the_picture_and_no_truth(tmp_path: Path) -> None:
    one, two = synthetic_slide(tmp_path / "a", size=1024), synthetic_slide(tmp_path / "b", size=1024, stain_seed=3)
    for name in ("truth_genes.csv", "truth_points.csv"):
        assert (one / name).read_text() == (two / name).read_text()
    assert np.abs(picture_of(one).mean(axis=(0, 1)) - picture_of(two).mean(axis=(0, 1))).max() > 3.0


def test_refusals(tmp_path: Path) -> None:
    for options, message in [
        ({"size": 500}, "`size` of at least 1024 px, found 500"),
        ({"mpp": 0.0}, "`mpp` to be a positive number"),
        ({"n_genes": 2}, "`n_genes` of at least 3, found 2"),
        ({"blur": 1.5}, "`blur` from 0 to 1 and `pen` of at least 0, found 1.5 and 0"),
        ({"pen": -1}, "found 0.0 and -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            synthetic_slide(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="Expected an empty or new folder"):
        synthetic_slide(tmp_path / "full")
