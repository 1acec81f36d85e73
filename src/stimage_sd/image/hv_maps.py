"""Horizontal and vertical distance maps of nuclei, and segmentation of nuclei from such maps.

Within a nucleus the horizontal map runs from −1 at the left edge over 0 in the middle to 1 at the right edge. The
vertical map runs the same way from top to bottom. Where two nuclei touch, the map drops from 1 to −1, and this drop
separates them.

Source: Graham et al., "HoVer-Net: simultaneous segmentation and classification of nuclei in multi-tissue histology
images", Medical Image Analysis 2019. Their post-processing scales the gradients of each image by its minimum and
maximum. Here a drop is measured on the scale of the maps, so the result at one place does not depend on the rest of the
image.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import watershed

#: smallest nuclear probability of a pixel in a nucleus
_NUCLEAR = 0.5
#: smallest drop of a map between two nuclei, as a share of the drop from 1 to −1
_DROP = 0.15
#: side of the derivative kernel, in nucleus diameters
_KERNEL = 0.45
#: smallest area of a marker and of a nucleus as shares of the nucleus area, and smallest marker in px
_LEAST_MARKER, _LEAST_NUCLEUS, _LEAST_PX = 0.03, 0.06, 4
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def hv_maps(labels: NDArray[np.integer]) -> NDArray[np.float32]:
    """Compute the horizontal and vertical distance maps of a label map.

    - `labels`: integer label map, ``(y, x)``, 0 outside nuclei.
    - returns: ``float32 (2, y, x)``, horizontal and vertical, −1 to 1, and 0 outside nuclei. Distances are from the
      mean position of the pixels of a nucleus. Each side is scaled by its farthest pixel.

    >>> import numpy as np
    >>> hv_maps(np.array([[0, 7, 7, 7, 7, 7]]))[0]
    array([[ 0. , -1. , -0.5,  0. ,  0.5,  1. ]], dtype=float32)
    """
    maps = np.zeros((2, *labels.shape), dtype=np.float32)
    rows, columns = np.nonzero(labels)
    if len(rows) == 0:
        return maps
    _, owner = np.unique(labels[rows, columns], return_inverse=True)
    area = np.bincount(owner)
    for distances, places in zip(maps, (columns, rows), strict=True):
        away = places - (np.bincount(owner, places) / area)[owner]
        least, most = np.zeros(len(area)), np.zeros(len(area))
        np.minimum.at(least, owner, away)
        np.maximum.at(most, owner, away)
        reach = np.where(away < 0, -least[owner], most[owner])
        distances[rows, columns] = away / np.maximum(reach, 1e-6)
    return maps


def hv_watershed(
    nuclear: NDArray[np.floating], hv: NDArray[np.floating], *, nucleus_px: float = 16.0
) -> NDArray[np.int32]:
    """Segment nuclei from the nuclear probability and the distance maps.

    - `nuclear`: nuclear probability, ``(y, x)``, 0 to 1.
    - `hv`: horizontal and vertical distance map, ``(2, y, x)``, −1 to 1.
    - `nucleus_px`: approximate diameter of a nucleus, px. It sets the smoothing and the smallest areas.
    - returns: label map, ``int32 (y, x)``, numbered from 1, with 0 outside nuclei.

    >>> import numpy as np
    >>> labels = np.zeros((40, 60), int)
    >>> labels[10:30, 10:30], labels[10:30, 30:50] = 1, 2
    >>> found = hv_watershed(labels > 0, hv_maps(labels), nucleus_px=20)
    >>> bool((found == labels).all())
    True
    """
    area = np.pi / 4 * nucleus_px**2
    pieces = _numbered(np.asarray(nuclear) >= _NUCLEAR, _LEAST_NUCLEUS * area)
    inside = pieces > 0
    if not inside.any():
        return pieces
    drops = (_drop(np.asarray(hv[axis], np.float32), axis, _side(nucleus_px)) for axis in (0, 1))
    between = np.clip(np.maximum(*drops), 0, 1)
    markers = _filled(inside & (between < _DROP))
    opened = cv2.morphologyEx(markers, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3)))
    seeds = _numbered(opened > 0, max(_LEAST_PX, _LEAST_MARKER * area))
    height = cv2.GaussianBlur((between - 1) * inside, (3, 3), 0)
    return _flooded(height, seeds, pieces)


def _flooded(height: NDArray[np.float32], seeds: NDArray[np.int32], pieces: NDArray[np.int32]) -> NDArray[np.int32]:
    """Assign each pixel of the pieces to a seed by a watershed, without flooding where the result is certain.

    Certain are pixels of seeds, and pieces that hold one seed. The result is that of a flood of the whole image. Only
    between seeds at the same height, to the last digit, the flood's order of equals may differ.
    """
    at = (seeds > 0) & (pieces > 0)
    piece, seed = pieces[at], seeds[at]
    only_seed = np.zeros(int(pieces.max()) + 1, dtype=np.int32)
    only_seed[piece] = seed
    several = np.zeros(len(only_seed), dtype=bool)
    several[piece[only_seed[piece] != seed]] = True
    only_seed[several] = 0
    labels = only_seed.take(pieces)
    if several.any():
        contested = several.take(pieces)
        labels += np.where(contested, seeds, 0)
        # the flood starts at the edges of seeds; their inner pixels would only pass through its queue
        inner = cv2.erode((labels > 0).astype(np.uint8), _CROSS) > 0
        flood = contested & ~inner
        np.copyto(labels, watershed(height, np.where(flood, seeds, 0), mask=flood), where=flood)
    return labels


def _filled(inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Fill the holes of a mask: pieces outside of the mask that do not reach the image border."""
    pieces = cv2.connectedComponents((~inside).astype(np.uint8), connectivity=4)[1]
    hole = np.ones(int(pieces.max()) + 1, dtype=bool)
    for border in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        hole[border] = False
    hole[0] = True  # the mask itself
    return hole.take(pieces).view(np.uint8)


def _side(nucleus_px: float) -> int:
    return int(np.clip(2 * round(_KERNEL * nucleus_px / 2) + 1, 3, 31))


def _drop(distances: NDArray[np.float32], axis: int, side: int) -> NDArray[np.float32]:
    """Return the drop of a map along its axis, where 1 is a drop from 1 to −1. A rise is negative."""
    clipped = np.clip(distances, -1, 1)
    return cv2.Sobel(clipped, cv2.CV_32F, 1 - axis, axis, ksize=side, scale=-1 / _steepest(side))


@lru_cache
def _steepest(side: int) -> float:
    """Return the derivative that the kernel gives for a step from −1 to 1."""
    along, across = cv2.getDerivKernels(1, 0, side)
    return float(np.abs(along).sum() * across.sum())


def _numbered(inside: NDArray[np.bool_], least: float) -> NDArray[np.int32]:
    """Number the connected pieces with at least `least` pixels from 1, and leave out the others."""
    labels = cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)[1]
    large = np.bincount(labels.ravel()) >= least
    large[0] = False
    return np.where(large, np.cumsum(large), 0).astype(np.int32).take(labels)
