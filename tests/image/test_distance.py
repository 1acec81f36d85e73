"""Distances to the edge, against scipy's, and the same in every call."""

from __future__ import annotations

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from stimage_sd.image.distance import edge_distance


@given(height=st.integers(2, 120), width=st.integers(2, 120), seed=st.integers(0, 999))
def test_distances_are_scipys(height: int, width: int, seed: int) -> None:
    noise = np.random.default_rng(seed).random((height, width)).astype(np.float32)
    inside = (cv2.GaussianBlur(noise, (0, 0), 2.0) > 0.5).astype(np.uint8)
    inside[0, 0] = 0
    expected = distance_transform_edt(inside).astype(np.float32)
    np.testing.assert_array_equal(edge_distance(inside), expected)


def test_every_call_gives_the_same_bits() -> None:
    noise = np.random.default_rng(1).random((200, 200)).astype(np.float32)
    inside = (cv2.GaussianBlur(noise, (0, 0), 3.0) > 0.5).astype(np.uint8)
    first = edge_distance(inside)
    for _ in range(50):
        np.testing.assert_array_equal(edge_distance(inside.copy()), first)


def test_long_distances_are_exact() -> None:
    """Squares above 1,000 px are rounded in double precision, and below in single precision."""
    for width in (1_900, 2_300):
        inside = np.ones((3, width), np.uint8)
        inside[:, 0] = 0
        np.testing.assert_array_equal(edge_distance(inside)[1], np.arange(width))
        inside = np.ones((width // 2, width // 2), np.uint8)
        inside[0, 0] = 0
        np.testing.assert_array_equal(edge_distance(inside), distance_transform_edt(inside).astype(np.float32))
