"""HoVer-Net: nuclear pixels, distances within nuclei, and types of nuclei.

Source: Graham et al., "HoVer-Net: simultaneous segmentation and classification of nuclei in multi-tissue histology
images", Medical Image Analysis 2019. The encoder is a pre-activation residual network (He et al., "Identity mappings in
deep residual networks", 2016) without a stride in the first convolution. Three decoders have densely connected units.
All layers scale with the width of the first layer, so the published network and a small network for two CPU cores share
the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import nnx

from stimage_sd.nn.layers import Conv, Norm, add, concatenate, conv, double, norm, relu, trim

#: function that applies a normalization layer, by running statistics or by batch statistics
Normalize = Callable[[Any, Norm], Any]
Padding = Literal["same", "valid"]
#: weight of the batch statistics in the update of the running statistics
_MOMENTUM = 0.1


@dataclass(frozen=True)
class HoVerNetSize:
    """Size of a HoVer-Net.

    - `width`: channels of the first convolution.
    - `depths`: number of residual units in the four encoder blocks.
    - `dense`: number of densely connected units in the first and second block of a decoder.
    - `kernel_size`: kernel size of the decoder convolutions.
    - `padding`: padding of the decoder convolutions. ``"same"`` gives maps of the tile size. ``"valid"`` gives only the
      part that does not depend on padding.
    - `pad_stem`: whether the first convolution is padded with zeros.
    """

    width: int = 64
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    dense: tuple[int, int] = (8, 4)
    kernel_size: int = 5
    padding: Padding = "same"
    pad_stem: bool = True


#: the published network with maps of the tile size, and a small network that trains on two CPU cores
SIZES = {
    "published": HoVerNetSize(),
    "small": HoVerNetSize(width=8, depths=(1, 1, 1, 1), dense=(2, 1), kernel_size=3),
}


def batch_norm(value: Any, layer: Norm) -> Any:
    """Apply batch normalization with batch statistics and update the running statistics of the layer, for training.

    - `value`: float32 (batch, height, width, channels).
    - `layer`: normalization layer. Its mean and variance are changed.

    >>> import jax.numpy as jnp
    >>> layer = Norm(1)
    >>> float(batch_norm(jnp.array([0.0, 2.0]).reshape(2, 1, 1, 1), layer)[1, 0, 0, 0].round(3))
    1.0
    >>> layer.mean[...]
    Array([0.1], dtype=float32)
    """
    mean, variance = value.mean((0, 1, 2)), value.var((0, 1, 2))
    n_values = value.size // value.shape[-1]
    unbiased = variance * n_values / max(n_values - 1, 1)
    layer.mean[...] = (1 - _MOMENTUM) * layer.mean[...] + _MOMENTUM * mean
    layer.variance[...] = (1 - _MOMENTUM) * layer.variance[...] + _MOMENTUM * unbiased
    return (value - mean) * jax.lax.rsqrt(variance + layer.epsilon) * layer.scale[...] + layer.bias[...]


class Residual(nnx.Module):
    """Residual units, each with norm, ReLU and convolution at kernel sizes 1, 3 and 1.

    - `in_channels`: number of input channels.
    - `width`: number of inner channels. The output has four times as many.
    - `depth`: number of units.
    - `stride`: stride of the first unit.
    - `rngs`: source of the initial kernels.
    """

    def __init__(self, in_channels: int, width: int, depth: int, *, stride: int, rngs: nnx.Rngs) -> None:
        out = 4 * width
        self.shortcut = Conv(in_channels, out, 1, stride=stride, rngs=rngs)
        befores = [in_channels] + [out] * (depth - 1)
        # the input of the first unit is already normalized
        self.norms = nnx.List([Norm(out) for _ in range(depth - 1)])
        self.narrow = nnx.List([Conv(before, width, 1, rngs=rngs) for before in befores])
        self.norms_1 = nnx.List([Norm(width) for _ in befores])
        self.middle = nnx.List([Conv(width, width, 3, stride=stride if n == 0 else 1, rngs=rngs) for n in range(depth)])
        self.norms_2 = nnx.List([Norm(width) for _ in befores])
        self.widen = nnx.List([Conv(width, out, 1, rngs=rngs) for _ in befores])
        self.last = Norm(out)

    def __call__(self, value: Any, normalize: Normalize) -> Any:
        """Apply the residual units."""
        kept = conv(value, self.shortcut)
        for unit, narrow in enumerate(self.narrow):
            inner = value if unit == 0 else relu(normalize(kept, self.norms[unit - 1]))
            inner = relu(normalize(conv(inner, narrow), self.norms_1[unit]))
            inner = relu(normalize(conv(inner, self.middle[unit]), self.norms_2[unit]))
            kept = add(conv(inner, self.widen[unit]), kept)
        return relu(normalize(kept, self.last))


class Dense(nnx.Module):
    """Dense block: convolution, densely connected units, and a 1 × 1 convolution.

    - `in_channels`, `width`: number of input channels, and number of channels after the first convolution.
    - `bottleneck`, `growth`: number of inner channels of a unit, and number of channels that a unit adds.
    - `n_units`: number of units.
    - `out_channels`: number of output channels.
    - `size`: size of the network, for kernel size and padding.
    - `rngs`: source of the initial kernels.
    """

    def __init__(
        self, in_channels: int, width: int, *, bottleneck: int, growth: int, n_units: int, out_channels: int,
        size: HoVerNetSize, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        kernel = size.kernel_size
        self.lost = kernel // 2 if size.padding == "valid" else 0
        self.first = Conv(in_channels, width, kernel, padding=size.padding, rngs=rngs)
        befores = [width + unit * growth for unit in range(n_units)]
        self.norms = nnx.List([Norm(before) for before in befores])
        self.narrow = nnx.List([Conv(before, bottleneck, 1, rngs=rngs) for before in befores])
        self.norms_1 = nnx.List([Norm(bottleneck) for _ in befores])
        self.grow = nnx.List(
            [Conv(bottleneck, growth, kernel, groups=4, padding=size.padding, rngs=rngs) for _ in befores]
        )
        self.last = Norm(width + n_units * growth)
        self.out = Conv(width + n_units * growth, out_channels, 1, rngs=rngs)

    def __call__(self, value: Any, normalize: Normalize) -> Any:
        """Apply the first convolution, the units and the last convolution."""
        value = conv(value, self.first)
        for before, narrow, after, grow in zip(self.norms, self.narrow, self.norms_1, self.grow, strict=True):
            inner = relu(normalize(conv(relu(normalize(value, before)), narrow), after))
            value = concatenate(trim(value, self.lost), [conv(inner, grow)])
        return conv(relu(normalize(value, self.last)), self.out)


class Decoder(nnx.Module):
    """Decoder from the four encoder values to maps of the tile.

    - `size`: size of the network.
    - `n_maps`: number of channels of the maps.
    - `rngs`: source of the initial kernels.
    """

    def __init__(self, size: HoVerNetSize, n_maps: int, *, rngs: nnx.Rngs) -> None:
        width, growth = size.width, size.width // 2
        common: dict[str, Any] = {"bottleneck": 2 * width, "growth": growth, "size": size, "rngs": rngs}
        n_coarse, n_fine = size.dense
        self.coarse = Dense(16 * width, 4 * width, n_units=n_coarse, out_channels=8 * width, **common)
        self.fine = Dense(8 * width, 2 * width, n_units=n_fine, out_channels=4 * width, **common)
        self.last = Conv(4 * width, width, size.kernel_size, rngs=rngs)
        self.norm = Norm(width)
        self.maps = Conv(width, n_maps, 1, bias=True, rngs=rngs)
        # crop of the finer encoder values, because valid convolutions lose their border
        self._trims = _trims(size)

    def __call__(self, values: tuple[Any, Any, Any, Any], normalize: Normalize) -> tuple[Any, Any]:
        """Return the maps, and the features from which they are computed."""
        finest, fine, coarse, coarsest = values
        value = self.coarse(add(double(coarsest), coarse), normalize)
        value = self.fine(add(double(value), trim(fine, self._trims[0])), normalize)
        value = conv(add(double(value), trim(finest, self._trims[1])), self.last)
        features = relu(normalize(value, self.norm))
        return conv(features, self.maps), features


def _trims(size: HoVerNetSize) -> tuple[int, int]:
    """Return the crop per side for the values of the second and the first encoder block, px."""
    if size.padding == "same":
        return 0, 0
    lost = size.kernel_size // 2
    after_coarse = lost * (1 + size.dense[0])
    return 2 * after_coarse, 2 * (2 * after_coarse + lost * (1 + size.dense[1]))


class Stem(nnx.Module):
    """First convolution of the encoder."""

    def __init__(self, size: HoVerNetSize, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(3, size.width, 7, padding="same" if size.pad_stem else "valid", rngs=rngs)
        self.norm = Norm(size.width)

    def __call__(self, tiles: Any, normalize: Normalize) -> Any:
        """Apply convolution, normalization and ReLU."""
        return relu(normalize(conv(tiles, self.conv), self.norm))


def as_fitted(module: Any, value: Any) -> Any:
    """Run a part of the network with running statistics."""
    return module(value, norm)


def as_trained(module: Any, value: Any) -> Any:
    """Run a part of the network with batch statistics, and recompute its activations for the gradient."""
    return nnx.remat(lambda part, given: part(given, batch_norm))(module, value)


class HoVerNet(nnx.Module):
    """HoVer-Net with three decoders.

    - `n_types`: number of types of nuclei, without the background.
    - `size`: size of the network.
    - `rngs`: source of the initial kernels.

    >>> import jax.numpy as jnp
    >>> maps = lambda: HoVerNet(4, size=SIZES["small"], rngs=nnx.Rngs(0))(jnp.zeros((1, 64, 64, 3)))
    >>> [each.shape for each in nnx.eval_shape(maps)]
    [(1, 64, 64, 2), (1, 64, 64, 2), (1, 64, 64, 5), (1, 64, 64, 8)]
    """

    def __init__(self, n_types: int, *, size: HoVerNetSize = SIZES["published"], rngs: nnx.Rngs) -> None:
        width = size.width
        self.stem = Stem(size, rngs=rngs)
        blocks, before = [], width
        for index, depth in enumerate(size.depths):
            inner = width * 2**index
            blocks.append(Residual(before, inner, depth, stride=1 if index == 0 else 2, rngs=rngs))
            before = 4 * inner
        self.blocks = nnx.List(blocks)
        self.bottom = Conv(before, 16 * width, 1, rngs=rngs)
        self.nuclear = Decoder(size, 2, rngs=rngs)
        self.hv = Decoder(size, 2, rngs=rngs)
        self.types = Decoder(size, n_types + 1, rngs=rngs)

    def __call__(self, tiles: Any, run: Callable[[Any, Any], Any] = as_fitted) -> tuple[Any, Any, Any, Any]:
        """Compute the maps of tiles.

        - `tiles`: tiles from 0 to 1, float32 (batch, height, width, 3). Height and width must be divisible by 8.
        - `run`: `as_fitted` or `as_trained`.
        - returns: logits of background and nucleus, horizontal and vertical distance, logits of background and types,
          and the features of the type logits, with ``width`` channels.
        """
        value = run(self.stem, tiles)
        values = []
        for block in self.blocks:
            value = run(block, value)
            values.append(value)
        encoded = (*values[:3], conv(value, self.bottom))
        (nuclear, _), (hv, _) = run(self.nuclear, encoded), run(self.hv, encoded)
        types, features = run(self.types, encoded)
        return nuclear, hv, types, features

    def stacked(self, tiles: Any) -> Any:
        """Return the maps of tiles concatenated along the channels, for recording a graph."""
        nuclear, hv, types, features = self(tiles)
        return concatenate(nuclear, [hv, types, features])


def n_parameters(network: nnx.Module) -> int:
    """Count the trained parameters of a network.

    >>> n_parameters(Conv(3, 4, 3, rngs=nnx.Rngs(0)))
    108
    """
    return sum(variable[...].size for _, variable in nnx.to_flat_state(nnx.state(network, nnx.Param)))
