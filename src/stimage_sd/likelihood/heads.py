"""Heads that map features to negative binomials, as an ensemble of linear layers on one array axis.

A head is a set of pure functions. Parameters are a dict of arrays with the member as the leading axis. All members
share the counts. If they also share the features, the whole ensemble is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stimage_sd._draws import normal
from stimage_sd.likelihood import negative_binomial
from stimage_sd.likelihood.sums import P_LOGITS, R_LOGITS, summed_log_prob

Parameters = dict[str, Array]


class Head(NamedTuple):
    """One parametrization of the negative binomials of all genes.

    - `initial`: ``(key, mean, dispersion, n_members, n_features) -> parameters``: every member predicts the mean-only
      fit of each gene, with slightly different weights per member.
    - `log_prob`: ``(parameters, features, counts, size_factors) -> (n_members, n_tiles, n_genes)``. Features are
      ``(n_tiles, n_features)``, or ``(n_members, n_tiles, n_features)``.
    - `summed_log_prob`: `log_prob` summed over genes, ``(n_members, n_tiles)``, for training.
    - `r_and_p`: ``(parameters, features) -> r, p``, each ``(n_members, n_tiles, n_genes)``.
    """

    initial: Callable[..., Parameters]
    log_prob: Callable[[Parameters, Array, Array, Array], Array]
    summed_log_prob: Callable[[Parameters, Array, Array, Array], Array]
    r_and_p: Callable[[Parameters, Array], tuple[Array, Array]]


#: standard deviation of the initial weights: members differ, but predictions hardly change
_SPREAD = 1e-3
#: largest r of the paper's head; with a mean below this r, a negative binomial is hardly wider than a Poisson
_LARGEST_R = R_LOGITS[1]
#: largest log(r / mean) of the dispersion head: the variance equals the mean to 0.03 %, and float32 still resolves
#: 1 - p well enough to recover the mean
_LARGEST_LOG_RATIO = 8.0


def _linear(parameters: Parameters, features: Array) -> Array:
    """Apply the linear layers, ``(n_members, n_tiles, n_outputs)``; shared features take one matrix product."""
    subscripts = "tf,mfo->mto" if features.ndim == 2 else "mtf,mfo->mto"
    return jnp.einsum(subscripts, features, parameters["weight"]) + parameters["bias"][:, None, :]


def _weights(key: Array, n_members: int, n_features: int, n_outputs: int) -> Array:
    return normal(key, (n_members, n_features, n_outputs), deviation=_SPREAD)


# --------------------------------------------------------------------------------------------------
# "paper": r and p per gene and tile


def _paper_initial(key: Array, mean: np.ndarray, dispersion: np.ndarray, n_members: int, n_features: int) -> Parameters:
    # beyond the clip r gets no gradient, and p would be fitted for an r that is never reached
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
    # depth multiplies the odds of failure and keeps r (`stimage_sd.likelihood.depth`)
    p_logits = p_logits - jnp.log(size_factors)[:, None]
    return negative_binomial.log_prob_from_logits(counts[None], r_logits=r_logits, p_logits=p_logits)


def _paper_summed_log_prob(parameters: Parameters, features: Array, counts: Array, size_factors: Array) -> Array:
    # separate products for r and p: slices of one product, and their gradients, would be copied
    weights, biases = (jnp.split(parameters[name], 2, axis=-1) for name in ("weight", "bias"))
    r_logits, p_logits = (
        _linear({"weight": weight, "bias": bias}, features) for weight, bias in zip(weights, biases, strict=True)
    )
    return summed_log_prob(counts, r_logits, p_logits, size_factors)


def _paper_r_and_p(parameters: Parameters, features: Array) -> tuple[Array, Array]:
    r_logits, p_logits = _paper_logits(parameters, features)
    return jax.nn.softplus(r_logits), jax.nn.sigmoid(p_logits)


# --------------------------------------------------------------------------------------------------
# "dispersion": one mean per gene and tile, one dispersion per gene


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
    # depth multiplies the mean and keeps r (`stimage_sd.likelihood.depth`)
    log_mean = log_mean + jnp.log(size_factors)[:, None]
    return negative_binomial.log_prob_from_mean(counts[None], log_mean=log_mean, log_dispersion=log_dispersion)


def _dispersion_summed_log_prob(parameters: Parameters, features: Array, counts: Array, size_factors: Array) -> Array:
    return _dispersion_log_prob(parameters, features, counts, size_factors).sum(axis=-1)


def _dispersion_r_and_p(parameters: Parameters, features: Array) -> tuple[Array, Array]:
    log_mean, log_dispersion = _dispersion_terms(parameters, features)
    return jnp.exp(log_dispersion), jax.nn.sigmoid(log_dispersion - log_mean)


HEADS: dict[str, Head] = {
    "paper": Head(_paper_initial, _paper_log_prob, _paper_summed_log_prob, _paper_r_and_p),
    "dispersion": Head(_dispersion_initial, _dispersion_log_prob, _dispersion_summed_log_prob, _dispersion_r_and_p),
}
