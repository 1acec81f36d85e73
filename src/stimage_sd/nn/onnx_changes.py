"""Recorded networks that compute anew only what a changed box of pixels can change.

Copies of an image that differ inside one box share all values outside the box's field of influence. `changed_part`
rewrites a recorded network for such copies. Each layer runs on the box that the changed pixels reach. Where a window
reads beyond this box, the values of the unchanged image surround it. Results equal those of the whole network, to
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

#: operators that treat every position alike, besides convolutions of one pixel
_POINTWISE = {"Cast", "Sub", "Add", "BatchNormalization", "Relu", "Clip", "Concat"}
#: operators that read a window of positions
_WINDOWED = {"Conv", "MaxPool", "AveragePool"}
#: operators on vectors, which have no positions, after a global mean
_OF_VECTORS = {"Flatten", "Concat", "Identity"}


class Box(NamedTuple):
    """Rows from `top` to `bottom` and columns from `left` to `right`, ends excluded.

    >>> Box(0, 0, 2, 3).contains(Box(1, 1, 2, 2))
    True
    """

    top: int
    left: int
    bottom: int
    right: int

    @property
    def area(self) -> int:
        """Number of positions."""
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Slices of rows and columns."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def contains(self, other: Box) -> bool:
        """Whether the other box lies inside."""
        return self == self.union(other)

    def union(self, other: Box) -> Box:
        """Return the smallest box around both."""
        return Box(*map(min, self[:2], other[:2]), *map(max, self[2:], other[2:]))

    def margins(self, inner: Box) -> list[int]:
        """Return the rows and columns around an inner box: top, left, bottom, right."""
        return [
            inner.top - self.top, inner.left - self.left, self.bottom - inner.bottom, self.right - inner.right
        ]  # fmt: skip


class Surroundings(NamedTuple):
    """Values of the unchanged image around a changed box.

    - `value`: name of a value of the recorded network.
    - `box`: positions that are needed.
    - `changed`: positions that copies replace, inside `box`.
    """

    value: str
    box: Box
    changed: Box

    def of(self, values: np.ndarray) -> np.ndarray:
        """Cut the surroundings from a value of the unchanged image, ``(1, channels, y, x)``, 0 where it changes."""
        cut = values[:, :, *self.box.slices].copy()
        top, left, bottom, right = self.box.margins(self.changed)
        cut[:, :, top : cut.shape[2] - bottom, left : cut.shape[3] - right] = 0
        return cut


class Rest(NamedTuple):
    """Share of the unchanged positions in a global mean."""

    value: str
    changed: Box

    def of(self, values: np.ndarray) -> np.ndarray:
        """Sum the unchanged positions of a value, ``(1, channels, y, x)``, and divide by all positions."""
        whole, inside = (part.sum(axis=(2, 3), keepdims=True, dtype=np.float64) for part in
                         (values, values[:, :, *self.changed.slices]))  # fmt: skip
        return ((whole - inside) / (values.shape[2] * values.shape[3])).astype(np.float32)


@dataclass(frozen=True)
class ChangedPart:
    """A network for copies of an image that differ in one box.

    - `model`: takes input `tiles`, the crops of the copies, and one input per entry of `shared`, named as its key.
      Its output `embedding` equals that of the recorded network for the whole copies.
    - `crop`: box to cut from the copies.
    - `shared`: inputs to compute once, from values of the recorded network for the unchanged image.
    """

    model: onnx.ModelProto
    crop: Box
    shared: dict[str, Surroundings | Rest]


def changed_part(model: onnx.ModelProto, height: int, width: int, box: Box) -> ChangedPart | None:
    """Rewrite a recorded network for copies of an image that differ in one box.

    - `model`: model from `stimage_sd.nn.onnx_graph.record`.
    - `height`, `width`: size of the images, px.
    - `box`: pixels that differ between copies.
    - returns: the rewritten network, or `None` if a layer is of an unknown kind, such as one that mixes all positions
      before the global mean.

    >>> from flax import nnx
    >>> from stimage_sd.nn.layers import ConvNorm, conv_norm, global_mean
    >>> from stimage_sd.nn.onnx_graph import record
    >>> layer = ConvNorm(3, 8, 3, padding="same", epsilon=1e-3, rngs=nnx.Rngs(0))
    >>> network = lambda tiles: global_mean(conv_norm(tiles, layer))
    >>> model = record(network, mean=[0.5] * 3, std=[0.5] * 3, embedding_size=8)
    >>> changed_part(model, 64, 64, Box(30, 30, 40, 40)).crop
    Box(top=28, left=28, bottom=42, right=42)
    """
    rewriting = _Rewriting(model, height, width, box)
    for node in model.graph.node:
        if not rewriting.add(node):
            return None
    return rewriting.finished()


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a recorded network whose outputs are the named values instead of the embedding."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    del copied.graph.output[:]
    copied.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return copied


class _Rewriting:
    """The new network while it is written, node by node of the recorded one."""

    def __init__(self, model: onnx.ModelProto, height: int, width: int, box: Box) -> None:
        self.recorded = model
        self.shapes = shapes_of(model, height, width)
        self.box = box
        self.nodes: list[onnx.NodeProto] = []
        self.constants = list(model.graph.initializer)
        self.shared: dict[str, Surroundings | Rest] = {}
        self.crops: set[Box] = set()
        self.producers: dict[str, onnx.NodeProto] = {}
        self.changed: dict[str, Box] = {}  # positions that the changed pixels reach, of each value with positions
        self.made: dict[tuple[str, Box], str] = {}  # names in the new network

    def add(self, node: onnx.NodeProto) -> bool:
        """Add a node of the recorded network. Return whether it is of a known kind."""
        name = node.output[0]
        maps = [value for value in node.input if value in self.changed]
        self.producers[name] = node
        if node.op_type == "Transpose" and "tiles" in node.input:
            self.changed[name] = self.box
        elif node.op_type == "GlobalAveragePool" and maps:
            self._add_mean(node)
        elif maps and _is_pointwise(node):
            self.changed[name] = _around([self.changed[value] for value in maps])
        elif maps and node.op_type in _WINDOWED:
            self.changed[name] = self._reached(node)
            if self.changed[name].area == 0:
                return False
            self._at(name, self.changed[name])  # in the order of the recorded network, so that no recursion is deep
        elif not maps and node.op_type in _OF_VECTORS:
            self.nodes.append(node)
        else:
            return False
        return True

    def finished(self) -> ChangedPart | None:
        """Return the new network, or `None` if it is not as every network of this package begins and ends."""
        if len(self.crops) != 1 or not any("embedding" in node.output for node in self.nodes):
            return None
        recorded = self.recorded.graph
        inputs = [helper.make_tensor_value_info("tiles", TensorProto.UINT8, ["batch", "height", "width", 3])]
        for name in self.shared:
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, None, None]))
        graph = helper.make_graph(self.nodes, recorded.name, inputs, list(recorded.output), self.constants)
        model = helper.make_model(
            graph, opset_imports=list(self.recorded.opset_import), ir_version=self.recorded.ir_version
        )
        onnx.checker.check_model(model)
        return ChangedPart(model, next(iter(self.crops)), self.shared)

    # ----------------------------------------------------------------------------------------------
    # values at a box

    def _at(self, value: str, box: Box) -> str:
        """Return the name of a value at a box, written on first use."""
        if (value, box) not in self.made:
            self.made[value, box] = self._write(value, box)
        return self.made[value, box]

    def _write(self, value: str, box: Box) -> str:
        node, changed = self.producers[value], self.changed[value]
        if node.op_type == "Transpose":
            self.crops.add(box)
            return self._node(node, list(node.input))
        if box != changed and changed.contains(box):
            return self._cut(value, box)
        if _is_pointwise(node) and (box == changed or self._is_cheap(node)):
            return self._node(node, [self._at(name, box) if name in self.changed else name for name in node.input])
        if box == changed:
            return self._write_windows(node, box)
        return self._surround(value, box)

    def _write_windows(self, node: onnx.NodeProto, box: Box) -> str:
        """Write a node that reads windows, for the outputs in a box. Windows beyond the image are padded as before."""
        starts, stops, pads = [], [], []
        for axis, window in enumerate(self._windows(node)):
            size = self.shapes[node.input[0]][2 + axis]
            first, last = window.reads(box[axis], box[2 + axis])
            starts.append(max(first, 0))
            stops.append(min(last, size))
            pads.append((max(-first, 0), max(last - size, 0)))
        inner = self._at(node.input[0], Box(*starts, *stops))
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute if item.name != "auto_pad"}
        attributes["pads"] = [pad[0] for pad in pads] + [pad[1] for pad in pads]
        name = self._name(node.output[0])
        self.nodes.append(helper.make_node(node.op_type, [inner, *node.input[1:]], [name], **attributes))
        return name

    def _surround(self, value: str, box: Box) -> str:
        """Set a changed value into the values of the unchanged image around it."""
        changed = self.changed[value]
        top, left, bottom, right = box.margins(changed)
        pads = self._constant([0, 0, top, left, 0, 0, bottom, right])
        padded = self._node("Pad", [self._at(value, changed), pads])
        return self._node("Add", [padded, self._share(Surroundings(value, box, changed))])

    def _cut(self, value: str, box: Box) -> str:
        changed = self.changed[value]
        top, left, *_ = changed.margins(box)
        starts, ends = [top, left], [top + box.bottom - box.top, left + box.right - box.left]
        constants = [self._constant(numbers) for numbers in (starts, ends, [2, 3])]
        return self._node("Slice", [self._at(value, changed), *constants])

    def _add_mean(self, node: onnx.NodeProto) -> None:
        """Write a global mean as the changed positions' part and the shared part of the others."""
        value, name = node.input[0], node.output[0]
        changed = self.changed[value]
        _, _, height, width = self.shapes[value]
        part = self._node(node, [self._at(value, changed)])
        share = self._constant(np.float32(changed.area / (height * width)))
        rest = self._share(Rest(value, changed))
        self.nodes.append(helper.make_node("Add", [self._node("Mul", [part, share]), rest], [name]))

    def _is_cheap(self, node: onnx.NodeProto) -> bool:
        """Whether surrounding the inputs takes no more memory than surrounding the output."""
        maps = [name for name in node.input if name in self.changed]
        return len(maps) == 1 and self.shapes[maps[0]][1] <= self.shapes[node.output[0]][1]

    # ----------------------------------------------------------------------------------------------
    # windows

    def _windows(self, node: onnx.NodeProto) -> list[_Window]:
        sizes, results = self.shapes[node.input[0]][2:], self.shapes[node.output[0]][2:]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        kernel, strides = attributes["kernel_shape"], attributes.get("strides", [1, 1])
        windows = []
        for axis in range(2):
            before = attributes["pads"][axis] if "pads" in attributes else 0
            if attributes.get("auto_pad", b"NOTSET") == b"SAME_UPPER":
                before = max((results[axis] - 1) * strides[axis] + kernel[axis] - sizes[axis], 0) // 2
            windows.append(_Window(kernel[axis], strides[axis], before))
        return windows

    def _reached(self, node: onnx.NodeProto) -> Box:
        """Return the outputs whose windows read a changed input."""
        changed, results = self.changed[node.input[0]], self.shapes[node.output[0]][2:]
        spans = [
            window.reached(changed[axis], changed[2 + axis], results[axis])
            for axis, window in enumerate(self._windows(node))
        ]
        return Box(spans[0][0], spans[1][0], spans[0][1], spans[1][1])

    # ----------------------------------------------------------------------------------------------
    # names

    def _name(self, kind: str) -> str:
        return f"{kind}_changed_{len(self.nodes)}"

    def _node(self, like: onnx.NodeProto | str, inputs: list[str]) -> str:
        """Write a node of a kind, or one like a recorded node, and return the name of its output."""
        if isinstance(like, str):
            node = helper.make_node(like, inputs, [self._name(like.lower())])
        else:
            node = onnx.NodeProto()
            node.CopyFrom(like)
            node.input[:], node.output[:] = inputs, [self._name(like.output[0])]
            node.name = node.output[0]
        self.nodes.append(node)
        return str(node.output[0])

    def _constant(self, values: Any) -> str:
        array = np.asarray(values)
        name = f"constant_changed_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def _share(self, what: Surroundings | Rest) -> str:
        name = f"shared_{len(self.shared)}"
        self.shared[name] = what
        return name


