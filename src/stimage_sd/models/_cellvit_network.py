"""CellViT networks of Hörst et al. in torch, with the encoders of timm, from the authors' checkpoints.

Source: Hörst et al., "CellViT: Vision Transformers for precise cell segmentation and classification", Medical Image
Analysis 2024. Torch and timm are imported when a network is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

#: side of a patch, px
_PATCH = 16
#: tokens along a side of the windows of attention in SAM
_SAM_WINDOW = 14


class Structure(NamedTuple):
    """Sizes of an encoder.

    Attributes
    ----------
    arch
        Class of the network in the authors' code, as checkpoints name it.
    width, depth, heads
        Length of a token, number of blocks, and number of attention heads.
    whole
        Blocks with attention over the whole window, for encoders of SAM. `None` for a plain vision transformer.
    skips
        Numbers of the blocks whose outputs the decoders take, from 1.
    """

    arch: str
    width: int
    depth: int
    heads: int
    whole: tuple[int, ...] | None
    skips: tuple[int, int, int, int]


#: encoders by the names that checkpoints have
STRUCTURES = {
    "ViT-256": Structure("CellViT256", 384, 12, 6, None, (3, 6, 9, 12)),
    "SAM-B": Structure("CellViTSAM", 768, 12, 12, (2, 5, 8, 11), (3, 6, 9, 12)),
    "SAM-L": Structure("CellViTSAM", 1024, 24, 16, (5, 11, 17, 23), (6, 12, 18, 24)),
    "SAM-H": Structure("CellViTSAM", 1280, 32, 16, (7, 15, 23, 31), (8, 16, 24, 32)),
}


def network_of(checkpoint: Mapping[str, Any], backbone: str, *, n_types: int, tile_px: int) -> Any:
    """Build the network of a checkpoint, for windows of `tile_px`.

    Parameters
    ----------
    checkpoint
        The authors' checkpoint: ``arch``, ``config`` (flat, with dots in its keys) and ``model_state_dict``.
    backbone
        Expected encoder, one of `STRUCTURES`.
    n_types
        Expected number of types, with the background.
    tile_px
        Side of the windows, px. Positions are resampled to it, as the authors' code does in each call.

    Returns
    -------
    A torch module in evaluation mode. It maps float ``(batch, 3, y, x)`` to ``nuclei_binary_map``, ``hv_map`` and
    ``nuclei_type_map``.

    Raises
    ------
    KeyError
        If the checkpoint lacks a part.
    ValueError
        If it is of another network, or was trained with another normalization.
    RuntimeError
        If its arrays do not fit.
    """
    structure, config = STRUCTURES[backbone], checkpoint["config"]
    stated = config.get("model.backbone", backbone)
    if checkpoint["arch"] != structure.arch or (structure.whole is not None and str(stated).upper() != backbone):
        raise ValueError(f"it is a {checkpoint['arch']} on {stated}, expected a {structure.arch} on {backbone}")
    for name in ("mean", "std"):
        values = config.get(f"transformations.normalize.{name}", (0.5, 0.5, 0.5))
        if any(float(value) != 0.5 for value in values):
            raise ValueError(f"it normalizes images by a {name} of {list(values)}, expected 0.5 per color")
    state = dict(checkpoint["model_state_dict"])
    for name in [name for name in state if name.startswith("classifier_head.")]:
        del state[name]  # classes of tissue, which are not used
    network = _network(structure, state, n_types, tile_px)
    network.load_state_dict(_converted(state, structure, tile_px))
    return network.eval()


def _network(structure: Structure, state: Mapping[str, Any], n_types: int, tile_px: int) -> Any:
    """Build the module, whose arrays have the authors' names but in the encoders of SAM."""
    import torch
    from torch import nn

    width, small = structure.width, structure.width < 512
    skip, skip_fine, bottom = (256, 128, 312) if small else (512, 256, 512)

    class CellViTNetwork(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = _encoder(structure, state, tile_px)
            self.decoder0 = nn.Sequential(_convolution(3, 32), _convolution(32, 64))
            self.decoder1 = nn.Sequential(_up(width, skip), _up(skip, skip_fine), _up(skip_fine, 128))
            self.decoder2 = nn.Sequential(_up(width, skip), _up(skip, 256))
            self.decoder3 = nn.Sequential(_up(width, bottom))
            # a network may also learn a regression of vectors, in two more channels
            n_binary = state["nuclei_binary_map_decoder.decoder0_header.2.weight"].shape[0]
            for name, channels in (("nuclei_binary_map", n_binary), ("hv_map", 2), ("nuclei_type_maps", n_types)):
                self.add_module(f"{name}_decoder", _branch(width, bottom, channels))

        def forward(self, tiles: Any) -> dict[str, Any]:
            skips = [tiles, *_tokens(self.encoder, structure, tiles)]
            maps = {
                name: self._maps(skips, getattr(self, f"{decoder}_decoder"))
                for name, decoder in (
                    ("nuclei_binary_map", "nuclei_binary_map"),
                    ("hv_map", "hv_map"),
                    ("nuclei_type_map", "nuclei_type_maps"),
                )
            }
            maps["nuclei_binary_map"] = maps["nuclei_binary_map"][:, :2]
            return maps

        def _maps(self, skips: list[Any], branch: Any) -> Any:
            value = branch.bottleneck_upsampler(skips[4])
            steps = ("decoder3_upsampler", "decoder2_upsampler", "decoder1_upsampler", "decoder0_header")
            for number, step in zip((3, 2, 1, 0), steps, strict=True):
                beside = getattr(self, f"decoder{number}")(skips[number])
                value = getattr(branch, step)(torch.cat([beside, value], dim=1))
            return value

    return CellViTNetwork()


def _block(*layers: Any) -> Any:
    """Return layers whose arrays are named as in the authors' blocks, ``block.<number>``."""
    from torch import nn

    outer = nn.Module()
    outer.add_module("block", nn.Sequential(*layers))
    outer.forward = outer.block.forward
    return outer


def _convolution(before: int, after: int) -> Any:
    from torch import nn

    return _block(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


def _up(before: int, after: int) -> Any:
    from torch import nn

    doubled = nn.ConvTranspose2d(before, after, 2, stride=2)
    return _block(doubled, nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


def _branch(width: int, bottom: int, channels: int) -> Any:
    """Return the decoder of one map."""
    from torch import nn

    def upsampler(before: int, inner: int, after: int, n: int) -> Any:
        rest = [_convolution(inner, inner) for _ in range(n - 1)]
        return nn.Sequential(_convolution(before, inner), *rest, nn.ConvTranspose2d(inner, after, 2, stride=2))

    branch = nn.Module()
    branch.add_module("bottleneck_upsampler", nn.ConvTranspose2d(width, bottom, 2, stride=2))
    branch.add_module("decoder3_upsampler", upsampler(2 * bottom, bottom, 256, 3))
    branch.add_module("decoder2_upsampler", upsampler(512, 256, 128, 2))
    branch.add_module("decoder1_upsampler", upsampler(256, 128, 64, 2))
    header = nn.Sequential(_convolution(128, 64), _convolution(64, 64), nn.Conv2d(64, channels, 1))
    branch.add_module("decoder0_header", header)
    return branch


def _encoder(structure: Structure, state: Mapping[str, Any], tile_px: int) -> Any:
    from torch import nn

    shared: dict[str, Any] = {
        "img_size": tile_px, "patch_size": _PATCH, "embed_dim": structure.width, "depth": structure.depth,
        "num_heads": structure.heads, "qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }  # fmt: skip
    if structure.whole is None:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(**shared, num_classes=state["encoder.head.weight"].shape[0])
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM(
        **shared, num_classes=0, window_size=_SAM_WINDOW, use_rel_pos=True, global_attn_indexes=structure.whole
    )


def _tokens(encoder: Any, structure: Structure, tiles: Any) -> list[Any]:
    """Return the outputs of the blocks that the decoders take, ``(batch, width, y, x)``."""
    batch, _, height, width = tiles.shape
    tokens, found = encoder.patch_embed(tiles), []
    if structure.whole is None:
        import torch

        tokens = torch.cat([encoder.cls_token.expand(batch, -1, -1), tokens], dim=1)
    tokens = tokens + encoder.pos_embed
    for number, block in enumerate(encoder.blocks, 1):
        tokens = block(tokens)
        if number in structure.skips:
            grid = tokens if structure.whole is not None else tokens[:, 1:]
            grid = grid.reshape(batch, height // _PATCH, width // _PATCH, structure.width)
            found.append(grid.permute(0, 3, 1, 2))
    return found


def _converted(state: Mapping[str, Any], structure: Structure, tile_px: int) -> dict[str, Any]:
    """Rename the arrays of SAM's encoder as timm does, and resample positions to the windows."""
    from torch.nn import functional

    side, converted = tile_px // _PATCH, {}
    for name, array in state.items():
        new, value = name.replace(".mlp.lin", ".mlp.fc") if name.startswith("encoder.") else name, array
        if name == "encoder.pos_embed" and structure.whole is not None:
            value = array[:, :side, :side]
        elif name == "encoder.pos_embed":
            value = _resampled_positions(array, side)
        elif ".attn.rel_pos_" in name and int(name.split(".")[2]) in (structure.whole or ()):
            # distances between tokens, from the windows of 1024 px that SAM was trained on
            resampled = functional.interpolate(array.T[None], size=2 * side - 1, mode="linear")
            value = resampled[0].T
        converted[new] = value
    return converted


def _resampled_positions(positions: Any, side: int) -> Any:
    """Resample the position embeddings of a plain vision transformer, as DINO's code does."""
    import torch
    from torch.nn import functional

    before = round((positions.shape[1] - 1) ** 0.5)
    if before == side:
        return positions
    grid = positions[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    # DINO adds a tenth of a token to the new side, so that rounding does not lose a token
    grid = functional.interpolate(grid, scale_factor=((side + 0.1) / before,) * 2, mode="bicubic")
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)
