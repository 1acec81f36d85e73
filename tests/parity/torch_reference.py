"""EfficientNet-Lite0 and ResNet-50 in plain torch: an independent reference for the Flax modules.

Run in an environment with torch, numpy and safetensors: `python torch_reference.py LITE0_PTH FOLDER`. It
writes to FOLDER the weights (`<network>.safetensors`), tiles and outputs (`<network>.npz`, with the
gradient of the summed squared outputs by the stem's kernel), and a file in torch's old format
(`legacy.pth`) with what torch itself reads from it (`legacy.npz`).
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


class Lite0(nn.Module):
    # Channels, kernel, stride and expansion of the sixteen blocks, written out.
    TABLE = (
        "16 3 1 1, 24 3 2 6, 24 3 1 6, 40 5 2 6, 40 5 1 6, 80 3 2 6, 80 3 1 6, 80 3 1 6, "
        "112 5 1 6, 112 5 1 6, 112 5 1 6, 192 5 2 6, 192 5 1 6, 192 5 1 6, 192 5 1 6, 320 3 1 6"
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SamePadded(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, channels = [], 32
        for row in self.TABLE.split(", "):
            after, kernel, stride, factor = map(int, row.split())
            blocks.append(LiteBlock(channels, after, kernel, stride, factor))
            channels = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SamePadded(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = functional.relu6(self._bn0(self._conv_stem(value)))
        for block in self._blocks:
            value = block(value)
        value = functional.relu6(self._bn1(self._conv_head(value)))
        return functional.adaptive_avg_pool2d(value, 1).flatten(1)


class ResBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential()
        if stride > 1 or before != 4 * width:
            convolution = nn.Conv2d(before, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(4 * width))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.bn1(self.conv1(value)))
        inner = torch.relu(self.bn2(self.conv2(inner)))
        return torch.relu(self.bn3(self.conv3(inner)) + self.downsample(value))


class Res50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(ResBlock(64, 64, 1), *(ResBlock(256, 64, 1) for _ in range(2)))
        self.layer2 = nn.Sequential(ResBlock(256, 128, 2), *(ResBlock(512, 128, 1) for _ in range(3)))
        self.layer3 = nn.Sequential(ResBlock(512, 256, 2), *(ResBlock(1024, 256, 1) for _ in range(5)))
        self.layer4 = nn.Sequential(ResBlock(1024, 512, 2), *(ResBlock(2048, 512, 1) for _ in range(2)))
        self.fc = nn.Linear(2048, 1000)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = functional.max_pool2d(torch.relu(self.bn1(self.conv1(value))), 3, 2, 1)
        value = self.layer4(self.layer3(self.layer2(self.layer1(value))))
        return value.mean((2, 3))


def randomise_norms(network: nn.Module) -> None:
    """Give batch norms scales, biases and statistics that are not the identity."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.0)
            nn.init.normal_(part.bias, 0, 0.1)
            nn.init.normal_(part.running_mean, 0, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)


def write(network: nn.Module, name: str, folder: Path, *, mean: list[float], std: list[float]) -> None:
    network.eval()
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / f"{name}.safetensors")
    arrays = {}
    stem = next(network.parameters())
    for size in SIZES:
        tiles = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8)
        tiles[1] = 255
        tiles[2, :, : size // 2] = 0
        normalised = (tiles.permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
            :, None, None
        ]
        outputs = network(normalised)
        gradient = torch.autograd.grad(outputs.square().sum(), stem)[0]
        arrays |= {
            f"tiles_{size}": tiles.numpy(),
            f"outputs_{size}": outputs.detach().numpy(),
            f"gradient_{size}": gradient.numpy(),
        }
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


def main(lite0_weights: Path, folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    lite0, res50 = Lite0(), Res50()
    lite0.load_state_dict(torch.load(lite0_weights, weights_only=True))
    randomise_norms(res50)
    write(lite0, "efficientnet_lite0", folder, mean=[127 / 255] * 3, std=[128 / 255] * 3)
    write(res50, "resnet50", folder, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    write_legacy(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
