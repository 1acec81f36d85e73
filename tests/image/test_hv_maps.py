"""Distance maps of nuclei, and nuclei from such maps."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import watershed

from stimage_sd.image.hv_maps import _drop, _filled, _flooded, _numbered, _side, hv_maps, hv_watershed
from stimage_sd.image.instance_scores import instance_scores


def discs(centers: list[tuple[int, int]], radius: int, side: int = 120) -> np.ndarray:
    labels = np.zeros((side, side), np.int32)
    for number, center in enumerate(centers, start=1):
        cv2.circle(labels, center, radius, number, -1)
    return labels


@pytest.fixture(scope="module")
def real(data_dir: Path) -> list[np.ndarray]:
    folder = data_dir / "nuclei"
    maps = list(np.load(folder / "patches.npz")["instances"].astype(np.int64))
    return maps + [scipy.io.loadmat(folder / f"patch{n}.mat")["inst_map"].astype(np.int64) for n in (1, 2)]


def test_maps_are_distances_from_the_middle_scaled_by_their_side(real: list[np.ndarray]) -> None:
    for labels in real:
        horizontal, vertical = hv_maps(labels)
        assert (horizontal[labels == 0] == 0).all()
        for number in np.unique(labels)[1:]:
            rows, columns = np.nonzero(labels == number)
            for found, places in ((horizontal, columns), (vertical, rows)):
                away = places - places.mean()
                scale = np.where(away < 0, -min(away.min(), -1e-6), max(away.max(), 1e-6))
                np.testing.assert_allclose(found[rows, columns], away / scale, atol=1e-5)


def test_perfect_maps_give_the_nuclei_back(real: list[np.ndarray]) -> None:
    """Eleven real masks: panoptic quality of at least 0.97, patch by patch on average and over all nuclei together."""
    for nucleus_px in (16.0, 20.0):
        found = [hv_watershed(labels > 0, hv_maps(labels), nucleus_px=nucleus_px).astype(np.int64) for labels in real]
        quality = [instance_scores(*pair).panoptic_quality for pair in zip(real, found, strict=True)]
        assert np.mean(quality) >= 0.97
        side = np.concatenate([labels + 1000 * n * (labels > 0) for n, labels in enumerate(real)], axis=1)
        together = np.concatenate([labels + 1000 * n * (labels > 0) for n, labels in enumerate(found)], axis=1)
        assert instance_scores(side, together).panoptic_quality >= 0.97


def test_what_is_found_does_not_depend_on_what_else_there_is() -> None:
    """The published post-processing scales gradients by the picture's extremes; this one by nothing of the picture."""
    one = discs([(40, 40), (58, 40)], 10)
    other = one.copy()
    other[80:84, 20:110] = 9  # a strand whose map is steep
    alone, beside = (hv_watershed(labels > 0, hv_maps(labels), nucleus_px=20) for labels in (one, other))
    np.testing.assert_array_equal(alone[:70] > 0, beside[:70] > 0)
    assert len(np.unique(alone[:70])) == len(np.unique(beside[:70])) == 3


@given(st.integers(0, 10_000), st.integers(6, 11))
@settings(max_examples=30, deadline=None)
def test_touching_discs_are_told_apart(seed: int, radius: int) -> None:
    random = np.random.default_rng(seed)
    first = random.integers(30, 90, 2)
    turn = random.uniform(0, 2 * np.pi)
    second = np.round(first + 2 * radius * np.array([np.cos(turn), np.sin(turn)])).astype(int)
    labels = discs([tuple(first.tolist()), tuple(second.tolist())], radius)
    found = hv_watershed(labels > 0, hv_maps(labels), nucleus_px=2 * radius)
    scores = instance_scores(labels, found)
    assert scores.n_matched == scores.n_found == 2


def test_noise_does_not_break_nuclei_up() -> None:
    labels = discs([(30, 30), (70, 40), (40, 90)], 12)
    random = np.random.default_rng(0)
    noisy = ndimage.gaussian_filter(hv_maps(labels), (0, 1, 1)) + random.normal(0, 0.1, (2, *labels.shape))
    found = hv_watershed(labels > 0, noisy.astype(np.float32), nucleus_px=24)
    assert instance_scores(labels, found).f1 == 1.0


def test_nothing_gives_nothing() -> None:
    blank = np.zeros((30, 30), np.float32)
    assert hv_watershed(blank, np.zeros((2, 30, 30), np.float32)).max() == 0
    assert not hv_maps(blank.astype(int)).any()


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_flooded_that_need_not_be_and_the_result_is_the_same(seed: int) -> None:
    """Nuclei as scikit-image's watershed of the whole image gives them, with holes, islands and noise."""
    random = np.random.default_rng(seed)
    labels = np.zeros((150, 170), np.int32)
    for number, (x, y) in enumerate(random.integers(5, 145, (40, 2)).tolist(), start=1):
        cv2.circle(labels, (x, y), int(random.integers(5, 16)), number, -1)
    maps = hv_maps(labels)
    for x, y in random.integers(5, 145, (30, 2)).tolist():
        cv2.circle(labels, (x, y), int(random.integers(1, 5)), 0, 2 if seed % 2 else -1)
    inside = labels > 0
    maps = maps + random.normal(0, 0.05 + 0.1 * (seed % 3), maps.shape)
    steep = np.maximum(*(_drop(maps[axis].astype(np.float32), axis, _side(16.0)) for axis in (0, 1)))
    holes = ndimage.binary_fill_holes(inside & (steep < 0.15))
    np.testing.assert_array_equal(_filled(inside & (steep < 0.15)) > 0, holes)
    opened = cv2.morphologyEx(holes.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    seeds = cv2.connectedComponents(opened, connectivity=4)[1]
    steep += 1e-4 * random.random(steep.shape, dtype=np.float32)  # of equal heights either may be first
    flooded = _flooded(steep, seeds, _numbered(inside, 1))
    assert flooded.dtype == np.int32
    assert flooded.max() > 5
    np.testing.assert_array_equal(flooded, watershed(steep, seeds, mask=inside))


def test_pieces_are_numbered_in_their_order() -> None:
    inside = np.zeros((20, 30), bool)
    inside[2:6, 3:9] = inside[3, 15] = inside[10:12, 1:20] = True
    expected, _ = ndimage.label(inside)
    expected = np.where(expected == 2, 0, np.where(expected == 3, 2, expected))
    np.testing.assert_array_equal(_numbered(inside, 5), expected)
