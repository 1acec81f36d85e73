"""Fit the ensemble of negative-binomial heads on the embeddings and counts of a cohort."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal

import jax
import numpy as np
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import __version__, contract
from stimage_sd._cache import keep_compiled
from stimage_sd.models._features import FeatureSpace, Standardize
from stimage_sd.models._nb import HeadName, NBModel
from stimage_sd.models._specification import common_specification, extractor_names, features
from stimage_sd.nn.intervals import mixture_interval
from stimage_sd.nn.mean_only import fit_mean_only
from stimage_sd.nn.negative_binomial_head import HEADS
from stimage_sd.nn.sharding import shard_members
from stimage_sd.tl._shared_patterns import find_patterns
from stimage_sd.tl._split import held_out_tiles
from stimage_sd.tl._training import TrainingData, train

#: share of held-out counts that the intervals are to cover
COVERAGE = 0.9
#: held-out tiles that the intervals' level is found on; more hardly move it
_MOST_TILES = 1_000
#: of them, those whose distributions are computed at a time
_BLOCK = 256


def fit_nb(
    data: SpatialData | contract.Cohort,
    *,
    genes: Sequence[str],
    extractor: str | Sequence[str] = "efficientnet_lite0",
    head: HeadName = "paper",
    n_members: int = 10,
    size_factors: Literal["total"] | None = None,
    validation: float | Sequence[str] = 0.3,
    n_components: int = 256,
    rank: int | None = 16,
    standardize: Standardize = "section",
    max_epochs: int = 100,
    batch_size: int = 64,
    learning_rate: float = 0.03,
    weight_decay: float = 10.0,
    patience: int = 10,
    seed: int = 0,
    table_key: str | None = None,
) -> NBModel:
    """Learn a negative binomial for every gene from the embeddings of tiles that sit on spots.

    The members of the ensemble see bootstrap samples of the training tiles and stop early on sections that
    they do not train on. Which sections those are goes round among the members, so that the ensemble as a
    whole learns from all of them.

    Parameters
    ----------
    data
        A cohort of sections with counts, tiled and embedded alike; a single section does too.
    genes
        Genes to learn; every section must have measured them (`stimage_sd.pp.select_genes`).
    extractor
        Whose embeddings, or several extractors', side by side with the same weight. Those of the neighbours
        (`pp.spatial_context`) are used where they were computed.
    head
        ``"paper"``: r and p for every gene and tile, as published. ``"dispersion"``: a mean for every gene
        and tile and one dispersion a gene; four times faster, a little worse in likelihood.
    n_members
        Members of the ensemble. Where JAX has several devices, they are spread over as many as share them out evenly.
    size_factors
        `None`: counts as they are; the depth of a spot is part of what is predicted. ``"total"``: a tile's
        total count over the cohort's median is taken out, and predictions are for a tile of median depth.
    validation
        Share of the sections that each member is validated on (at least one), or the names of sections
        that all members are validated on. With a single section, a contiguous part of it.
    n_components
        Principal components that embeddings are reduced to.
    rank
        Patterns of expression that all genes share, along which predictions vary: directions of the components,
        found by ridge regression of log counts on each member's training tiles. `None`: none are shared, the heads
        see all components, as published.
    standardize
        ``"section"``: each section's embeddings by their own mean and deviation; ``"cohort"``: by the
        training tiles'.
    max_epochs, batch_size, learning_rate
        Of Adam.
    weight_decay
        Precision of the Gaussian prior on the heads' weights; larger is smoother.
    patience
        A member's training ends when its validation loss has not improved for so many epochs; it keeps its best one.
    seed
        Seed of everything random; the same seed gives the same model, bit for bit, on one machine.
    table_key
        Name of the table of counts.

    Returns
    -------
    The model.

    Raises
    ------
    KeyError
        If a section was not embedded, or lacks some of the genes.
    ValueError
        If sections were prepared unlike each other, or an option is out of range.

    Notes
    -----
    Paper, sections 2.3 (Eq. 2 to 6) and 2.4. The docs ("Design decisions") say which defaults were chosen
    on held-out training sections, and by how much.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_fit", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(section, n_top=5)
    >>> sti.tl.fit_nb(section, genes=genes, n_members=2, max_epochs=2).n_members
    2
    """
    cohort = contract.sections(data)
    _check_options(
        head=head, standardize=standardize, size_factors=size_factors, n_members=n_members, max_epochs=max_epochs,
        batch_size=batch_size, n_components=n_components, patience=patience,
        rank=1 if rank is None else rank,
    )  # fmt: skip
    if not learning_rate > 0 or not weight_decay >= 0:
        raise ValueError(
            "Expected `learning_rate` to be positive and `weight_decay` to be no less than 0, found "
            f"{learning_rate} and {weight_decay}."
        )
    embeddings = [common_specification(cohort, name) for name in extractor_names(extractor)]
    genes = _checked_genes(cohort, genes, table_key)
    blocks = {name: [features(sdata, tiles) for tiles in embeddings] for name, sdata in cohort.items()}
    widths = [block.shape[1] for block in next(iter(blocks.values()))]
    embedded = {name: np.concatenate(each, axis=1) for name, each in blocks.items()}
    del blocks
    space = FeatureSpace.fit(embedded, n_components=n_components, standardize=standardize, seed=seed, widths=widths)
    measured = {name: _measured(sdata, genes, table_key) for name, sdata in cohort.items()}
    reduced = np.concatenate([space.reduce(embedded[name])[rows] for name, (rows, _, _) in measured.items()])
    del embedded
    counts = sp.vstack([block for _, block, _ in measured.values()]).tocsr()
    totals = np.concatenate([total for _, _, total in measured.values()])
    median = float(np.median(totals)) if size_factors == "total" else None
    factors = np.ones_like(totals) if median is None else np.maximum(totals / median, 1e-3)
    floor = _floor(counts, factors if median is not None else None)
    sections = np.repeat(list(measured), [len(rows) for rows, _, _ in measured.values()])
    positions = np.concatenate([_positions(cohort[name])[rows] for name, (rows, _, _) in measured.items()])
    held_out = held_out_tiles(sections, positions, validation, n_members=n_members, seed=seed)
    patterns = find_patterns(reduced, counts, factors, held_out, rank=rank) if rank is not None else None
    seen = reduced if patterns is None else patterns.project(reduced)
    training_data = TrainingData(seen, counts, factors.astype(np.float32), _bootstrap(~held_out, seed=seed), held_out)
    keep_compiled()
    initial = HEADS[head].initial(jax.random.key(seed), floor[0], floor[1], n_members, seen.shape[-1])
    parameters, history = train(
        head, shard_members(initial), training_data, max_epochs=max_epochs, batch_size=batch_size,
        learning_rate=learning_rate, weight_decay=weight_decay, patience=patience, seed=seed,
    )  # fmt: skip
    model = NBModel(
        genes=tuple(genes),
        tiles=embeddings[0],
        beside=tuple(embeddings[1:]),
        features=space,
        head=head,
        parameters={name: np.asarray(array) for name, array in parameters.items()},
        floor=floor,
        total=median,
        patterns=patterns,
        training={
            "sections": list(measured),
            "n_tiles": len(reduced),
            "validation": _validation_sections(sections, held_out),
            "seed": seed,
            "options": {
                "n_components": n_components, "rank": None if patterns is None else patterns.rank,
                "max_epochs": max_epochs, "batch_size": batch_size, "learning_rate": learning_rate,
                "weight_decay": weight_decay, "patience": patience,
            },
            "metrics": _metrics(history),
            "versions": _versions(),
            "history": {key: [row[key] for row in history] for key in history[0]},
        },
    )  # fmt: skip
    return _with_interval_level(model, reduced, training_data)


def _check_options(*, head: str, standardize: str, size_factors: str | None, **positive: int) -> None:
    if head not in HEADS:
        raise ValueError(f"Expected `head` to be one of {sorted(HEADS)}, found {head!r}.")
    if standardize not in ("section", "cohort"):
        raise ValueError(f'Expected `standardize` to be "section" or "cohort", found {standardize!r}.')
    if size_factors not in (None, "total"):
        raise ValueError(f'Expected `size_factors` to be None or "total", found {size_factors!r}.')
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"Expected `{name}` of at least 1, found {value}.")


def _checked_genes(cohort: Mapping[str, SpatialData], genes: Sequence[str], table_key: str | None) -> list[str]:
    genes = [str(gene) for gene in genes]
    if not genes or len(set(genes)) < len(genes):
        repeated = sorted({gene for gene in genes if genes.count(gene) > 1}) if genes else "an empty list"
        raise ValueError(f"Expected `genes` as a list of different names, found {repeated}.")
    for name, sdata in cohort.items():
        missing = [gene for gene in genes if gene not in contract.counts(sdata, table_key).var_names]
        if missing:
            raise KeyError(
                f"{len(missing)} of {len(genes)} genes are absent from section {name!r}: {missing[:10]}. "
                "`stimage_sd.pp.select_genes(cohort, genes)` keeps those that every section has."
            )
    return genes


def _measured(
    sdata: SpatialData, genes: list[str], table_key: str | None
) -> tuple[np.ndarray, sp.csr_matrix, np.ndarray]:
    """Of the kept tiles, the rows that sit on a spot, their counts, their totals over all genes."""
    table = contract.tiles(sdata)
    rows, counts = contract.align_to_spots(sdata, table[table.obs["keep"].to_numpy()], table_key)
    totals = np.asarray(counts.X.sum(axis=1), dtype=np.float64).ravel()
    return rows, sp.csr_matrix(counts[:, genes].X), totals


def _positions(sdata: SpatialData) -> np.ndarray:
    table = contract.tiles(sdata)
    return np.asarray(table.obsm["spatial"])[table.obs["keep"].to_numpy()]


def _floor(counts: sp.csr_matrix, size_factors: np.ndarray | None) -> np.ndarray:
    fit = fit_mean_only(counts, size_factors)
    # a gene never seen in training may still be seen later: half a count in all tiles together
    mean = np.maximum(fit.mean, 0.5 / counts.shape[0])
    dispersion = np.clip(np.nan_to_num(fit.r, nan=1.0, posinf=1e4), 1e-3, 1e4)
    return np.stack([mean, dispersion]).astype(np.float32)


def _bootstrap(seen: np.ndarray, *, seed: int) -> np.ndarray:
    """How often each member draws each of its training tiles, with replacement."""
    random = np.random.default_rng([seed, 1])
    return np.stack([random.multinomial(member.sum(), member / member.sum()) for member in seen]).astype(np.float32)


def _validation_sections(sections: np.ndarray, held_out: np.ndarray) -> list[list[str]]:
    return [sorted(set(sections[member].tolist())) for member in held_out]


def _metrics(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The best epoch of each member."""
    members = sorted({row["member"] for row in history})
    best = [min((row for row in history if row["member"] == m), key=lambda row: row["validation_nll"]) for m in members]
    return {
        "validation_nll": [row["validation_nll"] for row in best],
        "best_epoch": [row["epoch"] for row in best],
    }


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("jax", "flax", "optax", "numpy", "spatialdata")}
    return {"stimage-sd": __version__, "python": platform.python_version(), **packages}


