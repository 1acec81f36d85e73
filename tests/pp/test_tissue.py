"""Tissue masks: painted tissue is found, glass and black are refused, squidpy agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import squidpy as sq
from spatialdata import SpatialData

from stimage_sd import contract, io, pp
from stimage_sd.pp._tissue import grabcut_mask, otsu_mask


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def blob(height: int = 400, width: int = 500, *, glass: int = 245, noise: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Purple tissue with a hole, on noisy glass, and where it is."""
    truth = np.zeros((height, width), np.uint8)
    cv2.ellipse(truth, (width // 2, height // 2), (width // 3, height // 3), 20, 0, 360, 1, -1)
    cv2.circle(truth, (width // 2, height // 2), height // 8, 0, -1)
    random = np.random.default_rng(0)
    texture = cv2.GaussianBlur(random.normal(0, 1, (height, width)), (0, 0), 3) * 60
    tissue = np.array([190, 120, 185]) + texture[..., None]
    image = np.where(truth[..., None] > 0, tissue, glass) + random.normal(0, noise, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8), truth > 0


@pytest.mark.parametrize("find", [otsu_mask, grabcut_mask])
@pytest.mark.parametrize("glass", [250, 225, 200])
def test_painted_tissue_is_found(find: Callable, glass: int) -> None:
    image, truth = blob(glass=glass)
    assert iou(find(image), truth) > 0.9


def test_masks_are_the_same_every_time() -> None:
    image, _ = blob()
    np.testing.assert_array_equal(grabcut_mask(image), grabcut_mask(image))


@pytest.mark.parametrize("find", [otsu_mask, grabcut_mask])
def test_a_picture_full_of_tissue_is_all_tissue(find: Callable, picture: Callable) -> None:
    texture = picture(300, 300, grain=12).astype(float) / 255
    image = np.clip(np.array([190, 110, 180]) + 40 * (texture - 0.5), 0, 255).astype(np.uint8)
    assert find(image).mean() > 0.95


def test_mask_lies_on_the_tissue_in_full_resolution_pixels(make_slide: Callable[..., SpatialData]) -> None:
    image, truth = blob(1200, 1500)
    sdata = make_slide(image, mpp=0.5)
    pp.tissue_mask(sdata, max_side=400)
    mask, downsample = contract.tissue(sdata)
    assert max(mask.shape) <= 400
    np.testing.assert_allclose(np.multiply(mask.shape, downsample), (1200, 1500))
    assert iou(cv2.resize(mask.astype(np.uint8), (1500, 1200), interpolation=cv2.INTER_NEAREST) > 0, truth) > 0.9
    step = contract.info(sdata)["history"][-1]
    assert step["step"] == "pp.tissue_mask"
    assert step["parameters"] == {"method": "grabcut", "image": "he", "max_side": 400}


@pytest.mark.parametrize(
    "image",
    [np.full((300, 300, 3), value, np.uint8) for value in (255, 240, 128, 0)]
    + [np.clip(np.random.default_rng(0).normal(240, 5, (300, 300, 3)), 0, 255).astype(np.uint8)],
    ids=["white", "glass", "gray", "black", "noise"],
)
@pytest.mark.parametrize("method", ["otsu", "grabcut"])
def test_a_slide_without_tissue_is_refused(make_slide: Callable, image: np.ndarray, method: str) -> None:
    sdata = make_slide(image, sample="blank")
    with pytest.raises(ValueError, match=r"no tissue on 'he' of section 'blank' .* Is it the H&E image\?"):
        pp.tissue_mask(sdata, method=method)
    assert "tissue" not in sdata.labels
    assert not contract.info(sdata)["history"]


def test_a_mask_is_replaced_and_other_methods_are_refused(make_slide: Callable[..., SpatialData]) -> None:
    image, truth = blob()
    sdata = make_slide(image)
    pp.tissue_mask(sdata, method="otsu")
    pp.tissue_mask(sdata, method="grabcut")
    assert iou(contract.tissue(sdata)[0], truth) > 0.9
    with pytest.raises(ValueError, match=r"one of \['grabcut', 'otsu'\], found 'magic'"):
        pp.tissue_mask(sdata, method="magic")


def test_a_cohort_gets_a_mask_each(make_slide: Callable[..., SpatialData]) -> None:
    cohort = {name: make_slide(blob(glass=glass)[0]) for name, glass in (("a", 250), ("b", 220))}
    pp.tissue_mask(cohort)
    assert all("tissue" in sdata.labels for sdata in cohort.values())


def test_no_full_resolution_is_read(counted_image: Callable, make_slide: Callable) -> None:
    image = counted_image(0, 0, image=blob(1600, 2000)[0], n_levels=3)
    pp.tissue_mask(make_slide(image.levels), max_side=500)
    assert image.full_reads() == 0


@pytest.fixture(scope="module")
def section(data_dir: Path, _session_cache: None) -> SpatialData:
    folder = data_dir / "her2st" / "C2"
    return io.legacy_st(folder / "counts.tsv.gz", folder / "image.jpg", folder / "spots.tsv", sample="C2")


@pytest.mark.parametrize("method", ["otsu", "grabcut"])
def test_real_tissue_lies_under_its_spots(section: SpatialData, method: str) -> None:
    pp.tissue_mask(section, method=method)
    mask, _ = contract.tissue(section)
    assert 0.15 < mask.mean() < 0.6
    pp.tile(section)
    keep = contract.tiles(section).obs["keep"]
    assert keep.mean() > 0.9


def test_squidpy_finds_the_same_tissue(section: SpatialData) -> None:
    pp.tissue_mask(section)
    ours, _ = contract.tissue(section)
    theirs = sq.experimental.im.detect_tissue(
        section, "he", scale=f"scale{len(section.images['he']) - 1}", inplace=False
    )
    theirs = cv2.resize((np.asarray(theirs) > 0).astype(np.uint8), ours.shape[::-1], interpolation=cv2.INTER_NEAREST)
    assert iou(ours, theirs > 0) > 0.8
