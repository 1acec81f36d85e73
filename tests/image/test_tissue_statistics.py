"""Statistics of tiles against scikit-image, closed forms and drawn nuclei."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage.color import rgb2hed
from skimage.feature import local_binary_pattern

from stimage_sd import models
from stimage_sd.image.tissue_statistics import N_STATISTICS, tissue_statistics


def with_nuclei(number: int, radius: int) -> np.ndarray:
    tile = np.full((240, 240, 3), (230, 170, 205), np.uint8)
    for place in range(number):
        row, column = divmod(place, 5)
        cv2.circle(tile, (24 + 48 * column, 24 + 48 * row), radius, (80, 50, 140), -1)
    return tile


@pytest.fixture(scope="module")
def textured(picture) -> np.ndarray:
    return picture(120, 120, seed=3, grain=5)


def test_color_equals_the_definition(textured):
    found = tissue_statistics(textured[None])[0]
    red = -np.log((textured[..., 0].astype(float) + 1) / 256)
    assert found[0] == pytest.approx(red.mean(), rel=1e-4)
    assert found[1] == pytest.approx(red.std(), rel=1e-4)
    # a percentile is of a sample of the pixels
    np.testing.assert_allclose(found[2:7], np.percentile(red, [5, 25, 50, 75, 95]), atol=0.1)


def test_hematoxylin_is_that_of_scikit_image_but_for_its_scale(picture):
    # without the darkest pixels, whose logarithm scikit-image takes of 0
    tiles = np.stack([picture(60, 60, seed=seed, grain=60) // 2 + 100 for seed in range(12)])
    ours = tissue_statistics(tiles)[:, 21]
    theirs = [rgb2hed(tile)[..., 0].mean() for tile in tiles]
    assert np.corrcoef(ours, theirs)[0, 1] > 0.99


def test_local_patterns_equal_scikit_image(textured):
    gray = cv2.cvtColor(textured, cv2.COLOR_RGB2GRAY)
    # eight neighbors on the grid: those of radius 1 but for the diagonals, which scikit-image interpolates
    codes = local_binary_pattern(np.pad(gray, 0), 8, 1, "uniform")
    found = tissue_statistics(textured[None])[0][48:58]
    expected = np.bincount(codes[1:-1, 1:-1].astype(int).ravel(), minlength=10) / 118**2
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(found - expected).sum() < 0.25


@pytest.mark.parametrize(("number", "radius"), [(5, 8), (20, 8), (25, 14)])
def test_drawn_nuclei_are_counted_and_measured(number, radius):
    nuclei = tissue_statistics(with_nuclei(number, radius)[None])[0][-8:]
    assert nuclei[0] == number
    assert nuclei[1] == pytest.approx(np.log1p(number), rel=1e-5)
    assert nuclei[2] == number
    area = np.pi * radius**2
    assert nuclei[3] == pytest.approx(number * area / 240**2, rel=0.2)
    assert np.expm1(nuclei[4]) == pytest.approx(area, rel=0.2)
    assert nuclei[6] == pytest.approx(radius, abs=1.5)


def test_glass_has_no_tissue_and_no_nuclei():
    found = tissue_statistics(np.full((1, 64, 64, 3), 250, np.uint8))[0]
    assert np.isfinite(found).all()
    assert found[42] == 0
    assert not found[-8:].any()


def test_tiles_are_measured_one_by_one(textured):
    both = tissue_statistics(np.stack([textured, textured[::-1]]))
    assert both.shape == (2, N_STATISTICS)
    np.testing.assert_array_equal(both[0], tissue_statistics(textured[None])[0])
    # no statistic knows which way is up, but for the sample of pixels and rounding
    np.testing.assert_allclose(both[1], both[0], atol=0.1, rtol=0.1)
    assert tissue_statistics(np.empty((0, 8, 8, 3), np.uint8)).shape == (0, N_STATISTICS)


def test_it_is_an_extractor(textured):
    extractor = models.get_extractor("tissue_statistics")
    np.testing.assert_array_equal(extractor(textured[None]), tissue_statistics(textured[None]))
    assert extractor.weights_hash == "tissue-statistics-2"
