"""Spatial scores against squidpy, esda, scipy and a plain loop."""

from __future__ import annotations

import anndata as ad
import esda
import libpysal
import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import scipy.sparse
import scipy.stats
import squidpy as sq
from hypothesis import given, settings
from hypothesis import strategies as st

from stimage_sd.stats import lattice, spatial

PITCH = 137.0


@pytest.fixture(params=["square", "hexagonal"])
def section(request):
    """A ragged piece of tissue: its kind, array columns and rows, and displaced, turned coordinates."""
    generator = np.random.default_rng(3)
    row, column = (axis.ravel() for axis in np.mgrid[:14, :11])
    keep = (generator.random(row.size) > 0.15) & ((row - 6) ** 2 + (column - 5) ** 2 < 45)
    row, column = row[keep], column[keep]
    spacing = (1.0, 1.0)
    if request.param == "hexagonal":
        column, spacing = 2 * column + row % 2, (np.sqrt(3) / 2, 0.5)
    row, column = row - row.min(), column - column.min()
    points = PITCH * np.column_stack([column * spacing[1], row * spacing[0]])
    turn = np.array([[np.cos(0.1), np.sin(0.1)], [-np.sin(0.1), np.cos(0.1)]])
    points = points @ turn + 1_000 + generator.uniform(-0.1, 0.1, points.shape) * PITCH
    return request.param, column, row, points


@pytest.fixture
def expression(section):
    """Counts of 12 genes with a gradient, for prediction and truth; the last gene of each is constant."""
    points = section[3]
    generator = np.random.default_rng(4)
    means = 0.2 + np.abs(points[:, :1] - points[:, :1].mean()) / PITCH * generator.random(12)
    predicted, observed = generator.poisson(means).astype(float), generator.poisson(means).astype(float)
    predicted[:, -1] = 0.1
    observed[:, -1] = 3
    return predicted, observed


def test_lattice_is_found_under_rotation_and_displacement(section):
    kind, column, row, points = section
    found = lattice.find_lattice(points)
    assert found.kind == kind
    np.testing.assert_array_equal(found.column, column)
    np.testing.assert_array_equal(found.row, row)
    assert found.pitch == pytest.approx(PITCH, rel=0.02)


def test_lattice_of_array_indices_is_the_indices(section):
    kind, column, row, _ = section
    found = lattice.find_lattice(np.column_stack([column, row]))
    assert found.kind == kind
    np.testing.assert_array_equal(found.column, column)
    np.testing.assert_array_equal(found.row, row)


def test_lattice_of_even_pixels_is_not_taken_for_array_indices():
    corners = np.array([[x, y] for x in range(0, 2_240, 224) for y in range(0, 2_240, 224)])
    found = lattice.find_lattice(corners)
    assert found.kind == "square"
    assert found.pitch == 224
    np.testing.assert_array_equal(found.column, corners[:, 0] // 224)


def test_lattice_places_parts_that_do_not_touch():
    grid = np.array([[x, y] for x in range(12) for y in range(5) if x not in (4, 5, 9)], dtype=float)
    generator = np.random.default_rng(0)
    found = lattice.find_lattice(10 * grid + generator.uniform(-1, 1, grid.shape))
    np.testing.assert_array_equal(np.column_stack([found.column, found.row]), grid)


@pytest.mark.parametrize("sample", ["C2", "C3", "C4", "C5"])
def test_lattice_of_real_sections_is_the_published_array(data_dir, sample):
    spots = pd.read_csv(data_dir / "her2st" / sample / "spots.tsv", sep="\t")
    found = lattice.find_lattice(spots[["pixel_x", "pixel_y"]].to_numpy())
    assert found.kind == "square"
    np.testing.assert_array_equal(found.column, spots["x"] - spots["x"].min())
    np.testing.assert_array_equal(found.row, spots["y"] - spots["y"].min())


def test_lattice_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"shape \(n_obs, 2\) .* found shape \(3,\)"):
        lattice.find_lattice(np.zeros(3))
    with pytest.raises(ValueError, match="share a position"):
        lattice.find_lattice(np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"on one position.*`n_neighbors=`"):
        lattice.find_lattice(np.random.default_rng(0).random((300, 2)))


@pytest.mark.parametrize("n_rings", [1, 2])
def test_neighbors_are_those_within_the_ring(section, n_rings):
    kind, column, row, points = section
    graph = lattice.neighbor_graph(points, n_rings=n_rings)
    rows, columns = np.abs(row[:, None] - row), np.abs(column[:, None] - column)
    apart = np.maximum(rows, columns) if kind == "square" else np.maximum(rows, (rows + columns) / 2)
    np.testing.assert_array_equal(graph.toarray(), (apart > 0) & (apart <= n_rings))
    assert graph.dtype == np.float32


