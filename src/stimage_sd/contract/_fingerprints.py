"""Recognize sections by their counts, to tell whether a model has seen a section under any name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd.contract._counts import Source, counts
from stimage_sd.contract._section import sample

#: number of spots kept per section: the spots with the smallest hashes
_KEPT = 1024
#: least number of shared spots for two sections to be the same; cells with a single count are alike in any section
_LEAST_COMMON = 5
#: least share of distinct spots to compare sections; with few genes or counts, spots of any two sections are alike
_DISTINCT = 0.95
#: least share of the compared spots that two sections must share to be the same
_SHARED = 0.5


def fingerprint(sdata: SpatialData, name: str, *, genes: Sequence[str], source: Source | None = None) -> dict[str, Any]:
    """Return a JSON-ready fingerprint by which a section is recognized later.

    A spot's hash depends only on its counts, not on names, positions or order. The smallest hashes are kept, so that
    a part of the section is recognized too.

    - `sdata`: the section.
    - `name`: name of the section in the cohort.
    - `genes`: genes of the model. Their counts are hashed, because other genes may be dropped from the table. If these
      counts do not tell spots apart, all genes are hashed.
    - `source`: table and layer of the counts.
    - returns: ``section``: `name`. ``over``: the hashed genes, ``"genes"`` or ``"all"``. ``spots``: the hashes, empty
      if not even all genes tell spots apart.
    """
    table = counts(sdata, source)
    for over in ("genes", "all"):
        telling = _telling(_spot_hashes(table, genes if over == "genes" else None))
        if len(telling):
            return {"section": name, "over": over, "spots": [f"{value:016x}" for value in telling[:_KEPT].tolist()]}
    return {"section": name, "over": "all", "spots": []}


def is_seen(
    sdata: SpatialData, name: str, *, known: Iterable[Mapping[str, Any]], genes: Sequence[str], source: Source | None
) -> bool:
    """Return whether a section matches one of several fingerprints.

    Spots are compared where possible. A fingerprint without usable spots is compared by section name.

    - `sdata`: the section.
    - `name`: name of the section in the cohort.
    - `known`: fingerprints to compare with.
    - `genes`: genes of the model that the fingerprints come from.
    - `source`: table and layer of the counts.
    """
    table: AnnData | None = None
    hashes_by_genes: dict[str | None, NDArray[np.uint64]] = {}
    for entry in known:
        over = entry.get("over")
        if entry.get("spots"):
            table = counts(sdata, source) if table is None else table
        if table is None or not entry.get("spots") or (over == "genes" and not set(genes) <= set(table.var_names)):
            if entry["section"] in (name, sample(sdata)):
                return True
            continue
        if over not in hashes_by_genes:
            hashes_by_genes[over] = _telling(_spot_hashes(table, genes if over == "genes" else None))
        if _overlap([int(value, 16) for value in entry["spots"]], hashes_by_genes[over]):
            return True
    return False


def repeated_sections(cohort: Mapping[str, SpatialData], source: Source | None = None) -> list[tuple[str, str]]:
    """Return pairs of names in a cohort that hold the same section, or a section and a part of it."""
    kept: dict[str, list[int]] = {}
    pairs = []
    for name, sdata in cohort.items():
        telling = _telling(_spot_hashes(counts(sdata, source), None))
        pairs += [(other, name) for other, least in kept.items() if _overlap(least, telling)]
        if len(telling):
            kept[name] = telling[:_KEPT].tolist()
    return pairs


def _overlap(kept: Sequence[int], hashes: NDArray[np.uint64]) -> bool:
    """Return whether two sections share enough spots to be the same section or parts of it."""
    # a full list of hashes was cut off above its largest; a shorter list is complete
    limit = max(kept) if len(kept) == _KEPT else 2**64 - 1
    compared = hashes[hashes <= np.uint64(limit)]
    common = len(np.intersect1d(compared, np.array(kept, dtype=np.uint64)))
    return common >= max(_SHARED * min(len(compared), len(kept)), min(_LEAST_COMMON, len(kept), len(hashes)), 1)


def _telling(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the sorted hashes that occur once in the section, or none if its spots are too alike."""
    values, n_spots = np.unique(hashes, return_counts=True)
    return values[n_spots == 1] if len(values) >= _DISTINCT * len(hashes) else values[:0]


def _spot_hashes(table: AnnData, genes: Sequence[str] | None) -> NDArray[np.uint64]:
    """Return one hash of the counts per spot with counts, ``(n_spots,)``."""
    if genes is not None and not set(genes) <= set(table.var_names):
        return np.zeros(0, np.uint64)
    chosen = table if genes is None else table[:, list(genes)]
    matrix = sp.csr_matrix(chosen.X)
    names = np.array([_of_name(str(gene)) for gene in chosen.var_names], dtype=np.uint64)
    with np.errstate(over="ignore"):
        terms = _mixed(names[matrix.indices] + _mixed(matrix.data.astype(np.int64).astype(np.uint64)))
        terms[matrix.data == 0] = 0
        # the sum does not depend on the order of genes, and is 0 for a spot without counts
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        spots = sums[matrix.indptr[1:]] - sums[matrix.indptr[:-1]]
    return _mixed(spots[spots > 0])


def _of_name(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit values one to one (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
