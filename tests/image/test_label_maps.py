"""Objects of label maps are measured and traced as scikit-image does."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import regionprops_table

from stimage_sd.image.label_maps import LabelMap, means_within, measure_objects, trace_objects

MAPS = hnp.arrays(np.int32, (7, 9), elements=st.sampled_from([0, 0, 1, 2, 5, 10**9]))


@given(labels=MAPS, seed=st.integers(0, 99))
def test_measures_are_those_of_scikit_image(labels: np.ndarray, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=labels.shape)
    found = measure_objects(labels, values)
    small = np.searchsorted(np.unique(np.append(labels, 0)), labels)
    wanted = ("centroid", "eccentricity", "mean_intensity", "area")
    expected = regionprops_table(small, values, properties=wanted)
    assert found.labels.tolist() == sorted(set(labels.ravel().tolist()) - {0})
    np.testing.assert_allclose(found.centers[:, 0], expected["centroid-1"] + 0.5)
    np.testing.assert_allclose(found.centers[:, 1], expected["centroid-0"] + 0.5)
    np.testing.assert_allclose(found.mean, expected["mean_intensity"])


def test_eccentricity_of_an_ellipse() -> None:
    labels = np.zeros((200, 300), np.uint8)
    cv2.ellipse(labels, (150, 100), (120, 60), 30, 0, 360, 3, -1)
    found = measure_objects(labels, np.zeros(labels.shape))
    assert found.eccentricity == pytest.approx(np.sqrt(1 - 0.25), abs=2e-3)
    assert found.centers[0] == pytest.approx([150.5, 100.5], abs=0.1)


@given(labels=MAPS)
def test_an_outline_is_a_border(labels: np.ndarray) -> None:
    chosen = np.setdiff1d(labels, [0])
    outlines = trace_objects(labels, chosen)
    assert len(outlines) == len(chosen)
    for label, outline in zip(chosen, outlines, strict=True):
        assert (labels[outline[:, 1], outline[:, 0]] == label).all()
        # the outline, filled, holds a piece of the object, and no pixel beyond its box
        filled = np.zeros(labels.shape, np.uint8)
        cv2.drawContours(filled, [outline[:, None]], -1, 1, -1)
        assert (filled[labels == label] > 0).any()


def test_the_larger_piece_and_the_tolerance() -> None:
    labels = np.zeros((40, 60), int)
    labels[3:6, 3:6] = labels[10:30, 20:50] = 4
    (outline,) = trace_objects(labels, np.array([4]))
    assert shapely.Polygon(outline).bounds == (20, 10, 49, 29)
    disc = np.zeros((60, 60), np.uint8)
    cv2.circle(disc, (30, 30), 20, 1, -1)
    (fine,), (coarse,) = (trace_objects(disc, np.array([1]), tolerance=tolerance) for tolerance in (0.0, 1.0))
    assert len(coarse) < len(fine) / 2
    assert shapely.hausdorff_distance(shapely.LinearRing(fine), shapely.LinearRing(coarse)) < 1.5


def test_no_objects() -> None:
    nothing = np.zeros((4, 4), np.int32)
    assert len(measure_objects(nothing, nothing.astype(float)).labels) == 0
    assert trace_objects(nothing, np.array([], int)) == []


@given(labels=MAPS, seed=st.integers(0, 99))
def test_means_within_are_those_of_the_pixels(labels: np.ndarray, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(3, *labels.shape)).astype(np.float32)
    found = means_within(LabelMap.of(labels), np.moveaxis(values, 0, -1))
    expected = [[each[labels == label].mean(dtype=float) for each in values] for label in np.setdiff1d(labels, [0])]
    np.testing.assert_allclose(found, np.reshape(expected, (-1, 3)), atol=1e-12)
    np.testing.assert_array_equal(found, means_within(labels, np.moveaxis(values, 0, -1).copy()))
