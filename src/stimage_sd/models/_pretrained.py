"""DenseNet-121 and vision transformers with weights from torchvision or timm."""

from __future__ import annotations

import re
from pathlib import Path

from flax import nnx

from stimage_sd.models._torch_legacy import Arrays
from stimage_sd.models._weights import (
    Pretrained,
    abstract,
    fill_variables,
    find_weights,
    norm_names,
    read_safetensors,
    sha256_of_file,
    variables_by_name,
)
from stimage_sd.nn.densenet import DenseNet121
from stimage_sd.nn.vision_transformer import SIZES, VisionTransformer

DENSENET121_HUB = "timm/densenet121.tv_in1k"
VIT_HUBS = {"vit_base_patch16_224": "timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "vit_b_16": None}


def densenet121_names(network: DenseNet121) -> dict[str, nnx.Variable]:
    """Return the network's variables by the names of their arrays in torchvision and timm.

    >>> list(densenet121_names(abstract(DenseNet121)))[0]
    'features.conv0.weight'
    """
    wanted = variables_by_name([(network.stem, "features.conv0", "features.norm0")])
    for stage, block in enumerate(network.blocks, start=1):
        for index, layer in enumerate(block, start=1):
            prefix = f"features.denseblock{stage}.denselayer{index}."
            wanted |= norm_names(layer.before, f"{prefix}norm1")
            wanted |= variables_by_name([(layer.reduce, f"{prefix}conv1", f"{prefix}norm2")])
            wanted[f"{prefix}conv2.weight"] = layer.filter.kernel
    for stage, transition in enumerate(network.transitions, start=1):
        wanted |= norm_names(transition.before, f"features.transition{stage}.norm")
        wanted[f"features.transition{stage}.conv.weight"] = transition.reduce.kernel
    return wanted | norm_names(network.after, "features.norm5")


def load_densenet121(weights: Path | None) -> Pretrained:
    """Build DenseNet-121 with weights from torchvision or timm, as `load_resnet50` does for ResNet-50."""
    file = find_weights("densenet121", hub=DENSENET121_HUB) if weights is None else weights
    # torchvision's released file has "norm.1" in place of the network's "norm1"
    arrays = {
        re.sub(r"\b(norm|conv)\.([12])\b", r"\1\2", name): array for name, array in read_safetensors(file).items()
    }
    network = abstract(DenseNet121)
    fill_variables(densenet121_names(network), arrays)
    return Pretrained(network, sha256_of_file(file))


def vision_transformer_names(network: VisionTransformer, *, torchvision: bool) -> dict[str, nnx.Variable]:
    """Return the network's variables by the names of their arrays in torchvision (``vit_b_16``) or timm.

    >>> tiny = nnx.eval_shape(lambda: VisionTransformer(SIZES["tiny"], rngs=nnx.Rngs(0)))
    >>> list(vision_transformer_names(tiny, torchvision=False))[:2]
    ['cls_token', 'pos_embed']
    """
    if torchvision:
        ends, tops, block = _TORCHVISION_BLOCK, _TORCHVISION_TOP, "encoder.layers.encoder_layer_{}."
    else:
        ends, tops, block = _TIMM_BLOCK, _TIMM_TOP, "blocks.{}."
    token, positions, patches, after = tops
    wanted: dict[str, nnx.Variable] = {token: network.class_token, positions: network.positions}
    wanted |= _kernel_and_bias(network.patches, f"{patches}.{{}}") | _kernel_and_bias(network.after, f"{after}.{{}}")
    for index, layers in enumerate(network.blocks):
        for attribute, end in ends.items():
            wanted |= _kernel_and_bias(getattr(layers, attribute), block.format(index) + end)
    return wanted


_TIMM_TOP = ("cls_token", "pos_embed", "patch_embed.proj", "norm")
_TIMM_BLOCK = {
    "before_attention": "norm1.{}",
    "queries_keys_values": "attn.qkv.{}",
    "project": "attn.proj.{}",
    "before_expansion": "norm2.{}",
    "expand": "mlp.fc1.{}",
    "contract": "mlp.fc2.{}",
}
_TORCHVISION_TOP = ("class_token", "encoder.pos_embedding", "conv_proj", "encoder.ln")
_TORCHVISION_BLOCK = {
    "before_attention": "ln_1.{}",
    "queries_keys_values": "self_attention.in_proj_{}",
    "project": "self_attention.out_proj.{}",
    "before_expansion": "ln_2.{}",
    "expand": "mlp.0.{}",
    "contract": "mlp.3.{}",
}


def _kernel_and_bias(layer: nnx.Linear | nnx.Conv | nnx.LayerNorm, name: str) -> dict[str, nnx.Variable]:
    kernel = layer.scale if isinstance(layer, nnx.LayerNorm) else layer.kernel
    if kernel is None or layer.bias is None:
        raise TypeError(f"Expected a layer with scale or kernel, and bias, for the weights {name!r}.")
    return {name.format("weight"): kernel, name.format("bias"): layer.bias}


def load_vision_transformer(weights: Path | None, *, name: str, size: str = "base") -> Pretrained:
    """Build a vision transformer (patches of 16 px, tiles of 224 px), as `load_resnet50` does for ResNet-50.

    - `weights`: a safetensors file with torchvision's or timm's names, or `None` to search for one (`find_weights`).
    - `name`: name of the extractor.
    - `size`: ``"tiny"``, ``"small"`` or ``"base"``.
    """
    file = find_weights(name, hub=VIT_HUBS.get(name)) if weights is None else weights
    arrays: Arrays = read_safetensors(file)
    network = nnx.eval_shape(lambda: VisionTransformer(SIZES[size], rngs=nnx.Rngs(0)))
    fill_variables(vision_transformer_names(network, torchvision="conv_proj.weight" in arrays), arrays)
    return Pretrained(network, sha256_of_file(file))
