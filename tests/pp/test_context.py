"""Spatial context: neighbors' embeddings against a loop over distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse as sp
import squidpy as sq
from spatialdata import SpatialData

from stimage_sd import contract, pp

PITCH = 40.0


def made(make_spots: Callable, kind: str, *, n_side: int = 7, off: tuple[int, ...] = ()) -> SpatialData:
    features = np.random.default_rng(0).normal(size=(n_side**2, 3)).astype(np.float32)
    sdata = make_spots(n_side=n_side, features=features, kind=kind, pitch=PITCH)
    keep = np.ones(n_side**2, bool)
    keep[list(off)] = False
    contract.tiles(sdata).obs["keep"] = keep
    return sdata


def steps_away(sdata: SpatialData, kind: str) -> np.ndarray:
    """Steps between every two tiles, by geometry: rings are squares, or hexagons."""
    points = np.asarray(contract.tiles(sdata).obsm["spatial"])
    x, y = np.moveaxis(points[:, None] - points[None], -1, 0) / PITCH
    if kind == "square":
        return np.round(np.maximum(np.abs(x), np.abs(y))).astype(int)
    row = y / (np.sqrt(3) / 2)
    column = x - row / 2  # axial coordinates
    return np.round((np.abs(row) + np.abs(column) + np.abs(row + column)) / 2).astype(int)


def brute_force(sdata: SpatialData, kind: str, n_rings: int, how: Callable) -> np.ndarray:
    own, keep = contract.embeddings(sdata, "toy"), contract.tiles(sdata).obs["keep"].to_numpy()
    steps = steps_away(sdata, kind)
    rows = []
    for tile in range(len(own)):
        inner, parts = own[tile], []
        for ring in range(1, n_rings + 1):
            neighbors = np.flatnonzero((steps[tile] == ring) & keep)
            inner = how(own[neighbors], axis=0) if neighbors.size else inner
            parts.append(inner)
        rows.append(np.concatenate(parts))
    return np.stack(rows)


@pytest.mark.parametrize("kind", ["square", "hexagonal"])
@pytest.mark.parametrize("n_rings", [1, 2, 3])
@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_rings_against_a_loop(make_spots: Callable, kind: str, n_rings: int, aggregate: str) -> None:
    # a corner whose neighbors are all dropped repeats itself
    sdata = made(make_spots, kind, off=(1, 7, 8, 24, 30))
    pp.spatial_context(sdata, "toy", n_rings=n_rings, aggregate=aggregate)
    found = contract.tiles(sdata).obsm["X_toy_context"]
    assert found.dtype == np.float32
    expected = brute_force(sdata, kind, n_rings, getattr(np, aggregate))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert contract.tiles(sdata).uns["embeddings"]["toy"]["context_rings"] == n_rings


@pytest.mark.parametrize("as_name", [True, False])
def test_a_graph_of_squidpys(make_spots: Callable, as_name: bool) -> None:
    sdata = made(make_spots, "square")
    tiles = contract.tiles(sdata)
    sq.gr.spatial_neighbors(tiles, coord_type="grid", n_neighs=4)
    graph = "spatial_connectivities" if as_name else tiles.obsp["spatial_connectivities"]
    pp.spatial_context(sdata, "toy", graph=graph)
    own, adjacency = contract.embeddings(sdata, "toy"), tiles.obsp["spatial_connectivities"].toarray()
    expected = np.stack([own[row > 0].mean(axis=0) for row in adjacency])
    np.testing.assert_allclose(tiles.obsm["X_toy_context"], expected, rtol=1e-5, atol=1e-6)


def test_weights_and_self_loops_of_a_graph_do_not_count(make_spots: Callable) -> None:
    sdata = made(make_spots, "square", n_side=5)
    plain = np.zeros((25, 25), np.float32)
    plain[0, 1] = plain[1, 0] = plain[1, 2] = plain[2, 1] = 1
    pp.spatial_context(sdata, "toy", graph=sp.csr_matrix(plain))
    expected = contract.tiles(sdata).obsm["X_toy_context"].copy()
    pp.spatial_context(sdata, "toy", graph=sp.coo_matrix(plain * 0.3 + np.eye(25)))
    np.testing.assert_array_equal(contract.tiles(sdata).obsm["X_toy_context"], expected)
    own = contract.embeddings(sdata, "toy")
    np.testing.assert_allclose(expected[1], own[[0, 2]].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(expected[7], own[7])


def test_refusals(make_spots: Callable) -> None:
    sdata = made(make_spots, "square", n_side=5)
    for error, match, arguments in [
        (ValueError, "`n_rings` of at least 1, found 0", {"n_rings": 0}),
        (ValueError, '"mean" or "max", found \'sum\'', {"aggregate": "sum"}),
        (KeyError, r"No graph 'delaunay' among the tiles' `obsp`: \[\]", {"graph": "delaunay"}),
        (ValueError, r"graph over 25 tiles, found a matrix of \(3, 3\)", {"graph": sp.identity(3)}),
        (KeyError, r"no embeddings by 'resnet50'", {"extractor": "resnet50"}),
    ]:
        with pytest.raises(error, match=match):
            pp.spatial_context(sdata, **{"extractor": "toy", **arguments})
        assert "X_toy_context" not in contract.tiles(sdata).obsm
