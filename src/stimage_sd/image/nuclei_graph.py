"""Graphs of nuclei in H&E tiles, by classical image analysis without network weights."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from stimage_sd.image.label_maps import axes_lengths, eccentricities
from stimage_sd.image.nuclear_contrast import hematoxylin
from stimage_sd.image.nuclei_watershed import separate

#: names of the measurements per nucleus, in the order of `NucleiGraphs.features`
FEATURES = (
    "area", "perimeter", "major_axis", "minor_axis", "eccentricity", "circularity", "extent", "radius",
    "hematoxylin_mean", "hematoxylin_std", "hematoxylin_min", "hematoxylin_max", "gradient_mean", "gradient_std",
    "red_mean", "green_mean", "blue_mean", "nearest",
)  # fmt: skip
#: smallest hematoxylin density of a nucleus, largest density of the threshold search, smallest radius in px
_LEAST, _LARGEST, _LEAST_RADIUS = 0.15, 3.0, 2.0
#: standard deviation of the Gaussian blur of hematoxylin and of the distance to the edge, px
_BLUR = 1.0
#: side of the square around a peak without a higher peak, px
_APART = 7


class NucleiGraphs(NamedTuple):
    """Nuclei of tiles, padded to one number of nuclei per tile.

    - `features`: measurements named in `FEATURES`, ``float32 (n_tiles, n_nuclei, 18)``, in px and optical densities.
      Padding is 0.
    - `present`: whether an entry is a nucleus, ``bool (n_tiles, n_nuclei)``.
    - `edges`: symmetric adjacency of the nuclei, ``bool (n_tiles, n_nuclei, n_nuclei)``.
    """

    features: NDArray[np.float32]
    present: NDArray[np.bool_]
    edges: NDArray[np.bool_]


def nuclei_graphs(tiles: NDArray[np.uint8], *, n_nuclei: int = 128, n_neighbors: int = 5) -> NucleiGraphs:
    """Find, measure and link the nuclei of tiles.

    - `tiles`: RGB tiles, ``uint8 (n_tiles, height, width, 3)``, at about 0.5 µm per pixel.
    - `n_nuclei`: maximum number of nuclei per tile. The nuclei nearest to the tile center are kept.
    - `n_neighbors`: each nucleus is linked with this many nearest nuclei, in both directions.
    - returns: the graphs.

    Nuclei are areas with hematoxylin above Otsu's threshold (color deconvolution of Ruifrok and Johnston 2001).
    A watershed from the peaks of the distance to the edge separates touching nuclei.

    >>> import numpy as np
    >>> from stimage_sd.image.nuclei_graph import nuclei_graphs
    >>> tile = np.full((40, 40, 3), 255, np.uint8)
    >>> tile[5:15, 5:15] = tile[25:35, 20:30] = (80, 60, 140)
    >>> graphs = nuclei_graphs(tile[None], n_nuclei=4)
    >>> graphs.present.sum(), graphs.edges[0, 0, 1]
    (np.int64(2), np.True_)
    """
    shape = (len(tiles), n_nuclei)
    graphs = NucleiGraphs(
        np.zeros((*shape, len(FEATURES)), np.float32), np.zeros(shape, bool), np.zeros((*shape, n_nuclei), bool)
    )
    for row, tile in enumerate(tiles):
        places, features = _measured(np.ascontiguousarray(tile))
        middle = np.array(tile.shape[:2]) / 2
        chosen = np.argsort(np.linalg.norm(places - middle, axis=1), kind="stable")[:n_nuclei]
        graphs.features[row, : len(chosen)] = features[chosen]
        graphs.present[row, : len(chosen)] = True
        graphs.edges[row, : len(chosen), : len(chosen)] = _links(places[chosen], n_neighbors)
    return graphs


def standardized(graphs: NucleiGraphs) -> NucleiGraphs:
    """Scale each feature to mean 0 and standard deviation 1 over all nuclei, such as those of one section.

    - `graphs`: graphs of all tiles of a section.
    - returns: the graphs with scaled features.

    >>> import numpy as np
    >>> features = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    >>> present = np.array([[True, True, True, False]])
    >>> scaled = standardized(NucleiGraphs(features, present, np.zeros((1, 4, 4), bool))).features
    >>> [round(float(value), 2) for value in scaled.ravel()]
    [-1.22, 0.0, 1.22, 0.0]
    """
    nuclei = graphs.features[graphs.present]
    if len(nuclei) == 0:
        return graphs
    mean, deviation = nuclei.mean(axis=0), np.maximum(nuclei.std(axis=0), 1e-6)
    features = np.where(graphs.present[..., None], (graphs.features - mean) / deviation, 0).astype(np.float32)
    return graphs._replace(features=features)


def _links(places: np.ndarray, n_neighbors: int) -> np.ndarray:
    links = np.zeros((len(places), len(places)), dtype=bool)
    wanted = min(n_neighbors, len(places) - 1)
    if wanted < 1:
        return links
    nearest = cKDTree(places).query(places, k=wanted + 1)[1]
    links[np.arange(len(places))[:, None], nearest] = True
    np.fill_diagonal(links, False)
    return links | links.T


def _labeled(stain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the label map of the nuclei of a tile, and the distance to their edge."""
    smooth = cv2.GaussianBlur(stain, (0, 0), _BLUR)
    scaled = np.clip(smooth / _LARGEST * 255, 0, 255).astype(np.uint8)
    otsu, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_OTSU)
    inside = (smooth > max(otsu / 255 * _LARGEST, _LEAST)).astype(np.uint8)
    inside = cv2.morphologyEx(inside, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3)))
    return separate(inside, blur=_BLUR, apart=_APART, least_radius=_LEAST_RADIUS)


