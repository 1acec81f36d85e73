"""The negative binomial of counts: likelihood, moments, distribution function.

NB(r, p) counts failures before `r` successes of probability `p`, as `scipy.stats.nbinom(r, p)` does;
`r` may be any positive number. The likelihoods are elementwise, unreduced JAX functions whose value and
gradient stay accurate in float32. The textbook form, a sum of log-gammas, is not: for a count of a
million its terms are near 1e7 while their sum is near 10. Two other forms are used instead:

- for ``r >= 1`` the saddle-point form of C. Loader ("Fast and accurate computation of binomial
  probabilities", 2000): Stirling errors and two non-negative deviances, nothing of which cancels;
- for ``r < 1`` the log-gamma ratio written out, where all remaining terms have one sign.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.special
from jax import Array
from jax.typing import ArrayLike

__all__ = [
    "cdf",
    "log_prob",
    "log_prob_from_logits",
    "log_prob_from_mean",
    "mean",
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
    over whole sections use `stimage_sd.nn.intervals.mixture_interval`.

    Examples
    --------
    >>> from stimage_sd.nn import negative_binomial as nb
    >>> round(float(nb.cdf(1, r=2.0, p=0.5)), 4)
    0.5
    """
    counts, successes, probability = (np.asarray(values, dtype=np.float64) for values in (x, r, p))
    below = scipy.special.betainc(successes, np.floor(np.maximum(counts, 0)) + 1, probability)
    return np.where(counts < 0, 0.0, below)


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