class _Window(NamedTuple):
    """Window of a convolution or pooling along one axis: output ``i`` reads from ``i * stride - before``."""

    size: int
    stride: int
    before: int

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """Return the inputs that a range of outputs reads. They may lie beyond the image."""
        return start * self.stride - self.before, (stop - 1) * self.stride - self.before + self.size

    def reached(self, start: int, stop: int, n_outputs: int) -> tuple[int, int]:
        """Return the outputs that read any input of a range."""
        first = (start - self.size + self.before) // self.stride + 1
        last = -((-stop - self.before) // self.stride)
        return max(first, 0), min(last, n_outputs)


def _is_pointwise(node: onnx.NodeProto) -> bool:
    if node.op_type != "Conv":
        return node.op_type in _POINTWISE
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    ones = attributes["kernel_shape"] == [1, 1] and attributes.get("strides", [1, 1]) == [1, 1]
    return ones and not any(attributes.get("pads", [0]))


def _around(boxes: Sequence[Box]) -> Box:
    first, *others = boxes
    for box in others:
        first = first.union(box)
    return first


def shapes_of(model: onnx.ModelProto, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Infer the shape of every value for one image of a size."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for dimension, size in zip(sized.graph.input[0].type.tensor_type.shape.dim, (1, height, width, 3), strict=True):
        dimension.dim_value = size
    inferred = shape_inference.infer_shapes(sized).graph
    return {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in inferred.value_info
    }
