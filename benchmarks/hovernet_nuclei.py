"""Nuclei from HoVer-Net's maps: ours, and the post-processing that HoVer-Net's paper describes.

The maps are of a region at 0.25 µm per pixel, where a nucleus is 32 px wide, as a network gives them: the distance maps
and the nuclear mask of painted nuclei, blurred, with noise, and a type per nucleus with noise. A size is the region's
area in millions of pixels: 1, 4 and 25 are 1,024, 2,048 and 5,120 px a side. All sides take the maps in memory, run one
window per core of the machine at once, and end with outline, center and type of each nucleus.

- ours: `hv_watershed`, `measure_objects`, `trace_objects` and `means_within` on windows of 640 px. As in
  `tl.predict_cells`, nuclei count if their center lies in the core of 512 px. Types are means of probabilities.
- as published: written from the paper with OpenCV, scipy and scikit-image. Both distance maps are normalized to 0 to 1,
  differentiated by Sobel's kernel of 21 px and normalized again. Their maximum, thresholded at 0.4, is taken out of the
  nuclear mask for the markers, whose holes are filled and which are opened. The energy is blurred and flooded from the
  markers. Of each nucleus, the contour is traced, the center computed by moments, and the type is that of most pixels.
  As in the released program, windows are 2,048 px wide by default, and the label map of a window is compared as a whole
  with each number. Windows lie side by side, so that a nucleus on a border counts twice. The map of the most probable
  types is not timed.
- by bounding boxes: the same steps, but each nucleus is looked for in its bounding box only. This is faster than what
  is published, and a limit.

Figures: number of nuclei found and painted, and seconds of the processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from scipy import ndimage
from skimage.morphology import remove_small_objects
from skimage.segmentation import watershed

from benchmarks.compare import OURS, Comparison
from benchmarks.measure import with_cpu_seconds
from stimage_sd.image.hv_maps import hv_maps, hv_watershed
from stimage_sd.image.label_maps import LabelMap, means_within, measure_objects, trace_objects

NUCLEUS_PX, N_TYPES = 32, 4
WINDOW, CORE, MARGIN = 640, 512, 64
PUBLISHED_WINDOW = 2_048
PUBLISHED, BY_BOXES = "as published", "by bounding boxes"
Job = Callable[[], Mapping[str, Any]]


class Maps(NamedTuple):
    """Maps of a region: nuclear probability, distances ``(2, y, x)`` and probabilities of types ``(types, y, x)``."""

    nuclear: np.ndarray
    hv: np.ndarray
    types: np.ndarray

    def window(self, top: int, left: int, side: int) -> Maps:
        """Return the maps of a window."""
        return Maps(*(each[..., top : top + side, left : left + side] for each in self))


class Nucleus(NamedTuple):
    """A nucleus of a window."""

    outline: np.ndarray
    center: tuple[float, float]
    type: int


# --------------------------------------------------------------------------------------------------
# the two ways


def ours(maps: Maps) -> list[Nucleus]:
    """Find the nuclei of a window by ours."""
    labels = LabelMap.of(hv_watershed(maps.nuclear, maps.hv, nucleus_px=NUCLEUS_PX))
    measured = measure_objects(labels, maps.nuclear)
    outlines = trace_objects(labels, measured.labels, tolerance=0.5)
    types = means_within(labels, np.moveaxis(maps.types, 0, -1)).argmax(axis=1)
    return [Nucleus(*parts) for parts in zip(outlines, measured.centers, types, strict=True)]


def published(maps: Maps, kinds: np.ndarray, *, by_boxes: bool) -> list[Nucleus]:
    """Find the nuclei of a window as HoVer-Net's paper describes it."""
    labels = _published_labels(maps)
    found = []
    for number, box in _boxes(labels) if by_boxes else _boxes_one_by_one(labels):
        found += _nucleus(labels[box] == number, kinds[box], box)
    return found


def _published_labels(maps: Maps) -> np.ndarray:
    """Label the nuclei by the watershed of the energy from the markers."""
    inside = remove_small_objects(ndimage.label(maps.nuclear >= 0.5)[0], max_size=9) > 0
    steep = np.maximum(
        *(
            1 - _normalized(cv2.Sobel(_normalized(each), cv2.CV_64F, 1 - axis, axis, ksize=21))
            for axis, each in enumerate(maps.hv)
        )
    )
    steep = np.clip(steep - ~inside, 0, None)
    energy = -cv2.GaussianBlur((1 - steep) * inside, (3, 3), 0)
    markers = ndimage.binary_fill_holes(inside & (steep < 0.4)).astype(np.uint8)
    markers = cv2.morphologyEx(markers, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    seeds = remove_small_objects(ndimage.label(markers)[0], max_size=9)
    labels: np.ndarray = watershed(energy, seeds, mask=inside)
    return labels


def _boxes(labels: np.ndarray) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """Yield number and bounding box of each nucleus, found in one pass."""
    return ((number, box) for number, box in enumerate(ndimage.find_objects(labels), 1) if box is not None)


def _boxes_one_by_one(labels: np.ndarray) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """Yield number and bounding box of each nucleus, from a mask of the whole window per nucleus."""
    for number in np.unique(labels)[1:]:
        mask = labels == number
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        yield int(number), (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))


