"""Scores of spatial expression: Moran's I, overlap of patterns, correlations.

Matrices are observations by genes, dense or sparse. All genes are scored at once. Genes that are constant or have empty
patterns get NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import scipy.sparse
import scipy.stats
from numpy.typing import ArrayLike

from stimage_sd._settings import n_threads
from stimage_sd.stats.lattice import Smoother, check_coordinates, find_lattice, overlaps, smoothed_patterns, smoother

__all__ = [
    "binary_pattern",
    "morans_i",
    "pattern_iou",
    "pearson",
    "spearman",
]

Matrix: TypeAlias = ArrayLike | scipy.sparse.spmatrix | scipy.sparse.sparray


def morans_i(
    values: Matrix, weights: scipy.sparse.spmatrix | scipy.sparse.sparray, other: Matrix | None = None
) -> np.ndarray:
    """Compute Moran's I per gene, or the bivariate I per gene of two matrices.

    Parameters
    ----------
    values
        Expression, (n_obs, n_genes), dense or sparse.
    weights
        Neighbor weights, sparse (n_obs, n_obs), not negative. Rows are scaled to sum to 1. Rows without neighbors stay
        empty.
    other
        Second expression matrix of the same shape, for the bivariate I. This correlates `values` at a spot with the
        mean of `other` over its neighbors. For prediction against truth, pass the prediction as `values` and the truth
        as `other`.

    Returns
    -------
    Moran's I, float64 of shape (n_genes,), NaN for genes constant in either matrix.

    Raises
    ------
    ValueError
        If shapes do not fit or weights are negative.

    Notes
    -----
    The univariate I is ``n / sum(w) * z' w z / z' z``, as in squidpy and ``esda.Moran``. The bivariate I is
    ``z_x' w z_y / (n - 1)`` with values standardized by ``n - 1`` degrees of freedom, as in
    ``esda.Moran_BV(values, other, w)``. The bivariate I is not rescaled for spots without neighbors.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.stats import spatial
    >>> from stimage_sd.stats.lattice import neighbor_graph
    >>> grid = np.array([[x, y] for x in range(4) for y in range(4)], dtype=float)
    >>> spatial.morans_i(grid, neighbor_graph(grid)).round(3).tolist()
    [0.62, 0.62]
    """
    left = _as_matrix(values)
    right = left if other is None else _as_matrix(other)
    if left.shape != right.shape:
        raise ValueError(f"Expected `other` of the shape of `values`, {left.shape}, found {right.shape}.")
    graph = row_standardized(weights, left.shape[0])
    # Isolated spots lower the sum of weights. Only the univariate I is scaled by this sum.
    total_weight = graph.data.sum()
    scale = left.shape[0] / total_weight if other is None and total_weight > 0 else 1.0
    if other is None and left.shape[1] > WIDTH:
        # The univariate I needs the sum of the weights of each pair of spots, so half the entries.
        graph = (scipy.sparse.triu(graph) + scipy.sparse.tril(graph, -1).T).tocsr()
    result = np.full(left.shape[1], np.nan)

    def score(start: int, stop: int) -> None:
        first = second = centered(right, start, stop)
        squares = products(second, second)
        if other is not None:
            first = centered(left, start, stop)
            squares = root(squares, products(first, first))
        result[start:stop] = products(first, graph @ second) / squares

    each_block(left.shape, score)
    return scale * result


def _as_matrix(values: Matrix) -> np.ndarray | scipy.sparse.csc_array:
    matrix = scipy.sparse.csc_array(values) if scipy.sparse.issparse(values) else np.asarray(values)
    if matrix.ndim != 2:
        raise ValueError(f"Expected a matrix (n_obs, n_genes), found shape {matrix.shape}.")
    return matrix


def row_standardized(weights: scipy.sparse.spmatrix | scipy.sparse.sparray, n_obs: int) -> scipy.sparse.csr_array:
    """Return weights whose rows sum to 1, or raise `ValueError` if they are dense, negative or of another shape."""
    if not scipy.sparse.issparse(weights) or weights.shape != (n_obs, n_obs):
        given = f"{type(weights).__name__} of shape {np.shape(weights)}"
        raise ValueError(f"Expected sparse `weights` of shape ({n_obs}, {n_obs}), found {given}.")
    matrix = scipy.sparse.csr_array(weights, dtype=np.float64)
    if matrix.data.min(initial=0) < 0:
        raise ValueError(f"Expected `weights` of zero or more, found {matrix.data.min()}.")
    sums = matrix @ np.ones(n_obs)
    shares = np.repeat(1 / np.where(sums > 0, sums, 1), np.diff(matrix.indptr))
    return scipy.sparse.csr_array((matrix.data * shares, matrix.indices, matrix.indptr), shape=matrix.shape)


def binary_pattern(values: Matrix, coordinates: ArrayLike, *, sigma: float = 1.0) -> np.ndarray:
    """Mark the spots where a gene is high, smoothed over the spot lattice.

    The steps are those of section 2.8 of the paper. Expression is standardized and thresholded at zero. The result is
    smoothed on the lattice by a Gaussian along rows and columns, and divided by the equally smoothed tissue mask.
    The pattern is where this ratio is at least 0.5.

    Parameters
    ----------
    values
        Expression, (n_obs, n_genes), dense or sparse.
    coordinates
        Spot centers, x and y, (n_obs, 2), in any unit, on a lattice (see `stimage_sd.stats.lattice`).
    sigma
        Standard deviation of the Gaussian, in pitches of the lattice.

    Returns
    -------
    Boolean, (n_obs, n_genes).

    Notes
    -----
    Equal to ``scipy.ndimage.gaussian_filter(..., mode="constant")`` on the rastered spots. A ratio within 1e-9 of 0.5
    counts as 0.5, so that ties do not depend on the order of summation.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.stats import spatial
    >>> grid = np.array([[x, y] for x in range(4) for y in range(4)], dtype=float)
    >>> spatial.binary_pattern(grid[:, :1], grid).reshape(4, 4).astype(int)[:, 0].tolist()
    [0, 0, 1, 1]
    """
    matrix = _as_matrix(values)
    smooth = _smoother(_matching(coordinates, matrix), sigma)
    pattern = np.empty(matrix.shape, dtype=bool)

    def mark(start: int, stop: int) -> None:
        pattern[:, start:stop] = smoothed_patterns(above_mean(matrix, start, stop), smooth)

    each_block(matrix.shape, mark)
    return pattern


def _matching(coordinates: ArrayLike, matrix: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    points = check_coordinates(coordinates)
    if len(points) != matrix.shape[0]:
        raise ValueError(f"Expected {matrix.shape[0]} `coordinates`, one per row of values, found {len(points)}.")
    return points


def _smoother(coordinates: np.ndarray, sigma: float) -> Smoother:
    if not sigma > 0:
        raise ValueError(f"Expected `sigma` to be positive, found {sigma}.")
    spots = find_lattice(coordinates)
    return smoother(spots.row, spots.column, (sigma / spots.spacing[0], sigma / spots.spacing[1]))


def pattern_iou(predicted: Matrix, observed: Matrix, coordinates: ArrayLike, *, sigma: float = 1.0) -> np.ndarray:
    """Compute the overlap of predicted and observed high expression per gene (paper, 2.8).

    The overlap is the intersection over union, over spots, of the two patterns from `binary_pattern`.

    Parameters
    ----------
    predicted, observed
        Expression, (n_obs, n_genes), dense or sparse.
    coordinates
        Spot centers, x and y, (n_obs, 2), in any unit, on a lattice (see `stimage_sd.stats.lattice`).
    sigma
        Standard deviation of the smoothing Gaussian, in pitches of the lattice.

    Returns
    -------
    IoU, float64 of shape (n_genes,), from 0 to 1. NaN if a gene is constant in either matrix or both patterns are
    empty.

    Raises
    ------
    ValueError
        If shapes do not fit or the coordinates fit no lattice.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.stats import spatial
    >>> grid = np.array([[x, y] for x in range(4) for y in range(4)], dtype=float)
    >>> spatial.pattern_iou(grid, grid[:, ::-1], grid).round(3).tolist()
    [0.333, 0.333]
    """
    first, second = _same_shape(predicted, observed)
    smooth = _smoother(_matching(coordinates, first), sigma)
    result = np.full(first.shape[1], np.nan)

    def score(start: int, stop: int) -> None:
        high = [above_mean(matrix, start, stop) for matrix in (first, second)]
        varies = high[0].any(axis=0) & high[1].any(axis=0)
        shared = overlaps(*(smoothed_patterns(pattern, smooth) for pattern in high))
        result[start:stop] = np.where(varies, shared, np.nan)

    each_block(first.shape, score)
    return result


def _same_shape(
    a: Matrix, b: Matrix
) -> tuple[np.ndarray | scipy.sparse.csc_array, np.ndarray | scipy.sparse.csc_array]:
    first, second = _as_matrix(a), _as_matrix(b)
    if first.shape != second.shape:
        raise ValueError(f"Expected two matrices of one shape, found {first.shape} and {second.shape}.")
    return first, second


def pearson(a: Matrix, b: Matrix) -> np.ndarray:
    """Compute Pearson's correlation of each column of one matrix with the same column of another.

    Parameters
    ----------
    a, b
        Matrices of one shape (n_obs, n_genes), dense or sparse.

    Returns
    -------
    Correlations, float64 of shape (n_genes,), NaN for columns constant in either matrix.

    Raises
    ------
    ValueError
        If shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.stats import spatial
    >>> a = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    >>> spatial.pearson(a, -a).tolist()
    [-1.0, nan]
    """
    first, second = _same_shape(a, b)
    result = np.full(first.shape[1], np.nan)

    def correlate(start: int, stop: int) -> None:
        result[start:stop] = correlations(shifted(first, start, stop), shifted(second, start, stop))

    each_block(first.shape, correlate)
    return result


def spearman(a: Matrix, b: Matrix) -> np.ndarray:
    """Compute Spearman's rank correlation of each column of one matrix with the same column of another.

    Parameters
    ----------
    a, b
        Matrices of one shape (n_obs, n_genes), dense or sparse. Ties get their average rank.

    Returns
    -------
    Correlations, float64 of shape (n_genes,), NaN for columns constant in either matrix.

    Raises
    ------
    ValueError
        If shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.stats import spatial
    >>> a = np.array([[1.0], [2.0], [4.0]])
    >>> spatial.spearman(a, a**3).tolist()
    [1.0]
    """
    first, second = _same_shape(a, b)
    result = np.full(first.shape[1], np.nan)

    def correlate(start: int, stop: int) -> None:
        result[start:stop] = correlations(*(_ranks(matrix[:, start:stop]) for matrix in (first, second)))

    each_block(first.shape, correlate)
    return result


def _ranks(block: np.ndarray | scipy.sparse.csc_array) -> np.ndarray:
    """Return ranks per gene, relative to the first spot."""
    dense = block if isinstance(block, np.ndarray) else block.toarray()
    ranks = scipy.stats.rankdata(dense, axis=0, nan_policy="propagate")
    return shifted(ranks, 0, ranks.shape[1])


# --------------------------------------------------------------------------------------------------
# all genes of a matrix in blocks, on threads and without a copy of the matrix

Columns: TypeAlias = np.ndarray | scipy.sparse.csc_array
#: maximum number of genes and of values per block; 16 MB of float64
WIDTH, VALUES = 128, 2**21
#: number of values below which threads do not pay off
FEW = 2**17


def shifted(matrix: Columns, start: int, stop: int) -> np.ndarray:
    """Return a range of genes relative to their values at the first spot, as float64.

    Genes that are constant become exactly zero. Differences keep the digits that sums of large values lose.

    Examples
    --------
    >>> shifted(np.array([[0.1, 3.0], [0.1, 4.0]]), 0, 2).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    block = matrix[:, start:stop]
    dense = block if isinstance(block, np.ndarray) else block.toarray(order="C")
    return np.subtract(dense, dense[:1], dtype=np.float64, order="C")


