"""What can be told of a slide's quality from its colours and edges: numbers in, numbers out.

The measures are those of HistoQC (Janowczyk et al. 2019, JCO Clinical Cancer Informatics), made so that they
depend less on how strongly a slide is stained. Two pictures of a slide are looked at: a *working* picture, on
which sharpness is seen, and a *map*, `REDUCTION` times coarser, on which all else is.

Examples
--------
>>> noise = np.random.default_rng(0).uniform(0, 1, (64, 64)).astype(np.float32)
>>> everywhere = np.ones((16, 16), bool)
>>> smooth = cv2.GaussianBlur(noise, (0, 0), 2)
>>> [float(blurry(*edge_energy(picture), everywhere).mean()) for picture in (noise, smooth)]
[0.0, 1.0]
"""

from __future__ import annotations

import cv2
import numpy as np

from stimage_sd.nn.stain import optical_density

#: working pixels a map pixel spans: HistoQC looks for artefacts at 1.25 x and for blur at a finer magnification
REDUCTION = 4
#: what is coarser than this deviation is no detail, working px
DETAIL = 4.0
#: deviation of the neighbourhood that is judged as one, map px
NEIGHBOURHOOD = 3.5
#: ratio of the Laplacian to detail below which a neighbourhood is blurry; a Gaussian of one working pixel leaves this
LEAST_SHARPNESS = 0.7
#: mean absolute Laplacian of grey values 0 to 1 below which there is nothing to see (HistoQC's ``blur_threshold``)
LEAST_EDGES = 0.02
#: a neighbourhood of which less is tissue is not judged
LEAST_JUDGED = 0.05
#: what lies so near to the tissue's edge is not looked at, map px: glass is smooth, and the edge itself is sharp
MARGIN = 2

#: optical densities (natural log) below which there is neither ink nor tissue
LEAST_INK, LEAST_TISSUE = 0.25, 0.1
#: haematoxylin absorbs about as much red as green (99.9 % of tissue pixels below 1.3), blue and green inks more;
#: with tissue under them less so, but they are then darker than any tissue
BLUE_RED_TO_GREEN, DARK_BLUE_RED_TO_GREEN, DARK_BLUE_DENSITY = 1.4, 1.2, 1.8
#: tissue never lets green through best
GREEN_TO_OTHERS = 0.9
#: red ink absorbs blue nearly as it does green (eosin half of it), hardly any red, and more than red blood cells do;
#: the same for it on tissue
RED_BLUE_TO_GREEN, RED_RED_TO_GREEN, RED_DENSITY = 0.75, 0.5, 1.0
DARK_RED_BLUE_TO_GREEN, DARK_RED_RED_TO_GREEN, DARK_RED_DENSITY = 0.62, 0.6, 1.6
#: dark and grey: densities of the three colours differ by less than this part of the largest
GREY_SPREAD, GREY_DENSITY, BLACK_DENSITY = 0.3, 0.35, 0.9


def glass_colour(rgb: np.ndarray) -> np.ndarray:
    """Colour of unstained glass: the brightest percent of each channel, at least 200.

    Parameters
    ----------
    rgb
        ``uint8 (y, x, 3)``.

    Returns
    -------
    ``float64 (3,)``.
    """
    return np.maximum(np.percentile(rgb.reshape(-1, 3), 99, axis=0), 200.0)


