from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stimage_sd.nn import layers, onnx_graph
from stimage_sd.nn.densenet import DenseNet121
from stimage_sd.nn.efficientnet import SCALINGS, EfficientNetLite, InvertedResidual, Scaling
from stimage_sd.nn.onnx_changes import Box, changed_part, with_outputs
from stimage_sd.nn.parts import parts_of, run_parts, variables_of
from stimage_sd.nn.resnet import ResNet50
from stimage_sd.nn.vision_transformer import SIZES, Block, Size, VisionTransformer

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NORM_RANGES = (("scale", 0.7, 1.3), ("bias", -0.3, 0.3), ("mean", -0.3, 0.3), ("variance", 0.7, 1.5))
NETWORKS = {
    **{f"efficientnet_{name}": (partial(EfficientNetLite, scaling), 1280) for name, scaling in SCALINGS.items()},
    "resnet50": (ResNet50, 2048),
    "densenet121": (DenseNet121, 1024),
}


def with_random_weights(network: Callable[..., nnx.Module]) -> nnx.Module:
    """Random kernels of a size that keeps activations near 1, and batch norms that are not the identity."""
    random = np.random.default_rng(7)
    built = nnx.eval_shape(lambda: network(rngs=nnx.Rngs(0)))
    for _, layer in nnx.iter_modules(built):
        if isinstance(layer, layers.Conv):
            deviation = (2 / np.prod(layer.kernel.shape[:3])) ** 0.5
            layer.kernel.set_value(jnp.asarray(random.normal(0, deviation, layer.kernel.shape), jnp.float32))
        if type(layer) is layers.Norm:
            channels = layer.scale.shape
            for name, low, high in NORM_RANGES:
                getattr(layer, name).set_value(jnp.asarray(random.uniform(low, high, channels), jnp.float32))
        if isinstance(layer, layers.ConvNorm):
            shape = layer.kernel.shape
            fan_in = np.prod(shape[:2] if layer.depthwise else shape[:3])
            channels = shape[-1]
            values = {
                "kernel": random.normal(0, (2 / fan_in) ** 0.5, shape),
                "scale": random.uniform(0.7, 1.3, channels),
                "bias": random.normal(0, 0.2, channels),
                "mean": random.normal(0, 0.2, channels),
                "variance": random.uniform(0.7, 1.5, channels),
            }
            for name, value in values.items():
                getattr(layer, name).set_value(jnp.asarray(value, jnp.float32))
    return built


