"""Firth's penalized Cox regression of one gene, for partial likelihoods without a finite optimum.

Source: Heinze and Schemper 2001, "A solution to the problem of monotone likelihood in Cox regression", Biometrics 57.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2

#: compile loops over patients, whose sums may be reordered; NaN and infinity keep their meaning
compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")
#: maximum number of doublings of a step to bracket the root
_DOUBLINGS = 60


class FirthRegression(NamedTuple):
    """Regression of one gene, NaN where the information is zero.

    - `coef`: log hazard ratio per unit of the gene, at the optimum of the penalized likelihood.
    - `se`: standard error of `coef`, from the information at the optimum.
    - `z`: signed square root of the penalized likelihood ratio against no effect.
    - `lower`, `upper`: 95 % interval of `coef`, from the profile of the penalized likelihood.
    - `log_likelihood`: partial log-likelihood at the optimum, without the penalty.
    """

    coef: float
    se: float
    z: float
    lower: float
    upper: float
    log_likelihood: float


def firth_regression(values: np.ndarray, at_risk: np.ndarray, died: np.ndarray, share: np.ndarray) -> FirthRegression:
    """Maximize the partial log-likelihood plus half the log of its information.

    - `values`: values of the gene, ``(n_patients,)``, ordered by time from the latest to the earliest.
    - `at_risk`, `died`, `share`: as in `stimage_sd.stats.cox`: number of patients at risk at each death, range of the
      patients who die at that time, and share of that range left out by Efron's approximation.
    - returns: the regression.
    """
    sums = np.empty(4)

    def at(beta: float) -> np.ndarray:
        _derivatives(values, beta, at_risk, died, share, sums)
        return sums

    def slope(beta: float) -> float:
        _, first, information, third = at(beta)
        return float(first + 0.5 * third / information)

    def penalized(beta: float) -> float:
        log_likelihood, _, information, _ = at(beta)
        return float(log_likelihood + 0.5 * np.log(information))

    if at(0.0)[2] <= 0:
        return FirthRegression(*(float("nan"),) * 6)
    unit = 1 / float(values.std())
    coef = _root(slope, 0.0, unit if slope(0.0) > 0 else -unit)
    best = penalized(coef)
    edge = best - chi2.ppf(0.95, 1) / 2
    lower, upper = (_root(lambda beta: penalized(beta) - edge, coef, step) for step in (-unit, unit))
    z = np.sign(coef) * np.sqrt(max(2 * (best - penalized(0.0)), 0.0))
    log_likelihood, _, information, _ = at(coef)
    return FirthRegression(coef, float(1 / np.sqrt(information)), float(z), lower, upper, float(log_likelihood))


def _root(function: Callable[[float], float], start: float, step: float) -> float:
    """Find the root beyond `start` in the direction of `step`, or NaN if no finite value brackets it."""
    sign = np.sign(function(start))
    if sign == 0:
        return start
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(_DOUBLINGS):
            value = function(start + step)
            if np.sign(value) != sign:
                break
            step *= 2
    if not np.isfinite(value) or np.sign(value) == sign:
        return float("nan")
    root: float = brentq(function, start, start + step, xtol=1e-12 * abs(step), rtol=1e-12)
    return root


@compiled
def _derivatives(  # pragma: no cover
    x: np.ndarray, beta: float, at_risk: np.ndarray, died: np.ndarray, share: np.ndarray, sums: np.ndarray
) -> None:
    """Write the log-likelihood, its first derivative, the information, and the derivative of the information.

    Weights and moments are relative to the patient with the highest hazard so far. This avoids overflow of the weights
    and cancellation in the variance of a risk set.
    """
    sums[:] = 0.0
    around, top, reached = 0.0, -np.inf, 0
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    for death in range(len(at_risk)):
        for i in range(reached, at_risk[death]):
            if beta * x[i] > top:
                shrink, d = np.exp(top - beta * x[i]), x[i] - around
                s3 = shrink * (s3 - 3 * d * s2 + 3 * d * d * s1 - d * d * d * s0)
                s2 = shrink * (s2 - 2 * d * s1 + d * d * s0)
                s1 = shrink * (s1 - d * s0)
                s0 = shrink * s0
                top, around = beta * x[i], x[i]
            weight, d = np.exp(beta * x[i] - top), x[i] - around
            s0, s1, s2, s3 = s0 + weight, s1 + weight * d, s2 + weight * d * d, s3 + weight * d * d * d
        reached = at_risk[death]
        a, b, part = died[death, 0], died[death, 1], share[death]
        n0, n1, n2, n3 = s0, s1, s2, s3
        if part > 0:
            for i in range(a, b):
                weight, d = part * np.exp(beta * x[i] - top), x[i] - around
                n0, n1, n2, n3 = n0 - weight, n1 - weight * d, n2 - weight * d * d, n3 - weight * d * d * d
        value, mean, square, cube = x[a + round(part * (b - a))] - around, n1 / n0, n2 / n0, n3 / n0
        sums[0] += beta * value - np.log(n0)
        sums[1] += value - mean
        sums[2] += square - mean * mean
        sums[3] += cube - 3 * mean * square + 2 * mean * mean * mean
