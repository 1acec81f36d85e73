"""The negative binomial of counts: likelihood, moments, distribution function, intervals, floor.

NB(r, p) counts failures before `r` successes of probability `p`, as `scipy.stats.nbinom(r, p)` does;
`r` may be any positive number. The likelihoods are elementwise, unreduced JAX functions whose value and
gradient stay accurate in float32. The textbook form, a sum of log-gammas, is not: for a count of a
million its terms are near 1e7 while their sum is near 10. Two other forms are used instead:

- for ``r >= 1`` the saddle-point form of C. Loader ("Fast and accurate computation of binomial
  probabilities", 2000): Stirling errors and two non-negative deviances, nothing of which cancels;
- for ``r < 1`` the log-gamma ratio written out, where all remaining terms have one sign.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.special
from jax import Array
from jax.typing import ArrayLike

__all__ = [
    "MeanOnlyFit",
    "cdf",
    "fit_mean_only",
    "log_prob",
    "log_prob_from_logits",
    "log_prob_from_mean",
    "mean",
    "mixture_interval",
    "variance",
]

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)

# Chebyshev fits on u = 1/z in [0, 1] of delta(z)/u and w(z)/u^2 (see the two functions that use them),
# lowest order first; the largest relative error is 1e-9 and 1.1e-8, below float32's rounding.
_STIRLING_ERROR = (
    0.08333333339578258,
    -1.150781365532661e-08,
    -0.0027774458678570734,
    -3.314633842258169e-06,
    0.0008056161200513372,
    1.369064895441237e-05,
    -0.0008473984904036785,
    0.0008570552913439802,
    -0.00039366920006323944,
    7.361111474927509e-05,
)
_STIRLING_ERROR_SLOPE = (
    0.08333333414905988,
    -1.5860553612487152e-07,
    -0.00832836029959682,
    -5.78043398011306e-05,
    0.004276264367558689,
    -0.0006899833818314205,
    -0.004527921659703761,
    0.005375438966171571,
    -0.0027037875608366003,
    0.0005386440322955065,
)
# Below this |t| the series in t / (2 + t) is more accurate than log1p(t) - t.
_SERIES_LIMIT = 0.3
# Keeps means finite in float32, so that no branch that is not taken turns into NaN.
_LARGEST_MEAN = 1e30


class _Parts(NamedTuple):
    """One NB's parameters in every form the likelihood needs, each computed without cancellation."""

    r: Array
    log_r: Array
    mean: Array
    p: Array
    q: Array
    log_p: Array
    log_q: Array


def log_prob(x: ArrayLike, *, r: ArrayLike, p: ArrayLike) -> Array:
    """Log-probability of counts under NB(r, p), differentiable in `r` and `p`.

    Parameters
    ----------
    x
        Counts, any shape that broadcasts with `r` and `p`. Integers or floats.
    r
        Number of successes (inverse dispersion), positive.
    p
        Probability of success, in (0, 1].

    Returns
    -------
    Log-probabilities, elementwise; ``-inf`` where `x` is negative or not an integer, as in scipy.

    Notes
    -----
    Where `p` comes from a network, `log_prob_from_logits` is more accurate: ``1 - p`` has lost its
    digits once `p` is near one.

    Examples
    --------
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> round(float(nb.log_prob(3, r=2.0, p=0.5)), 4)
    -2.0794
    """
    counts, r, p = _floats(x, r, p)
    return jax.jit(_log_prob)(counts, r, p)


def log_prob_from_logits(x: ArrayLike, *, r_logits: ArrayLike, p_logits: ArrayLike) -> Array:
    """Log-probability of counts, from the two heads of the published network.

    ``r = softplus(r_logits)`` and ``p = sigmoid(p_logits)`` (paper, Eq. 2, 3 and 6). Value and gradient
    are finite and accurate in float32 for counts up to 1e6 and logits within -30 and 30.

    Parameters
    ----------
    x
        Counts, any shape that broadcasts with the logits. Integers or floats.
    r_logits
        The head for `r`, any real numbers.
    p_logits
        The head for `p`, any real numbers.

    Returns
    -------
    Log-probabilities, elementwise; ``-inf`` where `x` is negative or not an integer.

    Examples
    --------
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> round(float(nb.log_prob_from_logits(0, r_logits=0.0, p_logits=0.0)), 4)
    -0.4805
    """
    counts, r_logits, p_logits = _floats(x, r_logits, p_logits)
    return jax.jit(_log_prob_from_logits)(counts, r_logits, p_logits)


