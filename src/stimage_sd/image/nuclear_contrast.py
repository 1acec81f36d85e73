"""Nuclear contrast of any nuclear stain, comparable between two images of one tissue.

A hematoxylin channel and a DAPI image of the same nuclei differ in intensity, background and illumination. Local
contrast, measured against the surroundings of each pixel, is much the same in both. Images are processed in squares, so
that working memory does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from stimage_sd.image.stain import HED, optical_density

Window = tuple[slice, slice]

#: value of `nuclear_contrast` at the mean of the surroundings
NEUTRAL = 128
#: side of a square, px
_TILE = 1024
#: resolution of the padding search in px, and smallest side of padding in these units
_CELL, _OPENING = 8, 4


def hematoxylin(rgb: np.ndarray) -> np.ndarray:
    """Compute the hematoxylin channel by color deconvolution (Ruifrok and Johnston 2001).

    - `rgb`: H&E image, ``uint8 (3, y, x)``.
    - returns: Natural-log optical density, ``float32 (y, x)``, not negative.

    >>> hematoxylin(np.full((3, 1, 1), 255, np.uint8))
    array([[0.]], dtype=float32)
    """
    unmix = np.linalg.inv(HED / np.linalg.norm(HED, axis=1, keepdims=True))[:, 0]
    tables = (optical_density(np.arange(256), np.array(255)) * unmix[:, None]).astype(np.float32)
    amount = tables[0][rgb[0]] + tables[1][rgb[1]] + tables[2][rgb[2]]
    return np.maximum(amount, 0.0)


def find_padding(intensity: np.ndarray) -> np.ndarray:
    """Find padding of unscanned areas: flat areas of 32 px and more at the image border.

    - `intensity`: image, ``uint8 (y, x)``.
    - returns: padding mask, ``bool (y, x)``, some pixels wider than the padding.
    """
    square = np.ones((3, 3), np.uint8)
    flat = (cv2.dilate(intensity, square) == cv2.erode(intensity, square)).astype(np.uint8) * np.uint8(255)
    size = tuple(max(1, side // _CELL) for side in intensity.shape[::-1])
    cells = (cv2.resize(flat, size, interpolation=cv2.INTER_AREA) == 255).astype(np.uint8)
    # replicate the border, so that a narrow strip along the border is found as well
    wide = cv2.copyMakeBorder(cells, _OPENING, _OPENING, _OPENING, _OPENING, cv2.BORDER_REPLICATE)
    wide = cv2.morphologyEx(wide, cv2.MORPH_OPEN, np.ones((_OPENING, _OPENING), np.uint8))
    cells = wide[_OPENING:-_OPENING, _OPENING:-_OPENING]
    labels = cv2.connectedComponents(cells, connectivity=4)[1]
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    outside = cv2.dilate(np.isin(labels, border[border > 0]).astype(np.uint8), square)
    return cv2.resize(outside, intensity.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0


def nuclear_contrast(intensity: np.ndarray, padding: np.ndarray, *, nucleus_px: float) -> np.ndarray:
    """Compute the local contrast of each pixel at the size of nuclei.

    - `intensity`: nuclear stain, ``uint8 (y, x)``.
    - `padding`: padding mask, ``bool (y, x)``, left out of all means.
    - `nucleus_px`: approximate diameter of a nucleus, px. Detail below a quarter of this is blurred, and background
      above about five times this is removed.
    - returns: ``uint8 (y, x)``: `NEUTRAL` at the mean of the surroundings, with 32 units per standard deviation of the
      surroundings.
    """
    step = max(1, min(intensity.shape) // 1000)
    sample = _contrast_parts(intensity[::step, ::step], padding[::step, ::step], nucleus_px / step)[1]
    inside = sample[~padding[::step, ::step]]
    # on bare glass the deviation is noise, so a share of the tissue deviation is added
    least = 0.3 * float(np.percentile(inside, 95)) + 1e-3 if inside.size else 1.0
    out = np.full(intensity.shape, NEUTRAL, np.uint8)
    for core, around in windows(intensity.shape, margin=round(12 * nucleus_px)):
        difference, deviation = _contrast_parts(intensity[around], padding[around], nucleus_px)
        value = np.clip(NEUTRAL + 32 * difference / (deviation + least), 0, 255)
        value[padding[around]] = NEUTRAL
        out[core] = value[inner(core, around)]
    return out


def _contrast_parts(intensity: np.ndarray, padding: np.ndarray, nucleus_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the difference from the mean of the surroundings, and their standard deviation."""
    valid = np.where(padding, np.float32(0), np.float32(1))
    seen = intensity.astype(np.float32) * valid
    near, far = max(0.25 * nucleus_px, 0.5), 4.0 * nucleus_px
    smooth = _blur(seen, near) / np.maximum(_blur(valid, near), 1e-3)
    weight = np.maximum(_blur(valid, far), 1e-3)
    mean = _blur(smooth * valid, far) / weight
    difference = (smooth - mean) * valid
    return difference, np.sqrt(_blur(difference**2, far) / weight)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Apply a Gaussian blur, on a downsampled copy if the blur is wide."""
    step = int(sigma // 3)
    if step < 2:
        return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    size = (max(1, image.shape[1] // step), max(1, image.shape[0] // step))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / step, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(small, image.shape[::-1], interpolation=cv2.INTER_LINEAR)


def windows(shape: tuple[int, ...], *, margin: int, side: int = _TILE) -> Iterator[tuple[Window, Window]]:
    """Yield squares that cover an image.

    - `shape`: ``(y, x)`` of the image, px.
    - `margin`: width of the margin around a square, px.
    - `side`: side of a square, px.
    - returns: for each square, the slices of rows and columns, and the same with margin, clipped at the image border.
    """
    height, width = shape
    for top in range(0, height, side):
        for left in range(0, width, side):
            bottom, right = min(top + side, height), min(left + side, width)
            core = slice(top, bottom), slice(left, right)
            yield (
                core,
                (
                    slice(max(0, top - margin), min(bottom + margin, height)),
                    slice(max(0, left - margin), min(right + margin, width)),
                ),
            )


def inner(core: Window, around: Window) -> Window:
    """Return the slices of a square within the square with margin."""
    rows, columns = (
        slice(small.start - large.start, small.stop - large.start) for small, large in zip(core, around, strict=True)
    )
    return rows, columns
