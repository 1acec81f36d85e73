"""Weights of HoVer-Net and its encoder, from files with the names of HoVer-Net's authors, torchvision or timm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from flax import nnx
from numpy.typing import NDArray

from stimage_sd.models._weights import fill_variables, norm_names, read_safetensors, sha256_of_file
from stimage_sd.nn.hovernet import Decoder, Dense, HoVerNet, Residual

Named = Iterator[tuple[str, nnx.Variable]]
#: prefixes of names in the authors' files
_WRAPPERS = ("module.", "desc.", "model.")


def load_hovernet(network: HoVerNet, path: Path) -> str:
    """Read weights from a file into a network, in place.

    - `network`: the network.
    - `path`: a safetensors file. Accepted are HoVer-Net's weights, whole or only the encoder, with the authors' names,
      and ResNet-50's weights with the names of torchvision and timm. ResNet-50 normalizes after its convolutions, but
      the encoder normalizes before them. The encoder therefore takes the convolutions and the first two normalizations
      of each unit, which have the same place in both. The other normalizations stay unchanged.
    - returns: the file's sha256.
    """
    arrays = {_unwrapped(name): array for name, array in read_safetensors(path).items()}
    try:
        if "layer1.0.conv1.weight" in arrays:
            wanted = dict(resnet_names(network))
            arrays = {name: array for name, array in arrays.items() if not _without_place(name)}
        else:
            wanted = dict(encoder_names(network))
            if any(name.startswith("decoder.") for name in arrays):
                wanted |= dict(decoder_names(network))
        fill_variables(wanted, arrays)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the network: {error} Check `size=`.") from error
    return sha256_of_file(path)


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _without_place(name: str) -> bool:
    """Return whether an array of ResNet-50 has no counterpart in the encoder."""
    return ".bn3." in name or ".downsample.1." in name


def encoder_names(network: HoVerNet) -> Named:
    """Yield the encoder's variables with the names of their arrays in the authors' files."""
    yield "conv0./.weight", network.stem.conv.kernel
    yield from norm_names(network.stem.norm, "conv0.bn").items()
    for index, block in enumerate(network.blocks):
        yield from _residual_names(f"d{index}", block)
    yield "conv_bot.weight", network.bottom.kernel


def decoder_names(network: HoVerNet) -> Named:
    """Yield the decoders' variables with the names of their arrays in the authors' files."""
    branches: Mapping[str, Decoder] = {"np": network.nuclear, "hv": network.hv, "tp": network.types}
    for branch, decoder in branches.items():
        prefix = f"decoder.{branch}"
        yield from _dense_names(f"{prefix}.u3", decoder.coarse)
        yield from _dense_names(f"{prefix}.u2", decoder.fine)
        yield f"{prefix}.u1.conva.weight", decoder.last.kernel
        yield from norm_names(decoder.norm, f"{prefix}.u0.bn").items()
        yield f"{prefix}.u0.conv.weight", decoder.maps.kernel
        assert decoder.maps.bias is not None
        yield f"{prefix}.u0.conv.bias", decoder.maps.bias


def resnet_names(network: HoVerNet) -> Named:
    """Yield the encoder's variables with the names of their arrays in torchvision's ResNet-50."""
    yield "conv1.weight", network.stem.conv.kernel
    yield from norm_names(network.stem.norm, "bn1").items()
    for stage, block in enumerate(network.blocks, start=1):
        yield f"layer{stage}.0.downsample.0.weight", block.shortcut.kernel
        for index in range(len(block.narrow)):
            prefix = f"layer{stage}.{index}"
            yield f"{prefix}.conv1.weight", block.narrow[index].kernel
            yield from norm_names(block.norms_1[index], f"{prefix}.bn1").items()
            yield f"{prefix}.conv2.weight", block.middle[index].kernel
            yield from norm_names(block.norms_2[index], f"{prefix}.bn2").items()
            yield f"{prefix}.conv3.weight", block.widen[index].kernel


def _residual_names(prefix: str, block: Residual) -> Named:
    yield f"{prefix}.shortcut.weight", block.shortcut.kernel
    for index in range(len(block.narrow)):
        unit = f"{prefix}.units.{index}"
        if index:
            yield from norm_names(block.norms[index - 1], f"{unit}.preact/bn").items()
        yield f"{unit}.conv1.weight", block.narrow[index].kernel
        yield from norm_names(block.norms_1[index], f"{unit}.conv1/bn").items()
        yield f"{unit}.conv2.weight", block.middle[index].kernel
        yield from norm_names(block.norms_2[index], f"{unit}.conv2/bn").items()
        yield f"{unit}.conv3.weight", block.widen[index].kernel
    yield from norm_names(block.last, f"{prefix}.blk_bna.bn").items()


def _dense_names(prefix: str, dense: Dense) -> Named:
    yield f"{prefix}.conva.weight", dense.first.kernel
    for index in range(len(dense.narrow)):
        unit = f"{prefix}.dense.units.{index}"
        yield from norm_names(dense.norms[index], f"{unit}.preact_bna/bn").items()
        yield f"{unit}.conv1.weight", dense.narrow[index].kernel
        yield from norm_names(dense.norms_1[index], f"{unit}.conv1/bn").items()
        yield f"{unit}.conv2.weight", dense.grow[index].kernel
    yield from norm_names(dense.last, f"{prefix}.dense.blk_bna.bn").items()
    yield f"{prefix}.convf.weight", dense.out.kernel


def arrays_in_authors_naming(network: HoVerNet) -> dict[str, NDArray[np.float32]]:
    """Return a network's arrays with the names and layout of the authors' files.

    >>> from stimage_sd.nn.hovernet import SIZES
    >>> network = HoVerNet(2, size=SIZES["small"], rngs=nnx.Rngs(0))
    >>> arrays_in_authors_naming(network)["conv0./.weight"].shape
    (8, 3, 7, 7)
    """
    named = dict([*encoder_names(network), *decoder_names(network)])
    arrays = {name: np.asarray(variable[...]) for name, variable in named.items()}
    return {
        name: np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array
        for name, array in arrays.items()
    }
