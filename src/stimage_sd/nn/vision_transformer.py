"""Vision transformers in sizes tiny, small and base, with patches, a class token and attention blocks.

Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021. torchvision's `vit_b_16` and timm's
`vit_base_patch16_224` are the same network.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from stimage_sd._draws import normal
from stimage_sd.nn.parts import Part, run_blocks, run_parts

LAYER_NORM_EPSILON = 1e-6
#: width of one attention head
HEAD_WIDTH = 64
#: number of parts of the blocks; the last part is "last_stage" in fine-tuning
N_PARTS = 4


class Size(NamedTuple):
    """Width and depth of a vision transformer.

    >>> SIZES["base"].width // HEAD_WIDTH
    12
    """

    width: int
    depth: int


SIZES = {"tiny": Size(192, 12), "small": Size(384, 12), "base": Size(768, 12)}


class Block(nnx.Module):
    """Transformer block: attention between tokens, then a two-layer network per token, both residual.

    - `width`: length of a token.
    - `rngs`: source of the initial weights.

    >>> nnx.eval_shape(lambda: Block(64, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 64)))).shape
    (1, 5, 64)
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        if width % HEAD_WIDTH:
            raise ValueError(f"Expected `width` as a multiple of {HEAD_WIDTH}, found {width}.")
        self.before_attention = _layer_norm(width, rngs)
        self.queries_keys_values = nnx.Linear(width, 3 * width, rngs=rngs)
        self.project = nnx.Linear(width, width, rngs=rngs)
        self.before_expansion = _layer_norm(width, rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Run the block on float32 (batch, n_tokens, width)."""
        batch, n_tokens, width = tokens.shape
        packed = self.queries_keys_values(self.before_attention(tokens))
        packed = packed.reshape(batch, n_tokens, 3, width // HEAD_WIDTH, HEAD_WIDTH)
        attended = jax.nn.dot_product_attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2])
        tokens = tokens + self.project(attended.reshape(batch, n_tokens, width))
        inner = jax.nn.gelu(self.expand(self.before_expansion(tokens)), approximate=False)
        return tokens + self.contract(inner)


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # the fast variance (mean of squares minus squared mean) loses digits needed for parity with torch
    return nnx.LayerNorm(width, epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, rngs=rngs)


class VisionTransformer(nnx.Module):
    """Vision transformer up to the features of the class token.

    - `size`: width and depth. `SIZES` lists three sizes.
    - `patch_px`, `image_px`: sides of a patch and of a tile, px.
    - `rngs`: source of the initial weights.

    >>> tiny = lambda: VisionTransformer(SIZES["tiny"], rngs=nnx.Rngs(0))(jnp.zeros((2, 224, 224, 3)))
    >>> nnx.eval_shape(tiny).shape
    (2, 192)
    """

    def __init__(self, size: Size, *, patch_px: int = 16, image_px: int = 224, rngs: nnx.Rngs) -> None:
        if size.depth < N_PARTS or image_px % patch_px:
            raise ValueError(
                f"Expected at least {N_PARTS} blocks and a tile of whole patches, found {size.depth} and "
                f"{image_px} px in patches of {patch_px} px."
            )
        self.patch_px, self.image_px = patch_px, image_px
        self.patches = nnx.Conv(
            3, size.width, (patch_px, patch_px), strides=(patch_px, patch_px), padding="VALID", rngs=rngs
        )
        n_tokens = (image_px // patch_px) ** 2 + 1
        self.class_token = nnx.Param(jnp.zeros((1, 1, size.width), jnp.float32))
        positions = normal(rngs.params(), (1, n_tokens, size.width), deviation=0.02)
        self.positions = nnx.Param(positions)
        self.blocks = nnx.List([Block(size.width, rngs=rngs) for _ in range(size.depth)])
        self.after = _layer_norm(size.width, rngs)

    def parts(self) -> list[Part]:
        """Return four parts of equal depth, the first with the patches, the last with the class token features."""
        cuts = [len(self.blocks) * part // N_PARTS for part in range(N_PARTS + 1)]
        groups = [list(self.blocks[start:stop]) for start, stop in pairwise(cuts)]
        middle = [Part(tuple(group), partial(run_blocks, group)) for group in groups[1:-1]]
        begin = (self.patches, self.class_token, self.positions)
        first = Part((*begin, *groups[0]), lambda tiles: run_blocks(groups[0], self._tokens(tiles)))
        last = Part((*groups[-1], self.after), lambda tokens: self.after(run_blocks(groups[-1], tokens)[:, 0]))
        return [first, *middle, last]

    def _tokens(self, tiles: jax.Array) -> jax.Array:
        if tiles.shape[1:3] != (self.image_px, self.image_px):
            raise ValueError(f"Expected tiles of {self.image_px} px, found {tiles.shape[1]} by {tiles.shape[2]} px.")
        patches = self.patches(tiles)
        patches = patches.reshape(len(tiles), -1, patches.shape[-1])
        token = jnp.broadcast_to(self.class_token[...], (len(tiles), 1, patches.shape[-1]))
        return jnp.concatenate([token, patches], axis=1) + self.positions[...]

    def __call__(self, tiles: Any) -> Any:
        """Embed tiles.

        Parameters
        ----------
        tiles
            Normalized RGB tiles, float32 (batch, image_px, image_px, 3).

        Returns
        -------
        embeddings
            float32 (batch, width).
        """
        return run_parts(self.parts(), tiles)
