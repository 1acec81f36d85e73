"""Scores of spatial expression: Moran's I, overlap of patterns, correlations, and the lattice they stand on.

Plain numpy and scipy. Matrices are observations by genes, dense or sparse, and all genes are scored at
once; a gene that cannot be scored (constant, or with an empty pattern) is NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse
import scipy.stats
from numpy.typing import ArrayLike
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.spatial import cKDTree

__all__ = [
    "Lattice",
    "binary_pattern",
    "lattice",
    "morans_i",
    "neighbour_graph",
    "pattern_iou",
    "pearson",
    "spearman",
]

Matrix: TypeAlias = ArrayLike | scipy.sparse.spmatrix | scipy.sparse.sparray

# Genes are worked through in blocks whose temporary arrays stay near this many numbers.
_BLOCK_SIZE = 2**21


class Lattice(NamedTuple):
    """Where spots stand on a regular lattice.

    Attributes
    ----------
    kind
        ``"square"`` or ``"hexagonal"``.
    row, column
        Whole-numbered position of each spot, int64 of shape (n_obs,), from zero. On a hexagonal lattice
        as in Visium's `array_row` and `array_col`: neighbours in a row are two columns apart, and rows
        are shifted by one column against each other.
    spacing
        Distance between rows and between columns in units of the pitch (the distance from a spot to its
        nearest neighbours): (1, 1), or (sqrt(3)/2, 1/2) on a hexagonal lattice.
    pitch
        Distance between neighbouring spots, in the units of the coordinates.
    """

    kind: Literal["square", "hexagonal"]
    row: np.ndarray
    column: np.ndarray
    spacing: tuple[float, float]
    pitch: float


def lattice(coordinates: ArrayLike) -> Lattice:
    """Find the lattice that spots stand on, whatever its pitch and rotation.

    The pitch is the median distance between nearest neighbours. It is a square lattice where pairs of
    spots at 1.2 to 1.6 pitches (the diagonals) are common, a hexagonal one where they are rare. Positions
    follow from whole steps between neighbours, so that spots may be displaced by a quarter of the pitch
    and drift over the section may add up to more. Parts of the tissue that do not touch are placed by
    the fit to the largest part.

    Parameters
    ----------
    coordinates
        Spot centres, x and y, (n_obs, 2), in any unit. Visium's ``array_col, array_row`` are recognised
        as they are.

    Returns
    -------
    The lattice and each spot's row and column on it.

    Raises
    ------
    ValueError
        Where the coordinates are malformed, coincide, or stand on no lattice.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import spatial
    >>> spots = spatial.lattice(np.array([[0.0, 0.0], [101.0, 2.0], [1.0, 99.0], [99.0, 100.0]]))
    >>> spots.kind, spots.row.tolist(), spots.column.tolist()
    ('square', [0, 0, 1, 1], [0, 1, 0, 1])
    """
    points = _checked_coordinates(coordinates)
    if len(points) == 1:
        origin = np.zeros(1, dtype=np.int64)
        return Lattice("square", origin, origin, (1.0, 1.0), 1.0)
    tree = cKDTree(points)
    nearest = float(np.median(tree.query(points, k=2)[0][:, 1]))
    if nearest == 0:
        raise ValueError(
            "Found spots that share a position; a lattice has one spot a place. Drop the duplicates first."
        )
    if _is_visium_array(points, nearest):
        # Half a column step is half a pitch, a row step sqrt(3)/2.
        column, row = np.round(points - points.min(axis=0)).astype(np.int64).T
        return Lattice("hexagonal", row, column, (np.sqrt(3) / 2, 0.5), 2.0)

    pairs = tree.query_pairs(1.75 * nearest, output_type="ndarray")
    steps = points[pairs[:, 1]] - points[pairs[:, 0]]
    lengths = np.linalg.norm(steps, axis=1)
    # The nearest of several displaced neighbours is too near; the median over all of them is not.
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
            f"{len(points)} spots on one place. For cells or other scattered points pass `n_neighbours=` or "
            "`radius=` to `neighbour_graph`; patterns need a lattice (aggregate the points first)."
        )
    return Lattice(kind, row, column, spacing, pitch)


def _checked_coordinates(coordinates: ArrayLike) -> np.ndarray:
    points = np.asarray(coordinates, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 or not np.all(np.isfinite(points)):
        raise ValueError(
            f"Expected finite `coordinates` of shape (n_obs, 2) with n_obs > 0, found shape {points.shape}."
        )
    return points


def _is_visium_array(points: np.ndarray, nearest: float) -> bool:
    """Tell array indices, of which every other is empty, from coordinates in pixels."""
    whole = np.round(points)
    return (
        math.isclose(nearest, math.sqrt(2), rel_tol=1e-5)
        and bool(np.all(whole == points))
        and len(np.unique(whole.sum(axis=1) % 2)) == 1
    )


def _walk(points: np.ndarray, pairs: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Add up whole steps between neighbours, from one spot of each connected part to all others."""
    n_obs = len(points)
    first, second = pairs.T
    # Steps by pair, found again from either end; explicit ones keep zero steps in the graph.
    graph = scipy.sparse.csr_array((np.ones(len(pairs)), (first, second)), shape=(n_obs, n_obs))
    keys = np.concatenate([first * n_obs + second, second * n_obs + first])
    order = np.argsort(keys)
    keys, signed = keys[order], np.concatenate([steps, -steps])[order]

    position = np.zeros((n_obs, 2), dtype=np.int64)
    _, part = connected_components(graph, directed=False)
    sizes = np.bincount(part)
    offset, slope = np.zeros(2), np.zeros((2, 2))
    for number in np.argsort(-sizes, kind="stable"):
        start = int(np.flatnonzero(part == number)[0])
        reached, before = breadth_first_order(graph, start, directed=False)
        moves = signed[np.searchsorted(keys, before[reached[1:]].astype(np.int64) * n_obs + reached[1:])]
        for spot, move in zip(reached[1:], moves, strict=True):
            position[spot] = position[before[spot]] + move
        if number == np.argmax(sizes):
            design = np.column_stack([points[reached], np.ones(len(reached))])
            fitted = np.linalg.lstsq(design, position[reached], rcond=None)[0]
            slope, offset = fitted[:2], fitted[2]
        else:
            expected = points[reached] @ slope + offset
            position[reached] += np.round((expected - position[reached]).mean(axis=0)).astype(np.int64)
    return position


