"""Shared steps of the readers: a section from an image, positions and counts."""

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
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._squidpy import spatial_uns

#: largest share of spots outside the image; a larger share means that the image does not belong to the spots
MOST_OFF = 0.5


def assemble(
    levels: list[da.Array],
    table: AnnData,
    *,
    diameter_px: float,
    sample: str,
    platform: str,
    mpp: float | None,
    proteins: AnnData | None = None,
) -> SpatialData:
    """Build a section from the levels of an H&E and a table of spots.

    - `levels`: levels of the H&E, ``uint8 (3, y, x)``, finest first.
    - `table`: raw counts, one row per spot. ``obsm["spatial"]`` holds the centers of the spots, px of the finest level.
      The table is stored in the section, without spots outside the image.
    - `diameter_px`: diameter of a spot, px of the finest level.
    - `sample`, `platform`, `mpp`: as in `contract.register`.
    - `proteins`: antibody counts of the same spots in the same order.
    """
    centers = np.asarray(table.obsm["spatial"], dtype=np.float64)
    table.obsm["spatial"] = centers
    inside = on_image(centers, levels[0].shape[1:], what="spots", where=f"section {sample!r}")
    tables = {contract.COUNTS: table} | ({} if proteins is None else {contract.PROTEINS: proteins})
    if proteins is not None:
        proteins.obs, proteins.obsm["spatial"] = table.obs.copy(), centers.copy()
    if not inside.all():
        tables = {name: part[inside].copy() for name, part in tables.items()}
        centers = centers[inside]
    shapes = geopandas.GeoDataFrame(
        {"radius": np.full(len(centers), diameter_px / 2.0)}, geometry=shapely.points(centers)
    )
    sdata = SpatialData(
        images={contract.IMAGE: contract.build_image(levels)},
        shapes={contract.SPOTS: contract.build_shapes(shapes, mpp=None)},
    )
    contract.register(sdata, sample=sample, platform=platform, image=contract.IMAGE, mpp=mpp)
    for name, part in tables.items():
        part.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=diameter_px)
        sdata.tables[name] = contract.annotate(part, region=contract.SPOTS)
    return sdata


def on_image(
    centers: NDArray[np.float64],
    shape: tuple[int, ...],
    *,
    what: str,
    where: str,
    image: str = "its image",
    mend: str = "Pass the image these positions were measured on, at full resolution.",
) -> NDArray[np.bool_]:
    """Return which centers ``(x, y)`` lie on an image of ``(y, x)`` pixels, and warn about centers outside."""
    if not len(centers):
        raise ValueError(f"Expected {what} in {where}, found none. Pass the files of a section that has some.")
    unknown = ~np.isfinite(centers).all(axis=1)
    if unknown.any():
        raise ValueError(
            f"Expected finite positions of the {what} of {where}, found NaN or infinity for {int(unknown.sum())} of "
            f"{len(centers)}. Leave these out."
        )
    height, width = shape
    inside = ((centers >= 0) & (centers < (width, height))).all(axis=1)
    if inside.all():
        return np.asarray(inside)
    low, high = centers.min(axis=0), centers.max(axis=0)
    outside = (
        f"{int((~inside).sum())} of {len(centers)} outside; their positions span x {low[0]:.0f} to {high[0]:.0f}, y "
        f"{low[1]:.0f} to {high[1]:.0f}"
    )
    expected = f"Expected the {what} of {where} inside {image} of {width} x {height} px (x, y), found {outside}."
    if inside.mean() < 1.0 - MOST_OFF:
        raise ValueError(f"{expected} {mend}")
    warnings.warn(f"{expected} These are left out.", UserWarning, stacklevel=4)
    return np.asarray(inside)


def as_counts(values: Any, *, where: str) -> sp.csr_matrix:
    """Check raw counts and return them as CSR, in int32 if all counts fit."""
    contract.check_counts(values, where=where)
    counts = sp.csr_matrix(values)
    return counts.astype(contract.count_type(counts), copy=False)


def unique_genes(names: pd.Index, *, where: str, genomes: pd.Series | None = None) -> pd.Index:
    """Return unique gene names without Ensembl versions, and warn if names needed a suffix.

    Names in several genomes get the genome as prefix. Other repeated names get a suffix.
    """
    names = contract.without_versions(names)
    if genomes is not None:
        plain, genome = pd.Series(names.to_numpy()), genomes.astype(str).reset_index(drop=True)
        shared = genome.groupby(plain).transform("nunique") > 1
        names = pd.Index(plain.where(~shared, genome + "_" + plain))
    repeated = names[names.duplicated()]
    if repeated.empty:
        return names
    examples = sorted(set(repeated))
    warnings.warn(
        f"{len(repeated)} gene name(s) appear more than once in {where} and got a suffix (`NAME-1`): "
        f"{', '.join(examples[:5])}{', ...' if len(examples) > 5 else ''}.",
        UserWarning,
        stacklevel=5,
    )
    return make_index_unique(names)


def check_mpp(mpp: float | None) -> None:
    """Raise `ValueError` if a given resolution is not a positive number."""
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"Expected `mpp` to be a positive number of micrometers per pixel, found {mpp!r}.")


def check_unique(names: pd.Index, *, what: str, where: str, mend: str = "Leave one of each.") -> None:
    """Raise `ValueError` if a name appears more than once."""
    repeated = names[names.duplicated()]
    if len(repeated):
        raise ValueError(
            f"Expected every {what} once in {where}, found {len(repeated)} repeated, such as {repeated[0]!r}. {mend}"
        )


def require_file(path: str | Path, *, what: str) -> Path:
    """Return `path`, or raise `FileNotFoundError` if no file is there."""
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"Expected {what} at {path.absolute()}, found {kind}. Check the path.")
    return path
