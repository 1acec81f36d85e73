"""Pixel saliency of Flax networks by integrated gradients and Grad-CAM.

Sources: Sundararajan et al. 2017, "Axiomatic attribution for deep networks", and Selvaraju et al. 2017, "Grad-CAM".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stimage_sd.nn.parts import parts_of, run_parts

#: JAX function from embeddings per network, ``(n_tiles, n_fields * n_features)``, to ``(n_tiles, n_outputs)``
Predict = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True, eq=False)
class Differentiable:
    """Flax network that can be differentiated with respect to pixels.

    - `module`: Flax network.
    - `normalize`: function from pixels, 0 to 255, to the input of the network.
    """

    module: nnx.Module
    normalize: Callable[[Any], Any]

    def embed(self, tiles: Any) -> Any:
        """Embed tiles, ``float32 (n_tiles, y, x, 3)``, 0 to 255."""
        return self._embed(self._state, jnp.asarray(tiles, jnp.float32))

    def pull(self, tiles: Any, cotangents: Any) -> Any:
        """Return pixel gradients for `cotangents` of the embeddings, ``(n_outputs, n_tiles, n_features)``."""
        return self._pull(self._state, jnp.asarray(tiles, jnp.float32), cotangents)

    def activations(self, tiles: Any, cotangents: Any) -> tuple[Any, Any]:
        """Return the input of the last part, ``(n_tiles, y, x, n_channels)``, and gradients, ``(n_outputs, ...)``."""
        return self._activations(self._state, jnp.asarray(tiles, jnp.float32), cotangents)

    @cached_property
    def _split(self) -> tuple[Any, Any]:
        graph, state = nnx.split(self.module)
        return graph, state

    @property
    def _state(self) -> Any:
        return self._split[1]

    @cached_property
    def _embed(self) -> Any:
        return jax.jit(lambda state, tiles: nnx.merge(self._split[0], state)(self.normalize(tiles)))

    @cached_property
    def _pull(self) -> Any:
        def pull(state: Any, tiles: Any, cotangents: Any) -> Any:
            _, back = jax.vjp(lambda values: nnx.merge(self._split[0], state)(self.normalize(values)), tiles)
            return jax.lax.map(lambda one: back(one)[0], cotangents)

        return jax.jit(pull)

    @cached_property
    def _activations(self) -> Any:
        def activations(state: Any, tiles: Any, cotangents: Any) -> tuple[Any, Any]:
            parts = parts_of(nnx.merge(self._split[0], state))
            value = run_parts(parts[:-1], self.normalize(tiles))
            _, back = jax.vjp(parts[-1].run, value)
            return value, jax.lax.map(lambda one: back(one)[0], cotangents)

        return jax.jit(activations)


def integrated_gradients(
    networks: Sequence[Differentiable],
    tiles: Sequence[np.ndarray],
    predict: Predict,
    *,
    baseline: Sequence[np.ndarray],
    n_steps: int = 16,
    batch_size: int = 4,
) -> list[np.ndarray]:
    """Compute integrated gradients along the straight line from a baseline to a tile.

    - `networks`: networks that embed a tile.
    - `tiles`: fields of view of the tile per network, ``uint8 (n_fields, y, x, 3)``.
    - `predict`: function from the embeddings to the outputs.
    - `baseline`: empty tile per network, in a shape that can be broadcast.
    - `n_steps`: number of gradients along the line, at the middles of equal steps.
    - `batch_size`: number of steps computed at a time.
    - returns: attributions per network, ``float32 (n_outputs, n_fields, y, x)``, summed over colors. Their sum over all
      networks approximates the difference between the outputs of tile and baseline, better with more steps.
    """
    if n_steps < 1 or batch_size < 1:
        raise ValueError(
            f"Expected at least one step and a batch size of at least 1, found {n_steps} and {batch_size}."
        )
    ends = [np.asarray(one, np.float32) for one in tiles]
    starts = [np.broadcast_to(np.asarray(one, np.float32), end.shape) for one, end in zip(baseline, ends, strict=True)]
    totals: list[Any] = [0.0 for _ in ends]
    middles = (np.arange(n_steps, dtype=np.float32) + 0.5) / n_steps
    for first in range(0, n_steps, batch_size):
        along = middles[first : first + batch_size, None, None, None, None]
        images = [start + along * (end - start) for start, end in zip(starts, ends, strict=True)]
        for index, gradient in enumerate(_gradients(networks, images, predict)):
            totals[index] = totals[index] + gradient.sum(axis=1)
    return [
        np.asarray((total * (end - start) / n_steps).sum(axis=-1))
        for total, start, end in zip(totals, starts, ends, strict=True)
    ]


def _gradients(networks: Sequence[Differentiable], images: Sequence[Any], predict: Predict) -> list[Any]:
    """Return pixel gradients of all outputs, ``(n_outputs, n_images, n_fields, y, x, 3)`` per network."""
    flat = [one.reshape(-1, *one.shape[2:]) for one in images]
    cotangents = _cotangents(networks, flat, [one.shape[1] for one in images], predict)
    pulled = [network.pull(*pair) for network, *pair in zip(networks, flat, cotangents, strict=True)]
    return [gradient.reshape(len(gradient), *one.shape) for gradient, one in zip(pulled, images, strict=True)]


def _cotangents(
    networks: Sequence[Differentiable], flat: Sequence[Any], n_fields: Sequence[int], predict: Predict
) -> list[Any]:
    """Return embedding gradients of all outputs, ``(n_outputs, n_images * n_fields, n_features)`` per network."""
    embedded = [network.embed(one) for network, one in zip(networks, flat, strict=True)]
    together = [values.reshape(len(values) // n, -1) for values, n in zip(embedded, n_fields, strict=True)]
    outputs, back = jax.vjp(lambda values: predict(values), together)
    # each output of an image depends on that image alone
    pulled = [back(jnp.zeros_like(outputs).at[:, index].set(1.0))[0] for index in range(outputs.shape[1])]
    return [
        jnp.stack([one[index] for one in pulled]).reshape(-1, *values.shape) for index, values in enumerate(embedded)
    ]


def grad_cam(networks: Sequence[Differentiable], tiles: Sequence[np.ndarray], predict: Predict) -> list[np.ndarray]:
    """Compute Grad-CAM maps from the input of the last part of each network.

    - `networks`, `tiles`, `predict`: as in `integrated_gradients`.
    - returns: maps per network, ``float32 (n_outputs, n_fields, y, x)``, not negative, bilinearly resized to the tile.
    """
    for network in networks:
        if len(parts_of(network.module)) < 2:
            raise ValueError(
                f"Expected networks of several parts (stimage_sd.nn.parts) for Grad-CAM, found "
                f"{type(network.module).__name__}. Take integrated gradients."
            )
    cotangents = _cotangents(networks, tiles, [len(one) for one in tiles], predict)
    maps = []
    for network, one, cotangent in zip(networks, tiles, cotangents, strict=True):
        value, gradients = network.activations(one, cotangent)
        if value.ndim != 4:
            raise ValueError(
                f"Expected a map before the last part of {type(network.module).__name__}, found shape {value.shape}. "
                "Take integrated gradients."
            )
        weights = gradients.mean(axis=(2, 3), keepdims=True)
        coarse = jnp.maximum((weights * value).sum(axis=-1), 0.0)
        maps.append(np.asarray(jax.image.resize(coarse, (*coarse.shape[:2], *one.shape[1:3]), "bilinear")))
    return maps
