"""Pair counts of held-out sections with their predicted distributions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood.depth import at_depth
from stimage_sd.likelihood.predictive import MixtureMoments, mixture_moments
from stimage_sd.models._predictor import OpenedSection, Predictor
from stimage_sd.tl._fit.seen import shift_sd
from stimage_sd.tl._fit.training_set import checked_genes, measured_counts
from stimage_sd.tl._predict.predict import size_factors_of

#: maximum number of counts used per section; tiles of larger sections are sampled at random
_MOST_COUNTS = 2_000_000
#: number of elements (members x tiles x genes) computed at a time
_BLOCK = 8_000_000


class HeldOut(NamedTuple):
    """Counts ``(n_tiles, n_genes)`` with mixture ``weights (n_members,)``, r and p ``(n_members, ...)`` at their depth.

    ``shift_sd`` is the standard deviation of the log of each gene's shift, `None` for models without shifts.
    """

    counts: np.ndarray
    weights: np.ndarray
    r: np.ndarray
    p: np.ndarray
    shift_sd: np.ndarray | None = None


def held_out_blocks(
    model: Predictor, cohort: dict[str, SpatialData], source: contract.Source
) -> Iterator[tuple[str, Iterator[HeldOut]]]:
    """Yield counts and mixtures per section, in blocks of tiles, after checking all sections."""
    genes = checked_genes(cohort, model.genes, source)
    opened = {name: model.open(sdata, section=name) for name, sdata in cohort.items()}
    for name, sdata in cohort.items():
        yield name, _blocks(model, sdata, opened[name], genes, source)


def _blocks(
    model: Predictor, sdata: SpatialData, opened: OpenedSection, genes: list[str], source: contract.Source
) -> Iterator[HeldOut]:
    table = contract.tiles(sdata)
    kept = table[table.obs["keep"].to_numpy()]
    rows, counts, totals = measured_counts(sdata, genes, source)
    sd = shift_sd(model, sdata)
    factors = size_factors_of(sdata, kept, model, None if model.total is None or sd is not None else "total", source)
    if sd is not None and model.total is not None:
        factors[:] = _exposure(model, sdata, rows, counts, totals, source)
    most = max(1, _MOST_COUNTS // len(genes))
    chosen = np.zeros(kept.n_obs, dtype=bool)
    chosen[rows if len(rows) <= most else np.random.default_rng(0).choice(rows, most, replace=False)] = True
    place = np.zeros(kept.n_obs, dtype=int)
    place[rows] = np.arange(len(rows))
    step = max(1, _BLOCK // (len(model.member_weights) * len(genes)))
    for start in range(0, kept.n_obs, step):
        inside = np.flatnonzero(chosen[start : start + step])
        if not len(inside):
            continue
        r, p = opened.r_and_p(slice(start, min(start + step, kept.n_obs)))
        here = start + inside
        yield HeldOut(
            counts=counts[place[here]].toarray().astype(np.float64),
            weights=np.asarray(model.member_weights, dtype=np.float64),
            r=r[:, inside].astype(np.float64),
            p=at_depth(p[:, inside], factors[here]),
            shift_sd=sd,
        )


def _exposure(
    model: Predictor, sdata: SpatialData, rows: np.ndarray, counts: sp.csr_matrix, totals: np.ndarray,
    source: contract.Source,
) -> float:  # fmt: skip
    """Return the depth of a section, as `contract.measured_exposure` does from predictions."""
    assert model.total is not None
    if contract.totals_compare(contract.counts(sdata, source).n_vars, model.training.get("n_counted", 0)):
        return contract.exposure_of(np.median(totals), model.total)
    n_tiles = int(contract.tiles(sdata).obs["keep"].sum())
    return contract.exposure_of(counts.sum(), expected_sums(model, sdata, rows, n_tiles=n_tiles)[0].sum())


def expected_sums(
    model: Predictor, sdata: SpatialData, rows: np.ndarray, *, n_tiles: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add up the means of some kept tiles at an exposure of 1, and their variances beyond the means, ``(n_genes,)``."""
    opened = model.open(sdata, section=contract.sample(sdata))
    chosen, n_genes = np.zeros(n_tiles, bool), len(model.genes)
    chosen[rows] = True
    mean, excess = np.zeros(n_genes), np.zeros(n_genes)
    step = max(1, _BLOCK // (len(model.member_weights) * n_genes))
    for start in range(0, n_tiles, step):
        inside = np.flatnonzero(chosen[start : start + step])
        if len(inside):
            r, p = opened.r_and_p(slice(start, min(start + step, n_tiles)))
            weights = np.asarray(model.member_weights)
            made = MixtureMoments(*(part[inside] for part in mixture_moments(r, p, weights=weights)))
            mean += made.mean.sum(axis=0, dtype=np.float64)
            excess += (made.aleatoric - made.mean + made.epistemic).sum(axis=0, dtype=np.float64)
    return mean, excess
