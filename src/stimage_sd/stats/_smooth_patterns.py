"""Smoothed patterns of high expression on a raster of spots, compiled for blocks of genes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stimage_sd.stats._gene_blocks import WORKING, X_MEAN, X_SCALE, compiled, means

#: values kept per block for the rows around the smoothed row, so that they fit the cache of a core
_HELD = 2**17
#: a share this close to one half counts as one half, so that ties do not depend on the order of summation
_TIE = 1e-9


class Raster(NamedTuple):
    """Spots on a raster, with the Gaussian along rows and columns.

    Attributes
    ----------
    spot_at
        ``int64 (n_rows, n_columns)``: number of the spot, -1 where there is no spot.
    row, column
        ``int64 (n_spots,)``: position per spot.
    down, along
        ``float64``: the Gaussian from offset 0, across rows and across columns.
    limit
        ``float64 (n_spots,)``: threshold of the smoothed pattern, half of the smoothed tissue.
    """

    spot_at: np.ndarray
    row: np.ndarray
    column: np.ndarray
    down: np.ndarray
    along: np.ndarray
    limit: np.ndarray


def raster(row: np.ndarray, column: np.ndarray, sigma: tuple[float, float]) -> Raster:
    """Place spots on a raster.

    Parameters
    ----------
    row, column
        ``int64 (n_spots,)``, from zero.
    sigma
        Standard deviations of the Gaussian, in rows and in columns. It is cut off at four, as in scipy.

    Returns
    -------
    The raster.

    Examples
    --------
    >>> raster(np.array([0, 0, 1]), np.array([0, 1, 1]), (1.0, 1.0)).spot_at.tolist()
    [[0, 1], [-1, 2]]
    """
    spot_at = np.full((int(row.max()) + 1, int(column.max()) + 1), -1)
    spot_at[row, column] = np.arange(len(row))
    down, along = (_half_gaussian(deviation, size) for deviation, size in zip(sigma, spot_at.shape, strict=True))
    tissue = _operator(down, spot_at.shape[0]) @ (spot_at >= 0) @ _operator(along, spot_at.shape[1])
    return Raster(spot_at, row, column, down, along, (0.5 - _TIE) * tissue[row, column])


def block_width(spots: Raster) -> int:
    """Return the number of genes per block for which the rows around the smoothed row fit the cache."""
    held = (2 * len(spots.down) - 1) * spots.spot_at.shape[1]
    return max(16, min(256, _HELD // held // 16 * 16))


def _half_gaussian(sigma: float, size: int) -> np.ndarray:
    reach = min(int(4 * sigma + 0.5), size - 1)
    return np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)


def _operator(half: np.ndarray, size: int) -> np.ndarray:
    """Return the filter along an axis as a matrix."""
    distance = np.abs(np.arange(size)[:, None] - np.arange(size))
    return np.where(distance < len(half), half[np.minimum(distance, len(half) - 1)], 0.0)


@compiled
def smoothed_patterns(  # pragma: no cover
    x: np.ndarray, first: int, spots: Raster, out: np.ndarray
) -> np.ndarray:
    """Write where columns of `x` are above their means after smoothing, for all columns of `out`.

    Sums are float32. Values within rounding of the limit are summed again in float64. Return which columns vary.
    """
    width = out.shape[1]
    n_rows, n_columns = spots.spot_at.shape
    work = np.zeros(WORKING)
    means(x, first, width, work, (X_MEAN, X_SCALE))
    mean = np.empty(width)
    for g in range(width):
        # a constant column is nowhere above its mean, even if the mean is rounded
        mean[g] = work[X_MEAN + g] if work[X_SCALE + g] == work[X_SCALE + g] else np.inf
    reach = len(spots.down) - 1
    n_held = 2 * reach + 1
    high = np.empty((n_columns, width), np.float32)
    held = np.empty((n_held * n_columns, width), np.float32)
    total = np.empty(width, np.float32)
    near = np.empty(max(n_held, 2 * len(spots.along)), np.int64)
    weights = np.empty(len(near), np.float32)
    rounding = np.float32(1.2e-7 * 2 * (len(spots.down) + len(spots.along)))
    for row in range(n_rows + reach):
        if row < n_rows:
            _smooth_along(x, first, mean, spots, row, high, held[row % n_held * n_columns :], near, weights)
        middle = row - reach
        if middle < 0:
            continue
        start, stop = max(0, middle - reach), min(n_rows, row + 1)
        for column in range(n_columns):
            spot = spots.spot_at[middle, column]
            if spot < 0:
                continue
            for k in range(start, stop):
                near[k - start] = k % n_held * n_columns + column
                weights[k - start] = spots.down[abs(k - middle)]
            _weighted_sum(held, near, weights, stop - start, total)
            limit = np.float32(spots.limit[spot])
            least = limit - 2 * limit * rounding
            most = limit + 2 * limit * rounding
            near_limit = 0
            for g in range(width):
                out[spot, g] = total[g] >= limit
                near_limit += (total[g] >= least) & (total[g] <= most)
            if near_limit:
                for g in range(width):
                    if least <= total[g] <= most:
                        out[spot, g] = _exact_sum(x, first + g, mean[g], spots, spot) >= spots.limit[spot]
    return mean < np.inf


@compiled
def _smooth_along(  # pragma: no cover
    x: np.ndarray,
    first: int,
    mean: np.ndarray,
    spots: Raster,
    row: int,
    high: np.ndarray,
    smoothed: np.ndarray,
    near: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Smooth one row of the raster along its columns."""
    width, n_columns = high.shape[1], spots.spot_at.shape[1]
    for column in range(n_columns):
        spot = spots.spot_at[row, column]
        if spot >= 0:
            values, to = x[spot, first : first + width], high[column]
            for g in range(width):
                to[g] = values[g] > mean[g]
    reach = len(spots.along) - 1
    for column in range(n_columns):
        count = 0
        for k in range(max(0, column - reach), min(n_columns, column + reach + 1)):
            if spots.spot_at[row, k] >= 0:
                near[count], weights[count] = k, spots.along[abs(k - column)]
                count += 1
        _weighted_sum(high, near, weights, count, smoothed[column])


