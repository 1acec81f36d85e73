"""HisToGene: a vision transformer whose tokens are the spots of a section.

Source: Pang et al., "Leveraging information in spatial transcriptomics to predict super-resolution gene expression
from histology images in tumors", bioRxiv 2021.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from stimage_sd.nn.parts import run_blocks

HEAD_WIDTH = 64


class SpotBlock(nnx.Module):
    """Attention between a section's spots, then two layers per spot, both with residual connections.

    Parameters
    ----------
    width
        Length of a spot's token.
    heads
        Number of attention heads of width 64.
    inner
        Width between the two layers.
    dropout
        Share of values that training sets to zero.
    rngs
        Source of the initial weights and of dropout.

    Examples
    --------
    >>> block = lambda: SpotBlock(16, heads=2, inner=32, dropout=0.0, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda: block()(jnp.ones((5, 16)))).shape
    (5, 16)
    """

    def __init__(self, width: int, *, heads: int, inner: int, dropout: float, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        self.queries_keys_values = nnx.Linear(width, 3 * heads * HEAD_WIDTH, use_bias=False, rngs=rngs)
        self.project = nnx.Linear(heads * HEAD_WIDTH, width, rngs=rngs)
        self.before_layers = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, inner, rngs=rngs)
        self.contract = nnx.Linear(inner, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Run the block on float32 (n_spots, width)."""
        packed = self.queries_keys_values(self.before_attention(tokens))
        packed = packed.reshape(1, len(tokens), 3, self.heads, HEAD_WIDTH)
        attended = jax.nn.dot_product_attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2])
        tokens = tokens + self.dropout(self.project(attended.reshape(len(tokens), -1)))
        hidden = self.dropout(jax.nn.gelu(self.expand(self.before_layers(tokens)), approximate=False))
        return tokens + self.dropout(self.contract(hidden))


class PlaceEmbedding(nnx.Module):
    """Embedding of a spot's column and row on the lattice.

    Parameters
    ----------
    n_places
        Number of columns and of rows with an embedding. Spots beyond use the last one.
    width
        Length of a token.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> PlaceEmbedding(64, 8, rngs=nnx.Rngs(0))(jnp.zeros((5, 2), int)).shape
    (5, 8)
    """

    def __init__(self, n_places: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.n_places = n_places
        unit = jax.nn.initializers.normal(1.0)
        self.column = nnx.Embed(n_places, width, embedding_init=unit, rngs=rngs)
        self.row = nnx.Embed(n_places, width, embedding_init=unit, rngs=rngs)

    def __call__(self, places: jax.Array) -> jax.Array:
        """Embed int (n_spots, 2) columns and rows."""
        places = jnp.clip(places, 0, self.n_places - 1)
        return self.column(places[:, 0]) + self.row(places[:, 1])


class HisToGeneNetwork(nnx.Module):
    """HisToGene network, from the pixels and places of all spots of a section to log expression.

    Parameters
    ----------
    n_genes
        Number of genes.
    patch_px
        Side of a spot's image, px.
    width, depth, heads
        Length of a token, number of blocks, and number of attention heads.
    n_places
        As in `PlaceEmbedding`.
    dropout
        Share of values that training sets to zero.
    rngs
        Source of the initial weights and of dropout.

    Examples
    --------
    >>> make = lambda: HisToGeneNetwork(7, patch_px=8, width=16, depth=1, heads=1, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda: make()(jnp.zeros((5, 8, 8, 3)), jnp.zeros((5, 2), int), None)).shape
    (5, 7)
    """

    def __init__(
        self,
        n_genes: int,
        *,
        patch_px: int = 112,
        width: int = 1024,
        depth: int = 8,
        heads: int = 16,
        n_places: int = 64,
        dropout: float = 0.1,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch = nnx.Linear(3 * patch_px**2, width, rngs=rngs)
        self.places = PlaceEmbedding(n_places, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.blocks = nnx.List(
            [SpotBlock(width, heads=heads, inner=2 * width, dropout=dropout, rngs=rngs) for _ in range(depth)]
        )
        self.before_genes = nnx.LayerNorm(width, rngs=rngs)
        self.genes = nnx.Linear(width, n_genes, rngs=rngs)

    def __call__(self, pixels: jax.Array, places: jax.Array, graph: jax.Array | None) -> jax.Array:
        """Predict a section.

        Parameters
        ----------
        pixels
            float32 (n_spots, patch_px, patch_px, 3), 0 to 1.
        places
            Column and row, int (n_spots, 2).
        graph
            Not used.

        Returns
        -------
        float32 (n_spots, n_genes).
        """
        tokens = self.dropout(self.patch(pixels.reshape(len(pixels), -1)) + self.places(places))
        tokens = run_blocks(self.blocks, tokens)
        return self.genes(self.before_genes(tokens))
