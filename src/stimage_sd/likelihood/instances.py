"""Heads whose spots are sums: one r per nucleus (or square) of a spot, and one p that the spot's nuclei share.

With p shared, counts of independent nuclei add up to a negative binomial again: the sum of NB(r_i, p) is
NB(sum of r_i, p). So the paper's head, applied to every nucleus, is learned from the counts of spots by their exact
likelihood. What no nucleus covers is one more part of the spot, the background. A spot with one nucleus and no
background is the paper's head.

The heads see the features of a nucleus, and a hidden layer of them that all genes share: types of nuclei are no linear
function of their looks. The r of all nuclei of a spot also depends on the context of the spot and on how crowded it is,
because segmentation finds more or fewer of the nuclei of a crowded spot, and crowded cells may be smaller.

Parameters are a dict of arrays with the member as the leading axis, as in `stimage_sd.likelihood.heads`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stimage_sd._draws import normal
from stimage_sd.likelihood.heads import Parameters
from stimage_sd.likelihood.sums import P_LOGITS, R_LOGITS, softplus, summed_log_prob_of_r

#: number of hidden units
N_HIDDEN = 32
#: standard deviation of the initial weights, as in the heads of tiles
_SPREAD = 1e-3
#: least r of a spot, for spots without nuclei and background
_LEAST_R = 1e-6
#: share of a spot's r that the background has before training, if the background covers the whole spot
_BACKGROUND = 0.2


class Bags(NamedTuple):
    """Spots with their nuclei, as arrays of numpy or JAX.

    - `context`: features of the spots, ``float32 (n_members, n_spots, n_context)``.
    - `features`: features of the nuclei, ``float32 (n_members, n_nuclei, n_features)``.
    - `spot`: spot of each nucleus, ``int32 (n_nuclei,)``. ``n_spots`` marks padding.
    - `background`: share of each spot that no nucleus covers, ``float32 (n_spots,)``.
    - `crowding`: log of the number of nuclei per area, relative to the training spots, ``float32 (n_spots,)``.
    """

    context: Any
    features: Any
    spot: Any
    background: Any
    crowding: Any


def initial(
    key: Array, mean: np.ndarray, dispersion: np.ndarray, n_members: int, n_features: int, n_context: int,
    *, n_nuclei: float,
) -> Parameters:  # fmt: skip
    """Return parameters with which a spot of `n_nuclei` nuclei has nearly the mean-only fit of each gene.

    - `key`: random key.
    - `mean`, `dispersion`: Mean-only fit of the counts of spots, ``(n_genes,)``.
    - `n_members`, `n_features`, `n_context`: numbers of members, of features of a nucleus, and of a spot.
    - `n_nuclei`: mean number of nuclei of a spot.
    """
    r = np.minimum(dispersion, 0.9 * R_LOGITS[1])
    keys = jax.random.split(key, 6)
    n_genes = len(mean)

    def weights(key: Array, n: int) -> Array:
        return normal(key, (n_members, n, n_genes), deviation=_SPREAD)

    def bias(values: np.ndarray) -> Array:
        return jnp.tile(jnp.asarray(values, dtype=jnp.float32), (n_members, 1))

    return {
        "weight_nuclei": weights(keys[0], n_features),
        "hidden": normal(keys[4], (n_members, n_features, N_HIDDEN)) / np.sqrt(n_features),
        "hidden_bias": jnp.zeros((n_members, N_HIDDEN)),
        "weight_hidden": weights(keys[5], N_HIDDEN),
        "crowding": jnp.zeros((n_members, n_genes)),
        "weight_context": weights(keys[1], n_context),
        "bias": bias(_logits((1 - _BACKGROUND) * r / max(n_nuclei, 1.0))),
        "weight_background": weights(keys[2], n_context),
        "bias_background": bias(_logits(_BACKGROUND * r)),
        "weight_p": weights(keys[3], n_context),
        "bias_p": bias(np.log(r) - np.log(mean)),
    }


def _logits(r: np.ndarray) -> np.ndarray:
    """Return the inverse of softplus."""
    return np.asarray(r + np.log(-np.expm1(-r)))


def _linear(features: Array, weight: Array) -> Array:
    return jnp.einsum("mtf,mfg->mtg", features, weight)


def _of_spots(parameters: Parameters, context: Array, crowding: Array) -> tuple[Array, Array, Array]:
    """Return logits of r that a spot adds to its nuclei, logits of r of its background, and logits of p."""
    of_nuclei, background, p = (
        _linear(context, parameters[f"weight_{name}"]) + parameters[bias][:, None]
        for name, bias in (("context", "bias"), ("background", "bias_background"), ("p", "bias_p"))
    )
    of_nuclei = of_nuclei + parameters["crowding"][:, None] * crowding[:, None]
    return of_nuclei, background, jnp.clip(p, *P_LOGITS)


def r_of_nuclei(parameters: Parameters, features: Array, of_spot: Array) -> Array:
    """Return r of nuclei, ``float32 (n_members, n_nuclei, n_genes)``.

    - `parameters`: parameters of the heads.
    - `features`: ``(n_members, n_nuclei, n_features)``.
    - `of_spot`: what the context of each nucleus adds to the logits, ``(n_members, n_nuclei, n_genes)``.
    """
    hidden = jax.nn.relu(_linear(features, parameters["hidden"]) + parameters["hidden_bias"][:, None])
    logits = _linear(features, parameters["weight_nuclei"]) + _linear(hidden, parameters["weight_hidden"]) + of_spot
    return softplus(jnp.clip(logits, *R_LOGITS))


def r_and_p(parameters: Parameters, bags: Bags) -> tuple[Array, Array]:
    """Return r and p of spots, each ``(n_members, n_spots, n_genes)``."""
    r, p_logits = _of_sums(parameters, bags)
    return r, jax.nn.sigmoid(p_logits)


def r_and_p_of_background(parameters: Parameters, context: Array, background: Array) -> tuple[Array, Array]:
    """Return r and p of the background of spots, each ``(n_members, n_spots, n_genes)``."""
    _, logits, p_logits = _of_spots(parameters, context, jnp.zeros_like(background))
    return _background(logits, background), jax.nn.sigmoid(p_logits)


def r_and_p_of_nuclei(parameters: Parameters, bags: Bags) -> tuple[Array, Array]:
    """Return r and p of nuclei, each ``(n_members, n_nuclei, n_genes)``."""
    logits, _, p_logits = _of_spots(parameters, bags.context, bags.crowding)
    p = jax.nn.sigmoid(p_logits)
    return r_of_nuclei(parameters, bags.features, logits[:, bags.spot]), p[:, bags.spot]


def summed_log_prob(parameters: Parameters, bags: Bags, counts: Array, size_factors: Array) -> Array:
    """Return the log-probability of the counts of spots, summed over genes, ``(n_members, n_spots)``.

    - `parameters`: parameters of the heads.
    - `bags`: the spots with their nuclei.
    - `counts`: ``float32 (n_spots, n_genes)``.
    - `size_factors`: depth of each spot, ``float32 (n_spots,)``.
    """
    r, p_logits = _of_sums(parameters, bags)
    return summed_log_prob_of_r(counts, r, p_logits, size_factors)


def _of_sums(parameters: Parameters, bags: Bags) -> tuple[Array, Array]:
    """Return r of spots and the logits of their p."""
    logits, of_background, p_logits = _of_spots(parameters, bags.context, bags.crowding)
    # padding gets the context of some spot, and is left out of the sums
    of_nuclei = r_of_nuclei(parameters, bags.features, logits[:, jnp.minimum(bags.spot, logits.shape[1] - 1)])
    # products with zeros and ones are faster than scattered sums
    belongs = (bags.spot == jnp.arange(logits.shape[1])[:, None]).astype(of_nuclei.dtype)
    r = jnp.einsum("si,mig->msg", belongs, of_nuclei) + _background(of_background, bags.background)
    return jnp.maximum(r, _LEAST_R), p_logits


def _background(logits: Array, share: Array) -> Array:
    return share[:, None] * softplus(jnp.clip(logits, *R_LOGITS))
