"""Survival of patients: Kaplan-Meier curves, the log-rank test and a Cox regression with a ridge penalty."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.stats import chi2, norm


class SurvivalCurve(NamedTuple):
    """Kaplan-Meier estimate, a step function that starts at time 0 and ends with the last patient.

    - `time`: times from which the values hold, ``float64 (n_times,)``.
    - `share`: share of patients without the event.
    - `lower`, `upper`: pointwise confidence limits of the share.
    """

    time: np.ndarray
    share: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    def at(self, time: ArrayLike) -> np.ndarray:
        """Return the share at given times, no earlier than 0."""
        return self.share[np.searchsorted(self.time, np.asarray(time), side="right") - 1]


def kaplan_meier(time: ArrayLike, event: ArrayLike, *, confidence: float = 0.95) -> SurvivalCurve:
    """Estimate the share of patients without the event over time.

    - `time`: time of the event or of the last contact, ``(n_patients,)``, no less than 0.
    - `event`: whether the event was observed, ``(n_patients,)``.
    - `confidence`: level of the pointwise confidence limits.
    - returns: the curve. Its limits are Greenwood's on the scale of ``log(-log(share))``, which keeps them within 0 and
      1.

    >>> from stimage_sd.stats.survival import kaplan_meier
    >>> kaplan_meier([1.0, 2.0, 2.0, 3.0], [True, False, True, False]).share.round(2).tolist()
    [1.0, 0.75, 0.5, 0.5]
    """
    from statsmodels.duration.survfunc import SurvfuncRight

    times, events = _checked(time, event)
    at, share, error = np.zeros(1), np.ones(1), np.zeros(1)
    if events.any():
        curve = SurvfuncRight(times, events.astype(int))
        at = np.append(at, curve.surv_times)
        share, error = np.append(share, curve.surv_prob), np.append(error, curve.surv_prob_se)
    if times.max() > at[-1]:
        at, share, error = np.append(at, times.max()), np.append(share, share[-1]), np.append(error, error[-1])
    inner = (share > 0) & (share < 1)
    lower, upper = share.copy(), share.copy()
    known = share[inner]
    factor = np.exp(norm.ppf((1 + confidence) / 2) * error[inner] / (known * np.log(known)))
    lower[inner], upper[inner] = known ** (1 / factor), known**factor
    return SurvivalCurve(at, share, lower, upper)


def log_rank_p(time: ArrayLike, event: ArrayLike, group: ArrayLike) -> float:
    """Compute the p-value of the log-rank test that all groups have one survival curve.

    - `time`, `event`: as in `kaplan_meier`.
    - `group`: group of each patient, ``(n_patients,)``, two groups or more.
    - returns: the p-value, accurate for very small values as well. NaN if the groups cannot be compared, such as
      without an event.

    >>> from stimage_sd.stats.survival import log_rank_p
    >>> round(log_rank_p([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1], ["a", "a", "a", "b", "b", "b"]), 4)
    0.0246
    """
    from statsmodels.duration.survfunc import survdiff

    times, events = _checked(time, event)
    names, numbers = np.unique(np.asarray(group), return_inverse=True)
    try:
        statistic, _ = survdiff(times, events.astype(int), numbers)
    except np.linalg.LinAlgError:  # at no event were patients of two groups at risk
        return np.nan
    return float(chi2.sf(statistic, len(names) - 1))


def ridge_cox(values: np.ndarray, time: np.ndarray, event: np.ndarray, *, penalty: float) -> np.ndarray:
    """Fit a Cox regression with a ridge penalty.

    - `values`: standardized covariates, ``float64 (n_patients, n_covariates)``.
    - `time`, `event`: as in `kaplan_meier`. Ties are treated as Efron does.
    - `penalty`: strength of the penalty, above 0: ``penalty / 2`` times the sum of squared weights is subtracted from
      the mean partial log-likelihood per patient.
    - returns: weights, ``float64 (n_covariates,)``.

    >>> import numpy as np
    >>> from stimage_sd.stats.survival import ridge_cox
    >>> values = np.array([[-1.0], [-1.0], [1.0], [1.0]])
    >>> ridge_cox(values, np.array([4.0, 3.0, 2.0, 1.0]), np.ones(4, bool), penalty=0.1).round(2).tolist()
    [1.19]
    """
    from statsmodels.duration.hazard_regression import PHReg

    model = PHReg(time, values, status=np.asarray(event, dtype=int), ties="efron")
    n_patients, n_covariates = values.shape
    return np.asarray(
        minimize(
            lambda weights: penalty / 2 * weights @ weights - model.loglike(weights) / n_patients,
            np.zeros(n_covariates),
            jac=lambda weights: penalty * weights - model.score(weights) / n_patients,
            hess=lambda weights: penalty * np.eye(n_covariates) - model.hessian(weights) / n_patients,
            method="trust-exact",
            options={"gtol": 1e-10},
        ).x
    )


def _checked(time: ArrayLike, event: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return times as ``float64`` and events as ``bool``, or raise `ValueError`."""
    times, events = np.asarray(time, dtype=np.float64), np.asarray(event)
    if times.ndim != 1 or not len(times) or events.shape != times.shape:
        raise ValueError(f"Expected one time and one event per patient, found shapes {times.shape} and {events.shape}.")
    if not (np.isfinite(times) & (times >= 0)).all():
        raise ValueError("Expected finite times of at least 0. Leave patients without a time out.")
    if not np.isin(events, [0, 1]).all():
        raise ValueError(f"Expected events of 1 (seen) and 0 (censored), found {np.unique(events)[:4].tolist()}.")
    return times, events.astype(bool)
