"""HoVer-Net in plain torch, from its description and with its authors' names: the reference for the Flax module.

Run in an environment with torch, numpy and safetensors: `python hovernet_reference.py FOLDER`. For every case it writes
weights (`<case>.safetensors`) and pictures with the maps in evaluation and in training (`<case>.npz`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

#: width, units of the encoder, units of the decoders, kernel, whether the decoders pad, whether the stem does, side
CASES = {
    "same": (16, (2, 1, 2, 1), (2, 1), 5, True, True, 64),
    "fast": (16, (1, 2, 1, 1), (8, 4), 3, False, True, 128),
    "original": (16, (1, 1, 1, 2), (8, 4), 5, False, False, 270),
}
N_TYPES = 4


def padded(value: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """TensorFlow's "same"."""
    pads = []
    for size in reversed(value.shape[2:]):
        total = max(kernel - (size % stride or stride), 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(value, pads)


def cropped(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    lost = (value.shape[2] - like.shape[2]) // 2
    return value[:, :, lost : value.shape[2] - lost, lost : value.shape[3] - lost]


def named(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


class Residual(nn.Module):
    def __init__(self, before: int, width: int, depth: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.units = nn.ModuleList()
        for number in range(depth):
            inputs = before if number == 0 else 4 * width
            unit = {
                "conv1": nn.Conv2d(inputs, width, 1, bias=False),
                "conv1/bn": nn.BatchNorm2d(width),
                "conv2": nn.Conv2d(width, width, 3, stride if number == 0 else 1, bias=False),
                "conv2/bn": nn.BatchNorm2d(width),
                "conv3": nn.Conv2d(width, 4 * width, 1, bias=False),
            }
            if number:
                unit["preact/bn"] = nn.BatchNorm2d(inputs)
            self.units.append(nn.ModuleDict(unit))
        self.shortcut = nn.Conv2d(before, 4 * width, 1, stride, bias=False)
        self.blk_bna = named(bn=nn.BatchNorm2d(4 * width))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        kept = self.shortcut(value)
        for number, unit in enumerate(self.units):
            inner = value if number == 0 else functional.relu(unit["preact/bn"](kept))
            inner = functional.relu(unit["conv1/bn"](unit["conv1"](inner)))
            inner = unit["conv2"](padded(inner, 3, self.stride if number == 0 else 1))
            inner = functional.relu(unit["conv2/bn"](inner))
            kept = unit["conv3"](inner) + kept
        return functional.relu(self.blk_bna["bn"](kept))


class Dense(nn.Module):
    def __init__(self, before: int, bottleneck: int, growth: int, kernel: int, count: int, pads: bool) -> None:
        super().__init__()
        self.padding = kernel // 2 if pads else 0
        self.units = nn.ModuleList(
            nn.ModuleDict(
                {
                    "preact_bna/bn": nn.BatchNorm2d(before + n * growth),
                    "conv1": nn.Conv2d(before + n * growth, bottleneck, 1, bias=False),
                    "conv1/bn": nn.BatchNorm2d(bottleneck),
                    "conv2": nn.Conv2d(bottleneck, growth, kernel, padding=self.padding, groups=4, bias=False),
                }
            )
            for n in range(count)
        )
        self.blk_bna = named(bn=nn.BatchNorm2d(before + count * growth))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for unit in self.units:
            inner = functional.relu(unit["preact_bna/bn"](value))
            inner = unit["conv2"](functional.relu(unit["conv1/bn"](unit["conv1"](inner))))
            value = torch.cat([cropped(value, inner), inner], 1)
        return functional.relu(self.blk_bna["bn"](value))


class Decoder(nn.Module):
    def __init__(self, width: int, counts: tuple[int, int], kernel: int, pads: bool, n_maps: int) -> None:
        super().__init__()
        padding, growth = (kernel // 2 if pads else 0), width // 2

        def block(before: int, inner: int, count: int, after: int) -> nn.ModuleDict:
            return named(
                conva=nn.Conv2d(before, inner, kernel, padding=padding, bias=False),
                dense=Dense(inner, 2 * width, growth, kernel, count, pads),
                convf=nn.Conv2d(inner + count * growth, after, 1, bias=False),
            )

        self.u3 = block(16 * width, 4 * width, counts[0], 8 * width)
        self.u2 = block(8 * width, 2 * width, counts[1], 4 * width)
        self.u1 = named(conva=nn.Conv2d(4 * width, width, kernel, padding=kernel // 2, bias=False))
        self.u0 = named(bn=nn.BatchNorm2d(width), conv=nn.Conv2d(width, n_maps, 1))

    def forward(self, values: list[torch.Tensor]) -> torch.Tensor:
        value = values[3]
        for block, finer in ((self.u3, values[2]), (self.u2, values[1])):
            value = functional.interpolate(value, scale_factor=2, mode="nearest")
            value = value + cropped(finer, value)
            value = block["convf"](block["dense"](block["conva"](value)))
        value = functional.interpolate(value, scale_factor=2, mode="nearest")
        value = self.u1["conva"](value + cropped(values[0], value))
        return self.u0["conv"](functional.relu(self.u0["bn"](value)))


class HoVerNet(nn.Module):
    def __init__(
        self, width: int, depths: tuple[int, ...], counts: tuple[int, int], kernel: int, pads: bool, pad_stem: bool
    ) -> None:
        super().__init__()
        self.pad_stem = pad_stem
        self.conv0 = nn.ModuleDict({"/": nn.Conv2d(3, width, 7, bias=False), "bn": nn.BatchNorm2d(width)})
        before = width
        for number, depth in enumerate(depths):
            block = Residual(before, width * 2**number, depth, 1 if number == 0 else 2)
            setattr(self, f"d{number}", block)
            before = 4 * width * 2**number
        self.conv_bot = nn.Conv2d(before, 16 * width, 1, bias=False)
        self.decoder = nn.ModuleDict(
            {
                name: Decoder(width, counts, kernel, pads, n_maps)
                for name, n_maps in (("tp", N_TYPES + 1), ("np", 2), ("hv", 2))
            }
        )

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        value = padded(pictures, 7, 1) if self.pad_stem else pictures
        value = functional.relu(self.conv0["bn"](self.conv0["/"](value)))
        values = []
        for number in range(4):
            value = getattr(self, f"d{number}")(value)
            values.append(value)
        values[3] = self.conv_bot(values[3])
        return [self.decoder[name](values) for name in ("np", "hv", "tp")]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    for name, (*size, side) in CASES.items():
        network = HoVerNet(*size)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    nn.init.uniform_(tensor, 0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    nn.init.uniform_(tensor, -0.2, 0.2)
        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
        pictures = torch.rand(2, 3, side, side)
        arrays = {"pictures": pictures.permute(0, 2, 3, 1).numpy()}
        with torch.no_grad():
            for mode in ("evaluation", "training"):
                network.train(mode == "training")
                for branch, maps in zip(("np", "hv", "tp"), network(pictures), strict=True):
                    arrays[f"{mode}_{branch}"] = maps.permute(0, 2, 3, 1).numpy()
        arrays["followed_mean"] = network.d2.blk_bna["bn"].running_mean.numpy()
        arrays["followed_variance"] = network.d2.blk_bna["bn"].running_var.numpy()
        np.savez(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
