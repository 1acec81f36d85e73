"""Gather what a cohort is fitted to: genes, counts of tiles on spots, and where the tiles lie."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import numpy as np
import pandas as pd
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import __version__, contract
from stimage_sd.likelihood import depth


def checked_genes(cohort: Mapping[str, SpatialData], genes: Sequence[str], source: contract.Source) -> list[str]:
    """Return the genes without Ensembl versions, or raise `KeyError` if a section lacks one."""
    genes = contract.without_versions(pd.Index([str(gene) for gene in genes])).tolist()
    if not genes or len(set(genes)) < len(genes):
        repeated = sorted({gene for gene in genes if genes.count(gene) > 1}) if genes else "an empty list"
        raise ValueError(f"Expected `genes` as a list of different names, found {repeated}.")
    for name, sdata in cohort.items():
        known = set(contract.counts(sdata, source).var_names)
        missing = [gene for gene in genes if gene not in known]
        if missing:
            raise KeyError(
                f"{len(missing)} of {len(genes)} genes are absent from section {name!r}: {missing[:10]}. "
                "`stimage_sd.pp.select_genes(cohort, genes)` keeps those that every section has."
            )
    return genes


def measured_counts(
    sdata: SpatialData, genes: list[str], source: contract.Source, counted: list[str] | None = None
) -> tuple[np.ndarray, sp.csr_matrix, np.ndarray]:
    """Return the rows of kept tiles on spots, their counts, and their totals over all genes, or over `counted`."""
    table = contract.tiles(sdata)
    rows, counts = contract.align_to_spots(sdata, table[table.obs["keep"].to_numpy()], source)
    of_total = counts.X if counted is None else counts[:, counted].X
    totals = np.asarray(of_total.sum(axis=1), dtype=np.float64).ravel()
    return rows, sp.csr_matrix(counts[:, genes].X), totals


def depths(
    totals: Sequence[np.ndarray], size_factors: str | None, exposure: str | None
) -> tuple[float | None, np.ndarray]:
    """Return the cohort's median total, `None` without depth, and the depth of each spot relative to it.

    Parameters
    ----------
    totals
        Total counts of the spots of each section.
    size_factors
        ``"total"``: every spot has its own depth.
    exposure
        ``"section"``: all spots of a section have the median depth of the section.
    """
    spots = np.concatenate(totals)
    if size_factors is None and exposure is None:
        return None, np.ones_like(spots)
    median = depth.median_total(spots)
    if size_factors is None:
        spots = np.concatenate([np.full(len(section), np.median(section)) for section in totals])
    return median, depth.size_factors(spots, median)


def counted_genes(cohort: Mapping[str, SpatialData], source: contract.Source) -> tuple[list[str] | None, int]:
    """Return the genes over which totals of sections compare, `None` for all of each section, and their number.

    Where a panel of a few hundred genes stands beside whole transcriptomes, only totals over shared genes compare.
    """
    tables = [contract.counts(sdata, source).var_names for sdata in cohort.values()]
    numbers = [len(names) for names in tables]
    if contract.totals_compare(min(numbers), max(numbers)):
        return None, int(np.median(numbers))
    shared = [gene for gene in tables[0] if all(gene in names for names in tables[1:])]
    return shared, len(shared)


def check_measured(counts: Mapping[str, sp.csr_matrix]) -> None:
    """Raise `ValueError` if a cohort has fewer than two tiles on spots, or only zero counts."""
    n_tiles, n_counts = sum(block.shape[0] for block in counts.values()), sum(block.sum() for block in counts.values())
    if n_tiles < 2:
        raise ValueError(
            f"Expected two or more tiles on spots, one to learn from and one to validate on, found {n_tiles} in the "
            f"sections {list(counts)}. Add sections or spots to the cohort."
        )
    if n_counts == 0:
        raise ValueError(
            f"Expected counts of the genes to learn, found zeros only in the sections {list(counts)}. Choose genes "
            "with counts by `stimage_sd.pp.select_genes(cohort)`."
        )


def kept_centers(sdata: SpatialData) -> np.ndarray:
    """Return the centers of the kept tiles, ``float64 (n_tiles, 2)`` in pixels."""
    table = contract.tiles(sdata)
    return contract.tile_geometry(sdata, table[table.obs["keep"].to_numpy()]).centers


def validation_sections(sections: np.ndarray, held_out: np.ndarray) -> list[list[str]]:
    """Return the sections that each member was validated on."""
    return [sorted(set(sections[member].tolist())) for member in held_out]


def versions() -> dict[str, str]:
    """Return the versions of the packages that a fit depends on."""
    packages = {name: version(name) for name in ("jax", "flax", "optax", "numpy", "spatialdata")}
    return {"stimage-sd": __version__, "python": platform.python_version(), **packages}
