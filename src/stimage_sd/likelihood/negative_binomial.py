"""Negative binomial counts: likelihood, moments and distribution function.

NB(r, p) counts failures before `r` successes of probability `p`, as `scipy.stats.nbinom(r, p)` does. `r` may be any
positive number. The likelihoods are elementwise JAX functions. Value and gradient stay accurate in float32. The
textbook sum of log-gammas does not: for a count of a million its terms are near 1e7 and their sum is near 10. Two other
forms are used instead:

- For ``r >= 1``, the saddle-point form of C. Loader ("Fast and accurate computation of binomial probabilities", 2000),
  with Stirling errors and two non-negative deviances that do not cancel.
- For ``r < 1``, the log-gamma ratio written out so that all remaining terms have one sign.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.special
from jax import Array
from jax.typing import ArrayLike

from stimage_sd.likelihood.stirling import HALF_LOG_TWO_PI, stirling_error, stirling_error_slope

__all__ = [
    "cdf",
    "log_prob",
    "log_prob_from_logits",
    "log_prob_from_mean",
    "mean",
    "variance",
]

# For |t| below this limit the series in t / (2 + t) is more accurate than log1p(t) - t.
_SERIES_LIMIT = 0.3
# Keeps means finite in float32, so that an unused branch does not produce NaN.
_LARGEST_MEAN = 1e30


class _Parts(NamedTuple):
    """Parameters of a negative binomial in all forms that the likelihood needs, computed without cancellation."""

    r: Array
    log_r: Array
    mean: Array
    p: Array
    q: Array
    log_p: Array
    log_q: Array


def log_prob(x: ArrayLike, *, r: ArrayLike, p: ArrayLike) -> Array:
    """Compute the log-probability of counts under NB(r, p), differentiable in `r` and `p`.

    Parameters
    ----------
    x
        Counts, integers or floats, of any shape that broadcasts with `r` and `p`.
    r
        Number of successes (inverse dispersion), positive.
    p
        Probability of success, in (0, 1].

    Returns
    -------
    Log-probabilities, elementwise. They are ``-inf`` where `x` is negative or not an integer, as in scipy.

    Notes
    -----
    If `p` comes from a network, `log_prob_from_logits` is more accurate, because ``1 - p`` loses digits for `p` near 1.

    Examples
    --------
    >>> from stimage_sd.likelihood import negative_binomial as nb
    >>> round(float(nb.log_prob(3, r=2.0, p=0.5)), 4)
    -2.0794
    """
    counts, r, p = _floats(x, r, p)
    return jax.jit(_log_prob)(counts, r, p)


def log_prob_from_logits(x: ArrayLike, *, r_logits: ArrayLike, p_logits: ArrayLike) -> Array:
    """Compute the log-probability of counts from the two heads of the published network.

    ``r = softplus(r_logits)`` and ``p = sigmoid(p_logits)`` (paper, Eq. 2, 3 and 6). Value and gradient
    are finite and accurate in float32 for counts up to 1e6 and logits within -30 and 30.

    Parameters
    ----------
    x
        Counts, integers or floats, of any shape that broadcasts with the logits.
    r_logits
        Output of the head for `r`, any real numbers.
    p_logits
        Output of the head for `p`, any real numbers.

    Returns
    -------
    Log-probabilities, elementwise. They are ``-inf`` where `x` is negative or not an integer.

    Examples
    --------
    >>> from stimage_sd.likelihood import negative_binomial as nb
    >>> round(float(nb.log_prob_from_logits(0, r_logits=0.0, p_logits=0.0)), 4)
    -0.4805
    """
    counts, r_logits, p_logits = _floats(x, r_logits, p_logits)
    return jax.jit(_log_prob_from_logits)(counts, r_logits, p_logits)


def log_prob_from_mean(x: ArrayLike, *, log_mean: ArrayLike, log_dispersion: ArrayLike) -> Array:
    """Compute the log-probability of counts from the mean and an inverse dispersion.

    ``r = exp(log_dispersion)`` and ``p = r / (r + mean)``, so the variance is ``mean + mean**2 / r``. Stable for means
    down to 1e-8 and for `r` up to 1e6, where the negative binomial is a Poisson.

    Parameters
    ----------
    x
        Counts, integers or floats, of any shape that broadcasts with the parameters.
    log_mean
        Natural logarithm of the mean.
    log_dispersion
        Natural logarithm of the inverse dispersion `r`.

    Returns
    -------
    Log-probabilities, elementwise. They are ``-inf`` where `x` is negative or not an integer.

    Examples
    --------
    >>> from stimage_sd.likelihood import negative_binomial as nb
    >>> round(float(nb.log_prob_from_mean(0, log_mean=0.0, log_dispersion=0.0)), 4)
    -0.6931
    """
    counts, log_mean, log_dispersion = _floats(x, log_mean, log_dispersion)
    return jax.jit(_log_prob_from_mean)(counts, log_mean, log_dispersion)


def mean(*, r: ArrayLike, p: ArrayLike) -> Array:
    """Return the mean of NB(r, p), ``r (1 - p) / p``.

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
    >>> from stimage_sd.likelihood import negative_binomial as nb
    >>> float(nb.mean(r=2.0, p=0.5))
    2.0
    """
    _, r, p = _floats(0, r, p)
    return r * (1 - p) / p


def variance(*, r: ArrayLike, p: ArrayLike) -> Array:
    """Return the variance of NB(r, p), ``r (1 - p) / p**2``.

    Equation 5 of the paper lacks the square on `p`.

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
    >>> from stimage_sd.likelihood import negative_binomial as nb
    >>> float(nb.variance(r=2.0, p=0.5))
    4.0
    """
    _, r, p = _floats(0, r, p)
    return r * (1 - p) / p / p


def cdf(x: ArrayLike, *, r: ArrayLike, p: ArrayLike) -> np.ndarray:
    """Compute the probability of a count of at most `x` under NB(r, p).

    Parameters
    ----------
    x
        Counts. Fractions are rounded down.
    r
        Number of successes, positive.
    p
        Probability of success, in (0, 1].

    Returns
    -------
    Probabilities, elementwise, float64.

    Notes
    -----
    This is the regularized incomplete beta function. scipy computes it on the host in double precision, at about
    0.4 microseconds per element. The JAX version is off by up to 0.4 in float32 where counts and `r` are in the
    thousands. For quantiles over whole sections use `stimage_sd.likelihood.intervals.mixture_interval`.

    Examples
    --------
    >>> from stimage_sd.likelihood import negative_binomial as nb
    >>> round(float(nb.cdf(1, r=2.0, p=0.5)), 4)
    0.5
    """
    counts, successes, probability = (np.asarray(values, dtype=np.float64) for values in (x, r, p))
    below = scipy.special.betainc(successes, np.floor(np.maximum(counts, 0)) + 1, probability)
    return np.where(counts < 0, 0.0, below)


def _floats(x: ArrayLike, first: ArrayLike, second: ArrayLike) -> tuple[Array, Array, Array]:
    """Cast counts and parameters to the floating type of the parameters, at least float32."""
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
    # d log r / d r_logits = sigmoid / softplus, which becomes 0 / 0 for very negative logits.
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
    # The ratio keeps digits that the difference of two logarithms near ten loses.
    ratio = jnp.exp(log_mean) / r
    log_p = jnp.where(ratio < 1, -jnp.log1p(ratio), jax.nn.log_sigmoid(p_logits))
    log_q = jax.nn.log_sigmoid(-p_logits)
    total = r + expected
    return _Parts(r, log_dispersion, _bounded(expected), r / total, expected / total, log_p, log_q)


def _bounded(expected: Array) -> Array:
    return jnp.clip(expected, 1 / _LARGEST_MEAN, _LARGEST_MEAN)


def _value(x: Array, parts: _Parts) -> Array:
    """Compute the log-probability by the form that suits `r`; both forms are written for ``x >= 1``."""
    r, log_r, expected, p, q, log_p, log_q = parts
    small = r < 1
    count = jnp.maximum(x, 1)
    total = count + r
    # Both forms share one set of three Stirling errors.
    total_error = stirling_error(total)
    count_error = stirling_error(jnp.where(small, count + 1, count))
    r_error = stirling_error(jnp.where(small, 1 + r, r))

    r_small = jnp.minimum(r, 1)
    step = (r_small - 1) / (count + 1)
    log_gamma_ratio = (r_small - 1) * jnp.log1p(count) + (count + 1) * _deviance(step)
    log_gamma_ratio += -0.5 * jnp.log1p(step) + total_error - count_error
    log_gamma_r = (r_small + 0.5) * jnp.log1p(r_small) - (1 + r_small) + HALF_LOG_TWO_PI + r_error
    direct = log_r + log_gamma_ratio - log_gamma_r + r_small * log_p + count * log_q

    r_large = jnp.maximum(r, 1)
    # Relative differences of r and x from their expectations total * p and total * q.
    r_excess = (expected - count) / total
    count_excess = r_large * (count - expected) / (total * expected)
    log_total = jnp.log(total)
    # Above 1e6 the relative difference exceeds the precision of `expected`, so logarithms are used.
    far_r = r_large * (log_r - log_total - log_p - 1) + total * p
    far_count = count * (jnp.log(count) - log_total - log_q - 1) + total * q
    r_deviance = jnp.where(r_excess > 1e6, far_r, total * p * _deviance(r_excess))
    count_deviance = jnp.where(count_excess > 1e6, far_count, total * q * _deviance(count_excess))
    saddle = total_error - count_error - r_error - HALF_LOG_TWO_PI - r_deviance - count_deviance
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
    total_slope = stirling_error_slope(jnp.maximum(total, 1))
    r_slope = stirling_error_slope(jnp.where(small, 1 + r, r))
    # The two slopes are equal at a count of zero, but fused arithmetic may round them differently.
    slope_change = jnp.where(count == 0, 0.0, r_slope - total_slope)

    r_small = jnp.minimum(r, 1)
    above_one = jnp.maximum(total, 1)
    digammas = jnp.log(above_one / (1 + r_small)) - 0.5 / above_one + 0.5 / (1 + r_small)
    digammas += slope_change
    direct = jnp.where(count == 0, 0.0, 1 + r_small * digammas) + r_small * log_p
    # At a fixed mean p changes with r: d p_logit / d log r = 1.
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


def _atanh_tail(v: Array) -> Array:
    """Return ``2 (atanh(v) - v)`` for small `v`."""
    square = v * v
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square / 11)))
    return 2 * v * square * series


def _deviance(t: Array) -> Array:
    """Return ``(1 + t) log(1 + t) - t`` for t > -1, without cancellation near zero."""
    near = jnp.clip(t, -_SERIES_LIMIT, _SERIES_LIMIT)
    v = near / (2 + near)
    # For a count a million times below its mean, 1 + t has no digits left; the limit there is 1.
    away = jnp.maximum(t, -1 + 1e-7)
    direct = (1 + away) * jnp.log1p(away) - away
    return jnp.where(jnp.abs(t) < _SERIES_LIMIT, near * v + (1 + near) * _atanh_tail(v), direct)


def _log1p_minus(t: Array) -> Array:
    """Return ``log(1 + t) - t`` without cancellation near zero."""
    near = jnp.clip(t, -_SERIES_LIMIT, _SERIES_LIMIT)
    v = near / (2 + near)
    return jnp.where(jnp.abs(t) < _SERIES_LIMIT, _atanh_tail(v) - near * v, jnp.log1p(t) - t)
