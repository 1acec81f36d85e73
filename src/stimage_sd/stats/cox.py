"""Univariate Cox regressions and concordances of thousands of genes, by Newton's method on Efron's likelihood.

Patients are sorted once. Each gene then takes a few passes over its values. Genes run on threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from stimage_sd.stats.firth_cox import compiled, firth_regression
from stimage_sd.stats.spatial import each_block

#: maximum number of Newton steps; relative change of the log-likelihood and gain of the next step that end them
_STEPS, _TOLERANCE, _FLAT = 30, 1e-13, 1e-20
#: genes per thread and block
_WIDTH = 64
#: 97.5th percentile of the normal distribution
_QUANTILE = 1.959964
#: range of a gene relative to its largest value, below which differences are rounding
_ROUNDING = 1e-9


class CoxRegressions(NamedTuple):
    """One Cox regression per gene, each ``float64 (n_genes,)``, NaN for constant genes.

    - `coef`: log hazard ratio per unit of the gene.
    - `se`: standard error of `coef`.
    - `z`, `p_value`: Two-sided Wald test. With `firth`, the test of the penalized likelihood ratio.
    - `lower`, `upper`: 95 % interval of `coef` from `se`. With `firth`, from the profile of the penalized likelihood.
    - `log_likelihood`: partial log-likelihood at `coef`.
    - `firth`: ``bool``: whether `coef` is Firth's estimate, used if the partial likelihood has no finite optimum.
    - `log_likelihood_null`: partial log-likelihood at zero, one number for all genes.
    """

    coef: np.ndarray
    se: np.ndarray
    z: np.ndarray
    p_value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    log_likelihood: np.ndarray
    firth: np.ndarray
    log_likelihood_null: float


def cox_regressions(values: np.ndarray, time: np.ndarray, event: np.ndarray) -> CoxRegressions:
    """Fit one Cox regression per gene.

    - `values`: expression, ``(n_patients, n_genes)``.
    - `time`: time to event or censoring, ``(n_patients,)``.
    - `event`: whether the event was observed, ``bool (n_patients,)``.
    - returns: the regressions.

    Ties use Efron's approximation, the default of ``survival::coxph`` in R. If each death has the highest value of all
    patients at risk, or each has the lowest, the gene has no finite optimum. Such genes get Firth's penalized estimate
    (`stimage_sd.stats.firth_cox`).

    >>> import numpy as np
    >>> from stimage_sd.stats.cox import cox_regressions
    >>> found = cox_regressions(np.array([[1.0], [2.0], [0.0], [3.0]]), np.array([4, 3, 2, 1]), np.ones(4, bool))
    >>> found.coef.round(3).tolist()
    [0.485]
    """
    values, time, event = _checked(values, time, event)
    order = np.lexsort((~event, -time))
    at_risk, died, share = _deaths(time[order], event[order])
    matrix = np.ascontiguousarray(values[order].T, dtype=np.float64)
    varies = varying(values)
    # scale genes to unit deviation, so that the first Newton step is neither tiny nor huge
    scale = np.where(varies, matrix.std(axis=1), 1.0)
    matrix = (matrix - matrix.mean(axis=1, keepdims=True)) / scale[:, None]
    fits = np.full((len(matrix), 3), np.nan)

    def fit(start: int, stop: int) -> None:
        _fit(matrix[start:stop], at_risk, died, share, fits[start:stop])

    each_block((len(time), len(matrix)), fit, width=_WIDTH)
    fits[~varies] = np.nan
    coef, se = fits[:, 0], fits[:, 1]
    table = np.column_stack([coef, se, coef / se, coef - _QUANTILE * se, coef + _QUANTILE * se, fits[:, 2]])
    firth = varies & np.isnan(coef)
    for gene in np.flatnonzero(firth):
        table[gene] = firth_regression(matrix[gene], at_risk, died, share)
    coef, se, z, lower, upper, log_likelihood = table.T
    null = -float(np.log(_null_sums(at_risk, died, share)).sum())
    return CoxRegressions(
        coef / scale, se / scale, z, 2 * norm.sf(np.abs(z)), lower / scale, upper / scale, log_likelihood,
        firth & np.isfinite(coef), null,
    )  # fmt: skip


def directions(values: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Return the sign of the coefficient of each gene without a fit.

    - `values`, `time`, `event`: as in `cox_regressions`.
    - returns: ``float64 (n_genes,)``: 1 if the hazard rises with the gene, -1 if it falls. The partial log-likelihood
      is concave, so its slope at zero has the sign of the coefficient.

    >>> import numpy as np
    >>> directions(np.array([[3.0], [2.0], [1.0]]), np.array([1, 2, 3]), np.ones(3, bool)).tolist()
    [1.0]
    """
    values, time, event = _checked(values, time, event)
    order = np.lexsort((~event, -time))
    at_risk, died, share = _deaths(time[order], event[order])
    centered = (values - values.mean(axis=0))[order]
    sums = np.vstack([np.zeros((1, centered.shape[1])), np.cumsum(centered, axis=0)])
    of_risk = sums[at_risk] - share[:, None] * (sums[died[:, 1]] - sums[died[:, 0]])
    slope = centered[event[order]].sum(axis=0) - (of_risk / _null_sums(at_risk, died, share)[:, None]).sum(axis=0)
    return np.where(slope < 0, -1.0, 1.0)


