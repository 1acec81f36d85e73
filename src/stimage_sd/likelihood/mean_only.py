"""Mean-only baseline: one negative binomial per gene, the same on every spot."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.special
from scipy.optimize.elementwise import find_root


class MeanOnlyFit(NamedTuple):
    """Mean-only baseline, one negative binomial per gene for all spots.

    - `mean`: mean count per gene at a size factor of 1, float64 of shape (n_genes,).
    - `r`: inverse dispersion per gene, float64 of shape (n_genes,).
    """

    mean: np.ndarray
    r: np.ndarray

    @property
    def p(self) -> np.ndarray:
        """Return the probability of success per gene at a size factor of 1, float64 of shape (n_genes,)."""
        return self.r / (self.r + self.mean)


def fit_mean_only(
    counts: np.ndarray | scipy.sparse.spmatrix | scipy.sparse.sparray,
    size_factors: np.ndarray | None = None,
) -> MeanOnlyFit:
    """Fit one negative binomial per gene by maximum likelihood, all genes at once.

    - `counts`: raw counts, (n_obs, n_genes), dense or sparse.
    - `size_factors`: relative depth per spot, (n_obs,), positive. The mean of spot `i` is its size factor times the
      mean of the gene. None means 1 for all spots.
    - returns: per gene, the mean ``sum(counts) / sum(size_factors)`` and the inverse dispersion `r`. The value of `r`
      maximizes the likelihood given that mean, within 1e-6 and 1e6. Genes no more variable than a Poisson get the upper
      bound. Without size factors this is the joint maximum. With size factors the mean is the Poisson estimate.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.mean_only import fit_mean_only
    >>> fit = fit_mean_only(np.array([[0, 2], [0, 2], [9, 2], [3, 2]]))
    >>> fit.mean.round(1).tolist(), fit.r.round(3).tolist()
    ([3.0, 2.0], [0.369, 1000000.0])
    """
    matrix = scipy.sparse.csc_array(counts, dtype=np.float64)
    n_obs, n_genes = matrix.shape
    _check_counts(matrix.data)
    if size_factors is None:
        factors = np.ones(n_obs)
    else:
        factors = np.asarray(size_factors, dtype=np.float64)
        if factors.shape != (n_obs,) or not np.all(factors > 0) or not np.all(np.isfinite(factors)):
            raise ValueError(
                f"Expected `size_factors` to be {n_obs} positive numbers, one per row of `counts`, "
                f"found shape {factors.shape} with minimum {factors.min(initial=np.inf)}."
            )
    expected = np.asarray(matrix.sum(axis=0)).ravel() / factors.sum()
    score = _dispersion_score(matrix, factors, expected)
    return MeanOnlyFit(expected, np.exp(_falling_root(score, np.log(1e-6), np.log(1e6), n_genes)))


def floor(
    counts: np.ndarray | scipy.sparse.spmatrix | scipy.sparse.sparray, size_factors: np.ndarray | None = None
) -> np.ndarray:
    """Return mean and dispersion of the mean-only fit per gene, bounded so that every count has a likelihood.

    - `counts`, `size_factors`: as in `fit_mean_only`.
    - returns: ``float32 (2, n_genes)``: means of at least half a count over all rows, dispersions from 1e-3 to 1e4.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.mean_only import floor
    >>> floor(np.array([[0, 0], [4, 0]]))[0].tolist()
    [2.0, 0.25]
    """
    fit = fit_mean_only(counts, size_factors)
    # a gene without counts in training may have counts later, so assume half a count over all tiles
    mean = np.maximum(fit.mean, 0.5 / counts.shape[0])
    dispersion = np.clip(np.nan_to_num(fit.r, nan=1.0, posinf=1e4), 1e-3, 1e4)
    return np.stack([mean, dispersion]).astype(np.float32)


def _check_counts(values: np.ndarray) -> None:
    wrong = ~((values >= 0) & (values == np.floor(values)) & np.isfinite(values))
    if wrong.any():
        raise ValueError(
            f"Expected raw counts (integers of zero or more), found {values[wrong][0]} among others. "
            "Pass the table's raw counts, not normalized or log-transformed values."
        )


def _dispersion_score(
    matrix: scipy.sparse.csc_array, factors: np.ndarray, expected: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the derivative of each gene's log-likelihood in ``log r``, as a function of ``log r``."""
    n_genes = matrix.shape[1]
    genes = np.repeat(np.arange(n_genes), np.diff(matrix.indptr))
    # Digammas depend on the count alone, so they are computed once per distinct count of a gene.
    n_values = int(matrix.data.max(initial=0)) + 1
    keys, repeats = np.unique(genes * n_values + matrix.data.astype(np.int64), return_counts=True)
    value_gene, value = np.divmod(keys, n_values)
    depths, n_depths = np.unique(factors, return_counts=True)
    sums = np.asarray(matrix.sum(axis=0)).ravel()

    def score(log_r: np.ndarray) -> np.ndarray:
        r = np.exp(log_r)
        digammas = scipy.special.digamma(value + r[value_gene]) - scipy.special.digamma(r)[value_gene]
        # without any counts, bincount returns integers
        total = np.bincount(value_gene, weights=repeats * digammas, minlength=n_genes).astype(np.float64)
        ratio = expected / r
        for depth, number in zip(depths, n_depths, strict=True):
            total += number * (depth * ratio / (1 + depth * ratio) - np.log1p(depth * ratio))
        if len(depths) == 1:
            return r * (total - sums / (r + depths[0] * expected))
        observed = matrix.data / (r[genes] + factors[matrix.indices] * expected[genes])
        return r * (total - np.bincount(genes, weights=observed, minlength=n_genes))

    return score


def _falling_root(function: Callable[[np.ndarray], np.ndarray], low: float, high: float, size: int) -> np.ndarray:
    """Find where an elementwise function falls through zero, or return a bound if it does not."""
    at = np.full(size, low)

    def part(values: np.ndarray, index: np.ndarray) -> np.ndarray:
        # SciPy asks again only for the elements whose root is not known yet
        at[index] = values
        return function(at)[index]

    never, always = function(at) <= 0, function(np.full(size, high)) >= 0
    root = find_root(part, (at.copy(), high), args=(np.arange(size),), tolerances={"xatol": 1e-7}).x
    return np.where(never, low, np.where(always, high, root))
