"""torchvision's and timm's networks with random weights: references for the Flax modules.

Run in an environment with torch, torchvision, timm, numpy and safetensors: `python torchvision_reference.py FOLDER`.
It writes to FOLDER what `torch_reference.py` writes of each network.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn
from torch_reference import write

HALF = (0.5, 0.5, 0.5)


def randomize(network: nn.Module) -> None:
    """Give norms, tokens and attention weights that are not those that networks start with."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(part.weight, 0.5, 1.0)
            nn.init.normal_(part.bias, 0, 0.1)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    for name, parameter in network.named_parameters():
        if name.endswith(("cls_token", "class_token")):
            nn.init.normal_(parameter, 0, 0.5)
        if name.endswith(("qkv.weight", "in_proj_weight", "qkv.bias", "in_proj_bias")):
            nn.init.normal_(parameter, 0, 0.1)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for name, classifier in (("resnet50", "fc"), ("densenet121", "classifier")):
        network = torchvision.models.get_model(name)
        randomize(network)
        write(network, name, folder, classifier=classifier)
    network = torchvision.models.vit_b_16()
    randomize(network)
    write(network, "vit_b_16", folder, sizes=(224,), classifier="heads")
    for name in ("vit_base_patch16_224", "vit_tiny_patch16_224"):
        network = timm.create_model(name)
        randomize(network)
        write(network, name, folder, mean=HALF, std=HALF, sizes=(224,), classifier="head")
    for name in ("resnet50", "densenet121"):
        network = timm.create_model(name)
        randomize(network)
        write(network, f"timm_{name}", folder, sizes=(224,), classifier="fc" if name == "resnet50" else "classifier")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
