"""Univariate Cox regressions and concordances of thousands of genes: Efron's likelihood by Newton's method.

Patients are sorted once; a gene is then a few passes over its values. Genes run on threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from stimage_sd.nn._gene_blocks import compiled, each_block

#: Newton's steps at most, and the relative change of the log-likelihood that ends them
_STEPS, _TOLERANCE = 30, 1e-13
#: genes that a thread takes at a time
_WIDTH = 64


class CoxRegressions(NamedTuple):
    """A Cox regression a gene, each ``float64 (n_genes,)``; NaN where a gene is constant or has no finite optimum.

    Attributes
    ----------
    coef
        Log hazard ratio a unit of the gene.
    se
        Its standard error.
    p_value
        Of Wald's test, two-sided.
    log_likelihood
        Partial log-likelihood at the optimum, and at zero.
    log_likelihood_null
        The same at zero: one for all genes.
    """

    coef: np.ndarray
    se: np.ndarray
    p_value: np.ndarray
    log_likelihood: np.ndarray
    log_likelihood_null: float


def cox_regressions(values: np.ndarray, time: np.ndarray, event: np.ndarray) -> CoxRegressions:
    """Fit a Cox regression to every gene by itself.

    Parameters
    ----------
    values
        Expression, ``(n_patients, n_genes)``.
    time
        Time to event or censoring, ``(n_patients,)``.
    event
        Whether the event was seen, ``bool (n_patients,)``.

    Returns
    -------
    The regressions.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or no event was seen.

    Notes
    -----
    Ties by Efron's approximation, as R's ``survival::coxph`` by default.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn.cox import cox_regressions
    >>> found = cox_regressions(np.array([[1.0], [2.0], [0.0], [3.0]]), np.array([4, 3, 2, 1]), np.ones(4, bool))
    >>> found.coef.round(3).tolist()
    [0.485]
    """
    values, time, event = _checked(values, time, event)
    order = np.lexsort((~event, -time))
    at_risk, died, share = _deaths(time[order], event[order])
    matrix = np.ascontiguousarray(values[order].T, dtype=np.float64)
    spread = np.ptp(matrix, axis=1)
    # in units of each gene's deviation Newton's first step is neither tiny nor huge
    scale = np.where(spread > 0, matrix.std(axis=1), 1.0)
    matrix = (matrix - matrix.mean(axis=1, keepdims=True)) / scale[:, None]
    found = np.full((len(matrix), 3), np.nan)

    def fit(start: int, stop: int) -> None:
        _fit(matrix[start:stop], at_risk, died, share, found[start:stop])

    each_block((len(time), len(matrix)), fit, width=_WIDTH)
    found[spread == 0] = np.nan
    coef, se = found[:, 0] / scale, found[:, 1] / scale
    null = -float(np.log(_null_sums(at_risk, died, share)).sum())
    return CoxRegressions(coef, se, 2 * norm.sf(np.abs(coef / se)), found[:, 2], null)


def concordances(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Harrell's concordance of every column: how often the one who dies first has the higher risk.

    Parameters
    ----------
    risk
        Predicted risks, or expression, ``(n_patients, n_genes)``: the higher, the sooner the event is expected.
    time, event
        As in `cox_regressions`.

    Returns
    -------
    ``float64 (n_genes,)``: pairs in order, and half of those of equal risk, over all pairs of which it is known who
    was first; NaN where there are none.

    Raises
    ------
    ValueError
        As in `cox_regressions`.

    Notes
    -----
    As R's ``survival::concordance(..., reverse = TRUE)``: a patient censored at the time of another's event outlives
    them, and two events at the same time are no pair.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn.cox import concordances
    >>> concordances(np.array([[3.0], [2.0], [1.0]]), np.array([1, 2, 3]), np.ones(3, bool)).tolist()
    [1.0]
    """
    risk, time, event = _checked(risk, time, event)
    order = np.lexsort((~event, -time))
    first, later = time[order], event[order]
    # those who outlive patient i stand before them: of the same time the censored, who are sorted behind the events
    longer = np.searchsorted(-first, -first, side="left")
    censored = np.array([np.count_nonzero(~later[first == t]) for t in first[later]], dtype=np.int64)
    last = np.searchsorted(-first, -first, side="right")[later]
    matrix = np.ascontiguousarray(risk[order].T, dtype=np.float64)
    found = np.empty(len(matrix))

    def count(start: int, stop: int) -> None:
        _concordance(matrix[start:stop], np.flatnonzero(later), longer[later], last - censored, last, found[start:stop])

    each_block((len(time), len(matrix)), count, width=_WIDTH)
    return found


