"""THItoGene: dynamic convolution and capsules per spot, attention between spots, and graph attention.

Sources: Jia et al., "THItoGene: a deep learning method for predicting spatial transcriptomics from histological
images", Briefings in Bioinformatics 2024; Li et al., "Omni-dimensional dynamic convolution", ICLR 2022.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from stimage_sd._draws import normal
from stimage_sd.baselines.networks.capsules import CapsuleEncoder
from stimage_sd.baselines.networks.graph_attention import GraphAttention
from stimage_sd.baselines.networks.histogene import SpotBlock
from stimage_sd.baselines.networks.layers import batch_norm
from stimage_sd.nn.parts import run_blocks

#: side and step of the dynamic kernels, px, number of channels, and number of mixed kernels
PATCH, _CHANNELS, _KERNELS = 4, 16, 4
#: width of the layer that the kernel attentions are computed from
_SQUEEZED = 16
#: slope of the leaky rectifier in the graph attention
_SLOPE = 0.01


class DynamicConvolution(nnx.Module):
    """Convolution with a kernel that depends on the image: a mixture of kernels, weighted along every axis.

    Kernels do not overlap, because the step equals the side.

    Parameters
    ----------
    in_channels, out_channels
        Input and output channels.
    side
        Side and step of the kernels, px.
    n_kernels
        Number of mixed kernels.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> layer = lambda: DynamicConvolution(3, 16, side=4, n_kernels=4, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda: layer()(jnp.ones((2, 12, 12, 3)))).shape
    (2, 3, 3, 16)
    """

    def __init__(self, in_channels: int, out_channels: int, *, side: int, n_kernels: int, rngs: nnx.Rngs) -> None:
        fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

        def linear(before: int, after: int, *, bias: bool) -> nnx.Linear:
            return nnx.Linear(before, after, use_bias=bias, kernel_init=fan_out, rngs=rngs)

        self.side = side
        self.squeeze = linear(in_channels, _SQUEEZED, bias=False)
        self.norm = batch_norm(_SQUEEZED, rngs)
        self.to_inputs = linear(_SQUEEZED, in_channels, bias=True)
        self.to_outputs = linear(_SQUEEZED, out_channels, bias=True)
        self.to_places = linear(_SQUEEZED, side * side, bias=True)
        self.to_kernels = linear(_SQUEEZED, n_kernels, bias=True)
        deviation = (2 / (out_channels * side * side)) ** 0.5
        shape = (n_kernels, side * side, in_channels, out_channels)
        self.kernels = nnx.Param(normal(rngs.params(), shape, deviation=deviation))

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Run the layer on float32 (n, height, width, in_channels), without remaining pixels below and right."""
        seen = jax.nn.relu(self.norm(self.squeeze(pictures.mean(axis=(1, 2)))))
        inputs, outputs, places = (
            jax.nn.sigmoid(attend(seen)) for attend in (self.to_inputs, self.to_outputs, self.to_places)
        )
        kernel = jnp.einsum("nk,kpio->npio", jax.nn.softmax(self.to_kernels(seen), axis=-1), self.kernels[...])
        kernel = kernel * places[:, :, None, None] * inputs[:, None, :, None] * outputs[:, None, None, :]
        pieces, rows, columns = _pieces(pictures, self.side)
        convolved = jnp.einsum("nqw,nwo->nqo", pieces, kernel.reshape(len(pictures), -1, kernel.shape[-1]))
        return convolved.reshape(len(pictures), rows, columns, -1)


def _pieces(pictures: jax.Array, side: int) -> tuple[jax.Array, int, int]:
    """Return square pieces as (n, n_pieces, side · side · channels), and their numbers down and across."""
    rows, columns = pictures.shape[1] // side, pictures.shape[2] // side
    whole = pictures[:, : rows * side, : columns * side]
    split = whole.reshape(len(pictures), rows, side, columns, side, -1).swapaxes(2, 3)
    return split.reshape(len(pictures), rows * columns, -1), rows, columns


