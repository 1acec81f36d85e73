"""Nuclei of H&E as a label map by classical image analysis: no weights, nothing to install.

Haematoxylin by colour deconvolution; Otsu's threshold of a whole section, and a local one; holes filled; a watershed
from the peaks of the distance to the edge tells nuclei apart that touch. All lengths follow from the diameter of a
nucleus, so that resolutions give much the same.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from stimage_sd.nn.nuclear_contrast import haematoxylin

#: optical density, summed over the colours, from which a pixel is tissue
_TISSUE = 0.25
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
#: histograms of haematoxylin: number of bins, and the largest density that is told apart
_BINS, _LARGEST = 512, 4.0


class Recipe(NamedTuple):
    """Numbers of the method; lengths in diameters of a nucleus, areas in those of a disc of that diameter.

    They were chosen on eleven small patches of three fields (docs, "Nuclei without a network").

    Attributes
    ----------
    blur
        Deviation of the Gaussian that haematoxylin is smoothed by.
    least
        Least haematoxylin of a nucleus, in multiples of Otsu's threshold.
    surroundings, contrast
        Deviation of the Gaussian that a pixel's surroundings are averaged by, and the least ratio to that mean.
    opening
        Radius of the disc that opens each nucleus: thinner spurs are taken away.
    ridge
        Deviation of the Gaussian that the distance to the edge is smoothed by.
    apart
        Distance within which a peak has no higher one.
    hole, smallest, largest
        Largest hole that is filled, smallest and largest nucleus.
    """

    blur: float = 0.03
    least: float = 0.85
    surroundings: float = 0.8
    contrast: float = 1.15
    opening: float = 0.1
    ridge: float = 0.09
    apart: float = 0.2
    hole: float = 0.4
    smallest: float = 0.16
    largest: float = 10.0


RECIPE = Recipe()


def nuclei_watershed(
    image: NDArray[np.uint8], *, threshold: float, nucleus_px: float, recipe: Recipe = RECIPE
) -> NDArray[np.int32]:
    """Find nuclei.

    Parameters
    ----------
    image
        ``uint8 (y, x, 3)``, RGB, H&E.
    threshold
        Otsu's threshold of haematoxylin, natural-log optical density, as `otsu_of_histogram` gives it for a section.
    nucleus_px
        Diameter of a nucleus, about, px.
    recipe
        The method's numbers.

    Returns
    -------
    ``int32 (y, x)``: nuclei are numbered from 1, in the order of their first pixel row by row; 0 is none.

    Notes
    -----
    A pixel depends on what is up to some six diameters of a nucleus away, most of it much nearer.

    Examples
    --------
    >>> import numpy as np
    >>> tile = np.full((40, 40, 3), (240, 200, 225), np.uint8)
    >>> tile[5:15, 5:15] = tile[25:35, 20:30] = (80, 60, 140)
    >>> labels = nuclei_watershed(tile, threshold=0.5, nucleus_px=10)
    >>> np.bincount(labels.ravel())[1:]
    array([96, 96])
    """
    inside = _inside(image, threshold, nucleus_px, recipe)
    labels, _ = separate(
        inside,
        blur=recipe.ridge * nucleus_px,
        apart=2 * round(recipe.apart * nucleus_px) + 1,
        least_radius=0.0,
    )
    return _sized(_opened(labels, max(1, round(recipe.opening * nucleus_px))), recipe, nucleus_px)


def separate(
    inside: NDArray[np.uint8], *, blur: float, apart: int, least_radius: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tell touching blobs apart by a watershed from the peaks of the distance to their edge.

    Parameters
    ----------
    inside
        ``uint8 (y, x)``, not 0 inside blobs.
    blur
        Deviation of the Gaussian that the distance is smoothed by, since ridges have small peaks of their own, px.
    apart
        Side of the square around a peak without a higher one, px, odd.
    least_radius
        Least distance to the edge of a peak, px.

    Returns
    -------
    Numbers of the blobs from 1, 0 elsewhere, ``int32 (y, x)``, and the distance to the edge, ``float32``, px.

    Examples
    --------
    >>> import numpy as np
    >>> two = np.zeros((20, 36), np.uint8)
    >>> _ = cv2.circle(two, (10, 10), 8, 1, -1), cv2.circle(two, (24, 10), 8, 1, -1)
    >>> separate(two, blur=1.0, apart=7, least_radius=2.0)[0].max()
    np.int32(2)
    """
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    height = cv2.GaussianBlur(distance, (0, 0), blur)
    peaks = (height >= cv2.dilate(height, np.ones((apart, apart), np.uint8))) & (distance >= least_radius)
    peaks &= inside > 0
    seeds = cv2.connectedComponents(peaks.astype(np.uint8))[1]
    return watershed(-height, seeds, mask=(inside > 0) & (distance > 0)), distance


def haematoxylin_histogram(
    image: NDArray[np.uint8], *, nucleus_px: float, recipe: Recipe = RECIPE
) -> NDArray[np.float32]:
    """Count the pixels on tissue by their haematoxylin, smoothed as `nuclei_watershed` does.

    Parameters
    ----------
    image
        ``uint8 (y, x, 3)``, RGB, H&E.
    nucleus_px
        Diameter of a nucleus, about, px.
    recipe
        The method's numbers.

    Returns
    -------
    ``float32 (512,)``, pixels; counts of several images of one section can be added.

    Examples
    --------
    >>> import numpy as np
    >>> haematoxylin_histogram(np.full((4, 4, 3), 120, np.uint8), nucleus_px=8).sum()
    np.float32(16.0)
    """
    stain, tissue = _stain(image, recipe.blur * nucleus_px)
    counts = np.histogram(np.clip(stain[tissue], 0, _LARGEST), bins=_BINS, range=(0, _LARGEST))[0]
    return counts.astype(np.float32)


