"""Prediction intervals of ensembles: exact quantiles of negative binomial mixtures for whole sections."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import scipy.special
from numpy.typing import ArrayLike

from stimage_sd._settings import n_threads

#: values per thread and step, so that their logarithms stay in the cache
_PART = 1 << 16


def mixture_interval(
    r: ArrayLike, p: ArrayLike, *, coverage: float = 0.9, weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the central interval of the mixture of the members' negative binomials.

    - `r`: number of successes, positive, (n_members, ...).
    - `p`: probability of success, in (0, 1]; same shape as `r`.
    - `coverage`: probability that the interval contains, in (0, 1).
    - `weights`: weight per member, (n_members,), at least 0, with sum 1. Equal by default.
    - returns: lower and upper bound, whole numbers in float32, of shape ``r.shape[1:]``. They are the smallest counts
      at which the distribution function of the mixture reaches ``(1 - coverage) / 2`` and ``(1 + coverage) / 2``. Both
      bounds belong to the interval. It contains at least `coverage`, because counts are discrete.

    The bounds are exact, in double precision. A compiled recurrence adds up the probabilities from zero, on threads.
    Where counts are so large that the recurrence underflows or takes long, the bounds come from bisection with the
    incomplete beta function, in the bracket given by Cantelli's inequality.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.intervals import mixture_interval
    >>> lower, upper = mixture_interval(np.array([[2.0], [5.0]]), np.array([[0.5], [0.5]]))
    >>> float(lower[0]), float(upper[0])
    (0.0, 9.0)
    """
    successes, probability = _float_array(r), _float_array(p)
    _check_members(successes, probability)
    share = _checked_weights(weights, successes.shape[0])
    if not 0 < coverage < 1:
        raise ValueError(f"Expected `coverage` to lie between 0 and 1, found {coverage}.")
    shape = successes.shape[1:]
    successes = successes.reshape(successes.shape[0], -1)
    probability = probability.reshape(successes.shape)
    tail = (1 - coverage) / 2
    bounds = np.empty((2, successes.shape[1]), dtype=np.float32)

    kernel = _interval_kernel()
    workers = min(8, n_threads())
    n_parts = max(8 * workers, -(-successes.size // _PART))
    edges = np.linspace(0, bounds.shape[1], n_parts + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        runs = [
            pool.submit(
                _part, kernel, successes[:, start:stop], probability[:, start:stop], share, tail, bounds[:, start:stop]
            )
            for start, stop in itertools.pairwise(edges)
        ]
        for run in runs:
            run.result()
    left_out = np.flatnonzero(np.isnan(bounds[1]))
    if left_out.size:
        members = successes[:, left_out].astype(np.float64), probability[:, left_out].astype(np.float64)
        bounds[0, left_out] = mixture_quantile(*members, share, tail)
        bounds[1, left_out] = mixture_quantile(*members, share, 1 - tail)
    return bounds[0].reshape(shape), bounds[1].reshape(shape)


def _part(
    kernel: Callable[..., None], r: np.ndarray, p: np.ndarray, share: np.ndarray, tail: float, bounds: np.ndarray
) -> None:
    """Write the bounds of some cells; numpy computes the probabilities of zero, with vectorized logarithms."""
    log_zero = np.log(p, dtype=np.float64)
    log_zero *= r
    kernel(r, p, log_zero, np.exp(log_zero), share, tail, bounds)


def _float_array(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    return np.ascontiguousarray(array, dtype=array.dtype if array.dtype == np.float32 else np.float64)


def _check_members(r: np.ndarray, p: np.ndarray) -> None:
    if r.ndim == 0 or r.shape != p.shape or r.shape[0] == 0:
        raise ValueError(
            f"Expected `r` and `p` of one shape (n_members, ...), found {r.shape} and {p.shape}. "
            "For a single model pass `r[None]` and `p[None]`."
        )
    # min and max of an array with NaN are NaN, which fails every comparison
    least, most = (0.5, 1.0) if r.size == 0 else (r.min(), p.max())
    if not (least > 0 and r.max(initial=0) < np.inf and p.min(initial=1) > 0 and most <= 1):
        raise ValueError(
            f"Expected finite `r` > 0 and `p` in (0, 1], found `r` from {r.min(initial=np.inf)} to "
            f"{r.max(initial=-np.inf)} and `p` from {p.min(initial=np.inf)} to {p.max(initial=-np.inf)}."
        )


def _checked_weights(weights: ArrayLike | None, n_members: int) -> np.ndarray:
    if weights is None:
        return np.full(n_members, 1.0 / n_members)
    share = np.asarray(weights, dtype=np.float64)
    if share.shape != (n_members,) or not (share >= 0).all() or abs(share.sum() - 1) > 1e-5:
        raise ValueError(f"Expected {n_members} `weights`, none negative, that sum to 1, found {share}.")
    return share / share.sum()


@cache
def _interval_kernel() -> Callable[..., None]:
    """Compile the recurrence on first use, because numba is slow to import and likelihoods do not need it."""
    import numba

    largest_count = 10_000
    smallest_log = -700.0

    # Python threads instead of numba's parallel loops: dask calls from several threads, which those do not allow.
    @numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
    def run(  # pragma: no cover
        r: Any, p: Any, log_zero: Any, zero: Any, share: Any, tail: float, bounds: Any
    ) -> None:
        n_members = r.shape[0]
        term, slope, offset = np.empty(n_members), np.empty(n_members), np.empty(n_members)
        low, high = tail, 1.0 - tail
        for cell in range(r.shape[1]):
            reachable: Any = True
            for member in range(n_members):
                reachable &= log_zero[member, cell] > smallest_log
                term[member] = share[member] * zero[member, cell]
                # P(k) = P(k - 1) (k + r - 1) q / k = P(k - 1) (slope + offset / k)
                slope[member] = 1.0 - np.float64(p[member, cell])
                offset[member] = (np.float64(r[member, cell]) - 1.0) * slope[member]
            total, count, lower = term.sum(), 0, 0
            while reachable and total < high:
                if total < low:
                    lower = count + 1
                count += 1
                inverse = 1.0 / count
                for member in range(n_members):
                    term[member] *= slope[member] + offset[member] * inverse
                total += term.sum()
                reachable = count < largest_count
            bounds[0, cell] = lower if reachable else np.nan
            bounds[1, cell] = count if reachable else np.nan

    return run


def mixture_quantile(r: np.ndarray, p: np.ndarray, share: np.ndarray, probability: float) -> np.ndarray:
    """Return the smallest counts at which the mixture's distribution function reaches a probability."""
    means = r * (1 - p) / p
    center = share @ means
    spread = np.sqrt(np.maximum(share @ (means / p + means**2) - center**2, 0))
    odds = np.sqrt(probability / (1 - probability))
    # Cantelli's inequality holds for any distribution.
    low = np.floor(np.maximum(center - spread / odds, 0)) - 1
    high = np.ceil(center + spread * odds)
    while np.any(high - low > 1):
        middle = np.floor((low + high) / 2)
        below = share @ scipy.special.betainc(r, middle + 1, p) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high