def edge_energy(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and detail of a working picture, averaged to map pixels.

    Parameters
    ----------
    grey
        ``float32 (y, x)`` grey values, 0 to 1; both sides multiples of `REDUCTION`.

    Returns
    -------
    ``float32 (y / REDUCTION, x / REDUCTION)`` twice: the mean absolute Laplacian (4 neighbours), and the mean
    absolute difference to the picture smoothed by a Gaussian of deviation `DETAIL`.
    """
    edges = np.abs(cv2.Laplacian(grey, cv2.CV_32F, ksize=1, borderType=cv2.BORDER_REFLECT_101))
    detail = np.abs(grey - cv2.GaussianBlur(grey, (0, 0), DETAIL, borderType=cv2.BORDER_REFLECT_101))
    size = (grey.shape[1] // REDUCTION, grey.shape[0] // REDUCTION)
    return tuple(cv2.resize(energy, size, interpolation=cv2.INTER_AREA) for energy in (edges, detail))


def sharpness(edges: np.ndarray, detail: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sharpness of each map pixel's neighbourhood.

    Parameters
    ----------
    edges, detail
        ``float32 (y, x)`` of `edge_energy`.
    inside
        ``bool (y, x)``, `True` on what is judged.

    Returns
    -------
    The ratio of edges to detail, which a picture's contrast does not change; the edges themselves; both Gaussian
    means over `NEIGHBOURHOOD` of what lies `MARGIN` inside, ``float32 (y, x)``; and where there was enough
    to judge, ``bool (y, x)``.
    """
    inner = cv2.erode(inside.astype(np.uint8), disk(MARGIN), borderType=cv2.BORDER_REPLICATE).astype(np.float32)
    weight = cv2.GaussianBlur(inner, (0, 0), NEIGHBOURHOOD)
    safe = np.maximum(weight, 1e-6)
    near_edges, near_detail = (
        cv2.GaussianBlur(energy * inner, (0, 0), NEIGHBOURHOOD) / safe for energy in (edges, detail)
    )
    return near_edges / np.maximum(near_detail, 1e-6), near_edges, inside & (weight > LEAST_JUDGED)


def blurry(edges: np.ndarray, detail: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Where a picture is out of focus, or has nothing in it to focus on.

    Parameters
    ----------
    edges, detail, inside
        As in `sharpness`.

    Returns
    -------
    ``bool (y, x)``: the ratio under `LEAST_SHARPNESS`, or edges under `LEAST_EDGES`.

    Notes
    -----
    HistoQC's ``BlurDetectionModule`` thresholds the smoothed absolute Laplacian alone, so that a pale slide is blurry
    and a dark one never is. Divided by the detail it says how smooth the picture is for its own contrast. In
    noise without tissue the ratio is high, hence the second condition, which is HistoQC's.
    """
    ratio, near_edges, judged = sharpness(edges, detail, inside)
    return judged & ((ratio < LEAST_SHARPNESS) | (near_edges < LEAST_EDGES))


def ink(rgb: np.ndarray, glass: np.ndarray, *, thickness: float, least_area: float) -> np.ndarray:
    """Strokes of a marker pen: blue, green, red, or black.

    Parameters
    ----------
    rgb
        ``uint8 (y, x, 3)``.
    glass
        ``(3,)`` colour of unstained glass.
    thickness
        Width of the thinnest stroke, px; what is thinner is no pen.
    least_area
        Area of the smallest mark, px.

    Returns
    -------
    ``bool (y, x)``.

    Notes
    -----
    Ink is told from stained tissue by how its optical density is shared among red, green and blue, and by its
    size. Saturated inks are seen on glass and on tissue. Not seen are violet inks of haematoxylin's colour, pale inks
    on tissue, and blue on strong eosin, with which it makes violet; a lake of red blood cells as large as a pen
    mark may be taken for red ink.
    """
    red, green, blue = np.moveaxis(optical_density(rgb, glass), -1, 0)
    highest, lowest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    blue_ink = red > BLUE_RED_TO_GREEN * np.maximum(green, LEAST_INK / 2)
    blue_ink |= (red > DARK_BLUE_RED_TO_GREEN * green) & (red > DARK_BLUE_DENSITY)
    green_ink = green < GREEN_TO_OTHERS * np.minimum(red, blue)
    red_ink = (blue > RED_BLUE_TO_GREEN * green) & (red < RED_RED_TO_GREEN * green) & (green > RED_DENSITY)
    red_ink |= (
        (blue > DARK_RED_BLUE_TO_GREEN * green) & (red < DARK_RED_RED_TO_GREEN * green) & (green > DARK_RED_DENSITY)
    )
    black_ink = (highest - lowest < GREY_SPREAD * highest) & (lowest > BLACK_DENSITY)
    marks = np.zeros(rgb.shape[:2], bool)
    kernel = disk(max(1, round((thickness - 1) / 2)))
    for colour in (blue_ink, green_ink, red_ink, black_ink):
        closed = cv2.morphologyEx((colour & (highest > LEAST_INK)).astype(np.uint8), cv2.MORPH_CLOSE, disk(1))
        marks |= without_small(cv2.morphologyEx(closed, cv2.MORPH_OPEN, kernel) > 0, least_area)
    return marks


def dark_lines(
    rgb: np.ndarray, glass: np.ndarray, *, thickness: float, least_length: float, most_enclosed: float
) -> np.ndarray:
    """Thin, dark, colourless lines, and what they enclose: rims of air bubbles, edges of cover slips, hairs.

    Parameters
    ----------
    rgb
        ``uint8 (y, x, 3)``.
    glass
        ``(3,)`` colour of unstained glass.
    thickness
        Width from which on a line is a pen's, px.
    least_length
        Length of the shortest line, px: the longer side of its bounding box.
    most_enclosed
        Largest area that a closed line makes a bubble of, px.

    Returns
    -------
    ``bool (y, x)``.

    Notes
    -----
    A bubble is seen by its rim, and the rim by its being grey: where it crosses strongly stained tissue it is not
    seen, and a bubble whose rim is not closed is counted by its rim alone. Dust is shorter than `least_length`.
    """
    densities = optical_density(rgb, glass)
    highest, lowest = densities.max(axis=2), densities.min(axis=2)
    dark = ((highest - lowest < GREY_SPREAD * highest) & (lowest > GREY_DENSITY)).astype(np.uint8)
    thick = cv2.morphologyEx(dark, cv2.MORPH_OPEN, disk(max(1, round((thickness - 1) / 2))))
    thin = dark & ~cv2.dilate(thick, disk(2)) & 1
    joined = cv2.morphologyEx(thin, cv2.MORPH_CLOSE, disk(2))
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    long = statistics[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max(axis=1) >= least_length
    # a line fills little of its box; a patch of grey texture fills much
    areas = statistics[:, cv2.CC_STAT_AREA]
    slender = areas <= thickness * np.hypot(statistics[:, cv2.CC_STAT_WIDTH], statistics[:, cv2.CC_STAT_HEIGHT]) * 2.5
    long &= slender
    long[0] = False
    lines = long[labels]
    _, holes, hole_statistics, _ = cv2.connectedComponentsWithStats((~lines).astype(np.uint8), connectivity=4)
    enclosed = hole_statistics[:, cv2.CC_STAT_AREA] <= most_enclosed
    enclosed[np.unique(np.concatenate([holes[[0, -1]].ravel(), holes[:, [0, -1]].ravel()]))] = False
    return lines | enclosed[holes]


def count_small_regions(rgb: np.ndarray, glass: np.ndarray, excluded: np.ndarray, *, areas: tuple[float, float]) -> int:
    """Count specks of tissue: small islands of pixels that absorb.

    Parameters
    ----------
    rgb
        ``uint8 (y, x, 3)``.
    glass
        ``(3,)`` colour of unstained glass.
    excluded
        ``bool (y, x)``, artefacts: what touches them is not counted.
    areas
        Smallest area that is counted and smallest that is not any more, px.

    Returns
    -------
    Number of 8-connected regions whose mean optical density is over `LEAST_TISSUE`.
    """
    # an artefact's faint border falls apart into specks
    near = cv2.dilate(excluded.astype(np.uint8), disk(3)) > 0
    tissue = (optical_density(rgb, glass).mean(axis=2) > LEAST_TISSUE) & ~near
    _, _, statistics, _ = cv2.connectedComponentsWithStats(tissue.astype(np.uint8), connectivity=8)
    found = statistics[1:, cv2.CC_STAT_AREA]
    return int(((found >= areas[0]) & (found < areas[1])).sum())


def without_small(mask: np.ndarray, least: float) -> np.ndarray:
    """Drop 8-connected regions of less than `least` pixels."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = statistics[:, cv2.CC_STAT_AREA] >= least
    large[0] = False
    return large[labels]


def disk(radius: int) -> np.ndarray:
    """A structuring element, ``uint8 (2 * radius + 1, 2 * radius + 1)``."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
