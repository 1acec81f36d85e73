"""Position, shape and outline of the objects of a label map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Label map whose labels follow one another, for several measurements of one map.

    - `numbers`: labels in ascending order, ``int64 (n_objects,)``.
    - `places`: map renumbered from 1 in this order, ``int32 (y, x)``, with 0 outside objects.
    """

    numbers: NDArray[np.int64]
    places: NDArray[np.int32]

    @classmethod
    def of(cls, labels: NDArray[np.integer] | LabelMap) -> LabelMap:
        """Renumber a label map, ``(y, x)``, 0 outside objects.

        >>> import numpy as np
        >>> LabelMap.of(np.array([[0, 5, 9]])).places
        array([[0, 1, 2]], dtype=int32)
        """
        if isinstance(labels, LabelMap):
            return labels
        if labels.size and labels.max() > labels.size:  # a table up to the largest label would be too large
            numbers, places = np.unique(labels, return_inverse=True)
            nothing = int((numbers[:1] == 0).sum())
            return cls(
                numbers[nothing:].astype(np.int64), (places.reshape(labels.shape) + 1 - nothing).astype(np.int32)
            )
        there = np.bincount(labels.ravel()) > 0
        there[:1] = False
        return cls(np.flatnonzero(there), np.where(there, np.cumsum(there), 0).astype(np.int32).take(labels))

    @cached_property
    def pixels(self) -> NDArray[np.int64]:
        """Positions of the objects' pixels in the flattened map."""
        return np.flatnonzero(self.places)

    @cached_property
    def owner(self) -> NDArray[np.int64]:
        """Number of the object of each of the `pixels`, from 0."""
        return self.places.take(self.pixels).astype(np.int64) - 1

    @cached_property
    def area(self) -> NDArray[np.int64]:
        """Number of pixels per object, at least 1."""
        return np.maximum(np.bincount(self.owner, minlength=len(self.numbers)), 1)

    def mean(self, values: NDArray[np.number]) -> NDArray[np.float64]:
        """Average values per object, one value for each of the `pixels`."""
        return np.asarray(np.bincount(self.owner, values, minlength=len(self.numbers)) / self.area)


def measure_objects(labels: NDArray[np.integer] | LabelMap, values: NDArray[np.floating]) -> Objects:
    """Measure center, eccentricity and mean value of the objects of a label map.

    - `labels`: integer label map, ``(y, x)``, 0 outside objects.
    - `values`: image to average, such as a stain, ``(y, x)``.
    - returns: the objects.

    >>> import numpy as np
    >>> found = measure_objects(np.array([[0, 3, 3], [0, 3, 3]]), np.ones((2, 3)))
    >>> found.labels, found.centers, found.eccentricity
    (array([3]), array([[2., 1.]]), array([0.]))
    """
    objects = LabelMap.of(labels)
    mean, owner = objects.mean, objects.owner
    rows, columns = np.divmod(objects.pixels, objects.places.shape[1])
    x, y = mean(columns), mean(rows)
    right, down = columns - x[owner], rows - y[owner]
    major, minor = axes_lengths(mean(down**2), mean(right**2), mean(down * right))
    return Objects(
        labels=objects.numbers,
        centers=np.stack([x, y], axis=1) + 0.5,
        eccentricity=np.where(major > 0, eccentricities(major, minor), 0.0),  # single pixels count as round
        mean=mean(values[rows, columns]),
    )


def means_within(labels: NDArray[np.integer] | LabelMap, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Average values over the pixels of each object.

    - `labels`: integer label map, ``(y, x)``, 0 outside objects.
    - `values`: images to average, ``(y, x, n_values)``.
    - returns: means, ``float64 (n_objects, n_values)``, ordered by label.

    >>> import numpy as np
    >>> means_within(np.array([[0, 3, 3]]), np.array([[[9.0], [1.0], [2.0]]]))
    array([[1.5]])
    """
    objects = LabelMap.of(labels)
    means = [objects.mean(values[..., channel].take(objects.pixels)) for channel in range(values.shape[-1])]
    return np.stack(means, axis=1) if means else np.empty((len(objects.numbers), 0))


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
    labels: NDArray[np.integer] | LabelMap, chosen: NDArray[np.integer], *, tolerance: float = 0.0
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
    objects = LabelMap.of(labels)
    boxes = ndimage.find_objects(objects.places)
    outlines = []
    for index in np.searchsorted(objects.numbers, chosen):
        rows, columns = boxes[index]
        piece = (objects.places[rows, columns] == index + 1).astype(np.uint8)
        piece = cv2.copyMakeBorder(piece, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        offset = (columns.start - 1, rows.start - 1)
        contours = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=offset)[0]
        longest = contours[0] if len(contours) == 1 else max(contours, key=lambda contour: cv2.arcLength(contour, True))
        outlines.append(cv2.approxPolyDP(longest, tolerance, True)[:, 0])
    return outlines