def test_neighbors_equal_queen_contiguity_and_squidpy():
    queen = libpysal.weights.lat2W(6, 5, rook=False).sparse.toarray()
    square = np.array([[x, y] for y in range(6) for x in range(5)], dtype=float)
    np.testing.assert_array_equal(lattice.neighbor_graph(square).toarray(), queen)

    array = np.array([[2 * x + y % 2, y] for y in range(8) for x in range(7)], dtype=float)
    adata = ad.AnnData(np.zeros((56, 1)), obsm={"spatial": array * [0.5, np.sqrt(3) / 2]})
    sq.gr.spatial_neighbors_grid(adata, n_neighs=6)
    found = lattice.neighbor_graph(adata.obsm["spatial"])
    np.testing.assert_array_equal(found.toarray(), adata.obsp["spatial_connectivities"].toarray() > 0)


def test_neighbors_by_number_and_radius():
    points = np.random.default_rng(0).random((80, 2))
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(distances, np.inf)
    by_number = lattice.neighbor_graph(points, n_neighbors=5).toarray()
    np.testing.assert_array_equal(by_number > 0, distances <= np.sort(distances, axis=1)[:, 4:5])
    by_radius = lattice.neighbor_graph(points, radius=0.08).toarray()
    np.testing.assert_array_equal(by_radius > 0, distances <= 0.08)
    assert (by_radius.sum(axis=1) == 0).any()


def test_neighbor_graph_names_what_is_wrong():
    points = np.random.default_rng(0).random((8, 2))
    with pytest.raises(ValueError, match=r"one of .* found \['n_neighbors', 'radius'\]"):
        lattice.neighbor_graph(points, radius=1.0, n_neighbors=2)
    with pytest.raises(ValueError, match="`radius` to be positive, found -1"):
        lattice.neighbor_graph(points, radius=-1)
    with pytest.raises(ValueError, match="below the 8 spots, found 8"):
        lattice.neighbor_graph(points, n_neighbors=8)


def without_some_links(graph):
    """Isolate two spots, so that the sum of weights is not the number of spots."""
    mask = np.ones(graph.shape[0])
    mask[[0, 5]] = 0
    return scipy.sparse.csr_matrix(scipy.sparse.diags(mask) @ graph @ scipy.sparse.diags(mask))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("isolate", [False, True])
def test_morans_i_equals_squidpy(section, expression, isolate, many, monkeypatch):
    if many:
        monkeypatch.setattr(spatial, "WIDTH", 4)
    graph = scipy.sparse.csr_matrix(lattice.neighbor_graph(section[3]))
    graph = without_some_links(graph) if isolate else graph
    adata = ad.AnnData(expression[0][:, :-1], obsp={"spatial_connectivities": graph})
    table = sq.gr.spatial_autocorr(adata, mode="moran", transformation=True, copy=True)
    found = spatial.morans_i(expression[0], graph)
    np.testing.assert_allclose(found[:-1], table["I"].loc[adata.var_names], atol=1e-7)
    assert np.isnan(found[-1])


@pytest.mark.filterwarnings("ignore:The weights matrix is not fully connected:UserWarning")
@pytest.mark.parametrize("isolate", [False, True])
def test_bivariate_morans_i_equals_esda(section, expression, isolate):
    graph = scipy.sparse.csr_matrix(lattice.neighbor_graph(section[3]))
    graph = without_some_links(graph) if isolate else graph
    graph.eliminate_zeros()
    predicted, observed = expression
    found = spatial.morans_i(predicted, graph, observed)
    weights = libpysal.weights.WSP(graph).to_W(silence_warnings=True)
    expected = [esda.Moran_BV(predicted[:, gene], observed[:, gene], weights, permutations=0).I for gene in range(11)]
    np.testing.assert_allclose(found[:-1], expected, atol=1e-7)
    assert np.isnan(found[-1])
    swapped = spatial.morans_i(observed, graph, predicted)
    if isolate:
        # Row sums differ, so which of the two is averaged over neighbors matters.
        assert np.abs(swapped - found)[:-1].max() > 1e-4


