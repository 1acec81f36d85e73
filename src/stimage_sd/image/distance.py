"""Distance of pixels to the edge of their object."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

#: up to this distance, px, the error of a square in single precision is far below a half
_MOST_EXACT = 1000.0


def edge_distance(inside: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute the distance of each pixel to the nearest pixel outside, px.

    OpenCV's exact transform can differ in the last digit between two calls for the same mask. Squared distances are
    whole numbers, so rounding them gives the same result every time.

    - `inside`: mask, ``uint8 (y, x)``, nonzero inside.
    - returns: distances, ``float32 (y, x)``, 0 outside.

    >>> mask = np.zeros((3, 5), np.uint8)
    >>> mask[:, 1:4] = 1
    >>> edge_distance(mask)[1].tolist()
    [0.0, 1.0, 2.0, 1.0, 0.0]
    """
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if distance.max(initial=0.0) > _MOST_EXACT:
        return np.sqrt(np.rint(distance.astype(np.float64) ** 2)).astype(np.float32)
    np.multiply(distance, distance, out=distance)
    np.rint(distance, out=distance)
    return np.sqrt(distance, out=distance)
