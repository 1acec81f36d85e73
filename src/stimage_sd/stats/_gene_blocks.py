"""Sum over spots for all genes of a matrix, in blocks of genes on threads, without copying dense matrices."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numba
import numpy as np
import scipy.sparse

Matrix: TypeAlias = np.ndarray | scipy.sparse.csc_array
Graph: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
#: maximum number of genes per block; rows are long enough for prefetching, and a few rows still fit the cache
WIDTH = 256
#: values per block if the block must be copied (sparse matrices and other layouts)
COPIED = 2**21
#: number of values below which threads do not pay off
FEW = 2**17

# Offsets of the quantities in one working array, with one number per gene. Fixed offsets in one array tell the compiler
# that the quantities do not overlap, so it vectorizes without a check per spot. The offsets are not powers of two,
# because those map to the same cache lines.
_APART = WIDTH + 24
X_MEAN, Y_MEAN, X_SCALE, Y_SCALE, XX, YY, XY, AROUND = (number * _APART for number in range(8))
WORKING = 8 * _APART

# Sums may be reordered for vectorization; NaN and infinity keep their meaning.
compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")


def block_of(matrix: Matrix, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Return a row-major float matrix that contains a range of genes, and the column where the range begins.

    Parameters
    ----------
    matrix
        Dense or sparse CSC matrix, (n_obs, n_genes). A dense float matrix in C order is returned without a copy.
    start, stop
        Range of genes.

    Returns
    -------
    The matrix, float32 or float64 in C order, and its column for gene `start`.

    Examples
    --------
    >>> block_of(np.arange(6).reshape(2, 3), 1, 3)
    (array([[1., 2.],
           [4., 5.]]), 0)
    """
    if not isinstance(matrix, np.ndarray):
        matrix, start, stop = matrix[:, start:stop].toarray(order="C"), 0, stop - start
    dtype = matrix.dtype if matrix.dtype in (np.float32, np.float64) else np.float64
    if matrix.flags.c_contiguous and matrix.dtype == dtype:
        return matrix, start
    return np.ascontiguousarray(matrix[:, start:stop], dtype=dtype), 0


