"""Recording a network as an ONNX graph, by running it on symbolic values.

`record` calls the network with a `Symbol`, and every primitive of `stimage_sd.nn.layers` that the network
applies to it adds its nodes to the graph. The graph's values are NCHW, as ONNX's convolutions are; the
input is uint8 NHWC tiles and the output float32 embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from stimage_sd.nn.densenet import Convolution, Norm, concatenate, convolution, halve, norm
from stimage_sd.nn.hovernet import Conv, conv, double, trim
from stimage_sd.nn.layers import ConvNorm, add, conv_norm, global_mean, max_pool, relu, relu6

# Old enough for runtimes of several years, new enough for every operator used here.
OPSET = 17
IR_VERSION = 8


@dataclass
class Graph:
    """Nodes and constants of a graph being recorded.

    Examples
    --------
    >>> import numpy as np
    >>> graph = Graph()
    >>> graph.node("Relu", [graph.constant(np.zeros(3, np.float32))])
    'relu_1'
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def constant(self, array: NDArray[np.generic]) -> str:
        """Add a constant array and give its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output and give the output's name."""
        name = f"{operator.lower()}_{len(self.nodes) + 1}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name


@dataclass(frozen=True)
class Symbol:
    """A value of a graph being recorded: float32, NCHW.

    `scale`, where it is set, is a factor a channel that the value still lacks; the convolution that follows
    takes it into its kernel.

    Examples
    --------
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
    if layer.depthwise:
        kernel = kernel[:, :, None]
    if value.scale is not None:
        kernel = kernel * value.scale[:, None]
    pads = {"auto_pad": "SAME_UPPER"} if layer.padding == "same" else {"pads": [layer.padding] * 4}
    inputs = [value.name, value.graph.constant(kernel.transpose(3, 2, 0, 1)), value.graph.constant(bias)]
    name = value.graph.node(
        "Conv",
        inputs,
        kernel_shape=[layer.kernel_size] * 2,
        strides=[layer.stride] * 2,
        group=kernel.shape[3] if layer.depthwise else 1,
        **pads,
    )
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
    gain, shift = (np.asarray(array, np.float32).reshape(1, -1, 1, 1) for array in layer.folded())
    return value.then("Mul", value.graph.constant(gain)).then("Add", value.graph.constant(shift))


@convolution.register
def _(value: Symbol, layer: Convolution) -> Symbol:
    kernel = value.graph.constant(np.asarray(layer.kernel[...], np.float32).transpose(3, 2, 0, 1))
    return value.then("Conv", kernel, kernel_shape=[layer.kernel_size] * 2, pads=[layer.kernel_size // 2] * 4)


@conv.register
def _(value: Symbol, layer: Conv) -> Symbol:
    kernel = np.asarray(layer.kernel[...], np.float32)
    if value.scale is not None:
        kernel = kernel * value.scale[:, None]
    inputs = [value.name, value.graph.constant(kernel.transpose(3, 2, 0, 1))]
    if layer.bias is not None:
        inputs.append(value.graph.constant(np.asarray(layer.bias[...], np.float32)))
    name = value.graph.node(
        "Conv",
        inputs,
        kernel_shape=[layer.kernel_size] * 2,
        strides=[layer.stride] * 2,
        group=layer.groups,
        auto_pad="SAME_UPPER" if layer.padding == "same" else "VALID",
    )
    return Symbol(value.graph, name)


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

    The mean is subtracted before the first convolution, and the division goes into its kernel: zeros that
    the convolution pads with are then the zeros of normalised tiles, so that borders are exact.

    Parameters
    ----------
    network
        A module of `stimage_sd.nn`, or any function over the primitives of `stimage_sd.nn.layers`, whose
        first layer is a convolution.
    mean, std
        Of red, green and blue on the scale 0 … 1: the network sees (tiles / 255 − mean) / std.
    embedding_size
        Length of an embedding; None where the network gives an image, as the first parts of one do.

    Returns
    -------
    onnx.ModelProto
        Input `tiles`, uint8 (batch, height, width, 3), all three sizes free; output `embedding`, float32
        (batch, embedding_size), or (batch, channels, height, width).

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
    # Transposing bytes moves a quarter of what transposing floats would.
    channels_first = graph.node("Transpose", ["tiles"], perm=[0, 3, 1, 2])
    pixels = graph.node("Cast", [channels_first], to=TensorProto.FLOAT)
    # In float64 until here, so that a mean of 127 / 255 becomes exactly 127 levels.
    levels = (255 * np.asarray(mean, np.float64)).astype(np.float32)
    scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
    centred = graph.node("Sub", [pixels, graph.constant(levels.reshape(1, 3, 1, 1))])
    result = network(Symbol(graph, centred, scale))
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
