"""Segmentation of nuclei in H&E by classical image analysis, without network weights or extra packages.

Color deconvolution gives hematoxylin. Nuclei are above Otsu's threshold of the whole section and above a local
threshold. Holes are filled, and a watershed from the peaks of the distance to the edge separates touching nuclei. All
lengths scale with the diameter of a nucleus, so results depend little on the resolution.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label as label_pieces
from skimage.segmentation import watershed

from stimage_sd.image.distance import edge_distance
from stimage_sd.image.nuclear_contrast import hematoxylin

#: smallest optical density of tissue, summed over the colors
_TISSUE = 0.25
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
#: number of bins and largest density of hematoxylin histograms
_BINS, _LARGEST = 512, 4.0


class Recipe(NamedTuple):
    """Parameters of the method: lengths in nucleus diameters, areas in areas of a disk of that diameter.

    The defaults were chosen on eleven small patches of three fields (docs, "Nuclei without a network").

    - `blur`: standard deviation of the Gaussian for hematoxylin.
    - `least`: smallest hematoxylin of a nucleus, in multiples of Otsu's threshold.
    - `surroundings`, `contrast`: standard deviation of the Gaussian for the local mean, and smallest ratio of a nucleus
      to the local mean.
    - `opening`: radius of the disk that opens each nucleus. Thinner spurs are removed.
    - `ridge`: standard deviation of the Gaussian for the distance to the edge.
    - `apart`: distance within which a peak has no higher peak.
    - `hole`, `smallest`, `largest`: areas of the largest filled hole, the smallest nucleus and the largest nucleus.
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
    """Segment the nuclei of an H&E image.

    - `image`: RGB H&E image, ``uint8 (y, x, 3)``.
    - `threshold`: Otsu's threshold of hematoxylin for the section, natural-log optical density, from
      `otsu_of_histogram`.
    - `nucleus_px`: approximate diameter of a nucleus, px.
    - `recipe`: parameters of the method.
    - returns: label map, ``int32 (y, x)``. Nuclei are numbered from 1 in the order of their first pixel, row by row.
      The background is 0.

    A label depends on pixels up to about six nucleus diameters away, and mostly on much nearer pixels.

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
    """Separate touching blobs by a watershed from the peaks of the distance to their edge.

    - `inside`: mask, ``uint8 (y, x)``, nonzero inside blobs.
    - `blur`: standard deviation of the Gaussian for the distance, px. It removes small peaks along ridges.
    - `apart`: side of the square around a peak without a higher peak, px, odd.
    - `least_radius`: smallest distance of a peak to the edge, px.
    - returns: label map ``int32 (y, x)``, numbered from 1 with 0 outside, and distance to the edge ``float32 (y, x)``,
      px.

    >>> import numpy as np
    >>> two = np.zeros((20, 36), np.uint8)
    >>> _ = cv2.circle(two, (10, 10), 8, 1, -1), cv2.circle(two, (24, 10), 8, 1, -1)
    >>> separate(two, blur=1.0, apart=7, least_radius=2.0)[0].max()
    np.int32(2)
    """
    distance = edge_distance(inside)
    height = cv2.GaussianBlur(distance, (0, 0), blur)
    peaks = (height >= cv2.dilate(height, np.ones((apart, apart), np.uint8))) & (distance >= least_radius)
    peaks &= inside > 0
    seeds = cv2.connectedComponents(peaks.astype(np.uint8))[1]
    return watershed(-height, seeds, mask=(inside > 0) & (distance > 0)), distance


def hematoxylin_histogram(
    image: NDArray[np.uint8], *, nucleus_px: float, recipe: Recipe = RECIPE
) -> NDArray[np.float32]:
    """Compute the hematoxylin histogram of tissue pixels, smoothed as in `nuclei_watershed`.

    - `image`: RGB H&E image, ``uint8 (y, x, 3)``.
    - `nucleus_px`: approximate diameter of a nucleus, px.
    - `recipe`: parameters of the method.
    - returns: number of pixels per bin, ``float32 (512,)``. Histograms of several images of one section can be added.

    >>> import numpy as np
    >>> hematoxylin_histogram(np.full((4, 4, 3), 120, np.uint8), nucleus_px=8).sum()
    np.float32(16.0)
    """
    stain, tissue = _stain(image, recipe.blur * nucleus_px)
    counts = np.histogram(np.clip(stain[tissue], 0, _LARGEST), bins=_BINS, range=(0, _LARGEST))[0]
    return counts.astype(np.float32)


def otsu_of_histogram(histogram: NDArray[np.floating]) -> float:
    """Compute Otsu's threshold of a section from its hematoxylin histogram.

    - `histogram`: histogram from `hematoxylin_histogram`, or a sum of such histograms, ``(512,)``.
    - returns: threshold of hematoxylin, natural-log optical density. Infinite if no pixel is on tissue.

    >>> import numpy as np
    >>> pixels = np.zeros(512)
    >>> pixels[40:60], pixels[200:220] = 9, 3
    >>> 0.3 < otsu_of_histogram(pixels) < 1.7
    True
    """
    counts = np.asarray(histogram, dtype=np.float64)
    filled = np.flatnonzero(counts)
    if len(filled) < 2:  # uniform stain has no nuclei
        return float(_middles()[filled[0]]) if len(filled) else float("inf")
    return float(threshold_otsu(hist=(counts, _middles())))


def percentiles_of_histogram(histogram: NDArray[np.floating], percentiles: tuple[float, ...]) -> list[float]:
    """Compute percentiles of hematoxylin of a section, to the width of a bin.

    - `histogram`: histogram from `hematoxylin_histogram`, or a sum of such histograms, ``(512,)``, not all 0.
    - `percentiles`: percentiles, from 0 to 100.
    - returns: Natural-log optical densities.

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
    """Return smoothed hematoxylin and the tissue mask."""
    amount = hematoxylin(np.moveaxis(image, -1, 0))
    density = _DENSITY[image[..., 0]] + _DENSITY[image[..., 1]] + _DENSITY[image[..., 2]]
    return cv2.GaussianBlur(amount, (0, 0), max(blur, 0.3)), density > _TISSUE


