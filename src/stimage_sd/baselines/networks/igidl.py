"""IGI-DL: a residual network on a tile, a graph isomorphism network on its nuclei, and layers that join both.

Sources: Gao et al., "Harnessing TME depicted by histological images to improve cancer prognosis through a deep
learning system", Cell Reports Medicine 2024; He et al., "Deep residual learning for image recognition", 2016; Xu et
al., "How powerful are graph neural networks?", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from stimage_sd.baselines.networks.layers import batch_norm
from stimage_sd.nn.parts import run_blocks

#: number of graph layers, as published
GRAPH_LAYERS = 4
#: blocks per stage of ResNet-18
_BLOCKS = 2


def _convolution(before: int, after: int, kernel: int, *, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    pads = (kernel // 2, kernel // 2)
    return nnx.Conv(
        before, after, (kernel, kernel), strides=(stride, stride), padding=(pads, pads), use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"), rngs=rngs,
    )  # fmt: skip


class ResidualBlock(nnx.Module):
    """Two 3 × 3 convolutions with a residual connection. Training uses the batch statistics.

    Parameters
    ----------
    before, after
        Input and output channels.
    stride
        Stride of the first convolution.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> block = lambda: ResidualBlock(8, 16, stride=2, rngs=nnx.Rngs(0))
    >>> nnx.eval_shape(lambda: block()(jnp.ones((2, 6, 6, 8)))).shape
    (2, 3, 3, 16)
    """

    def __init__(self, before: int, after: int, *, stride: int, rngs: nnx.Rngs) -> None:
        self.first = _convolution(before, after, 3, stride=stride, rngs=rngs)
        self.second = _convolution(after, after, 3, stride=1, rngs=rngs)
        self.norms = nnx.List([batch_norm(after, rngs), batch_norm(after, rngs)])
        reshapes = stride != 1 or before != after
        self.shortcut = _convolution(before, after, 1, stride=stride, rngs=rngs) if reshapes else None
        self.shortcut_norm = batch_norm(after, rngs) if reshapes else None

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Run the block on float32 (n, height, width, before)."""
        inner = self.norms[1](self.second(jax.nn.relu(self.norms[0](self.first(pictures)))))
        if self.shortcut is not None and self.shortcut_norm is not None:
            pictures = self.shortcut_norm(self.shortcut(pictures))
        return jax.nn.relu(inner + pictures)


