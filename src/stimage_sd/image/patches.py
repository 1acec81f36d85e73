"""Search for small patches of one image in another image of the same tissue, near their expected position."""

from __future__ import annotations

import cv2
import numpy as np

from stimage_sd.image.keypoints import Picture
from stimage_sd.image.nuclear_contrast import NEUTRAL

#: side of a patch and search distance around its expected position, px
PATCH, _REACH = 64, 16
#: maximum number of patches
_MOST_PATCHES = 400
#: smallest correlation of a clear peak, and smallest lead over the next peak
_CLEAR, _CLEARER = 0.25, 0.06


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Transform points ``(n, 2)`` by an affine matrix ``(3, 3)``."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def find_patches(
    moving: Picture, fixed: Picture, matrix: np.ndarray, *, inverted: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Find patches of the moving image in the fixed image, near the position given by a matrix.

    - `moving`, `fixed`: the images.
    - `matrix`: affine matrix ``(3, 3)``, moving px to fixed px.
    - `inverted`: whether bright areas in one image are dark in the other.
    - returns: centers ``(n, 2)`` of the clearly found patches in moving px, and their positions in fixed px.
    """
    linear = matrix[:2, :2]
    scale = float(np.sqrt(abs(np.linalg.det(linear))))
    small = moving.shrunk(1 / scale) if scale < 0.75 else moving
    to_moving = np.linalg.inv(matrix)
    to_small = small.scale_from(moving) @ to_moving
    centers = _rich_points(fixed)
    source, target = [], []
    for center in centers[_inside(small.padding, apply(to_small, centers))]:
        corner = center - PATCH // 2
        local = to_small @ np.array([[1, 0, corner[0]], [0, 1, corner[1]], [0, 0, 1.0]])
        local[:2, 2] += local[:2, :2] @ [0.5, 0.5] - 0.5  # OpenCV pixel centers on both sides
        patch = cv2.warpAffine(
            small.contrast,
            local[:2],
            (PATCH, PATCH),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderValue=NEUTRAL,
        )
        left, top = (corner - _REACH).astype(int)
        area = fixed.contrast[top : top + PATCH + 2 * _REACH, left : left + PATCH + 2 * _REACH]
        shift = _peak(area, 2 * NEUTRAL - 1 - patch if inverted else patch)
        if shift is not None:
            source.append(center)
            target.append(center + shift)
    if not source:
        return np.empty((0, 2)), np.empty((0, 2))
    return apply(to_moving, np.array(source)), np.array(target)


def _rich_points(fixed: Picture) -> np.ndarray:
    """Return centers of the richest patches, one per cell of a lattice, with the search area inside the image."""
    margin = PATCH // 2 + _REACH
    height, width = fixed.contrast.shape
    if min(height, width) <= 2 * margin:
        return np.empty((0, 2))
    away = cv2.absdiff(fixed.contrast, np.full_like(fixed.contrast, NEUTRAL))
    away[fixed.padding] = 0
    richness = cv2.boxFilter(away, cv2.CV_32F, (PATCH, PATCH))
    padding = fixed.padding.astype(np.uint8) * np.uint8(255)
    richness[cv2.boxFilter(padding, -1, (2 * margin, 2 * margin)) > 5] = 0  # a fiftieth of the area
    inside = richness[margin : height - margin, margin : width - margin]
    cell = max(PATCH // 2, int(np.sqrt(inside.size / (4 * _MOST_PATCHES))))
    points = []
    for top in range(0, inside.shape[0], cell):
        for left in range(0, inside.shape[1], cell):
            block = inside[top : top + cell, left : left + cell]
            row, column = np.unravel_index(int(block.argmax()), block.shape)
            points.append((block[row, column], left + column + margin, top + row + margin))
    table = np.array(points)
    # patches with less than half the richness of the richest are glass or have no nuclei
    table = table[table[:, 0] > 0.5 * np.percentile(table[:, 0], 95)]
    chosen = table if len(table) <= _MOST_PATCHES else table[np.linspace(0, len(table) - 1, _MOST_PATCHES).astype(int)]
    return chosen[:, 1:]


def _inside(padding: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Check whether a patch around each point lies inside the image, with its center off the padding."""
    half = PATCH * 0.71
    whole = np.all((points > half) & (points < np.array(padding.shape[::-1]) - half), axis=1)
    columns, rows = np.clip(points, 0, np.array(padding.shape[::-1]) - 1).astype(int).T
    return whole & ~padding[rows, columns]


def _peak(area: np.ndarray, patch: np.ndarray) -> np.ndarray | None:
    """Return the x and y offset of a patch from the middle of an area, or `None` without a clear peak."""
    if patch.std() < 4:
        return None
    score = cv2.matchTemplate(area, patch, cv2.TM_CCOEFF_NORMED)
    row, column = np.unravel_index(int(score.argmax()), score.shape)
    highest = score[row, column]
    if not (0 < row < score.shape[0] - 1 and 0 < column < score.shape[1] - 1) or highest < _CLEAR:
        return None
    others = score.copy()
    others[max(0, row - 5) : row + 6, max(0, column - 5) : column + 6] = -1
    if highest - others.max() < _CLEARER:
        return None
    place = np.array([column, row], dtype=np.float64)
    for axis, (before, after) in enumerate(
        ((score[row, column - 1], score[row, column + 1]), (score[row - 1, column], score[row + 1, column]))
    ):
        place[axis] += 0.5 * (before - after) / min(before - 2 * highest + after, -1e-9)
    return place - _REACH
