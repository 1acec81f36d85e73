"""Learn from held-out tiles how far genes shift between sections, and at which level intervals cover their counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import scipy.optimize

from stimage_sd.likelihood import depth
from stimage_sd.likelihood.intervals import mixture_interval
from stimage_sd.likelihood.predictive import MixtureMoments, log_prob, mixture_moments, nearest_interval, predictive
from stimage_sd.likelihood.shifts import HeldOutSums, learn_shifts, patients_of, shift_of, spot_sd
from stimage_sd.models._instance_model import InstanceModel
from stimage_sd.models._nb import NBModel
from stimage_sd.tl._fit.training import TrainingData

#: share of held-out counts that the intervals should cover
COVERAGE = 0.9
#: number of held-out tiles used (more tiles hardly change the level)
_MOST_TILES = 1_000
#: number of held-out tiles used to scale r
_FEW_TILES = 200
#: number of tiles per block of computed distributions
_BLOCK = 256


class _Block(NamedTuple):
    """Some held-out tiles, and the distributions of the members that did not see them, at the depth of the tiles."""

    rows: np.ndarray
    r: np.ndarray
    p: np.ndarray


#: gives r and p of some rows of the training tiles by some members, each ``(n_members, n_rows, n_genes)``
Distributions = Callable[[np.ndarray, list[int]], tuple[np.ndarray, np.ndarray]]
Model = TypeVar("Model", NBModel, InstanceModel)


def with_interval_level(
    model: Model, r_and_p: Distributions, data: TrainingData, sections: np.ndarray, patients: Mapping[str, str]
) -> Model:
    """Set the level at which intervals cover `COVERAGE` of the held-out counts.

    With exposure, also learn the shifts of genes, the scale of r, and how much all genes of a spot vary together.

    Parameters
    ----------
    model
        The fitted heads.
    r_and_p
        Distributions of tiles by members.
    data
        Counts, depths, and which tiles were held out from which member.
    sections
        Section of each tile.
    patients
        Patient by section, as far as known.
    """
    blocks = _held_out(model.total is not None, r_and_p, data)
    if model.training["options"]["exposure"] is None:
        return replace(model, interval_level=_level(lambda level: _covered(blocks, data, level)))
    shifts = _shifts(blocks, data, sections, patients)
    # held-out patients show how intervals cover another patient, other held-out sections another section
    known = patients_of(sorted(set(sections.tolist())), patients)
    sd = shift_of(shifts, known=known is None or len(set(known)) < 2)
    rows = np.concatenate([block.rows for block in blocks])
    counts = data.counts[rows].toarray().astype(np.float64)
    moments = MixtureMoments(
        *(
            np.concatenate(parts).astype(np.float64)
            for parts in zip(*(_moments(r, p) for _, r, p in blocks), strict=True)
        )
    )
    r_scale = _r_scale(counts, moments, sd)
    made = predictive(_scaled(moments, r_scale), sd)
    totals = HeldOutSums(*(part.sum(axis=1) for part in (counts, moments.mean, made.variance)))

    def covered(level: float) -> float:
        lower, upper = nearest_interval(made.mean, made.variance, sd, coverage=level)
        return float(((counts >= lower) & (counts <= upper)).mean())

    return replace(
        model, shifts=shifts, r_scale=r_scale, spot_sd=spot_sd(totals, sections[rows]), interval_level=_level(covered)
    )


def _scaled(moments: MixtureMoments, r_scale: float) -> MixtureMoments:
    """Return the moments with every r multiplied by a factor."""
    return moments._replace(aleatoric=moments.mean + (moments.aleatoric - moments.mean) / r_scale)


def _r_scale(counts: np.ndarray, moments: MixtureMoments, sd: np.ndarray) -> float:
    """Return the factor on r at which the held-out counts are likeliest, between a half and twice."""
    few = slice(None, None, max(1, len(counts) // _FEW_TILES))
    part = MixtureMoments(*(moment[few] for moment in moments))

    def loss(log_scale: float) -> float:
        made = predictive(_scaled(part, float(np.exp(log_scale))), sd)
        return -float(log_prob(counts[few], made.mean, made.variance, sd).mean())

    found = scipy.optimize.minimize_scalar(
        loss, bounds=(-np.log(2), np.log(2)), method="bounded", options={"xatol": 0.03}
    )
    return float(np.exp(found.x))


def _level(covered: Callable[[float], float]) -> float:
    """Return the lowest level that covers `COVERAGE`, to a part in 128."""
    low, high = 0.5, 0.995
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if covered(middle) < COVERAGE else (low, middle)
    return float(high)


def _held_out(has_depth: bool, r_and_p: Distributions, data: TrainingData) -> list[_Block]:
    """Return the distributions of held-out tiles, evenly drawn."""
    patterns, pattern_of = np.unique(data.held_out.T, axis=0, return_inverse=True)
    blocks = []
    share = min(1.0, _MOST_TILES / max(int(data.held_out.any(axis=0).sum()), 1))
    for pattern, members in enumerate(patterns):
        rows = np.flatnonzero(pattern_of.ravel() == pattern)
        rows = rows[np.linspace(0, len(rows) - 1, math.ceil(share * len(rows))).astype(int)]
        chosen = np.flatnonzero(members).tolist()
        for start in range(0, len(rows) if chosen else 0, _BLOCK):
            block = rows[start : start + _BLOCK]
            r, p = r_and_p(block, chosen)
            blocks.append(_Block(block, r, depth.at_depth(p, data.size_factors[block]) if has_depth else p))
    return blocks


def _covered(blocks: list[_Block], data: TrainingData, level: float) -> float:
    inside = 0
    for rows, r, p in blocks:
        lower, upper = mixture_interval(r, p, coverage=level)
        counts = data.counts[rows].toarray()
        inside += int(((counts >= lower) & (counts <= upper)).sum())
    return inside / sum(r.shape[1] * r.shape[2] for _, r, _ in blocks)


def _moments(r: np.ndarray, p: np.ndarray) -> MixtureMoments:
    return mixture_moments(r, p, weights=np.full(len(r), 1 / len(r)))


def _shifts(blocks: list[_Block], data: TrainingData, sections: np.ndarray, patients: Mapping[str, str]) -> np.ndarray:
    """Add up counts and expectations of every section, and learn the shifts of genes."""
    names = list(dict.fromkeys(sections.tolist()))
    sums = HeldOutSums(*np.zeros((3, len(names), data.counts.shape[1])))
    seen = set()
    for rows, r, p in blocks:
        mean, aleatoric, epistemic = _moments(r, p)
        for name in dict.fromkeys(sections[rows].tolist()):
            here, place = sections[rows] == name, names.index(name)
            seen.add(place)
            sums.counts[place] += np.asarray(data.counts[rows[here]].sum(axis=0)).ravel()
            sums.expected[place] += mean[here].sum(axis=0, dtype=np.float64)
            sums.variance[place] += (aleatoric + epistemic)[here].sum(axis=0, dtype=np.float64)
    chosen = sorted(seen)
    return learn_shifts(
        HeldOutSums(*(part[chosen] for part in sums)), patients_of([names[place] for place in chosen], patients)
    )
