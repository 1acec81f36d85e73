"""Points and pixels in regions: against a tree, against GEOS, against a mask; and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial import cKDTree

from stimage_sd.image import aggregation

whole = st.integers(-30, 30)


def points(n_most: int = 80) -> st.SearchStrategy[np.ndarray]:
    """Whole-numbered points, many of them on rims, edges and corners."""
    return hnp.arrays(np.int64, st.tuples(st.integers(0, n_most), st.just(2)), elements=whole)


def total(regions: aggregation.Regions, xy: np.ndarray, labels: np.ndarray | None = None, **options) -> np.ndarray:
    labels = np.zeros(len(xy), np.int64) if labels is None else labels
    return aggregation.count(regions, xy[:, 0], xy[:, 1], labels, n_labels=3, **options).toarray()


def blob(random: np.random.Generator, *, n_vertices: int, radius: float, center: np.ndarray) -> np.ndarray:
    """A star-shaped, usually concave ring."""
    angle = np.sort(random.uniform(0, 2 * np.pi, n_vertices))
    reach = radius * random.uniform(0.3, 1.0, n_vertices)
    return center + np.column_stack([np.cos(angle), np.sin(angle)]) * reach[:, None]


# --------------------------------------------------------------------------------------------------
# circles


@pytest.mark.slow
@given(
    centers=hnp.arrays(np.int64, st.tuples(st.integers(1, 12), st.just(2)), elements=whole),
    radius=st.integers(1, 20),
    xy=points(),
    seed=st.integers(0, 99),
)
def test_circles_hold_the_points_at_their_radius_or_nearer(centers, radius, xy, seed):
    """Whole numbers make distances exact, so that points on the rim are told from those beside it."""
    labels = np.random.default_rng(seed).integers(-1, 3, len(xy))
    squared = ((xy[:, None] - centers[None]) ** 2).sum(axis=2)
    expected = np.stack(
        [[((squared[:, c] <= radius**2) & (labels == g)).sum() for g in range(3)] for c in range(len(centers))]
    )
    np.testing.assert_array_equal(total(aggregation.circles(centers, radius), xy, labels), expected)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_many_points_agree_with_a_tree(kind):
    random = np.random.default_rng(0)
    centers, radii = random.uniform(0, 1000, (300, 2)), random.uniform(1, 60, 300)
    xy = random.uniform(-50, 1050, (20_000, 2)).astype(kind)
    counts = total(aggregation.circles(centers, radii), xy)[:, 0]
    tree = cKDTree(xy.astype(np.float64))
    np.testing.assert_array_equal(
        counts, [len(tree.query_ball_point(c, r)) for c, r in zip(centers, radii, strict=True)]
    )


def test_circles_far_apart_need_no_grid_between_them():
    far = np.array([[0.0, 0.0], [1e9, 1e9], [1e9, -1e9]])
    regions = aggregation.circles(far, 1.0)
    assert regions.rows * regions.columns < 10_000_000
    np.testing.assert_array_equal(total(regions, np.vstack([far, far[1:]]))[:, 0], [1, 2, 2])


def test_a_point_in_several_circles_counts_in_each():
    regions = aggregation.circles([[0, 0], [1, 0], [9, 0]], 2.0)
    assert total(regions, np.array([[0.5, 0.0]]))[:, 0].tolist() == [1, 1, 0]


def test_points_that_are_not_finite_are_nowhere():
    xy = np.array([[np.nan, 0], [0, np.nan], [np.inf, 0], [0, -np.inf], [0, 0]])
    assert total(aggregation.circles([[0, 0]], 1e300**0.5), xy)[:, 0].tolist() == [1]


# --------------------------------------------------------------------------------------------------
# polygons


@given(seed=st.integers(0, 10_000), n_vertices=st.integers(3, 200))
def test_polygons_agree_with_geos(seed, n_vertices):
    random = np.random.default_rng(seed)
    shapes = [
        shapely.Polygon(blob(random, n_vertices=n_vertices, radius=30, center=random.uniform(0, 100, 2))).buffer(0)
        for _ in range(5)
    ]
    shapes = [shape for shape in shapes if not shape.is_empty]
    # holes and further parts
    shapes.append(shapely.Point(50, 50).buffer(40).difference(shapely.Point(45, 50).buffer(20)))
    shapes.append(shapely.MultiPolygon([shapely.box(0, 0, 20, 10), shapely.box(60, 60, 90, 65)]))
    rings = [
        [
            shapely.get_coordinates(ring)
            for part in shapely.get_parts(shape)
            for ring in (part.exterior, *part.interiors)
        ]
        for shape in shapes
    ]
    xy = random.uniform(-20, 120, (2_000, 2))
    expected = [shapely.contains_xy(shape, xy).sum() for shape in shapes]
    np.testing.assert_array_equal(total(aggregation.polygons(rings), xy)[:, 0], expected)


@given(
    seed=st.integers(0, 10_000),
    xy=hnp.arrays(np.int64, st.tuples(st.integers(1, 60), st.just(2)), elements=st.integers(0, 23)),
)
def test_tiles_that_touch_hold_every_point_once(seed, xy):
    """Also where points lie on their corners, on level edges, and as near a slanted one as rounding allows."""
    random = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(np.arange(0, 25, 4.0), np.arange(0, 25, 4.0), indexing="ij"), axis=-1)
    inner = corners[1:-1, 1:-1]
    inner += random.integers(-1, 2, inner.shape) * random.choice([1.0, 1 / 3])
    steps = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    quadrangles = [
        [corners[i + steps[:, 0], j + steps[:, 1]][:: random.choice([-1, 1])]] for i in range(6) for j in range(6)
    ]
    shared = corners[1, 1] + (corners[2, 1] - corners[1, 1]) * random.random((40, 1))
    everything = np.vstack([xy, inner.reshape(-1, 2), shared])
    counts = total(aggregation.polygons(quadrangles), everything)
    assert counts.sum() == len(everything)


def test_left_and_lower_edges_belong_to_a_rectangle():
    square = aggregation.polygons([[[[0, 0], [2, 0], [2, 2], [0, 2]]]])
    on = np.array([[0, 1], [1, 0], [0, 0], [2, 1], [1, 2], [2, 2]])
    inside = [int(total(square, row[None]).sum()) for row in on]
    assert inside == [1, 1, 1, 0, 0, 0]


def test_a_ring_may_be_closed_and_turn_either_way():
    ring = np.array([[0, 0], [4, 0], [4, 3], [0, 3]])
    xy = np.random.default_rng(0).uniform(-1, 5, (500, 2))
    counts = [
        total(aggregation.polygons([[vertices]]), xy).sum()
        for vertices in (ring, ring[::-1], np.vstack([ring, ring[:1]]))
    ]
    assert len(set(counts)) == 1


def test_a_polygon_without_height_holds_nothing():
    flat = aggregation.polygons([[[[0, 0], [1, 0], [2, 0]]], [[[0, 0], [1, 0], [1, 1]]]])
    assert total(flat, np.array([[0.5, 0.0], [0.9, 0.5]]))[:, 0].tolist() == [0, 2]


# --------------------------------------------------------------------------------------------------
# what must not change a count


@given(xy=points(), seed=st.integers(0, 99), shift=st.tuples(whole, whole))
def test_order_parts_and_place_do_not_matter(xy, seed, shift):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, len(xy))
    centers = random.integers(-30, 30, (7, 2))
    ring = np.array([[0, 0], [9, 2], [12, 11], [3, 8]])
    for make in (
        lambda at: aggregation.circles(centers + at, 9.0),
        lambda at: aggregation.polygons([[ring + center + at] for center in centers]),
    ):
        at = np.array(shift)
        expected = total(make(0), xy, labels)
        order = random.permutation(len(xy))
        np.testing.assert_array_equal(total(make(0), xy[order], labels[order]), expected)
        parts = np.array_split(np.arange(len(xy)), 3)
        np.testing.assert_array_equal(sum(total(make(0), xy[part], labels[part]) for part in parts), expected)
        np.testing.assert_array_equal(total(make(at), xy + at, labels), expected)
        moved = np.array([[1.0, 0.0, shift[0]], [0.0, 1.0, shift[1]]])
        np.testing.assert_array_equal(total(make(at), xy, labels, matrix=moved), expected)


def test_a_matrix_is_applied_to_points():
    random = np.random.default_rng(1)
    xy, centers = random.uniform(0, 50, (3_000, 2)), random.uniform(0, 100, (20, 2))
    matrix = np.array([[1.2, -0.9, 40.0], [0.9, 1.2, 3.0]])
    there = xy @ matrix[:, :2].T + matrix[:, 2]
    regions = aggregation.circles(centers, 8.0)
    np.testing.assert_array_equal(total(regions, xy, matrix=matrix), total(regions, there))


def test_columns_are_sorted_and_entries_are_int32():
    xy, labels = np.zeros((5, 2)), np.array([2, 0, 2, 1, 0])
    counts = aggregation.count(aggregation.circles([[0, 0]], 1.0), xy[:, 0], xy[:, 1], labels, n_labels=3)
    assert counts.dtype == np.int32
    assert counts.indices.tolist() == [0, 1, 2]
    assert counts.data.tolist() == [2, 1, 2]


# --------------------------------------------------------------------------------------------------
# pixels


def by_mask(image: np.ndarray, centers: np.ndarray, radius: float, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of discs, by a mask of the whole image each."""
    rows, columns = np.indices(image.shape[1:]) + 0.5
    x = matrix[0, 0] * columns + matrix[0, 1] * rows + matrix[0, 2]
    y = matrix[1, 0] * columns + matrix[1, 1] * rows + matrix[1, 2]
    masks = [(x - cx) ** 2 + (y - cy) ** 2 <= radius**2 for cx, cy in centers]
    return np.stack([image[:, mask].sum(axis=1, dtype=np.float64) for mask in masks]), np.array(
        [m.sum() for m in masks]
    )


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_pixels_agree_with_a_mask(kind):
    random = np.random.default_rng(2)
    image = random.integers(0, 255, (3, 60, 80)).astype(kind)
    matrix = np.array([[0.8, -0.5, 30.0], [0.5, 0.8, -4.0]])
    centers = random.uniform(-10, 90, (25, 2))
    sums, pixels = aggregation.sum_pixels(aggregation.circles(centers, 9.0), image, matrix=matrix)
    expected, sizes = by_mask(image, centers, 9.0, matrix)
    np.testing.assert_array_equal(pixels, sizes)
    np.testing.assert_array_equal(sums, expected)
    assert (pixels == 0).any()
    assert (pixels > 0).any()


