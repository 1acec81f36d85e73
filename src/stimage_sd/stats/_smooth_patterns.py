"""Smoothed patterns of high expression on a raster of spots, as two sparse products for blocks of genes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse

#: a share this close to one half counts as one half, so that ties do not depend on the order of summation
_TIE = 1e-9


class Smoother(NamedTuple):
    """The Gaussian over the raster of spots, first along rows and then down columns.

    Attributes
    ----------
    along
        Sparse ``float64 (n_cells, n_spots)``: from spots to the cells of the raster that they reach within their row.
    down
        Sparse ``float64 (n_spots, n_cells)``: from cells to the spots in their column.
    limit
        ``float64 (n_spots, 1)``: threshold of the smoothed pattern, half of the smoothed tissue.
    """

    along: scipy.sparse.csc_array
    down: scipy.sparse.csr_array
    limit: np.ndarray


def smoother(row: np.ndarray, column: np.ndarray, sigma: tuple[float, float]) -> Smoother:
    """Place spots on a raster, and return the Gaussian over it.

    Parameters
    ----------
    row, column
        ``int64 (n_spots,)``, from zero.
    sigma
        Standard deviations of the Gaussian, in rows and in columns. It is cut off at four, as in scipy.

    Examples
    --------
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
