"""Hist2ST: convolutions per spot, attention between spots, a neighbor graph, and a zero-inflated negative binomial.

Source: Zeng et al., "Spatial transcriptomics prediction from histology jointly through transformer and graph neural
networks", Briefings in Bioinformatics 2022.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.special import gammaln

from stimage_sd.baselines.networks.histogene import PlaceEmbedding, SpotBlock
from stimage_sd.baselines.networks.layers import batch_norm
from stimage_sd.nn.parts import run_blocks


class Hist2STOutput(NamedTuple):
    """Output of the network for a section, float32 (n_spots, n_genes) except `confidence`.

    Attributes
    ----------
    expression
        Log expression.
    mean, dispersion, dropout
        Parameters of the zero-inflated negative binomial: mean at size factor 1, r, and share of extra zeros.
    confidence
        Weight of an image among its augmented copies, (n_spots, 1).
    """

    expression: jax.Array
    mean: jax.Array
    dispersion: jax.Array
    dropout: jax.Array
    confidence: jax.Array


def zinb_loss(counts: jax.Array, output: Hist2STOutput, size_factors: jax.Array) -> jax.Array:
    """Compute the mean negative log-likelihood of the zero-inflated negative binomial.

    Parameters
    ----------
    counts
        float32 (n_spots, n_genes).
    output
        Output of the network.
    size_factors
        float32 (n_spots,).

    Returns
    -------
    The loss, a scalar.

    Examples
    --------
    >>> ones = jnp.ones((1, 1))
    >>> output = Hist2STOutput(ones, ones, ones, 0.0 * ones, ones)
    >>> round(float(zinb_loss(0.0 * ones, output, jnp.ones(1))), 3)  # NB(0; mean 1, r 1) is 1/2
    0.693
    """
    mean, r, extra = output.mean * size_factors[:, None], output.dispersion, output.dropout
    eps = 1e-10
    log_ratio = jnp.log(r + eps) - jnp.log(r + mean + eps)
    log_nb = (
        gammaln(counts + r + eps) - gammaln(counts + 1.0) - gammaln(r + eps)
        + r * log_ratio + counts * (jnp.log(mean + eps) - jnp.log(r + mean + eps))
    )  # fmt: skip
    at_zero = jnp.log(extra + (1.0 - extra) * jnp.exp(r * log_ratio) + eps)
    elsewhere = jnp.log(1.0 - extra + eps) + log_nb
    return -jnp.where(counts < 0.5, at_zero, elsewhere).mean()


class ConvolutionMixer(nnx.Module):
    """Two depthwise convolutions that add to their input, then one that mixes channels.

    Parameters
    ----------
    channels, kernel
        Number of channels, and side of the depthwise kernels, px.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> nnx.eval_shape(lambda: ConvolutionMixer(4, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 4)))).shape
    (2, 8, 8, 4)
    """

    def __init__(self, channels: int, kernel: int, *, rngs: nnx.Rngs) -> None:
        def depthwise() -> nnx.Conv:
            return nnx.Conv(channels, channels, (kernel, kernel), feature_group_count=channels, rngs=rngs)

        self.depthwise = nnx.List([depthwise(), depthwise()])
        self.norms = nnx.List([batch_norm(channels, rngs) for _ in range(3)])
        self.pointwise = nnx.Conv(channels, channels, (1, 1), rngs=rngs)

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Run the block on float32 (n_spots, y, x, channels)."""
        inner = pictures
        for convolution, norm in zip(self.depthwise, self.norms[:2], strict=True):
            inner = jax.nn.gelu(norm(convolution(inner)), approximate=False)
        return self.norms[2](jax.nn.gelu(self.pointwise(inner + pictures), approximate=False))


