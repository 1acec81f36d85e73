"""CellViT's family: the real module class with random weights; its maps, seams, files, and what is said of absence."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from stimage_sd.models import _cellvit
from stimage_sd.models._cell_classifier import CellFinder
from stimage_sd.models._cellvit import FAMILY, CellViT, load_cellvit

INSTALLED = all(find_spec(name) for name in ("torch", "timm", "lazyslide_models"))
needs_extra = pytest.mark.skipif(not INSTALLED, reason="the extra `foundation` is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights of HistoPLUS, by the names that its own files have."""
    import torch
    from lazyslide_models.segmentation.cellvit_family.histoplus import HistoPLUSModel

    torch.manual_seed(0)
    network = HistoPLUSModel(backbone_tile_size=224)
    path = tmp_path_factory.mktemp("cellvit") / "weights.pt"
    torch.save(network.state_dict(), path)
    return path


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)


@needs_extra
def test_a_window_is_the_networks_own_output(weights: Path) -> None:
    import torch
    from torchvision.transforms.v2.functional import normalize

    model = load_cellvit("histoplus", weights=weights)
    assert isinstance(model, CellFinder)
    core = 224 - 2 * _cellvit._BORDER
    image = picture(core, core)
    padded = np.pad(image, [(_cellvit._BORDER,) * 2] * 2 + [(0, 0)], mode="symmetric")
    family = FAMILY["histoplus"]
    with torch.inference_mode():
        scaled = torch.from_numpy(padded.transpose(2, 0, 1)[None] / np.float32(255))
        maps, _ = model.network(normalize(scaled, family.mean, family.std))
    nuclear, hv, types = model.maps(image)
    kept = slice(_cellvit._BORDER, -_cellvit._BORDER)
    inner = (slice(None), slice(None), kept, kept)
    np.testing.assert_allclose(nuclear, maps["np"].softmax(1)[inner][0, 1], atol=1e-5)
    np.testing.assert_allclose(hv, maps["hv"][inner][0], atol=1e-5)
    np.testing.assert_allclose(types, maps["tp"].softmax(1)[inner][0], atol=1e-5)


@needs_extra
def test_pictures_of_any_size_window_by_window(weights: Path) -> None:
    model = load_cellvit("histoplus", weights=weights)
    core = 224 - 2 * _cellvit._BORDER
    image = picture(core + 40, 2 * core)
    labels, values = model(image[None])
    assert labels.shape == (1, core + 40, 2 * core)
    assert values.shape == (1, core + 40, 2 * core, 14)
    assert (values.sum(axis=-1) <= 1 + 1e-5).all()
    # the second window sees the first one's tissue, not a mirror image
    nuclear = model.maps(image)[0]
    alone = model.maps(image[:, core:])[0]
    assert np.abs(nuclear[:, core:] - alone).max() > 1e-3
    again, _ = model(np.stack([image, image[::-1]]))
    np.testing.assert_array_equal(again[0], labels[0])


@needs_extra
def test_files_of_another_network_are_refused(weights: Path, tmp_path: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no weights of 'histoplus'"):
        load_cellvit("histoplus", weights=tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="Found no file of the weights of 'nulite'"):
        load_cellvit("nulite", weights=tmp_path / "none.pt2")
    assert load_cellvit("histoplus", weights=weights).key == load_cellvit("histoplus", weights=weights).key


@needs_extra
def test_an_exported_program_of_nulites_outputs(tmp_path: Path) -> None:
    """NuLite is released as a program: one of its outputs' names, small, in the same format."""
    import torch

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = torch.nn.Conv2d(3, 10, 3, padding=1)

        def forward(self, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
            maps = self.all(tiles)
            return {
                "nuclei_binary_map": maps[:, :2],
                "hv_map": maps[:, 2:4],
                "nuclei_type_map": maps[:, 4:],
                "patch_token_map": tiles,
            }

    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(Small(), (torch.zeros(2, 3, 256, 256),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "nulite.pt2")
    model = load_cellvit("nulite", weights=tmp_path / "nulite.pt2")
    labels, values = model(picture(300, 260)[None])
    assert (labels.shape, values.shape) == ((1, 300, 260), (1, 300, 260, 5))


def test_what_is_not_known_or_not_there() -> None:
    with pytest.raises(ValueError, match="`mpp` to be one of"):
        load_cellvit("nulite", mpp=1.0)
    if not INSTALLED:
        with pytest.raises(ModuleNotFoundError, match=r'pip install "stimage-sd\[foundation\]"'):
            load_cellvit("histoplus")
    assert isinstance(CellViT("nulite", ("a",), 0.5, 256, "key", len), CellFinder)
