"""Tiles of a slide to embeddings on disk, by ResNet-50 at 224 px: as `benchmarks.embedding`, with random weights.

The weights are those of `benchmarks.finetune.random_resnet50`, the same on every side: speed does not depend on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.embedding import Network, comparison
from benchmarks.finetune import random_resnet50
from benchmarks.slides import made, needs_bench


def weights() -> Path:
    """Give the file of random weights, written at the first run."""
    return made("resnet50.safetensors", random_resnet50)


def resnet50_in_torch() -> Any:
    """Build torchvision's ResNet-50 with those weights."""
    try:
        import torch
        import torchvision
    except ImportError as error:
        raise needs_bench("torchvision") from error
    from safetensors.torch import load_file

    network = torchvision.models.resnet50(weights=None)
    network.fc = torch.nn.Identity()
    # the counters of training steps are not among them
    missing, unexpected = network.load_state_dict(load_file(weights()), strict=False)
    if unexpected or not all(name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"Expected the weights of ResNet-50, found {unexpected} beside and {missing} missing.")
    return network


WORK = comparison(
    Network("resnet50", weights, resnet50_in_torch),
    title="Embedding tiles of a slide, ResNet-50, 224 px",
    sizes=(25, 49, 100),
    faster_than_torch=1.8,
)