@compiled
def _weighted_sum(  # pragma: no cover
    rows: np.ndarray, which: np.ndarray, weights: np.ndarray, count: int, total: np.ndarray
) -> None:
    """Add up weighted rows, four at a time to load and store the sums less often."""
    width = len(total)
    rest = count % 4
    if rest == 0:
        total[:] = 0
    elif rest == 1:
        w1, one = weights[0], rows[which[0]]
        for g in range(width):
            total[g] = w1 * one[g]
    elif rest == 2:
        w1, w2, one, two = weights[0], weights[1], rows[which[0]], rows[which[1]]
        for g in range(width):
            total[g] = w1 * one[g] + w2 * two[g]
    else:
        w1, w2, w3 = weights[0], weights[1], weights[2]
        one, two, three = rows[which[0]], rows[which[1]], rows[which[2]]
        for g in range(width):
            total[g] = w1 * one[g] + w2 * two[g] + w3 * three[g]
    for k in range(rest, count, 4):
        w1, w2, w3, w4 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        one, two, three, four = rows[which[k]], rows[which[k + 1]], rows[which[k + 2]], rows[which[k + 3]]
        for g in range(width):
            total[g] += (w1 * one[g] + w2 * two[g]) + (w3 * three[g] + w4 * four[g])


@compiled
def _exact_sum(x: np.ndarray, gene: int, mean: float, spots: Raster, spot: int) -> float:  # pragma: no cover
    """Return the smoothed pattern at one spot, in float64."""
    n_rows, n_columns = spots.spot_at.shape
    row, column = spots.row[spot], spots.column[spot]
    down, along = len(spots.down) - 1, len(spots.along) - 1
    total = 0.0
    for i in range(max(0, row - down), min(n_rows, row + down + 1)):
        for k in range(max(0, column - along), min(n_columns, column + along + 1)):
            other = spots.spot_at[i, k]
            if other >= 0 and x[other, gene] > mean:
                total += spots.down[abs(i - row)] * spots.along[abs(k - column)]
    return total


@compiled
def overlaps(one: np.ndarray, two: np.ndarray, varies: np.ndarray, out: np.ndarray) -> None:  # pragma: no cover
    """Write intersection over union per column of two patterns, NaN if both are empty or a gene is constant."""
    width = one.shape[1]
    both, either = np.zeros(width, np.int32), np.zeros(width, np.int32)
    for i in range(one.shape[0]):
        first, second = one[i], two[i]
        for g in range(width):
            both[g] += first[g] & second[g]
            either[g] += first[g] | second[g]
    for g in range(width):
        out[g] = both[g] / either[g] if either[g] and varies[g] else np.nan
