"""Heads that turn features into negative binomials: an ensemble of linear layers on one array axis.

A head is a set of pure functions. Parameters are a dict of arrays whose leading axis is the member; counts are shared
by all members. So are features, of which the ensemble is then one matrix product, unless each member has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stimage_sd.nn import negative_binomial
from stimage_sd.nn.negative_binomial_sums import P_LOGITS, R_LOGITS, summed_log_prob

Parameters = dict[str, Array]


class Head(NamedTuple):
    """One parametrisation of the negative binomials of all genes.

    Attributes
    ----------
    initial
        ``(key, mean, dispersion, n_members, n_features) -> parameters``: members that predict the genes' own
        mean-only fit, each with slightly different weights.
    log_prob
        ``(parameters, features, counts, size_factors) -> (n_members, n_tiles, n_genes)``; features are
        ``(n_tiles, n_features)``, or ``(n_members, n_tiles, n_features)``.
    summed_log_prob
        The same, summed over genes, for training: ``(n_members, n_tiles)``.
    r_and_p
        ``(parameters, features) -> r, p``, each ``(n_members, n_tiles, n_genes)``.
    """

    initial: Callable[..., Parameters]
    log_prob: Callable[[Parameters, Array, Array, Array], Array]
    summed_log_prob: Callable[[Parameters, Array, Array, Array], Array]
    r_and_p: Callable[[Parameters, Array], tuple[Array, Array]]


#: deviation of the weights at the start: enough to tell members apart, too little to move a prediction
_SPREAD = 1e-3
#: largest r of the paper's head: a negative binomial of a mean below is hardly wider than a Poisson
_LARGEST_R = R_LOGITS[1]
#: largest log of r over the mean of the other head: the variance is the mean's to 0.03 %, and float32 still tells
#: p from 1 well enough to get the mean back
_LARGEST_LOG_RATIO = 8.0


def _linear(parameters: Parameters, features: Array) -> Array:
    """``(n_members, n_tiles, n_outputs)``; of features that members share, by one matrix product over all of them."""
    subscripts = "tf,mfo->mto" if features.ndim == 2 else "mtf,mfo->mto"
    return jnp.einsum(subscripts, features, parameters["weight"]) + parameters["bias"][:, None, :]


def _weights(key: Array, n_members: int, n_features: int, n_outputs: int) -> Array:
    return _SPREAD * jax.random.normal(key, (n_members, n_features, n_outputs), dtype=jnp.float32)


# --------------------------------------------------------------------------------------------------
# "paper": r and p for every gene and tile


def _paper_initial(key: Array, mean: np.ndarray, dispersion: np.ndarray, n_members: int, n_features: int) -> Parameters:
    # beyond the clip there is no gradient, and p would answer for an r that is never reached
    dispersion = np.minimum(dispersion, 0.9 * _LARGEST_R)
    r_logits = dispersion + np.log(-np.expm1(-dispersion))  # the inverse of softplus
    p_logits = np.log(dispersion) - np.log(mean)
    bias = np.concatenate([r_logits, p_logits]).astype(np.float32)
    return {
        "weight": _weights(key, n_members, n_features, 2 * len(mean)),
        "bias": jnp.tile(jnp.asarray(bias), (n_members, 1)),
    }


def _paper_logits(parameters: Parameters, features: Array) -> tuple[Array, Array]:
    r_logits, p_logits = jnp.split(_linear(parameters, features), 2, axis=-1)
    return jnp.clip(r_logits, *R_LOGITS), jnp.clip(p_logits, *P_LOGITS)


def _paper_log_prob(parameters: Parameters, features: Array, counts: Array, size_factors: Array) -> Array:
    r_logits, p_logits = _paper_logits(parameters, features)
    # an exposure s makes NB(r, p) an NB(s r, p): s independent draws, summed
    r = jax.nn.softplus(r_logits) * size_factors[:, None]
    scaled = r + jnp.log(-jnp.expm1(-r))
    same = size_factors[:, None] == 1.0
    r_logits = jnp.where(same, r_logits, scaled)
    return negative_binomial.log_prob_from_logits(counts[None], r_logits=r_logits, p_logits=p_logits)


def _paper_summed_log_prob(parameters: Parameters, features: Array, counts: Array, size_factors: Array) -> Array:
    # the logits of r and of p by products of their own: cut out of one, they and their gradients would be copied
    weights, biases = (jnp.split(parameters[name], 2, axis=-1) for name in ("weight", "bias"))
    r_logits, p_logits = (
        _linear({"weight": weight, "bias": bias}, features) for weight, bias in zip(weights, biases, strict=True)
    )
    return summed_log_prob(counts, r_logits, p_logits, size_factors)


def _paper_r_and_p(parameters: Parameters, features: Array) -> tuple[Array, Array]:
    r_logits, p_logits = _paper_logits(parameters, features)
    return jax.nn.softplus(r_logits), jax.nn.sigmoid(p_logits)


# --------------------------------------------------------------------------------------------------
# "dispersion": a mean for every gene and tile, one dispersion a gene


def _dispersion_initial(
    key: Array, mean: np.ndarray, dispersion: np.ndarray, n_members: int, n_features: int
) -> Parameters:
    return {
        "weight": _weights(key, n_members, n_features, len(mean)),
        "bias": jnp.tile(jnp.asarray(np.log(mean), dtype=jnp.float32), (n_members, 1)),
        "log_dispersion": jnp.tile(jnp.asarray(np.log(dispersion), dtype=jnp.float32), (n_members, 1)),
    }


def _dispersion_terms(parameters: Parameters, features: Array) -> tuple[Array, Array]:
    log_mean = jnp.clip(_linear(parameters, features), -15.0, 15.0)
    log_dispersion = jnp.clip(parameters["log_dispersion"], -12.0, 12.0)[:, None, :]
    return log_mean, jnp.minimum(log_dispersion, log_mean + _LARGEST_LOG_RATIO)


def _dispersion_log_prob(parameters: Parameters, features: Array, counts: Array, size_factors: Array) -> Array:
    log_mean, log_dispersion = _dispersion_terms(parameters, features)
    # an exposure s makes NB(r, p) an NB(s r, p), whose mean is s times as large too
    exposure = jnp.log(size_factors)[:, None]
    return negative_binomial.log_prob_from_mean(
        counts[None], log_mean=log_mean + exposure, log_dispersion=log_dispersion + exposure
    )


def _dispersion_summed_log_prob(parameters: Parameters, features: Array, counts: Array, size_factors: Array) -> Array:
    return _dispersion_log_prob(parameters, features, counts, size_factors).sum(axis=-1)


def _dispersion_r_and_p(parameters: Parameters, features: Array) -> tuple[Array, Array]:
    log_mean, log_dispersion = _dispersion_terms(parameters, features)
    return jnp.exp(log_dispersion), jax.nn.sigmoid(log_dispersion - log_mean)


HEADS: dict[str, Head] = {
    "paper": Head(_paper_initial, _paper_log_prob, _paper_summed_log_prob, _paper_r_and_p),
    "dispersion": Head(_dispersion_initial, _dispersion_log_prob, _dispersion_summed_log_prob, _dispersion_r_and_p),
}
