"""Recorded networks that give the means of cells of an image instead of one mean of all positions."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from stimage_sd.nn.onnx_changes import shapes_of


def means_of_cells(model: onnx.ModelProto, side: int, n: int) -> onnx.ModelProto:
    """Replace the global means of a recorded network by the means of each of n × n equal cells.

    - `model`: model from `stimage_sd.nn.onnx_graph.record`, whose embedding is made of global means.
    - `side`: height and width of the images, px. A multiple of `n` times the network's coarsest stride.
    - `n`: cells per side.
    - returns: model with output `embedding`, ``float32 (batch, n_features, n, n)``.

    >>> from flax import nnx
    >>> from stimage_sd.nn.layers import ConvNorm, conv_norm, global_mean
    >>> from stimage_sd.nn.onnx_graph import record
    >>> layer = ConvNorm(3, 8, 3, padding="same", epsilon=1e-3, rngs=nnx.Rngs(0))
    >>> network = lambda tiles: global_mean(conv_norm(tiles, layer))
    >>> model = record(network, mean=[0.5] * 3, std=[0.5] * 3, embedding_size=8)
    >>> [node.op_type for node in means_of_cells(model, 64, 2).graph.node][-2:]
    ['AveragePool', 'Identity']
    """
    shapes = shapes_of(model, side, side)
    nodes, flattened = [], {}
    for node in model.graph.node:
        inputs = [flattened.get(name, name) for name in node.input]
        if node.op_type == "Flatten":
            flattened[node.output[0]] = inputs[0]
        elif node.op_type == "GlobalAveragePool":
            width = shapes[inputs[0]][2] // n
            attributes = {"kernel_shape": [width] * 2, "strides": [width] * 2}
            nodes.append(helper.make_node("AveragePool", inputs, node.output, name=node.name, **attributes))
        else:
            changed = onnx.NodeProto()
            changed.CopyFrom(node)
            changed.input[:] = inputs
            nodes.append(changed)
    shape = ["batch", "channels", n, n]
    graph = helper.make_graph(
        nodes, model.graph.name, model.graph.input,
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shape)], model.graph.initializer,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    onnx.checker.check_model(made)
    return made
