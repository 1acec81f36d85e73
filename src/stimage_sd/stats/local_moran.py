"""Local Moran's I: where a map is high among high neighbors, or low among low ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike

from stimage_sd.stats.spatial import row_standardized

#: names of the quadrants: the spot's own value, then the mean of its neighbors
QUADRANTS = ("high-high", "low-low", "high-low", "low-high")
#: means of neighbors that differ by less are equal, in standard deviations
_TIE = 1e-9


class LocalMoran(NamedTuple):
    """Local Moran's I per spot and gene, all ``(n_obs, n_genes)``.

    Attributes
    ----------
    statistic
        Local I, float64. NaN for genes that are constant, and for spots without neighbors.
    quadrant
        Index into `QUADRANTS`, int8. -1 where the statistic is NaN.
    p_value
        Two-sided p-value of conditional permutations, float64.
    """

    statistic: np.ndarray
    quadrant: np.ndarray
    p_value: np.ndarray


def local_morans_i(
    values: ArrayLike,
    weights: scipy.sparse.spmatrix | scipy.sparse.sparray,
    other: ArrayLike | None = None,
    *,
    n_permutations: int = 999,
    seed: int = 0,
) -> LocalMoran:
    """Compute local Moran's I per spot and gene, or the bivariate one of two matrices.

    Parameters
    ----------
    values
        Expression, (n_obs, n_genes).
    weights
        Neighbor weights, sparse (n_obs, n_obs), not negative. Rows are scaled to sum to 1.
    other
        Second matrix, for the bivariate I: `values` at a spot against the mean of `other` over its neighbors.
    n_permutations
        Number of permutations. The smallest possible p-value is ``2 / (n_permutations + 1)``.
    seed
        Seed of the permutations, which all spots and genes share.

    Raises
    ------
    ValueError
        If shapes do not fit, weights are negative, or the number of permutations is below 1.

    Notes
    -----
    Anselin 1995. The statistic is ``(n - 1) / n * z_i * sum_j w_ij z_j`` of standardized values, as in
    ``esda.Moran_Local`` and ``esda.Moran_Local_BV``. For the p-value of a spot, its neighbors get the values of other
    spots at random. The p-value is twice that of the nearer tail, ``2 * esda.Moran_Local.p_sim``.

    Examples
    --------
    >>> from stimage_sd.stats.lattice import neighbor_graph
    >>> grid = np.array([[x, y] for x in range(4) for y in range(4)], dtype=float)
    >>> found = local_morans_i(grid[:, :1], neighbor_graph(grid), n_permutations=99)
    >>> [QUADRANTS[quadrant] for quadrant in found.quadrant[[0, -1], 0]]
    ['low-low', 'high-high']
    """
    if n_permutations < 1:
        raise ValueError(f"Expected `n_permutations` of at least 1, found {n_permutations}.")
    own = _standardized(values)
    beside = own if other is None else _standardized(other)
    if own.shape != beside.shape:
        raise ValueError(f"Expected `other` of the shape of `values`, {own.shape}, found {beside.shape}.")
    n_obs = len(own)
    graph = row_standardized(weights, n_obs)
    lag = graph @ beside
    statistic = (n_obs - 1) / n_obs * own * lag
    # a zero counts as low, as in esda
    quadrant = np.select([(own > 0) & (lag > 0), (own <= 0) & (lag <= 0), (own > 0) & (lag <= 0)], [0, 1, 2], 3).astype(
        np.int8
    )
    p_value = _p_values(graph, beside, own, lag, n_permutations, seed)
    unknown = np.isnan(own) | np.isnan(lag) | (np.diff(graph.indptr) == 0)[:, None]
    for array, missing in ((statistic, np.nan), (quadrant, -1), (p_value, np.nan)):
        array[unknown] = missing
    return LocalMoran(statistic, quadrant, p_value)


def _standardized(values: ArrayLike) -> np.ndarray:
    """Standardize genes. Constant genes become NaN."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"Expected a matrix (n_obs, n_genes), found shape {matrix.shape}.")
    shifted = matrix - matrix[:1]
    shifted -= shifted.mean(axis=0)
    spread = shifted.std(axis=0)
    return shifted / np.where((np.ptp(matrix, axis=0) > 0) & (spread > 0), spread, np.nan)


def _p_values(
    graph: scipy.sparse.csr_array, beside: np.ndarray, own: np.ndarray, lag: np.ndarray, n_permutations: int, seed: int
) -> np.ndarray:
    """Return two-sided p-values of conditional permutations: neighbors of a spot are drawn from all other spots."""
    n_obs, n_genes = beside.shape
    most = int(np.diff(graph.indptr).max(initial=0))
    random = np.random.default_rng(seed)
    drawn = np.stack([random.choice(n_obs - 1, most, replace=False) for _ in range(n_permutations)])
    p_value = np.empty((n_obs, n_genes))
    for spot in range(n_obs):
        shares = graph.data[graph.indptr[spot] : graph.indptr[spot + 1]]
        others = drawn[:, : len(shares)]
        others = others + (others >= spot)  # all spots but this one
        by_chance = np.einsum("k,pkg->pg", shares, beside[others])
        # which tail of the neighbors' mean is which tail of the statistic depends on the sign of the spot's value
        beyond = np.sign(own[spot]) * (by_chance - lag[spot])
        rarer = np.minimum((beyond >= -_TIE).sum(axis=0), (beyond <= _TIE).sum(axis=0))
        p_value[spot] = np.minimum(2 * (rarer + 1) / (n_permutations + 1), 1.0)
    return p_value