def _with_interval_level(model: NBModel, reduced: np.ndarray, data: TrainingData) -> NBModel:
    """Set the nominal level at which held-out members' intervals cover what they should."""
    patterns, pattern_of = np.unique(data.held_out.T, axis=0, return_inverse=True)
    pieces = []
    share = min(1.0, _MOST_TILES / max(int(data.held_out.any(axis=0).sum()), 1))
    for number, members in enumerate(patterns):
        rows = np.flatnonzero(pattern_of.ravel() == number)
        rows = rows[np.linspace(0, len(rows) - 1, math.ceil(share * len(rows))).astype(int)]
        chosen = np.flatnonzero(members).tolist()
        for start in range(0, len(rows) if chosen else 0, _BLOCK):
            block = rows[start : start + _BLOCK]
            pieces.append((block, *model.r_and_p(reduced[block], members=chosen)))

    def covered(level: float) -> float:
        inside = 0
        for rows, r, p in pieces:
            lower, upper = mixture_interval(r, p, coverage=level)
            counts = data.counts[rows].toarray() / data.size_factors[rows, None]
            inside += int(((counts >= lower) & (counts <= upper)).sum())
        return inside / sum(r.shape[1] * r.shape[2] for _, r, _ in pieces)

    low, high = 0.5, 0.995
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if covered(middle) < COVERAGE else (low, middle)
    return replace(model, interval_level=float(high))
