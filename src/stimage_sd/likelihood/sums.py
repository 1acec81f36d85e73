"""Negative binomial log-likelihoods summed over genes, several times faster for training.

`stimage_sd.likelihood.negative_binomial` is accurate to a few roundings for any count and parameter. Training adds up
thousands of terms per step and needs both gradients beside the sum. Absolute errors of 1e-5 are far below the noise of
a minibatch. This module uses plain formulas without branches, which the compiler vectorizes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from stimage_sd.likelihood.stirling import HALF_LOG_TWO_PI, stirling_error

#: limits of the logits of r and p, within which float32 distinguishes r from 0, and p from 0 and 1
R_LOGITS, P_LOGITS = (-15.0, 100.0), (-15.0, 15.0)
#: Chebyshev fit of log(1 + e) / e on [0, 1], lowest order first; the largest relative error is float32 rounding
_LOG1P = (
    0.9999999953848531,
    -0.4999990399276364,
    0.333300040352106,
    -0.24954558870954296,
    0.19678117255651126,
    -0.15311863100131068,
    0.10614264683477254,
    -0.057064200725614994,
    0.019907160906681445,
    -0.0032563784685382346,
)


@jax.custom_vjp
def summed_log_prob(counts: Array, r_logits: Array, p_logits: Array, size_factors: Array) -> Array:
    """Compute the log-probability of counts summed over genes, differentiable in the logits.

    - `counts`: whole numbers from 0, ``float32 (n_tiles, n_genes)``.
    - `r_logits`, `p_logits`: ``float32 (n_members, n_tiles, n_genes)``, clipped to `R_LOGITS` and `P_LOGITS`.
    - `size_factors`: size factor per tile, ``float32 (n_tiles,)``. It multiplies the odds ``(1 - p) / p`` and therefore
      the mean (`stimage_sd.likelihood.depth`).
    - returns: ``float32 (n_members, n_tiles)``. The term t of a gene has an error of at most ``1e-5 + 1e-6 * (counts +
      r + abs(t))``.

    >>> import jax.numpy as jnp
    >>> from stimage_sd.likelihood.sums import summed_log_prob
    >>> logits = jnp.zeros((1, 1, 2))
    >>> round(float(summed_log_prob(jnp.zeros((1, 2)), logits, logits, jnp.ones(1))[0, 0]), 4)
    -0.9609
    """
    r, log_p, log_q = _terms(r_logits, p_logits, size_factors)
    return _sum(counts, r, log_p, log_q)


def _forward(counts: Array, r_logits: Array, p_logits: Array, size_factors: Array) -> tuple[Array, tuple[Array, Array]]:
    r, log_p, log_q = _terms(r_logits, p_logits, size_factors)
    p = jax.nn.sigmoid(p_logits - jnp.log(size_factors)[:, None])
    slope_r = _digamma_change(counts, r) + log_p
    within_r = (r_logits > R_LOGITS[0]) & (r_logits < R_LOGITS[1])
    within_p = (p_logits > P_LOGITS[0]) & (p_logits < P_LOGITS[1])
    slopes = (
        jnp.where(within_r, slope_r * jax.nn.sigmoid(r_logits), 0.0),
        jnp.where(within_p, r - (r + counts) * p, 0.0),
    )
    return _sum(counts, r, log_p, log_q), slopes


def _backward(slopes: tuple[Array, Array], change: Array) -> tuple[None, Array, Array, None]:
    return None, change[..., None] * slopes[0], change[..., None] * slopes[1], None


summed_log_prob.defvjp(_forward, _backward)


@jax.custom_vjp
def summed_log_prob_of_r(counts: Array, r: Array, p_logits: Array, size_factors: Array) -> Array:
    """Compute what `summed_log_prob` computes, from r itself: r of a spot is the sum of the r of its nuclei.

    - `counts`: whole numbers from 0, ``float32 (n_tiles, n_genes)``.
    - `r`: positive, ``float32 (n_members, n_tiles, n_genes)``.
    - `p_logits`, `size_factors`: as in `summed_log_prob`.
    - returns: ``float32 (n_members, n_tiles)``.

    >>> import jax.numpy as jnp
    >>> from stimage_sd.likelihood.sums import summed_log_prob_of_r
    >>> ones = jnp.ones((1, 1, 2))
    >>> round(float(summed_log_prob_of_r(jnp.zeros((1, 2)), ones, 0 * ones, jnp.ones(1))[0, 0]), 4)
    -1.3863
    """
    return _sum(counts, r, *_logs(p_logits, size_factors))


def _forward_of_r(counts: Array, r: Array, p_logits: Array, size_factors: Array) -> tuple[Array, tuple[Array, Array]]:
    log_p, log_q = _logs(p_logits, size_factors)
    p = jax.nn.sigmoid(p_logits - jnp.log(size_factors)[:, None])
    within_p = (p_logits > P_LOGITS[0]) & (p_logits < P_LOGITS[1])
    slopes = _digamma_change(counts, r) + log_p, jnp.where(within_p, r - (r + counts) * p, 0.0)
    return _sum(counts, r, log_p, log_q), slopes


summed_log_prob_of_r.defvjp(_forward_of_r, _backward)


def _logs(p_logits: Array, size_factors: Array) -> tuple[Array, Array]:
    """Return ``log p`` and ``log (1 - p)``."""
    p_logits = jnp.clip(p_logits, *P_LOGITS) - jnp.log(size_factors)[:, None]
    log_p = -_softplus(-p_logits)
    return log_p, log_p - p_logits


def _terms(r_logits: Array, p_logits: Array, size_factors: Array) -> tuple[Array, Array, Array]:
    """Return ``r``, ``log p`` and ``log (1 - p)``."""
    # clip the network output at a size factor of 1, as at prediction
    p_logits = jnp.clip(p_logits, *P_LOGITS) - jnp.log(size_factors)[:, None]
    r = _softplus(jnp.clip(r_logits, *R_LOGITS))
    # the sum and both gradients use these values; without the barrier the compiler computes them three times
    r, log_p = jax.lax.optimization_barrier((r, -_softplus(-p_logits)))
    return r, log_p, log_p - p_logits


def _sum(counts: Array, r: Array, log_p: Array, log_q: Array) -> Array:
    """Sum over genes as a product with ones, because XLA does not vectorize a plain sum and its terms."""
    terms = _gamma_change(counts, r) + r * log_p + counts * log_q
    return jnp.einsum("mtg,g->mt", terms, jnp.ones(terms.shape[-1], terms.dtype))


def _gamma_change(x: Array, r: Array) -> Array:
    """Return ``log(gamma(x + r) / gamma(r) / gamma(x + 1))`` by Stirling's formula, shifted up by three."""
    z, low, high = r + x, r + 3, r + x + 3
    inverse = 1 / (low * high)
    # error of Stirling's formula at `high` minus the error at `low`
    error = -x * inverse * (1 / 12 - (low * low + low * high + high * high) * inverse * inverse / 360)
    product = z * (z + 1) * (z + 2) / (r * (r + 1) * (r + 2))
    # part that depends on counts alone, computed once for all members; with the log terms below it gives -log(x!)
    of_counts = 1 - HALF_LOG_TWO_PI - 0.5 * jnp.log1p(x) - stirling_error(x + 1)
    of_counts = jnp.where(x > 0, of_counts, 0.0)
    change = (low - 0.5) * jnp.log(high * high * inverse) + x * jnp.log(high / (x + 1))
    return change + error - jnp.log(product) + of_counts


def _digamma_change(x: Array, r: Array) -> Array:
    """Return ``digamma(x + r) - digamma(r)``; all terms are positive except one small term."""
    z, low, high = r + x, r + 3, r + x + 3
    inverse = 1 / (low * high)
    first, second, third = r * z, (r + 1) * (z + 1), (r + 2) * (z + 2)
    below = (second * third + first * (second + third)) / (first * second * third)
    squares = (low + high) * inverse * inverse
    series = 0.5 * inverse + squares * (1 / 12 - (low * low + high * high) * inverse * inverse / 120)
    return jnp.log(high * high * inverse) + x * (below + series)


@jax.custom_vjp
def softplus(x: Array) -> Array:
    """Return ``log(1 + exp(x))``, three times faster than jax.nn.softplus, and differentiable."""
    return _softplus(x)


softplus.defvjp(lambda x: (_softplus(x), x), lambda x, change: (change * jax.nn.sigmoid(x),))


def _softplus(x: Array) -> Array:
    small = jnp.exp(-jnp.abs(x))
    total = jnp.full_like(small, _LOG1P[-1])
    for coefficient in _LOG1P[-2::-1]:
        total = total * small + coefficient
    return jnp.maximum(x, 0) + small * total
