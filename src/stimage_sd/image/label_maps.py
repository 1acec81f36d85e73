"""Position, shape and outline of the objects of a label map."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


class Objects(NamedTuple):
    """Objects of a label map, ordered by label.

    - `labels`: labels in ascending order, ``int64 (n_objects,)``.
    - `centers`: mean x and y of the pixels of each object, ``float64 (n_objects, 2)``, px. The center of the first
      pixel is at 0.5.
    - `eccentricity`: eccentricity of the ellipse with the same second moments, ``float64 (n_objects,)``, from 0
      (circle) to 1 (line).
    - `mean`: mean of the given values per object, ``float64 (n_objects,)``.
    """

    labels: NDArray[np.int64]
    centers: NDArray[np.float64]
    eccentricity: NDArray[np.float64]
    mean: NDArray[np.float64]


def measure_objects(labels: NDArray[np.integer], values: NDArray[np.floating]) -> Objects:
    """Measure center, eccentricity and mean value of the objects of a label map.

    - `labels`: integer label map, ``(y, x)``, 0 outside objects.
    - `values`: image to average, such as a stain, ``(y, x)``.
    - returns: the objects.

    >>> import numpy as np
    >>> found = measure_objects(np.array([[0, 3, 3], [0, 3, 3]]), np.ones((2, 3)))
    >>> found.labels, found.centers, found.eccentricity
    (array([3]), array([[2., 1.]]), array([0.]))
    """
    numbers, compact = _compact(labels)
    rows, columns = np.nonzero(compact)
    owner = compact[rows, columns] - 1
    area = np.maximum(np.bincount(owner, minlength=len(numbers)), 1)

    def mean(of: np.ndarray) -> np.ndarray:
        return np.bincount(owner, of, minlength=len(numbers)) / area

    x, y = mean(columns), mean(rows)
    right, down = columns - x[owner], rows - y[owner]
    major, minor = axes_lengths(mean(down**2), mean(right**2), mean(down * right))
    return Objects(
        labels=numbers,
        centers=np.stack([x, y], axis=1) + 0.5,
        eccentricity=np.where(major > 0, eccentricities(major, minor), 0.0),  # single pixels count as round
        mean=mean(values[rows, columns].astype(np.float64)),
    )


def means_within(labels: NDArray[np.integer], values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Average values over the pixels of each object.

    - `labels`: integer label map, ``(y, x)``, 0 outside objects.
    - `values`: images to average, ``(y, x, n_values)``.
    - returns: means, ``float64 (n_objects, n_values)``, ordered by label.

    >>> import numpy as np
    >>> means_within(np.array([[0, 3, 3]]), np.array([[[9.0], [1.0], [2.0]]]))
    array([[1.5]])
    """
    numbers, compact = _compact(labels)
    inside = compact > 0
    owner = compact[inside] - 1
    area = np.maximum(np.bincount(owner, minlength=len(numbers)), 1)
    sums = [np.bincount(owner, channel, minlength=len(numbers)) for channel in values[inside].T.astype(np.float64)]
    return np.stack(sums, axis=1) / area[:, None] if sums else np.empty((len(numbers), 0))


def axes_lengths(
    down: NDArray[np.floating], right: NDArray[np.floating], both: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Compute the axis lengths of ellipses with given second moments.

    - `down`, `right`, `both`: central second moments along rows, along columns, and mixed, px².
    - returns: major and minor axis lengths, px.

    >>> import numpy as np
    >>> axes_lengths(np.array([4.0]), np.array([1.0]), np.array([0.0]))
    (array([8.]), array([4.]))
    """
    middle, spread = (down + right) / 2, np.hypot((down - right) / 2, both)
    return 4 * np.sqrt(middle + spread), 4 * np.sqrt(np.maximum(middle - spread, 0))


def eccentricities(major: NDArray[np.floating], minor: NDArray[np.floating]) -> NDArray[np.floating]:
    """Compute the eccentricity of ellipses from their axis lengths, 0 for a circle.

    >>> import numpy as np
    >>> eccentricities(np.array([5.0]), np.array([3.0]))
    array([0.8])
    """
    return np.sqrt(np.maximum(1 - (minor / np.maximum(major, 1e-6)) ** 2, 0))


def trace_objects(
    labels: NDArray[np.integer], chosen: NDArray[np.integer], *, tolerance: float = 0.0
) -> list[NDArray[np.int32]]:
    """Trace the outer outlines of objects.

    - `labels`: integer label map, ``(y, x)``, 0 outside objects.
    - `chosen`: labels of the objects to trace.
    - `tolerance`: corners within this distance of the simplified line are dropped, px.
    - returns: for each label in `chosen`, column and row of the corner pixels of the border, ``int32 (n_points, 2)``.
      For objects in several pieces this is the piece with the longest border. The true outline lies half a pixel
      further out.

    >>> import numpy as np
    >>> labels = np.zeros((6, 6), int)
    >>> labels[1:4, 2:5] = 7
    >>> trace_objects(labels, np.array([7]))[0].tolist()
    [[2, 1], [2, 3], [4, 3], [4, 1]]
    """
    numbers, compact = _compact(labels)
    boxes = ndimage.find_objects(compact)
    outlines = []
    for index in np.searchsorted(numbers, chosen):
        rows, columns = boxes[index]
        piece = (compact[rows, columns] == index + 1).astype(np.uint8)
        piece = cv2.copyMakeBorder(piece, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        offset = (columns.start - 1, rows.start - 1)
        contours = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=offset)[0]
        longest = contours[0] if len(contours) == 1 else max(contours, key=lambda contour: cv2.arcLength(contour, True))
        outlines.append(cv2.approxPolyDP(longest, tolerance, True)[:, 0])
    return outlines


def _compact(labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return the labels in ascending order, and the map renumbered from 1, with 0 outside objects."""
    if labels.size and labels.max() > labels.size:  # a table up to the largest label would be too large
        numbers, places = np.unique(labels, return_inverse=True)
        nothing = int((numbers[:1] == 0).sum())
        return numbers[nothing:].astype(np.int64), (places.reshape(labels.shape) + 1 - nothing).astype(np.int32)
    there = np.bincount(labels.ravel()) > 0
    there[:1] = False
    return np.flatnonzero(there), np.where(there, np.cumsum(there), 0).astype(np.int32)[labels]