def _measured(tile: NDArray[np.uint8]) -> tuple[np.ndarray, np.ndarray]:
    """Return centers (row, column) and features of the nuclei of a tile."""
    stain = hematoxylin(np.moveaxis(tile, -1, 0))
    labels, distance = _labeled(stain)
    numbers = np.arange(1, labels.max() + 1)
    if len(numbers) == 0:
        return np.empty((0, 2)), np.empty((0, len(FEATURES)))
    rows, columns = np.nonzero(labels)
    owner = labels[rows, columns] - 1
    area = np.bincount(owner)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, values) / area

    def deviation(values: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(mean(values**2) - mean(values) ** 2, 0))

    places = np.stack([mean(rows), mean(columns)], axis=1)
    down, right = rows - places[owner, 0], columns - places[owner, 1]
    major, minor = axes_lengths(mean(down**2), mean(right**2), mean(down * right))
    perimeter = np.bincount(owner, _at_edge(labels)[rows, columns])
    boxes = [(box[0].stop - box[0].start) * (box[1].stop - box[1].start) for box in ndimage.find_objects(labels)]
    gradient = np.hypot(cv2.Sobel(stain, cv2.CV_32F, 1, 0), cv2.Sobel(stain, cv2.CV_32F, 0, 1))[rows, columns]
    amount = stain[rows, columns].astype(np.float64)
    density = -np.log((tile[rows, columns] + 1.0) / 256)
    features = [
        area, perimeter, major, minor, eccentricities(major, minor),
        4 * np.pi * area / np.maximum(perimeter, 1) ** 2, area / np.array(boxes),
        ndimage.maximum(distance, labels, numbers), mean(amount), deviation(amount),
        ndimage.minimum(stain, labels, numbers), ndimage.maximum(stain, labels, numbers),
        mean(gradient), deviation(gradient), *(mean(density[:, color]) for color in range(3)), _nearest(places),
    ]  # fmt: skip
    return places, np.stack(features, axis=1)


def _at_edge(labels: np.ndarray) -> np.ndarray:
    """Mark pixels with a neighbor above, below, left or right outside the same nucleus, as 0 or 1."""
    padded = np.pad(labels, 1)
    sides = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
    return np.logical_or.reduce([side != labels for side in sides]).astype(float)


def _nearest(places: np.ndarray) -> np.ndarray:
    """Return the distance to the nearest other nucleus, 0 for a single nucleus."""
    if len(places) < 2:
        return np.zeros(len(places))
    return cKDTree(places).query(places, k=2)[0][:, 1]