def test_morans_i_takes_sparse_and_float32_and_blocks(section, expression, monkeypatch):
    graph = lattice.neighbor_graph(section[3])
    predicted, observed = expression
    dense = spatial.morans_i(predicted, graph, observed)
    sparse = spatial.morans_i(scipy.sparse.csr_matrix(predicted), graph.tocoo(), observed.astype(np.float32))
    np.testing.assert_allclose(sparse, dense, atol=1e-6)
    # Two blocks of genes, on threads.
    monkeypatch.setattr(spatial, "VALUES", 1)
    monkeypatch.setattr(spatial, "FEW", 0)
    for one, other in ((predicted, observed), (np.asfortranarray(predicted), scipy.sparse.coo_array(observed))):
        np.testing.assert_allclose(spatial.morans_i(one, graph, other), dense, atol=1e-12)


def test_scores_keep_their_digits_far_from_zero(section, expression):
    graph = lattice.neighbor_graph(section[3])
    predicted, observed = (matrix[:, :11] for matrix in expression)
    expected = spatial.morans_i(predicted, graph, observed), spatial.pearson(predicted, observed)
    found = spatial.morans_i(predicted + 1e7, graph, observed - 1e7), spatial.pearson(predicted + 1e7, observed - 1e7)
    np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize("many", [False, True])
def test_weights_need_not_be_canonical(section, expression, many, monkeypatch):
    if many:
        monkeypatch.setattr(spatial, "WIDTH", 4)
    graph = scipy.sparse.csr_array(lattice.neighbor_graph(section[3]))
    # Every link twice, in no order, with rows that are stored as empty between others.
    halves = scipy.sparse.csr_array(
        (np.repeat(graph.data, 2)[::-1], np.repeat(graph.indices, 2), 2 * graph.indptr), shape=graph.shape
    )
    expected = spatial.morans_i(expression[0], graph)
    np.testing.assert_allclose(spatial.morans_i(expression[0], halves), expected, atol=1e-12)
    kept = np.ones(len(expression[0]))
    kept[[0, 5, 6, -1]] = 0
    graph = scipy.sparse.csr_array(scipy.sparse.diags_array(kept) @ graph)
    graph.eliminate_zeros()
    weights = graph.toarray() / np.maximum(graph.sum(axis=1), 1)[:, None]
    z = expression[0][:, :11] - expression[0][:, :11].mean(axis=0)
    by_hand = len(z) / weights.sum() * np.einsum("ig,ij,jg->g", z, weights, z) / (z**2).sum(axis=0)
    np.testing.assert_allclose(spatial.morans_i(expression[0], graph)[:11], by_hand, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(-50, 50).filter(lambda value: abs(value) > 0.01),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 99),
)
def test_morans_i_is_invariant_to_affine_transforms(scale, shift, seed):
    grid = np.array([[x, y] for x in range(6) for y in range(5)], dtype=float)
    graph = lattice.neighbor_graph(grid)
    values = np.random.default_rng(seed).normal(size=(30, 4))
    before, after = (spatial.morans_i(matrix, graph) for matrix in (values, scale * values + shift))
    np.testing.assert_allclose(after, before, atol=1e-8)
    assert np.all(np.abs(before) <= 1)
    both = spatial.morans_i(scale * values + shift, graph, values)
    np.testing.assert_allclose(both, np.sign(scale) * before, atol=1e-8)


def test_morans_i_names_what_is_wrong():
    values, graph = np.zeros((4, 2)), scipy.sparse.eye_array(4).tocsr()
    with pytest.raises(ValueError, match=r"`other` .* \(4, 2\), found \(4, 1\)"):
        spatial.morans_i(values, graph, values[:, :1])
    with pytest.raises(ValueError, match=r"sparse `weights` of shape \(4, 4\), found ndarray"):
        spatial.morans_i(values, graph.toarray())
    with pytest.raises(ValueError, match="zero or more, found -1"):
        spatial.morans_i(values, -graph)


