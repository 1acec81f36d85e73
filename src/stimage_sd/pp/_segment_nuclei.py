"""Segment the nuclei of the H&E into polygons by a watershed, by Cellpose or by a user's function."""

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
from stimage_sd.image.nuclei_watershed import (
    hematoxylin_histogram,
    nuclei_watershed,
    otsu_of_histogram,
    percentiles_of_histogram,
)
from stimage_sd.models._cellpose import CellposeNuclei, check_cellpose
from stimage_sd.pp._tissue import tissue_mask
from stimage_sd.stream.driver import run_over_tiles
from stimage_sd.stream.nuclei_blocks import LabelFunction, Nuclei, find_in_blocks, lay_blocks, stitch
from stimage_sd.stream.region import Region

Method = Literal["watershed", "cellpose"]

#: default diameter of a nucleus, µm, and in an image of unknown resolution, px (16 px at 0.5 µm/px, 32 px at 0.25)
_NUCLEUS_UM, _NUCLEUS_PX = 8.0, 24.0
#: default and least diameter of a nucleus at the working resolution, px
_WORKING_PX, _LEAST_PX = 16.0, 4.0
#: margin around a block's core, diameters of a nucleus
_MARGIN = 4.0
#: largest number of sample squares for a section's threshold, and their side, px of the working resolution
_N_SAMPLES, _SAMPLE_PX = 32, 512