def otsu_of_histogram(histogram: NDArray[np.floating]) -> float:
    """Otsu's threshold of a section.

    Parameters
    ----------
    histogram
        ``(512,)``, as `haematoxylin_histogram` gives it, or a sum of those.

    Returns
    -------
    Haematoxylin, natural-log optical density; infinite where no pixel is on tissue.

    Examples
    --------
    >>> import numpy as np
    >>> pixels = np.zeros(512)
    >>> pixels[40:60], pixels[200:220] = 9, 3
    >>> 0.3 < otsu_of_histogram(pixels) < 1.7
    True
    """
    counts = np.asarray(histogram, dtype=np.float64)
    filled = np.flatnonzero(counts)
    if len(filled) < 2:  # one amount of stain everywhere has no nuclei
        return float(_middles()[filled[0]]) if len(filled) else float("inf")
    return float(threshold_otsu(hist=(counts, _middles())))


def percentiles_of_histogram(histogram: NDArray[np.floating], percentiles: tuple[float, ...]) -> list[float]:
    """Percentiles of a section's haematoxylin, to the width of a bin.

    Parameters
    ----------
    histogram
        ``(512,)``, as `haematoxylin_histogram` gives it, or a sum of those; not all 0.
    percentiles
        From 0 to 100.

    Returns
    -------
    Natural-log optical densities.

    Examples
    --------
    >>> import numpy as np
    >>> [round(value, 2) for value in percentiles_of_histogram(np.ones(512), (25, 50))]
    [1.0, 2.0]
    """
    below = np.cumsum(np.asarray(histogram, dtype=np.float64))
    bins = np.searchsorted(below, np.asarray(percentiles) / 100 * below[-1])
    return [float(value) for value in _middles()[np.minimum(bins, _BINS - 1)]]


def _middles() -> NDArray[np.float64]:
    return (np.arange(_BINS) + 0.5) * _LARGEST / _BINS


def _stain(image: NDArray[np.uint8], blur: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Smoothed haematoxylin, and where tissue is."""
    amount = haematoxylin(np.moveaxis(image, -1, 0))
    density = _DENSITY[image[..., 0]] + _DENSITY[image[..., 1]] + _DENSITY[image[..., 2]]
    return cv2.GaussianBlur(amount, (0, 0), max(blur, 0.3)), density > _TISSUE


def _inside(image: NDArray[np.uint8], threshold: float, nucleus_px: float, recipe: Recipe) -> NDArray[np.uint8]:
    """1 on nuclei: above the section's threshold and the surroundings' mean, without holes and thin parts."""
    stain, tissue = _stain(image, recipe.blur * nucleus_px)
    weight, reach = tissue.astype(np.float32), recipe.surroundings * nucleus_px
    # glass is no surroundings: a nucleus at the tissue's edge is compared with the tissue only
    mean = cv2.GaussianBlur(stain * weight, (0, 0), reach) / np.maximum(cv2.GaussianBlur(weight, (0, 0), reach), 1e-3)
    inside = ((stain > recipe.least * threshold) & (stain > recipe.contrast * mean)).astype(np.uint8)
    inside = cv2.morphologyEx(inside, cv2.MORPH_OPEN, _disc(1))
    return _without_holes(inside, recipe.hole * _area(nucleus_px))


def _area(nucleus_px: float) -> float:
    return np.pi / 4 * nucleus_px**2


def _without_holes(inside: NDArray[np.uint8], largest: float) -> NDArray[np.uint8]:
    """Fill holes; larger ones are lumen that nuclei stand around."""
    _, holes, statistics, _ = cv2.connectedComponentsWithStats(1 - inside, connectivity=4)
    fill = statistics[:, cv2.CC_STAT_AREA] <= largest
    fill[0] = True  # what is inside already
    return fill[holes].astype(np.uint8)


def _disc(radius: int) -> NDArray[np.uint8]:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def _opened(labels: NDArray[np.int32], radius: int) -> NDArray[np.int32]:
    """Open each nucleus by itself, so that spurs go also where they touch another; the largest piece stays."""
    opened, disc = np.zeros_like(labels), _disc(radius)
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        # with its surroundings, so that only the image's border is no edge
        around = tuple(slice(max(0, part.start - radius - 1), part.stop + radius + 1) for part in box)
        piece = cv2.morphologyEx((labels[around] == number).astype(np.uint8), cv2.MORPH_OPEN, disc)
        count, pieces, statistics, _ = cv2.connectedComponentsWithStats(piece, connectivity=8)
        if count > 2:
            piece = pieces == 1 + np.argmax(statistics[1:, cv2.CC_STAT_AREA])
        opened[around][piece > 0] = number
    return opened


def _sized(labels: NDArray[np.int32], recipe: Recipe, nucleus_px: float) -> NDArray[np.int32]:
    """Take away what is too small or too large, and number the rest anew."""
    areas = np.bincount(labels.ravel()) / _area(nucleus_px)
    keep = (areas >= recipe.smallest) & (areas <= recipe.largest)
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]
