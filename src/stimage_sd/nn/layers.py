"""Primitive layers of the image networks, in JAX.

Each primitive dispatches on the type of its first argument. This module implements arrays, and
`stimage_sd.nn.onnx_graph` registers values of an ONNX graph being recorded. Networks call only these primitives on
their activations, so one network definition serves both.
"""

from __future__ import annotations

from functools import reduce, singledispatch
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Padding = Literal["same"] | int


class ConvNorm(nnx.Module):
    """Convolution without bias, followed by batch normalization with running statistics.

    The statistics also stay fixed in training, because tiles of one section are too alike to re-estimate them.

    Parameters
    ----------
    in_channels, out_channels
        Numbers of input and output channels, equal for a depthwise convolution.
    kernel_size
        Height and width of the kernel, in pixels.
    stride
        Step of the kernel along both axes.
    padding
        "same" follows TensorFlow: the output size is ceil(size / stride), and the odd pixel of padding goes below and
        to the right. A number pads this many zeros on each side, as in torch.
    depthwise
        Convolve each channel with a separate kernel.
    epsilon
        Constant added to the variance.
    rngs
        Source of the initial kernel (He et al. 2015, fan out).

    Attributes
    ----------
    kernel : nnx.Param
        float32 (height, width, in_channels, out_channels), or (height, width, channels) if depthwise.
    scale, bias : nnx.Param
        float32 (out_channels,), gamma and beta of the normalization.
    mean, variance : nnx.BatchStat
        float32 (out_channels,), running statistics.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
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
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.depthwise = depthwise
        self.epsilon = epsilon
        channels = (out_channels,) if depthwise else (in_channels, out_channels)
        fan_out = kernel_size * kernel_size * (1 if depthwise else out_channels)
        deviation = (2 / fan_out) ** 0.5
        shape = (kernel_size, kernel_size, *channels)
        self.kernel = nnx.Param(deviation * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.scale = nnx.Param(jnp.ones(out_channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(out_channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(out_channels, jnp.float32))

    def folded(self) -> tuple[Any, Any]:
        """Return kernel and bias of the single convolution that equals this layer.

        Returns
        -------
        kernel, bias
            kernel · g and bias − mean · g with g = scale / sqrt(variance + epsilon), in the shapes and array type of
            `self.kernel` and `self.bias`.

        Examples
        --------
        >>> from flax import nnx
        >>> layer = ConvNorm(3, 8, 1, padding=0, epsilon=1e-5, rngs=nnx.Rngs(0))
        >>> [array.shape for array in layer.folded()]
        [(1, 1, 3, 8), (8,)]
        """
        # Use only operators, so that numpy weights stay numpy and recording a graph needs no compilation.
        gain = self.scale[...] * (self.variance[...] + np.float32(self.epsilon)) ** np.float32(-0.5)
        return self.kernel[...] * gain, self.bias[...] - self.mean[...] * gain


def pad_widths(size: int, *, kernel_size: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Compute the padding before and after one axis.

    Parameters
    ----------
    size
        Length of the axis, in pixels.
    kernel_size, stride, padding
        As in `ConvNorm`.

    Returns
    -------
    before, after
        Pixels of padding.

    Examples
    --------
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
    """Apply a convolution and batch normalization.

    Parameters
    ----------
    value
        float32 (batch, height, width, in_channels), or a value of a graph being recorded.
    layer
        Convolution layer with normalization.

    Returns
    -------
    value
        float32 (batch, height', width', out_channels), or a graph value.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
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
    value: jax.Array, kernel: jax.Array, *, stride: int, pads: list[tuple[int, int]], groups: int = 1
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
    >>> import jax.numpy as jnp
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
    """Apply a ReLU, which clips negative values to 0.

    Parameters
    ----------
    value
        float32 array, or a value of a graph being recorded.

    Returns
    -------
    value
        Of the same shape.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> relu(jnp.array([-1.0, 7.0]))
    Array([0., 7.], dtype=float32)
    """
    return jax.nn.relu(value)


@singledispatch
def relu6(value: Any) -> Any:
    """Clip values to the range 0 to 6.

    Parameters
    ----------
    value
        float32 array, or a value of a graph being recorded.

    Returns
    -------
    value
        Of the same shape.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> relu6(jnp.array([-1.0, 7.0]))
    Array([0., 6.], dtype=float32)
    """
    return jax.nn.relu6(value)


@singledispatch
def add(value: Any, other: Any) -> Any:
    """Add two values of one shape.

    Parameters
    ----------
    value, other
        float32 arrays, or values of a graph being recorded.

    Returns
    -------
    value
        Of the same shape.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> add(jnp.array([1.0]), jnp.array([2.0]))
    Array([3.], dtype=float32)
    """
    return value + other


@singledispatch
def max_pool(value: Any, *, window: int, stride: int, padding: int) -> Any:
    """Take the maximum over square windows.

    Parameters
    ----------
    value
        float32 (batch, height, width, channels), or a value of a graph being recorded.
    window
        Height and width of the window, in pixels.
    stride
        Step along both axes.
    padding
        Pixels of padding on each side, which are never the maximum.

    Returns
    -------
    value
        float32 (batch, height', width', channels).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), window=3, stride=2, padding=1)[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    return nnx.max_pool(
        value, (window, window), strides=(stride, stride), padding=((padding, padding), (padding, padding))
    )


@singledispatch
def global_mean(value: Any) -> Any:
    """Average a value over height and width.

    Parameters
    ----------
    value
        float32 (batch, height, width, channels), or a value of a graph being recorded.

    Returns
    -------
    value
        float32 (batch, channels).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> global_mean(jnp.ones((2, 7, 7, 3))).shape
    (2, 3)
    """
    return value.mean(axis=(1, 2))
