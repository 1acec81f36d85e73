"""HoVer-Net's description: parameters and shapes, layer by layer, and what training and the recorded graph do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from flax import nnx

from stimage_sd.nn import onnx_graph
from stimage_sd.nn.hovernet import SIZES, HoVerNet, HoVerNetSize, as_fitted, as_trained, batch_norm, n_parameters
from stimage_sd.nn.layers import Norm

FAST = HoVerNetSize(kernel_size=3, padding="valid")
ORIGINAL = HoVerNetSize(padding="valid", pad_stem=False)


def blank(n_types: int, size: HoVerNetSize) -> HoVerNet:
    return nnx.eval_shape(lambda: HoVerNet(n_types, size=size, rngs=nnx.Rngs(0)))


def counted(network: nnx.Module) -> int:
    leaves = jax.tree.leaves(nnx.state(network, nnx.Param), is_leaf=lambda node: isinstance(node, nnx.Variable))
    return sum(int(np.prod(variable.shape)) for variable in leaves)


def by_hand(n_types: int, kernel: int) -> dict[str, int]:
    """Numbers of the published network: kernels, and two a channel for each normalization."""

    def residual(before: int, width: int, depth: int) -> int:
        out = 4 * width
        units = [before] + [out] * (depth - 1)
        kernels = sum(inputs * width + 9 * width * width + width * out for inputs in units)
        norms = 4 * width * depth + 2 * out * (depth - 1) + 2 * out
        return kernels + norms + before * out

    def dense(before: int, width: int, count: int, out: int) -> int:
        channels = [width + 32 * n for n in range(count)]
        units = sum(2 * c + c * 128 + 2 * 128 + kernel**2 * 128 * 32 // 4 for c in channels)
        last = width + 32 * count
        return kernel**2 * before * width + units + 2 * last + last * out

    def decoder(n_maps: int) -> int:
        blocks = dense(1024, 256, 8, 512) + dense(512, 128, 4, 256)
        return blocks + kernel**2 * 256 * 64 + 2 * 64 + 64 * n_maps + n_maps

    return {
        "stem": 49 * 3 * 64 + 2 * 64,
        "blocks": residual(64, 64, 3) + residual(256, 128, 4) + residual(512, 256, 6) + residual(1024, 512, 3),
        "bottom": 2048 * 1024,
        "nuclear": decoder(2),
        "hv": decoder(2),
        "types": decoder(n_types + 1),
    }


@pytest.mark.parametrize(("size", "kernel"), [(SIZES["published"], 5), (FAST, 3), (ORIGINAL, 5)])
def test_parameters_are_those_of_the_description(size: HoVerNetSize, kernel: int) -> None:
    network, expected = blank(5, size), by_hand(5, kernel)
    for name, count in expected.items():
        assert counted(getattr(network, name)) == count, name
    assert counted(network) == sum(expected.values())


def test_the_published_count() -> None:
    """37.6 million for the variant of 256 px tiles and five types, as other work reports it."""
    assert counted(blank(5, FAST)) == 37_639_626


@pytest.mark.slow
def test_shapes_layer_by_layer() -> None:
    """270 px in, 80 px out; 256 in, 164 out; and with padding as many out as in."""
    blocks: list[tuple[int, ...]] = []

    def noted(module: nnx.Module, value: jax.Array) -> jax.Array:
        found = as_fitted(module, value)
        if not isinstance(found, tuple):
            blocks.append(found.shape[1:])
        return found

    for size, side, out in ((ORIGINAL, 270, 80), (FAST, 256, 164), (SIZES["published"], 256, 256)):
        blocks.clear()
        maps = jax.eval_shape(
            lambda tiles, size=size: HoVerNet(5, size=size, rngs=nnx.Rngs(0))(tiles, noted),
            jnp.zeros((1, side, side, 3)),
        )
        assert [of.shape for of in maps] == [(1, out, out, n) for n in (2, 2, 6, 64)]
        first = side - 6 if size is ORIGINAL else side
        assert blocks == [(first, first, 64), *((first // 2**n, first // 2**n, 256 * 2**n) for n in range(4))]


@pytest.mark.slow
def test_the_recorded_graph_equals_the_module() -> None:
    for size, side in ((SIZES["small"], 64), (HoVerNetSize(8, (2, 1, 1, 1), (2, 1), 3, "valid"), 96)):
        network = HoVerNet(3, size=size, rngs=nnx.Rngs(0))
        for _, variable in nnx.iter_graph(network):
            if isinstance(variable, nnx.BatchStat):
                variable.set_value(variable[...] + 0.3)
        tiles = np.random.default_rng(0).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
        expected = np.asarray(nnx.jit(lambda net, x: net.stacked(x))(network, jnp.asarray(tiles, jnp.float32) / 255))
        graph = onnx_graph.record(network.stacked, mean=[0.0] * 3, std=[1.0] * 3, embedding_size=None)
        found = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"tiles": tiles})[0]
        np.testing.assert_allclose(found.transpose(0, 2, 3, 1), expected, atol=1e-4 * np.abs(expected).max())


def test_batch_norm_normalizes_and_follows() -> None:
    layer = Norm(3)
    value = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (4, 8, 8, 3)), jnp.float32)
    for _ in range(200):
        found = batch_norm(value, layer)
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(found.var((0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(layer.mean[...], value.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(layer.variance[...], np.var(np.asarray(value), axis=(0, 1, 2), ddof=1), rtol=1e-4)


@pytest.mark.slow
def test_computing_activations_again_changes_no_gradient() -> None:
    network = HoVerNet(2, size=HoVerNetSize(8, (1, 1, 1, 1), (1, 1), 3), rngs=nnx.Rngs(0))
    graph, parameters, rest = nnx.split(network, nnx.Param, ...)
    tiles = jnp.asarray(np.random.default_rng(0).random((2, 32, 32, 3)), jnp.float32)

    def loss(parameters, run):
        return sum((maps**2).mean() for maps in nnx.merge(graph, parameters, rest, copy=True)(tiles, run))

    plain, again = (
        jax.jit(jax.grad(lambda p, run=run: loss(p, run)))(parameters)
        for run in (lambda module, value: module(value, batch_norm), as_trained)
    )
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(float(jnp.abs(one).max()), 1e-3))
    assert n_parameters(network) == counted(network)
