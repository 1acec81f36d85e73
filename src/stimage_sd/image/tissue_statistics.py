"""Statistics of color, texture and nuclei of H&E tiles, by classical image analysis without network weights.

The statistics describe the amount and spread of each stain, the variance of the image at several scales, and the number
and size of the nuclei.
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from stimage_sd.image.distance import edge_distance
from stimage_sd.image.stain import HED

_PERCENTILES = (5, 25, 50, 75, 95)
#: step between the pixels used for percentiles, because neighboring pixels are alike
_EVERY = 7
#: optical density of every 8-bit value
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
#: standard deviations of the Gaussians between which the image variance is measured, px
_SCALES = (1.0, 2.0, 4.0, 8.0)
#: smallest optical density of tissue, summed over the colors; smallest red density of a nucleus
_TISSUE, _NUCLEUS = 0.25, 0.3
#: smallest radius of a nucleus and smallest area of a blob, px
_LEAST_RADIUS, _LEAST_AREA = 3.0, 20
#: largest density of the threshold search
_LARGEST_DENSITY = 3.0

#: number of statistics: color, tissue, scales, local patterns, nuclei
N_STATISTICS = 6 * (2 + len(_PERCENTILES)) + 2 + len(_SCALES) + 10 + 8


def tissue_statistics(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute statistics of color, texture and nuclei of tiles.

    Parameters
    ----------
    tiles
        RGB tiles, ``uint8 (n_tiles, height, width, 3)``.

    Returns
    -------
    ``float32 (n_tiles, 66)``, in this order:

    - mean, standard deviation and percentiles 5, 25, 50, 75 and 95 of the optical density of red, green and blue, of
      hematoxylin, eosin and saturation
    - share of tissue, and correlation of hematoxylin and eosin over pixels
    - log variance of the red density between Gaussians of 1 and 2, 2 and 4, 4 and 8, 8 and 16 px
    - shares of the ten rotation-invariant uniform local binary patterns of the eight neighbors
    - nuclei: number, log number, number of blobs, share of area, log mean and log deviation of blob areas, mean and
      deviation of nuclear radii

    Notes
    -----
    Nuclei are peaks of the distance transform where the smoothed red density is above Otsu's threshold. Local binary
    patterns follow Ojala et al. 2002.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.image.tissue_statistics import tissue_statistics
    >>> tissue_statistics(np.full((2, 64, 64, 3), 255, np.uint8)).shape
    (2, 66)
    """
    rows = [_tile(np.ascontiguousarray(tile)) for tile in tiles]
    return np.stack(rows) if rows else np.empty((0, N_STATISTICS), dtype=np.float32)


def _tile(tile: NDArray[np.uint8]) -> NDArray[np.float32]:
    density = _DENSITY[tile]
    unit = HED / np.linalg.norm(HED, axis=1, keepdims=True)
    stains = np.maximum(density.reshape(-1, 3) @ np.linalg.inv(unit).astype(np.float32), 0)
    brightest = tile.max(axis=2).astype(np.float32)
    saturation = (brightest - tile.min(axis=2)) / np.maximum(brightest, 1)
    channels = np.stack([*density.reshape(-1, 3).T, stains[:, 0], stains[:, 1], saturation.ravel()])
    quantiles = np.percentile(channels[:, ::_EVERY], _PERCENTILES, axis=1).T
    color = np.concatenate([channels.mean(axis=1)[:, None], channels.std(axis=1)[:, None], quantiles], axis=1)
    red = np.ascontiguousarray(density[..., 0])
    parts: list[np.ndarray | list[float]] = [
        color.ravel(),
        [float((density.sum(axis=2) > _TISSUE).mean()), _correlation(stains[:, 0], stains[:, 1])],
        _variances(red),
        _local_patterns(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)),
        _nuclei(red),
    ]
    return np.concatenate(parts).astype(np.float32)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    length = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / length if length > 1e-6 else 0.0


def _variances(values: np.ndarray) -> list[float]:
    blurred = [cv2.GaussianBlur(values, (0, 0), scale) for scale in (*_SCALES, 2 * _SCALES[-1])]
    return [float(np.log(1e-6 + np.var(fine - coarse))) for fine, coarse in pairwise(blurred)]


def _local_patterns(gray: NDArray[np.uint8]) -> np.ndarray:
    """Return the shares of uniform patterns by number of neighbors at least as bright, other patterns last."""
    height, width = gray.shape
    # neighbors in order around the center
    steps = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)]
    center = gray[1:-1, 1:-1]
    bits = np.stack(
        [gray[1 + down : height - 1 + down, 1 + right : width - 1 + right] >= center for down, right in steps]
    )
    changes = (bits != np.roll(bits, 1, axis=0)).sum(axis=0)
    label = np.where(changes <= 2, bits.sum(axis=0), 9)
    return np.bincount(label.ravel(), minlength=10) / max(label.size, 1)


def _nuclei(red: np.ndarray) -> list[float]:
    smooth = cv2.GaussianBlur(red, (0, 0), 1.0)
    scaled = np.clip(smooth / _LARGEST_DENSITY * 255, 0, 255).astype(np.uint8)
    otsu, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_OTSU)
    inside = (smooth > max(otsu / 255 * _LARGEST_DENSITY, _NUCLEUS)).astype(np.uint8)
    inside = cv2.morphologyEx(inside, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    distance = edge_distance(inside)
    highest = cv2.dilate(distance, np.ones((7, 7), np.uint8))
    peaks = (distance >= highest) & (distance > _LEAST_RADIUS)
    n_nuclei = cv2.connectedComponents(peaks.astype(np.uint8))[0] - 1
    areas = cv2.connectedComponentsWithStats(inside)[2][1:, cv2.CC_STAT_AREA]
    areas = areas[areas >= _LEAST_AREA]
    radii = distance[peaks]
    return [
        float(n_nuclei),
        float(np.log1p(n_nuclei)),
        float(len(areas)),
        float(inside.mean()),
        float(np.log1p(areas.mean())) if len(areas) else 0.0,
        float(np.log1p(areas.std())) if len(areas) else 0.0,
        float(radii.mean()) if len(radii) else 0.0,
        float(radii.std()) if len(radii) else 0.0,
    ]
