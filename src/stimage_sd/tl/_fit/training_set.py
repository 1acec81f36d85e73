"""Gather what a cohort is fitted to: genes, counts of tiles on spots, and the tiles that members hold out."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import __version__, contract
from stimage_sd.likelihood import depth, mean_only
from stimage_sd.tl._fit.seen import fingerprints


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

    - `totals`: total counts of the spots of each section.
    - `size_factors`: ``"total"``: every spot has its own depth.
    - `exposure`: ``"section"``: all spots of a section have the median depth of the section.
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


@dataclass(frozen=True)
class Spots:
    """Measurements on the tiles of a cohort, in the order of sections.

    - `genes`: names of the genes.
    - `rows`: for each section, rows of its kept tiles.
    - `sections`: section of each measurement, ``(n,)``.
    - `positions`: centers, ``float64 (n, 2)`` in pixels.
    - `counts`: ``(n, n_genes)`` sparse.
    - `factors`: depth of each measurement, ``float32 (n,)``.
    - `floor`: Mean-only fit of each gene, ``(2, n_genes)``.
    - `total`: median total count, which has depth 1; `None` without depth.
    - `n_counted`: number of genes that totals are of; 0 without exposure.
    """

    genes: tuple[str, ...]
    rows: dict[str, np.ndarray]
    sections: np.ndarray
    positions: np.ndarray
    counts: sp.csr_matrix
    factors: np.ndarray
    floor: np.ndarray
    total: float | None
    n_counted: int

    @classmethod
    def read(
        cls, cohort: Mapping[str, SpatialData], genes: list[str], size_factors: str | None, exposure: str | None,
        source: contract.Source,
    ) -> Spots:  # fmt: skip
        """Read the counts of the kept tiles on spots."""
        counted, n_counted = counted_genes(cohort, source) if exposure is not None else (None, 0)
        measured = {name: measured_counts(sdata, genes, source, counted) for name, sdata in cohort.items()}
        check_measured({name: block for name, (_, block, _) in measured.items()})
        counts = sp.vstack([block for _, block, _ in measured.values()]).tocsr()
        median, factors = depths([total for _, _, total in measured.values()], size_factors, exposure)
        return cls(
            genes=tuple(genes),
            rows={name: rows for name, (rows, _, _) in measured.items()},
            sections=np.repeat(list(measured), [len(rows) for rows, _, _ in measured.values()]),
            positions=np.concatenate([kept_centers(cohort[name])[rows] for name, (rows, _, _) in measured.items()]),
            counts=counts,
            factors=factors.astype(np.float32),
            floor=mean_only.floor(counts, factors),
            total=median,
            n_counted=n_counted,
        )

    def record(
        self, cohort: Mapping[str, SpatialData], held_out: np.ndarray, history: list[dict[str, Any]],
        *, patients: Mapping[str, str], source: contract.Source, seed: int, options: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Return the record of a fit that a model keeps. A fit without epochs has no history."""
        return {
            "sections": list(self.rows),
            "patients": dict(patients),
            "fingerprints": fingerprints(cohort, self.genes, source),
            "n_tiles": len(self.sections),
            "n_counted": self.n_counted,
            "validation": validation_sections(self.sections, held_out),
            "seed": seed,
            "options": dict(options),
            "versions": versions(),
            **({"metrics": _metrics(history), "history": _columns(history)} if history else {}),
        }


def bootstrap(seen: np.ndarray, *, seed: int) -> np.ndarray:
    """Draw each member's training tiles with replacement and count the draws per tile."""
    random = np.random.default_rng([seed, 1])
    return np.stack([random.multinomial(member.sum(), member / member.sum()) for member in seen]).astype(np.float32)


def _columns(history: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in history] for key in history[0]}


def _metrics(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best epoch and its validation loss per member."""
    members = sorted({row.get("member", 0) for row in history})
    best = [
        min((row for row in history if row.get("member", 0) == member), key=lambda row: row["validation_nll"])
        for member in members
    ]
    return {
        "validation_nll": [row["validation_nll"] for row in best],
        "best_epoch": [row["epoch"] for row in best],
    }


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


def held_out_tiles(
    sections: np.ndarray,
    positions: np.ndarray,
    validation: float | Sequence[str],
    *,
    n_members: int,
    seed: int,
    patients: Mapping[str, str] | None = None,
) -> np.ndarray:
    """Choose the held-out tiles of each member.

    - `sections`: ``(n_tiles,)`` section name per tile.
    - `positions`: ``(n_tiles, 2)`` x and y per tile.
    - `validation`: share of the patients to hold out per member, rotating among members. Or names of sections to hold
      out for all members.
    - `n_members`: number of members.
    - `seed`: seed of the order of patients, or of the held-out part of a single section.
    - `patients`: patient by section. A section of unknown patient counts as a patient. If all sections are of one
      patient, each section counts as a patient.
    - returns: ``bool (n_members, n_tiles)``, True for held-out tiles. Training and held-out tiles are neighbors only at
      the border of a held-out part.

    >>> sections = np.array(["a", "a", "b", "b", "c", "c"])
    >>> held = held_out_tiles(sections, np.zeros((6, 2)), 0.3, n_members=3, seed=0)
    >>> held.sum(axis=1)
    array([2, 2, 2])
    >>> bool(held.any(axis=0).all())
    True
    """
    names = list(dict.fromkeys(sections.tolist()))
    unit = {name: (patients or {}).get(name, name) for name in names}
    if len(set(unit.values())) == 1:
        unit = {name: name for name in names}
    if isinstance(validation, str) or not isinstance(validation, int | float):
        named = [validation] if isinstance(validation, str) else list(validation)
        unknown = sorted(set(named) - set(names))
        if unknown or not named or len(set(named)) == len(names):
            raise ValueError(f"Expected `validation` to name some, not all, of the sections {names}, found {named}.")
        split = [name for name in names if name not in named and unit[name] in {unit[held] for held in named}]
        if split:
            raise ValueError(
                f"`validation` holds out {named} but not {split}, which are of the same patients. Name all sections "
                "of a patient, or none."
            )
        return np.tile(np.isin(sections, named), (n_members, 1))
    if not 0 < validation < 1:
        raise ValueError(f"Expected `validation` as a share between 0 and 1 or a list of sections, found {validation}.")
    random = np.random.default_rng([seed, 2])
    if len(names) == 1:
        return np.stack([_part(positions, validation, random) for _ in range(n_members)])
    units = list(dict.fromkeys(unit.values()))
    n_held = min(max(1, round(validation * len(units))), len(units) - 1)
    order = random.permutation(units)
    turns = [[order[(member * n_held + turn) % len(units)] for turn in range(n_held)] for member in range(n_members)]
    of_tile = np.array([unit[name] for name in sections.tolist()])
    return np.stack([np.isin(of_tile, turn) for turn in turns])


def _part(positions: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Hold out the tiles farthest along a random direction."""
    angle = random.uniform(0, 2 * np.pi)
    along = positions @ np.array([np.cos(angle), np.sin(angle)])
    n_held = min(max(1, round(share * len(along))), len(along) - 1)
    held = np.zeros(len(along), dtype=bool)
    held[np.argsort(-along, kind="stable")[:n_held]] = True
    return held
