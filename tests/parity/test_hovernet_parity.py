"""HoVer-Net against the same network in torch, run in the interpreter of $STIMAGE_SD_TORCH_PYTHON."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stimage_sd.models._hovernet_weights import arrays_in_authors_naming, load_hovernet
from stimage_sd.models._weights import read_safetensors
from stimage_sd.nn.hovernet import HoVerNet, HoVerNetSize, as_trained

pytestmark = pytest.mark.slow

SIZES = {
    "same": HoVerNetSize(16, (2, 1, 2, 1), (2, 1), 5),
    "fast": HoVerNetSize(16, (1, 2, 1, 1), (8, 4), 3, "valid"),
    "original": HoVerNetSize(16, (1, 1, 1, 2), (8, 4), 5, "valid", pad_stem=False),
}
MAPS_PX = {"same": 64, "fast": 36, "original": 80}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = os.environ.get("STIMAGE_SD_TORCH_PYTHON")
    if python is None:
        pytest.skip("STIMAGE_SD_TORCH_PYTHON names no interpreter with torch, numpy and safetensors")
    made = tmp_path_factory.mktemp("hovernet")
    subprocess.run([python, str(Path(__file__).with_name("hovernet_reference.py")), str(made)], check=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("case", SIZES)
def test_maps_equal_torchs(case: str, folder: Path) -> None:
    network = HoVerNet(4, size=SIZES[case], rngs=nnx.Rngs(1))
    load_hovernet(network, folder / f"{case}.safetensors")
    with np.load(folder / f"{case}.npz") as arrays:
        pictures = jnp.asarray(arrays["pictures"])
        fitted = nnx.jit(lambda network, pictures: network(pictures))(network, pictures)
        trained = nnx.jit(lambda network, pictures: network(pictures, as_trained))(network, pictures)
        for mode, found in (("evaluation", fitted), ("training", trained)):
            for branch, maps in zip(("np", "hv", "tp"), found, strict=False):
                expected = arrays[f"{mode}_{branch}"]
                assert maps.shape == expected.shape == (2, MAPS_PX[case], MAPS_PX[case], expected.shape[-1])
                assert np.abs(np.asarray(maps) - expected).max() < 1e-4 * np.abs(expected).max()
        last = network.blocks[2].last
        np.testing.assert_allclose(last.mean[...], arrays["followed_mean"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(last.variance[...], arrays["followed_variance"], rtol=1e-4, atol=1e-5)


def test_weights_are_written_as_they_are_read(folder: Path) -> None:
    network = HoVerNet(4, size=SIZES["same"], rngs=nnx.Rngs(1))
    load_hovernet(network, folder / "same.safetensors")
    found = arrays_in_authors_naming(network)
    expected = read_safetensors(folder / "same.safetensors")
    expected = {name: array for name, array in expected.items() if not name.endswith("num_batches_tracked")}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