def loop_iou(predicted, observed, column, row, sigma):
    """Score one gene as the paper tells it, on images."""
    tissue = np.zeros((row.max() + 1, column.max() + 1))
    tissue[row, column] = 1
    masks = []
    for values in (predicted, observed):
        image = np.zeros_like(tissue)
        image[row, column] = scipy.stats.zscore(values) > 0
        smooth = [
            scipy.ndimage.gaussian_filter(layer, sigma, mode="constant", truncate=4.0) for layer in (image, tissue)
        ]
        masks.append((smooth[0] / np.where(tissue > 0, smooth[1], 1) >= 0.5 - 1e-9)[row, column])
    return (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()


@pytest.mark.parametrize("sigma", [0.6, 1.0, 1.7])
def test_pattern_iou_equals_a_loop_over_images(section, expression, sigma, monkeypatch):
    kind, column, row, points = section
    predicted, observed = expression
    # On a hexagonal lattice rows are sqrt(3)/2 of a pitch apart and columns half a pitch.
    sigmas = (sigma, sigma) if kind == "square" else (sigma * 2 / np.sqrt(3), sigma * 2)
    expected = [loop_iou(predicted[:, gene], observed[:, gene], column, row, sigmas) for gene in range(11)]
    found = spatial.pattern_iou(predicted, scipy.sparse.csr_matrix(observed), points, sigma=sigma)
    np.testing.assert_allclose(found[:-1], expected, atol=1e-12)
    assert np.isnan(found[-1])
    monkeypatch.setattr(spatial, "VALUES", 1)
    np.testing.assert_array_equal(spatial.pattern_iou(predicted, observed, points, sigma=sigma), found)


@pytest.mark.slow
def test_patterns_of_ties_equal_a_loop_over_images():
    # In the middle of a symmetric half the smoothed pattern is one half of the tissue, but for rounding.
    row, column = np.divmod(np.arange(20 * 21), 21)
    stripes = np.stack([(column // width + row // height) % 2 for width in (1, 2, 3) for height in (1, 2, 50)], axis=1)
    halves = np.stack([column < 10, row < 10, column + row < 20, (column == 10) | (row % 2 == 0)], axis=1)
    one, points = np.hstack([stripes, halves]).astype(np.float32), np.stack([column, row], axis=1)
    two = 1 - one
    expected = [loop_iou(one[:, gene], two[:, gene], column, row, (1, 1)) for gene in range(one.shape[1])]
    np.testing.assert_allclose(spatial.pattern_iou(one, two, points), expected, atol=1e-12)


def test_pattern_iou_without_any_pattern_is_nan():
    grid = np.array([[x, y] for x in range(9) for y in range(9)], dtype=float)
    # One high spot amid low ones is smoothed away.
    lonely = np.zeros((81, 1))
    lonely[40] = 1
    assert np.isnan(spatial.pattern_iou(lonely, lonely, grid)).all()
    assert not spatial.binary_pattern(lonely, grid).any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10))
def test_pattern_iou_is_bounded_symmetric_and_one_for_identical(seed, scale):
    grid = np.array([[x, y] for x in range(7) for y in range(6)], dtype=float)
    first, second = np.random.default_rng(seed).gamma(1, size=(2, 42, 5))
    forth, back = spatial.pattern_iou(first, second, grid), spatial.pattern_iou(second, first, grid)
    np.testing.assert_array_equal(forth, back)
    assert np.all((forth >= 0) & (forth <= 1) | np.isnan(forth))
    same = spatial.pattern_iou(first, scale * first, 300 * grid)
    assert np.all((same == 1) | np.isnan(same))


def test_pattern_iou_names_what_is_wrong():
    grid = np.array([[x, y] for x in range(3) for y in range(3)], dtype=float)
    with pytest.raises(ValueError, match=r"one shape, found \(9, 1\) and \(9, 2\)"):
        spatial.pattern_iou(np.zeros((9, 1)), np.zeros((9, 2)), grid)
    with pytest.raises(ValueError, match="Expected 8 `coordinates`, one per row of values, found 9"):
        spatial.pattern_iou(np.zeros((8, 1)), np.zeros((8, 1)), grid)
    with pytest.raises(ValueError, match="`sigma` to be positive, found 0"):
        spatial.pattern_iou(grid, grid, grid, sigma=0)
    with pytest.raises(ValueError, match=r"matrix \(n_obs, n_genes\), found shape \(9,\)"):
        spatial.pearson(np.zeros(9), np.zeros(9))


@pytest.mark.parametrize(
    ("function", "reference"), [(spatial.pearson, scipy.stats.pearsonr), (spatial.spearman, scipy.stats.spearmanr)]
)
def test_correlations_equal_scipy(expression, function, reference):
    predicted, observed = expression
    found = function(scipy.sparse.csr_matrix(predicted), observed.astype(np.float32))
    expected = [reference(predicted[:, gene], observed[:, gene]).statistic for gene in range(11)]
    np.testing.assert_allclose(found[:-1], expected, atol=1e-6)
    assert np.isnan(found[-1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-150, 150))
def test_correlations_do_not_depend_on_the_unit(seed, exponent):
    first, second = np.random.default_rng(seed).normal(size=(2, 25, 3))
    scaled = first * 10.0**exponent
    np.testing.assert_allclose(spatial.pearson(scaled, second), spatial.pearson(first, second), atol=1e-9)
    np.testing.assert_allclose(spatial.spearman(scaled, second), spatial.spearman(first, second), atol=1e-12)
