"""Local Moran's I: esda's own statistic and quadrants, p-values of conditional permutations."""

from __future__ import annotations

import esda
import numpy as np
import pytest
import scipy.sparse as sp
from libpysal.weights import WSP

from stimage_sd.stats.lattice import neighbor_graph
from stimage_sd.stats.local_moran import QUADRANTS, local_morans_i
from stimage_sd.stats.spatial import morans_i

#: esda numbers quadrants counter-clockwise from high-high
ESDA = {1: "high-high", 2: "low-high", 3: "low-low", 4: "high-low"}


@pytest.fixture(scope="module")
def maps() -> tuple[np.ndarray, np.ndarray, sp.csr_array]:
    """A smooth map, noise and a map that follows the smooth one, on a lattice of 11 by 11 spots."""
    grid = np.array([[x, y] for x in range(11) for y in range(11)], dtype=float)
    random = np.random.default_rng(0)
    smooth = np.exp(-((grid[:, 0] - 3) ** 2 + (grid[:, 1] - 3) ** 2) / 8)
    values = np.stack([smooth + random.normal(0, 0.1, 121), random.normal(size=121)], axis=1)
    return values, values + random.normal(0, 0.3, values.shape), neighbor_graph(grid)


def weights(graph: sp.csr_array) -> object:
    made = WSP(sp.csr_matrix(graph)).to_W()
    made.transform = "r"
    return made


def names(quadrant: np.ndarray) -> list[str]:
    return [QUADRANTS[number] for number in quadrant]


def test_statistic_and_quadrant_are_esdas(maps: tuple) -> None:
    values, other, graph = maps
    alone, both = local_morans_i(values, graph), local_morans_i(values, graph, other)
    for gene in range(2):
        expected = esda.Moran_Local(values[:, gene], weights(graph), permutations=0)
        np.testing.assert_allclose(alone.statistic[:, gene], expected.Is, atol=1e-12)
        assert names(alone.quadrant[:, gene]) == [ESDA[q] for q in expected.q]
        expected = esda.Moran_Local_BV(values[:, gene], other[:, gene], weights(graph), permutations=0)
        np.testing.assert_allclose(both.statistic[:, gene], expected.Is, atol=1e-12)
        assert names(both.quadrant[:, gene]) == [ESDA[q] for q in expected.q]
    # the local statistics add up to Moran's I
    np.testing.assert_allclose(alone.statistic.sum(axis=0) / 120, morans_i(values, graph), atol=1e-12)


def test_p_values_by_a_plain_loop(maps: tuple) -> None:
    values, _, graph = maps
    found = local_morans_i(values[:, :1], graph, n_permutations=49, seed=3)
    random = np.random.default_rng(3)
    z = (values[:, 0] - values[:, 0].mean()) / values[:, 0].std()
    drawn = [random.choice(120, 8, replace=False) for _ in range(49)]
    for spot in range(121):
        neighbors = graph[[spot]].indices
        others = np.delete(z, spot)
        by_chance = np.array([z[spot] * others[ids[: len(neighbors)]].mean() for ids in drawn])
        observed = z[spot] * z[neighbors].mean()
        rarer = min((by_chance >= observed).sum(), (by_chance <= observed).sum())
        assert found.p_value[spot, 0] == pytest.approx(min(1.0, 2 * (rarer + 1) / 50))


def test_noise_is_significant_as_often_as_stated(maps: tuple) -> None:
    noise = np.random.default_rng(4).normal(size=(121, 40))
    p_value = local_morans_i(noise, maps[2], n_permutations=399).p_value
    assert 0.03 < (p_value <= 0.05).mean() < 0.07


def test_constant_genes_and_lonely_spots_are_nan(maps: tuple) -> None:
    values, _, graph = maps
    lonely = graph.tolil()
    lonely[5], lonely[:, 5] = 0, 0
    found = local_morans_i(np.column_stack([np.full(121, 0.1), values[:, 0]]), lonely.tocsr(), n_permutations=9)
    assert np.isnan(found.statistic[:, 0]).all()
    assert (found.quadrant[:, 0] == -1).all()
    missing = np.flatnonzero(np.isnan(found.p_value[:, 1]))
    assert missing.tolist() == [5]
    assert np.flatnonzero(found.quadrant[:, 1] < 0).tolist() == [5]


def test_arguments_that_do_not_fit(maps: tuple) -> None:
    values, other, graph = maps
    with pytest.raises(ValueError, match="`n_permutations` of at least 1, found 0"):
        local_morans_i(values, graph, n_permutations=0)
    with pytest.raises(ValueError, match=r"`other` of the shape of `values`, \(121, 2\), found \(121, 1\)"):
        local_morans_i(values, graph, other[:, :1])
    with pytest.raises(ValueError, match=r"matrix \(n_obs, n_genes\), found shape \(121,\)"):
        local_morans_i(values[:, 0], graph)
