"""Compute scores of all genes of a matrix in blocks of genes, on threads and without copying the whole matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import scipy.sparse

from stimage_sd._settings import n_threads

Matrix: TypeAlias = np.ndarray | scipy.sparse.csc_array
#: maximum number of genes and of values per block; 16 MB of float64
WIDTH, VALUES = 128, 2**21
#: number of values below which threads do not pay off
FEW = 2**17


def shifted(matrix: Matrix, start: int, stop: int) -> np.ndarray:
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


def centered(matrix: Matrix, start: int, stop: int) -> np.ndarray:
    """Return a range of genes without their means, as float64. Genes that are constant become exactly zero."""
    block = shifted(matrix, start, stop)
    block -= block.mean(axis=0)
    return block


def above_mean(matrix: Matrix, start: int, stop: int) -> np.ndarray:
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