def segment_nuclei(
    data: SpatialData,
    tiles: Sequence[str | int] | None = None,
    method: Method | LabelFunction = "watershed",
    *,
    model: str | Path | None = None,
    threshold: float | None = None,
    nucleus_px: float | None = None,
    downsample: int | None = None,
    block_size: int = 1024,
    image_key: str | None = None,
    key_added: str = contract.NUCLEI,
    n_jobs: int | None = None,
) -> None:
    """Find the nuclei of the H&E and write their outlines as shapes.

    The slide is processed in blocks, on tissue only. A nucleus belongs to the block whose core holds its center. So a
    nucleus on a border is counted once, and the result does not depend on the blocks. An interrupted run resumes where
    it stopped.

    Parameters
    ----------
    data
        A section. Nuclei are sought on its tissue mask, or on its tiles without a mask. Without a mask or tiles, the
        tissue is found first.
    tiles
        Names (``obs_names``) or numbers (``instance_id``) of tiles. Only nuclei with their center in one of these tiles
        are written. They are the same nuclei as without `tiles`.
    method
        ``"watershed"`` uses color deconvolution, Otsu's threshold, a distance transform and a watershed. It needs no
        extra. ``"cellpose"`` runs Cellpose 4 on the hematoxylin channel (extra ``nuclei``). A function maps
        ``uint8 (batch, y, x, 3)`` to integer labels ``(batch, y, x)``, with 0 where there is no nucleus. The labels of
        an image must not depend on the rest of the batch. A run can be resumed only if the function has an attribute
        ``key``, a string that identifies the function, such as a hash of its weights.
    model
        For Cellpose, the name of a model or the path of a weights file. By default Cellpose's own default
        model.
    threshold
        For the watershed, the threshold of hematoxylin (natural-log optical density). By default Otsu's threshold,
        found once per section on a sample of its tissue.
    nucleus_px
        Approximate diameter of a nucleus in full-resolution pixels. All lengths follow from it. By default 8 µm, or
        24 px if the section's resolution is unknown.
    downsample
        Factor between the full resolution and the resolution of the segmentation. By default the whole number that
        leaves a nucleus at least 16 px wide (about 0.5 µm/px). For a network, match its training resolution.
    block_size
        Side of a block's core in downsampled pixels.
    image_key
        The H&E image, if not the section's default.
    key_added
        Name of the shapes to write.
    n_jobs
        Number of threads; all cores by default. An active `dask.distributed` client is used instead.

    Returns
    -------
    Nothing. Writes ``shapes["nuclei"]``: polygons in ``"global"`` (H&E px at full resolution), numbered from 0 from top
    to bottom. Columns are ``area`` (µm², or full-resolution px² if the section's resolution is unknown),
    ``eccentricity`` (of the ellipse with the same second moments) and ``hematoxylin`` (mean natural-log optical
    density, Ruifrok and Johnston 2001).

    Raises
    ------
    ValueError
        If shapes of that name exist, no nucleus is found, the image is not 8-bit RGB, an argument is out of range or
        belongs to another method, or a function returns no label maps.
    KeyError
        If the section has no such tile.
    ModuleNotFoundError
        If Cellpose is requested and not installed.

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
    sdata = contract.section(data)
    contract.check_no_shapes(sdata, key_added, call="stimage_sd.pp.segment_nuclei")
    name = contract.image_name(sdata, image_key)
    contract.check_rgb(sdata, name)
    _check(method, model=model, threshold=threshold)
    mpp = contract.mpp(sdata, name)
    diameter = (_NUCLEUS_PX if mpp is None else _NUCLEUS_UM / mpp) if nucleus_px is None else float(nucleus_px)
    step = max(1, int(diameter / _WORKING_PX + 0.1)) if downsample is None else int(downsample)
    _check_sizes(diameter, step, block_size)
    if not contract.has_tissue(sdata) and contract.TILES not in sdata.tables:
        tissue_mask(sdata, image_key=name)
    where = Region.of(sdata, name, tiles)
    pyramid = contract.levels(sdata, name)
    run = partial(_sampled_histogram, pyramid, where, nucleus_px=diameter / step, downsample=step, n_jobs=n_jobs)
    find, key, settings = _method(method, run, model=model, threshold=threshold, nucleus_px=diameter / step)
    height, width = pyramid[0].shape[1:]
    blocks = lay_blocks(width, height, downsample=step, core=block_size, margin=int(np.ceil(_MARGIN * diameter / step)))
    parts = find_in_blocks(
        pyramid,
        blocks.chosen(where.meets(blocks.cores)),
        find,
        key=f"nuclei-{key}",
        n_jobs=n_jobs,
        description=f"{contract.sample(sdata)}: nuclei",
    )
    nuclei = stitch([part.chosen(where.holds(part.centers)) for part in parts])
    if len(nuclei.centers) == 0:
        raise ValueError(
            f"Found no nuclei on {name!r} of section {contract.sample(sdata)!r} ({settings or 'by the given method'}; "
            f"nuclei of about {diameter:.0f} px). Is it H&E, and is `nucleus_px=` their diameter?"
        )
    contract.write_shapes(sdata, _frame(nuclei, mpp), name=key_added, image_key=name)
    contract.record(
        sdata,
        "pp.segment_nuclei",
        method=method if isinstance(method, str) else key,
        model=model,
        image=name,
        nucleus_px=diameter,
        downsample=step,
        key_added=key_added,
        n_nuclei=len(nuclei.centers),
        **settings,
    )


def _check(method: Method | LabelFunction, *, model: str | Path | None, threshold: float | None) -> None:
    if not (callable(method) or method in ("watershed", "cellpose")):
        raise ValueError(f'Expected `method` to be "watershed", "cellpose" or a function, found {method!r}.')
    if model is not None and method != "cellpose":
        raise ValueError('`model=` belongs to Cellpose. Pass it with `method="cellpose"`.')
    if threshold is not None and method != "watershed":
        raise ValueError('`threshold=` belongs to the watershed. Pass it with `method="watershed"`.')
    if threshold is not None and not (np.isfinite(threshold) and threshold > 0):
        raise ValueError(f"Expected `threshold` as a positive optical density, found {threshold!r}.")
    if method == "cellpose":
        check_cellpose()  # raise for a missing package before anything is read


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
    """Return the label function, its key, and the values that were fitted for it."""
    if callable(method):
        # a function without a key gets a random one, because it cannot be matched to an interrupted run
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
    """`nuclei_watershed` on a batch of images."""

    threshold: float
    nucleus_px: float

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        return np.stack(
            [nuclei_watershed(image, threshold=self.threshold, nucleus_px=self.nucleus_px) for image in images]
        )


def _sampled_histogram(
    pyramid: list[xr.DataArray], where: Region, *, nucleus_px: float, downsample: int, n_jobs: int | None
) -> NDArray[np.float32]:
    """Return the histogram of hematoxylin on a sample of the tissue, independent of blocks and tiles."""
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
        key=f"hematoxylin-histogram-{nucleus_px:g}",
        batch_size=1,
        n_jobs=n_jobs,
        description="hematoxylin",
    )
    return counts.sum(axis=(0, 1))


def _histograms(images: NDArray[np.uint8], *, nucleus_px: float) -> NDArray[np.float32]:
    return np.stack([hematoxylin_histogram(image, nucleus_px=nucleus_px) for image in images])


def _frame(nuclei: Nuclei, mpp: float | None) -> gpd.GeoDataFrame:
    area = shapely.area(nuclei.outlines) * (1.0 if mpp is None else mpp**2)
    return gpd.GeoDataFrame(
        {"area": area, "eccentricity": nuclei.eccentricity, "hematoxylin": nuclei.hematoxylin},
        geometry=nuclei.outlines,
    )
