"""Recording of a network as an ONNX graph, by running the network on symbolic values.

`record` calls the network with a `Symbol`. Every primitive of `stimage_sd.nn.layers` that is applied to the symbol adds
nodes to the graph. Graph values are NCHW, as ONNX convolutions expect. The input is uint8 NHWC tiles, the output
float32 embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from stimage_sd.nn.layers import (
    Conv,
    ConvNorm,
    Norm,
    add,
    concatenate,
    conv,
    conv_norm,
    double,
    global_mean,
    halve,
    max_pool,
    norm,
    relu,
    relu6,
    trim,
)

# Supported by runtimes of the last several years, and has every operator used here.
OPSET = 17
IR_VERSION = 8


@dataclass
class Graph:
    """Nodes and constants of an ONNX graph being recorded.

    >>> import numpy as np
    >>> graph = Graph()
    >>> graph.node("Relu", [graph.constant(np.zeros(3, np.float32))])
    'relu_1'
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def constant(self, array: NDArray[np.generic]) -> str:
        """Add a constant array and return its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output and return the name of the output."""
        name = f"{operator.lower()}_{len(self.nodes) + 1}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name


@dataclass(frozen=True)
class Symbol:
    """Value of a graph being recorded, float32 in NCHW order.

    `scale`, if set, is a pending factor per channel. The next convolution multiplies its kernel by this factor.

    >>> Symbol(Graph(), "tiles").name
    'tiles'
    """

    graph: Graph
    name: str
    scale: NDArray[np.float32] | None = None

    def then(self, operator: str, *inputs: str, **attributes: Any) -> Symbol:
        """Apply an operator to this value and further inputs."""
        if self.scale is not None:
            raise ValueError(f"Expected a convolution as the first layer after the input, found {operator}.")
        return Symbol(self.graph, self.graph.node(operator, [self.name, *inputs], **attributes))


@conv_norm.register
def _(value: Symbol, layer: ConvNorm) -> Symbol:
    kernel, bias = (np.asarray(array, np.float32) for array in layer.folded())
    kernel, groups = (kernel[:, :, None], kernel.shape[2]) if layer.depthwise else (kernel, 1)
    pads = {"auto_pad": "SAME_UPPER"} if layer.padding == "same" else {"pads": [layer.padding] * 4}
    return _convolved(value, kernel, bias, stride=layer.stride, groups=groups, **pads)


@conv.register
def _(value: Symbol, layer: Conv) -> Symbol:
    kernel = np.asarray(layer.kernel[...], np.float32)
    bias = None if layer.bias is None else np.asarray(layer.bias[...], np.float32)
    pads = "SAME_UPPER" if layer.padding == "same" else "VALID"
    return _convolved(value, kernel, bias, stride=layer.stride, groups=layer.groups, auto_pad=pads)


def _convolved(
    value: Symbol,
    kernel: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    *,
    stride: int,
    groups: int,
    **pads: Any,
) -> Symbol:
    """Add a convolution, with the pending factor per channel in its kernel."""
    if value.scale is not None:
        kernel = kernel * value.scale[:, None]
    arrays = (kernel.transpose(3, 2, 0, 1), *(() if bias is None else (bias,)))
    inputs = [value.name, *map(value.graph.constant, arrays)]
    shape, strides = list(kernel.shape[:2]), [stride] * 2
    name = value.graph.node("Conv", inputs, kernel_shape=shape, strides=strides, group=groups, **pads)
    return Symbol(value.graph, name)


@relu.register
def _(value: Symbol) -> Symbol:
    return value.then("Relu")


@relu6.register
def _(value: Symbol) -> Symbol:
    low, high = (value.graph.constant(np.asarray(bound, np.float32)) for bound in (0, 6))
    return value.then("Clip", low, high)


@add.register
def _(value: Symbol, other: Symbol) -> Symbol:
    return value.then("Add", other.name)


@max_pool.register
def _(value: Symbol, *, window: int, stride: int, padding: int) -> Symbol:
    return value.then("MaxPool", kernel_shape=[window] * 2, strides=[stride] * 2, pads=[padding] * 4)