def _inside(image: NDArray[np.uint8], threshold: float, nucleus_px: float, recipe: Recipe) -> NDArray[np.uint8]:
    """Return the mask of nuclei, above the section and the local threshold, without holes and thin parts."""
    stain, tissue = _stain(image, recipe.blur * nucleus_px)
    weight, reach = tissue.astype(np.float32), recipe.surroundings * nucleus_px
    # leave out glass, so that a nucleus at the tissue edge is compared with tissue only
    mean = cv2.GaussianBlur(stain * weight, (0, 0), reach) / np.maximum(cv2.GaussianBlur(weight, (0, 0), reach), 1e-3)
    inside = ((stain > recipe.least * threshold) & (stain > recipe.contrast * mean)).astype(np.uint8)
    inside = cv2.morphologyEx(inside, cv2.MORPH_OPEN, _disc(1))
    return _without_holes(inside, recipe.hole * _area(nucleus_px))


def _area(nucleus_px: float) -> float:
    return np.pi / 4 * nucleus_px**2


def _without_holes(inside: NDArray[np.uint8], largest: float) -> NDArray[np.uint8]:
    """Fill holes up to the given area; larger holes are lumen surrounded by nuclei."""
    _, holes, statistics, _ = cv2.connectedComponentsWithStats(1 - inside, connectivity=4)
    fill = statistics[:, cv2.CC_STAT_AREA] <= largest
    fill[0] = True  # the mask itself
    return fill[holes].astype(np.uint8)


def _disc(radius: int) -> NDArray[np.uint8]:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def _opened(labels: NDArray[np.int32], radius: int) -> NDArray[np.int32]:
    """Open each nucleus separately, which removes spurs that touch another nucleus; keep the largest piece."""
    disc = _disc(radius)
    # the types of OpenCV's filters that hold so many labels exactly
    small = labels.astype(np.uint16 if labels.max(initial=0) < 2**16 else np.float64)
    # a disc lies within one nucleus where its smallest and its largest label are the same
    eroded = np.where(cv2.erode(small, disc) == cv2.dilate(small, disc), small, 0).astype(small.dtype)
    opened = cv2.dilate(eroded, disc).astype(np.int32)
    return _largest_pieces(opened)


def _largest_pieces(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Keep the largest piece of each nucleus."""
    pieces, n_pieces = label_pieces(labels, connectivity=2, return_num=True)
    owner = np.zeros(n_pieces + 1, dtype=np.int64)
    owner[pieces] = labels
    several = np.flatnonzero(np.bincount(owner[1:]) > 1)
    if len(several):
        boxes = ndimage.find_objects(labels)
        for label in several:
            around = boxes[label - 1]
            piece = (labels[around] == label).astype(np.uint8)
            _, parts, statistics, _ = cv2.connectedComponentsWithStats(piece, connectivity=8)
            largest = 1 + np.argmax(statistics[1:, cv2.CC_STAT_AREA])
            labels[around][(piece > 0) & (parts != largest)] = 0
    return labels


def _sized(labels: NDArray[np.int32], recipe: Recipe, nucleus_px: float) -> NDArray[np.int32]:
    """Drop nuclei that are too small or too large, and renumber the others."""
    areas = np.bincount(labels.ravel()) / _area(nucleus_px)
    keep = (areas >= recipe.smallest) & (areas <= recipe.largest)
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]