def _checked(values: np.ndarray, time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, time = np.asarray(values), np.asarray(time, dtype=np.float64)
    event = np.asarray(event).astype(bool)
    if values.ndim != 2 or time.shape != (len(values),) or event.shape != time.shape:
        raise ValueError(
            f"Expected values (n_patients, n_genes) and a time and an event each, found shapes {values.shape}, "
            f"{time.shape} and {event.shape}."
        )
    if not (np.isfinite(values).all() and np.isfinite(time).all()):
        raise ValueError("Expected finite values and times, found NaN or infinity.")
    if not event.any():
        raise ValueError("Expected at least one event, found none: every patient is censored.")
    return values, time, event


def _deaths(time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every death, in the order of times from the last to the first: who is at risk, who dies with it, its share.

    Returns
    -------
    How many stand at risk (they come first), ``(n_deaths,)``; first and last of those dying at the time, ``(n_deaths,
    2)``; which part of these is left out of the sum, by Efron.
    """
    rows = np.flatnonzero(event)
    at_risk = np.searchsorted(-time, -time[rows], side="right")
    start = np.searchsorted(-time, -time[rows], side="left")
    n_tied = np.array([np.count_nonzero(event[a:b]) for a, b in zip(start, at_risk, strict=True)])
    # events stand before the censored of the same time
    died = np.column_stack([start, start + n_tied])
    return at_risk, died, (rows - start) / n_tied


def _null_sums(at_risk: np.ndarray, died: np.ndarray, share: np.ndarray) -> np.ndarray:
    sums: np.ndarray = at_risk - share * (died[:, 1] - died[:, 0])
    return sums


@compiled
def _fit(  # pragma: no cover
    matrix: np.ndarray, at_risk: np.ndarray, died: np.ndarray, share: np.ndarray, found: np.ndarray
) -> None:
    n_genes, n = matrix.shape
    sums = np.zeros((3, n + 1))
    for gene in range(n_genes):
        x = matrix[gene]
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
            done = abs(likelihood - best) <= _TOLERANCE * abs(likelihood)
            found[gene, 0], found[gene, 1], found[gene, 2] = beta, 1 / np.sqrt(bend), likelihood
            if done:
                break
            best, step = likelihood, slope / bend
            beta += step
        if abs(found[gene, 0]) > 50:  # values order the events perfectly: the hazard ratio has no bound
            found[gene] = np.nan


@compiled
def _concordance(  # pragma: no cover
    matrix: np.ndarray, rows: np.ndarray, longer: np.ndarray, tied: np.ndarray, last: np.ndarray, found: np.ndarray
) -> None:
    for gene in range(len(matrix)):
        x = matrix[gene]
        in_order, equal, pairs = 0.0, 0.0, 0.0
        for death in range(len(rows)):
            own = x[rows[death]]
            higher, same = 0, 0
            for i in range(longer[death]):
                higher += x[i] < own
                same += x[i] == own
            for i in range(tied[death], last[death]):
                higher += x[i] < own
                same += x[i] == own
            in_order += higher
            equal += same
            pairs += longer[death] + last[death] - tied[death]
        found[gene] = (in_order + 0.5 * equal) / pairs if pairs > 0 else np.nan
