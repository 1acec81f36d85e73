"""Lattice of the spots: rows and columns, neighbor graphs, and smoothing over the lattice."""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.spatial import cKDTree


class Lattice(NamedTuple):
    """Position of spots on a regular lattice.

    - `kind`: ``"square"`` or ``"hexagonal"``.
    - `row`, `column`: integer position of each spot, int64 of shape (n_obs,), from zero. A hexagonal lattice follows
      Visium's `array_row` and `array_col`: neighbors in a row are two columns apart, and successive rows are shifted by
      one column.
    - `spacing`: distance between rows and between columns, in units of the pitch: (1, 1), or (sqrt(3)/2, 1/2) on a
      hexagonal lattice.
    - `pitch`: distance between neighboring spots, in the units of the coordinates.
    """

    kind: Literal["square", "hexagonal"]
    row: np.ndarray
    column: np.ndarray
    spacing: tuple[float, float]
    pitch: float


def find_lattice(coordinates: ArrayLike) -> Lattice:
    """Find the lattice of the spots, at any pitch and rotation.

    The pitch is the median distance between nearest neighbors. The lattice is square if pairs of spots at 1.2 to 1.6
    pitches (the diagonals) are common, and hexagonal if such pairs are rare. Positions are sums of whole steps between
    neighbors. Spots may therefore be displaced by a quarter of the pitch, and drift over the section may exceed that.
    Separate parts of the tissue are placed by the fit to the largest part.

    - `coordinates`: spot centers, x and y, (n_obs, 2), in any unit. Visium's ``array_col, array_row`` are recognized
      directly.
    - returns: the lattice, with row and column of each spot.

    >>> import numpy as np
    >>> from stimage_sd.stats import lattice
    >>> spots = lattice.find_lattice(np.array([[0.0, 0.0], [101.0, 2.0], [1.0, 99.0], [99.0, 100.0]]))
    >>> spots.kind, spots.row.tolist(), spots.column.tolist()
    ('square', [0, 0, 1, 1], [0, 1, 0, 1])
    """
    points = check_coordinates(coordinates)
    if len(points) == 1:
        origin = np.zeros(1, dtype=np.int64)
        return Lattice("square", origin, origin, (1.0, 1.0), 1.0)
    tree = cKDTree(points)
    nearest = float(np.median(tree.query(points, k=2)[0][:, 1]))
    if nearest == 0:
        raise ValueError(
            "Found spots that share a position; a lattice has one spot per position. Drop the duplicates first."
        )
    if _is_visium_array(points, nearest):
        # One column is half a pitch, one row sqrt(3)/2 pitches. The pitch is two columns.
        column, row = np.round(points - points.min(axis=0)).astype(np.int64).T
        return Lattice("hexagonal", row, column, (np.sqrt(3) / 2, 0.5), 2.0)

    pairs = tree.query_pairs(1.75 * nearest, output_type="ndarray")
    steps = points[pairs[:, 1]] - points[pairs[:, 0]]
    lengths = np.linalg.norm(steps, axis=1)
    # Of several displaced neighbors the nearest is too near, so take the median over all neighbors.
    pitch = float(np.median(lengths[lengths < 1.25 * nearest]))
    close = lengths < 1.25 * pitch
    diagonal = (lengths > 1.2 * pitch) & (lengths < 1.6 * pitch)
    kind: Literal["square", "hexagonal"] = "square" if diagonal.sum() > 0.3 * close.sum() else "hexagonal"
    if len(points) < 3 or np.linalg.matrix_rank(steps[close], tol=0.2 * pitch) < 2:
        kind = "square"

    pairs, steps = pairs[close], steps[close]
    symmetry, opening = (4, np.pi / 2) if kind == "square" else (6, np.pi / 3)
    angles = np.arctan2(steps[:, 1], steps[:, 0])
    rotation = np.angle(np.exp(1j * symmetry * angles).mean()) / symmetry
    axes = rotation + np.array([0.0, opening])
    basis = pitch * np.stack([np.cos(axes), np.sin(axes)], axis=1)
    position = _walk(points, pairs, np.round(steps @ np.linalg.inv(basis)).astype(np.int64))
    row, column = position[:, 1], position[:, 0]
    spacing = (1.0, 1.0)
    if kind == "hexagonal":
        column, spacing = 2 * column + row, (np.sqrt(3) / 2, 0.5)
    row, column = row - row.min(), column - column.min()
    if len(np.unique(row * (column.max() + 1) + column)) < len(points):
        raise ValueError(
            f"Expected spots on a square or hexagonal lattice, found coordinates that put several of the "
            f"{len(points)} spots on one position. For cells or other scattered points pass `n_neighbors=` or "
            "`radius=` to `neighbor_graph`; patterns need a lattice (aggregate the points first)."
        )
    return Lattice(kind, row, column, spacing, pitch)


