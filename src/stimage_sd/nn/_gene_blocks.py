"""Sums over spots of all genes of a matrix: blocks of genes, on threads, without copies of dense matrices."""

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
#: most genes in a block: rows of a block are long enough for the processor to fetch ahead, and a few rows of neighbours
#: still fit its cache
WIDTH = 256
#: numbers in a block that has to be copied, from sparse matrices and other layouts
COPIED = 2**21
#: numbers below which threads cost more than they bring
FEW = 2**17

# Where in a working array each quantity is, a number a gene. They are in one array, at distances known to the compiler,
# which else would look at every spot whether any of them overlap before it uses vectors; and at distances which are not
# powers of two, which would fall on the same lines of the cache.
_APART = WIDTH + 24
X_MEAN, Y_MEAN, X_SCALE, Y_SCALE, XX, YY, XY, AROUND = (number * _APART for number in range(8))
WORKING = 8 * _APART

# Sums may be reordered, so that they run on vectors; NaN and infinity keep their meaning.
compiled = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")


def block_of(matrix: Matrix, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Give a matrix in rows of float32 or float64 that has the genes asked for, and where in it they begin.

    Parameters
    ----------
    matrix
        Dense or in sparse columns, (n_obs, n_genes). A dense one in rows of floats is given as it is.
    start, stop
        The genes.

    Returns
    -------
    The matrix, in C order, and the column of its that is gene `start`.

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
    """Call a function for blocks of genes, on threads where there is much to do.

    Parameters
    ----------
    shape
        Spots and genes.
    work
        Called with the first gene of a block and the one after its last.
    width
        Most genes in a block.

    Examples
    --------
    >>> each_block((10, 300), lambda start, stop: print(start, stop))
    0 150
    150 300
    """
    n_obs, n_genes = shape
    width = width or max(8, min(WIDTH, COPIED // max(n_obs, 1)))
    n_blocks = -(-n_genes // width)
    edges = [n_genes * number // n_blocks for number in range(n_blocks + 1)] if n_blocks else [0]
    # Threads of our own instead of numba's parallel loops: those may not be entered from two threads at once.
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
    """Write means of columns, and one over how far the values of each lie from it at most, NaN where that is zero."""
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
        # Equal values have no correlation, whatever their mean is rounded to.
        to[at[1] + g] = 1 / max(high[g] - mean, mean - low[g], 1e-300) if low[g] < high[g] else np.nan


@compiled
def correlations(  # pragma: no cover
    x: np.ndarray, first: int, y: np.ndarray, second: int, found: np.ndarray
) -> None:
    """Pearson's correlations of columns of `x` with columns of `y`, as many as `found` holds."""
    width = len(found)
    work = np.zeros(WORKING)
    means(x, first, width, work, (X_MEAN, X_SCALE))
    means(y, second, width, work, (Y_MEAN, Y_SCALE))
    for i in range(x.shape[0]):
        x_row, y_row = x[i, first : first + width], y[i, second : second + width]
        # Scaled before they are multiplied, so that squares of tiny or huge values do not leave float64.
        for g in range(width):
            one = (x_row[g] - work[X_MEAN + g]) * work[X_SCALE + g]
            other = (y_row[g] - work[Y_MEAN + g]) * work[Y_SCALE + g]
            work[XX + g] += one * one
            work[YY + g] += other * other
            work[XY + g] += one * other
    for g in range(width):
        value = work[XY + g] / np.sqrt(work[XX + g] * work[YY + g])
        found[g] = min(max(value, -1.0), 1.0) if value == value else np.nan


@compiled
def _sum_around(  # pragma: no cover
    y: np.ndarray, columns: slice, neighbours: np.ndarray, weights: np.ndarray, work: np.ndarray
) -> None:
    """Add up weighted values of the neighbours, four at a time: sums are loaded and stored a quarter as often."""
    width, n_neighbours = columns.stop - columns.start, len(neighbours)
    n_fours = n_neighbours // 4 * 4
    for k in range(0, n_fours, 4):
        near, second = y[neighbours[k], columns], y[neighbours[k + 1], columns]
        third, fourth = y[neighbours[k + 2], columns], y[neighbours[k + 3], columns]
        w1, w2, w3, w4 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for g in range(width):
            work[AROUND + g] += (w1 * near[g] + w2 * second[g]) + (w3 * third[g] + w4 * fourth[g])
    for k in range(n_fours, n_neighbours - 1, 2):
        near, second = y[neighbours[k], columns], y[neighbours[k + 1], columns]
        w1, w2 = weights[k], weights[k + 1]
        for g in range(width):
            work[AROUND + g] += w1 * near[g] + w2 * second[g]
    if n_neighbours % 2:
        near, w1 = y[neighbours[-1], columns], weights[-1]
        for g in range(width):
            work[AROUND + g] += w1 * near[g]


@compiled
def neighbour_sums(  # pragma: no cover
    x: np.ndarray, first: int, y: np.ndarray, second: int, graph: Graph, same: bool, found: np.ndarray
) -> None:
    """Sums over spots of a value of `x` times the weighted values of `y` around, over the root of both sums of squares.

    The graph is its pointers, neighbours and weights, and the sum of each row's weights; `same` says that `y` is `x`.
    """
    width = len(found)
    pointers, neighbours, weights, row_sums = graph
    work = np.zeros(WORKING)
    means(y, second, width, work, (Y_MEAN, Y_SCALE))
    if not same:
        means(x, first, width, work, (X_MEAN, X_SCALE))
    for i in range(x.shape[0]):
        row_sum, mine = row_sums[i], slice(pointers[i], pointers[i + 1])
        for g in range(width):
            work[AROUND + g] = -row_sum * work[Y_MEAN + g]
        _sum_around(y, slice(second, second + width), neighbours[mine], weights[mine], work)
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
        found[g] = work[XY + g] / np.sqrt(squares * work[YY + g])
