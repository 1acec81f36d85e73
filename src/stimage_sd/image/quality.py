"""Slide quality from colors and edges: blur, pen marks, bubbles, specks of tissue.

The measures follow HistoQC (Janowczyk et al. 2019, JCO Clinical Cancer Informatics), with less dependence on the stain
strength. Two images of a slide are used. Sharpness is measured on a *working* image, all else on a *map* that is
`REDUCTION` times coarser.

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

from stimage_sd.image.stain import optical_density

#: working pixels per map pixel; HistoQC detects artifacts at 1.25 x and blur at a finer magnification
REDUCTION = 4
#: standard deviation above which structure is not detail, working px
DETAIL = 4.0
#: standard deviation of the Gaussian neighborhood, map px
NEIGHBORHOOD = 3.5
#: smallest Laplacian-to-detail ratio of a sharp area, which a Gaussian blur of one working pixel gives
LEAST_SHARPNESS = 0.7
#: smallest mean absolute Laplacian of gray values 0 to 1 with visible structure (HistoQC's ``blur_threshold``)
LEAST_EDGES = 0.02
#: smallest tissue share of a judged neighborhood
LEAST_JUDGED = 0.05
#: margin along the tissue edge that is left out, map px, because glass is smooth and the edge itself is sharp
MARGIN = 2

#: smallest optical densities (natural log) of ink and of tissue
LEAST_INK, LEAST_TISSUE = 0.25, 0.1
#: red-to-green ratio of blue and green inks; 99.9 % of tissue pixels are below 1.3, because hematoxylin absorbs red and
#: green about equally. On tissue the ratio is lower, but the ink is darker than any tissue
BLUE_RED_TO_GREEN, DARK_BLUE_RED_TO_GREEN, DARK_BLUE_DENSITY = 1.4, 1.2, 1.8
#: largest ratio of green to the other densities for green ink; tissue never transmits green best
GREEN_TO_OTHERS = 0.9
#: red ink absorbs blue nearly as much as green (eosin half as much) and hardly any red. It is denser than red blood
#: cells. The second row is for red ink on tissue
RED_BLUE_TO_GREEN, RED_RED_TO_GREEN, RED_DENSITY = 0.75, 0.5, 1.0
DARK_RED_BLUE_TO_GREEN, DARK_RED_RED_TO_GREEN, DARK_RED_DENSITY = 0.62, 0.6, 1.6
#: gray: largest spread of the three color densities as a share of the largest density; smallest gray and black density
GRAY_SPREAD, GRAY_DENSITY, BLACK_DENSITY = 0.3, 0.35, 0.9


def glass_color(rgb: np.ndarray) -> np.ndarray:
    """Estimate the color of unstained glass, the 99th percentile of each channel and at least 200.

    - `rgb`: RGB image, ``uint8 (y, x, 3)``.
    - returns: glass color, ``float64 (3,)``.
    """
    return np.maximum(np.percentile(rgb.reshape(-1, 3), 99, axis=0), 200.0)


def edge_energy(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute edges and detail of a working image, averaged to map pixels.

    - `gray`: gray values from 0 to 1, ``float32 (y, x)``. Both sides must be multiples of `REDUCTION`.
    - returns: two maps, ``float32 (y / REDUCTION, x / REDUCTION)``. The first is the mean absolute Laplacian (4
      neighbors), the second the mean absolute difference from the image after a Gaussian of standard deviation
      `DETAIL`.
    """
    edges = np.abs(cv2.Laplacian(gray, cv2.CV_32F, ksize=1, borderType=cv2.BORDER_REFLECT_101))
    detail = np.abs(gray - cv2.GaussianBlur(gray, (0, 0), DETAIL, borderType=cv2.BORDER_REFLECT_101))
    size = (gray.shape[1] // REDUCTION, gray.shape[0] // REDUCTION)
    return tuple(cv2.resize(energy, size, interpolation=cv2.INTER_AREA) for energy in (edges, detail))


def sharpness(edges: np.ndarray, detail: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the sharpness of the neighborhood of each map pixel.

    - `edges`, `detail`: maps from `edge_energy`, ``float32 (y, x)``.
    - `inside`: area to judge, ``bool (y, x)``.
    - returns: the ratio of edges to detail, the edges, and the judged area. Ratio and edges are Gaussian means over
      `NEIGHBORHOOD` of the area at least `MARGIN` inside, ``float32 (y, x)``. The ratio does not depend on image
      contrast. The judged area is ``bool (y, x)``.
    """
    inner = cv2.erode(inside.astype(np.uint8), disk(MARGIN), borderType=cv2.BORDER_REPLICATE).astype(np.float32)
    weight = cv2.GaussianBlur(inner, (0, 0), NEIGHBORHOOD)
    safe = np.maximum(weight, 1e-6)
    near_edges, near_detail = (
        cv2.GaussianBlur(energy * inner, (0, 0), NEIGHBORHOOD) / safe for energy in (edges, detail)
    )
    return near_edges / np.maximum(near_detail, 1e-6), near_edges, inside & (weight > LEAST_JUDGED)


def blurry(edges: np.ndarray, detail: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Find areas that are out of focus or have no structure to focus on.

    - `edges`, `detail`, `inside`: as in `sharpness`.
    - returns: blurry areas, ``bool (y, x)``: ratio below `LEAST_SHARPNESS`, or edges below `LEAST_EDGES`.

    HistoQC's ``BlurDetectionModule`` thresholds the smoothed absolute Laplacian alone. Pale slides then count as
    blurry, and dark slides never do. Dividing by the detail corrects for the contrast of the image. The ratio is high
    in noise without tissue, so HistoQC's threshold stays as the second condition.
    """
    ratio, near_edges, judged = sharpness(edges, detail, inside)
    return judged & ((ratio < LEAST_SHARPNESS) | (near_edges < LEAST_EDGES))


def ink(rgb: np.ndarray, glass: np.ndarray, *, thickness: float, least_area: float) -> np.ndarray:
    """Find blue, green, red and black strokes of a marker pen.

    - `rgb`: RGB image, ``uint8 (y, x, 3)``.
    - `glass`: color of unstained glass, ``(3,)``.
    - `thickness`: width of the thinnest stroke, px. Thinner structures are not ink.
    - `least_area`: area of the smallest mark, px.
    - returns: ink mask, ``bool (y, x)``.

    Ink differs from stained tissue in the shares of red, green and blue optical density, and in size. Saturated inks
    are found on glass and on tissue. Violet inks with the color of hematoxylin, pale inks on tissue, and blue ink on
    strong eosin are not found. A pool of red blood cells as large as a pen mark may be mistaken for red ink.
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
    black_ink = (highest - lowest < GRAY_SPREAD * highest) & (lowest > BLACK_DENSITY)
    marks = np.zeros(rgb.shape[:2], bool)
    kernel = disk(max(1, round((thickness - 1) / 2)))
    for color in (blue_ink, green_ink, red_ink, black_ink):
        closed = cv2.morphologyEx((color & (highest > LEAST_INK)).astype(np.uint8), cv2.MORPH_CLOSE, disk(1))
        marks |= without_small(cv2.morphologyEx(closed, cv2.MORPH_OPEN, kernel) > 0, least_area)
    return marks


def dark_lines(
    rgb: np.ndarray, glass: np.ndarray, *, thickness: float, least_length: float, most_enclosed: float
) -> np.ndarray:
    """Find thin, dark, gray lines and enclosed areas: air bubbles, edges of coverslips, hairs.

    - `rgb`: RGB image, ``uint8 (y, x, 3)``.
    - `glass`: color of unstained glass, ``(3,)``.
    - `thickness`: width above which a line is a pen stroke, px.
    - `least_length`: length of the shortest line, px, measured as the longer side of its bounding box.
    - `most_enclosed`: area of the largest bubble inside a closed line, px.
    - returns: mask of lines and bubbles, ``bool (y, x)``.

    Bubbles are found by their gray rim. The rim is not found where it crosses strongly stained tissue. If the rim is
    not closed, only the rim is marked. Dust is shorter than `least_length`.
    """
    densities = optical_density(rgb, glass)
    highest, lowest = densities.max(axis=2), densities.min(axis=2)
    dark = ((highest - lowest < GRAY_SPREAD * highest) & (lowest > GRAY_DENSITY)).astype(np.uint8)
    thick = cv2.morphologyEx(dark, cv2.MORPH_OPEN, disk(max(1, round((thickness - 1) / 2))))
    thin = dark & ~cv2.dilate(thick, disk(2)) & 1
    joined = cv2.morphologyEx(thin, cv2.MORPH_CLOSE, disk(2))
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    long = statistics[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max(axis=1) >= least_length
    # a line fills little of its bounding box, a patch of gray texture fills much
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
    """Count specks of tissue, small islands of absorbing pixels.

    - `rgb`: RGB image, ``uint8 (y, x, 3)``.
    - `glass`: color of unstained glass, ``(3,)``.
    - `excluded`: artifacts, ``bool (y, x)``. Pixels near artifacts are not counted.
    - `areas`: range of counted areas, px: lower limit (included) and upper limit (excluded).
    - returns: number of 8-connected regions of pixels with mean optical density above `LEAST_TISSUE`.
    """
    # the faint border of an artifact breaks up into specks
    near = cv2.dilate(excluded.astype(np.uint8), disk(3)) > 0
    tissue = (optical_density(rgb, glass).mean(axis=2) > LEAST_TISSUE) & ~near
    _, _, statistics, _ = cv2.connectedComponentsWithStats(tissue.astype(np.uint8), connectivity=8)
    sizes = statistics[1:, cv2.CC_STAT_AREA]
    return int(((sizes >= areas[0]) & (sizes < areas[1])).sum())


def without_small(mask: np.ndarray, least: float) -> np.ndarray:
    """Drop 8-connected regions with fewer than `least` pixels."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = statistics[:, cv2.CC_STAT_AREA] >= least
    large[0] = False
    return large[labels]


def disk(radius: int) -> np.ndarray:
    """Return a disk as structuring element, ``uint8 (2 * radius + 1, 2 * radius + 1)``."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
