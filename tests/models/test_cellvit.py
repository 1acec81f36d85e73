"""CellViT's family: the real networks with random weights; their maps, seams, files, and what is said of absence."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stimage_sd.models import _cellvit, _cellvit_network
from stimage_sd.models._cell_classifier import CellFinder
from stimage_sd.models._cellvit import FAMILY, CellViT, load_cellvit
from stimage_sd.models._cellvit_network import STRUCTURES, Structure

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
    nuclear = model.maps(image[:core])[0]
    alone = model.maps(image[:core, core:])[0]
    assert np.abs(nuclear[:, core:] - alone).max() > 1e-3
    window = image[:core, :core]
    several, _ = model(np.stack([window, window[::-1]]))
    np.testing.assert_array_equal(several[0], model(window[None])[0][0])


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


# --------------------------------------------------------------------------------------------------
# CellViT itself: the authors' files, with small random networks in their form


#: small encoders in the place of the published ones
SMALL = {
    "ViT-256": Structure("CellViT256", 32, 4, 2, None, (1, 2, 3, 4)),
    "SAM-H": Structure("CellViTSAM", 32, 4, 2, (1, 3), (1, 2, 3, 4)),
}
NAMES = {"cellvit_256": "ViT-256", "cellvit_sam_h": "SAM-H"}


def authors_state(backbone: str) -> dict[str, Any]:
    """Random arrays by the names and shapes of the authors' class, written down from their code."""
    import torch

    width, depth = SMALL[backbone].width, SMALL[backbone].depth
    head = width // SMALL[backbone].heads
    shapes: dict[str, tuple[int, ...]] = {"encoder.patch_embed.proj.weight": (width, 3, 16, 16)}
    shapes["encoder.patch_embed.proj.bias"] = (width,)
    sam = backbone == "SAM-H"
    for block in range(depth):
        at = f"encoder.blocks.{block}"
        layers = ("mlp.lin1", "mlp.lin2") if sam else ("mlp.fc1", "mlp.fc2")
        sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), layers[0]: (4 * width, width),
                 layers[1]: (width, 4 * width)}  # fmt: skip
        for name, (after, before) in sizes.items():
            shapes |= {f"{at}.{name}.weight": (after, before), f"{at}.{name}.bias": (after,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
        if sam:
            tokens = 64 if block in SMALL[backbone].whole else 14  # of images of 1024 px, or of windows
            shapes |= {f"{at}.attn.rel_pos_{axis}": (2 * tokens - 1, head) for axis in "hw"}
    if sam:
        shapes |= {"encoder.pos_embed": (1, 64, 64, width), "encoder.neck.0.weight": (256, width, 1, 1)}
        shapes |= {"encoder.neck.1.weight": (256,), "encoder.neck.1.bias": (256,), "encoder.neck.3.weight": (256,)}
        shapes |= {"encoder.neck.3.bias": (256,), "encoder.neck.2.weight": (256, 256, 3, 3)}
        shapes |= {"classifier_head.weight": (19, 256), "classifier_head.bias": (19,)}
    else:
        shapes |= {"encoder.cls_token": (1, 1, width), "encoder.pos_embed": (1, 14 * 14 + 1, width)}
        shapes |= {"encoder.norm.weight": (width,), "encoder.norm.bias": (width,)}
        shapes |= {"encoder.head.weight": (19, width), "encoder.head.bias": (19,)}

    def convolution(name: str, before: int, after: int, *, at: int = 0) -> None:
        shapes.update({f"{name}.block.{at}.weight": (after, before, 3, 3), f"{name}.block.{at}.bias": (after,)})
        for array in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.block.{at + 1}.{array}"] = (after,)
        shapes[f"{name}.block.{at + 1}.num_batches_tracked"] = ()

    def doubled(name: str, before: int, after: int) -> None:
        shapes.update({f"{name}.weight": (before, after, 2, 2), f"{name}.bias": (after,)})

    convolution("decoder0.0", 3, 32)
    convolution("decoder0.1", 32, 64)
    for decoder, path in (
        ("decoder1", (width, 256, 128, 128)),
        ("decoder2", (width, 256, 256)),
        ("decoder3", (width, 312)),
    ):
        for number, (before, after) in enumerate(pairwise(path)):
            doubled(f"{decoder}.{number}.block.0", before, after)
            convolution(f"{decoder}.{number}", after, after, at=1)
    for branch, channels in (("nuclei_binary_map", 2), ("hv_map", 2), ("nuclei_type_maps", 6)):
        at = f"{branch}_decoder"
        doubled(f"{at}.bottleneck_upsampler", width, 312)
        for step, path, after in (
            ("decoder3_upsampler", (624, 312, 312, 312), 256),
            ("decoder2_upsampler", (512, 256, 256), 128),
            ("decoder1_upsampler", (256, 128, 128), 64),
        ):
            for number, (before, inner) in enumerate(pairwise(path)):
                convolution(f"{at}.{step}.{number}", before, inner)
            doubled(f"{at}.{step}.{len(path) - 1}", path[-1], after)
        convolution(f"{at}.decoder0_header.0", 128, 64)
        convolution(f"{at}.decoder0_header.1", 64, 64)
        shapes |= {f"{at}.decoder0_header.2.weight": (channels, 64, 1, 1), f"{at}.decoder0_header.2.bias": (channels,)}
    torch.manual_seed(1)
    state = {}
    for name, shape in shapes.items():
        spread = 1 / np.sqrt(max(1, int(np.prod(shape[1:])))) if len(shape) > 1 else 0.1
        state[name] = torch.randn(shape) * spread if shape else torch.tensor(3)
        if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = 1 + 0.1 * torch.rand(shape)
    return state


@pytest.fixture(scope="module", params=list(NAMES) if INSTALLED else [])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    """A checkpoint as the authors' trainer writes it."""
    import torch

    backbone = NAMES[request.param]
    state = authors_state(backbone)
    config = {"model.backbone": backbone, "data.num_nuclei_classes": 6, "transformations.normalize.mean": [0.5] * 3}
    path = tmp_path_factory.mktemp("cellvit") / "checkpoint.pth"
    torch.save({"arch": SMALL[backbone].arch, "epoch": 130, "config": config, "model_state_dict": state}, path)
    return request.param, path, state


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, structure in SMALL.items():
        monkeypatch.setitem(STRUCTURES, name, structure)


def expected_maps(state: dict[str, Any], backbone: str, tiles: Any) -> dict[str, Any]:
    """The network as its formulas, from the authors' arrays: attention by loops over heads, maps by plain functions."""
    import torch
    from torch.nn import functional as F

    structure, sam = SMALL[backbone], backbone == "SAM-H"
    head = structure.width // structure.heads

    def linear(name: str, value: Any) -> Any:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, value: Any) -> Any:
        return F.layer_norm(value, value.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def attention(at: str, tokens: Any, block: int) -> Any:
        """Attention between the tokens of a square, (y, x, width)."""
        side = tokens.shape[0]
        flat = tokens.reshape(-1, structure.width)
        queries, keys, values = linear(f"{at}.qkv", flat).split(structure.width, dim=1)
        out = []
        for one in range(structure.heads):
            q, k, v = (part[:, one * head : (one + 1) * head] for part in (queries, keys, values))
            scores = q @ k.T / np.sqrt(head)
            if sam:
                for axis in "hw":
                    table = state[f"{at}.rel_pos_{axis}"].numpy()
                    if block in structure.whole:  # linear interpolation between the centers of equal parts
                        places = (np.arange(2 * side - 1) + 0.5) * len(table) / (2 * side - 1) - 0.5
                        table = np.stack([np.interp(places, np.arange(len(table)), column) for column in table.T], 1)
                    place = np.divmod(np.arange(side**2), side)[0 if axis == "h" else 1]
                    away = torch.from_numpy(table[place[:, None] - place[None] + side - 1]).float()
                    scores = scores + torch.einsum("ic,ijc->ij", q, away)
            out.append(scores.softmax(dim=1) @ v)
        return linear(f"{at}.proj", torch.cat(out, dim=1)).reshape(tokens.shape)

    patches = F.conv2d(
        tiles, state["encoder.patch_embed.proj.weight"], state["encoder.patch_embed.proj.bias"], stride=16
    )
    grid = patches[0].permute(1, 2, 0)
    side, skips = grid.shape[0], [tiles]
    if sam:
        grid = grid + state["encoder.pos_embed"][0, :side, :side]
        for block in range(structure.depth):
            at, inner = f"encoder.blocks.{block}", norm(f"encoder.blocks.{block}.norm1", grid)
            if block in structure.whole:
                inner = attention(f"{at}.attn", inner, block)
            else:  # windows of 14 tokens, beyond the border filled with zeros
                padded = torch.zeros(28, 28, structure.width)
                padded[:side, :side] = inner
                for top in (0, 14):
                    for left in (0, 14):
                        part = (slice(top, top + 14), slice(left, left + 14))
                        padded[part] = attention(f"{at}.attn", padded[part].clone(), block)
                inner = padded[:side, :side]
            grid = grid + inner
            hidden = F.gelu(linear(f"{at}.mlp.lin1", norm(f"{at}.norm2", grid)))
            grid = grid + linear(f"{at}.mlp.lin2", hidden)
            skips.append(grid.permute(2, 0, 1)[None])
    else:
        places = state["encoder.pos_embed"]
        square = places[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, scale_factor=(16.1 / 14, 16.1 / 14), mode="bicubic").permute(0, 2, 3, 1)
        first = state["encoder.cls_token"][0] + places[0, :1]
        tokens = torch.cat([first, (grid + square[0]).reshape(-1, structure.width)])
        for block in range(structure.depth):
            at = f"encoder.blocks.{block}"
            # attention has no places here, so any shape of the tokens will do
            inner = attention(f"{at}.attn", norm(f"{at}.norm1", tokens)[:, None], block)[:, 0]
            tokens = tokens + inner
            hidden = F.gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.norm2", tokens)))
            tokens = tokens + linear(f"{at}.mlp.fc2", hidden)
            skips.append(tokens[1:].reshape(side, side, -1).permute(2, 0, 1)[None])

    def convolution(name: str, value: Any, *, at: int = 0) -> Any:
        value = F.conv2d(value, state[f"{name}.block.{at}.weight"], state[f"{name}.block.{at}.bias"], padding=1)
        arrays = (state[f"{name}.block.{at + 1}.{one}"] for one in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(value, *arrays))

    def doubled(name: str, value: Any) -> Any:
        return F.conv_transpose2d(value, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    beside = {0: convolution("decoder0.1", convolution("decoder0.0", tiles))}
    for decoder in (1, 2, 3):
        value = skips[decoder]
        for number in range(4 - decoder):
            name = f"decoder{decoder}.{number}"
            value = convolution(name, doubled(f"{name}.block.0", value), at=1)
        beside[decoder] = value
    maps = {}
    for branch, name in (("nuclei_binary_map",) * 2, ("hv_map",) * 2, ("nuclei_type_maps", "nuclei_type_map")):
        at = f"{branch}_decoder"
        value = doubled(f"{at}.bottleneck_upsampler", skips[4])
        for decoder, n in ((3, 3), (2, 2), (1, 2)):
            value = torch.cat([beside[decoder], value], dim=1)
            for number in range(n):
                value = convolution(f"{at}.decoder{decoder}_upsampler.{number}", value)
            value = doubled(f"{at}.decoder{decoder}_upsampler.{n}", value)
        value = torch.cat([beside[0], value], dim=1)
        for number in (0, 1):
            value = convolution(f"{at}.decoder0_header.{number}", value)
        last = f"{at}.decoder0_header.2"
        maps[name] = F.conv2d(value, state[f"{last}.weight"], state[f"{last}.bias"])
    return maps


@needs_extra
@pytest.mark.usefixtures("_small")
def test_cellvit_is_the_authors_network(checkpoint: tuple[str, Path, dict]) -> None:
    import torch

    name, path, state = checkpoint
    model = load_cellvit(name, weights=path, mpp=0.25)
    assert isinstance(model, CellFinder)
    assert model.classes == ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
    windows = picture(2, 256, 256)
    found = model._run(windows)
    assert found.shape == (2, 10, 256, 256)
    tiles = torch.from_numpy((windows[1:].transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5).float()
    with torch.inference_mode():
        expected = expected_maps(state, NAMES[name], tiles)
    for channels, key in ((slice(2), "nuclei_binary_map"), (slice(2, 4), "hv_map"), (slice(4, 10), "nuclei_type_map")):
        np.testing.assert_allclose(found[1, channels], expected[key][0], rtol=1e-3, atol=1e-4)
    labels, values = model(picture(150, 160)[None])
    assert (labels.shape, values.shape) == ((1, 150, 160), (1, 150, 160, 5))


@needs_extra
@pytest.mark.usefixtures("_small")
def test_checkpoints_of_other_networks_are_refused(checkpoint: tuple[str, Path, dict], tmp_path: Path) -> None:
    import torch

    name, path, _ = checkpoint
    other = next(one for one in NAMES if one != name)
    with pytest.raises(ValueError, match=rf"holds no weights of '{other}' \(it is a CellViT.* expected a CellViT"):
        load_cellvit(other, weights=path)
    stored = torch.load(path, weights_only=True)
    changes = (
        (
            {"config": {**stored["config"], "transformations.normalize.mean": [0.7, 0.5, 0.7]}},
            "normalizes images by a mean",
        ),
        ({"model_state_dict": dict(list(stored["model_state_dict"].items())[1:])}, "Missing key"),
        (
            {"config": {**stored["config"], "model.backbone": "SAM-B"}, "arch": "CellViTSAM"},
            "it is a CellViTSAM on SAM-B",
        ),
    )
    for change, message in changes:
        torch.save({**stored, **change}, tmp_path / "changed.pth")
        with pytest.raises(ValueError, match=message):
            load_cellvit(name, weights=tmp_path / "changed.pth")


@needs_extra
def test_published_sizes_of_cellvit() -> None:
    """Parameters of the released files: 187,224,155 bytes (ViT-256) and 2,799,315,941 bytes (SAM-H), four each."""
    import torch

    for backbone, n_bytes in (("ViT-256", 187_224_155), ("SAM-H", 2_799_315_941)):
        state = {"nuclei_binary_map_decoder.decoder0_header.2.weight": torch.empty(2, 1),
                 "encoder.head.weight": torch.empty(19, 1)}  # fmt: skip
        with torch.device("meta"):
            network = _cellvit_network._network(STRUCTURES[backbone], state, 6, 1024 if backbone == "SAM-H" else 224)
        n_values = sum(array.numel() for array in network.state_dict().values())
        if backbone == "SAM-H":
            n_values += 19 * 257  # classes of tissue, which are not used
        assert n_values * 4 == pytest.approx(n_bytes, rel=0.003)


@needs_extra
def test_weights_of_cellvit_come_from_the_authors() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"CellViT-SAM-H-x40\.pth are not on a hub.*github\.com/TIO-IKIM/CellViT"
    ):
        load_cellvit("cellvit_sam_h", mpp=0.25)
