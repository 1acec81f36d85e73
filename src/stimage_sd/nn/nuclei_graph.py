"""Nuclei of stained tiles as graphs, by classical image analysis: found, measured, linked. No weights."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from stimage_sd.nn.label_maps import axes_lengths, eccentricities
from stimage_sd.nn.nuclear_contrast import haematoxylin
from stimage_sd.nn.nuclei_watershed import separate

#: what is measured of a nucleus, in the order of `NucleiGraphs.features`
FEATURES = (
    "area", "perimeter", "major_axis", "minor_axis", "eccentricity", "circularity", "extent", "radius",
    "haematoxylin_mean", "haematoxylin_std", "haematoxylin_min", "haematoxylin_max", "gradient_mean", "gradient_std",
    "red_mean", "green_mean", "blue_mean", "nearest",
)  # fmt: skip
#: least haematoxylin of a nucleus, the largest that nuclei are told apart to; least radius of a nucleus, px
_LEAST, _LARGEST, _LEAST_RADIUS = 0.15, 3.0, 2.0
#: deviation that haematoxylin is blurred by before nuclei are looked for, and their distance from the edge, px
_BLUR = 1.0
#: px around a peak without a higher one
_APART = 7


class NucleiGraphs(NamedTuple):
    """Nuclei of tiles, padded to one number.

    Attributes
    ----------
    features
        ``float32 (n_tiles, n_nuclei, 18)``, as `FEATURES` names them; px and optical densities, 0 where there is no
        nucleus.
    present
        ``bool (n_tiles, n_nuclei)``: where there is a nucleus.
    edges
        ``bool (n_tiles, n_nuclei, n_nuclei)``: who is linked with whom, both ways.
    """

    features: NDArray[np.float32]
    present: NDArray[np.bool_]
    edges: NDArray[np.bool_]


def nuclei_graphs(tiles: NDArray[np.uint8], *, n_nuclei: int = 128, n_neighbours: int = 5) -> NucleiGraphs:
    """Find, measure and link the nuclei of tiles.

    Parameters
    ----------
    tiles
        ``uint8 (n_tiles, height, width, 3)``, RGB, of some 0.5 µm a pixel.
    n_nuclei
        Nuclei of a tile at most; of more, those nearest to its centre.
    n_neighbours
        Each nucleus is linked with so many nearest ones; links go both ways.

    Returns
    -------
    The graphs.

    Notes
    -----
    Nuclei are where haematoxylin (colour deconvolution of Ruifrok and Johnston 2001) is above Otsu's threshold, told
    apart by a watershed from the peaks of the distance to the edge.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn.nuclei_graph import nuclei_graphs
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
    for number, tile in enumerate(tiles):
        places, features = _measured(np.ascontiguousarray(tile))
        middle = np.array(tile.shape[:2]) / 2
        chosen = np.argsort(np.linalg.norm(places - middle, axis=1), kind="stable")[:n_nuclei]
        graphs.features[number, : len(chosen)] = features[chosen]
        graphs.present[number, : len(chosen)] = True
        graphs.edges[number, : len(chosen), : len(chosen)] = _links(places[chosen], n_neighbours)
    return graphs


def standardised(graphs: NucleiGraphs) -> NucleiGraphs:
    """Scale each feature to mean 0 and deviation 1 over all nuclei, as of one section.

    Parameters
    ----------
    graphs
        Of all tiles of a section.

    Returns
    -------
    The same, with other features.

    Examples
    --------
    >>> import numpy as np
    >>> features = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    >>> present = np.array([[True, True, True, False]])
    >>> scaled = standardised(NucleiGraphs(features, present, np.zeros((1, 4, 4), bool))).features
    >>> [round(float(value), 2) for value in scaled.ravel()]
    [-1.22, 0.0, 1.22, 0.0]
    """
    nuclei = graphs.features[graphs.present]
    if len(nuclei) == 0:
        return graphs
    mean, deviation = nuclei.mean(axis=0), np.maximum(nuclei.std(axis=0), 1e-6)
    features = np.where(graphs.present[..., None], (graphs.features - mean) / deviation, 0).astype(np.float32)
    return graphs._replace(features=features)


def _links(places: np.ndarray, n_neighbours: int) -> np.ndarray:
    links = np.zeros((len(places), len(places)), dtype=bool)
    wanted = min(n_neighbours, len(places) - 1)
    if wanted < 1:
        return links
    found = cKDTree(places).query(places, k=wanted + 1)[1]
    links[np.arange(len(places))[:, None], found] = True
    np.fill_diagonal(links, False)
    return links | links.T


def _labelled(stain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the nuclei of a tile from 1, 0 elsewhere, and the distance to their edge."""
    smooth = cv2.GaussianBlur(stain, (0, 0), _BLUR)
    scaled = np.clip(smooth / _LARGEST * 255, 0, 255).astype(np.uint8)
    otsu, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_OTSU)
    inside = (smooth > max(otsu / 255 * _LARGEST, _LEAST)).astype(np.uint8)
    inside = cv2.morphologyEx(inside, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3)))
    return separate(inside, blur=_BLUR, apart=_APART, least_radius=_LEAST_RADIUS)


def _measured(tile: NDArray[np.uint8]) -> tuple[np.ndarray, np.ndarray]:
    """Centres (row, column) and features of the nuclei of a tile."""
    stain = haematoxylin(np.moveaxis(tile, -1, 0))
    labels, distance = _labelled(stain)
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
    boxes = [
        (found[0].stop - found[0].start) * (found[1].stop - found[1].start) for found in ndimage.find_objects(labels)
    ]
    gradient = np.hypot(cv2.Sobel(stain, cv2.CV_32F, 1, 0), cv2.Sobel(stain, cv2.CV_32F, 0, 1))[rows, columns]
    amount = stain[rows, columns].astype(np.float64)
    density = -np.log((tile[rows, columns] + 1.0) / 256)
    features = [
        area, perimeter, major, minor, eccentricities(major, minor),
        4 * np.pi * area / np.maximum(perimeter, 1) ** 2, area / np.array(boxes),
        ndimage.maximum(distance, labels, numbers), mean(amount), deviation(amount),
        ndimage.minimum(stain, labels, numbers), ndimage.maximum(stain, labels, numbers),
        mean(gradient), deviation(gradient), *(mean(density[:, colour]) for colour in range(3)), _nearest(places),
    ]  # fmt: skip
    return places, np.stack(features, axis=1)


def _at_edge(labels: np.ndarray) -> np.ndarray:
    """Whether a pixel's neighbour above, below, left or right is of no or another nucleus, as 0 or 1."""
    padded = np.pad(labels, 1)
    sides = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
    return np.logical_or.reduce([side != labels for side in sides]).astype(float)


def _nearest(places: np.ndarray) -> np.ndarray:
    """Distance to the nearest other nucleus; 0 of a nucleus alone."""
    if len(places) < 2:
        return np.zeros(len(places))
    return cKDTree(places).query(places, k=2)[0][:, 1]
