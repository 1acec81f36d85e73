"""Dispersion per gene for given means, and the interval level for a given coverage."""

from __future__ import annotations

import numpy as np
from scipy.special import digamma

from stimage_sd.likelihood.intervals import mixture_interval

#: bounds of r, and number of tiles used; more tiles hardly change r
_LEAST, _LARGEST = 1e-3, 1e4
_MOST_TILES = 4_000


def fit_dispersion(counts: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Fit the dispersion of each gene by maximum likelihood, given the means.

    - `counts`, `means`: ``(n_tiles, n_genes)``.
    - returns: r, ``float32 (n_genes,)``, within 1e-3 and 1e4.
    """
    if len(counts) > _MOST_TILES:
        chosen = np.sort(np.random.default_rng(0).choice(len(counts), _MOST_TILES, replace=False))
        counts, means = counts[chosen], means[chosen]
    counts, means = np.asarray(counts, dtype=np.float64), np.asarray(means, dtype=np.float64)

    def slope(r: np.ndarray) -> np.ndarray:
        terms = digamma(counts + r) - digamma(r) - np.log1p(means / r) + 1 - (r + counts) / (r + means)
        return np.asarray(terms.sum(axis=0))

    low, high = np.full(counts.shape[1], np.log(_LEAST)), np.full(counts.shape[1], np.log(_LARGEST))
    for _ in range(24):
        middle = (low + high) / 2
        rises = slope(np.exp(middle)) > 0
        low, high = np.where(rises, middle, low), np.where(rises, high, middle)
    return np.exp((low + high) / 2).astype(np.float32)


def interval_level(counts: np.ndarray, means: np.ndarray, dispersion: np.ndarray, *, coverage: float) -> float:
    """Find the nominal level at which central intervals cover a given share of counts.

    - `counts`, `means`: ``(n_tiles, n_genes)``, of tiles that were left out of training.
    - `dispersion`: r, ``(n_genes,)``.
    - `coverage`: share of counts to cover.
    - returns: the level, within 0.5 and 0.995.
    """
    if len(counts) > _MOST_TILES:
        chosen = np.sort(np.random.default_rng(0).choice(len(counts), _MOST_TILES, replace=False))
        counts, means = counts[chosen], means[chosen]
    r = np.broadcast_to(dispersion, means.shape).astype(np.float32)[None]
    p = (r / (r + means)).astype(np.float32)
    low, high = 0.5, 0.995
    for _ in range(7):
        middle = (low + high) / 2
        lower, upper = mixture_interval(r, p, coverage=middle)
        inside = ((counts >= lower) & (counts <= upper)).mean()
        low, high = (middle, high) if inside < coverage else (low, middle)
    return float(high)
