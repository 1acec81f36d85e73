"""Check the quality of a cohort's slides: blur, specks, pen, bubbles and the usable tissue."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import cv2
import dask
import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._progress import tqdm
from stimage_sd.image import quality
from stimage_sd.pp._qc_image import light_and_stain
from stimage_sd.pp._tissue import grabcut_mask
from stimage_sd.stream.cutting import coarsest_level

#: name of the labels, and the classes of their values
QUALITY = "quality"
CLASSES = {"background": 0, "usable": 1, "blurry": 2, "pen": 3, "bubble": 4}
#: longer side of the working picture of a slide whose resolution is unknown, px
UNSCALED = 1500
#: longer side of the thumbnail for tissue detection, px
THUMBNAIL = 1500
#: share of a slide below which tissue counts as dust, as in `stimage_sd.pp.tissue_mask`
LEAST_TISSUE = 1e-3
#: rows of the working picture per sharpness computation, and extra rows on each side, px
STRIP, HALO = 1024, 32

#: sizes in µm and µm²: width and area of the smallest pen stroke, length of the shortest rim, area of the largest
#: bubble, areas of the smallest and the largest speck (HistoQC's ``removeSmallObjects``: under 64 px of 8 µm at 1.25 x;
#: smaller objects than the smallest speck are dirt)
STROKE_WIDTH, STROKE_AREA = 90.0, 50_000.0
RIM_LENGTH, BUBBLE_AREA = 400.0, 2.5e7
SPECK_AREAS = (256.0, 4096.0)


@dataclass(frozen=True)
class _Plan:
    """Plan for reading a slide: level, full-resolution pixels per working pixel, working shape and scale."""

    name: str
    level: int
    factor: float
    shape: tuple[int, int]
    um: float
    scaled: bool


@dataclass(frozen=True)
class _Limits:
    """Limits for slides, `None` where a cohort is too small for its percentiles."""

    max_blurry: float
    max_regions: float | None = None
    min_pixels: float | None = None


def slide_qc(
    data: SpatialData | contract.Cohort,
    *,
    working_um: float = 2.0,
    max_blurry: float = 0.9,
    max_regions_percentile: float = 97.5,
    min_pixels_percentile: float = 5.0,
    min_cohort: int = 20,
    image_key: str | None = None,
) -> pd.DataFrame:
    """Measure the quality of slides as HistoQC does, and decide which slides to keep.

    Parameters
    ----------
    data
        A section, or a cohort of sections.
    working_um
        Micrometers per pixel of the working picture. Tissue is blurry if it is as smooth as after a Gaussian blur with
        a deviation of one working pixel. Pen, bubbles and specks are detected on a map four times coarser.
    max_blurry
        A slide is dropped if its ``blurry_fraction`` reaches this value.
    max_regions_percentile
        A slide is dropped if it has more ``small_regions`` than this percentile of the cohort.
    min_pixels_percentile
        A slide is dropped if it has fewer ``pixels_to_use`` than this percentile of the cohort.
    min_cohort
        Least number of slides for which the two percentiles apply. In a small cohort one slide is always the worst. Of
        20 slides, five percent are one slide.
    image_key
        The H&E image, if not the section's default.

    Returns
    -------
    A table with one row per slide, indexed by sample id:

    ``blurry_fraction``
        share of the tissue outside pen and bubbles that is blurry (HistoQC ``blurry_removed_percent``). NaN without
        tissue. See `stimage_sd.image.quality.blurry` for the rule.
    ``small_regions``
        number of tissue specks of 256 to 4,096 µm² (HistoQC ``small_tissue_removed_num_regions``)
    ``pixels_to_use``
        number of map pixels of tissue that are not blurry, pen or bubble (HistoQC ``pixels_to_use``)
    ``tissue_pixels``, ``pen_pixels``, ``bubble_pixels``
        number of map pixels of tissue, and of artifacts on the whole slide. ``bubble`` covers thin dark gray lines of
        at least 400 µm (rims of bubbles, edges of cover slips, hairs) and the area that they enclose.
    ``sharpness``
        median ratio of edges to detail over the tissue, about 1.3 to 2.4 in focus and under 0.7 if blurry
    ``brightness``, ``contrast``, ``hematoxylin``, ``eosin``, ``dark_fraction``
        light and stain of usable tissue, by squidpy (`squidpy.experimental.im.qc_image`)
    ``pixel_um``
        side of a map pixel in micrometers, NaN if the resolution is unknown
    ``keep``, ``reason``
        whether to keep the slide, and the reason if not

    Writes the row of each section to ``sdata.attrs["stimage_sd"]["quality"]``, and labels ``quality``,
    ``uint8 (y, x)``: 0 background, 1 usable tissue, 2 blurry, 3 pen, 4 bubble.

    Raises
    ------
    KeyError
        If a section has no H&E.
    ValueError
        If an image is not 8-bit RGB or is coarser than `working_um`, or a threshold is out of range.

    Warns
    -----
    UserWarning
        If the percentiles of a cohort mix slides of known and unknown resolution, whose pixels are not comparable.

    Notes
    -----
    Paper, section 2.10: slides with ``blurry_removed_percent`` >= 0.9, ``small_tissue_removed_num_regions`` over
    the 97.5th or ``pixels_to_use`` under the 5th percentile were left out.

    The tissue is ``labels["tissue"]`` if these labels exist. A slide of unknown resolution is measured on a picture of
    1,500 px. Its sizes assume `working_um` per pixel, and only gross blur is detected.

    The coarsest sufficient level of the image is read, one chunk at a time. A working picture takes 0.75 MB per mm².

    spatialdata-plot draws the labels:
    ``sdata.pl.render_images("he").pl.render_labels("quality", fill_alpha=0.5).pl.show("global")``.

    Examples
    --------
    >>> import cv2, numpy as np, stimage_sd as sti
    >>> white = np.full((600, 600, 3), 245, np.uint8)
    >>> random = np.random.default_rng(0)
    >>> white[100:500, 100:500] = np.clip(random.normal((150, 90, 180), 30, (400, 400, 3)), 0, 255)
    >>> _ = cv2.imwrite("slide.png", white[..., ::-1])
    >>> table = sti.pp.slide_qc(sti.io.slide("slide.png", mpp=2.0))
    >>> table[["blurry_fraction", "small_regions", "keep"]].to_dict("records")
    [{'blurry_fraction': 0.0, 'small_regions': 0, 'keep': True}]
    """
    _check_thresholds(working_um, max_blurry, max_regions_percentile, min_pixels_percentile)
    sections = contract.sections(data)
    plans = {sample: _plan(sdata, image_key, working_um) for sample, sdata in sections.items()}
    rows, classes = {}, {}
    with tqdm(total=sum(_n_chunks(sections[sample], plan) for sample, plan in plans.items()), unit="chunk") as bar:
        for sample, plan in plans.items():
            bar.set_description(f"{sample}: quality")
            rows[sample], classes[sample] = _measure(sections[sample], plan, bar)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("sample")
    limits = _limits(table, max_blurry, max_regions_percentile, min_pixels_percentile, min_cohort)
    table = _with_reasons(table, limits)
    for row, (sample, sdata) in zip(table.to_dict("records"), sections.items(), strict=True):
        _write(sdata, classes[sample], {str(name): value for name, value in row.items()}, limits, plans[sample])
    return table


def _check_thresholds(working_um: float, max_blurry: float, *percentiles: float) -> None:
    if not (np.isfinite(working_um) and working_um > 0):
        raise ValueError(f"Expected `working_um` to be a positive number of micrometers, found {working_um!r}.")
    if not 0 < max_blurry <= 1:
        raise ValueError(f"Expected `max_blurry` to be over 0 and at most 1, found {max_blurry!r}.")
    for name, value in zip(("max_regions_percentile", "min_pixels_percentile"), percentiles, strict=True):
        if not 0 <= value <= 100:
            raise ValueError(f"Expected `{name}` to be a percentile, 0 to 100, found {value!r}.")


def _plan(sdata: SpatialData, image_key: str | None, working_um: float) -> _Plan:
    """Check a section and plan which level to read."""
    name = contract.image_name(sdata, image_key)
    contract.check_rgb(sdata, name)
    pyramid = contract.levels(sdata, name)
    height, width = pyramid[0].shape[1:]
    mpp = contract.mpp(sdata, name)
    if mpp is not None and mpp > 1.5 * working_um:
        raise ValueError(
            f"Section {contract.sample(sdata)!r} has {mpp:g} µm per pixel, too coarse to see blur at {working_um:g} "
            f"µm. Pass `working_um={mpp:g}`, or a finer image."
        )
    factor = max(1.0, max(height, width) / UNSCALED if mpp is None else working_um / float(mpp))
    # round to whole map pixels, so the working picture is stretched by less than one map pixel
    shape = tuple(max(1, round(side / factor / quality.REDUCTION)) * quality.REDUCTION for side in (height, width))
    level = coarsest_level([height / array.shape[1] for array in pyramid], factor, tolerance=0.01)
    um = working_um if mpp is None else factor * float(mpp)
    return _Plan(name, level, factor, shape, um * quality.REDUCTION, scaled=mpp is not None)  # type: ignore[arg-type]


def _n_chunks(sdata: SpatialData, plan: _Plan) -> int:
    return int(np.prod(contract.levels(sdata, plan.name)[plan.level].data.numblocks[1:]))


def _measure(sdata: SpatialData, plan: _Plan, bar: tqdm[Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Return a slide's measurements, and the class of each map pixel."""
    working = _read(sdata, plan, bar)
    edges, detail = _edges(working)
    size = (working.shape[1] // quality.REDUCTION, working.shape[0] // quality.REDUCTION)
    rgb = cv2.resize(working, size, interpolation=cv2.INTER_AREA)
    del working
    glass, area = quality.glass_color(rgb), plan.um**2
    tissue = _tissue(sdata, plan.name, rgb)
    pen = quality.ink(rgb, glass, thickness=STROKE_WIDTH / plan.um, least_area=STROKE_AREA / area)
    bubble = ~pen & quality.dark_lines(
        rgb,
        glass,
        thickness=STROKE_WIDTH / plan.um,
        least_length=RIM_LENGTH / plan.um,
        most_enclosed=BUBBLE_AREA / area,
    )
    judged = tissue & ~pen & ~bubble
    blurry = quality.blurry(edges, detail, judged)
    ratio, _, certain = quality.sharpness(edges, detail, judged)
    classes = np.select(
        [pen, bubble, blurry, tissue], [CLASSES[name] for name in ("pen", "bubble", "blurry", "usable")]
    )
    usable = classes == CLASSES["usable"]
    figures = {
        "blurry_fraction": float(blurry.sum() / judged.sum()) if judged.any() else np.nan,
        "small_regions": quality.count_small_regions(
            rgb, glass, pen | bubble, areas=(SPECK_AREAS[0] / area, SPECK_AREAS[1] / area)
        ),
        "pixels_to_use": int(usable.sum()),
        "tissue_pixels": int(tissue.sum()),
        "pen_pixels": int(pen.sum()),
        "bubble_pixels": int(bubble.sum()),
        "sharpness": float(np.median(ratio[certain])) if certain.any() else np.nan,
        **light_and_stain(rgb, usable),
        "pixel_um": plan.um if plan.scaled else np.nan,
    }
    return figures, classes.astype(np.uint8)


def _read(sdata: SpatialData, plan: _Plan, bar: tqdm[Any]) -> np.ndarray:
    """Read a level into the working picture, ``uint8 (y, x, 3)``, one row of chunks at a time."""
    level = contract.levels(sdata, plan.name)[plan.level].data
    working = np.empty((*plan.shape, 3), np.uint8)
    rows, columns = (np.concatenate([[0], np.cumsum(chunks)]) for chunks in level.chunks[1:])
    to_rows, to_columns = (
        np.round(borders * side / borders[-1]).astype(int)
        for borders, side in zip((rows, columns), plan.shape, strict=True)
    )
    shrink = dask.delayed(_shrink, pure=False)
    for row, (top, bottom) in enumerate(pairwise(to_rows)):
        pieces = [
            shrink(
                level[:, rows[row] : rows[row + 1], columns[column] : columns[column + 1]], (right - left, bottom - top)
            )
            for column, (left, right) in enumerate(pairwise(to_columns))
        ]
        for (left, right), piece in zip(pairwise(to_columns), dask.compute(*pieces), strict=True):
            working[top:bottom, left:right] = piece
        bar.update(len(pieces))
    return working


def _shrink(block: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Average a chunk ``(3, y, x)`` down to ``(y, x, 3)`` of `size` (x, y), which may be empty."""
    if 0 in size:
        return np.empty((size[1], size[0], 3), np.uint8)
    return cv2.resize(np.ascontiguousarray(np.moveaxis(block, 0, -1)), size, interpolation=cv2.INTER_AREA)


def _edges(working: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute `quality.edge_energy` in strips, so that only one strip is in memory as floats."""
    height, width = (side // quality.REDUCTION for side in working.shape[:2])
    edges, detail = np.empty((height, width), np.float32), np.empty((height, width), np.float32)
    for start in range(0, working.shape[0], STRIP):
        stop = min(start + STRIP, working.shape[0])
        top, bottom = max(0, start - HALO), min(stop + HALO, working.shape[0])
        gray = cv2.cvtColor(working[top:bottom], cv2.COLOR_RGB2GRAY).astype(np.float32) / 255.0
        kept = slice((start - top) // quality.REDUCTION, (stop - top) // quality.REDUCTION)
        into = slice(start // quality.REDUCTION, stop // quality.REDUCTION)
        for whole, part in zip((edges, detail), quality.edge_energy(gray), strict=True):
            whole[into] = part[kept]
    return edges, detail


def _tissue(sdata: SpatialData, name: str, rgb: np.ndarray) -> np.ndarray:
    """Return the section's tissue on the map, detected here if `tissue_mask` was not run."""
    if contract.has_tissue(sdata):
        mask = contract.tissue(sdata, name)[0]
    else:
        scale = min(1.0, THUMBNAIL / max(rgb.shape[:2]))
        size = tuple(max(1, round(side * scale)) for side in rgb.shape[1::-1])
        mask = grabcut_mask(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA))
        if mask.mean() < LEAST_TISSUE:
            mask = np.zeros_like(mask)
    return cv2.resize(mask.astype(np.uint8), rgb.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0


def judged(
    table: pd.DataFrame, max_blurry: float, regions_percentile: float, pixels_percentile: float, min_cohort: int
) -> pd.DataFrame:
    """Return a table of measured slides with new ``keep`` and ``reason`` columns."""
    return _with_reasons(table, _limits(table, max_blurry, regions_percentile, pixels_percentile, min_cohort))


def _with_reasons(table: pd.DataFrame, limits: _Limits) -> pd.DataFrame:
    reasons = _reasons(({str(name): value for name, value in row.items()} for row in table.to_dict("records")), limits)
    return table.assign(keep=[reason == "" for reason in reasons], reason=reasons)


def _limits(
    table: pd.DataFrame, max_blurry: float, regions_percentile: float, pixels_percentile: float, min_cohort: int
) -> _Limits:
    """Convert percentiles of a cohort to limits, `None` where the cohort is too small."""
    if len(table) < max(min_cohort, 2):
        return _Limits(max_blurry)
    unscaled = table["pixel_um"].isna()
    if unscaled.any() and not unscaled.all():
        warnings.warn(
            f"{int(unscaled.sum())} of {len(table)} slides have no known resolution, such as "
            f"{table.index[unscaled][0]!r}: their pixels and regions are not comparable with the others'. "
            "Pass `mpp=` to their reader, or judge them apart.",
            UserWarning,
            stacklevel=3,
        )
    return _Limits(
        max_blurry,
        max_regions=float(np.percentile(table["small_regions"], regions_percentile)),
        min_pixels=float(np.percentile(table["pixels_to_use"], pixels_percentile)),
    )


def _reasons(rows: Iterable[dict[str, Any]], limits: _Limits) -> list[str]:
    """Return why each slide is dropped, an empty string for a kept slide."""
    joined = []
    for row in rows:
        blurry, regions, pixels = row["blurry_fraction"], row["small_regions"], row["pixels_to_use"]
        reasons = []
        if row["tissue_pixels"] == 0:
            reasons.append("no tissue")
        elif pixels == 0:
            reasons.append("no usable tissue")
        if blurry >= limits.max_blurry:
            reasons.append(f"{blurry:.0%} of the tissue is blurry")
        if limits.max_regions is not None and regions > limits.max_regions:
            reasons.append(f"{regions} small regions, more than {limits.max_regions:.6g}")
        if limits.min_pixels is not None and pixels < limits.min_pixels:
            reasons.append(f"{pixels} pixels to use, fewer than {limits.min_pixels:.6g}")
        joined.append("; ".join(reasons))
    return joined


def _write(sdata: SpatialData, classes: np.ndarray, row: dict[str, Any], limits: _Limits, plan: _Plan) -> None:
    """Write the labels, the measurements and the step to a section."""
    height, width = contract.levels(sdata, plan.name)[0].shape[1:]
    downsample = (height / classes.shape[0], width / classes.shape[1])
    contract.check_free(sdata, QUALITY, of="labels")
    sdata.labels[QUALITY] = contract.pixel_frame(sdata, plan.name).labels(classes, downsample=downsample)
    figures = {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}
    contract.remember(sdata, quality=contract.plain({**figures, "limits": asdict(limits), "classes": CLASSES}))
    contract.record(sdata, "pp.slide_qc", image=plan.name, working_um=plan.um / quality.REDUCTION, **asdict(limits))