def neighbour_graph(
    coordinates: ArrayLike,
    *,
    n_rings: int | None = None,
    n_neighbours: int | None = None,
    radius: float | None = None,
) -> scipy.sparse.csr_array:
    """Connect spots with their neighbours.

    Without options, neighbours on the lattice: the eight around a spot of a square lattice (Queen
    contiguity, as in the paper) and the six of a hexagonal one. Spots may have no neighbour.

    Parameters
    ----------
    coordinates
        Spot centres, x and y, (n_obs, 2), in any unit.
    n_rings
        Lattice neighbours up to so many rings away; 1 unless another option is given.
    n_neighbours
        Connect each spot with so many nearest ones instead; the graph need not be symmetric.
    radius
        Connect all pairs within this distance instead, in the unit of the coordinates.

    Returns
    -------
    Binary adjacency, (n_obs, n_obs), float32, without self-loops: row `i` holds the neighbours of `i`.

    Raises
    ------
    ValueError
        Where more than one of the options is given, one is out of range, or no lattice is found.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import spatial
    >>> grid = np.array([[x, y] for x in range(3) for y in range(3)], dtype=float)
    >>> spatial.neighbour_graph(grid).sum(axis=1).astype(int).tolist()
    [3, 5, 3, 5, 8, 5, 3, 5, 3]
    """
    options = {"n_rings": n_rings, "n_neighbours": n_neighbours, "radius": radius}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"Expected one of `n_rings`, `n_neighbours` and `radius`, found {sorted(given)}.")
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"Expected `{name}` to be positive, found {value}.")
    points = _checked_coordinates(coordinates)
    if n_neighbours is not None:
        if n_neighbours >= len(points):
            raise ValueError(f"Expected `n_neighbours` below the {len(points)} spots, found {n_neighbours}.")
        return _nearest(points, n_neighbours)
    if radius is not None:
        pairs = cKDTree(points).query_pairs(radius, output_type="ndarray")
        return _adjacency(pairs[:, 0], pairs[:, 1], len(points))
    return _lattice_neighbours(lattice(points), n_rings or 1)