def each_block(shape: tuple[int, int], work: Callable[[int, int], None], *, width: int | None = None) -> None:
    """Call a function per block of genes, on threads if the matrix is large.

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
    >>> each_block((10, 300), lambda start, stop: print(start, stop))
    0 150
    150 300
    """
    n_obs, n_genes = shape
    width = width or max(8, min(WIDTH, COPIED // max(n_obs, 1)))
    n_blocks = -(-n_genes // width)
    edges = [n_genes * block // n_blocks for block in range(n_blocks + 1)] if n_blocks else [0]
    # Python threads instead of numba's parallel loops, which must not be entered from two threads at once.
    n_threads = min(8, os.cpu_count() or 1, len(edges) - 1)
    if n_threads < 2 or n_obs * n_genes < FEW:
        for start, stop in itertools.pairwise(edges):
            work(start, stop)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for run in [pool.submit(work, start, stop) for start, stop in itertools.pairwise(edges)]:
            run.result()


@compiled
def means(x: np.ndarray, first: int, width: int, to: np.ndarray, at: tuple[int, int]) -> None:  # pragma: no cover
    """Write column means and the inverse of the largest deviation per column, NaN for constant columns."""
    total, low, high = np.zeros(width), np.full(width, np.inf), np.full(width, -np.inf)
    for i in range(x.shape[0]):
        row = x[i, first : first + width]
        for g in range(width):
            total[g] += row[g]
            low[g] = min(np.float64(row[g]), low[g])
            high[g] = max(np.float64(row[g]), high[g])
    for g in range(width):
        mean = total[g] / x.shape[0]
        to[at[0] + g] = mean
        # Constant columns have no correlation, even if rounding of the mean leaves a deviation.
        to[at[1] + g] = 1 / max(high[g] - mean, mean - low[g], 1e-300) if low[g] < high[g] else np.nan


@compiled
def correlations(  # pragma: no cover
    x: np.ndarray, first: int, y: np.ndarray, second: int, out: np.ndarray
) -> None:
    """Write Pearson's correlations of columns of `x` with columns of `y`, for all columns of `out`."""
    width = len(out)
    work = np.zeros(WORKING)
    means(x, first, width, work, (X_MEAN, X_SCALE))
    means(y, second, width, work, (Y_MEAN, Y_SCALE))
    for i in range(x.shape[0]):
        x_row, y_row = x[i, first : first + width], y[i, second : second + width]
        # Scale before multiplying, so that squares of tiny or huge values stay within float64.
        for g in range(width):
            one = (x_row[g] - work[X_MEAN + g]) * work[X_SCALE + g]
            other = (y_row[g] - work[Y_MEAN + g]) * work[Y_SCALE + g]
            work[XX + g] += one * one
            work[YY + g] += other * other
            work[XY + g] += one * other
    for g in range(width):
        value = work[XY + g] / np.sqrt(work[XX + g] * work[YY + g])
        out[g] = min(max(value, -1.0), 1.0) if value == value else np.nan


@compiled
def _sum_around(  # pragma: no cover
    y: np.ndarray, columns: slice, neighbors: np.ndarray, weights: np.ndarray, work: np.ndarray
) -> None:
    """Add up weighted values of the neighbors, four at a time to load and store the sums less often."""
    width, n_neighbors = columns.stop - columns.start, len(neighbors)
    n_fours = n_neighbors // 4 * 4
    for k in range(0, n_fours, 4):
        near, second = y[neighbors[k], columns], y[neighbors[k + 1], columns]
        third, fourth = y[neighbors[k + 2], columns], y[neighbors[k + 3], columns]
        w1, w2, w3, w4 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for g in range(width):
            work[AROUND + g] += (w1 * near[g] + w2 * second[g]) + (w3 * third[g] + w4 * fourth[g])
    for k in range(n_fours, n_neighbors - 1, 2):
        near, second = y[neighbors[k], columns], y[neighbors[k + 1], columns]
        w1, w2 = weights[k], weights[k + 1]
        for g in range(width):
            work[AROUND + g] += w1 * near[g] + w2 * second[g]
    if n_neighbors % 2:
        near, w1 = y[neighbors[-1], columns], weights[-1]
        for g in range(width):
            work[AROUND + g] += w1 * near[g]


@compiled
def neighbor_sums(  # pragma: no cover
    x: np.ndarray, first: int, y: np.ndarray, second: int, graph: Graph, same: bool, out: np.ndarray
) -> None:
    """Write the sum over spots of `x` times the weighted neighbors in `y`, over the root of both sums of squares.

    `graph` holds pointers, neighbors, weights and the sum of weights per row. `same` means that `y` is `x`.
    """
    width = len(out)
    pointers, neighbors, weights, row_sums = graph
    work = np.zeros(WORKING)
    means(y, second, width, work, (Y_MEAN, Y_SCALE))
    if not same:
        means(x, first, width, work, (X_MEAN, X_SCALE))
    for i in range(x.shape[0]):
        row_sum, mine = row_sums[i], slice(pointers[i], pointers[i + 1])
        for g in range(width):
            work[AROUND + g] = -row_sum * work[Y_MEAN + g]
        _sum_around(y, slice(second, second + width), neighbors[mine], weights[mine], work)
        x_row, y_row = x[i, first : first + width], y[i, second : second + width]
        if same:
            for g in range(width):
                other = (y_row[g] - work[Y_MEAN + g]) * work[Y_SCALE + g]
                work[YY + g] += other * other
                work[XY + g] += other * (work[AROUND + g] * work[Y_SCALE + g])
        else:
            for g in range(width):
                one = (x_row[g] - work[X_MEAN + g]) * work[X_SCALE + g]
                other = (y_row[g] - work[Y_MEAN + g]) * work[Y_SCALE + g]
                work[XX + g] += one * one
                work[YY + g] += other * other
                work[XY + g] += one * (work[AROUND + g] * work[Y_SCALE + g])
    for g in range(width):
        squares = work[YY + g] if same else work[XX + g]
        out[g] = work[XY + g] / np.sqrt(squares * work[YY + g])
