"""What the readers share: from an image, positions and counts to a section."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import dask.array as da
import geopandas
import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely
from anndata import AnnData
from anndata.utils import make_index_unique
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._squidpy import spatial_uns


def assemble(
    levels: list[da.Array], table: AnnData, *, diameter_px: float, sample: str, platform: str, mpp: float | None
) -> SpatialData:
    """Build a section from a pyramid and a table with ``obsm["spatial"]``, the spots' centres in its pixels.

    Parameters
    ----------
    levels
        The H&E, finest first, each ``uint8 (3, y, x)``.
    table
        Raw counts, ``obs`` = spots. Becomes the section's.
    diameter_px
        Diameter of a spot, pixels of the finest level.
    sample, platform, mpp
        As `contract.register` takes them.
    """
    centres = np.asarray(table.obsm["spatial"], dtype=np.float64)
    check_inside(centres, levels[0].shape[1:], sample=sample)
    table.obsm["spatial"] = centres
    shapes = geopandas.GeoDataFrame(
        {"radius": np.full(len(centres), diameter_px / 2.0)}, geometry=shapely.points(centres)
    )
    sdata = SpatialData(
        images={contract.IMAGE: contract.build_image(levels)},
        shapes={contract.SPOTS: contract.build_shapes(shapes, mpp=None)},
    )
    contract.register(sdata, sample=sample, platform=platform, image=contract.IMAGE, mpp=mpp)
    table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=diameter_px)
    sdata.tables[contract.COUNTS] = contract.annotate(table, region=contract.SPOTS)
    return sdata


def check_inside(centres: np.ndarray, shape: tuple[int, int], *, sample: str) -> None:
    """Raise `ValueError` where a centre ``(x, y)`` lies outside an image of ``(y, x)`` pixels."""
    if not np.isfinite(centres).all():
        raise ValueError(f"Expected finite spot positions in section {sample!r}, found NaN or infinity.")
    height, width = shape
    outside = ((centres < 0) | (centres >= (width, height))).any(axis=1)
    if outside.any():
        low, high = centres.min(axis=0), centres.max(axis=0)
        raise ValueError(
            f"Expected all spots of section {sample!r} inside its image of {width} x {height} px (x, y), found "
            f"{int(outside.sum())} of {len(centres)} outside; their positions span x {low[0]:.0f} to {high[0]:.0f}, "
            f"y {low[1]:.0f} to {high[1]:.0f}. Pass the image these positions were measured on, at full resolution."
        )


def pitch_px(centres: np.ndarray, lattice: np.ndarray, steps: list[tuple[int, int]]) -> float | None:
    """Measure the distance between neighbours of an array, in pixels.

    Parameters
    ----------
    centres
        ``(n, 2)`` positions, px.
    lattice
        ``(n, 2)`` integer positions in the array.
    steps
        Lattice offsets of neighbours one pitch away; half of them is enough.

    Returns
    -------
    The median distance over all pairs of neighbours, which a few misplaced spots do not move; `None`
    where no two spots are neighbours.
    """
    where = {position: number for number, position in enumerate(map(tuple, lattice.tolist()))}
    pairs = [
        (number, where[neighbour])
        for (first, second), number in where.items()
        for step in steps
        if (neighbour := (first + step[0], second + step[1])) in where
    ]
    if not pairs:
        return None
    here, there = np.asarray(pairs).T
    return float(np.median(np.linalg.norm(centres[here] - centres[there], axis=1)))


def as_counts(values: Any, *, where: str) -> sp.csr_matrix:
    """Return raw counts as CSR of int32, checked; int32 is half of int64 and what 10x files hold."""
    contract.check_counts(values, where=where)
    return sp.csr_matrix(values, dtype=np.int32)


def unique_genes(names: pd.Index, *, where: str) -> pd.Index:
    """Return gene names with a suffix on repeated ones, and say so where there are any."""
    repeated = names[names.duplicated()]
    if repeated.empty:
        return names
    examples = sorted(set(repeated))
    warnings.warn(
        f"{len(repeated)} gene name(s) appear more than once in {where} and got a suffix (`NAME-1`): "
        f"{', '.join(examples[:5])}{', ...' if len(examples) > 5 else ''}.",
        UserWarning,
        stacklevel=4,
    )
    return make_index_unique(names)


def check_mpp(mpp: float | None) -> None:
    """Raise `ValueError` where a resolution is given and is no positive number."""
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"Expected `mpp` to be a positive number of micrometres a pixel, found {mpp!r}.")


def check_unique(names: pd.Index, *, what: str, where: str) -> None:
    """Raise `ValueError` where a name appears twice."""
    repeated = names[names.duplicated()]
    if len(repeated):
        raise ValueError(f"Expected every {what} once in {where}, found {len(repeated)} repeated, as {repeated[0]!r}.")


def require_file(path: str | Path, *, what: str) -> Path:
    """Return `path`, or raise `FileNotFoundError` saying what was expected there."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"Expected {what} at {path}, found no file. Check the path.")
    return path
