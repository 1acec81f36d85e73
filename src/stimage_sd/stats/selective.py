"""Selective prediction: error of the predictions that remain after dropping the most uncertain ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class RiskCoverage(NamedTuple):
    """Risk–coverage curve of a set of predictions.

    - `coverage`: ``float64 (n,)``: share of predictions kept, 1/n to 1.
    - `risk`: ``float64 (n,)``: mean error of the kept predictions, which are the least uncertain ones.
    - `oracle`: ``float64 (n,)``: mean error if the predictions of least error are kept. No uncertainty does better.
    - `random`: mean error of all predictions, the expectation for any share kept at random.
    - `aurc`: mean of `risk` over the curve (area under the curve). A useful uncertainty puts it between the mean of
      `oracle` and `random`.
    """

    coverage: np.ndarray
    risk: np.ndarray
    oracle: np.ndarray
    random: float
    aurc: float


def risk_coverage(error: ArrayLike, uncertainty: ArrayLike) -> RiskCoverage:
    """Sort predictions by uncertainty and average the error of the kept predictions.

    - `error`: error of each prediction, ``(n,)``.
    - `uncertainty`: uncertainty of each prediction, ``(n,)``. Only the order matters.
    - returns: the curve.

    Source: Geifman and El-Yaniv 2017, "Selective classification for deep neural networks". Predictions of equal
    uncertainty each get their mean error, so the order of the input does not matter.

    >>> from stimage_sd.stats.selective import risk_coverage
    >>> risk_coverage([1.0, 3.0, 2.0], [0.1, 0.9, 0.5]).risk.tolist()
    [1.0, 1.5, 2.0]
    """
    errors, uncertainties = np.asarray(error, dtype=np.float64), np.asarray(uncertainty, dtype=np.float64)
    if errors.ndim != 1 or errors.shape != uncertainties.shape or errors.size == 0:
        raise ValueError(
            f"Expected `error` and `uncertainty` of one length, found {errors.shape} and {uncertainties.shape}."
        )
    if not (np.isfinite(errors).all() and np.isfinite(uncertainties).all()):
        raise ValueError("Expected finite `error` and `uncertainty`, found NaN or infinity.")
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
    """Compute error and uncertainty of predicted counts on a log scale, where neither grows with the mean.

    - `counts`, `mean`, `variance`: observed counts, predicted mean and predicted variance, of one shape.
    - returns: absolute error of log(1 + mean), and first-order variance of log(1 + count), which is variance / (1 +
      mean)².

    >>> from stimage_sd.stats.selective import log_scale
    >>> error, uncertainty = log_scale([3.0], [1.0], [2.0])
    >>> round(float(error[0]), 3), float(uncertainty[0])
    (0.693, 0.5)
    """
    means = np.asarray(mean, dtype=np.float64)
    error = np.abs(np.log1p(np.asarray(counts, dtype=np.float64)) - np.log1p(means))
    return error, np.asarray(variance, dtype=np.float64) / (1 + means) ** 2


def kept(curve: np.ndarray, shares: ArrayLike) -> np.ndarray:
    """Return the values of a curve over 1 to n predictions at given shares, rounded up.

    - `curve`: ``(n,)``, such as `RiskCoverage.risk`.
    - `shares`: shares of the predictions, above 0 and at most 1.
    - returns: values of the curve, of the shape of `shares`.

    >>> import numpy as np
    >>> from stimage_sd.stats.selective import kept
    >>> kept(np.array([1.0, 2.0, 3.0, 4.0]), [0.5, 0.6, 1.0]).tolist()
    [2.0, 3.0, 4.0]
    """
    # rounding may put a product such as 0.1 * 30 slightly above the whole number
    rows = np.ceil(np.asarray(shares, dtype=np.float64) * len(curve) - 1e-9).astype(int) - 1
    return curve[np.maximum(rows, 0)]
