"""SIFT features of a picture's nuclear contrast, and which of two pictures' features belong together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from stimage_sd.nn.nuclear_contrast import inner, windows

#: features an image keeps, spread over it
_MOST_FEATURES = 12_000
#: matches that are kept, the most distinctive first
_MOST_MATCHES = 4_000


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as `align` wants it.

    Attributes
    ----------
    contrast
        ``uint8 (y, x)`` from `stimage_sd.nn.nuclear_contrast.nuclear_contrast`.
    padding
        ``bool (y, x)``, where nothing was scanned.
    """

    contrast: np.ndarray
    padding: np.ndarray

    def shrunk(self, factor: float) -> Picture:
        """Return the image at a lower resolution, `factor` ≥ 1 of its pixels along a side to one."""
        if factor <= 1:
            return self
        size = (max(1, round(self.contrast.shape[1] / factor)), max(1, round(self.contrast.shape[0] / factor)))
        padding = cv2.resize(self.padding.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        return Picture(cv2.resize(self.contrast, size, interpolation=cv2.INTER_AREA), padding)

    def scale_from(self, other: Picture) -> np.ndarray:
        """Return the matrix ``(3, 3)`` from the pixels of an image of the same extent to those of this one."""
        rows, columns = (mine / theirs for mine, theirs in zip(self.contrast.shape, other.contrast.shape, strict=True))
        return np.diag([columns, rows, 1.0])


@dataclass(frozen=True, eq=False)
class Features:
    """SIFT features of an image.

    Attributes
    ----------
    points
        ``float64 (n, 2)`` x and y, px.
    angles
        ``(n,)`` orientations, radians, from x towards y.
    sizes
        ``(n,)`` diameters, px.
    descriptors
        ``float32 (n, 128)``, unit length.
    """

    points: np.ndarray
    angles: np.ndarray
    sizes: np.ndarray
    descriptors: np.ndarray

    def inverted(self) -> Features:
        """Return the features that the image has with bright and dark exchanged: gradients turn by 180°."""
        grid = self.descriptors.reshape(-1, 4, 4, 8)[:, ::-1, ::-1]
        return replace(self, angles=self.angles + np.pi, descriptors=grid.reshape(-1, 128))

    def mirrored(self) -> Features:
        """Return the features that the image has seen from behind, y turned to -y."""
        grid = self.descriptors.reshape(-1, 4, 4, 8)[:, ::-1][..., -np.arange(8) % 8]
        return Features(self.points * [1, -1], -self.angles, self.sizes, grid.reshape(-1, 128))


def detect(picture: Picture, *, most: int = _MOST_FEATURES) -> Features:
    """Find SIFT features, spread over the image; none on padding or its border.

    Parameters
    ----------
    picture
        The image.
    most
        Features at most.

    Returns
    -------
    The features; the square root of the descriptors is taken (Arandjelović and Zisserman 2012).
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
        keypoints, found = sift.detectAndCompute(picture.contrast[around], mask)
        if not keypoints:
            continue
        offset = (around[1].start + 0.5, around[0].start + 0.5)
        rows.append(
            np.array([(k.pt[0] + offset[0], k.pt[1] + offset[1], np.deg2rad(k.angle), k.size) for k in keypoints])
        )
        descriptors.append(np.sqrt(found / np.maximum(found.sum(axis=1, keepdims=True), 1e-9)))
    table = np.concatenate(rows)
    return Features(table[:, :2], table[:, 2], table[:, 3], np.concatenate(descriptors))


def match(moving: Features, fixed: Features, *, ratio: float = 0.97) -> tuple[np.ndarray, np.ndarray]:
    """Pair features that are each other's nearest, and nearer than the second nearest by a factor.

    Parameters
    ----------
    moving, fixed
        Features of the two images.
    ratio
        Of the distances to the nearest and the second nearest descriptor, at most (Lowe 2004).

    Returns
    -------
    Numbers of the paired features of `moving` and of `fixed`, the most distinctive first.
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
