"""Counts of points and sums of pixels in many small regions.

Regions are sorted into the cells of a uniform grid, so a point is compared with nearby regions only. The comparison is
exact, by the distance to the center of a circle or the even-odd rule of a polygon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

#: identity transformation, ``(2, 3)``
AS_THEY_ARE = np.eye(2, 3)
#: maximum number of grid cells, so that the grid of distant regions does not fill the memory
_MOST_CELLS = 4_000_000
#: maximum number of slabs per polygon
_MOST_SLABS = 256
#: tolerance for rounding of the bounds of a region, in grid cells
_ROUNDING = 1e-6


class Regions(NamedTuple):
    """Circles or polygons sorted into a grid, made by `circles` and `polygons`.

    - `bounds`: ``float64 (n_regions, 4)``: lowest x and y, highest x and y.
    - `circle`: ``float64 (n_regions, 3)``: center x and y, squared radius. Polygons have no rows.
    - `edge`: ``float64 (n_edges, 4)``: x and y of the lower end of an edge, y of the upper end, and dx/dy. A shared
      edge has the same four numbers in both polygons, so a point near the edge is in exactly one polygon. Polygons are
      cut into slabs along y. Edges are listed by slab, and an edge appears in every slab that it crosses.
    - `edge_start`, `slab_start`, `slabs_per_unit`: first edge of each slab, int64. First slab of each region, ``int64
      (n_regions + 1,)``. Number of slabs per unit of y for each region.
    - `corner`, `cell`: x and y of the grid corner ``(2,)``, and side of a cell.
    - `rows`, `columns`: size of the grid.
    - `member`, `member_start`: ``int32``: regions that touch a cell, listed by cell. ``int64``: first entry of each
      cell.
    """

    bounds: np.ndarray
    circle: np.ndarray
    edge: np.ndarray
    edge_start: np.ndarray
    slab_start: np.ndarray
    slabs_per_unit: np.ndarray
    corner: np.ndarray
    cell: float
    rows: int
    columns: int
    member: np.ndarray
    member_start: np.ndarray


def circles(centers: ArrayLike, radii: ArrayLike) -> Regions:
    """Sort circles into a grid.

    - `centers`: ``(n_regions, 2)`` x and y, in any unit.
    - `radii`: ``(n_regions,)``, or one radius for all, in the same unit. Points on the rim are inside.
    - returns: the regions.

    >>> two = circles([[0.0, 0.0], [10.0, 0.0]], 1.0)
    >>> count(two, [0.5, 9.0, 5.0], [0.5, 0.0, 0.0], [0, 1, 1], n_labels=2).toarray().tolist()
    [[1, 0], [0, 1]]
    """
    centers = np.asarray(centers, dtype=np.float64)
    if centers.ndim != 2 or centers.shape[1] != 2 or len(centers) == 0 or not np.isfinite(centers).all():
        raise ValueError(f"Expected finite centers of shape (n, 2) with n > 0, found shape {centers.shape}.")
    radii = np.broadcast_to(np.asarray(radii, dtype=np.float64), len(centers))
    if not (np.isfinite(radii) & (radii > 0)).all():
        raise ValueError(f"Expected positive radii, found {radii.min()} to {radii.max()}.")
    bounds = np.hstack([centers - radii[:, None], centers + radii[:, None]])
    return _sorted_into_grid(bounds, circle=np.column_stack([centers, radii**2]))


def polygons(rings: Sequence[Sequence[ArrayLike]]) -> Regions:
    """Sort polygons into a grid.

    - `rings`: rings of each polygon, each ``(n_vertices, 2)`` x and y, closed or not, in any unit. Holes and further
      parts are rings too. By the even-odd rule a point is inside if it is inside an odd number of rings. A rectangle
      includes its left and lower edges (low x, low y) only, so tiles that touch share no point.
    - returns: the regions.

    >>> square = polygons([[[[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]]])
    >>> count(square, [1.0, 3.0], [1.0, 1.0], [0, 0], n_labels=1).toarray().tolist()
    [[1]]
    """
    if len(rings) == 0:
        raise ValueError("Expected at least one polygon, found none.")
    edges = []
    bounds = np.empty((len(rings), 4))
    for index, region in enumerate(rings):
        parts = [np.asarray(ring, dtype=np.float64) for ring in region]
        if not parts or any(part.ndim != 2 or part.shape[1] != 2 or len(part) < 3 for part in parts):
            raise ValueError(
                f"Expected rings of three or more vertices (x, y), found a ring of another shape in polygon {index}."
            )
        vertices = np.concatenate(parts)
        if not np.isfinite(vertices).all():
            raise ValueError(f"Expected finite vertices, found NaN or infinity in polygon {index}.")
        bounds[index] = *vertices.min(axis=0), *vertices.max(axis=0)
        edges.append(np.concatenate([_edges(part) for part in parts]))
    return _sorted_into_grid(bounds, edges=edges)


def _edges(ring: np.ndarray) -> np.ndarray:
    """Return the edges of a ring that are not horizontal, in the form of `Regions.edge`."""
    ends = np.hstack([ring, np.roll(ring, -1, axis=0)])
    ends = ends[ends[:, 1] != ends[:, 3]]
    upwards = np.where((ends[:, 1] < ends[:, 3])[:, None], ends, ends[:, [2, 3, 0, 1]])
    slope = (upwards[:, 2] - upwards[:, 0]) / (upwards[:, 3] - upwards[:, 1])
    return np.column_stack([upwards[:, 0], upwards[:, 1], upwards[:, 3], slope])


def _sorted_into_slabs(bounds: np.ndarray, edges: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return edges by slab, first edge of each slab, first slab of each region, and slabs per unit of y."""
    n_edges = np.array([len(touched) for touched in edges])
    n_slabs = np.clip(n_edges // 2, 1, _MOST_SLABS)
    start = np.concatenate([[0], np.cumsum(n_slabs)]).astype(np.int64)
    heights = bounds[:, 3] - bounds[:, 1]
    per_unit = np.divide(n_slabs, heights, out=np.zeros(len(heights)), where=heights > 1e-200)
    every, region = np.concatenate(edges), np.repeat(np.arange(len(edges)), n_edges)
    # same arithmetic as in `_point_pairs`, so that rounding puts a point and nearby edges in the same slab
    slabs = [
        start[region]
        + np.minimum(((every[:, end] - bounds[region, 1]) * per_unit[region]).astype(np.int64), n_slabs[region] - 1)
        for end in (1, 2)
    ]
    low, high = (np.column_stack([slab, np.zeros_like(slab)]) for slab in slabs)
    order, edge_start = _fill_cells(low, high, 1, int(start[-1]))
    return every[order], edge_start, start, per_unit


def _sorted_into_grid(
    bounds: np.ndarray, *, circle: np.ndarray | None = None, edges: list[np.ndarray] | None = None
) -> Regions:
    corner = bounds[:, :2].min(axis=0)
    width, height = bounds[:, 2:].max(axis=0) - corner
    # with cells smaller than the regions, most points between regions fall in empty cells
    cell = float(np.median(bounds[:, 2:] - bounds[:, :2])) / 2
    cell = max(cell, np.sqrt(width) * np.sqrt(height / _MOST_CELLS), max(width, height) / _MOST_CELLS)
    cell = float(max(cell, np.finfo(np.float64).tiny))
    corner = corner - _ROUNDING * cell
    low = np.floor((bounds[:, :2] - _ROUNDING * cell - corner) / cell).astype(np.int64).clip(0)
    high = np.floor((bounds[:, 2:] + _ROUNDING * cell - corner) / cell).astype(np.int64)
    columns, rows = (high.max(axis=0) + 1).tolist()
    member, member_start = _fill_cells(low, high, rows, columns)
    if edges is None:
        edge, edge_start, slab_start, slabs_per_unit = np.empty((0, 4)), *np.zeros((2, 1), np.int64), np.empty(0)
    else:
        edge, edge_start, slab_start, slabs_per_unit = _sorted_into_slabs(bounds, edges)
    return Regions(
        bounds=np.ascontiguousarray(bounds),
        circle=np.empty((0, 3)) if circle is None else np.ascontiguousarray(circle),
        edge=edge,
        edge_start=edge_start,
        slab_start=slab_start,
        slabs_per_unit=slabs_per_unit,
        corner=corner,
        cell=cell,
        rows=rows,
        columns=columns,
        member=member,
        member_start=member_start,
    )


@numba.njit(nogil=True, cache=True)
def _fill_cells(low: np.ndarray, high: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    start = np.zeros(rows * columns + 1, dtype=np.int64)
    for region in range(len(low)):
        for row in range(low[region, 1], high[region, 1] + 1):
            for column in range(low[region, 0], high[region, 0] + 1):
                start[row * columns + column + 1] += 1
    start = np.cumsum(start)
    free = start[:-1].copy()
    member = np.empty(start[-1], dtype=np.int32)
    for region in range(len(low)):
        for row in range(low[region, 1], high[region, 1] + 1):
            for column in range(low[region, 0], high[region, 0] + 1):
                member[free[row * columns + column]] = region
                free[row * columns + column] += 1
    return member, start


def count(
    regions: Regions,
    x: ArrayLike,
    y: ArrayLike,
    labels: ArrayLike,
    *,
    n_labels: int,
    matrix: np.ndarray = AS_THEY_ARE,
) -> sp.csr_matrix:
    """Count the points per region and label. Points in several regions count in each of them.

    - `regions`: circles or polygons.
    - `x`, `y`: ``(n_points,)`` of any numeric type. Non-finite points are in no region.
    - `labels`: ``(n_points,)`` whole numbers below `n_labels`. Points with a negative label are left out.
    - `n_labels`: number of labels.
    - `matrix`: ``(2, 3)``, maps ``(x, y, 1)`` to the coordinates of the regions.
    - returns: sparse counts, ``int32 (n_regions, n_labels)``, with sorted column numbers.

    >>> shifted = np.array([[1.0, 0.0, 100.0], [0.0, 1.0, 0.0]])
    >>> count(circles([[100.0, 0.0]], 1.0), [0.0, 100.0], [0.0, 0.0], [0, 0], n_labels=1, matrix=shifted).toarray()
    array([[1]], dtype=int32)
    """
    x, y, labels = np.asarray(x), np.asarray(y), np.asarray(labels)
    if not len(x) == len(y) == len(labels):
        raise ValueError(f"Expected x, y and one label per point, found {len(x)}, {len(y)} and {len(labels)}.")
    if labels.size and labels.max() >= n_labels:
        raise ValueError(f"Expected labels below {n_labels}, found {labels.max()}.")
    matrix = np.ascontiguousarray(matrix, dtype=np.float64)
    region, label = _point_pairs(regions, x, y, labels.astype(np.int32, copy=False), matrix)
    ones = np.ones(len(region), dtype=np.int32)
    counts = sp.coo_matrix((ones, (region, label)), shape=(len(regions.bounds), n_labels)).tocsr()
    return sp.csr_matrix(counts)


def sum_pixels(regions: Regions, block: np.ndarray, *, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the pixels with centers in each region, per channel.

    - `regions`: circles or polygons.
    - `block`: image or part of an image, ``(n_channels, y, x)`` of any numeric type.
    - `matrix`: ``(2, 3)``, maps ``(column, row, 1)`` of the block to the coordinates of the regions. The center of the
      first pixel is at (0.5, 0.5).
    - returns: sums, ``float64 (n_regions, n_channels)``, exact for images of whole numbers. Number of pixels, ``int64
      (n_regions,)``.

    >>> image = np.arange(16).reshape(1, 4, 4)
    >>> sums, pixels = sum_pixels(circles([[2.0, 2.0]], 1.0), image, matrix=np.eye(2, 3))
    >>> sums.tolist(), pixels.tolist()
    ([[30.0]], [4])
    """
    matrix = np.ascontiguousarray(matrix, dtype=np.float64)
    region, pixel = _pixel_pairs(regions, block.shape[1], block.shape[2], matrix)
    sums = np.zeros((len(block), len(regions.bounds)))
    for channel, values in enumerate(block):
        _add_pixels(np.ascontiguousarray(values).reshape(-1), region, pixel, sums[channel])
    return np.ascontiguousarray(sums.T), np.bincount(region, minlength=len(regions.bounds))


@numba.njit(nogil=True, cache=True)
def _in_circle(circle: np.ndarray, region: int, x: float, y: float) -> bool:
    along_x, along_y = x - circle[region, 0], y - circle[region, 1]
    return along_x * along_x + along_y * along_y <= circle[region, 2]


@numba.njit(nogil=True, cache=True)
def _in_bounds(bounds: np.ndarray, region: int, x: float, y: float) -> bool:
    return bounds[region, 0] <= x <= bounds[region, 2] and bounds[region, 1] <= y <= bounds[region, 3]


@numba.njit(nogil=True, cache=True)
def _in_polygon(edge: np.ndarray, first: int, last: int, x: float, y: float) -> bool:
    inside = False
    for index in range(first, last):
        if edge[index, 1] <= y < edge[index, 2]:
            inside ^= x < edge[index, 0] + (y - edge[index, 1]) * edge[index, 3]
    return inside


@numba.njit(nogil=True, cache=True)
def _longer(values: np.ndarray) -> np.ndarray:
    longer = np.empty(2 * len(values) + 16, dtype=values.dtype)
    longer[: len(values)] = values
    return longer


@numba.njit(nogil=True, cache=True)
def _point_pairs(
    regions: Regions, x: np.ndarray, y: np.ndarray, labels: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return region and label of every point in a region, in the order of the points."""
    # unpack the tuple once, because unpacking at every point costs more than the comparison
    circle, bounds, member, member_start = regions.circle, regions.bounds, regions.member, regions.member_start
    edge, edge_start = regions.edge, regions.edge_start
    slab_start, slabs_per_unit = regions.slab_start, regions.slabs_per_unit
    left, lower = regions.corner
    cell, rows, columns = regions.cell, regions.rows, regions.columns
    n_pairs, region, label = 0, np.empty(len(x) // 3, dtype=np.int32), np.empty(len(x) // 3, dtype=np.int32)
    for point in range(len(x)):
        if labels[point] < 0:
            continue
        own_x, own_y = np.float64(x[point]), np.float64(y[point])
        there_x = matrix[0, 0] * own_x + matrix[0, 1] * own_y + matrix[0, 2]
        there_y = matrix[1, 0] * own_x + matrix[1, 1] * own_y + matrix[1, 2]
        column, row = (there_x - left) / cell, (there_y - lower) / cell
        if not (0.0 <= column < columns and 0.0 <= row < rows):  # NaN is in no cell
            continue
        here = int(row) * columns + int(column)
        for place in range(member_start[here], member_start[here + 1]):
            candidate = member[place]
            if len(circle):
                inside = _in_circle(circle, candidate, there_x, there_y)
            elif _in_bounds(bounds, candidate, there_x, there_y):
                slab = slab_start[candidate] + int((there_y - bounds[candidate, 1]) * slabs_per_unit[candidate])
                slab = min(slab, slab_start[candidate + 1] - 1)
                inside = _in_polygon(edge, edge_start[slab], edge_start[slab + 1], there_x, there_y)
            else:
                inside = False
            if inside:
                if n_pairs == len(region):
                    region, label = _longer(region), _longer(label)
                region[n_pairs], label[n_pairs] = candidate, labels[point]
                n_pairs += 1
    return region[:n_pairs], label[:n_pairs]


@numba.njit(nogil=True, cache=True)
def _pixel_pairs(regions: Regions, height: int, width: int, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return region and number of every pixel with its center in a region, row by row."""
    numbers = np.arange(width, dtype=np.int32)
    n_pairs, region, pixel = 0, np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
    for row in range(height):
        ordinate = np.full(width, row + 0.5)
        regions_here, columns = _point_pairs(regions, numbers + 0.5, ordinate, numbers, matrix)
        while n_pairs + len(columns) > len(region):
            region, pixel = _longer(region), _longer(pixel)
        region[n_pairs : n_pairs + len(columns)] = regions_here
        pixel[n_pairs : n_pairs + len(columns)] = columns + np.int64(row) * width
        n_pairs += len(columns)
    return region[:n_pairs], pixel[:n_pairs]


@numba.njit(nogil=True, cache=True)
def _add_pixels(values: np.ndarray, region: np.ndarray, pixel: np.ndarray, sums: np.ndarray) -> None:
    for pair in range(len(region)):
        sums[region[pair]] += values[pixel[pair]]
