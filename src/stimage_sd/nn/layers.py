"""Primitive layers of the image networks, in JAX.

Each primitive dispatches on the type of its first argument. This module implements arrays, and
`stimage_sd.nn.onnx_graph` registers values of an ONNX graph being recorded. Networks call only these primitives on
their activations, so one network definition serves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, reduce, singledispatch
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stimage_sd._draws import normal

Padding = Literal["same"] | int
#: cells per side of the means that `global_mean` gives of arrays
_cells: ContextVar[int | None] = ContextVar("cells", default=None)


class Norm(nnx.Module):
    """Batch normalization with running statistics.

    The statistics also stay fixed in training, because tiles of one section are too alike to re-estimate them.

    - `channels`: number of channels.
    - `epsilon`: constant added to the variance.
    - `scale`, `bias : nnx.Param`: float32 (channels,), gamma and beta.
    - `mean`, `variance : nnx.BatchStat`: float32 (channels,), running statistics.

    >>> norm(jnp.ones((1, 2, 2, 3)), Norm(3)).shape
    (1, 2, 2, 3)
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-5) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32))

    def gain_and_shift(self) -> tuple[Any, Any]:
        """Return scale / sqrt(variance + epsilon) and bias − mean · gain, in the array type of the weights."""
        # Use only operators, so that numpy weights stay numpy and recording a graph needs no compilation.
        gain = self.scale[...] * (self.variance[...] + np.float32(self.epsilon)) ** np.float32(-0.5)
        shift = self.bias[...] - self.mean[...] * gain
        # weights in bfloat16 would become float32 by the numbers above
        kind = self.scale[...].dtype
        return gain.astype(kind), shift.astype(kind)


@singledispatch
def norm(value: Any, layer: Norm) -> Any:
    """Apply batch normalization to float32 (batch, height, width, channels) or to a graph value.

    >>> float(norm(jnp.ones((1, 1, 1, 1)), Norm(1))[0, 0, 0, 0]) > 0.9999
    True
    """
    gain, shift = layer.gain_and_shift()
    return value * gain + shift


class Conv(nnx.Module):
    """Square convolution with optional stride, groups and bias.

    - `in_channels`, `out_channels`: numbers of input and output channels.
    - `kernel_size`: height and width of the kernel, odd.
    - `stride`: stride, px.
    - `groups`: number of separate channel groups.
    - `padding`: ``"same"`` pads with zeros, with the odd pixel below and to the right. ``"valid"`` does not pad.
    - `bias`: whether to add a bias.
    - `rngs`: source of the initial kernel (He et al. 2015, fan in).

    >>> conv(jnp.ones((1, 8, 8, 3)), Conv(3, 4, 3, stride=2, rngs=nnx.Rngs(0))).shape
    (1, 4, 4, 4)
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1,
        padding: Literal["same", "valid"] = "same", bias: bool = False, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.kernel_size, self.stride, self.groups, self.padding = kernel_size, stride, groups, padding
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        deviation = (2 * groups / (kernel_size**2 * in_channels)) ** 0.5
        self.kernel = nnx.Param(normal(rngs.params(), shape, deviation=deviation))
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32)) if bias else None


@singledispatch
def conv(value: Any, layer: Conv) -> Any:
    """Apply a convolution to float32 (batch, height, width, in_channels) or to a graph value.

    >>> conv(jnp.ones((1, 8, 8, 3)), Conv(3, 4, 5, padding="valid", rngs=nnx.Rngs(0))).shape
    (1, 4, 4, 4)
    """
    # on a CPU, 1 × 1 and grouped convolutions of XLA take several times as long as this code
    if layer.kernel_size == 1:
        convolved = value[:, :: layer.stride, :: layer.stride] @ layer.kernel[0, 0]
    else:
        pieces = [jnp.split(array, layer.groups, axis=-1) for array in (value, layer.kernel[...])]
        apply = partial(_convolution, stride=layer.stride, pads=layer.padding.upper())
        convolved = jnp.concatenate([apply(*pair) for pair in zip(*pieces, strict=True)], axis=-1)
    return convolved if layer.bias is None else convolved + layer.bias[...]


class ConvNorm(Norm):
    """Convolution without bias, followed by batch normalization with running statistics.

    - `in_channels`, `out_channels`: numbers of input and output channels, equal for a depthwise convolution.
    - `kernel_size`: height and width of the kernel, in pixels.
    - `stride`: step of the kernel along both axes.
    - `padding`: "same" follows TensorFlow: the output size is ceil(size / stride), and the odd pixel of padding goes
      below and to the right. A number pads this many zeros on each side, as in torch.
    - `depthwise`: convolve each channel with a separate kernel.
    - `epsilon`: constant added to the variance.
    - `rngs`: source of the initial kernel (He et al. 2015, fan out).
    - `kernel : nnx.Param`: float32 (height, width, in_channels, out_channels), or (height, width, channels) if
      depthwise.
    - `scale`, `bias`, `mean`, `variance`: as in `Norm`, float32 (out_channels,).

    >>> layer = ConvNorm(3, 8, 3, stride=2, padding="same", epsilon=1e-3, rngs=nnx.Rngs(0))
    >>> conv_norm(jnp.ones((1, 5, 5, 3)), layer).shape
    (1, 3, 3, 8)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: Padding,
        depthwise: bool = False,
        epsilon: float,
        rngs: nnx.Rngs,
    ) -> None:
        if depthwise and in_channels != out_channels:
            raise ValueError(
                f"A depthwise convolution keeps its channels, found in_channels={in_channels} and "
                f"out_channels={out_channels}."
            )
        super().__init__(out_channels, epsilon=epsilon)
        self.kernel_size, self.stride, self.padding, self.depthwise = kernel_size, stride, padding, depthwise
        channels = (out_channels,) if depthwise else (in_channels, out_channels)
        fan_out = kernel_size * kernel_size * (1 if depthwise else out_channels)
        deviation = (2 / fan_out) ** 0.5
        shape = (kernel_size, kernel_size, *channels)
        self.kernel = nnx.Param(normal(rngs.params(), shape, deviation=deviation))

    def folded(self) -> tuple[Any, Any]:
        """Return kernel and bias of the single convolution that equals this layer.

        >>> layer = ConvNorm(3, 8, 1, padding=0, epsilon=1e-5, rngs=nnx.Rngs(0))
        >>> [array.shape for array in layer.folded()]
        [(1, 1, 3, 8), (8,)]
        """
        gain, shift = self.gain_and_shift()
        return self.kernel[...] * gain, shift


