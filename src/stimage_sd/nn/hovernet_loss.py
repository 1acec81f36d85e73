"""Training loss of HoVer-Net for nuclear pixels, distances and types, without pixels of unknown type.

Source: Graham et al. 2019, section 3.3. The loss is cross-entropy and Dice of nuclear pixels and of types, the squared
error of the distances, and twice the squared error of their gradients within nuclei.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

#: type of pixels with unknown type
IGNORED = -1
#: weight of the gradient error
_GRADIENT_WEIGHT = 2.0
_SMOOTH = 1e-3


class CellTargets(NamedTuple):
    """Targets of the maps of tiles.

    - `nuclear`: 1 on nuclei, 0 elsewhere, ``(batch, y, x)``.
    - `hv`: horizontal and vertical distance (`stimage_sd.image.hv_maps`), ``float32 (batch, y, x, 2)``.
    - `types`: 0 for background, types from 1, `IGNORED` for unknown types, ``int32 (batch, y, x)``.
    - `weight`: 0 for tiles that only pad the batch, ``float32 (batch,)``.
    """

    nuclear: Any
    hv: Any
    types: Any
    weight: Any


class CellLosses(NamedTuple):
    """Parts of the loss, each a mean over pixels. The loss is their sum."""

    nuclear: Array
    distances: Array
    types: Array


def cell_losses(maps: tuple[Any, Any, Any], targets: CellTargets, class_weights: Any) -> CellLosses:
    """Compute the parts of the loss of maps against targets.

    - `maps`: logits of background and nucleus, distances, and logits of background and types from
      `stimage_sd.nn.hovernet`, each ``(batch, y, x, channels)``.
    - `targets`: targets of the maps.
    - `class_weights`: weight of a pixel of each type in the cross-entropy, ``float32 (n_types + 1,)``.
    - returns: the parts of the loss.

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
    """Return the weighted cross-entropy, averaged over counted pixels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    total = (weight if counted is None else counted).sum()
    return (losses * weight).sum() / jnp.maximum(total, 1.0)


def _dice(logits: Array, labels: Array, weight: Array) -> Array:
    """Return one minus the Dice overlap of probabilities and truth per channel, averaged over channels."""
    probability = jax.nn.softmax(logits) * weight[..., None]
    truth = jax.nn.one_hot(labels, logits.shape[-1]) * weight[..., None]
    shared, either = (probability * truth).sum((0, 1, 2)), (probability + truth).sum((0, 1, 2))
    return (1 - (2 * shared + _SMOOTH) / (either + _SMOOTH)).mean()


def _gradient_error(hv: Array, truth: Array, weight: Array) -> Array:
    """Return the squared error of the gradient of each map along its own axis."""
    difference = hv - truth
    kernel = jnp.asarray(_kernel())
    # convolution is linear, so the difference of gradients is the gradient of the difference
    slopes = [
        jax.lax.conv_general_dilated(
            difference[..., axis : axis + 1], of[..., None, None], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[..., 0]
        for axis, of in enumerate((kernel, kernel.T))
    ]  # fmt: skip
    return sum((_mean(slope**2, weight) for slope in slopes), jnp.float32(0))


def _kernel(side: int = 5) -> np.ndarray:
    """Return a Sobel derivative along x, weighted by the inverse squared distance."""
    places = np.arange(side) - side // 2
    x, y = np.meshgrid(places, places)
    return (x / np.maximum(x**2 + y**2, 1)).astype(np.float32)


def balanced_weights(n_pixels: np.ndarray) -> np.ndarray:
    """Compute class weights from the inverse square root of the class frequency.

    - `n_pixels`: number of training pixels per class, ``(n_classes,)``.
    - returns: weights ``float32 (n_classes,)``, with mean 1 over pixels, and 0 for classes without pixels.

    >>> import numpy as np
    >>> balanced_weights(np.array([90, 10, 0]))
    array([0.8333333, 2.5      , 0.       ], dtype=float32)
    """
    share = np.asarray(n_pixels, dtype=np.float64) / max(np.sum(n_pixels), 1)
    weights = np.where(share > 0, np.maximum(share, 1e-12) ** -0.5, 0.0)
    return np.asarray(weights / max((weights * share).sum(), 1e-12), dtype=np.float32)
