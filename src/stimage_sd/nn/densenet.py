"""DenseNet-121, compatible with the released ImageNet weights.

Source: Huang et al., "Densely connected convolutional networks", 2017. A dense layer takes the channels of all previous
layers and adds 32 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from flax import nnx

from stimage_sd.nn.layers import (
    Conv,
    ConvNorm,
    Norm,
    concatenate,
    conv,
    conv_norm,
    global_mean,
    halve,
    max_pool,
    norm,
    relu,
)
from stimage_sd.nn.parts import Part, run_blocks, run_parts

BATCH_NORM_EPSILON = 1e-5
BLOCK_DEPTHS = (6, 12, 24, 16)
GROWTH = 32
STEM_CHANNELS = 64
BOTTLENECK = 4 * GROWTH
EMBEDDING_SIZE = 1024


class DenseLayer(nnx.Module):
    """Dense layer: norm, ReLU and 1 × 1 convolution, then norm, ReLU and 3 × 3 convolution.

    - `in_channels`: number of input channels.
    - `rngs`: source of the initial weights.

    >>> import jax.numpy as jnp
    >>> nnx.eval_shape(lambda: DenseLayer(16, rngs=nnx.Rngs(0))(jnp.ones((1, 6, 6, 16)))).shape
    (1, 6, 6, 32)
    """

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs) -> None:
        self.before = Norm(in_channels)
        self.reduce = ConvNorm(in_channels, BOTTLENECK, 1, padding=0, epsilon=BATCH_NORM_EPSILON, rngs=rngs)
        self.filter = Conv(BOTTLENECK, GROWTH, 3, rngs=rngs)

    def __call__(self, value: Any) -> Any:
        """Run the layer on float32 (batch, height, width, in_channels) or on a graph value."""
        return conv(relu(conv_norm(relu(norm(value, self.before)), self.reduce)), self.filter)


class Transition(nnx.Module):
    """Transition between blocks that halves channels, height and width.

    - `in_channels`: number of input channels.
    - `rngs`: source of the initial weights.

    >>> import jax.numpy as jnp
    >>> nnx.eval_shape(lambda: Transition(16, rngs=nnx.Rngs(0))(jnp.ones((1, 6, 6, 16)))).shape
    (1, 3, 3, 8)
    """

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs) -> None:
        self.before = Norm(in_channels)
        self.reduce = Conv(in_channels, in_channels // 2, 1, rngs=rngs)

    def __call__(self, value: Any) -> Any:
        """Run the transition on float32 (batch, height, width, in_channels) or on a graph value."""
        return halve(conv(relu(norm(value, self.before)), self.reduce))


class DenseNet121(nnx.Module):
    """DenseNet-121 up to the pooled features.

    - `rngs`: source of the initial weights.

    >>> import jax.numpy as jnp
    >>> nnx.eval_shape(lambda: DenseNet121(rngs=nnx.Rngs(0))(jnp.zeros((1, 64, 64, 3)))).shape
    (1, 1024)
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.stem = ConvNorm(3, STEM_CHANNELS, 7, stride=2, padding=3, epsilon=BATCH_NORM_EPSILON, rngs=rngs)
        blocks, transitions, channels = [], [], STEM_CHANNELS
        for depth in BLOCK_DEPTHS:
            blocks.append(nnx.List([DenseLayer(channels + GROWTH * layer, rngs=rngs) for layer in range(depth)]))
            channels += GROWTH * depth
            if len(blocks) < len(BLOCK_DEPTHS):
                transitions.append(Transition(channels, rngs=rngs))
                channels //= 2
        self.blocks = nnx.List(blocks)
        self.transitions = nnx.List(transitions)
        self.after = Norm(channels)

    def parts(self) -> list[Part]:
        """Return the dense blocks with their transitions, the first with the stem, the last with pooling."""
        first = Part((self.stem, self.blocks[0]), lambda tiles: _dense(self.blocks[0], self._stem(tiles)))
        pairs = zip(self.transitions, self.blocks[1:], strict=True)
        *middle, last = [Part(pair, partial(run_blocks, (pair[0], partial(_dense, pair[1])))) for pair in pairs]
        end = Part((*last.modules, self.after), lambda value: global_mean(relu(norm(last.run(value), self.after))))
        return [first, *middle, end]

    def _stem(self, tiles: Any) -> Any:
        return max_pool(relu(conv_norm(tiles, self.stem)), window=3, stride=2, padding=1)

    def __call__(self, tiles: Any) -> Any:
        """Embed tiles.

        Parameters
        ----------
        tiles
            Normalized RGB tiles, float32 (batch, height, width, 3), at least 32 × 32 px, or the input of a graph being
            recorded.

        Returns
        -------
        embeddings
            float32 (batch, 1024), or a graph value.
        """
        return run_parts(self.parts(), tiles)


def _dense(block: Sequence[DenseLayer], value: Any) -> Any:
    for layer in block:
        value = concatenate(value, [layer(value)])
    return value
