"""Nuclei of a slide by a watershed: ours, scikit-image tile by tile, and squidpy.

Synthetic Aperio slides at 0.5 µm per pixel, where a nucleus is 16 px wide. A size is a slide's area in millions of
pixels: 25 are 5,000 px a side, 100 are 10,000 and 400 are 20,000. Every side reads the slide from its file. Before the
timed part it does the whole job on a slide of 2,000 px. Finding the tissue is not timed.

- ours: ``pp.segment_nuclei`` with its defaults, from the opened slide to polygons in the section.
- scikit-image: the same recipe in plain scikit-image and scipy, one window after another. The windows, their margins
  and the tissue are those of ours. The steps are OpenSlide's ``read_region``, ``rgb2hed``, a Gaussian, the section's
  and the local threshold, an opening, ``remove_small_holes``, ``distance_transform_edt``, ``peak_local_max``,
  ``watershed``, ``remove_small_objects``, ``regionprops`` and ``find_contours``. Nuclei count if their center lies in
  the window's core. The result is polygons with center, eccentricity and mean stain. Nuclei are not opened one by one.
- scikit-image, label maps only: the same without ``regionprops`` and ``find_contours``. There are no polygons, and
  nuclei of a margin count twice. This is a limit, and not a peer.
- squidpy: ``im.process(method="smooth")`` and ``im.segment(method="watershed", chunks=..., lazy=True)`` on a lazy
  `ImageContainer`, as its documentation segments H&E. Otsu's threshold of the first channel comes from the coarsest
  level. The label map of the whole slide is written as zarr. There are no polygons.

Figures: number of nuclei, mean area in µm², and seconds of the processor. The peers run up to 25 million pixels. Above,
their seconds are scaled by the area.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

# touched before the measuring begins: what is counted is above the imports
import numpy as np
import shapely
import squidpy
import zarr
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import find_contours, regionprops
from skimage.morphology import disk, remove_small_holes, remove_small_objects
from skimage.segmentation import watershed
from spatialdata import SpatialData

import stimage_sd as sti
from benchmarks.compare import OURS, Comparison
from benchmarks.measure import with_cpu_seconds
from benchmarks.slides import slide
from stimage_sd import contract
from stimage_sd.stream.nuclei_blocks import Blocks, lay_blocks
from stimage_sd.stream.region import Region

MPP, NUCLEUS_PX = 0.5, 16
CORE, MARGIN = 1024, 64
#: side of the slide that each side works on first, px
SMALL = 2_000
#: optical density of stain is compared with its mean within so many pixels
REACH = 0.8 * NUCLEUS_PX
SCIKIT_IMAGE, LABELS_ONLY, SQUIDPY = "scikit-image, tile by tile", "scikit-image, label maps only", "squidpy"
Job = Callable[[], Mapping[str, Any]]


def side_px(size: int) -> int:
    """Give the side of a slide of so many million pixels."""
    return round((size * 1e6) ** 0.5)


def opened(side: int) -> SpatialData:
    """Open the slide, and find its tissue."""
    sdata = sti.io.slide(slide(side))
    sti.pp.tissue_mask(sdata)
    return sdata


def prepared(work: Callable[[SpatialData, int], Mapping[str, Any]], size: int) -> Job:
    """Do the work on a small slide, and prepare it for a large one."""
    work(opened(SMALL), SMALL)
    side = side_px(size)
    return with_cpu_seconds(partial(work, opened(side), side))


# --------------------------------------------------------------------------------------------------
# the sides


def ours(sdata: SpatialData, _: int) -> Mapping[str, Any]:
    """Segment by ours."""
    sti.pp.segment_nuclei(sdata)
    return _figures(sdata.shapes[contract.NUCLEI].geometry.to_numpy())


def by_scikit_image(sdata: SpatialData, side: int) -> Mapping[str, Any]:
    """Segment by scikit-image, to polygons."""
    outlines = []
    for stain, labels, core, corner in _label_maps(sdata, side):
        for region in regionprops(labels, intensity_image=stain):
            row, column = region.centroid
            if core[0] <= row < core[2] and core[1] <= column < core[3]:
                # the four that ours gives of a nucleus
                _ = region.eccentricity, region.intensity_mean
                contour = max(find_contours(np.pad(region.image, 1), 0.5), key=len)
                outlines.append(shapely.Polygon(contour[:, ::-1] + region.bbox[1::-1] + corner - 0.5))
    return _figures(np.array(outlines))


def label_maps_only(sdata: SpatialData, side: int) -> Mapping[str, Any]:
    """Segment by scikit-image, to label maps that are dropped."""
    return {"windows": sum(1 for _ in _label_maps(sdata, side))}


def by_squidpy(sdata: SpatialData, side: int) -> Mapping[str, Any]:
    """Segment by squidpy."""
    levels = contract.levels(sdata, contract.image_name(sdata))
    threshold = threshold_otsu(np.asarray(levels[-1].data[0]))
    chunks: Any = CORE
    image = squidpy.im.ImageContainer(levels[0].data.transpose(1, 2, 0), layer="image", lazy=True, chunks=chunks)
    squidpy.im.process(image, layer="image", method="smooth", chunks=chunks, lazy=True)
    squidpy.im.segment(
        image,
        layer="image_smooth",
        method="watershed",
        channel=0,
        thresh=threshold,
        geq=False,
        chunks=chunks,
        lazy=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        image["segmented_watershed"].data.squeeze().to_zarr(Path(folder) / "labels.zarr")
        labels = zarr.open_array(Path(folder) / "labels.zarr", mode="r")
        return {"chunks": labels.nchunks, "nuclei_of_first_chunk": len(np.unique(labels[:CORE, :CORE])) - 1}


def _figures(outlines: np.ndarray) -> dict[str, Any]:
    return {"nuclei": len(outlines), "mean_area_um2": round(float(shapely.area(outlines).mean()) * MPP**2, 2)}


# --------------------------------------------------------------------------------------------------
# the recipe in scikit-image


def _label_maps(sdata: SpatialData, side: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield stain, labels, core (top, left, bottom, right) and corner of every window on tissue."""
    import openslide

    reader = openslide.OpenSlide(slide(side))
    thumbnail = np.asarray(reader.read_region((0, 0), reader.level_count - 1, reader.level_dimensions[-1]))[..., :3]
    mask = thumbnail.max(axis=2) < 220
    threshold = threshold_otsu(rgb2hed(thumbnail)[..., 0][mask])
    blocks = _blocks(sdata, side)
    for corner, core in zip(blocks.corners.astype(int), blocks.cores, strict=True):
        window = np.asarray(reader.read_region(tuple(corner.tolist()), 0, (blocks.side, blocks.side)))[..., :3]
        stain, labels = _segmented(window, threshold)
        yield stain, labels, (core - np.tile(corner, 2))[[1, 0, 3, 2]], corner


