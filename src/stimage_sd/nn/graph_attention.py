"""Attention of the nodes of a graph to their neighbours.

Source: Veličković et al., "Graph attention networks", ICLR 2018.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

#: gain of the initial weights
_GAIN = 1.414
#: score of nodes that are no neighbours
_NEVER = -9e15


class GraphAttention(nnx.Module):
    """Weighted means of the neighbours' mapped tokens, several heads side by side.

    Parameters
    ----------
    width
        Length of a token.
    head_width, heads
        Length of a head's outcome, and heads.
    slope
        Of the leaky rectifier, below 0.
    dropout
        Share of the weights that training sets to zero.
    rngs
        Source of the initial weights and of dropout.

    Examples
    --------
    >>> layer = GraphAttention(4, head_width=3, heads=2, slope=0.01, dropout=0.0, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((5, 4)), jnp.ones((5, 5))).shape
    (5, 6)
    """

    def __init__(
        self, width: int, *, head_width: int, heads: int, slope: float, dropout: float, rngs: nnx.Rngs
    ) -> None:
        self.slope = slope
        self.map = _uniform((width, heads, head_width), width + head_width, rngs)
        self.of_node = _uniform((heads, head_width), 2 * head_width + 1, rngs)
        self.of_neighbour = _uniform((heads, head_width), 2 * head_width + 1, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array, graph: jax.Array) -> jax.Array:
        """Run the layer.

        Parameters
        ----------
        tokens
            float32 (n, width).
        graph
            (n, n): in a row, what is above 0 are the neighbours; a node is its own where it says so.

        Returns
        -------
        float32 (n, heads · head_width).
        """
        mapped = jnp.einsum("nw,whd->nhd", tokens, self.map[...])
        of_node = jnp.einsum("nhd,hd->hn", mapped, self.of_node[...])
        of_neighbour = jnp.einsum("nhd,hd->hn", mapped, self.of_neighbour[...])
        scores = jax.nn.leaky_relu(of_node[:, :, None] + of_neighbour[:, None, :], self.slope)
        weights = self.dropout(jax.nn.softmax(jnp.where(graph > 0, scores, _NEVER), axis=-1))
        return jnp.einsum("hnm,mhd->nhd", weights, mapped).reshape(len(tokens), -1)


def _uniform(shape: tuple[int, ...], fan: int, rngs: nnx.Rngs) -> nnx.Param:
    """Glorot's uniform weights: `fan` is the sum of the lengths before and after, of one head."""
    bound = _GAIN * (6 / fan) ** 0.5
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
