"""The EfficientNet-Lites in plain torch: references for the Flax modules; `torchvision_reference.py` has the others.

Run in an environment with torch, numpy and safetensors:
`python torch_reference.py FOLDER LITE0_PTH LITE1_PTH LITE2_PTH`. It writes to FOLDER the weights
(`<network>.safetensors`), tiles and outputs (`<network>.npz`), and a file in torch's old format (`legacy.pth`) with
what torch itself reads from it (`legacy.npz`). Some networks also get the gradient of the summed squared outputs by the
first convolution's kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

SIZES = (224, 299)
GRADIENT_SIZE = 224
#: networks whose gradient is compared
WITH_GRADIENT = ("efficientnet_lite0", "resnet50", "vit_base_patch16_224")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SamePadded(nn.Conv2d):
    """TensorFlow's "same": the output is ceil(size / stride), the odd pixel goes to the right and below."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        pads = []
        for size, kernel, stride in reversed(list(zip(value.shape[2:], self.kernel_size, self.stride, strict=True))):
            remainder = size % stride or stride
            total = max(kernel - remainder, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(value, pads))


class LiteBlock(nn.Module):
    def __init__(self, before: int, after: int, kernel: int, stride: int, factor: int) -> None:
        super().__init__()
        inner = before * factor
        if factor > 1:
            self._expand_conv = SamePadded(before, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = SamePadded(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = SamePadded(inner, after, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(after, eps=1e-3)
        self.adds = before == after and stride == 1

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        inner = value
        if hasattr(self, "_expand_conv"):
            inner = functional.relu6(self._bn0(self._expand_conv(inner)))
        inner = functional.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return inner + value if self.adds else inner


# Channels, kernel, stride and expansion of every block, written out rather than scaled.
TABLES = {
    "lite0": (
        "16 3 1 1, 24 3 2 6, 24 3 1 6, 40 5 2 6, 40 5 1 6, 80 3 2 6, 80 3 1 6, 80 3 1 6, "
        "112 5 1 6, 112 5 1 6, 112 5 1 6, 192 5 2 6, 192 5 1 6, 192 5 1 6, 192 5 1 6, 320 3 1 6"
    ),
    "lite1": (
        "16 3 1 1, 24 3 2 6, 24 3 1 6, 24 3 1 6, 40 5 2 6, 40 5 1 6, 40 5 1 6, "
        "80 3 2 6, 80 3 1 6, 80 3 1 6, 80 3 1 6, 112 5 1 6, 112 5 1 6, 112 5 1 6, 112 5 1 6, "
        "192 5 2 6, 192 5 1 6, 192 5 1 6, 192 5 1 6, 192 5 1 6, 320 3 1 6"
    ),
    "lite2": (
        "16 3 1 1, 24 3 2 6, 24 3 1 6, 24 3 1 6, 48 5 2 6, 48 5 1 6, 48 5 1 6, "
        "88 3 2 6, 88 3 1 6, 88 3 1 6, 88 3 1 6, 120 5 1 6, 120 5 1 6, 120 5 1 6, 120 5 1 6, "
        "208 5 2 6, 208 5 1 6, 208 5 1 6, 208 5 1 6, 208 5 1 6, 352 3 1 6"
    ),
}
# The size that each network's weights were trained at, beside those that all are compared at.
TRAINED_AT = {"lite0": (), "lite1": (240,), "lite2": (260,)}


class Lite(nn.Module):
    def __init__(self, table: str) -> None:
        super().__init__()
        self._conv_stem = SamePadded(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, channels = [], 32
        for row in table.split(", "):
            after, kernel, stride, factor = map(int, row.split())
            blocks.append(LiteBlock(channels, after, kernel, stride, factor))
            channels = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SamePadded(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = functional.relu6(self._bn0(self._conv_stem(value)))
        for block in self._blocks:
            value = block(value)
        value = functional.relu6(self._bn1(self._conv_head(value)))
        return functional.adaptive_avg_pool2d(value, 1).flatten(1)


def write(
    network: nn.Module,
    name: str,
    folder: Path,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    sizes: tuple[int, ...] = SIZES,
    classifier: str | None = None,
) -> None:
    network.eval()
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / f"{name}.safetensors")
    if classifier is not None:
        setattr(network, classifier, nn.Identity())
    arrays = {}
    stem = next(parameter for parameter in network.parameters() if parameter.ndim == 4)
    for size in sizes:
        tiles = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8)
        tiles[1] = 255
        tiles[2, :, : size // 2] = 0
        normalized = (tiles.permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
            :, None, None
        ]
        with_gradient = name in WITH_GRADIENT and size == GRADIENT_SIZE
        with torch.set_grad_enabled(with_gradient):
            outputs = network(normalized)
        arrays |= {f"tiles_{size}": tiles.numpy(), f"outputs_{size}": outputs.detach().numpy()}
        if with_gradient:
            arrays["gradient"] = torch.autograd.grad(outputs.square().sum(), stem)[0].numpy()
    np.savez(folder / f"{name}.npz", **arrays)


def write_legacy(folder: Path) -> None:
    """Write tensors of several dtypes, a view, a transposed and an empty one in torch's old format."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "base": base,
        "view": base[1:, ::2],
        "transposed": base.T,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "half": torch.randn(5).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
    }
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    np.savez(folder / "legacy.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})


def main(folder: Path, *released: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for (name, table), weights in zip(TABLES.items(), released, strict=True):
        network = Lite(table)
        network.load_state_dict(torch.load(weights, weights_only=True))
        sizes = (*SIZES, *TRAINED_AT[name])
        write(network, f"efficientnet_{name}", folder, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, sizes=sizes)
    write_legacy(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