@given(row=st.integers(1, 39), column=st.integers(1, 49))
def test_parts_of_an_image_add_up(row, column):
    image = np.random.default_rng(3).integers(0, 60_000, (2, 40, 50)).astype(np.uint16)
    regions = aggregation.circles(np.random.default_rng(4).uniform(0, 50, (12, 2)), 6.0)
    sums, pixels = aggregation.sum_pixels(regions, image, matrix=np.eye(2, 3))
    added, counted = np.zeros_like(sums), np.zeros_like(pixels)
    for top, bottom in ((0, row), (row, 40)):
        for left, right in ((0, column), (column, 50)):
            matrix = np.array([[1.0, 0.0, left], [0.0, 1.0, top]])
            part = aggregation.sum_pixels(regions, image[:, top:bottom, left:right], matrix=matrix)
            added, counted = added + part[0], counted + part[1]
    np.testing.assert_array_equal(added, sums)
    np.testing.assert_array_equal(counted, pixels)


# --------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aggregation.circles(np.empty((0, 2)), 1.0), r"shape \(n, 2\) with n > 0"),
        (lambda: aggregation.circles([[0.0, np.nan]], 1.0), "finite centers"),
        (lambda: aggregation.circles([[0.0, 0.0]], 0.0), "positive radii, found 0.0"),
        (lambda: aggregation.polygons([]), "at least one polygon"),
        (lambda: aggregation.polygons([[[[0, 0], [1, 1]]]]), "polygon 0"),
        (lambda: aggregation.polygons([[[[0, 0], [1, 1], [np.inf, 0]]]]), "NaN or infinity in polygon 0"),
        (lambda: total(aggregation.circles([[0, 0]], 1.0), np.zeros((2, 2)), np.zeros(3)), "found 2, 2 and 3"),
        (lambda: total(aggregation.circles([[0, 0]], 1.0), np.zeros((1, 2)), np.array([3])), "below 3, found 3"),
    ],
)
def test_what_is_no_region_or_label_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