@global_mean.register
def _(value: Symbol) -> Symbol:
    return value.then("GlobalAveragePool").then("Flatten", axis=1)


@norm.register
def _(value: Symbol, layer: Norm) -> Symbol:
    # Runtimes fold this operator into the convolution before it, or run it with the activation after it as one step.
    gain, shift = (np.asarray(array, np.float32).ravel() for array in layer.gain_and_shift())
    arrays = map(value.graph.constant, (gain, shift, np.zeros_like(gain), np.ones_like(gain)))
    return value.then("BatchNormalization", *arrays, epsilon=0.0)


@double.register
def _(value: Symbol) -> Symbol:
    scales = value.graph.constant(np.array([1, 1, 2, 2], np.float32))
    return value.then(
        "Resize", "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


@trim.register
def _(value: Symbol, pixels: int) -> Symbol:
    if pixels == 0:
        return value
    starts, ends, axes = (
        value.graph.constant(np.array(pair, np.int64)) for pair in ([pixels] * 2, [-pixels] * 2, [2, 3])
    )
    return value.then("Slice", starts, ends, axes)


@concatenate.register
def _(value: Symbol, others: Sequence[Symbol]) -> Symbol:
    return value.then("Concat", *(other.name for other in others), axis=1)


@halve.register
def _(value: Symbol) -> Symbol:
    return value.then("AveragePool", kernel_shape=[2, 2], strides=[2, 2])


def record(
    network: Callable[[Symbol], Symbol],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    embedding_size: int | None,
) -> onnx.ModelProto:
    """Record a network as an ONNX model that takes uint8 tiles.

    The mean is subtracted before the first convolution, and the kernel of this convolution includes the division by
    `std`. Padding with zeros then equals zeros of normalized tiles, so borders are exact.

    Parameters
    ----------
    network
        Module of `stimage_sd.nn`, or any function of the primitives of `stimage_sd.nn.layers`. The first layer must be
        a convolution.
    mean, std
        Mean and deviation of red, green and blue on the scale 0 to 1. The network gets (tiles / 255 − mean) / std.
    embedding_size
        Length of an embedding. None if the network returns an image, such as the first parts of a network.

    Returns
    -------
    onnx.ModelProto
        Model with input `tiles`, uint8 (batch, height, width, 3) of any batch, height and width, and output
        `embedding`, float32 (batch, embedding_size) or (batch, channels, height, width).

    Examples
    --------
    >>> from flax import nnx
    >>> from stimage_sd.nn.layers import ConvNorm
    >>> layer = ConvNorm(3, 8, 3, padding="same", epsilon=1e-3, rngs=nnx.Rngs(0))
    >>> def network(tiles):
    ...     return global_mean(conv_norm(tiles, layer))
    >>> model = record(network, mean=[0.5] * 3, std=[0.5] * 3, embedding_size=8)
    >>> [value.name for value in (*model.graph.input, *model.graph.output)]
    ['tiles', 'embedding']
    """
    graph = Graph()
    # Transposing bytes moves a quarter of the memory of transposing floats.
    channels_first = graph.node("Transpose", ["tiles"], perm=[0, 3, 1, 2])
    pixels = graph.node("Cast", [channels_first], to=TensorProto.FLOAT)
    # Compute in float64, so that a mean of 127 / 255 becomes exactly 127 levels.
    levels = (255 * np.asarray(mean, np.float64)).astype(np.float32)
    scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
    centered = graph.node("Sub", [pixels, graph.constant(levels.reshape(1, 3, 1, 1))])
    result = network(Symbol(graph, centered, scale))
    graph.nodes.append(helper.make_node("Identity", [result.name], ["embedding"]))
    tiles = helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["batch", "height", "width", 3])
    shape: list[str | int | None] = ["batch", embedding_size]
    if embedding_size is None:
        shape = ["batch", "channels", "rows", "columns"]
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph(graph.nodes, "extractor", [tiles], [embedding], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="stimage-sd",
    )
    onnx.checker.check_model(model)
    return model
