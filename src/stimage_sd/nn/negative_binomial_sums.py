"""Sums over genes of negative binomial log-likelihoods, for training: the same function, several times as fast.

`stimage_sd.nn.negative_binomial` is accurate to a few roundings for any count and parameter. Training adds up
thousands of terms a step, where absolute errors of 1e-5 are far below the noise of a minibatch, and asks for both
slopes beside the sum. So it gets plain formulas without branches, which the compiler runs on vectors.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from stimage_sd.nn.negative_binomial import _HALF_LOG_TWO_PI, _stirling_error

#: limits of the logits of r and p: within them float32 tells r from 0, and p from 0 and 1
R_LOGITS, P_LOGITS = (-15.0, 100.0), (-15.0, 15.0)
#: Chebyshev fit of log(1 + e) / e on [0, 1], lowest order first; the largest relative error is float32's rounding
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
    """Log-probability of counts, summed over genes, differentiable in the logits.

    Parameters
    ----------
    counts
        ``float32 (n_tiles, n_genes)``, whole numbers from 0.
    r_logits, p_logits
        ``float32 (n_members, n_tiles, n_genes)``; beyond `R_LOGITS` and `P_LOGITS` they are taken to be those limits.
    size_factors
        ``float32 (n_tiles,)``: r of a tile is ``size_factor * softplus(r_logits)``, as of so many draws, summed.

    Returns
    -------
    ``float32 (n_members, n_tiles)``. A gene's term t is within ``1e-5 + 1e-6 * (counts + r + abs(t))`` of the exact
    one.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from stimage_sd.nn.negative_binomial_sums import summed_log_prob
    >>> logits = jnp.zeros((1, 1, 2))
    >>> round(float(summed_log_prob(jnp.zeros((1, 2)), logits, logits, jnp.ones(1))[0, 0]), 4)
    -0.9609
    """
    r, log_p, log_q = _terms(r_logits, p_logits, size_factors)
    return _sum(counts, r, log_p, log_q)


def _forward(counts: Array, r_logits: Array, p_logits: Array, size_factors: Array) -> tuple[Array, tuple[Array, Array]]:
    r, log_p, log_q = _terms(r_logits, p_logits, size_factors)
    slope_r = _digamma_change(counts, r) + log_p
    within_r = (r_logits > R_LOGITS[0]) & (r_logits < R_LOGITS[1])
    within_p = (p_logits > P_LOGITS[0]) & (p_logits < P_LOGITS[1])
    slopes = (
        jnp.where(within_r, slope_r * jax.nn.sigmoid(r_logits) * size_factors[:, None], 0.0),
        jnp.where(within_p, r - (r + counts) * jax.nn.sigmoid(p_logits), 0.0),
    )
    return _sum(counts, r, log_p, log_q), slopes


def _backward(slopes: tuple[Array, Array], change: Array) -> tuple[None, Array, Array, None]:
    return None, change[..., None] * slopes[0], change[..., None] * slopes[1], None


summed_log_prob.defvjp(_forward, _backward)


def _terms(r_logits: Array, p_logits: Array, size_factors: Array) -> tuple[Array, Array, Array]:
    """``r``, ``log p`` and ``log (1 - p)``."""
    p_logits = jnp.clip(p_logits, *P_LOGITS)
    r = _softplus(jnp.clip(r_logits, *R_LOGITS)) * size_factors[:, None]
    # sums and both slopes need these; without the barrier the compiler would compute them for each anew
    r, log_p = jax.lax.optimization_barrier((r, -_softplus(-p_logits)))
    return r, log_p, log_p - p_logits


def _sum(counts: Array, r: Array, log_p: Array, log_q: Array) -> Array:
    """Sum over genes, as a product with ones: XLA computes a sum, and its terms with it, an element at a time."""
    terms = _gamma_change(counts, r) + r * log_p + counts * log_q
    return jnp.einsum("mtg,g->mt", terms, jnp.ones(terms.shape[-1], terms.dtype))


def _gamma_change(x: Array, r: Array) -> Array:
    """``log(gamma(x + r) / gamma(r) / gamma(x + 1))``: Stirling's formula at three more, and the product below."""
    z, low, high = r + x, r + 3, r + x + 3
    inverse = 1 / (low * high)
    # what Stirling's formula misses, at `high` less that at `low`
    error = -x * inverse * (1 / 12 - (low * low + low * high + high * high) * inverse * inverse / 360)
    product = z * (z + 1) * (z + 2) / (r * (r + 1) * (r + 2))
    # of the counts alone, once for all members: with the logarithms' difference below, minus log(x!)
    of_counts = 1 - _HALF_LOG_TWO_PI - 0.5 * jnp.log1p(x) - _stirling_error(x + 1)
    of_counts = jnp.where(x > 0, of_counts, 0.0)
    change = (low - 0.5) * jnp.log(high * high * inverse) + x * jnp.log(high / (x + 1))
    return change + error - jnp.log(product) + of_counts


def _digamma_change(x: Array, r: Array) -> Array:
    """``digamma(x + r) - digamma(r)``, every term positive but one that is small."""
    z, low, high = r + x, r + 3, r + x + 3
    inverse = 1 / (low * high)
    first, second, third = r * z, (r + 1) * (z + 1), (r + 2) * (z + 2)
    below = (second * third + first * (second + third)) / (first * second * third)
    squares = (low + high) * inverse * inverse
    series = 0.5 * inverse + squares * (1 / 12 - (low * low + high * high) * inverse * inverse / 120)
    return jnp.log(high * high * inverse) + x * (below + series)


def _softplus(x: Array) -> Array:
    """``log(1 + exp(x))``; jax's takes three times as long."""
    small = jnp.exp(-jnp.abs(x))
    total = jnp.full_like(small, _LOG1P[-1])
    for coefficient in _LOG1P[-2::-1]:
        total = total * small + coefficient
    return jnp.maximum(x, 0) + small * total
