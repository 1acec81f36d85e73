"""What HoVer-Net is trained to: nuclear pixels, distances and types; uncertain types are left out.

Source: Graham et al. 2019, section 3.3: cross-entropy and Dice of nuclear pixels and of types, squared error of the
distances and, weighted twice, of their gradients within nuclei.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

#: type of a pixel that nobody is sure of
IGNORED = -1
#: weight of the gradients' error
_GRADIENT_WEIGHT = 2.0
_SMOOTH = 1e-3


class CellTargets(NamedTuple):
    """What the maps of tiles ought to be.

    Attributes
    ----------
    nuclear
        ``(batch, y, x)``: 1 on nuclei, 0 elsewhere.
    hv
        ``float32 (batch, y, x, 2)``, horizontal and vertical distance (`stimage_sd.nn.hv_maps`).
    types
        ``int32 (batch, y, x)``: 0 background, types from 1, `IGNORED` where the type is not known.
    weight
        ``float32 (batch,)``: 0 for tiles that only fill up the batch.
    """

    nuclear: Any
    hv: Any
    types: Any
    weight: Any


class CellLosses(NamedTuple):
    """The parts of the loss, each a mean over pixels; the loss is their sum."""

    nuclear: Array
    distances: Array
    types: Array


def cell_losses(maps: tuple[Any, Any, Any], targets: CellTargets, class_weights: Any) -> CellLosses:
    """Compare maps with what they ought to be.

    Parameters
    ----------
    maps
        Logits of background and nucleus, distances, logits of background and types, as `stimage_sd.nn.hovernet` gives
        them, each ``(batch, y, x, channels)``.
    targets
        What they ought to be.
    class_weights
        ``float32 (n_types + 1,)``: weight of a pixel of each type in the cross-entropy.

    Returns
    -------
    The parts of the loss.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> right = jnp.stack([jnp.full((1, 8, 8), 9.0), jnp.full((1, 8, 8), -9.0)], axis=-1)
    >>> empty = CellTargets(jnp.zeros((1, 8, 8)), jnp.zeros((1, 8, 8, 2)), jnp.zeros((1, 8, 8), int), jnp.ones(1))
    >>> losses = cell_losses((right, jnp.zeros((1, 8, 8, 2)), right), empty, jnp.ones(2))
    >>> bool(sum(losses) < 0.01)
    True
    """
    nuclear, hv, types = maps
    there = jnp.broadcast_to(targets.weight[:, None, None], targets.types.shape)
    known = there * (targets.types != IGNORED)
    labels = jnp.maximum(targets.types, 0)
    return CellLosses(
        nuclear=_cross_entropy(nuclear, targets.nuclear.astype(jnp.int32), there)
        + _dice(nuclear, targets.nuclear.astype(jnp.int32), there),
        distances=_mean((hv - targets.hv) ** 2, there[..., None])
        + _GRADIENT_WEIGHT * _gradient_error(hv, targets.hv, there * targets.nuclear),
        types=_cross_entropy(types, labels, known * jnp.asarray(class_weights)[labels], known)
        + _dice(types, labels, known),
    )


def _mean(values: Array, weight: Array) -> Array:
    weight = jnp.broadcast_to(weight, values.shape)
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def _cross_entropy(logits: Array, labels: Array, weight: Array, counted: Array | None = None) -> Array:
    """Mean over counted pixels, each with its weight."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    total = (weight if counted is None else counted).sum()
    return (losses * weight).sum() / jnp.maximum(total, 1.0)


def _dice(logits: Array, labels: Array, weight: Array) -> Array:
    """One minus the overlap of probabilities and truth, a channel, averaged over the channels."""
    probability = jax.nn.softmax(logits) * weight[..., None]
    truth = jax.nn.one_hot(labels, logits.shape[-1]) * weight[..., None]
    shared, either = (probability * truth).sum((0, 1, 2)), (probability + truth).sum((0, 1, 2))
    return (1 - (2 * shared + _SMOOTH) / (either + _SMOOTH)).mean()


def _gradient_error(hv: Array, truth: Array, weight: Array) -> Array:
    """Squared error of the horizontal map's horizontal and the vertical map's vertical gradient."""
    difference = hv - truth
    kernel = jnp.asarray(_kernel())
    # a convolution is linear: the gradients' difference is the gradient of the difference
    slopes = [
        jax.lax.conv_general_dilated(
            difference[..., axis : axis + 1], of[..., None, None], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[..., 0]
        for axis, of in enumerate((kernel, kernel.T))
    ]  # fmt: skip
    return sum((_mean(slope**2, weight) for slope in slopes), jnp.float32(0))


def _kernel(side: int = 5) -> np.ndarray:
    """Sobel's derivative along x, each place by the inverse square of its distance."""
    places = np.arange(side) - side // 2
    x, y = np.meshgrid(places, places)
    return (x / np.maximum(x**2 + y**2, 1)).astype(np.float32)


def balanced_weights(n_pixels: np.ndarray) -> np.ndarray:
    """Weigh classes by the root of how rare they are.

    Parameters
    ----------
    n_pixels
        ``(n_classes,)``, training pixels of each.

    Returns
    -------
    ``float32 (n_classes,)``, whose mean over pixels is 1; 0 for a class without any.

    Examples
    --------
    >>> import numpy as np
    >>> balanced_weights(np.array([90, 10, 0]))
    array([0.8333333, 2.5      , 0.       ], dtype=float32)
    """
    share = np.asarray(n_pixels, dtype=np.float64) / max(np.sum(n_pixels), 1)
    weights = np.where(share > 0, np.maximum(share, 1e-12) ** -0.5, 0.0)
    return np.asarray(weights / max((weights * share).sum(), 1e-12), dtype=np.float32)
