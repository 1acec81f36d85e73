"""Learn from held-out tiles how far genes shift between sections, and at which level intervals cover their counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import scipy.optimize
import scipy.stats

from stimage_sd.likelihood import depth
from stimage_sd.likelihood.intervals import mixture_interval
from stimage_sd.likelihood.predictive import MixtureMoments, log_prob, mixture_moments, nearest_interval, predictive
from stimage_sd.likelihood.shifts import PATIENT, SECTION, shift_of
from stimage_sd.models._instance_model import InstanceModel
from stimage_sd.models._nb import NBModel
from stimage_sd.models._wrapped import WrappedModel
from stimage_sd.tl._fit.training import TrainingData

#: share of held-out counts that the intervals should cover
COVERAGE = 0.9
#: number of held-out tiles used (more tiles hardly change the level)
_MOST_TILES = 1_000
#: number of held-out tiles used to scale r
_FEW_TILES = 200
#: number of tiles per block of computed distributions
_BLOCK = 256
#: number of held-out patients or sections that weigh as much as the prior in the typical standard deviation
_PRIOR_WEIGHT = 4.0
#: number of genes with enough counts below which a cohort does not show how genes shift
_FEWEST_GENES = 2


class _Block(NamedTuple):
    """Some held-out tiles, and the distributions of the members that did not see them, at the depth of the tiles."""

    rows: np.ndarray
    r: np.ndarray
    p: np.ndarray


#: gives r and p of some rows of the training tiles by some members, each ``(n_members, n_rows, n_genes)``
Distributions = Callable[[np.ndarray, list[int]], tuple[np.ndarray, np.ndarray]]
Model = TypeVar("Model", NBModel, InstanceModel, WrappedModel)


def with_interval_level(
    model: Model, r_and_p: Distributions, data: TrainingData, sections: np.ndarray, patients: Mapping[str, str]
) -> Model:
    """Set the level at which intervals cover `COVERAGE` of the held-out counts.

    With exposure, also learn the shifts of genes, the scale of r, and how much all genes of a spot vary together.

    - `model`: the fitted heads.
    - `r_and_p`: distributions of tiles by members.
    - `data`: counts, depths, and which tiles were held out from which member.
    - `sections`: section of each tile.
    - `patients`: patient by section, as far as known.
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

    result = scipy.optimize.minimize_scalar(
        loss, bounds=(-np.log(2), np.log(2)), method="bounded", options={"xatol": 0.03}
    )
    return float(np.exp(result.x))


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


