"""Link between the values of any predictor and counts: a negative binomial regression per gene."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from stimage_sd.likelihood import mean_only
from stimage_sd.likelihood.dispersion import fit_dispersion

#: precision of the normal prior on the slope of a standardized predictor
_PRIOR = 1.0
#: rounds of dispersion and regression, and steps of each regression
_ROUNDS, _STEPS = 3, 8
#: values per block of genes
_BLOCK = 1 << 22
#: standard deviations beyond the fitted values at which the link goes on as a constant
_BEYOND = 1.0


class Link(NamedTuple):
    """Mean counts of genes as exponential functions of a predictor: ``exp(intercept + slope * z)``.

    Here z is the value minus `center` over `scale`, clipped to `low` and `high`.

    - `center`, `scale`, `low`, `high`, `intercept`, `slope`: ``float64 (n_genes,)``. Slopes are not negative: a
      predictor that falls where counts rise counts for nothing.
    - `dispersion`: r, ``float64 (n_genes,)``.
    """

    center: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    intercept: np.ndarray
    slope: np.ndarray
    dispersion: np.ndarray

    def means(self, values: np.ndarray) -> np.ndarray:
        """Return mean counts at a depth of 1 for values ``(n_tiles, n_genes)``."""
        z = np.clip((values - self.center) / self.scale, self.low, self.high)
        return np.asarray(np.exp(self.intercept + self.slope * z))


def fit_link(values: np.ndarray, counts: sp.csr_matrix, factors: np.ndarray) -> Link:
    """Fit the link of each gene by penalized maximum likelihood, with its dispersion.

    - `values`: values of the predictor, ``(n_tiles, n_genes)``, on a scale where equal differences mean equal ratios of
      counts.
    - `counts`: ``(n_tiles, n_genes)`` sparse.
    - `factors`: depth of each tile, ``(n_tiles,)``. Depth multiplies means.
    - returns: the link. A standardized value has slope b with prior N(0, 1). Constant values and negative slopes give
      the mean-only fit.

    >>> import numpy as np
    >>> import scipy.sparse as sp
    >>> from stimage_sd.likelihood.link import fit_link
    >>> random = np.random.default_rng(0)
    >>> values = random.normal(size=(2000, 1))
    >>> counts = sp.csr_matrix(random.poisson(np.exp(1 + 0.5 * values)))
    >>> link = fit_link(values, counts, np.ones(2000))
    >>> bool(abs(link.slope[0] / link.scale[0] - 0.5) < 0.05)
    True
    """
    width = max(1, _BLOCK // len(values))
    blocks = [slice(start, start + width) for start in range(0, values.shape[1], width)]
    fits = [_fit(values[:, genes], counts[:, genes].toarray().astype(np.float64), factors) for genes in blocks]
    return Link(*(np.concatenate(parts) for parts in zip(*fits, strict=True)))


def _fit(values: np.ndarray, counts: np.ndarray, factors: np.ndarray) -> Link:
    center, scale = values.mean(axis=0), values.std(axis=0)
    constant = scale <= 1e-6 * np.maximum(np.abs(center), 1e-6)
    scale = np.where(constant, 1.0, scale)
    z = np.where(constant, 0.0, (values - center) / scale)
    depth = factors[:, None].astype(np.float64)
    floor = mean_only.fit_mean_only(counts, factors)
    intercept, slope, r = np.log(np.maximum(floor.mean, 1e-8)), np.zeros(len(center)), floor.r
    for _ in range(_ROUNDS):
        for _ in range(_STEPS):
            intercept, slope = _newton(z, counts, depth, intercept, slope, r)
        rises = slope > 0
        intercept, slope = np.where(rises, intercept, np.log(np.maximum(floor.mean, 1e-8))), np.where(rises, slope, 0)
        r = fit_dispersion(counts, depth * np.exp(intercept + slope * z)).astype(np.float64)
    low, high = z.min(axis=0) - _BEYOND, z.max(axis=0) + _BEYOND
    return Link(center, scale, low, high, intercept, slope, r)


def _newton(
    z: np.ndarray, counts: np.ndarray, depth: np.ndarray, intercept: np.ndarray, slope: np.ndarray, r: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Take a step of Fisher scoring for intercept and slope of every gene, of at most 1."""
    mean = depth * np.exp(np.clip(intercept + slope * z, -30, 30))
    weight = mean / (1 + mean / r)
    residual = (counts - mean) / (1 + mean / r)
    to_intercept, to_slope = residual.sum(axis=0), (residual * z).sum(axis=0) - _PRIOR * slope
    a, b, d = weight.sum(axis=0) + 1e-9, (weight * z).sum(axis=0), (weight * z**2).sum(axis=0) + _PRIOR
    determinant = np.maximum(a * d - b**2, 1e-12)
    steps = (d * to_intercept - b * to_slope) / determinant, (a * to_slope - b * to_intercept) / determinant
    return intercept + np.clip(steps[0], -1, 1), slope + np.clip(steps[1], -1, 1)
