"""Selective prediction: how the error falls as the most uncertain predictions are left out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class RiskCoverage(NamedTuple):
    """Risk–coverage curve.

    Attributes
    ----------
    coverage
        ``float64 (n,)``: share of the predictions that are kept, 1/n to 1.
    risk
        ``float64 (n,)``: mean error of those, the least uncertain ones.
    oracle
        ``float64 (n,)``: the same where those of the least error are kept; no uncertainty does better.
    random
        Mean error of all: what keeping any share at random expects.
    aurc
        Mean of `risk` over the curve (area under it): between that of `oracle` and `random` where the uncertainty
        is of use.
    """

    coverage: np.ndarray
    risk: np.ndarray
    oracle: np.ndarray
    random: float
    aurc: float


def risk_coverage(error: ArrayLike, uncertainty: ArrayLike) -> RiskCoverage:
    """Sort predictions by uncertainty and average the error of those kept.

    Parameters
    ----------
    error
        Error of each prediction, ``(n,)``.
    uncertainty
        Its uncertainty, ``(n,)``; only the order counts.

    Returns
    -------
    The curve.

    Raises
    ------
    ValueError
        If the two are not of one length, empty or not finite.

    Notes
    -----
    Geifman and El-Yaniv 2017, "Selective classification for deep neural networks". Among equal uncertainties the
    mean error of all counts for each, so that the order of the input does not.

    Examples
    --------
    >>> from stimage_sd.nn.selective import risk_coverage
    >>> risk_coverage([1.0, 3.0, 2.0], [0.1, 0.9, 0.5]).risk.tolist()
    [1.0, 1.5, 2.0]
    """
    errors, uncertainties = np.asarray(error, dtype=np.float64), np.asarray(uncertainty, dtype=np.float64)
    if errors.ndim != 1 or errors.shape != uncertainties.shape or errors.size == 0:
        raise ValueError(
            f"Expected `error` and `uncertainty` of one length, found {errors.shape} and {uncertainties.shape}."
        )
    if not (np.isfinite(errors).all() and np.isfinite(uncertainties).all()):
        raise ValueError("Expected finite `error` and `uncertainty`, found NaN or infinite ones.")
    _, group = np.unique(uncertainties, return_inverse=True)
    shared = (np.bincount(group, weights=errors) / np.bincount(group))[group]
    kept = np.arange(1, errors.size + 1)
    risk = np.cumsum(shared[np.argsort(uncertainties, kind="stable")]) / kept
    return RiskCoverage(
        coverage=kept / errors.size,
        risk=risk,
        oracle=np.cumsum(np.sort(errors)) / kept,
        random=float(errors.mean()),
        aurc=float(risk.mean()),
    )


def log_scale(counts: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Error and uncertainty of predicted counts where neither grows with the mean by itself.

    Parameters
    ----------
    counts, mean, variance
        What was counted, and the predicted mean and variance, of one shape.

    Returns
    -------
    The absolute error of log(1 + mean), and the variance of log(1 + count) to first order, variance / (1 + mean)².

    Examples
    --------
    >>> from stimage_sd.nn.selective import log_scale
    >>> error, uncertainty = log_scale([3.0], [1.0], [2.0])
    >>> round(float(error[0]), 3), float(uncertainty[0])
    (0.693, 0.5)
    """
    means = np.asarray(mean, dtype=np.float64)
    error = np.abs(np.log1p(np.asarray(counts, dtype=np.float64)) - np.log1p(means))
    return error, np.asarray(variance, dtype=np.float64) / (1 + means) ** 2


def kept(curve: np.ndarray, shares: ArrayLike) -> np.ndarray:
    """Read a curve over 1 to n predictions at shares of them, rounded up.

    Parameters
    ----------
    curve
        ``(n,)``, as `RiskCoverage.risk`.
    shares
        Above 0, at most 1.

    Returns
    -------
    The curve's values, of the shape of `shares`.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn.selective import kept
    >>> kept(np.array([1.0, 2.0, 3.0, 4.0]), [0.5, 0.6, 1.0]).tolist()
    [2.0, 3.0, 4.0]
    """
    # a share such as 0.1 * 30 may come out a hair above the whole number that it is
    rows = np.ceil(np.asarray(shares, dtype=np.float64) * len(curve) - 1e-9).astype(int) - 1
    return curve[np.maximum(rows, 0)]
