"""Nuclei of the H&E as polygons: by a watershed, by Cellpose, or by a function of yours."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import geopandas as gpd
import numpy as np
import shapely
import xarray as xr
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._nuclei_blocks import LabelFunction, Nuclei, find_in_blocks, lay_blocks, stitch
from stimage_sd._slide_region import Region
from stimage_sd.models._cellpose import CellposeNuclei, cellpose_version
from stimage_sd.nn.nuclei_watershed import (
    haematoxylin_histogram,
    nuclei_watershed,
    otsu_of_histogram,
    percentiles_of_histogram,
)
from stimage_sd.pp._tissue import tissue_mask
from stimage_sd.stream import run_over_tiles

Method = Literal["watershed", "cellpose"]

#: diameter of a nucleus: µm, and px of an image of unknown resolution (16 on 0.5 µm/px, 32 on 0.25)
_NUCLEUS_UM, _NUCLEUS_PX = 8.0, 24.0
#: diameter of a nucleus on the working resolution by default, px, and the least one
_WORKING_PX, _LEAST_PX = 16.0, 4.0
#: what is seen around a block's core, diameters of a nucleus
_MARGIN = 4.0
#: squares that a section's threshold is found on: how many at most, and their side, px of the working resolution
_N_SAMPLES, _SAMPLE_PX = 32, 512


def segment_nuclei(
    sdata: SpatialData,
    tiles: Sequence[str | int] | None = None,
    method: Method | LabelFunction = "watershed",
    *,
    model: str | Path | None = None,
    threshold: float | None = None,
    nucleus_px: float | None = None,
    downsample: int | None = None,
    block_size: int = 1024,
    image_key: str | None = None,
    shapes_key: str = contract.NUCLEI,
    n_workers: int | None = None,
) -> None:
    """Find the nuclei of the H&E and write their outlines as shapes.

    The slide is worked through block by block, on tissue only. Each nucleus belongs to the block whose core holds its
    centre, so that one on a border is counted once, and what is found does not depend on the blocks. A run that was
    interrupted goes on where it stopped.

    Parameters
    ----------
    sdata
        A section. Nuclei are looked for where its tissue is; where no one has found that, on its tiles, and without
        tiles the tissue is found first.
    tiles
        Names (``obs_names``) or numbers (``instance_id``) of tiles: only nuclei with their centre in one of them, the
        same ones that are found there without `tiles`.
    method
        ``"watershed"``: colour deconvolution, Otsu's threshold, distance transform, watershed; needs nothing.
        ``"cellpose"``: Cellpose 3 or 4 on the haematoxylin channel (extra ``nuclei``). Or a function of
        ``uint8 (batch, y, x, 3)`` to integer labels ``(batch, y, x)``, 0 where there is no nucleus; it must give a
        picture the same labels whatever else is in the batch. Only one with an attribute ``key``, a string that tells
        it from others, such as a hash of its weights, can be resumed.
    model
        For Cellpose, the name of one of its models or the path of a file of weights; by default ``"nuclei"`` of
        version 3, and version 4's own default.
    threshold
        For the watershed, Otsu's threshold of haematoxylin (natural-log optical density); by default found once a
        section, on a sample of its tissue.
    nucleus_px
        Diameter of a nucleus, about, px of the full resolution; all lengths follow from it. By default 8 µm, and
        24 px where the section's resolution is unknown.
    downsample
        Nuclei are looked for on an image so many times smaller than the full resolution; by default the whole number
        that leaves a nucleus of 16 px at least (about 0.5 µm/px). A network wants what it was trained on.
    block_size
        Side of a block's core, px of that smaller image.
    image_key
        The H&E image, where it is not the section's own.
    shapes_key
        Name of the shapes to write.
    n_workers
        Threads; all cores by default. An active `dask.distributed` client is used instead.

    Returns
    -------
    Nothing; ``shapes["nuclei"]`` is written: polygons in ``"global"`` (H&E px at full resolution), numbered from 0 from
    top to bottom, with ``area`` (µm² where the section's resolution is known, else px² of the full resolution),
    ``eccentricity`` (of the ellipse with the same second moments) and ``haematoxylin`` (mean natural-log optical
    density, Ruifrok and Johnston 2001).

    Raises
    ------
    ValueError
        If there are shapes of that name already, no nucleus is found, the image is not 8-bit RGB, an argument is out of
        its range or belongs to another method, or a function gives no label maps.
    KeyError
        If a tile is none of the section's.
    ModuleNotFoundError
        If Cellpose is asked for and not installed.

    Notes
    -----
    Paper, section 2.5: nuclei, found by Cellpose 3 after conversion to HED, are the segments of explanations.

    Examples
    --------
    >>> import cv2, numpy as np, stimage_sd as sti
    >>> pink = np.full((300, 300, 3), (220, 160, 200), np.uint8)
    >>> for x in (60, 150, 240):
    ...     _ = cv2.circle(pink, (x, 150), 8, (80, 50, 130), -1)
    >>> _ = cv2.imwrite("three.png", pink[..., ::-1])
    >>> section = sti.io.slide("three.png", mpp=0.5)
    >>> sti.pp.segment_nuclei(section)
    >>> section.shapes["nuclei"]["area"].round(-1).tolist()
    [50.0, 50.0, 50.0]
    """
    contract.check_no_shapes(sdata, shapes_key, call="stimage_sd.pp.segment_nuclei")
    name = contract.image_name(sdata, image_key)
    contract.check_rgb(sdata, name)
    _check(method, model=model, threshold=threshold)
    mpp = contract.info(sdata)["mpp"]
    diameter = (_NUCLEUS_PX if mpp is None else _NUCLEUS_UM / mpp) if nucleus_px is None else float(nucleus_px)
    step = max(1, int(diameter / _WORKING_PX + 0.1)) if downsample is None else int(downsample)
    _check_sizes(diameter, step, block_size)
    if contract.TISSUE not in sdata.labels and contract.TILES not in sdata.tables:
        tissue_mask(sdata, image_key=name)
    where = Region.of(sdata, name, tiles)
    pyramid = contract.levels(sdata, name)
    run = partial(_sampled_histogram, pyramid, where, nucleus_px=diameter / step, downsample=step, n_workers=n_workers)
    find, key, found = _method(method, run, model=model, threshold=threshold, nucleus_px=diameter / step)
    height, width = pyramid[0].shape[1:]
    blocks = lay_blocks(width, height, downsample=step, core=block_size, margin=int(np.ceil(_MARGIN * diameter / step)))
    parts = find_in_blocks(
        pyramid,
        blocks.chosen(where.meets(blocks.cores)),
        find,
        key=f"nuclei-{key}",
        n_workers=n_workers,
        description=f"{contract.sample(sdata)}: nuclei",
    )
    nuclei = stitch([part.chosen(where.holds(part.centres)) for part in parts])
    if len(nuclei.centres) == 0:
        raise ValueError(
            f"Found no nuclei on {name!r} of section {contract.sample(sdata)!r} ({found or 'by the given method'}; "
            f"nuclei of about {diameter:.0f} px). Is it H&E, and is `nucleus_px=` their diameter?"
        )
    contract.write_nuclei(sdata, _frame(nuclei, mpp), name=shapes_key)
    contract.record(
        sdata,
        "pp.segment_nuclei",
        method=method if isinstance(method, str) else key,
        model=model,
        image=name,
        nucleus_px=diameter,
        downsample=step,
        shapes_key=shapes_key,
        n_nuclei=len(nuclei.centres),
        **found,
    )


def _check(method: Method | LabelFunction, *, model: str | Path | None, threshold: float | None) -> None:
    if not (callable(method) or method in ("watershed", "cellpose")):
        raise ValueError(f'Expected `method` to be "watershed", "cellpose" or a function, found {method!r}.')
    if model is not None and method != "cellpose":
        raise ValueError('`model=` is one of Cellpose\'s: pass it with `method="cellpose"`.')
    if threshold is not None and method != "watershed":
        raise ValueError('`threshold=` is the watershed\'s: pass it with `method="watershed"`.')
    if threshold is not None and not (np.isfinite(threshold) and threshold > 0):
        raise ValueError(f"Expected `threshold` as a positive optical density, found {threshold!r}.")
    if method == "cellpose":
        cellpose_version()  # before anything is read


def _check_sizes(diameter: float, downsample: int, block_size: int) -> None:
    if not (np.isfinite(diameter) and diameter > 0):
        raise ValueError(f"Expected `nucleus_px` to be a positive number of pixels, found {diameter!r}.")
    if downsample < 1:
        raise ValueError(f"Expected `downsample` of at least 1, found {downsample}.")
    if diameter / downsample < _LEAST_PX:
        raise ValueError(
            f"Expected nuclei of at least {_LEAST_PX:.0f} px to be looked for, found {diameter:.1f} px at full "
            f"resolution, downsampled {downsample} times. Lower `downsample=`, or pass the nuclei's `nucleus_px=`."
        )
    if block_size < _MARGIN * diameter / downsample:
        raise ValueError(
            f"Expected `block_size` of at least {_MARGIN:.0f} diameters of a nucleus "
            f"({int(np.ceil(_MARGIN * diameter / downsample))} px), found {block_size}."
        )


def _method(
    method: Method | LabelFunction,
    histogram: Callable[[], NDArray[np.float32]],
    *,
    model: str | Path | None,
    threshold: float | None,
    nucleus_px: float,
) -> tuple[LabelFunction, str, dict[str, float]]:
    """Return the function that gives label maps, what tells it from others, and what was found for it."""
    if callable(method):
        # nobody can tell whether a function without a key is the one of the run that was interrupted
        return method, str(getattr(method, "key", uuid.uuid4().hex)), {}
    if method == "cellpose":
        low, high = percentiles_of_histogram(histogram(), (1.0, 99.0))
        cellpose = CellposeNuclei(model, nucleus_px=nucleus_px, low=low, high=high)
        return cellpose, cellpose.key, {"low": low, "high": high}
    level = otsu_of_histogram(histogram()) if threshold is None else float(threshold)
    watershed = _Watershed(level, nucleus_px)
    return watershed, repr(watershed), {"threshold": level}


@dataclass(frozen=True)
class _Watershed:
    """`nuclei_watershed` of a batch."""

    threshold: float
    nucleus_px: float

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        return np.stack(
            [nuclei_watershed(image, threshold=self.threshold, nucleus_px=self.nucleus_px) for image in images]
        )


def _sampled_histogram(
    pyramid: list[xr.DataArray], where: Region, *, nucleus_px: float, downsample: int, n_workers: int | None
) -> NDArray[np.float32]:
    """Haematoxylin on a sample of a section's tissue, whatever blocks and tiles are worked on."""
    height, width = pyramid[0].shape[1:]
    side = max(1, min(_SAMPLE_PX, width // downsample, height // downsample))
    half = side * downsample / 2
    centers = where.sample(_N_SAMPLES, side=side * downsample)
    centers = np.clip(centers, half, np.maximum([width - half, height - half], half))
    counts = run_over_tiles(
        pyramid,
        centers,
        partial(_histograms, nucleus_px=nucleus_px),
        sides=[side * downsample],
        target=side,
        key=f"haematoxylin-histogram-{nucleus_px:g}",
        batch_size=1,
        n_workers=n_workers,
        description="haematoxylin",
    )
    return counts.sum(axis=(0, 1))


def _histograms(images: NDArray[np.uint8], *, nucleus_px: float) -> NDArray[np.float32]:
    return np.stack([haematoxylin_histogram(image, nucleus_px=nucleus_px) for image in images])


def _frame(nuclei: Nuclei, mpp: float | None) -> gpd.GeoDataFrame:
    area = shapely.area(nuclei.outlines) * (1.0 if mpp is None else mpp**2)
    return gpd.GeoDataFrame(
        {"area": area, "eccentricity": nuclei.eccentricity, "haematoxylin": nuclei.haematoxylin},
        geometry=nuclei.outlines,
    )
