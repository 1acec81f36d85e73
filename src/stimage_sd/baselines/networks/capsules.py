"""Capsules: vectors that encode the presence of a feature in their length and its state in their direction.

Source: Mazzia et al., "Efficient-CapsNet: capsule network with self-attention routing", Scientific Reports 2021.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from stimage_sd._draws import normal
from stimage_sd.baselines.networks.layers import batch_norm

#: channels, kernel sides and strides of the convolutions before the capsules
_CHANNELS = (32, 64, 64, 128)
_KERNELS = (5, 3, 3, 3)
_STRIDES = (1, 1, 1, 2)
#: number of primary capsules, and values per capsule
PRIMARY = (16, 8)


def squash(capsules: jax.Array) -> jax.Array:
    """Shorten vectors to a length below 1 and keep their direction.

    Parameters
    ----------
    capsules
        float32 (…, width).

    Returns
    -------
    float32 (…, width), with length 1 − exp(−length).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> [round(float(value), 3) for value in squash(jnp.array([0.0, 2.0]))]
    [0.0, 0.865]
    """
    # the small constant keeps the gradient of the square root finite at 0
    length = jnp.sqrt(jnp.square(capsules).sum(axis=-1, keepdims=True) + 1e-20)
    return -jnp.expm1(-length) * capsules / length


class CapsuleRouting(nnx.Module):
    """Routing of capsules to new capsules of another number and width, in one pass of self-attention.

    Each capsule votes for each new capsule. The weight of a vote is its agreement with all votes for that new capsule,
    normalized over the new capsules, plus a learned bias.

    Parameters
    ----------
    n_inputs, input_width
        Number of input capsules, and values per capsule.
    n_outputs, output_width
        Number of output capsules, and values per capsule.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> nnx.eval_shape(lambda: CapsuleRouting(16, 8, 20, 64, rngs=nnx.Rngs(0))(jnp.ones((3, 16, 8)))).shape
    (3, 20, 64)
    """

    def __init__(self, n_inputs: int, input_width: int, n_outputs: int, output_width: int, *, rngs: nnx.Rngs) -> None:
        # same deviation as published, torch's default for this shape
        deviation = (2 / (n_inputs * input_width * output_width)) ** 0.5
        shape = (n_outputs, n_inputs, input_width, output_width)
        self.votes = nnx.Param(normal(rngs.params(), shape, deviation=deviation))
        self.bias = nnx.Param(jnp.zeros((n_outputs, n_inputs), jnp.float32))

    def __call__(self, capsules: jax.Array) -> jax.Array:
        """Route capsules, float32 (n, n_inputs, input_width)."""
        votes = jnp.einsum("nij,kijd->nkid", capsules, self.votes[...])
        agreement = jnp.einsum("nkid,nkd->nki", votes, votes.sum(axis=2)) / votes.shape[-1] ** 0.5
        weights = jax.nn.softmax(agreement, axis=1) + self.bias[...]
        return squash(jnp.einsum("nki,nkid->nkd", weights, votes))


class CapsuleEncoder(nnx.Module):
    """Four convolutions without padding, then primary capsules and their routing.

    Parameters
    ----------
    side, channels
        Side of the images, px, and number of channels.
    n_capsules, width
        Number of output capsules, and values per capsule.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> nnx.eval_shape(lambda: CapsuleEncoder(12, 16, 20, 64, rngs=nnx.Rngs(0))(jnp.ones((3, 12, 12, 16)))).shape
    (3, 20, 64)
    """

    def __init__(self, side: int, channels: int, n_capsules: int, width: int, *, rngs: nnx.Rngs) -> None:
        left, before = side, channels
        convolutions, norms = [], []
        for after, kernel, stride in zip(_CHANNELS, _KERNELS, _STRIDES, strict=True):
            convolutions.append(
                nnx.Conv(
                    before, after, (kernel, kernel), strides=(stride, stride), padding="VALID",
                    kernel_init=nnx.initializers.he_normal(), rngs=rngs,
                )
            )  # fmt: skip
            norms.append(batch_norm(after, rngs))
            left, before = (left - kernel) // stride + 1, after
        if left < 1:
            raise ValueError(f"Expected pictures of 11 px or more for the capsules' convolutions, found {side} px.")
        self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
        # a depthwise kernel as large as the image gives one value per channel
        self.whole = nnx.Param(normal(rngs.params(), (left, left, before), deviation=1 / left))
        self.whole_bias = nnx.Param(jnp.zeros(before, jnp.float32))
        self.routing = CapsuleRouting(*PRIMARY, n_capsules, width, rngs=rngs)

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Encode float32 (n, side, side, channels) as (n, n_capsules, width)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            pictures = jax.nn.relu(norm(convolution(pictures)))
        values = jnp.einsum("nyxc,yxc->nc", pictures, self.whole[...]) + self.whole_bias[...]
        return self.routing(squash(values.reshape(-1, *PRIMARY)))
