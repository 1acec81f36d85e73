"""Vision transformer without a class token: the network of STImage's comparison model ViT_NB, up to its features.

Source: the scripts of the STImage paper. Their sizes are the defaults. Blocks are those of Dosovitskiy et al. 2021. All
tokens of a tile are concatenated and go into two dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stimage_sd._draws import normal
from stimage_sd.nn.parts import Part, run_parts

LAYER_NORM_EPSILON = 1e-6
#: dropout function of a value and of its place in the network
Dropout = Callable[[jax.Array, int], jax.Array]
#: a single object, so that networks of equal sizes compare equal
_GLOROT = nnx.initializers.glorot_uniform()
#: number of dropouts per block
_PLACES = 3


def keep_all(value: jax.Array, place: int) -> jax.Array:
    """Return a value unchanged, as dropout outside training.

    Examples
    --------
    >>> float(keep_all(jnp.ones(()), 0))
    1.0
    """
    return value


def drop_some(value: jax.Array, place: int, *, key: jax.Array, share: float) -> jax.Array:
    """Set a share of a value's elements to zero and scale up the others to keep the mean.

    Each `place` in the network draws independently.

    Examples
    --------
    >>> sorted(set(drop_some(jnp.ones(99), 0, key=jax.random.key(0), share=0.5).tolist()))
    [0.0, 2.0]
    """
    kept = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - share, value.shape)
    return jnp.where(kept, value / (1 - share), 0.0)


class PatchBlock(nnx.Module):
    """Attention between a tile's patches, then two layers per patch, both with residual connections.

    Parameters
    ----------
    width
        Length of a token, and width of a head.
    heads
        Number of attention heads.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> nnx.eval_shape(lambda: PatchBlock(8, heads=2, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 8)), keep_all, 0)).shape
    (1, 5, 8)
    """

    def __init__(self, width: int, *, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.before_attention = nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        self.queries_keys_values = _linear(width, 3 * heads * width, rngs)
        self.project = _linear(heads * width, width, rngs)
        self.before_layers = nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        self.expand = _linear(width, 2 * width, rngs)
        self.contract = _linear(2 * width, width, rngs)

    def __call__(self, tokens: jax.Array, dropout: Dropout, place: int) -> jax.Array:
        """Run the block on float32 (batch, n_patches, width). Its three dropouts are numbered from `place`."""
        batch, n_patches, width = tokens.shape
        packed = self.queries_keys_values(self.before_attention(tokens))
        queries, keys, values = jnp.moveaxis(packed.reshape(batch, n_patches, 3, self.heads, width), 2, 0)
        likeness = jnp.einsum("bqhw,bkhw->bhqk", queries, keys) / width**0.5
        attention = dropout(jax.nn.softmax(likeness), place)
        attended = jnp.einsum("bhqk,bkhw->bqhw", attention, values)
        tokens = tokens + self.project(attended.reshape(batch, n_patches, -1))
        hidden = dropout(_gelu(self.expand(self.before_layers(tokens))), place + 1)
        return tokens + dropout(_gelu(self.contract(hidden)), place + 2)


class PatchTransformer(nnx.Module):
    """Transformer over the patches of a tile, with dense layers on all patches together.

    Parameters
    ----------
    image_px, patch_px
        Sides of a tile and of a patch, px.
    width, depth, heads
        Length of a token, number of blocks, and number of attention heads. A head is as wide as a token.
    hidden
        Widths of the dense layers. The last width is the length of the features.
    dropout
        Share of values that training sets to zero, in attention and after dense layers.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> make = lambda: PatchTransformer(image_px=26, width=8, depth=2, hidden=(6, 5), rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda: make()(jnp.zeros((3, 26, 26, 3)))).shape
    (3, 5)
    """

    def __init__(
        self,
        *,
        image_px: int = 299,
        patch_px: int = 13,
        width: int = 64,
        depth: int = 8,
        heads: int = 4,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.1,
        rngs: nnx.Rngs,
    ) -> None:
        if image_px % patch_px:
            raise ValueError(f"Expected a tile of whole patches, found {image_px} px in patches of {patch_px} px.")
        self.image_px, self.patch_px, self.dropout = image_px, patch_px, dropout
        n_patches = (image_px // patch_px) ** 2
        self.patches = _linear(3 * patch_px**2, width, rngs)
        self.positions = nnx.Param(normal(rngs.params(), (n_patches, width), deviation=0.02))
        self.blocks = nnx.List([PatchBlock(width, heads=heads, rngs=rngs) for _ in range(depth)])
        self.after = nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        widths = [n_patches * width, *hidden]
        self.dense = nnx.List([_linear(before, after, rngs) for before, after in pairwise(widths)])

    def parts(self) -> list[Part]:
        """Return the patch embedding, the blocks and the dense layers as parts, without dropout."""
        return self._parts(keep_all)

    def training_parts(self, key: jax.Array) -> list[Part]:
        """Return the same parts with dropout, drawn from a random key."""
        return self._parts(partial(drop_some, key=key, share=self.dropout))

    def _parts(self, dropout: Dropout) -> list[Part]:
        first = Part((self.patches, self.positions), self._tokens)
        blocks = [
            Part((block,), partial(block, dropout=dropout, place=_PLACES * index))
            for index, block in enumerate(self.blocks)
        ]
        return [first, *blocks, Part((self.after, *self.dense), partial(self._joined, dropout))]

    def _tokens(self, tiles: jax.Array) -> jax.Array:
        if tiles.shape[1:] != (self.image_px, self.image_px, 3):
            raise ValueError(f"Expected tiles of {self.image_px} px, found the shape {tiles.shape}.")
        side, patch = self.image_px // self.patch_px, self.patch_px
        cut = tiles.reshape(len(tiles), side, patch, side, patch, 3).swapaxes(2, 3)
        return self.patches(cut.reshape(len(tiles), side**2, -1)) + self.positions[...]

    def _joined(self, dropout: Dropout, tokens: jax.Array) -> jax.Array:
        value = self.after(tokens).reshape(len(tokens), -1)
        for index, layer in enumerate(self.dense):
            value = dropout(_gelu(layer(value)), _PLACES * len(self.blocks) + index)
        return value

    def __call__(self, tiles: Any) -> Any:
        """Embed tiles, without dropout.

        Parameters
        ----------
        tiles
            float32 (batch, image_px, image_px, 3), RGB, normalized.

        Returns
        -------
        features
            float32 (batch, hidden[-1]).
        """
        return run_parts(self.parts(), tiles)


def _linear(n_inputs: int, n_outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n_inputs, n_outputs, kernel_init=_GLOROT, rngs=rngs)


def _gelu(value: jax.Array) -> jax.Array:
    return jax.nn.gelu(value, approximate=False)