def _normalized(values: np.ndarray) -> np.ndarray:
    return cv2.normalize(values, None, alpha=0, beta=1, norm_type=cv2.NORM_MINMAX, dtype=cv2.CV_32F)


def _nucleus(piece: np.ndarray, kinds: np.ndarray, box: tuple[slice, slice]) -> list[Nucleus]:
    """Return the nucleus of a piece, or none if its contour has less than three points."""
    contours = cv2.findContours(piece.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if len(contours[0]) < 3:
        return []
    moments, corner = cv2.moments(piece.astype(np.uint8), binaryImage=True), (box[1].start, box[0].start)
    center = tuple(moments[name] / moments["m00"] + start for name, start in zip(("m10", "m01"), corner, strict=True))
    values, counts = np.unique(kinds[piece], return_counts=True)
    return [Nucleus(contours[0][:, 0] + corner, center, int(values[counts.argmax()]))]


# --------------------------------------------------------------------------------------------------
# the sides


def by_ours(size: int) -> Job:
    """Prepare ours."""
    maps, painted = region(size)

    def count(top: int, left: int) -> int:
        found = ours(maps.window(top, left, WINDOW))
        centers = np.array([one.center for one in found]).reshape(-1, 2) - MARGIN
        return int(((centers >= 0) & (centers < CORE)).all(axis=1).sum())

    return _job(count, [(top, left) for top in _starts(size, CORE) for left in _starts(size, CORE)], painted)


def as_published(size: int, *, by_boxes: bool) -> Job:
    """Prepare the published way."""
    maps, painted = region(size)
    inner = Maps(*(each[..., MARGIN:-MARGIN, MARGIN:-MARGIN] for each in maps))
    kinds = inner.types.argmax(axis=0)

    def count(top: int, left: int) -> int:
        window = kinds[top : top + PUBLISHED_WINDOW, left : left + PUBLISHED_WINDOW]
        return len(published(inner.window(top, left, PUBLISHED_WINDOW), window, by_boxes=by_boxes))

    starts = _starts(size, PUBLISHED_WINDOW)
    return _job(count, [(top, left) for top in starts for left in starts], painted)


def _job(count: Callable[[int, int], int], places: list[tuple[int, int]], painted: int) -> Job:
    # windows run at once, so OpenCV's own threads make nothing faster
    cv2.setNumThreads(1)
    small = region(1)[0].window(0, 0, WINDOW)
    ours(small)
    published(small, small.types.argmax(axis=0), by_boxes=True)

    def job() -> Mapping[str, Any]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return {"nuclei": sum(pool.map(lambda place: count(*place), places)), "painted": painted}

    return with_cpu_seconds(job)


def _side(size: int) -> int:
    """Side of a region of about so many million pixels, in whole cores, px."""
    return CORE * round((size * 1e6) ** 0.5 / CORE)


def _starts(size: int, step: int) -> range:
    return range(0, _side(size), step)


# --------------------------------------------------------------------------------------------------
# the maps


def region(size: int) -> tuple[Maps, int]:
    """Paint nuclei on a region of so many million pixels with a margin; return the maps and the number of nuclei."""
    side = _side(size) + 2 * MARGIN
    random = np.random.default_rng(0)
    labels = np.zeros((side, side), np.int32)
    places = random.uniform(0, side, (side * side // 2_000, 2))
    for number, ((x, y), axes) in enumerate(zip(places, random.uniform(10, 17, places.shape), strict=True), 1):
        cv2.ellipse(labels, ((x, y), tuple(2 * axes), random.uniform(0, 180)), number, -1)
    hv = hv_maps(labels)
    for each in hv:
        each[:] = cv2.GaussianBlur(each, (0, 0), 1.5) + random.normal(0, 0.02, each.shape).astype(np.float32)
    nuclear = cv2.GaussianBlur((labels > 0).astype(np.float32), (0, 0), 1.5)
    kinds = random.integers(0, N_TYPES, labels.max() + 1)
    types = np.stack([(kinds[labels] == kind) & (labels > 0) for kind in range(N_TYPES)]).astype(np.float32)
    types += random.random(types.shape, dtype=np.float32)
    painted = len(np.unique(labels[MARGIN:-MARGIN, MARGIN:-MARGIN])) - 1
    return Maps(nuclear, hv, types / types.sum(axis=0)), painted


WORK = Comparison(
    title="Nuclei from HoVer-Net's maps",
    unit="million px",
    sizes=(1, 4, 25),
    target=25,
    sides={
        OURS: by_ours,
        PUBLISHED: partial(as_published, by_boxes=False),
        BY_BOXES: partial(as_published, by_boxes=True),
    },
    reach={PUBLISHED: 5.0},
)