class ResNet18(nnx.Module):
    """ResNet-18 up to its pooled features, for training from random weights with batch statistics.

    Parameters
    ----------
    channels
        Channels per stage. The stem has those of the first stage.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> nnx.eval_shape(lambda: ResNet18((4, 8), rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3)))).shape
    (2, 8)
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512), *, rngs: nnx.Rngs) -> None:
        self.stem = _convolution(3, channels[0], 7, stride=2, rngs=rngs)
        self.norm = batch_norm(channels[0], rngs)
        blocks, before = [], channels[0]
        for stage, after in enumerate(channels):
            for block in range(_BLOCKS):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(before, after, stride=stride, rngs=rngs))
                before = after
        self.blocks = nnx.List(blocks)

    def __call__(self, pictures: jax.Array) -> jax.Array:
        """Embed float32 (n, height, width, 3) as (n, channels[-1])."""
        value = jax.nn.relu(self.norm(self.stem(pictures)))
        value = nnx.max_pool(value, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        value = run_blocks(self.blocks, value)
        return value.mean(axis=(1, 2))


class GraphIsomorphism(nnx.Module):
    """Graph layer: two linear maps of the sum of a node and its neighbors, then batch normalization.

    Parameters
    ----------
    before, after
        Input and output length of a node's features.
    rngs
        Source of the initial weights.

    Examples
    --------
    >>> layer = GraphIsomorphism(4, 8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 4)), jnp.ones((2, 5), bool), jnp.zeros((2, 5, 5), bool)).shape
    (2, 5, 8)
    """

    def __init__(self, before: int, after: int, *, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(before, after, rngs=rngs)
        self.outer = nnx.Linear(after, after, rngs=rngs)
        self.norm = batch_norm(after, rngs)

    def __call__(self, nodes: jax.Array, present: jax.Array, edges: jax.Array) -> jax.Array:
        """Run the layer.

        Parameters
        ----------
        nodes
            float32 (n_graphs, n_nodes, before), 0 where there is no node.
        present
            bool (n_graphs, n_nodes), the existing nodes. Only these enter the batch statistics.
        edges
            bool (n_graphs, n_nodes, n_nodes).

        Returns
        -------
        float32 (n_graphs, n_nodes, after), not negative, 0 where there is no node.
        """
        gathered = nodes + edges.astype(nodes.dtype) @ nodes
        mapped = self.outer(jax.nn.relu(self.inner(gathered)))
        # a batch without nuclei takes its statistics over all rows, which are equal
        mask = (present | ~present.any())[..., None]
        return jnp.where(present[..., None], jax.nn.relu(self.norm(mapped, mask=mask)), 0.0)


class GraphEncoder(nnx.Module):
    """Four graph layers and two linear maps of the maximum and mean of the nodes, summed over the layers.

    Parameters
    ----------
    n_features, width
        Length of a node's features, and width of the layers. The output has half this width.
    dropout
        Share of values that training sets to zero.
    rngs
        Source of the initial weights and of dropout.

    Examples
    --------
    >>> encoder = GraphEncoder(4, 8, dropout=0.0, rngs=nnx.Rngs(0))
    >>> encoder(jnp.ones((2, 5, 4)), jnp.ones((2, 5), bool), jnp.zeros((2, 5, 5), bool)).shape
    (2, 4)
    """

    def __init__(self, n_features: int, width: int, *, dropout: float, rngs: nnx.Rngs) -> None:
        lengths = [n_features, *[width] * (GRAPH_LAYERS - 1)]
        self.layers = nnx.List([GraphIsomorphism(before, width, rngs=rngs) for before in lengths])
        self.inner = nnx.Linear(2 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.outer = nnx.Linear(width, width // 2, rngs=rngs)
        self.norm = batch_norm(width // 2, rngs)

    def __call__(self, nodes: jax.Array, present: jax.Array, edges: jax.Array) -> jax.Array:
        """Encode graphs, as in `GraphIsomorphism`, as (n_graphs, width // 2)."""
        n_nodes = jnp.maximum(present.sum(axis=1, keepdims=True), 1)
        pooled = []
        for layer in self.layers:
            nodes = layer(nodes, present, edges)
            # missing nodes are 0 and the others not negative, so the maximum is right
            pooled.append(jnp.concatenate([nodes.max(axis=1), nodes.sum(axis=1) / n_nodes], axis=-1))
        together = jnp.stack(pooled).sum(axis=0)
        return self.norm(self.outer(self.dropout(jax.nn.relu(self.inner(together)))))


class IGIDLNetwork(nnx.Module):
    """IGI-DL network, from the pixels and nuclei of tiles to log expression.

    Parameters
    ----------
    n_genes, n_features
        Number of genes, and number of features per nucleus.
    channels
        Channels of the stages of the residual network.
    graph_width
        Width of the graph layers.
    fusion
        Widths of the layers over the joined outputs.
    dropout
        Share of values that training sets to zero, in the layers after the graph and in the joining layers.
    rngs
        Source of the initial weights and of dropout.

    Examples
    --------
    >>> network = lambda: IGIDLNetwork(7, 4, channels=(4, 8), graph_width=8, fusion=(16,), rngs=nnx.Rngs(0))
    >>> graph = jnp.ones((2, 5, 4)), jnp.ones((2, 5), bool), jnp.ones((2, 5, 5), bool)
    >>> nnx.eval_shape(lambda: network()(jnp.ones((2, 32, 32, 3)), *graph)).shape
    (2, 7)
    """

    def __init__(
        self,
        n_genes: int,
        n_features: int,
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        graph_width: int = 256,
        fusion: Sequence[int] = (512, 256, 256),
        dropout: float = 0.5,
        rngs: nnx.Rngs,
    ) -> None:
        self.picture = ResNet18(channels, rngs=rngs)
        self.picture_norm = batch_norm(channels[-1], rngs)
        self.graph = GraphEncoder(n_features, graph_width, dropout=dropout, rngs=rngs)
        lengths = [channels[-1] + graph_width // 2, *fusion]
        self.layers = nnx.List(
            [nnx.Linear(before, after, rngs=rngs) for before, after in zip(lengths[:-1], fusion, strict=True)]
        )
        self.norms = nnx.List([batch_norm(after, rngs) for after in fusion])
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.genes = nnx.Linear(lengths[-1], n_genes, rngs=rngs)

    def __call__(self, pixels: jax.Array, nodes: jax.Array, present: jax.Array, edges: jax.Array) -> jax.Array:
        """Predict tiles.

        Parameters
        ----------
        pixels
            float32 (n_tiles, side, side, 3), 0 to 1.
        nodes, present, edges
            The nuclei, as in `GraphIsomorphism`.

        Returns
        -------
        float32 (n_tiles, n_genes).
        """
        seen = self.picture_norm(self.picture(2 * pixels - 1))
        value = jnp.concatenate([seen, self.graph(nodes, present, edges)], axis=-1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            value = self.dropout(jax.nn.relu(norm(layer(value))))
        return self.genes(value)
