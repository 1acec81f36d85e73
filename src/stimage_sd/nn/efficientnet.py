"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation and with ReLU6.

Source: Tan & Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019, and the
TensorFlow EfficientNet-Lite models, whose settings the released weights were trained with: "same" padding,
batch-norm epsilon 1e-3, 224-pixel input normalised by mean 127 and deviation 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from flax import nnx

from stimage_sd.nn.layers import ConvNorm, add, conv_norm, global_mean, relu6
from stimage_sd.nn.parts import Part, run_parts

Value = TypeVar("Value")

BATCH_NORM_EPSILON = 1e-3
STEM_CHANNELS = 32
EMBEDDING_SIZE = 1280
#: blocks that halve the image, after the second: a part of the network starts there
PART_STARTS = (3, 5, 11)


class Stage(NamedTuple):
    """Blocks of one kind; only the first has the stride and changes the channels.

    Examples
    --------
    >>> Stage(repeats=2, kernel_size=3, stride=2, expansion=6, channels=24).channels
    24
    """

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(repeats=1, kernel_size=3, stride=1, expansion=1, channels=16),
    Stage(repeats=2, kernel_size=3, stride=2, expansion=6, channels=24),
    Stage(repeats=2, kernel_size=5, stride=2, expansion=6, channels=40),
    Stage(repeats=3, kernel_size=3, stride=2, expansion=6, channels=80),
    Stage(repeats=3, kernel_size=5, stride=1, expansion=6, channels=112),
    Stage(repeats=4, kernel_size=5, stride=2, expansion=6, channels=192),
    Stage(repeats=1, kernel_size=3, stride=1, expansion=6, channels=320),
)


class InvertedResidual(nnx.Module):
    """Expand the channels, filter each of them, project; add the input where the shapes agree.

    Parameters
    ----------
    in_channels, out_channels
        Channels before and after.
    kernel_size, stride
        Of the depthwise convolution.
    expansion
        Factor of the channels inside; at 1 there is no expanding convolution.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> block = InvertedResidual(8, 8, kernel_size=3, stride=1, expansion=6, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((1, 6, 6, 8))).shape
    (1, 6, 6, 8)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int,
        expansion: int,
        rngs: nnx.Rngs,
    ) -> None:
        inner = in_channels * expansion
        common: dict[str, Any] = {"padding": "same", "epsilon": BATCH_NORM_EPSILON, "rngs": rngs}
        self.expand = ConvNorm(in_channels, inner, 1, **common) if expansion != 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel_size, stride=stride, depthwise=True, **common)
        self.project = ConvNorm(inner, out_channels, 1, **common)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def __call__(self, value: Value) -> Value:
        """Run the block on float32 (batch, height, width, in_channels) or on a graph's value."""
        inner = value if self.expand is None else relu6(conv_norm(value, self.expand))
        inner = relu6(conv_norm(inner, self.depthwise))
        projected = conv_norm(inner, self.project)
        return add(projected, value) if self.has_shortcut else projected


class EfficientNetLite0(nnx.Module):
    """EfficientNet-Lite0 up to its pooled features.

    Parameters
    ----------
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> nnx.eval_shape(lambda: EfficientNetLite0(rngs=nnx.Rngs(0))(jnp.zeros((1, 32, 32, 3)))).shape
    (1, 1280)
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        common: dict[str, Any] = {"padding": "same", "epsilon": BATCH_NORM_EPSILON, "rngs": rngs}
        self.stem = ConvNorm(3, STEM_CHANNELS, 3, stride=2, **common)
        blocks = []
        channels = STEM_CHANNELS
        for stage in STAGES:
            for repeat in range(stage.repeats):
                block = InvertedResidual(
                    channels,
                    stage.channels,
                    kernel_size=stage.kernel_size,
                    stride=stage.stride if repeat == 0 else 1,
                    expansion=stage.expansion,
                    rngs=rngs,
                )
                blocks.append(block)
                channels = stage.channels
        self.blocks = nnx.List(blocks)
        self.head = ConvNorm(channels, EMBEDDING_SIZE, 1, **common)

    def parts(self) -> list[Part]:
        """Give the blocks of each resolution; the first with the stem, the last with the head and pooling."""
        cuts = [0, *PART_STARTS, len(self.blocks)]
        groups = [list(self.blocks[start:stop]) for start, stop in pairwise(cuts)]
        middle = [Part(tuple(group), partial(_through, group)) for group in groups[1:-1]]
        first = Part((self.stem, *groups[0]), lambda tiles: _through(groups[0], relu6(conv_norm(tiles, self.stem))))
        last = Part(
            (*groups[-1], self.head),
            lambda value: global_mean(relu6(conv_norm(_through(groups[-1], value), self.head))),
        )
        return [first, *middle, last]

    def __call__(self, tiles: Any) -> Any:
        """Embed tiles.

        Parameters
        ----------
        tiles
            float32 (batch, height, width, 3), RGB, normalised; or the input of a graph being recorded.

        Returns
        -------
        embeddings
            float32 (batch, 1280), or the graph's value.
        """
        return run_parts(self.parts(), tiles)


def _through(blocks: Sequence[InvertedResidual], value: Any) -> Any:
    for block in blocks:
        value = block(value)
    return value