def check_coordinates(coordinates: ArrayLike) -> np.ndarray:
    """Return coordinates as float64 (n_obs, 2), or raise `ValueError` for other shapes and non-finite values."""
    points = np.asarray(coordinates, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 or not np.all(np.isfinite(points)):
        raise ValueError(
            f"Expected finite `coordinates` of shape (n_obs, 2) with n_obs > 0, found shape {points.shape}."
        )
    return points


def _is_visium_array(points: np.ndarray, nearest: float) -> bool:
    """Check whether points are Visium array indices, where every other position is empty."""
    whole = np.round(points)
    return (
        math.isclose(nearest, math.sqrt(2), rel_tol=1e-5)
        and bool(np.all(whole == points))
        and len(np.unique(whole.sum(axis=1) % 2)) == 1
    )


def _walk(points: np.ndarray, pairs: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Add up whole steps between neighbors, from one spot of each connected part to all other spots."""
    n_obs = len(points)
    first, second = pairs.T
    # Steps are looked up by pair, from either end. Weights of 1 keep zero steps in the graph.
    graph = scipy.sparse.csr_array((np.ones(len(pairs)), (first, second)), shape=(n_obs, n_obs))
    keys = np.concatenate([first * n_obs + second, second * n_obs + first])
    order = np.argsort(keys)
    keys, signed = keys[order], np.concatenate([steps, -steps])[order]

    position = np.zeros((n_obs, 2), dtype=np.int64)

    def walk(start: int) -> np.ndarray:
        reached, before = breadth_first_order(graph, start, directed=False)
        position[reached[1:]] = signed[
            np.searchsorted(keys, before[reached[1:]].astype(np.int64) * n_obs + reached[1:])
        ]
        _add_up(position, reached, before)
        return reached

    if len(walk(0)) == n_obs:
        return position
    _, part = connected_components(graph, directed=False)
    sizes = np.bincount(part)
    position[:] = 0
    largest = walk(int(np.argmax(part == np.argmax(sizes))))
    design = np.column_stack([points[largest], np.ones(len(largest))])
    fitted = np.linalg.lstsq(design, position[largest], rcond=None)[0]
    for component in np.argsort(-sizes, kind="stable")[1:]:
        reached = walk(int(np.argmax(part == component)))
        expected = points[reached] @ fitted[:2] + fitted[2]
        position[reached] += np.round((expected - position[reached]).mean(axis=0)).astype(np.int64)
    return position


def _add_up(position: np.ndarray, reached: np.ndarray, before: np.ndarray) -> None:
    """Add up the steps from the start to each spot, doubling the number of added steps in each pass."""
    place = np.zeros(len(position), dtype=np.int64)
    place[reached] = np.arange(len(reached))
    steps, back = position[reached], place[np.maximum(before[reached], 0)]
    back[0] = 0
    while back.any():
        steps += steps[back]
        back = back[back]
    position[reached] = steps


def neighbor_graph(
    coordinates: ArrayLike,
    *,
    n_rings: int | None = None,
    n_neighbors: int | None = None,
    radius: float | None = None,
) -> scipy.sparse.csr_array:
    """Connect spots with their neighbors.

    By default, spots are connected with their lattice neighbors: eight on a square lattice (Queen contiguity, as in
    the paper), six on a hexagonal lattice. Spots may have no neighbor.

    - `coordinates`: spot centers, x and y, (n_obs, 2), in any unit.
    - `n_rings`: connect lattice neighbors up to this many rings away. The default is 1 unless another option is given.
    - `n_neighbors`: connect each spot with this many nearest spots instead. The graph may be asymmetric.
    - `radius`: connect all pairs within this distance instead, in the unit of the coordinates.
    - returns: binary adjacency, float32 (n_obs, n_obs), without self-loops. Row `i` holds the neighbors of spot `i`.

    >>> import numpy as np
    >>> from stimage_sd.stats import lattice
    >>> grid = np.array([[x, y] for x in range(3) for y in range(3)], dtype=float)
    >>> lattice.neighbor_graph(grid).sum(axis=1).astype(int).tolist()
    [3, 5, 3, 5, 8, 5, 3, 5, 3]
    """
    options = {"n_rings": n_rings, "n_neighbors": n_neighbors, "radius": radius}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"Expected one of `n_rings`, `n_neighbors` and `radius`, found {sorted(given)}.")
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"Expected `{name}` to be positive, found {value}.")
    points = check_coordinates(coordinates)
    if n_neighbors is not None:
        if n_neighbors >= len(points):
            raise ValueError(f"Expected `n_neighbors` below the {len(points)} spots, found {n_neighbors}.")
        return _nearest(points, n_neighbors)
    if radius is not None:
        pairs = cKDTree(points).query_pairs(radius, output_type="ndarray")
        return _adjacency(pairs[:, 0], pairs[:, 1], len(points))
    return _lattice_neighbors(find_lattice(points), n_rings or 1)


def _nearest(points: np.ndarray, n_neighbors: int) -> scipy.sparse.csr_array:
    n_obs = len(points)
    neighbors = cKDTree(points).query(points, k=n_neighbors + 1)[1]
    # Each spot is its own first neighbor unless another spot shares its position.
    itself = neighbors == np.arange(n_obs)[:, None]
    itself[~itself.any(axis=1), -1] = True
    others = neighbors[~itself]
    pointers = np.arange(n_obs + 1) * n_neighbors
    graph = scipy.sparse.csr_array((np.ones(len(others), np.float32), others, pointers), shape=(n_obs, n_obs))
    graph.sort_indices()
    return graph


def _adjacency(first: np.ndarray, second: np.ndarray, n_obs: int) -> scipy.sparse.csr_array:
    """Build a symmetric adjacency from pairs given once."""
    ends = np.concatenate([first, second]), np.concatenate([second, first])
    graph = scipy.sparse.csr_array((np.ones(len(ends[0]), np.float32), ends), shape=(n_obs, n_obs))
    graph.sort_indices()
    return graph


def _lattice_neighbors(spots: Lattice, n_rings: int) -> scipy.sparse.csr_array:
    # Pad columns, so that a step off one end does not reach the other end of the next row.
    width = int(spots.column.max()) + 4 * n_rings + 1
    keys = spots.row * width + spots.column
    order = np.argsort(keys)
    firsts, seconds = [], []
    for rows, columns in itertools.product(range(n_rings + 1), range(-2 * n_rings, 2 * n_rings + 1)):
        if spots.kind == "square":
            within = abs(columns) <= n_rings
        else:
            within = (rows + columns) % 2 == 0 and rows + abs(columns) <= 2 * n_rings
        if not within or (rows == 0 and columns <= 0):
            continue
        wanted = keys + rows * width + columns
        place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
        present = keys[order[place]] == wanted
        firsts.append(np.flatnonzero(present))
        seconds.append(order[place[present]])
    return _adjacency(np.concatenate(firsts), np.concatenate(seconds), len(keys))


#: offsets (row, column) of neighbors one pitch away on Visium's hexagonal array, where a column is half a pitch
VISIUM_STEPS = [(0, 2), (1, 1), (1, -1)]
#: largest ratio of pitches between directions; the ratio is 1 on a hexagonal array and 1.4 on a square array
_MOST_UNEQUAL = 1.2


def pitch_px(centers: np.ndarray, lattice: np.ndarray, steps: list[tuple[int, int]]) -> float | None:
    """Measure the distance between neighboring spots of an array, in pixels.

    - `centers`: ``(n, 2)`` positions, px.
    - `lattice`: ``(n, 2)`` integer positions in the array.
    - `steps`: lattice offsets of neighbors one pitch away, one per pair of opposite directions.
    - returns: the median distance over all pairs of neighbors, robust to a few misplaced spots. `None` if no two spots
      are neighbors.
    """
    where = {position: spot for spot, position in enumerate(map(tuple, lattice.tolist()))}
    pairs = [
        (spot, where[neighbor])
        for (first, second), spot in where.items()
        for step in steps
        if (neighbor := (first + step[0], second + step[1])) in where
    ]
    if not pairs:
        return None
    here, there = np.asarray(pairs).T
    return float(np.median(np.linalg.norm(centers[here] - centers[there], axis=1)))


def visium_pitch_px(centers: np.ndarray, lattice: np.ndarray) -> float | None:
    """Measure the pitch of Visium's hexagonal array, in pixels.

    - `centers`: ``(n, 2)`` positions, px.
    - `lattice`: ``(n, 2)``: `array_row` and `array_col` of each spot.
    - returns: the median distance between neighbors. `None` if no two spots are neighbors or the array is not
      hexagonal.

    >>> lattice = np.array([[0, 0], [0, 2], [1, 1]])
    >>> round(visium_pitch_px(np.array([[0, 0], [200, 0], [100, 173.2]]), lattice), 1)
    200.0
    >>> visium_pitch_px(np.array([[0, 0], [200, 0], [100, 100]]), lattice) is None
    True
    """
    if not np.issubdtype(lattice.dtype, np.number) or not np.isfinite(lattice).all():
        return None
    lattice = lattice.astype(int)
    if lattice.size == 0 or (lattice.sum(axis=1) % 2).any():
        return None  # Visium positions have an even sum of row and column
    by_step = [pitch for step in VISIUM_STEPS if (pitch := pitch_px(centers, lattice, [step]))]
    if by_step and max(by_step) > _MOST_UNEQUAL * min(by_step):
        return None
    return pitch_px(centers, lattice, VISIUM_STEPS)


#: a share this close to one half counts as one half, so that ties do not depend on the order of summation
_TIE = 1e-9


class Smoother(NamedTuple):
    """The Gaussian over the raster of spots, first along rows and then down columns.

    - `along`: sparse ``float64 (n_cells, n_spots)``: from spots to the cells of the raster that they reach within their
      row.
    - `down`: sparse ``float64 (n_spots, n_cells)``: from cells to the spots in their column.
    - `limit`: ``float64 (n_spots, 1)``: threshold of the smoothed pattern, half of the smoothed tissue.
    """

    along: scipy.sparse.csc_array
    down: scipy.sparse.csr_array
    limit: np.ndarray


def smoother(row: np.ndarray, column: np.ndarray, sigma: tuple[float, float]) -> Smoother:
    """Place spots on a raster, and return the Gaussian over it.

    - `row`, `column`: ``int64 (n_spots,)``, from zero.
    - `sigma`: standard deviations of the Gaussian, in rows and in columns. It is cut off at four, as in scipy.

    >>> smooth = smoother(np.array([0, 0, 1]), np.array([0, 1, 1]), (1.0, 1.0))
    >>> (smooth.down @ smooth.along).toarray().round(2).tolist()
    [[1.0, 0.61, 0.37], [0.61, 1.0, 0.61], [0.37, 0.61, 1.0]]
    """
    n_columns = int(column.max()) + 1
    by_row, by_column = _gaussian(row, sigma[0]), _gaussian(column, sigma[1])
    reached = row[by_column.spot] * n_columns + by_column.to
    read = by_row.to * n_columns + column[by_row.spot]
    # cells without a spot in reach of their row are left out
    is_cell = np.zeros((int(row.max()) + 1) * n_columns, dtype=bool)
    is_cell[reached] = True
    cell, known = np.cumsum(is_cell) - 1, is_cell[read]
    shape = (int(cell[-1]) + 1, len(row))
    along = scipy.sparse.csc_array((by_column.weight, (cell[reached], by_column.spot)), shape)
    down = scipy.sparse.csr_array((by_row.weight[known], (by_row.spot[known], cell[read[known]])), shape[::-1])
    return Smoother(along, down, (0.5 - _TIE) * (down @ along.sum(axis=1))[:, None])


class _Reach(NamedTuple):
    """Positions that spots reach along one axis: number of the spot, position, and weight of the Gaussian."""

    spot: np.ndarray
    to: np.ndarray
    weight: np.ndarray


def _gaussian(position: np.ndarray, sigma: float) -> _Reach:
    size = int(position.max()) + 1
    reach = min(int(4 * sigma + 0.5), size - 1)
    offset = np.arange(-reach, reach + 1)
    to = position[:, None] + offset
    spot, which = np.nonzero((to >= 0) & (to < size))
    return _Reach(spot, to[spot, which], np.exp(-0.5 * (offset / sigma) ** 2)[which])


def smoothed_patterns(high: np.ndarray, smooth: Smoother) -> np.ndarray:
    """Return where smoothed patterns cover half of the smoothed tissue or more, boolean (n_spots, n_genes)."""
    return smooth.down @ (smooth.along @ high.astype(np.float64)) >= smooth.limit


def overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return intersection over union per gene of two patterns, NaN if both are empty."""
    both, first, second = (pattern.sum(axis=0, dtype=np.int32) for pattern in (one & other, one, other))
    return both / (first + second - both)