def varying(values: np.ndarray) -> np.ndarray:
    """Return which genes vary by more than rounding, ``bool (n_genes,)``.

    >>> import numpy as np
    >>> varying(np.array([[0.3, 1.0], [0.1 + 0.2, 2.0]])).tolist()
    [False, True]
    """
    values = np.asarray(values, dtype=np.float64)
    varies: np.ndarray = np.ptp(values, axis=0) > _ROUNDING * np.abs(values).max(axis=0)
    return varies


def concordances(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Compute Harrell's concordance of risk and survival time per column.

    - `risk`: predicted risks or expression, ``(n_patients, n_genes)``. A higher value means an earlier event.
    - `time`, `event`: as in `cox_regressions`.
    - returns: ``float64 (n_genes,)``: share of comparable pairs in which the patient with the earlier event has the
      higher risk. Pairs of equal risk count one half. NaN if there are no comparable pairs.

    Same as ``survival::concordance(..., reverse = TRUE)`` in R. A patient censored at the time of an event outlives
    that event. Two events at the same time are not a pair.

    >>> import numpy as np
    >>> from stimage_sd.stats.cox import concordances
    >>> concordances(np.array([[3.0], [2.0], [1.0]]), np.array([1, 2, 3]), np.ones(3, bool)).tolist()
    [1.0]
    """
    risk, time, event = _checked(risk, time, event)
    order = np.lexsort((~event, -time))
    first, later = time[order], event[order]
    # patients who outlive patient i stand before i; at equal times, the censored are sorted after the events
    longer = np.searchsorted(-first, -first, side="left")
    censored = np.array([np.count_nonzero(~later[first == t]) for t in first[later]], dtype=np.int64)
    last = np.searchsorted(-first, -first, side="right")[later]
    matrix = np.ascontiguousarray(risk[order].T, dtype=np.float64)
    values = np.empty(len(matrix))

    def count(start: int, stop: int) -> None:
        _concordance(
            matrix[start:stop], np.flatnonzero(later), longer[later], last - censored, last, values[start:stop]
        )

    each_block((len(time), len(matrix)), count, width=_WIDTH)
    return values


def _checked(values: np.ndarray, time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, time = np.asarray(values), np.asarray(time, dtype=np.float64)
    event = np.asarray(event).astype(bool)
    if values.ndim != 2 or time.shape != (len(values),) or event.shape != time.shape:
        raise ValueError(
            f"Expected values (n_patients, n_genes) and one time and event per patient, found shapes {values.shape}, "
            f"{time.shape} and {event.shape}."
        )
    if not (np.isfinite(values).all() and np.isfinite(time).all()):
        raise ValueError("Expected finite values and times, found NaN or infinity.")
    if not event.any():
        raise ValueError("Expected at least one event, found none: every patient is censored.")
    return values, time, event


def _deaths(time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three arrays over deaths, from the latest to the earliest.

    - returns: number of patients at risk, who come first in the order, ``(n_deaths,)``. Range of the patients who die
      at the same time, ``(n_deaths, 2)``. Share of that range that Efron's approximation leaves out of the sum,
      ``(n_deaths,)``.
    """
    rows = np.flatnonzero(event)
    at_risk = np.searchsorted(-time, -time[rows], side="right")
    start = np.searchsorted(-time, -time[rows], side="left")
    n_tied = np.array([np.count_nonzero(event[a:b]) for a, b in zip(start, at_risk, strict=True)])
    # at equal times, events stand before the censored
    died = np.column_stack([start, start + n_tied])
    return at_risk, died, (rows - start) / n_tied


def _null_sums(at_risk: np.ndarray, died: np.ndarray, share: np.ndarray) -> np.ndarray:
    sums: np.ndarray = at_risk - share * (died[:, 1] - died[:, 0])
    return sums


@compiled
def _fit(  # pragma: no cover
    matrix: np.ndarray, at_risk: np.ndarray, died: np.ndarray, share: np.ndarray, out: np.ndarray
) -> None:
    n_genes, n = matrix.shape
    sums = np.zeros((3, n + 1))
    for gene in range(n_genes):
        x = matrix[gene]
        if _ordered(x, at_risk, died, share) or _ordered(-x, at_risk, died, share):
            continue  # the likelihood has no finite optimum
        beta, best, step = 0.0, -np.inf, 0.0
        for _ in range(_STEPS):
            for i in range(n):
                weight = np.exp(beta * x[i])
                sums[0, i + 1] = sums[0, i] + weight
                sums[1, i + 1] = sums[1, i] + weight * x[i]
                sums[2, i + 1] = sums[2, i] + weight * x[i] * x[i]
            likelihood, slope, bend = 0.0, 0.0, 0.0
            for death in range(len(at_risk)):
                a, b, part = died[death, 0], died[death, 1], share[death]
                row = a + round(part * (b - a))
                s0 = sums[0, at_risk[death]] - part * (sums[0, b] - sums[0, a])
                s1 = sums[1, at_risk[death]] - part * (sums[1, b] - sums[1, a])
                s2 = sums[2, at_risk[death]] - part * (sums[2, b] - sums[2, a])
                mean = s1 / s0
                likelihood += beta * x[row] - np.log(s0)
                slope += x[row] - mean
                bend += s2 / s0 - mean * mean
            if not np.isfinite(likelihood) or bend <= 0:
                break
            if likelihood < best and abs(likelihood - best) > _TOLERANCE * abs(likelihood):
                step /= 2
                beta -= step
                continue
            if abs(likelihood - best) <= _TOLERANCE * abs(likelihood) or slope * slope <= _FLAT * bend:
                out[gene, 0], out[gene, 1], out[gene, 2] = beta, 1 / np.sqrt(bend), likelihood
                break
            best, step = likelihood, slope / bend
            beta += step


@compiled
def _ordered(x: np.ndarray, at_risk: np.ndarray, died: np.ndarray, share: np.ndarray) -> bool:  # pragma: no cover
    """Check whether each death has the highest value of all patients at risk."""
    most, reached = -np.inf, 0
    for death in range(len(at_risk)):
        for i in range(reached, at_risk[death]):
            most = max(most, x[i])
        reached = at_risk[death]
        a, b = died[death, 0], died[death, 1]
        if x[a + round(share[death] * (b - a))] < most:
            return False
    return True


@compiled
def _concordance(  # pragma: no cover
    matrix: np.ndarray, rows: np.ndarray, longer: np.ndarray, tied: np.ndarray, last: np.ndarray, out: np.ndarray
) -> None:
    for gene in range(len(matrix)):
        x = matrix[gene]
        in_order, equal, pairs = 0.0, 0.0, 0.0
        for death in range(len(rows)):
            value = x[rows[death]]
            higher, same = 0, 0
            for i in range(longer[death]):
                higher += x[i] < value
                same += x[i] == value
            for i in range(tied[death], last[death]):
                higher += x[i] < value
                same += x[i] == value
            in_order += higher
            equal += same
            pairs += longer[death] + last[death] - tied[death]
        out[gene] = (in_order + 0.5 * equal) / pairs if pairs > 0 else np.nan
