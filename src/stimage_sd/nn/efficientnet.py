"""EfficientNet-Lite at several widths and depths: EfficientNet with ReLU6, without squeeze-and-excitation.

Source: Tan & Le, "EfficientNet: rethinking model scaling for convolutional neural networks", 2019, and the TensorFlow
EfficientNet-Lite models. The released weights were trained with "same" padding, batch-norm epsilon 1e-3, and input
normalized by mean 127 and deviation 128. The input size is 224 pixels for Lite0, 240 for Lite1 and 260 for Lite2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple, TypeVar

from flax import nnx

from stimage_sd.nn.layers import ConvNorm, add, concatenate, conv_norm, global_mean, relu6
from stimage_sd.nn.parts import Part, run_blocks, run_parts

Value = TypeVar("Value")

BATCH_NORM_EPSILON = 1e-3
STEM_CHANNELS = 32
EMBEDDING_SIZE = 1280
#: channels of the stages of Lite0 at a quarter, an eighth and a sixteenth of the tile size
N_STAGE_CHANNELS = 24 + 40 + 112
#: the channels of a stage are a multiple of this number
CHANNEL_STEP = 8


class Stage(NamedTuple):
    """Blocks of one kind, where only the first block has the stride and changes the channels.

    >>> Stage(repeats=2, kernel_size=3, stride=2, expansion=6, channels=24).channels
    24
    """

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


#: stages of EfficientNet-Lite0, from which the other networks are scaled
STAGES = (
    Stage(repeats=1, kernel_size=3, stride=1, expansion=1, channels=16),
    Stage(repeats=2, kernel_size=3, stride=2, expansion=6, channels=24),
    Stage(repeats=2, kernel_size=5, stride=2, expansion=6, channels=40),
    Stage(repeats=3, kernel_size=3, stride=2, expansion=6, channels=80),
    Stage(repeats=3, kernel_size=5, stride=1, expansion=6, channels=112),
    Stage(repeats=4, kernel_size=5, stride=2, expansion=6, channels=192),
    Stage(repeats=1, kernel_size=3, stride=1, expansion=6, channels=320),
)


class Scaling(NamedTuple):
    """Width and depth of a network relative to EfficientNet-Lite0.

    Unlike in EfficientNet, stem and head keep their channels, and the first and last stage keep one block.

    - `width`: factor on the channels of every stage.
    - `depth`: factor on the blocks of every stage except the first and the last.

    >>> sum(stage.repeats for stage in SCALINGS["lite2"].stages())
    21
    """

    width: float
    depth: float

    def stages(self) -> tuple[Stage, ...]:
        """Scale the stages of EfficientNet-Lite0.

        Blocks are rounded up. Channels are rounded to the nearest multiple of 8, or to the next larger multiple if the
        nearest is below 90 % of the scaled number.

        Returns
        -------
        tuple of Stage
            The scaled stages, in the same number and of the same kinds.

        Examples
        --------
        >>> SCALINGS["lite2"].stages()[2]
        Stage(repeats=3, kernel_size=5, stride=2, expansion=6, channels=48)
        """
        return tuple(
            stage._replace(
                repeats=stage.repeats if index in (0, len(STAGES) - 1) else ceil(self.depth * stage.repeats),
                channels=_whole_channels(self.width * stage.channels),
            )
            for index, stage in enumerate(STAGES)
        )


SCALINGS = {"lite0": Scaling(1.0, 1.0), "lite1": Scaling(1.0, 1.1), "lite2": Scaling(1.1, 1.2)}


def _whole_channels(asked: float) -> int:
    nearest = max(1, int(asked / CHANNEL_STEP + 0.5)) * CHANNEL_STEP
    return nearest if nearest >= 0.9 * asked else nearest + CHANNEL_STEP


class InvertedResidual(nnx.Module):
    """Inverted residual block: expansion, depthwise convolution, projection, shortcut if shapes agree.

    - `in_channels`, `out_channels`: numbers of input and output channels.
    - `kernel_size`, `stride`: kernel size and stride of the depthwise convolution.
    - `expansion`: factor of the inner channels. At 1 there is no expanding convolution.
    - `rngs`: source of the initial weights.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> block = lambda: InvertedResidual(8, 8, kernel_size=3, stride=1, expansion=6, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda: block()(jnp.ones((1, 6, 6, 8)))).shape
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
        """Run the block on float32 (batch, height, width, in_channels) or on a graph value."""
        inner = value if self.expand is None else relu6(conv_norm(value, self.expand))
        inner = relu6(conv_norm(inner, self.depthwise))
        projected = conv_norm(inner, self.project)
        return add(projected, value) if self.has_shortcut else projected


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite up to the pooled features.

    - `scaling`: width and depth. `SCALINGS` lists the scalings with released weights.
    - `rngs`: source of the initial weights.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> lite1 = lambda: EfficientNetLite(SCALINGS["lite1"], rngs=nnx.Rngs(0))(jnp.zeros((1, 32, 32, 3)))
    >>> nnx.eval_shape(lite1).shape
    (1, 1280)
    """

    def __init__(self, scaling: Scaling, *, rngs: nnx.Rngs) -> None:
        common: dict[str, Any] = {"padding": "same", "epsilon": BATCH_NORM_EPSILON, "rngs": rngs}
        self.stem = ConvNorm(3, STEM_CHANNELS, 3, stride=2, **common)
        blocks = []
        channels = STEM_CHANNELS
        for stage in scaling.stages():
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
        """Return the blocks by resolution, the first with the stem, the last with the head and pooling."""
        halving = [index for index, block in enumerate(self.blocks) if block.depthwise.stride == 2]
        # four parts as in the other networks: stem and all blocks above an eighth of the tile size form one part
        cuts = [0, *halving[1:], len(self.blocks)]
        groups = [list(self.blocks[start:stop]) for start, stop in pairwise(cuts)]
        middle = [Part(tuple(group), partial(run_blocks, group)) for group in groups[1:-1]]
        first = Part((self.stem, *groups[0]), lambda tiles: run_blocks(groups[0], relu6(conv_norm(tiles, self.stem))))
        last = Part(
            (*groups[-1], self.head),
            lambda value: global_mean(relu6(conv_norm(run_blocks(groups[-1], value), self.head))),
        )
        return [first, *middle, last]

    def __call__(self, tiles: Any) -> Any:
        """Embed tiles.

        Parameters
        ----------
        tiles
            Normalized RGB tiles, float32 (batch, height, width, 3), or the input of a graph being recorded.

        Returns
        -------
        embeddings
            float32 (batch, 1280), or a graph value.
        """
        return run_parts(self.parts(), tiles)


class StagesOfEfficientNetLite(EfficientNetLite):
    """EfficientNet-Lite whose embedding is the mean of every stage's channels, without the last stage.

    Channels of early stages see color and texture in a few micrometers, those of later stages the arrangement of
    nuclei. The last stage, which ImageNet's classes shaped most, is not computed.

    - `scaling`: depth and width of the network.
    - `rngs`: random streams of the initial weights.

    >>> import jax.numpy as jnp
    >>> lite0 = lambda: StagesOfEfficientNetLite(SCALINGS["lite0"], rngs=nnx.Rngs(0))(jnp.zeros((1, 32, 32, 3)))
    >>> nnx.eval_shape(lite0).shape
    (1, 176)
    """

    def parts(self) -> list[Part]:
        """Return the stem with the stage of the highest resolution, and the other stages with all means."""
        first, *others = super().parts()[:-1]
        modules = tuple(module for part in others for module in part.modules)
        return [first, Part(modules, partial(_means_of_stages, others))]


def _means_of_stages(parts: Sequence[Part], value: Any) -> Any:
    """Return the channel means of a value and of the output of each part, concatenated."""
    means = [global_mean(value)]
    for part in parts:
        value = part.run(value)
        means.append(global_mean(value))
    return concatenate(means[0], means[1:])
