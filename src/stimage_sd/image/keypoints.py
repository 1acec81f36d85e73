"""SIFT features of nuclear contrast images, and matching of features between two images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from stimage_sd.image.nuclear_contrast import inner, windows

#: maximum number of features per image, spread over the image
_MOST_FEATURES = 12_000
#: maximum number of matches, most distinctive first
_MOST_MATCHES = 4_000


@dataclass(frozen=True, eq=False)
class Picture:
    """Image for `align`.

    - `contrast`: nuclear contrast, ``uint8 (y, x)``, from `stimage_sd.image.nuclear_contrast.nuclear_contrast`.
    - `padding`: area that was not scanned, ``bool (y, x)``.
    """

    contrast: np.ndarray
    padding: np.ndarray

    def shrunk(self, factor: float) -> Picture:
        """Return the image with its sides divided by `factor`, or the image itself for a factor of at most 1."""
        if factor <= 1:
            return self
        size = (max(1, round(self.contrast.shape[1] / factor)), max(1, round(self.contrast.shape[0] / factor)))
        padding = cv2.resize(self.padding.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        return Picture(cv2.resize(self.contrast, size, interpolation=cv2.INTER_AREA), padding)

    def scale_from(self, other: Picture) -> np.ndarray:
        """Return the matrix ``(3, 3)`` from pixels of an image of the same extent to pixels of this image."""
        rows, columns = (mine / theirs for mine, theirs in zip(self.contrast.shape, other.contrast.shape, strict=True))
        return np.diag([columns, rows, 1.0])


@dataclass(frozen=True, eq=False)
class Features:
    """SIFT features of an image.

    - `points`: positions x and y, ``float64 (n, 2)``, px.
    - `angles`: orientations, ``(n,)``, radians from x toward y.
    - `sizes`: diameters, ``(n,)``, px.
    - `descriptors`: SIFT descriptors, ``float32 (n, 128)``, of unit length.
    """

    points: np.ndarray
    angles: np.ndarray
    sizes: np.ndarray
    descriptors: np.ndarray

    def inverted(self) -> Features:
        """Return the features of the inverted image, where gradients turn by 180 degrees."""
        grid = self.descriptors.reshape(-1, 4, 4, 8)[:, ::-1, ::-1]
        return replace(self, angles=self.angles + np.pi, descriptors=grid.reshape(-1, 128))

    def mirrored(self) -> Features:
        """Return the features of the image mirrored from y to -y."""
        grid = self.descriptors.reshape(-1, 4, 4, 8)[:, ::-1][..., -np.arange(8) % 8]
        return Features(self.points * [1, -1], -self.angles, self.sizes, grid.reshape(-1, 128))


def detect(picture: Picture, *, most: int = _MOST_FEATURES) -> Features:
    """Find SIFT features spread over the image, except on padding and its border.

    - `picture`: the image.
    - `most`: maximum number of features.
    - returns: the features, with square-root descriptors (Arandjelović and Zisserman 2012).
    """
    border = cv2.dilate(picture.padding.astype(np.uint8), np.ones((17, 17), np.uint8))
    busy = [
        (core, around)
        for core, around in windows(picture.contrast.shape, margin=64, side=512)
        if not border[core].all() and np.ptp(picture.contrast[core]) > 0
    ]
    sift = cv2.SIFT_create(nfeatures=2 * most // max(1, len(busy)), contrastThreshold=0.03)
    rows, descriptors = [np.empty((0, 4))], [np.empty((0, 128), np.float32)]
    for core, around in busy:
        mask = np.zeros_like(border[around])
        mask[inner(core, around)] = 1 - border[core]
        keypoints, described = sift.detectAndCompute(picture.contrast[around], mask)
        if not keypoints:
            continue
        offset = (around[1].start + 0.5, around[0].start + 0.5)
        rows.append(
            np.array([(k.pt[0] + offset[0], k.pt[1] + offset[1], np.deg2rad(k.angle), k.size) for k in keypoints])
        )
        descriptors.append(np.sqrt(described / np.maximum(described.sum(axis=1, keepdims=True), 1e-9)))
    table = np.concatenate(rows)
    return Features(table[:, :2], table[:, 2], table[:, 3], np.concatenate(descriptors))


def match(moving: Features, fixed: Features, *, ratio: float = 0.97) -> tuple[np.ndarray, np.ndarray]:
    """Match features that are mutual nearest neighbors and pass the ratio test.

    - `moving`, `fixed`: features of the two images.
    - `ratio`: largest ratio of the distances to the nearest and the second nearest descriptor (Lowe 2004).
    - returns: numbers of the matched features in `moving` and in `fixed`, most distinctive first.
    """
    if len(moving.points) < 2 or len(fixed.points) < 2:
        return np.empty(0, int), np.empty(0, int)
    nearest, distance = np.empty(len(moving.points), int), np.empty((len(moving.points), 2))
    best_back, back = np.full(len(fixed.points), -np.inf), np.full(len(fixed.points), -1)
    for start in range(0, len(moving.points), 2048):
        product = moving.descriptors[start : start + 2048] @ fixed.descriptors.T
        rows = np.arange(len(product))
        top = product.argmax(axis=0)
        better = product[top, np.arange(product.shape[1])] > best_back
        best_back[better], back[better] = product[top, np.arange(product.shape[1])][better], start + top[better]
        first = product.argmax(axis=1)
        nearest[start + rows] = first
        closest = product[rows, first]
        product[rows, first] = -1
        distance[start + rows] = np.sqrt(np.maximum(2 - 2 * np.stack([closest, product.max(axis=1)], axis=1), 0))
    quality = distance[:, 0] / np.maximum(distance[:, 1], 1e-9)
    kept = np.flatnonzero((quality < ratio) & (back[nearest] == np.arange(len(nearest))))
    kept = kept[np.argsort(quality[kept], kind="stable")][:_MOST_MATCHES]
    return kept, nearest[kept]
