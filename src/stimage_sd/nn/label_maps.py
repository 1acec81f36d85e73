"""Objects of a label map: where they are, their shape, their outlines."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


class Objects(NamedTuple):
    """Objects of a label map, by their labels.

    Attributes
    ----------
    labels
        ``int64 (n_objects,)``, ascending.
    centres
        ``float64 (n_objects, 2)``, x and y of the mean of an object's pixels, px; a pixel's own is its middle, so
        that the map begins at 0.
    eccentricity
        ``float64 (n_objects,)``, of the ellipse with the same second moments: 0 a circle, 1 a line.
    mean
        ``float64 (n_objects,)``, mean of the values that were passed.
    """

    labels: NDArray[np.int64]
    centres: NDArray[np.float64]
    eccentricity: NDArray[np.float64]
    mean: NDArray[np.float64]


def measure_objects(labels: NDArray[np.integer], values: NDArray[np.floating]) -> Objects:
    """Measure the objects of a label map.

    Parameters
    ----------
    labels
        Integers, ``(y, x)``; 0 is no object.
    values
        ``(y, x)``, such as a stain.

    Returns
    -------
    The objects.

    Examples
    --------
    >>> import numpy as np
    >>> found = measure_objects(np.array([[0, 3, 3], [0, 3, 3]]), np.ones((2, 3)))
    >>> found.labels, found.centres, found.eccentricity
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
        centres=np.stack([x, y], axis=1) + 0.5,
        eccentricity=np.where(major > 0, eccentricities(major, minor), 0.0),  # one pixel is round
        mean=mean(values[rows, columns].astype(np.float64)),
    )


def means_within(labels: NDArray[np.integer], values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Average values over the pixels of each object.

    Parameters
    ----------
    labels
        Integers, ``(y, x)``; 0 is no object.
    values
        ``(y, x, n_values)``.

    Returns
    -------
    ``float64 (n_objects, n_values)``, by their labels.

    Examples
    --------
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
    """Lengths of the axes of the ellipses that have these second moments.

    Parameters
    ----------
    down, right, both
        Central moments along the rows, along the columns, and mixed; px².

    Returns
    -------
    The longer and the shorter ones, px.

    Examples
    --------
    >>> import numpy as np
    >>> axes_lengths(np.array([4.0]), np.array([1.0]), np.array([0.0]))
    (array([8.]), array([4.]))
    """
    middle, spread = (down + right) / 2, np.hypot((down - right) / 2, both)
    return 4 * np.sqrt(middle + spread), 4 * np.sqrt(np.maximum(middle - spread, 0))


def eccentricities(major: NDArray[np.floating], minor: NDArray[np.floating]) -> NDArray[np.floating]:
    """Eccentricity of ellipses from the lengths of their axes: 0 of a circle.

    Examples
    --------
    >>> import numpy as np
    >>> eccentricities(np.array([5.0]), np.array([3.0]))
    array([0.8])
    """
    return np.sqrt(np.maximum(1 - (minor / np.maximum(major, 1e-6)) ** 2, 0))


def trace_objects(
    labels: NDArray[np.integer], chosen: NDArray[np.integer], *, tolerance: float = 0.0
) -> list[NDArray[np.int32]]:
    """Trace the outlines of objects, holes left out.

    Parameters
    ----------
    labels
        Integers, ``(y, x)``; 0 is no object.
    chosen
        Labels of the objects to trace.
    tolerance
        Corners are left out that are no further than this from the line without them, px.

    Returns
    -------
    For each of `chosen` the column and row of the pixels along its border, ``int32 (n_points, 2)``, corners only; of an
    object in several pieces the piece of the longest border. The true outline lies half a pixel further out.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.zeros((6, 6), int)
    >>> labels[1:4, 2:5] = 7
    >>> trace_objects(labels, np.array([7]))[0].tolist()
    [[2, 1], [2, 3], [4, 3], [4, 1]]
    """
    numbers, compact = _compact(labels)
    boxes = ndimage.find_objects(compact)
    outlines = []
    for number in np.searchsorted(numbers, chosen):
        rows, columns = boxes[number]
        piece = (compact[rows, columns] == number + 1).astype(np.uint8)
        piece = cv2.copyMakeBorder(piece, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        offset = (columns.start - 1, rows.start - 1)
        found = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=offset)[0]
        longest = found[0] if len(found) == 1 else max(found, key=lambda contour: cv2.arcLength(contour, True))
        outlines.append(cv2.approxPolyDP(longest, tolerance, True)[:, 0])
    return outlines


def _compact(labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Labels in ascending order, and the map of their numbers from 1, 0 where there is no object."""
    if labels.size and labels.max() > labels.size:  # a table of all labels up to the last would be large
        numbers, places = np.unique(labels, return_inverse=True)
        nothing = int((numbers[:1] == 0).sum())
        return numbers[nothing:].astype(np.int64), (places.reshape(labels.shape) + 1 - nothing).astype(np.int32)
    there = np.bincount(labels.ravel()) > 0
    there[:1] = False
    return np.flatnonzero(there), np.where(there, np.cumsum(there), 0).astype(np.int32)[labels]
