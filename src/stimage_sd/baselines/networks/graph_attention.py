"""Graph attention: attention of graph nodes to their neighbors.

Source: Veličković et al., "Graph attention networks", ICLR 2018.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

#: gain of the initial weights
_GAIN = 1.414
#: attention score of nodes that are not neighbors
_NEVER = -9e15


class GraphAttention(nnx.Module):
    """Weighted means of the neighbors' mapped tokens, with concatenated heads.

    Parameters
    ----------
    width
        Length of a token.
    head_width, heads
        Length of a head's output, and number of heads.
    slope
        Slope of the leaky rectifier below 0.
    dropout
        Share of the attention weights that training sets to zero.
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
        self.of_neighbor = _uniform((heads, head_width), 2 * head_width + 1, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array, graph: jax.Array) -> jax.Array:
        """Run the layer.

        Parameters
        ----------
        tokens
            float32 (n, width).
        graph
            (n, n). Positive values in a row mark the neighbors. A positive diagonal makes a node its own neighbor.

        Returns
        -------
        float32 (n, heads · head_width).
        """
        mapped = jnp.einsum("nw,whd->nhd", tokens, self.map[...])
        of_node = jnp.einsum("nhd,hd->hn", mapped, self.of_node[...])
        of_neighbor = jnp.einsum("nhd,hd->hn", mapped, self.of_neighbor[...])
        scores = jax.nn.leaky_relu(of_node[:, :, None] + of_neighbor[:, None, :], self.slope)
        weights = self.dropout(jax.nn.softmax(jnp.where(graph > 0, scores, _NEVER), axis=-1))
        return jnp.einsum("hnm,mhd->nhd", weights, mapped).reshape(len(tokens), -1)


def _uniform(shape: tuple[int, ...], fan: int, rngs: nnx.Rngs) -> nnx.Param:
    """Return Glorot's uniform weights. `fan` is the sum of the input and output lengths of a head."""
    bound = _GAIN * (6 / fan) ** 0.5
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
