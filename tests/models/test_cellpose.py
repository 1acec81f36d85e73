"""Nuclei by Cellpose: its real classes, version 4, with small random weights in its own format."""

from __future__ import annotations

import importlib.metadata
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stimage_sd.models._cellpose import CellposeNuclei, check_cellpose

IMAGE = np.random.default_rng(0).integers(60, 240, (1, 64, 64, 3), dtype=np.uint8)


def without_cellpose(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_missing_package_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", without_cellpose)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "stimage-sd\[nuclei\]"`.*method="watershed"'):
        CellposeNuclei(None, nucleus_px=16, low=0, high=1)


@pytest.mark.parametrize("found", ["3.1.1", "5.0"])
def test_an_unknown_version_says_which(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    with pytest.raises(ImportError, match=f"Expected Cellpose 4, found {found}"):
        check_cellpose()


# --------------------------------------------------------------------------------------------------
# where it is installed


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    models = pytest.importorskip("cellpose.models")
    with pytest.MonkeyPatch.context() as patch:
        # the transformer that is released has 300 million weights; Segment Anything builds a small one as well
        from segment_anything.build_sam import _build_sam, sam_model_registry

        small = partial(
            _build_sam,
            encoder_embed_dim=32,
            encoder_depth=2,
            encoder_num_heads=2,
            encoder_global_attn_indexes=[0, 1],
        )
        patch.setitem(sam_model_registry, "vit_l", lambda checkpoint: small(checkpoint=checkpoint))
        yield models


@pytest.fixture(scope="module")
def weights(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as Cellpose writes it, of random weights."""
    import torch

    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("cellpose") / "weights"
    network = models.CPSAM(dtype=torch.float32)
    network.out.bias.data[2 * network.ps**2 :] += 5.0
    torch.save(network.state_dict(), path)
    return path


def test_weights_of_a_file_are_run(models: Any, weights: Path) -> None:
    cellpose = CellposeNuclei(weights, nucleus_px=16.0, low=0.05, high=1.5)
    labels = cellpose(IMAGE)
    assert labels.shape == (1, 64, 64)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(cellpose(IMAGE), labels)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cellpose))(IMAGE), labels)
    other = CellposeNuclei(weights, nucleus_px=20.0, low=0.05, high=1.5)
    assert cellpose.key.startswith("cellpose4-")
    assert cellpose.key != other.key
    assert str(weights) not in cellpose.key


def test_it_is_cellpose_itself_on_hematoxylin(models: Any, weights: Path) -> None:
    """The same as Cellpose's own call on a plane of hematoxylin."""
    from skimage.color import rgb2hed

    cellpose = CellposeNuclei(weights, nucleus_px=16.0, low=0.0, high=1.0)
    cellpose(IMAGE)
    network = cellpose._network
    assert isinstance(network, models.CellposeModel)
    assert Path(network.pretrained_model) == weights
    seen = []

    class Spy:
        def eval(self, image: np.ndarray, **options: Any) -> Any:
            seen.append((image, options))
            # random flows are not those of cells: without this check some masks are left
            return network.eval(image, **options, flow_threshold=0.0)

    cellpose._network = Spy()
    labels = cellpose(IMAGE)
    image, options = seen[0]
    # scikit-image divides by the logarithm of the smallest value that it takes
    plane = np.clip(rgb2hed(IMAGE[0])[..., 0] * -np.log(1e-6), 0, 1)
    np.testing.assert_allclose(image, plane, atol=0.03)
    expected = network.eval(image.copy(), **options, flow_threshold=0.0)[0]
    assert labels.any()
    np.testing.assert_array_equal(labels[0], expected.reshape(64, 64))
    assert options["diameter"] == 16.0


def test_names_and_paths_that_are_none(models: Any, tmp_path: Path) -> None:
    for model in (tmp_path / "none", str(tmp_path / "none"), "none.pth"):
        with pytest.raises(FileNotFoundError, match="Found no file of Cellpose's weights at"):
            CellposeNuclei(model, nucleus_px=16.0, low=0, high=1)
    with pytest.raises(ValueError, match=r"one of Cellpose 4's names \[.*found 'nucleii'"):
        CellposeNuclei("nucleii", nucleus_px=16.0, low=0, high=1)
    default = CellposeNuclei(None, nucleus_px=16.0, low=0, high=1)
    assert default.model in models.MODEL_NAMES
    named = CellposeNuclei(models.MODEL_NAMES[0], nucleus_px=16.0, low=0, high=1)
    assert models.MODEL_NAMES[0] in named.key