def centered(matrix: Columns, start: int, stop: int) -> np.ndarray:
    """Return a range of genes without their means, as float64. Genes that are constant become exactly zero."""
    block = shifted(matrix, start, stop)
    block -= block.mean(axis=0)
    return block


def above_mean(matrix: Columns, start: int, stop: int) -> np.ndarray:
    """Return where a range of genes is above its means, boolean (n_spots, n_genes). Constant genes are nowhere."""
    block = shifted(matrix, start, stop)
    return block > block.mean(axis=0)


def products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the sum of products over spots per gene."""
    return np.einsum("ij,ij->j", one, other)


def root(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the root of the product of two sums of squares, which may be too large or small to multiply."""
    return other * np.sqrt(one / other)


def correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation per gene of two blocks that are relative to their first spot.

    The first spot lies within the values, so sums of products about it lose few digits against sums about the mean.
    """
    mean, other_mean = one.mean(axis=0), other.mean(axis=0)
    squares = products(one, one) - len(one) * mean**2, products(other, other) - len(one) * other_mean**2
    return np.clip((products(one, other) - len(one) * mean * other_mean) / root(*squares), -1, 1)


def each_block(shape: tuple[int, int], work: Callable[[int, int], None], *, width: int | None = None) -> None:
    """Call a function per block of genes, on threads if the matrix is large.

    Divisions by zero in the function give NaN without a warning.

    Parameters
    ----------
    shape
        Number of spots and of genes.
    work
        Function of the first gene of a block and the gene after its last.
    width
        Maximum number of genes per block.

    Examples
    --------
    >>> each_block((10, 200), lambda start, stop: print(start, stop))
    0 100
    100 200
    """
    n_obs, n_genes = shape
    width = width or max(8, min(WIDTH, VALUES // max(n_obs, 1)))
    n_blocks = -(-n_genes // width) if n_obs else 0
    edges = [n_genes * block // n_blocks for block in range(n_blocks + 1)] if n_blocks else [0]

    def run(start: int, stop: int) -> None:
        with np.errstate(divide="ignore", invalid="ignore"):
            work(start, stop)

    workers = min(8, n_threads(), len(edges) - 1)
    if workers < 2 or n_obs * n_genes < FEW:
        for start, stop in itertools.pairwise(edges):
            run(start, stop)
        return
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(run, start, stop) for start, stop in itertools.pairwise(edges)]:
            future.result()
