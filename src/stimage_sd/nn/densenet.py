"""DenseNet-121, compatible with the released ImageNet weights.

Source: Huang et al., "Densely connected convolutional networks", 2017. A dense layer takes the channels of all previous
layers and adds 32 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stimage_sd.nn.layers import ConvNorm, conv_norm, global_mean, max_pool, relu
from stimage_sd.nn.parts import Part, run_parts

BATCH_NORM_EPSILON = 1e-5
BLOCK_DEPTHS = (6, 12, 24, 16)
GROWTH = 32
STEM_CHANNELS = 64
BOTTLENECK = 4 * GROWTH
EMBEDDING_SIZE = 1024


class Norm(nnx.Module):
    """Batch normalization with running statistics that also stay fixed in training.

    Parameters
    ----------
    channels
        Number of channels.

    Attributes
    ----------
    scale, bias : nnx.Param
        float32 (channels,), gamma and beta.
    mean, variance : nnx.BatchStat
        float32 (channels,), running statistics.

    Examples
    --------
    >>> norm(jnp.ones((1, 2, 2, 3)), Norm(3)).shape
    (1, 2, 2, 3)
    """

    def __init__(self, channels: int) -> None:
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32))

    def folded(self) -> tuple[Any, Any]:
        """Return the factor and offset that equal this layer, in the array type of the weights.

        Returns
        -------
        factor, summand
            float32 (channels,): factor g = scale / sqrt(variance + epsilon), and offset bias − mean · g.
        """
        gain = self.scale[...] * (self.variance[...] + np.float32(BATCH_NORM_EPSILON)) ** np.float32(-0.5)
        return gain, self.bias[...] - self.mean[...] * gain


class Convolution(nnx.Module):
    """Square convolution without bias, with zero padding that keeps the image size.

    Parameters
    ----------
    in_channels, out_channels
        Numbers of input and output channels.
    kernel_size
        Height and width of the kernel, odd.
    rngs
        Source of the initial kernel (He et al. 2015, fan in).

    Examples
    --------
    >>> convolution(jnp.ones((1, 4, 4, 3)), Convolution(3, 8, 3, rngs=nnx.Rngs(0))).shape
    (1, 4, 4, 8)
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, rngs: nnx.Rngs) -> None:
        self.kernel_size = kernel_size
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        deviation = (2 / (kernel_size**2 * in_channels)) ** 0.5
        self.kernel = nnx.Param(deviation * jax.random.normal(rngs.params(), shape, jnp.float32))


@singledispatch
def norm(value: Any, layer: Norm) -> Any:
    """Apply batch normalization with running statistics.

    Parameters
    ----------
    value
        float32 (batch, height, width, channels), or a value of a graph being recorded.
    layer
        Normalization layer.

    Returns
    -------
    value
        Normalized value of the same shape.

    Examples
    --------
    >>> float(norm(jnp.ones((1, 1, 1, 1)), Norm(1))[0, 0, 0, 0]) > 0.9999
    True
    """
    gain, shift = layer.folded()
    return value * gain + shift


@singledispatch
def convolution(value: Any, layer: Convolution) -> Any:
    """Apply a convolution.

    Parameters
    ----------
    value
        float32 (batch, height, width, in_channels), or a value of a graph being recorded.
    layer
        Convolution layer.

    Returns
    -------
    value
        float32 (batch, height, width, out_channels).

    Examples
    --------
    >>> convolution(jnp.ones((2, 5, 4, 3)), Convolution(3, 6, 1, rngs=nnx.Rngs(0))).shape
    (2, 5, 4, 6)
    """
    pad = layer.kernel_size // 2
    return jax.lax.conv_general_dilated(
        value, layer.kernel[...], (1, 1), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@singledispatch
def concatenate(value: Any, others: Sequence[Any]) -> Any:
    """Concatenate values along the channels.

    Parameters
    ----------
    value, others
        float32 (batch, height, width, channels), or values of a graph being recorded.

    Returns
    -------
    value
        Value with the channels of all inputs.

    Examples
    --------
    >>> concatenate(jnp.ones((1, 2, 2, 3)), [jnp.ones((1, 2, 2, 5))]).shape
    (1, 2, 2, 8)
    """
    return jnp.concatenate([value, *others], axis=-1)


@singledispatch
def halve(value: Any) -> Any:
    """Average 2 × 2 squares, without an odd last row or column.

    Parameters
    ----------
    value
        float32 (batch, height, width, channels), or a value of a graph being recorded.

    Returns
    -------
    value
        float32 (batch, height // 2, width // 2, channels).

    Examples
    --------
    >>> halve(jnp.arange(4.0).reshape(1, 2, 2, 1))[0, 0, 0]
    Array([1.5], dtype=float32)
    """
    return nnx.avg_pool(value, (2, 2), strides=(2, 2))


class DenseLayer(nnx.Module):
    """Dense layer: norm, ReLU and 1 × 1 convolution, then norm, ReLU and 3 × 3 convolution.

    Parameters
    ----------
    in_channels
        Number of input channels.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> nnx.eval_shape(lambda: DenseLayer(16, rngs=nnx.Rngs(0))(jnp.ones((1, 6, 6, 16)))).shape
    (1, 6, 6, 32)
    """

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs) -> None:
        self.before = Norm(in_channels)
        self.reduce = ConvNorm(in_channels, BOTTLENECK, 1, padding=0, epsilon=BATCH_NORM_EPSILON, rngs=rngs)
        self.filter = Convolution(BOTTLENECK, GROWTH, 3, rngs=rngs)

    def __call__(self, value: Any) -> Any:
        """Run the layer on float32 (batch, height, width, in_channels) or on a graph value."""
        return convolution(relu(conv_norm(relu(norm(value, self.before)), self.reduce)), self.filter)


class Transition(nnx.Module):
    """Transition between blocks that halves channels, height and width.

    Parameters
    ----------
    in_channels
        Number of input channels.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> nnx.eval_shape(lambda: Transition(16, rngs=nnx.Rngs(0))(jnp.ones((1, 6, 6, 16)))).shape
    (1, 3, 3, 8)
    """

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs) -> None:
        self.before = Norm(in_channels)
        self.reduce = Convolution(in_channels, in_channels // 2, 1, rngs=rngs)

    def __call__(self, value: Any) -> Any:
        """Run the transition on float32 (batch, height, width, in_channels) or on a graph value."""
        return halve(convolution(relu(norm(value, self.before)), self.reduce))


class DenseNet121(nnx.Module):
    """DenseNet-121 up to the pooled features.

    Parameters
    ----------
    rngs
        Source of the initial weights.

    Examples
    --------
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
        *middle, last = [Part(pair, partial(_after_transition, *pair)) for pair in pairs]
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


def _after_transition(transition: Transition, block: Sequence[DenseLayer], value: Any) -> Any:
    return _dense(block, transition(value))


def _dense(block: Sequence[DenseLayer], value: Any) -> Any:
    for layer in block:
        value = concatenate(value, [layer(value)])
    return value