class NeighborMean(nnx.Module):
    """Graph layer: one linear map of a spot's token and its neighbors' mean, then normalization.

    Parameters
    ----------
    width
        Length of a token.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> NeighborMean(4, rngs=nnx.Rngs(0))(jnp.ones((3, 4)), jnp.ones((3, 3)) / 3).shape
    (3, 4)
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, graph: jax.Array) -> jax.Array:
        """Run the layer with a `graph` (n_spots, n_spots) whose rows sum to 1."""
        mapped = jax.nn.relu(self.weight(jnp.concatenate([tokens, graph @ tokens], axis=-1)))
        return mapped / jnp.maximum(jnp.linalg.norm(mapped, axis=-1, keepdims=True), 1e-12)


class Hist2STNetwork(nnx.Module):
    """Hist2ST network, from the pixels, places and neighbors of all spots of a section.

    Parameters
    ----------
    n_genes
        Number of genes.
    patch_px, patch
        Sides of a spot's image and of its patches, px.
    channels, kernel
        Number of channels and side of the kernels of the convolutions.
    depths
        Numbers of convolution blocks, attention blocks and graph layers.
    heads, n_places, dropout
        As in `stimage_sd.baselines.networks.histogene.HisToGeneNetwork`.
    rngs
        Source of the initial weights and of dropout.

    Examples
    --------
    >>> network = lambda: Hist2STNetwork(7, patch_px=14, channels=8, depths=(1, 1, 2), heads=1, rngs=nnx.Rngs(0))
    >>> given = jnp.zeros((3, 14, 14, 3)), jnp.zeros((3, 2), int), jnp.eye(3)
    >>> nnx.eval_shape(lambda: network()(*given)).expression.shape
    (3, 7)
    """

    def __init__(
        self,
        n_genes: int,
        *,
        patch_px: int = 112,
        patch: int = 7,
        channels: int = 32,
        kernel: int = 5,
        depths: tuple[int, int, int] = (2, 8, 4),
        heads: int = 16,
        n_places: int = 64,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ) -> None:
        width = (patch_px // patch) ** 2 * (channels // 8)
        self.patch = nnx.Conv(3, channels, (patch, patch), strides=(patch, patch), padding="VALID", rngs=rngs)
        self.places = PlaceEmbedding(n_places, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.mixers = nnx.List([ConvolutionMixer(channels, kernel, rngs=rngs) for _ in range(depths[0])])
        self.reduce = nnx.Conv(channels, channels // 8, (1, 1), rngs=rngs)
        self.blocks = nnx.List(
            [SpotBlock(width, heads=heads, inner=width, dropout=dropout, rngs=rngs) for _ in range(depths[1])]
        )
        self.graph = nnx.List([NeighborMean(width, rngs=rngs) for _ in range(depths[2])])
        self.over_layers = nnx.List([nnx.RNN(nnx.OptimizedLSTMCell(width, width, rngs=rngs)) for _ in range(2)])
        self.before_genes = nnx.LayerNorm(width, rngs=rngs)
        self.genes = nnx.Linear(width, n_genes, rngs=rngs)
        self.count_heads = nnx.List([nnx.Linear(width, n_genes, rngs=rngs) for _ in range(3)])
        self.confidence = nnx.List([nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)])

    def __call__(self, pixels: jax.Array, places: jax.Array, graph: jax.Array) -> Hist2STOutput:
        """Predict a section.

        Parameters
        ----------
        pixels
            float32 (n_spots, patch_px, patch_px, 3), 0 to 1.
        places
            Column and row, int (n_spots, 2).
        graph
            Weights of the neighbors, float32 (n_spots, n_spots). Each row sums to 1.

        Returns
        -------
        The output of the network.
        """
        pictures = self.dropout(self.patch(pixels))
        pictures = run_blocks(self.mixers, pictures)
        tokens = self.reduce(pictures).reshape(len(pixels), -1) + self.places(places)
        tokens = run_blocks(self.blocks, tokens)
        layers = []
        for layer in self.graph:
            tokens = layer(tokens, graph)
            layers.append(tokens)
        # the recurrent layers run over the outputs of the graph layers, as a sequence per spot
        sequence = jnp.stack(layers, axis=1)
        for recurrent in self.over_layers:
            sequence = recurrent(sequence)
        tokens = sequence.mean(axis=1)
        mean, dispersion, extra = (head(tokens) for head in self.count_heads)
        return Hist2STOutput(
            expression=self.genes(self.before_genes(tokens)),
            mean=jnp.clip(jnp.exp(jnp.minimum(mean, 15.0)), 1e-5, 1e6),
            dispersion=jnp.clip(jax.nn.softplus(dispersion), 1e-4, 1e4),
            dropout=jax.nn.sigmoid(extra),
            confidence=self.confidence[1](jax.nn.relu(self.confidence[0](tokens))),
        )