def log_prob_from_mean(x: ArrayLike, *, log_mean: ArrayLike, log_dispersion: ArrayLike) -> Array:
    """Log-probability of counts, from the mean and an inverse dispersion.

    ``r = exp(log_dispersion)`` and ``p = r / (r + mean)``: variance ``mean + mean**2 / r``. Stable from
    means of 1e-8 and up to `r` of 1e6, where the NB is a Poisson.

    Parameters
    ----------
    x
        Counts, any shape that broadcasts with the parameters. Integers or floats.
    log_mean
        Natural logarithm of the mean.
    log_dispersion
        Natural logarithm of the inverse dispersion `r`.

    Returns
    -------
    Log-probabilities, elementwise; ``-inf`` where `x` is negative or not an integer.

    Examples
    --------
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> round(float(nb.log_prob_from_mean(0, log_mean=0.0, log_dispersion=0.0)), 4)
    -0.6931
    """
    counts, log_mean, log_dispersion = _floats(x, log_mean, log_dispersion)
    return jax.jit(_log_prob_from_mean)(counts, log_mean, log_dispersion)


def mean(*, r: ArrayLike, p: ArrayLike) -> Array:
    """Mean of NB(r, p), ``r (1 - p) / p``.

    Parameters
    ----------
    r
        Number of successes, positive.
    p
        Probability of success, in (0, 1].

    Returns
    -------
    Means, elementwise.

    Examples
    --------
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> float(nb.mean(r=2.0, p=0.5))
    2.0
    """
    _, r, p = _floats(0, r, p)
    return r * (1 - p) / p


def variance(*, r: ArrayLike, p: ArrayLike) -> Array:
    """Variance of NB(r, p), ``r (1 - p) / p**2``.

    The paper's Eq. 5 prints it without the square on `p`; this is the NB's.

    Parameters
    ----------
    r
        Number of successes, positive.
    p
        Probability of success, in (0, 1].

    Returns
    -------
    Variances, elementwise.

    Examples
    --------
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> float(nb.variance(r=2.0, p=0.5))
    4.0
    """
    _, r, p = _floats(0, r, p)
    return r * (1 - p) / p / p


def cdf(x: ArrayLike, *, r: ArrayLike, p: ArrayLike) -> np.ndarray:
    """Probability of a count of at most `x` under NB(r, p): the regularised incomplete beta function.

    Parameters
    ----------
    x
        Counts; fractions are rounded down.
    r
        Number of successes, positive.
    p
        Probability of success, in (0, 1].

    Returns
    -------
    Probabilities, elementwise, float64.

    Notes
    -----
    Computed by scipy on the host in double precision, about 0.4 microseconds an element: JAX's
    incomplete beta is off by up to 0.4 in float32 where counts and `r` run to thousands. For quantiles
    over whole sections use `mixture_interval`.

    Examples
    --------
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> round(float(nb.cdf(1, r=2.0, p=0.5)), 4)
    0.5
    """
    counts, successes, probability = (np.asarray(values, dtype=np.float64) for values in (x, r, p))
    below = scipy.special.betainc(successes, np.floor(np.maximum(counts, 0)) + 1, probability)
    return np.where(counts < 0, 0.0, below)


class MeanOnlyFit(NamedTuple):
    """A negative binomial a gene with one mean for all spots: the floor a prediction has to beat.

    Attributes
    ----------
    mean
        Mean count a gene, at a size factor of one; float64 of shape (n_genes,).
    r
        Inverse dispersion a gene; float64 of shape (n_genes,).
    """

    mean: np.ndarray
    r: np.ndarray

    @property
    def p(self) -> np.ndarray:
        """Probability of success a gene, at a size factor of one; float64 of shape (n_genes,)."""
        return self.r / (self.r + self.mean)


