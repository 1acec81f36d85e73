"""Nuclei that were painted are found, measured and linked."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from stimage_sd.image.nuclei_graph import FEATURES, NucleiGraphs, nuclei_graphs, standardized

INK, PAPER = (90, 60, 150), (240, 200, 225)


def painted(discs: list[tuple[int, int, int]], side: int = 120) -> np.ndarray:
    """A tile with discs (x, y, radius)."""
    tile = np.full((side, side, 3), PAPER, np.uint8)
    for x, y, radius in discs:
        cv2.circle(tile, (x, y), radius, INK, -1)
    return tile


def of(graphs: NucleiGraphs, name: str) -> np.ndarray:
    return graphs.features[graphs.present][:, FEATURES.index(name)]


def test_discs_are_measured() -> None:
    discs = [(60, 60, 8), (25, 30, 6), (98, 95, 10)]
    graphs = nuclei_graphs(painted(discs)[None], n_nuclei=6)
    assert graphs.present.sum() == 3
    assert (graphs.features[~graphs.present] == 0).all()
    # the nearest to the center come first
    radii = np.array([8, 6, 10])
    np.testing.assert_allclose(of(graphs, "area"), np.pi * radii**2, rtol=0.25)
    np.testing.assert_allclose(of(graphs, "major_axis"), 2 * radii, rtol=0.15)
    np.testing.assert_allclose(of(graphs, "radius"), radii, atol=1.6)
    assert (of(graphs, "eccentricity") < 0.35).all()
    np.testing.assert_allclose(of(graphs, "extent"), np.pi / 4, atol=0.13)
    assert of(graphs, "nearest")[0] == pytest.approx(np.hypot(35, 30), abs=1)
    red = -np.log((INK[0] + 1) / 256)
    np.testing.assert_allclose(of(graphs, "red_mean"), red, rtol=0.15)


def test_an_ellipse_and_two_that_touch() -> None:
    tile = painted([(80, 40, 9), (95, 40, 9)])
    cv2.ellipse(tile, (40, 80), (16, 8), 0, 0, 360, INK, -1)
    graphs = nuclei_graphs(tile[None])
    assert graphs.present.sum() == 3
    longest = np.argmax(of(graphs, "eccentricity"))
    assert of(graphs, "eccentricity")[longest] == pytest.approx(np.sqrt(1 - 0.25), abs=0.05)
    assert of(graphs, "minor_axis")[longest] == pytest.approx(16, rel=0.15)


def test_links_are_those_of_all_pairs() -> None:
    random = np.random.default_rng(0)
    grid = [(x, y) for x in range(15, 181, 30) for y in range(15, 181, 30)]
    discs = [(x + int(random.integers(-6, 7)), y + int(random.integers(-6, 7)), 5) for x, y in grid]
    graphs = nuclei_graphs(painted(discs, side=195)[None], n_nuclei=40, n_neighbors=3)
    assert graphs.present.sum() == 36
    centers = np.array(sorted(discs, key=lambda disc: np.hypot(disc[0] - 97.5, disc[1] - 97.5)))[:, :2]
    edges = graphs.edges[0, :36, :36]
    assert (edges == edges.T).all()
    assert not edges.diagonal().any()
    expected = np.zeros((36, 36), bool)
    for one in range(36):
        distance = np.hypot(*(centers - centers[one]).T)
        for other in np.argsort(distance, kind="stable")[1:4]:
            expected[one, other] = expected[other, one] = True
    # order by distance to the center, and neighbors, may differ where distances are all but equal
    assert (edges.sum(), edges.any(axis=1).all()) == (pytest.approx(expected.sum(), abs=6), True)
    assert not graphs.edges[0, 36:].any()


def test_more_nuclei_than_wanted_and_none() -> None:
    discs = [(60, 60, 5), (15, 15, 5), (105, 105, 5), (70, 40, 5)]
    tiles = np.stack([painted(discs), painted([])])
    graphs = nuclei_graphs(tiles, n_nuclei=2)
    assert graphs.present.tolist() == [[True, True], [False, False]]
    assert of(graphs, "nearest")[0] == pytest.approx(np.hypot(10, 20), abs=1)
    assert nuclei_graphs(tiles[1:], n_nuclei=2).edges.sum() == 0
    assert standardized(nuclei_graphs(tiles[1:])).present.sum() == 0
    scaled = standardized(nuclei_graphs(tiles[:1], n_nuclei=4))
    np.testing.assert_allclose(of(scaled, "nearest").mean(), 0, atol=1e-5)
    np.testing.assert_allclose(of(scaled, "nearest").std(), 1, rtol=1e-4)
