"""Counts of sections that a model did not see, with what it predicts for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._predictor import OpenedSection, Predictor
from stimage_sd.tl._fit_nb import _checked_genes, _measured
from stimage_sd.tl._predict import _size_factors

#: counts that are looked at in a section; of a larger one, as many tiles as have so many, drawn at random
_MOST_COUNTS = 2_000_000
#: elements (members x tiles x genes) that are computed at a time
_BLOCK = 8_000_000


class HeldOut(NamedTuple):
    """Counts ``(n_tiles, n_genes)`` and their mixtures, ``weights (n_members,)``, r and p ``(n_members, ...)``."""

    counts: np.ndarray
    weights: np.ndarray
    r: np.ndarray
    p: np.ndarray


def check_unseen(model: Predictor, cohort: dict[str, SpatialData], *, purpose: str) -> None:
    """Raise `ValueError` where a model was trained or validated on a section."""
    # by the name a cohort gives a section and by the section's own, which may differ
    known = set(model.training.get("sections", []))
    seen = [name for name, sdata in cohort.items() if {name, contract.sample(sdata)} & known]
    if seen:
        raise ValueError(
            f"The model was trained on {sorted(known)}, so {seen} cannot tell how it does on new sections. Leave a "
            f"section out of the fit to {purpose}."
        )


def held_out_blocks(
    model: Predictor, cohort: dict[str, SpatialData], table_key: str | None
) -> Iterator[tuple[str, Iterator[HeldOut]]]:
    """Give each section's counts with their mixtures, a block at a time, all sections being checked first."""
    genes = _checked_genes(cohort, model.genes, table_key)
    opened = {name: model.open(sdata, section=name) for name, sdata in cohort.items()}
    for name, sdata in cohort.items():
        yield name, _blocks(model, sdata, opened[name], genes, table_key)


def _blocks(
    model: Predictor, sdata: SpatialData, opened: OpenedSection, genes: list[str], table_key: str | None
) -> Iterator[HeldOut]:
    table = contract.tiles(sdata)
    kept = table[table.obs["keep"].to_numpy()]
    rows, counts, _ = _measured(sdata, genes, table_key)
    factors = _size_factors(sdata, kept, model, None if model.total is None else "total", table_key)
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
            r=r[:, inside].astype(np.float64) * factors[here][None, :, None],
            p=p[:, inside].astype(np.float64),
        )