class THItoGeneNetwork(nnx.Module):
    """THItoGene network, from the pixels, places and neighbors of all spots of a section to log expression.

    Parameters
    ----------
    n_genes
        Number of genes.
    patch_px
        Side of a spot's image, px; 44 or more.
    capsules, capsule_width
        Capsules per spot, and values per capsule. A spot's token holds its capsules and the embeddings of its column
        and its row, `capsule_width` values for the column and for the row.
    depth, heads
        Number of attention blocks between spots, and numbers of heads between spots and along the graph.
    hidden
        Width of a graph head and of the layer before the genes. The inner layers of the attention blocks are twice as
        wide. The output of the graph is half as wide.
    n_places
        Number of columns and of rows with an embedding. Spots beyond use the last one.
    dropout
        Share of values that training sets to zero.
    rngs
        Source of the initial weights and of dropout.

    Examples
    --------
    >>> network = lambda: THItoGeneNetwork(
    ...     7, patch_px=44, capsules=2, capsule_width=4, depth=1, heads=(1, 2), hidden=8, rngs=nnx.Rngs(0)
    ... )
    >>> given = jnp.zeros((3, 44, 44, 3)), jnp.zeros((3, 2), int), 1 - jnp.eye(3)
    >>> nnx.eval_shape(lambda: network()(*given)).shape
    (3, 7)
    """

    def __init__(
        self,
        n_genes: int,
        *,
        patch_px: int = 112,
        capsules: int = 20,
        capsule_width: int = 64,
        depth: int = 4,
        heads: tuple[int, int] = (16, 8),
        hidden: int = 1024,
        n_places: int = 64,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ) -> None:
        width = (capsules + 2) * capsule_width
        unit = nnx.initializers.normal(1.0)
        self.n_places = n_places
        self.dynamic = DynamicConvolution(3, _CHANNELS, side=PATCH, n_kernels=_KERNELS, rngs=rngs)
        self.capsules = CapsuleEncoder(patch_px // PATCH, _CHANNELS, capsules, capsule_width, rngs=rngs)
        self.column = nnx.Embed(n_places, capsule_width, embedding_init=unit, rngs=rngs)
        self.row = nnx.Embed(n_places, capsule_width, embedding_init=unit, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.blocks = nnx.List(
            [SpotBlock(width, heads=heads[0], inner=2 * hidden, dropout=dropout, rngs=rngs) for _ in range(depth)]
        )
        self.neighbors = GraphAttention(
            width, head_width=hidden, heads=heads[1], slope=_SLOPE, dropout=dropout, rngs=rngs
        )
        self.together = GraphAttention(
            hidden * heads[1], head_width=hidden // 2, heads=1, slope=_SLOPE, dropout=dropout, rngs=rngs
        )
        self.before_genes = nnx.Linear(hidden // 2, hidden, rngs=rngs)
        self.norm = nnx.LayerNorm(hidden, rngs=rngs)
        self.genes = nnx.Linear(hidden, n_genes, rngs=rngs)

    def __call__(self, pixels: jax.Array, places: jax.Array, graph: jax.Array) -> jax.Array:
        """Predict a section.

        Parameters
        ----------
        pixels
            float32 (n_spots, patch_px, patch_px, 3), 0 to 1.
        places
            Column and row, int (n_spots, 2).
        graph
            float32 (n_spots, n_spots). Positive values in a row mark the neighbors.

        Returns
        -------
        float32 (n_spots, n_genes).
        """
        capsules = self.capsules(jax.nn.relu(self.dynamic(pixels))).reshape(len(pixels), -1)
        places = jnp.clip(places, 0, self.n_places - 1)
        tokens = jnp.concatenate([capsules, self.column(places[:, 0]), self.row(places[:, 1])], axis=-1)
        tokens = self.dropout(tokens)
        tokens = run_blocks(self.blocks, tokens)
        tokens = jax.nn.elu(self.neighbors(self.dropout(tokens), graph))
        tokens = jax.nn.elu(self.together(self.dropout(tokens), graph))
        return self.genes(self.norm(jax.nn.relu(self.before_genes(tokens))))