def _nearest(points: np.ndarray, n_neighbours: int) -> scipy.sparse.csr_array:
    n_obs = len(points)
    found = cKDTree(points).query(points, k=n_neighbours + 1)[1]
    # A spot comes first among its own neighbours unless another shares its position.
    itself = found == np.arange(n_obs)[:, None]
    itself[~itself.any(axis=1), -1] = True
    others = found[~itself]
    pointers = np.arange(n_obs + 1) * n_neighbours
    graph = scipy.sparse.csr_array((np.ones(len(others), np.float32), others, pointers), shape=(n_obs, n_obs))
    graph.sort_indices()
    return graph


def _adjacency(first: np.ndarray, second: np.ndarray, n_obs: int) -> scipy.sparse.csr_array:
    """Build a symmetric adjacency from pairs named once."""
    ends = np.concatenate([first, second]), np.concatenate([second, first])
    graph = scipy.sparse.csr_array((np.ones(len(ends[0]), np.float32), ends), shape=(n_obs, n_obs))
    graph.sort_indices()
    return graph


def _lattice_neighbours(spots: Lattice, n_rings: int) -> scipy.sparse.csr_array:
    # Columns are padded so that a step off one end does not arrive at the other end of the next row.
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


def morans_i(
    values: Matrix, weights: scipy.sparse.spmatrix | scipy.sparse.sparray, other: Matrix | None = None
) -> np.ndarray:
    """Moran's I of every gene, or the bivariate I of every gene in two matrices.

    Parameters
    ----------
    values
        Expression, (n_obs, n_genes), dense or sparse.
    weights
        Neighbour weights, (n_obs, n_obs), sparse, not negative; rows are scaled to sum to one here. Rows
        without neighbours stay empty.
    other
        A second expression of the same shape for the bivariate I: correlation between `values` at a spot
        and the mean of `other` over its neighbours. For "prediction against truth" the prediction is
        `values` and the truth is `other`.

    Returns
    -------
    I, float64 of shape (n_genes,); NaN for genes constant in either matrix.

    Raises
    ------
    ValueError
        Where shapes do not fit or weights are negative.

    Notes
    -----
    Univariate, ``n / sum(w) * z' w z / z' z`` as in squidpy and ``esda.Moran``; bivariate,
    ``z_x' w z_y / (n - 1)`` of values standardised with ``n - 1`` degrees of freedom, as in
    ``esda.Moran_BV(values, other, w)``, which does not rescale for spots without neighbours.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import spatial
    >>> grid = np.array([[x, y] for x in range(4) for y in range(4)], dtype=float)
    >>> spatial.morans_i(grid, spatial.neighbour_graph(grid)).round(3).tolist()
    [0.62, 0.62]
    """
    left = _as_matrix(values)
    right = left if other is None else _as_matrix(other)
    if left.shape != right.shape:
        raise ValueError(f"Expected `other` of the shape of `values`, {left.shape}, found {right.shape}.")
    n_obs, n_genes = left.shape
    operator = _row_standardised(weights, n_obs)
    # Isolated spots lower the sum of weights; only the univariate I is scaled by it.
    total_weight = operator.sum()
    scale = n_obs / total_weight if other is None and total_weight > 0 else 1.0

    result = np.empty(n_genes)
    width = max(1, _BLOCK_SIZE // n_obs)
    for start in range(0, n_genes, width):
        block = slice(start, start + width)
        first = _centered(left[:, block])
        second = first if other is None else _centered(right[:, block])
        numerator = np.einsum("ij,ij->j", first, operator @ second)
        squares = np.einsum("ij,ij->j", first, first)
        if other is not None:
            squares = np.sqrt(squares * np.einsum("ij,ij->j", second, second))
        with np.errstate(invalid="ignore", divide="ignore"):
            result[block] = scale * numerator / squares
    return result


def _as_matrix(values: Matrix) -> np.ndarray | scipy.sparse.csc_array:
    matrix = scipy.sparse.csc_array(values) if scipy.sparse.issparse(values) else np.asarray(values)
    if matrix.ndim != 2:
        raise ValueError(f"Expected a matrix (n_obs, n_genes), found shape {matrix.shape}.")
    return matrix


def _dense(block: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    """Return float64, in which sums over thousands of spots keep five digits."""
    dense = block if isinstance(block, np.ndarray) else block.toarray()
    return np.asarray(dense, dtype=np.float64, order="C")


def _centered(block: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    """Subtract column means; constant columns become exactly zero, whatever their mean rounds to."""
    dense = _dense(block)
    constant = dense.max(axis=0) == dense.min(axis=0)
    return dense - np.where(constant, dense[0], dense.mean(axis=0))


def _row_standardised(weights: scipy.sparse.spmatrix | scipy.sparse.sparray, n_obs: int) -> scipy.sparse.csr_array:
    if not scipy.sparse.issparse(weights) or weights.shape != (n_obs, n_obs):
        found = f"{type(weights).__name__} of shape {np.shape(weights)}"
        raise ValueError(f"Expected sparse `weights` of shape ({n_obs}, {n_obs}), found {found}.")
    matrix = scipy.sparse.csr_array(weights, dtype=np.float64)
    if matrix.data.min(initial=0) < 0:
        raise ValueError(f"Expected `weights` of zero or more, found {matrix.data.min()}.")
    sums = np.asarray(matrix.sum(axis=1)).ravel()
    return scipy.sparse.diags_array(1 / np.where(sums > 0, sums, 1)).tocsr() @ matrix


def binary_pattern(values: Matrix, coordinates: ArrayLike, *, sigma: float = 1.0) -> np.ndarray:
    """Where a gene is high, smoothed over the spot lattice.

    As in the paper, 2.8: standardised, above zero or not, laid out on the lattice, smoothed by a Gaussian
    along rows and columns, divided by the equally smoothed tissue mask, and 0.5 or more.

    Parameters
    ----------
    values
        Expression, (n_obs, n_genes), dense or sparse.
    coordinates
        Spot centres, x and y, (n_obs, 2), in any unit, on a lattice (see `lattice`).
    sigma
        Standard deviation of the Gaussian, in pitches of the lattice.

    Returns
    -------
    Boolean, (n_obs, n_genes).

    Notes
    -----
    Equal to ``scipy.ndimage.gaussian_filter(..., mode="constant")`` on the rastered spots. A ratio within
    1e-9 of 0.5 counts as 0.5, so that ties do not hang on the order of summation.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import spatial
    >>> grid = np.array([[x, y] for x in range(4) for y in range(4)], dtype=float)
    >>> spatial.binary_pattern(grid[:, :1], grid).reshape(4, 4).astype(int)[:, 0].tolist()
    [0, 0, 1, 1]
    """
    matrix = _as_matrix(values)
    return _smoothed_pattern(matrix, lattice(_matching(coordinates, matrix)), sigma)


def _matching(coordinates: ArrayLike, matrix: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    points = _checked_coordinates(coordinates)
    if len(points) != matrix.shape[0]:
        raise ValueError(f"Expected {matrix.shape[0]} `coordinates`, one a row of values, found {len(points)}.")
    return points


def _smoothed_pattern(matrix: np.ndarray | scipy.sparse.csc_array, spots: Lattice, sigma: float) -> np.ndarray:
    if not sigma > 0:
        raise ValueError(f"Expected `sigma` to be positive, found {sigma}.")
    n_rows, n_columns = int(spots.row.max()) + 1, int(spots.column.max()) + 1
    along_rows = _gaussian_operator(n_rows, sigma / spots.spacing[0])
    along_columns = _gaussian_operator(n_columns, sigma / spots.spacing[1])

    def smoothed(on_spots: np.ndarray) -> np.ndarray:
        raster = np.zeros((n_rows, n_columns, on_spots.shape[1]))
        raster[spots.row, spots.column] = on_spots
        raster = (along_rows @ raster.reshape(n_rows, -1)).reshape(raster.shape)
        return np.matmul(along_columns, raster)[spots.row, spots.column]

    tissue = smoothed(np.ones((matrix.shape[0], 1)))
    pattern = np.empty(matrix.shape, dtype=bool)
    width = max(1, _BLOCK_SIZE // (n_rows * n_columns))
    for start in range(0, matrix.shape[1], width):
        block = slice(start, start + width)
        high = _centered(matrix[:, block]) > 0
        pattern[:, block] = smoothed(high) >= (0.5 - 1e-9) * tissue
    return pattern


def _gaussian_operator(size: int, sigma: float) -> np.ndarray:
    """Gaussian filter along an axis as a matrix, cut off at four standard deviations as scipy's is."""
    offsets = np.arange(size)
    distance = np.abs(offsets[:, None] - offsets)
    kernel = np.exp(-0.5 * (distance / sigma) ** 2)
    kernel[distance > int(4 * sigma + 0.5)] = 0
    return kernel


def pattern_iou(predicted: Matrix, observed: Matrix, coordinates: ArrayLike, *, sigma: float = 1.0) -> np.ndarray:
    """Overlap of where genes are predicted high and where they are observed high (paper, 2.8).

    Intersection over union, over spots, of the two patterns of `binary_pattern`.

    Parameters
    ----------
    predicted, observed
        Expression, (n_obs, n_genes), dense or sparse.
    coordinates
        Spot centres, x and y, (n_obs, 2), in any unit, on a lattice (see `lattice`).
    sigma
        Standard deviation of the smoothing Gaussian, in pitches of the lattice.

    Returns
    -------
    IoU, float64 of shape (n_genes,), within 0 and 1; NaN where a gene is constant in either matrix or
    neither pattern has a spot.

    Raises
    ------
    ValueError
        Where shapes do not fit, or the coordinates stand on no lattice.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import spatial
    >>> grid = np.array([[x, y] for x in range(4) for y in range(4)], dtype=float)
    >>> spatial.pattern_iou(grid, grid[:, ::-1], grid).round(3).tolist()
    [0.333, 0.333]
    """
    first, second = _same_shape(predicted, observed)
    spots = lattice(_matching(coordinates, first))
    one, two = _smoothed_pattern(first, spots, sigma), _smoothed_pattern(second, spots, sigma)
    union = (one | two).sum(axis=0)
    with np.errstate(invalid="ignore"):
        overlap = (one & two).sum(axis=0) / union
    return np.where(_varies(first) & _varies(second), overlap, np.nan)


def _same_shape(
    a: Matrix, b: Matrix
) -> tuple[np.ndarray | scipy.sparse.csc_array, np.ndarray | scipy.sparse.csc_array]:
    first, second = _as_matrix(a), _as_matrix(b)
    if first.shape != second.shape:
        raise ValueError(f"Expected two matrices of one shape, found {first.shape} and {second.shape}.")
    return first, second


def _varies(matrix: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    largest, smallest = matrix.max(axis=0), matrix.min(axis=0)
    if scipy.sparse.issparse(matrix):
        largest, smallest = largest.toarray().ravel(), smallest.toarray().ravel()
    return largest > smallest


def pearson(a: Matrix, b: Matrix) -> np.ndarray:
    """Pearson's correlation of each column of one matrix with the same column of another.

    Parameters
    ----------
    a, b
        Matrices of one shape (n_obs, n_genes), dense or sparse.

    Returns
    -------
    Correlations, float64 of shape (n_genes,); NaN for columns constant in either matrix.

    Raises
    ------
    ValueError
        Where shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import spatial
    >>> a = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    >>> spatial.pearson(a, -a).tolist()
    [-1.0, nan]
    """
    return _columnwise(a, b, _dense)


def spearman(a: Matrix, b: Matrix) -> np.ndarray:
    """Spearman's rank correlation of each column of one matrix with the same column of another.

    Parameters
    ----------
    a, b
        Matrices of one shape (n_obs, n_genes), dense or sparse. Ties get their average rank.

    Returns
    -------
    Correlations, float64 of shape (n_genes,); NaN for columns constant in either matrix.

    Raises
    ------
    ValueError
        Where shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import spatial
    >>> a = np.array([[1.0], [2.0], [4.0]])
    >>> spatial.spearman(a, a**3).tolist()
    [1.0]
    """
    return _columnwise(a, b, _ranks)


def _ranks(block: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    return scipy.stats.rankdata(_dense(block), axis=0, nan_policy="propagate")


def _columnwise(
    a: Matrix, b: Matrix, prepare: Callable[[np.ndarray | scipy.sparse.csc_array], np.ndarray]
) -> np.ndarray:
    first, second = _same_shape(a, b)
    n_obs, n_genes = first.shape
    result = np.empty(n_genes)
    width = max(1, _BLOCK_SIZE // max(n_obs, 1))
    for start in range(0, n_genes, width):
        block = slice(start, start + width)
        x, y = _centered(prepare(first[:, block])), _centered(prepare(second[:, block]))
        # Scaled before they are multiplied, so that squares of tiny or huge values do not leave float64.
        with np.errstate(invalid="ignore", divide="ignore"):
            x, y = x / np.abs(x).max(axis=0), y / np.abs(y).max(axis=0)
            norms = np.sqrt(np.einsum("ij,ij->j", x, x) * np.einsum("ij,ij->j", y, y))
            result[block] = np.einsum("ij,ij->j", x, y) / norms
    return np.clip(result, -1, 1)