def fit_mean_only(
    counts: np.ndarray | scipy.sparse.spmatrix | scipy.sparse.sparray,
    size_factors: np.ndarray | None = None,
) -> MeanOnlyFit:
    """Fit one negative binomial a gene, by maximum likelihood, all genes at once.

    Parameters
    ----------
    counts
        Raw counts, (n_obs, n_genes), dense or sparse.
    size_factors
        Relative depth of each spot, (n_obs,), positive: the mean of spot `i` is its size factor times
        the gene's mean. None: one for all.

    Returns
    -------
    The gene's mean, ``sum(counts) / sum(size_factors)``, and the inverse dispersion `r` of highest
    likelihood given that mean, within 1e-6 and 1e6. A gene no more variable than a Poisson gets the
    upper bound. (Without size factors this is the joint maximum; with them the mean is the Poisson's.)

    Raises
    ------
    ValueError
        Where counts are negative, fractional or not finite, or size factors do not fit them.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> fit = nb.fit_mean_only(np.array([[0, 2], [0, 2], [9, 2], [3, 2]]))
    >>> fit.mean.round(1).tolist(), fit.r.round(3).tolist()
    ([3.0, 2.0], [0.369, 1000000.0])
    """
    matrix = scipy.sparse.csc_array(counts, dtype=np.float64)
    n_obs, n_genes = matrix.shape
    _check_counts(matrix.data)
    if size_factors is None:
        factors = np.ones(n_obs)
    else:
        factors = np.asarray(size_factors, dtype=np.float64)
        if factors.shape != (n_obs,) or not np.all(factors > 0) or not np.all(np.isfinite(factors)):
            raise ValueError(
                f"Expected `size_factors` to be {n_obs} positive numbers, one a row of `counts`, "
                f"found shape {factors.shape} with minimum {factors.min(initial=np.inf)}."
            )
    expected = np.asarray(matrix.sum(axis=0)).ravel() / factors.sum()
    score = _dispersion_score(matrix, factors, expected)
    return MeanOnlyFit(expected, np.exp(_falling_root(score, np.log(1e-6), np.log(1e6), n_genes)))


def _check_counts(values: np.ndarray) -> None:
    wrong = ~((values >= 0) & (values == np.floor(values)) & np.isfinite(values))
    if wrong.any():
        raise ValueError(
            f"Expected raw counts (integers of zero or more), found {values[wrong][0]} among others. "
            "Pass the table's raw counts, not normalised or log-transformed values."
        )