@pytest.fixture(
    scope="module",
    params=[
        "efficientnet_lite0",
        "efficientnet_lite1",
        "efficientnet_lite2",
        "resnet50",
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
def recorded(request: pytest.FixtureRequest) -> tuple[nnx.Module, onnx.ModelProto]:
    kind, size = NETWORKS[request.param]
    built = with_random_weights(kind)
    return built, onnx_graph.record(built, mean=MEAN, std=STD, embedding_size=size)


def in_onnx(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def network(recorded) -> tuple[nnx.Module, onnxruntime.InferenceSession]:
    return recorded[0], in_onnx(recorded[1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(224, 224), (299, 299), (65, 98)])
def test_onnx_graph_equals_flax_module(network, shape):
    module, session = network
    tiles = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    tiles[1] = 255  # a bright border is where padding before or after normalization differs
    recorded = session.run(["embedding"], {"tiles": tiles})[0]
    normalized = (tiles.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    direct = nnx.jit(lambda network, tiles: network(tiles))(module, jnp.asarray(normalized))
    assert recorded.dtype == np.float32
    assert direct.dtype == jnp.float32
    scale = np.abs(direct).max()
    assert scale > 0.1
    np.testing.assert_allclose(recorded, direct, rtol=1e-4, atol=1e-4 * scale)


def test_onnx_batch_is_free(network):
    _, session = network
    tiles = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    together = session.run(["embedding"], {"tiles": tiles})[0]
    apart = np.concatenate([session.run(["embedding"], {"tiles": tile[None]})[0] for tile in tiles])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


# a box inside, boxes at a border and a corner, and a single pixel
@pytest.mark.parametrize(
    "recorded",
    ["efficientnet_lite0", "resnet50", pytest.param("densenet121", marks=pytest.mark.slow)],
    indirect=True,
)
@pytest.mark.parametrize("box", [(40, 30, 57, 49), (0, 60, 20, 75), (81, 0, 96, 33), (50, 50, 51, 51)])
def test_a_changed_box_gives_the_embeddings_of_whole_images(recorded, network, box):
    box = Box(*box)
    random = np.random.default_rng(2)
    image = random.integers(0, 256, (96, 75, 3), dtype=np.uint8)
    copies = np.repeat(image[None], 3, axis=0)
    copies[1:, *box.slices] = random.integers(
        0, 256, (2, box.bottom - box.top, box.right - box.left, 3), dtype=np.uint8
    )
    expected = network[1].run(["embedding"], {"tiles": copies})[0]
    part = changed_part(recorded[1], 96, 75, box)
    names = list({shared.value for shared in part.shared.values()})
    of_image = dict(
        zip(names, in_onnx(with_outputs(recorded[1], names)).run(names, {"tiles": image[None]}), strict=True)
    )
    shared = {name: one.of(of_image[one.value]) for name, one in part.shared.items()}
    found = in_onnx(part.model).run(["embedding"], {"tiles": copies[:, *part.crop.slices], **shared})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected[1] - expected[0]).max() > 1e-4 * np.abs(expected).max()
    assert part.crop.area < 0.7 * 96 * 75


def test_a_network_of_unknown_layers_is_not_rewritten():
    layer = layers.ConvNorm(3, 4, 3, padding="same", epsilon=1e-3, rngs=nnx.Rngs(0))
    graph = onnx_graph.record(
        lambda tiles: layers.global_mean(layers.double(layers.conv_norm(tiles, layer))),
        mean=MEAN, std=STD, embedding_size=4,
    )  # fmt: skip
    assert changed_part(graph, 32, 32, Box(4, 4, 9, 9)) is None


# Blocks and channels of the stages as they are in the released files, and in timm's tf_efficientnet_lite3 and 4.
@pytest.mark.parametrize(
    ("scaling", "repeats", "channels"),
    [
        (SCALINGS["lite0"], (1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
        (SCALINGS["lite1"], (1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
        (SCALINGS["lite2"], (1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
        (Scaling(1.2, 1.4), (1, 3, 3, 5, 5, 6, 1), (24, 32, 48, 96, 136, 232, 384)),
        (Scaling(1.4, 1.8), (1, 4, 4, 6, 6, 8, 1), (24, 32, 56, 112, 160, 272, 448)),
    ],
    ids=["lite0", "lite1", "lite2", "lite3", "lite4"],
)
def test_efficientnet_lite_is_scaled_in_the_middle(scaling, repeats, channels):
    network = nnx.eval_shape(lambda: EfficientNetLite(scaling, rngs=nnx.Rngs(0)))
    found = [block.project.kernel.shape[-1] for block in network.blocks]
    assert found == [number for count, number in zip(repeats, channels, strict=True) for _ in range(count)]
    assert network.stem.kernel.shape == (3, 3, 3, 32)
    assert network.head.kernel.shape == (1, 1, channels[-1], 1280)


@given(width=st.floats(0.01, 4), depth=st.floats(0.01, 4))
def test_channels_of_a_scaled_stage_are_whole_and_near(width, depth):
    for scaled, stage in zip(Scaling(width, depth).stages(), SCALINGS["lite0"].stages(), strict=True):
        asked = width * stage.channels
        assert scaled.channels % 8 == 0
        assert max(8, 0.9 * asked) <= scaled.channels <= max(asked, 8) + 8
        if stage.repeats == 1:
            assert scaled.repeats == 1
        else:
            assert 0 <= scaled.repeats - depth * stage.repeats < 1


@pytest.mark.parametrize("name", SCALINGS)
def test_parts_of_efficientnet_lite_begin_where_the_tile_is_halved(name):
    network = nnx.eval_shape(lambda: EfficientNetLite(SCALINGS[name], rngs=nnx.Rngs(0)))
    starts = np.cumsum([0, *(stage.repeats for stage in SCALINGS[name].stages())]).tolist()
    expected = [network.stem, *(network.blocks[starts[stage]] for stage in (2, 3, 5))]
    for part, module in zip(parts_of(network), expected, strict=True):
        assert part.modules[0] is module
    assert parts_of(network)[-1].modules[-1] is network.head
    sizes = []
    for n_parts in range(1, 5):
        run = lambda network, n=n_parts: run_parts(parts_of(network)[:n], jnp.zeros((1, 64, 64, 3)))
        sizes.append(nnx.eval_shape(run, network).shape[1:-1])
    assert sizes == [(16, 16), (8, 8), (4, 4), ()]


@pytest.mark.slow
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(14, 14), (9, 12)])
def test_shifted_products_equal_grouped_convolution(kernel_size, stride, shape):
    keys = jax.random.split(jax.random.key(0))
    value = jax.random.normal(keys[0], (2, *shape, 6))
    kernel = jax.random.normal(keys[1], (kernel_size, kernel_size, 6))
    pads = [layers.pad_widths(size, kernel_size=kernel_size, stride=stride, padding="same") for size in shape]

    def grouped(value, kernel):
        return jax.lax.conv_general_dilated(
            value,
            kernel[:, :, None],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6,
        )

    def shifted(value, kernel):
        return layers.depthwise_convolution(value, kernel, stride=stride, pads=pads)

    @jax.jit
    def both(value, kernel):
        results = []
        for f in (shifted, grouped):
            result, pull_back = jax.vjp(f, value, kernel)
            results.append((result, *pull_back(2 * result)))
        return results

    ours, theirs = both(value, kernel)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 2), (7, 2)])
def test_conv_norm_is_convolution_then_normalization(kernel_size, stride):
    random = np.random.default_rng(3)
    layer = layers.ConvNorm(3, 8, kernel_size, stride=stride, padding="same", epsilon=1e-3, rngs=nnx.Rngs(0))
    for variable in (layer.scale, layer.bias, layer.mean, layer.variance):
        variable.set_value(jnp.asarray(random.uniform(0.5, 2, 8), jnp.float32))
    value = jnp.asarray(random.normal(size=(2, 13, 10, 3)), jnp.float32)
    convolved = jax.lax.conv_general_dilated(
        value, layer.kernel[...], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    deviation = jnp.sqrt(layer.variance[...] + 1e-3)
    expected = (convolved - layer.mean[...]) / deviation * layer.scale[...] + layer.bias[...]
    np.testing.assert_allclose(layers.conv_norm(value, layer), expected, rtol=1e-5, atol=1e-5)


SMALL_VIT = partial(VisionTransformer, Size(128, 5), patch_px=8, image_px=32)
PARTED = {**{name: network for name, (network, _) in NETWORKS.items()}, "vit": SMALL_VIT}


@pytest.mark.parametrize("name", sorted(PARTED))
def test_parts_share_no_variable_and_have_all(name):
    network = nnx.eval_shape(lambda: PARTED[name](rngs=nnx.Rngs(0)))
    parts = parts_of(network)
    each = [{id(variable) for variable in variables_of(part)} for part in parts]
    together = {id(node) for _, node in nnx.iter_graph(network) if isinstance(node, nnx.Variable)}
    assert len(parts) == 4
    assert all(each)
    assert sum(map(len, each)) == len(together)
    assert set.union(*each) == together


def test_halving_leaves_an_odd_row_out():
    value = jnp.arange(15.0).reshape(1, 3, 5, 1)
    expected = np.arange(15.0).reshape(3, 5)[:2, :4].reshape(1, 2, 2, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(layers.halve(value)[0, :, :, 0], expected)


@pytest.mark.slow
def test_attention_is_a_weighted_mean_of_values():
    random = np.random.default_rng(0)
    block = Block(128, rngs=nnx.Rngs(1))
    for layer in (block.queries_keys_values, block.project, block.expand, block.contract):
        layer.bias.set_value(jnp.asarray(random.normal(0, 0.3, layer.bias.shape), jnp.float32))
    tokens = random.normal(size=(2, 7, 128))

    def normalized(value):
        return (value - value.mean(axis=-1, keepdims=True)) / np.sqrt(value.var(axis=-1, keepdims=True) + 1e-6)

    def dense(value, layer):
        return value @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)

    packed = dense(normalized(tokens), block.queries_keys_values)
    heads = []
    for head in range(2):
        queries, keys, values = (packed[..., start + 64 * head :][..., :64] for start in (0, 128, 256))
        weights = np.exp(queries @ keys.transpose(0, 2, 1) / 8)
        heads.append(weights / weights.sum(axis=-1, keepdims=True) @ values)
    middle = tokens + dense(np.concatenate(heads, axis=-1), block.project)
    inner = dense(normalized(middle), block.expand)
    expected = middle + dense(inner * stats.norm.cdf(inner), block.contract)
    np.testing.assert_allclose(block(jnp.asarray(tokens, jnp.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_vision_transformer_tells_where_a_patch_lies():
    network = SMALL_VIT(rngs=nnx.Rngs(0))
    network.positions.set_value(jax.random.normal(jax.random.key(1), network.positions.shape))
    tiles = np.zeros((2, 32, 32, 3), np.float32)
    tiles[0, :8, :8] = tiles[1, -8:, -8:] = 1
    first, second = network(jnp.asarray(tiles))
    assert np.abs(first - second).max() > 1e-3
    with pytest.raises(ValueError, match="tiles of 32 px, found 40 by 32 px"):
        network(jnp.zeros((1, 40, 32, 3)))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (Size(100, 12), {}, "multiple of 64, found 100"),
        (Size(64, 2), {}, "at least 4 blocks"),
        (SIZES["tiny"], {"image_px": 100}, "found 12 and 100 px in patches of 16 px"),
    ],
)
def test_impossible_vision_transformers_are_refused(size, options, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(size, rngs=nnx.Rngs(0), **options)


@given(size=st.integers(1, 400), kernel_size=st.sampled_from([1, 3, 5, 7]), stride=st.integers(1, 3))
def test_same_padding_gives_ceil_of_size_over_stride(size, kernel_size, stride):
    before, after = layers.pad_widths(size, kernel_size=kernel_size, stride=stride, padding="same")
    assert (size + before + after - kernel_size) // stride + 1 == -(-size // stride)
    assert after - before in (0, 1)
    assert before >= 0


def test_fixed_padding_is_symmetric():
    assert layers.pad_widths(224, kernel_size=7, stride=2, padding=3) == (3, 3)


@pytest.mark.slow
def test_gradient_reaches_parameters_and_leaves_statistics():
    settings = {"kernel_size": 5, "stride": 1, "expansion": 6}
    block = InvertedResidual(4, 4, **settings, rngs=nnx.Rngs(0))
    value = jax.random.normal(jax.random.key(0), (2, 9, 9, 4))
    gradients = nnx.jit(nnx.grad(lambda block: (block(value) ** 2).mean()))(block)
    flat = nnx.to_flat_state(gradients)
    assert {path[-1] for path, _ in flat} == {"kernel", "scale", "bias"}
    assert len(flat) == 9
    for path, variable in flat:
        assert np.isfinite(variable[...]).all(), path
        assert (variable[...] != 0).any(), path


def test_depthwise_layer_refuses_to_change_channels():
    with pytest.raises(ValueError, match="in_channels=3 and out_channels=4"):
        layers.ConvNorm(3, 4, 3, padding=1, depthwise=True, epsilon=1e-3, rngs=nnx.Rngs(0))


def test_recording_needs_a_convolution_first():
    with pytest.raises(ValueError, match="convolution as the first layer after the input, found Relu"):
        onnx_graph.record(lambda tiles: layers.global_mean(layers.relu(tiles)), mean=MEAN, std=STD, embedding_size=3)
