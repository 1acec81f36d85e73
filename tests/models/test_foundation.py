"""Foundation models: the real module classes with small random weights; what is said where they cannot be had.

Runs where the extra ``foundation`` is installed; elsewhere only what is said of its absence is tested.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from stimage_sd import models
from stimage_sd.models import _foundation as foundation

INSTALLED = all(find_spec(name) for name in ("torch", "timm", "lazyslide_models"))
needs_extra = pytest.mark.skipif(not INSTALLED, reason="the extra `foundation` is not installed")
TIMM = [name for name, model in foundation.FOUNDATION_MODELS.items() if model.kind == "timm"]


def small(name: str) -> tuple[foundation.FoundationModel, object]:
    """A foundation model of two blocks and two heads, and its network with random weights."""
    import torch
    from timm.layers import SwiGLUPacked
    from timm.models import VisionTransformer

    model = foundation.FOUNDATION_MODELS[name]
    width = 2 * model.network.head_width
    gated = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if model.network.gated else {}
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=model.crop, num_classes=0, embed_dim=width, depth=2, num_heads=2, **gated, **model.network.options
    ).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    size = width * (2 if model.pooling == "class and mean" else 1)
    return replace(model, embedding_size=size), network


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, foundation.FoundationModel], None]:
    """Put a small model in the place of a published one."""

    def put(name: str, model: foundation.FoundationModel) -> None:
        monkeypatch.setitem(foundation.FOUNDATION_MODELS, name, model)

    return put


def tiles_of(side: int) -> np.ndarray:
    """Tiles of different colors."""
    random = np.random.default_rng(1)
    return (random.random((3, side, side, 3)) + 3 * random.normal(size=(3, 1, 1, 3))).astype(np.float32)


@needs_extra
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("name", TIMM)
def test_embeddings_are_those_of_the_networks_own_class(
    name: str, file_format: str, tmp_path: Path, enter: Callable
) -> None:
    import torch
    from safetensors.torch import save_file

    model, network = small(name)
    enter(name, model)
    path = tmp_path / f"weights.{file_format}"
    if file_format == "safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path)
    loaded, weights_hash = foundation.load_foundation(name, path)
    tiles = tiles_of(model.input_size)
    edge = (model.input_size - model.crop) // 2
    middle = tiles[:, edge : edge + model.crop, edge : edge + model.crop]
    with torch.inference_mode():
        tokens = network.forward_features(torch.from_numpy(np.moveaxis(middle, -1, 1).copy()))
        expected = tokens[:, 0]
        if model.pooling == "class and mean":  # Virchow's own example: the class token and the mean of the patches'
            registers = 1 + model.network.options.get("reg_tokens", 0)
            expected = torch.cat([expected, tokens[:, registers:].mean(1)], dim=-1)
        elif name != "uni":
            # what timm itself calls the network's output
            np.testing.assert_allclose(
                expected, network(torch.from_numpy(np.moveaxis(middle, -1, 1).copy())), atol=1e-5
            )
    found = loaded(tiles)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    assert np.abs(np.diff(found, axis=0)).max() > 1e-3
    assert len(weights_hash) == 64


@needs_extra
@pytest.mark.parametrize(("name", "kind"), [("phikon", "vit"), ("phikon_v2", "dinov2")])
def test_a_local_folder_of_transformers(name: str, kind: str, tmp_path: Path, enter: Callable) -> None:
    import torch
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224, "patch_size": 16}
    torch.manual_seed(0)
    network = (
        ViTModel(ViTConfig(**options, intermediate_size=64), add_pooling_layer=False)
        if kind == "vit"
        else Dinov2Model(Dinov2Config(**options, mlp_ratio=2))
    ).eval()
    network.save_pretrained(tmp_path / "model")
    enter(name, replace(foundation.FOUNDATION_MODELS[name], embedding_size=32))
    loaded, _ = foundation.load_foundation(name, tmp_path / "model")
    tiles = tiles_of(224)
    with torch.inference_mode():
        expected = network(pixel_values=torch.from_numpy(np.moveaxis(tiles, -1, 1).copy())).last_hidden_state[:, 0]
    np.testing.assert_allclose(loaded(tiles), expected.numpy(), atol=1e-5)
    enter(name, replace(foundation.FOUNDATION_MODELS[name], embedding_size=768))
    with pytest.raises(ValueError, match="give embeddings of 32, expected 768"):
        foundation.load_foundation(name, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        foundation.load_foundation(name, tmp_path / "model")


@needs_extra
def test_an_exported_program(tmp_path: Path, enter: Callable) -> None:
    import timm
    import torch

    torch.manual_seed(0)
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, embed_dim=16, depths=(1, 1), num_heads=(1, 2)
    ).eval()
    example = torch.zeros(2, 3, 224, 224)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=({0: batch},)), tmp_path / "swin.pt2")
    loaded, _ = foundation.load_foundation("ctranspath", tmp_path / "swin.pt2")
    tiles = tiles_of(224)
    with torch.inference_mode():
        expected = network(torch.from_numpy(np.moveaxis(tiles, -1, 1).copy()))
    np.testing.assert_allclose(loaded(tiles), expected.numpy(), atol=1e-5)
    (tmp_path / "none.pt2").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"Expected a program of torch.export at .*none.pt2"):
        foundation.load_foundation("ctranspath", tmp_path / "none.pt2")


@needs_extra
def test_an_extractor_of_it_embeds_tiles_of_a_section(tmp_path: Path, enter: Callable) -> None:
    """From bytes, by the registry, on several threads at once."""
    import torch
    from safetensors.torch import save_file

    extractor = models.get_extractor
    model, network = small("uni")
    enter("uni", model)
    save_file(network.state_dict(), tmp_path / "uni.safetensors")
    with pytest.raises(ValueError, match=r"to give embeddings of shape \(2, 1024\)"):
        # the registry knows the published size
        extractor("uni", weights=tmp_path / "uni.safetensors")(np.zeros((2, 224, 224, 3), np.uint8))
    loaded, _ = foundation.load_foundation("uni", tmp_path / "uni.safetensors")
    tiles = np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3)).astype(np.uint8)
    normalized = (tiles / 255.0 - np.array(model.normalization[0])) / np.array(model.normalization[1])
    with torch.inference_mode():
        expected = network(torch.from_numpy(np.moveaxis(normalized, -1, 1).copy()).float())
    np.testing.assert_allclose(loaded(normalized.astype(np.float32)), expected.numpy(), atol=1e-5)


@needs_extra
def test_files_that_are_of_something_else(tmp_path: Path, enter: Callable) -> None:
    import torch
    from safetensors.torch import save_file

    model, network = small("uni2")
    state = network.state_dict()
    save_file(state, tmp_path / "right.safetensors")
    with pytest.raises(ValueError, match=r"give embeddings of 128, expected 1536"):
        foundation.load_foundation("uni2", tmp_path / "right.safetensors")
    enter("uni2", model)
    save_file({key: value for key, value in state.items() if "reg_token" not in key}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"of another network: .*reg_token"):
        foundation.load_foundation("uni2", tmp_path / "part.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"Expected the weights of 'uni2'.*\['weight'\]"):
        foundation.load_foundation("uni2", tmp_path / "other.safetensors")
    for name in ("cut.safetensors", "cut.bin"):
        (tmp_path / name).write_bytes((tmp_path / "right.safetensors").read_bytes()[:1000])
        with pytest.raises(ValueError, match=rf"Expected a file of weights at .*{name}"):
            foundation.load_foundation("uni2", tmp_path / name)


@needs_extra
def test_a_file_that_would_run_code_is_not_read(tmp_path: Path, enter: Callable) -> None:
    import torch

    enter("uni", small("uni")[0])
    torch.save({"cls_token": _RunsCode(tmp_path / "ran")}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match=r"Expected a file of weights at .*evil.bin"):
        foundation.load_foundation("uni", tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()


class _RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_all_are_listed_with_their_terms() -> None:
    assert set(foundation.FOUNDATION_MODELS) <= set(models.extractors())
    assert len(foundation.FOUNDATION_MODELS) == 11
    for model in foundation.FOUNDATION_MODELS.values():
        assert model.license
        assert model.page.startswith("https://")
        assert model.input_size >= model.crop >= 224


def test_without_the_extra_or_the_file_it_is_said(tmp_path: Path) -> None:
    if INSTALLED:
        with pytest.raises(FileNotFoundError, match=r"No weights of 'uni' at .*MahmoodLab/UNI"):
            models.get_extractor("uni", weights=tmp_path / "none.safetensors")
    else:
        with pytest.raises(ImportError, match=r'pip install "stimage-sd\[foundation\]"'):
            models.get_extractor("uni")


def test_torch_is_not_imported_for_the_list() -> None:
    code = "import sys, stimage_sd as sti; sti.models.extractors(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