class HeldOutSums(NamedTuple):
    """Sums over the held-out tiles of each section, ``float64 (n_sections, n_genes)``.

    - `counts`: sum of the counts.
    - `expected`: sum of the predicted means, at the section's exposure.
    - `variance`: sum of the predicted variances without shifts.
    """

    counts: np.ndarray
    expected: np.ndarray
    variance: np.ndarray

    def log_ratio(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the log of observed over expected, and the variance it has from counting alone."""
        return np.log((self.counts + 0.5) / (self.expected + 0.5)), self.variance / (self.expected + 0.5) ** 2


def patients_of(sections: Sequence[str], patients: Mapping[str, str]) -> list[str] | None:
    """Return the patient of each section, or `None` if one is unknown."""
    return [patients[name] for name in sections] if all(name in patients for name in sections) else None


def learn_shifts(sums: HeldOutSums, patients: Sequence[str] | None) -> np.ndarray:
    """Learn the standard deviation of each gene's shift from sections that were held out.

    - `sums`: sums over held-out tiles. Where `patients` names several, all sections of a patient were held out
      together.
    - `patients`: patient of each section, `None` if unknown.
    - returns: ``float32 (2, n_genes)``: standard deviation of the log of the shift, for another section of a training
      patient, and for another patient. Without held-out sections of a kind, the prior stands in (`PATIENT`, `SECTION`).

    Per gene, the variance is the mean squared log ratio of observed and expected counts, less what counting explains.
    It is shrunk towards the typical variance of all genes (empirical Bayes with a scaled inverse chi-square), which is
    itself shrunk towards the prior.

    >>> import numpy as np
    >>> from stimage_sd.tl._fit.held_out_level import HeldOutSums, learn_shifts
    >>> counts = np.array([[200.0, 900.0], [50.0, 1100.0], [100.0, 1000.0]])
    >>> expected = np.tile([100.0, 1000.0], (3, 1))
    >>> section, patient = learn_shifts(HeldOutSums(counts, expected, expected), ["a", "b", "c"])
    >>> bool(patient[0] > patient[1])
    True
    """
    ratio, noise = sums.log_ratio()
    n_sections, n_genes = ratio.shape
    groups = _groups(patients, n_sections)
    typical = prior_sd(len(groups), max(1, round(n_sections / len(groups))))
    if len(groups) > 1:
        means = np.stack([ratio[rows].mean(axis=0) for rows in groups])
        of_means = np.stack([noise[rows].mean(axis=0) / len(rows) for rows in groups])
        other = _shrunken((means**2).mean(axis=0), of_means.mean(axis=0), len(groups), typical[1], PATIENT.df)
        spread = [((ratio[rows] - mean) ** 2).sum(axis=0) for rows, mean in zip(groups, means, strict=True)]
        counting = [(len(rows) - 1) * noise[rows].mean(axis=0) for rows in groups]
        df = n_sections - len(groups)
        # the mean of the training sections is uncertain too
        about, from_counting = (np.sum(parts, axis=0) / max(df, 1) * (1 + len(groups) / n_sections)
                                for parts in (spread, counting))  # fmt: skip
        same = _shrunken(about, from_counting, df, typical[0], SECTION.df)
    else:
        df = n_sections if n_sections > 1 else 0  # a part of the only section is no other section
        same = _shrunken((ratio**2).mean(axis=0), noise.mean(axis=0), df, typical[0], SECTION.df)
        other = np.full(n_genes, typical[1])
    return np.stack([same, np.maximum(other, same)]).astype(np.float32)


def prior_sd(n_patients: int, n_sections: int) -> tuple[float, float]:
    """Return the typical standard deviations of shifts for a model of some patients and sections.

    - `n_patients`: number of patients that the model was trained on.
    - `n_sections`: mean number of training sections of a patient.
    - returns: for another section of a training patient, and for another patient. The mean of the training sections is
      uncertain too, which adds one over their number to the variance.

    >>> from stimage_sd.tl._fit.held_out_level import prior_sd
    >>> section, patient = prior_sd(1, 4)
    >>> round(section, 2), round(patient, 2)
    (0.19, 0.69)
    """
    section = SECTION.sd * np.sqrt(1 + 1 / n_sections)
    return float(section), float(np.sqrt(PATIENT.sd**2 * (1 + 1 / n_patients) + SECTION.sd**2))


def _groups(patients: Sequence[str] | None, n_sections: int) -> list[np.ndarray]:
    """Return the rows of each patient, of all sections together if patients are unknown."""
    if patients is None:
        return [np.arange(n_sections)]
    return [np.flatnonzero(np.asarray(patients) == patient) for patient in dict.fromkeys(patients)]


def _shrunken(total: np.ndarray, noise: np.ndarray, df: int, prior: float, prior_df: float) -> np.ndarray:
    """Shrink variances of `df` degrees of freedom, noise of counting included, and return standard deviations."""
    informative = noise < prior**2
    if df == 0 or informative.sum() < _FEWEST_GENES:
        return np.full(len(total), prior)
    # the median gene, since a few genes differ much more than the others
    median = max(float(np.median((total - noise)[informative])), 0.0) / float(scipy.stats.f.median(df, prior_df))
    typical = (_PRIOR_WEIGHT * prior**2 + df * median) / (_PRIOR_WEIGHT + df)
    # the noise of counting leaves so many degrees of freedom, by the variance of the difference
    weight = df * (typical / (typical + noise)) ** 2
    return np.asarray(np.sqrt((prior_df * typical + weight * np.maximum(total - noise, 0)) / (prior_df + weight)))


def spot_sd(totals: HeldOutSums, sections: np.ndarray) -> float:
    """Return the standard deviation of the log of what all genes of a spot share, given the image.

    - `totals`: sums over genes instead of tiles: observed, expected and variance if genes were independent,
      ``(n_tiles,)``.
    - `sections`: section of each tile. What all tiles of a section share is its exposure and is left out.
    """
    ratio, noise = totals.log_ratio()
    names, of_tile = np.unique(sections, return_inverse=True)
    means = np.bincount(of_tile, ratio) / np.bincount(of_tile)
    free = max(len(ratio) - len(names), 1)
    return float(np.sqrt(max(((ratio - means[of_tile]) ** 2).sum() / free - noise.mean(), 0.0)))