def _dispersion_score(
    matrix: scipy.sparse.csc_array, factors: np.ndarray, expected: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the derivative of each gene's log-likelihood in ``log r``, as a function of ``log r``."""
    n_genes = matrix.shape[1]
    genes = np.repeat(np.arange(n_genes), np.diff(matrix.indptr))
    # Digammas depend on the count alone: once for every distinct count of a gene.
    n_values = int(matrix.data.max(initial=0)) + 1
    keys, repeats = np.unique(genes * n_values + matrix.data.astype(np.int64), return_counts=True)
    value_gene, value = np.divmod(keys, n_values)
    depths, n_depths = np.unique(factors, return_counts=True)
    sums = np.asarray(matrix.sum(axis=0)).ravel()

    def score(log_r: np.ndarray) -> np.ndarray:
        r = np.exp(log_r)
        digammas = scipy.special.digamma(value + r[value_gene]) - scipy.special.digamma(r)[value_gene]
        total = np.bincount(value_gene, weights=repeats * digammas, minlength=n_genes)
        ratio = expected / r
        for depth, number in zip(depths, n_depths, strict=True):
            total += number * (depth * ratio / (1 + depth * ratio) - np.log1p(depth * ratio))
        if len(depths) == 1:
            return r * (total - sums / (r + depths[0] * expected))
        observed = matrix.data / (r[genes] + factors[matrix.indices] * expected[genes])
        return r * (total - np.bincount(genes, weights=observed, minlength=n_genes))

    return score


def _falling_root(function: Callable[[np.ndarray], np.ndarray], low: float, high: float, size: int) -> np.ndarray:
    """Find where an elementwise function falls through zero; a bound where it does not."""
    left, right = np.full(size, low), np.full(size, high)
    at_left, at_right = function(left), function(right)
    never, always = at_left <= 0, at_right >= 0
    for step in range(100):
        if np.all((right - left < 1e-7) | never | always):
            break
        # False position is fast near the root, halving bounds the number of steps: take turns.
        middle = (left + right) / 2
        if step % 2:
            span = at_left - at_right
            guess = left + (right - left) * at_left / np.where(span > 0, span, 1)
            # Overstepping a little makes both ends close in.
            guess += np.where(guess < middle, 1, -1) * 0.01 * (right - left)
            middle = np.where((span > 0) & (guess > left) & (guess < right), guess, middle)
        value = function(middle)
        up = value > 0
        left, at_left = np.where(up, middle, left), np.where(up, value, at_left)
        right, at_right = np.where(up, right, middle), np.where(up, at_right, value)
    return np.where(never, low, np.where(always, high, (left + right) / 2))


def mixture_interval(r: ArrayLike, p: ArrayLike, *, coverage: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Central interval of the equal-weight mixture of the members' negative binomials.

    Parameters
    ----------
    r
        Number of successes, positive; members along the first axis, (n_members, ...).
    p
        Probability of success, in (0, 1]; same shape as `r`.
    coverage
        Probability the interval should hold, in (0, 1).

    Returns
    -------
    Lower and upper bound, float32 of whole numbers, of shape ``r.shape[1:]``: the smallest counts at
    which the mixture's distribution function reaches ``(1 - coverage) / 2`` and one minus that. Both
    bounds belong to the interval, which for counts holds at least `coverage`.

    Raises
    ------
    ValueError
        Where shapes differ, `r` is not positive, or `p` or `coverage` is out of range.

    Notes
    -----
    Exact: in double precision, by the recurrence of the probabilities from zero upwards, compiled and
    run in threads; where counts are so large that this takes long or underflows, by halving the
    bracket that Cantelli's inequality gives, with the incomplete beta function.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> lower, upper = nb.mixture_interval(np.array([[2.0], [5.0]]), np.array([[0.5], [0.5]]))
    >>> float(lower[0]), float(upper[0])
    (0.0, 9.0)
    """
    successes, probability = _float_array(r), _float_array(p)
    _check_members(successes, probability)
    if not 0 < coverage < 1:
        raise ValueError(f"Expected `coverage` to lie between 0 and 1, found {coverage}.")
    shape = successes.shape[1:]
    successes = successes.reshape(successes.shape[0], -1)
    probability = probability.reshape(successes.shape)
    tail = (1 - coverage) / 2
    bounds = np.empty((2, successes.shape[1]), dtype=np.float32)

    kernel = _interval_kernel()
    n_threads = min(8, os.cpu_count() or 1)
    edges = np.linspace(0, bounds.shape[1], 8 * n_threads + 1).astype(int)
    with ThreadPoolExecutor(n_threads) as pool:
        runs = [
            pool.submit(kernel, successes, probability, tail, bounds, start, stop)
            for start, stop in itertools.pairwise(edges)
        ]
        for run in runs:
            run.result()
    left_out = np.flatnonzero(np.isnan(bounds[1]))
    if left_out.size:
        members = successes[:, left_out].astype(np.float64), probability[:, left_out].astype(np.float64)
        bounds[0, left_out] = _mixture_quantile(*members, tail)
        bounds[1, left_out] = _mixture_quantile(*members, 1 - tail)
    return bounds[0].reshape(shape), bounds[1].reshape(shape)


def _float_array(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    return np.ascontiguousarray(array, dtype=array.dtype if array.dtype == np.float32 else np.float64)


def _check_members(r: np.ndarray, p: np.ndarray) -> None:
    if r.ndim == 0 or r.shape != p.shape or r.shape[0] == 0:
        raise ValueError(
            f"Expected `r` and `p` of one shape (n_members, ...), found {r.shape} and {p.shape}. "
            "For a single model pass `r[None]` and `p[None]`."
        )
    # `not all(valid)` rather than `any(invalid)`: NaN has to be caught too.
    if not (np.all(r > 0) and np.all(np.isfinite(r)) and np.all((p > 0) & (p <= 1))):
        raise ValueError(
            f"Expected finite `r` > 0 and `p` in (0, 1], found `r` from {r.min(initial=np.inf)} to "
            f"{r.max(initial=-np.inf)} and `p` from {p.min(initial=np.inf)} to {p.max(initial=-np.inf)}."
        )


@cache
def _interval_kernel() -> Callable[..., None]:
    """Compile the recurrence on first use; numba is slow to import and not needed for likelihoods."""
    import numba

    largest_count = 10_000
    smallest_log = -700.0

    # Threads of our own instead of numba's parallel loops: those may not be entered from two threads,
    # which is what dask does.
    @numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
    def run(r: Any, p: Any, tail: float, bounds: Any, start: int, stop: int) -> None:  # pragma: no cover
        n_members = r.shape[0]
        term, slope, offset = np.empty(n_members), np.empty(n_members), np.empty(n_members)
        low, high = tail * n_members, (1.0 - tail) * n_members
        for cell in range(start, stop):
            reachable: Any = True
            for member in range(n_members):
                successes, success = np.float64(r[member, cell]), np.float64(p[member, cell])
                log_zero = successes * math.log(success)
                reachable &= log_zero > smallest_log
                term[member] = math.exp(log_zero)
                # P(k) = P(k - 1) (k + r - 1) q / k = P(k - 1) (slope + offset / k)
                slope[member] = 1.0 - success
                offset[member] = (successes - 1.0) * (1.0 - success)
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


def _mixture_quantile(r: np.ndarray, p: np.ndarray, probability: float) -> np.ndarray:
    """Smallest counts at which the mixture's distribution function reaches a probability."""
    means = r * (1 - p) / p
    center = means.mean(axis=0)
    spread = np.sqrt((means / p + means**2).mean(axis=0) - center**2)
    odds = np.sqrt(probability / (1 - probability))
    # Cantelli's inequality, for whatever distribution.
    low = np.floor(np.maximum(center - spread / odds, 0)) - 1
    high = np.ceil(center + spread * odds)
    while np.any(high - low > 1):
        middle = np.floor((low + high) / 2)
        below = scipy.special.betainc(r, middle + 1, p).mean(axis=0) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high


def _floats(x: ArrayLike, first: ArrayLike, second: ArrayLike) -> tuple[Array, Array, Array]:
    """Bring counts and parameters to the parameters' floating type, at least float32."""
    dtype = jnp.result_type(first, second)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        dtype = jnp.result_type(float) if not jnp.issubdtype(dtype, jnp.floating) else jnp.dtype("float32")
    return jnp.asarray(x).astype(dtype), jnp.asarray(first).astype(dtype), jnp.asarray(second).astype(dtype)


@jax.custom_jvp
def _log_prob(x: Array, r: Array, p: Array) -> Array:
    return _value(x, _parts_from_probability(r, p))


@_log_prob.defjvp
def _log_prob_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x, r, p = primals
    parts = _parts_from_probability(r, p)
    slope_p = (parts.r * parts.q - x * parts.p) / (parts.p * parts.q)
    change = _slope_log_r(x, parts) / r * tangents[1] + slope_p * tangents[2]
    return _value(x, parts), change


@jax.custom_jvp
def _log_prob_from_logits(x: Array, r_logits: Array, p_logits: Array) -> Array:
    return _value(x, _parts_from_logits(r_logits, p_logits))


@_log_prob_from_logits.defjvp
def _log_prob_from_logits_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x, r_logits, p_logits = primals
    parts = _parts_from_logits(r_logits, p_logits)
    # d log r / d r_logits = sigmoid / softplus, which is 0 / 0 far below zero.
    low = r_logits < -10
    ratio = jnp.where(low, 1 - 0.5 * jnp.exp(r_logits), jax.nn.sigmoid(r_logits) / jnp.where(low, 1, parts.r))
    slope_p = parts.r * parts.q - x * parts.p
    change = _slope_log_r(x, parts) * ratio * tangents[1] + slope_p * tangents[2]
    return _value(x, parts), change


@jax.custom_jvp
def _log_prob_from_mean(x: Array, log_mean: Array, log_dispersion: Array) -> Array:
    return _value(x, _parts_from_mean(log_mean, log_dispersion))


@_log_prob_from_mean.defjvp
def _log_prob_from_mean_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    x, log_mean, log_dispersion = primals
    parts = _parts_from_mean(log_mean, log_dispersion)
    slope_mean = x * parts.p - parts.r * parts.q
    change = slope_mean * tangents[1] + _slope_log_r(x, parts, fixed_mean=True) * tangents[2]
    return _value(x, parts), change


def _parts_from_probability(r: Array, p: Array) -> _Parts:
    q = 1 - p
    return _Parts(r, jnp.log(r), _bounded(r * q / p), p, q, jnp.log(p), jnp.log1p(-p))


def _parts_from_logits(r_logits: Array, p_logits: Array) -> _Parts:
    r = jax.nn.softplus(r_logits)
    low = r_logits < -10
    log_r = jnp.where(low, r_logits - 0.5 * jnp.exp(r_logits), jnp.log(jnp.where(low, 1, r)))
    return _Parts(
        r,
        log_r,
        _bounded(r * jnp.exp(-p_logits)),
        jax.nn.sigmoid(p_logits),
        jax.nn.sigmoid(-p_logits),
        jax.nn.log_sigmoid(p_logits),
        jax.nn.log_sigmoid(-p_logits),
    )


def _parts_from_mean(log_mean: Array, log_dispersion: Array) -> _Parts:
    r = jnp.exp(log_dispersion)
    expected = jnp.exp(log_mean)
    p_logits = log_dispersion - log_mean
    # The ratio keeps the digits that the difference of two logarithms of size ten has lost.
    ratio = jnp.exp(log_mean) / r
    log_p = jnp.where(ratio < 1, -jnp.log1p(ratio), jax.nn.log_sigmoid(p_logits))
    log_q = jax.nn.log_sigmoid(-p_logits)
    total = r + expected
    return _Parts(r, log_dispersion, _bounded(expected), r / total, expected / total, log_p, log_q)


def _bounded(expected: Array) -> Array:
    return jnp.clip(expected, 1 / _LARGEST_MEAN, _LARGEST_MEAN)


def _value(x: Array, parts: _Parts) -> Array:
    """Log-probability by the form that suits `r`; both are written for ``x >= 1``."""
    r, log_r, expected, p, q, log_p, log_q = parts
    small = r < 1
    count = jnp.maximum(x, 1)
    total = count + r
    # One set of three Stirling errors serves both forms.
    total_error = _stirling_error(total)
    count_error = _stirling_error(jnp.where(small, count + 1, count))
    r_error = _stirling_error(jnp.where(small, 1 + r, r))

    r_small = jnp.minimum(r, 1)
    step = (r_small - 1) / (count + 1)
    log_gamma_ratio = (r_small - 1) * jnp.log1p(count) + (count + 1) * _deviance(step)
    log_gamma_ratio += -0.5 * jnp.log1p(step) + total_error - count_error
    log_gamma_r = (r_small + 0.5) * jnp.log1p(r_small) - (1 + r_small) + _HALF_LOG_TWO_PI + r_error
    direct = log_r + log_gamma_ratio - log_gamma_r + r_small * log_p + count * log_q

    r_large = jnp.maximum(r, 1)
    # r and x against their expectations total * p and total * q, as relative differences.
    r_excess = (expected - count) / total
    count_excess = r_large * (count - expected) / (total * expected)
    log_total = jnp.log(total)
    # Past 1e6 the relative difference has outgrown what `expected` can hold; logarithms have not.
    far_r = r_large * (log_r - log_total - log_p - 1) + total * p
    far_count = count * (jnp.log(count) - log_total - log_q - 1) + total * q
    r_deviance = jnp.where(r_excess > 1e6, far_r, total * p * _deviance(r_excess))
    count_deviance = jnp.where(count_excess > 1e6, far_count, total * q * _deviance(count_excess))
    saddle = total_error - count_error - r_error - _HALF_LOG_TWO_PI - r_deviance - count_deviance
    saddle += -0.5 * (jnp.log(count) + jnp.log1p(count / r_large))

    positive = jnp.where(small, direct, saddle)
    valid = (x >= 0) & (x == jnp.floor(x))
    return jnp.where(valid, jnp.where(x == 0, r * log_p, positive), -jnp.inf)


def _slope_log_r(x: Array, parts: _Parts, *, fixed_mean: bool = False) -> Array:
    """Differentiate the log-probability in ``log r``, at fixed `p` or at fixed mean."""
    r, log_r, expected, p, q, log_p, _ = parts
    small = r < 1
    count = jnp.maximum(x, 0)
    total = count + r
    total_slope = _stirling_error_slope(jnp.maximum(total, 1))
    r_slope = _stirling_error_slope(jnp.where(small, 1 + r, r))
    # Equal at a count of zero, but fused arithmetic may round the two apart.
    slope_change = jnp.where(count == 0, 0.0, r_slope - total_slope)

    r_small = jnp.minimum(r, 1)
    above_one = jnp.maximum(total, 1)
    digammas = jnp.log(above_one / (1 + r_small)) - 0.5 / above_one + 0.5 / (1 + r_small)
    digammas += slope_change
    direct = jnp.where(count == 0, 0.0, 1 + r_small * digammas) + r_small * log_p
    # At a fixed mean p moves with r: d p_logit / d log r = 1.
    if fixed_mean:
        direct += r_small * q - count * p

    r_large = jnp.maximum(r, 1)
    excess = (count - expected) / (r_large + expected)
    far = jnp.log(total) - log_r + log_p
    near = jnp.maximum(excess, -0.5)
    logarithm = jnp.log1p(near)
    if fixed_mean:
        far -= excess
        logarithm = _log1p_minus(near)
    saddle = r_large * (jnp.where(excess < -0.5, far, logarithm) + slope_change)
    saddle += 0.5 * count / total
    return jnp.where(small, direct, saddle)


def _polynomial(coefficients: tuple[float, ...], u: Array) -> Array:
    total = jnp.full_like(u, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * u + coefficient
    return total


def _stirling_error(z: Array) -> Array:
    """Return what Stirling's formula misses: ``lgamma(z) - (z - 1/2) log z + z - log(2 pi) / 2``, z >= 1."""
    u = 1 / z
    return u * _polynomial(_STIRLING_ERROR, u)


def _stirling_error_slope(z: Array) -> Array:
    """Minus the derivative of `_stirling_error`: ``log z - 1 / (2 z) - digamma(z)``, z >= 1."""
    u = 1 / z
    return u * u * _polynomial(_STIRLING_ERROR_SLOPE, u)


def _atanh_tail(v: Array) -> Array:
    """``2 (atanh(v) - v)`` for small `v`."""
    square = v * v
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square / 11)))
    return 2 * v * square * series


def _deviance(t: Array) -> Array:
    """``(1 + t) log(1 + t) - t`` for t > -1, without cancellation near zero."""
    near = jnp.clip(t, -_SERIES_LIMIT, _SERIES_LIMIT)
    v = near / (2 + near)
    # A count a million times below its mean leaves 1 + t without digits; the limit there is one.
    away = jnp.maximum(t, -1 + 1e-7)
    direct = (1 + away) * jnp.log1p(away) - away
    return jnp.where(jnp.abs(t) < _SERIES_LIMIT, near * v + (1 + near) * _atanh_tail(v), direct)


def _log1p_minus(t: Array) -> Array:
    """``log(1 + t) - t`` without cancellation near zero."""
    near = jnp.clip(t, -_SERIES_LIMIT, _SERIES_LIMIT)
    v = near / (2 + near)
    return jnp.where(jnp.abs(t) < _SERIES_LIMIT, _atanh_tail(v) - near * v, jnp.log1p(t) - t)
