"""ResNet-50 version 1.5 (stride in the 3 × 3 convolutions), compatible with the released ImageNet weights.

Source: He et al., "Deep residual learning for image recognition", 2016. The models of torchvision and timm have the
stride in the same place.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from flax import nnx

from stimage_sd.nn.layers import ConvNorm, add, conv_norm, global_mean, max_pool, relu
from stimage_sd.nn.parts import Part, run_blocks, run_parts

Value = TypeVar("Value")

BATCH_NORM_EPSILON = 1e-5
STAGE_DEPTHS = (3, 4, 6, 3)
EXPANSION = 4
STEM_CHANNELS = 64
EMBEDDING_SIZE = 2048


class Bottleneck(nnx.Module):
    """Bottleneck block: reduction, 3 × 3 convolution, fourfold expansion, shortcut.

    - `in_channels`: number of input channels.
    - `width`: number of inner channels. The output has four times as many.
    - `stride`: stride of the 3 × 3 convolution.
    - `rngs`: source of the initial weights.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> Bottleneck(16, 8, stride=2, rngs=nnx.Rngs(0))(jnp.ones((1, 6, 6, 16))).shape
    (1, 3, 3, 32)
    """

    def __init__(self, in_channels: int, width: int, *, stride: int, rngs: nnx.Rngs) -> None:
        out_channels = width * EXPANSION
        common: dict[str, Any] = {"epsilon": BATCH_NORM_EPSILON, "rngs": rngs}
        self.reduce = ConvNorm(in_channels, width, 1, padding=0, **common)
        self.filter = ConvNorm(width, width, 3, stride=stride, padding=1, **common)
        self.expand = ConvNorm(width, out_channels, 1, padding=0, **common)
        reshapes = stride != 1 or in_channels != out_channels
        self.shortcut = ConvNorm(in_channels, out_channels, 1, stride=stride, padding=0, **common) if reshapes else None

    def __call__(self, value: Value) -> Value:
        """Run the block on float32 (batch, height, width, in_channels) or on a graph value."""
        inner = relu(conv_norm(value, self.reduce))
        inner = relu(conv_norm(inner, self.filter))
        shortcut = value if self.shortcut is None else conv_norm(value, self.shortcut)
        return relu(add(conv_norm(inner, self.expand), shortcut))


class ResNet50(nnx.Module):
    """ResNet-50 up to the pooled features.

    - `rngs`: source of the initial weights.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> nnx.eval_shape(lambda: ResNet50(rngs=nnx.Rngs(0))(jnp.zeros((1, 32, 32, 3)))).shape
    (1, 2048)
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.stem = ConvNorm(3, STEM_CHANNELS, 7, stride=2, padding=3, epsilon=BATCH_NORM_EPSILON, rngs=rngs)
        stages = []
        channels = STEM_CHANNELS
        for stage, depth in enumerate(STAGE_DEPTHS):
            width = STEM_CHANNELS * 2**stage
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, width, stride=stride, rngs=rngs))
                channels = width * EXPANSION
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)

    def parts(self) -> list[Part]:
        """Return the four stages, the first with the stem, the last with pooling."""
        middle = [Part((stage,), partial(run_blocks, stage)) for stage in self.stages[1:-1]]
        first = Part((self.stem, self.stages[0]), lambda tiles: run_blocks(self.stages[0], self._stem(tiles)))
        last = Part((self.stages[-1],), lambda value: global_mean(run_blocks(self.stages[-1], value)))
        return [first, *middle, last]

    def _stem(self, tiles: Any) -> Any:
        return max_pool(relu(conv_norm(tiles, self.stem)), window=3, stride=2, padding=1)

    def __call__(self, tiles: Any) -> Any:
        """Embed tiles.

        Parameters
        ----------
        tiles
            Normalized RGB tiles, float32 (batch, height, width, 3), or the input of a graph being recorded.

        Returns
        -------
        embeddings
            float32 (batch, 2048), or a graph value.
        """
        return run_parts(self.parts(), tiles)
