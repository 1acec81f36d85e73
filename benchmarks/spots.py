"""Spots of a lattice with smooth, noisy genes, for comparisons of scores over genes."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from stimage_sd.stats.lattice import neighbor_graph

N_GENES = 1_522
SPOTS = (500, 5_000, 50_000)


def made(n_spots: int) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
    """Predicted and measured log counts, ``(n_spots, 1522)``, and row-standardized weights of hexagonal neighbors."""
    random = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n_spots)))
    row, column = np.divmod(np.arange(n_spots), side)
    positions = np.stack([column + 0.5 * (row % 2), row * np.sqrt(0.75)], axis=1) * 100.0
    waves = random.normal(0, 4 / side, (2, 30))
    basis = np.sin(np.stack([column, row], axis=1) @ waves + random.uniform(0, 6, 30))
    mean = np.exp(0.5 + basis @ random.normal(0, 0.25, (30, N_GENES)))
    weights = sp.csr_matrix(neighbor_graph(positions))
    weights = sp.csr_matrix(sp.diags(1 / weights.sum(axis=1).A1) @ weights)
    return np.log1p(mean), np.log1p(random.poisson(mean)), weights


def by_hand(one: np.ndarray, other: np.ndarray, weights: sp.csr_matrix) -> float:
    """Moran's I of two columns, row-standardized weights: the simplest correct version."""
    one, other = ((values - values.mean()) / values.std() for values in (one, other))
    return float(one @ (weights @ other) / len(one))


def agreement(values: np.ndarray, expected: np.ndarray, some: np.ndarray) -> dict[str, float]:
    """Figures to keep of all genes' scores: their mean, and the largest difference from what another found of some."""
    return {
        "mean": round(float(np.mean(values)), 8),
        "max_difference": float(np.abs(values[some] - expected).max()),
        "compared_genes": len(some),
    }
