"""Graph attention and the graph isomorphism layer against loops in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stimage_sd.baselines.networks.graph_attention import GraphAttention
from stimage_sd.baselines.networks.igidl import GraphEncoder, GraphIsomorphism


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_its_loop(heads: int) -> None:
    random = np.random.default_rng(0)
    layer = GraphAttention(4, head_width=2, heads=heads, slope=0.1, dropout=0.0, rngs=nnx.Rngs(1))
    tokens = random.normal(size=(6, 4)).astype(np.float32)
    graph = np.float32(random.random((6, 6)) < 0.5) * 0.25
    graph[np.arange(6), (np.arange(6) + 1) % 6] = 0.25
    expected = np.zeros((6, heads, 2))
    for head in range(heads):
        mapped = tokens @ np.asarray(layer.map[...])[:, head]
        mine, theirs = np.asarray(layer.of_node[...])[head], np.asarray(layer.of_neighbor[...])[head]
        for node in range(6):
            neighbors = np.flatnonzero(graph[node])
            scores = np.array([mapped[node] @ mine + mapped[other] @ theirs for other in neighbors])
            shares = np.exp(np.where(scores > 0, scores, 0.1 * scores))
            expected[node, head] = (shares / shares.sum()) @ mapped[neighbors]
    np.testing.assert_allclose(
        layer(jnp.asarray(tokens), jnp.asarray(graph)), expected.reshape(6, -1), rtol=1e-4, atol=1e-5
    )


def test_a_graph_layer_sums_neighbors_and_normalizes_over_nodes_that_are() -> None:
    random = np.random.default_rng(3)
    layer = GraphIsomorphism(3, 5, rngs=nnx.Rngs(0))
    present = np.array([[True, True, True, False], [True, False, False, False]])
    nodes = np.where(present[..., None], random.normal(size=(2, 4, 3)), 0).astype(np.float32)
    edges = np.zeros((2, 4, 4), bool)
    edges[0, 0, 1] = edges[0, 1, 0] = edges[0, 1, 2] = edges[0, 2, 1] = True
    mapped = {}
    for graph, node in np.argwhere(present):
        total = nodes[graph, node] + sum(nodes[graph, other] for other in np.flatnonzero(edges[graph, node]))
        inner = np.maximum(total @ np.asarray(layer.inner.kernel[...]) + np.asarray(layer.inner.bias[...]), 0)
        mapped[graph, node] = inner @ np.asarray(layer.outer.kernel[...]) + np.asarray(layer.outer.bias[...])
    rows = np.array(list(mapped.values()))
    expected = np.zeros((2, 4, 5))
    for (graph, node), row in mapped.items():
        expected[graph, node] = np.maximum((row - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + 1e-5), 0)
    found = layer(jnp.asarray(nodes), jnp.asarray(present), jnp.asarray(edges))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_what_is_no_nucleus_is_no_part_of_a_graph() -> None:
    random = np.random.default_rng(4)
    encoder = GraphEncoder(3, 8, dropout=0.5, rngs=nnx.Rngs(0))
    encoder.eval()
    present = np.array([[True, True, False], [False, False, False]])
    nodes = np.where(present[..., None], random.normal(size=(2, 3, 3)), 0).astype(np.float32)
    edges = np.zeros((2, 3, 3), bool)
    edges[0, 0, 1] = edges[0, 1, 0] = True
    padded = [np.pad(array, ((0, 0), *[(0, 4)] * size)) for array, size in ((present, 1), (edges, 2))]
    more = encoder(np.pad(nodes, ((0, 0), (0, 4), (0, 0))), jnp.asarray(padded[0]), jnp.asarray(padded[1]))
    found = encoder(jnp.asarray(nodes), jnp.asarray(present), jnp.asarray(edges))
    np.testing.assert_allclose(more, found, rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all()
    # a batch without nuclei leaves no numbers that are none in the statistics
    encoder.train()
    none = np.zeros_like(present)
    assert np.isfinite(encoder(jnp.zeros_like(nodes), jnp.asarray(none), jnp.zeros_like(edges))).all()
    assert all(np.isfinite(value[...]).all() for _, value in nnx.to_flat_state(nnx.state(encoder, nnx.BatchStat)))