def _segmented(window: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return stain and labels of a window."""
    stain = gaussian(rgb2hed(window)[..., 0], 0.03 * NUCLEUS_PX)
    inside = (stain > 0.85 * threshold) & (stain > 1.15 * gaussian(stain, REACH))
    area = np.pi / 4 * NUCLEUS_PX**2
    inside = remove_small_holes(ndimage.binary_opening(inside, disk(1)), max_size=int(0.4 * area))
    height = gaussian(ndimage.distance_transform_edt(inside), 0.09 * NUCLEUS_PX)
    peaks = peak_local_max(height, footprint=np.ones((7, 7)), labels=inside.astype(np.int32), exclude_border=False)
    seeds = np.zeros(height.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return stain, remove_small_objects(watershed(-height, seeds, mask=inside), max_size=int(0.16 * area))


def _blocks(sdata: SpatialData, side: int) -> Blocks:
    """Lay the windows that ours lays."""
    blocks = lay_blocks(side, side, downsample=1, core=CORE, margin=MARGIN)
    return blocks.chosen(Region.of(sdata, contract.image_name(sdata), None).meets(blocks.cores))


WORK = Comparison(
    title="Nuclei of a slide by a watershed",
    unit="million px",
    sizes=(25, 100, 400),
    target=400,
    sides={
        name: partial(prepared, work)
        for name, work in (
            (OURS, ours),
            (SCIKIT_IMAGE, by_scikit_image),
            (LABELS_ONLY, label_maps_only),
            (SQUIDPY, by_squidpy),
        )
    },
    reach={SCIKIT_IMAGE: 3.0, SQUIDPY: 3.0},
    at_most={SCIKIT_IMAGE: 25, LABELS_ONLY: 25, SQUIDPY: 25},
)