def pad_widths(size: int, *, kernel_size: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Compute the padding before and after one axis of `size` pixels. Other parameters are as in `ConvNorm`.

    >>> pad_widths(224, kernel_size=3, stride=2, padding="same")
    (0, 1)
    >>> pad_widths(299, kernel_size=3, stride=2, padding="same")
    (1, 1)
    """
    if padding != "same":
        return padding, padding
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


@singledispatch
def conv_norm(value: Any, layer: ConvNorm) -> Any:
    """Apply a convolution and batch normalization to float32 (batch, height, width, in_channels) or to a graph value.

    >>> layer = lambda: ConvNorm(4, 4, 5, padding="same", depthwise=True, epsilon=1e-3, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda: conv_norm(jnp.ones((2, 7, 7, 4)), layer())).shape
    (2, 7, 7, 4)
    """
    kernel, bias = layer.folded()
    pads = [
        pad_widths(size, kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding)
        for size in value.shape[1:3]
    ]
    if layer.depthwise:
        return depthwise_convolution(value, kernel, stride=layer.stride, pads=pads) + bias
    return _convolution(value, kernel, stride=layer.stride, pads=pads) + bias


def _convolution(
    value: jax.Array, kernel: jax.Array, *, stride: int, pads: list[tuple[int, int]] | str, groups: int = 1
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        value,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def depthwise_convolution(
    value: jax.Array, kernel: jax.Array, *, stride: int, pads: list[tuple[int, int]]
) -> jax.Array:
    """Convolve each channel with a separate kernel.

    On a CPU this is a sum of shifted products, fused into one pass by XLA. The grouped convolution of XLA is about 40
    times slower there, and is used on all other devices.

    Parameters
    ----------
    value
        float32 (batch, height, width, channels).
    kernel
        float32 (kernel height, kernel width, channels).
    stride
        Step along both axes.
    pads
        Numbers of zeros before and after the two axes.

    Returns
    -------
    value
        float32 (batch, height', width', channels).

    Examples
    --------
    >>> ones = jnp.ones((1, 4, 4, 2))
    >>> depthwise_convolution(ones, jnp.ones((3, 3, 2)), stride=1, pads=[(1, 1), (1, 1)])[0, :, :, 0]
    Array([[4., 6., 6., 4.],
           [6., 9., 9., 6.],
           [6., 9., 9., 6.],
           [4., 6., 6., 4.]], dtype=float32)
    """

    def shifted(value: jax.Array, kernel: jax.Array) -> jax.Array:
        padded = jnp.pad(value, ((0, 0), *pads, (0, 0)))
        height, width = (
            (size - extent) // stride + 1 for size, extent in zip(padded.shape[1:3], kernel.shape[:2], strict=True)
        )
        products = (
            kernel[row, column]
            * padded[
                :,
                row : row + (height - 1) * stride + 1 : stride,
                column : column + (width - 1) * stride + 1 : stride,
            ]
            for row in range(kernel.shape[0])
            for column in range(kernel.shape[1])
        )
        return reduce(jnp.add, products)

    def grouped(value: jax.Array, kernel: jax.Array) -> jax.Array:
        channels = kernel.shape[-1]
        return _convolution(value, kernel[:, :, None], stride=stride, pads=pads, groups=channels)

    return jax.lax.platform_dependent(value, kernel, cpu=shifted, default=grouped)


@singledispatch
def relu(value: Any) -> Any:
    """Clip negative values of an array or graph value to 0.

    >>> relu(jnp.array([-1.0, 7.0]))
    Array([0., 7.], dtype=float32)
    """
    return jax.nn.relu(value)


@singledispatch
def relu6(value: Any) -> Any:
    """Clip an array or graph value to the range 0 to 6.

    >>> relu6(jnp.array([-1.0, 7.0]))
    Array([0., 6.], dtype=float32)
    """
    return jax.nn.relu6(value)


@singledispatch
def add(value: Any, other: Any) -> Any:
    """Add two arrays or graph values of one shape.

    >>> add(jnp.array([1.0]), jnp.array([2.0]))
    Array([3.], dtype=float32)
    """
    return value + other


@singledispatch
def concatenate(value: Any, others: Sequence[Any]) -> Any:
    """Concatenate arrays or graph values, float32 (batch, height, width, channels), along the channels.

    >>> concatenate(jnp.ones((1, 2, 2, 3)), [jnp.ones((1, 2, 2, 5))]).shape
    (1, 2, 2, 8)
    """
    return jnp.concatenate([value, *others], axis=-1)


@singledispatch
def max_pool(value: Any, *, window: int, stride: int, padding: int) -> Any:
    """Take the maximum over square windows of float32 (batch, height, width, channels) or of a graph value.

    - `value`: the array or graph value.
    - `window`, `stride`: side of the window, and step along both axes, in pixels.
    - `padding`: pixels of padding on each side, which are never the maximum.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), window=3, stride=2, padding=1)[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    return nnx.max_pool(
        value, (window, window), strides=(stride, stride), padding=((padding, padding), (padding, padding))
    )


@singledispatch
def halve(value: Any) -> Any:
    """Average 2 × 2 squares of an array or graph value, without an odd last row or column.

    >>> halve(jnp.arange(4.0).reshape(1, 2, 2, 1))[0, 0, 0]
    Array([1.5], dtype=float32)
    """
    return nnx.avg_pool(value, (2, 2), strides=(2, 2))


@singledispatch
def double(value: Any) -> Any:
    """Repeat every pixel of an array or graph value twice along both axes.

    >>> double(jnp.ones((1, 2, 3, 4))).shape
    (1, 4, 6, 4)
    """
    return value.repeat(2, axis=1).repeat(2, axis=2)


@singledispatch
def trim(value: Any, pixels: int) -> Any:
    """Crop pixels on each side of an array or graph value.

    >>> trim(jnp.ones((1, 6, 6, 4)), 2).shape
    (1, 2, 2, 4)
    """
    return value[:, pixels : value.shape[1] - pixels, pixels : value.shape[2] - pixels] if pixels else value


@singledispatch
def global_mean(value: Any) -> Any:
    """Average float32 (batch, height, width, channels), or a graph value, over height and width.

    >>> global_mean(jnp.ones((2, 7, 7, 3))).shape
    (2, 3)
    """
    n = _cells.get()
    if n is None:
        return value.mean(axis=(1, 2))
    batch, height, width, channels = value.shape
    return value.reshape(batch, n, height // n, n, width // n, channels).mean(axis=(2, 4))


@contextmanager
def means_of_cells(n: int) -> Iterator[None]:
    """Let `global_mean` average arrays over each of n × n equal cells: (batch, n, n, channels).

    >>> with means_of_cells(2):
    ...     global_mean(jnp.ones((2, 8, 8, 3))).shape
    (2, 2, 2, 3)
    """
    token = _cells.set(n)
    try:
        yield
    finally:
        _cells.reset(token)
