"""Score predictions of sums over neighborhoods or regions instead of single tiles."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp

from stimage_sd import contract
from stimage_sd.likelihood.predictive import log_prob, nearest_interval


def groups_of(scale: int | np.ndarray, graph: sp.csr_matrix) -> sp.csr_matrix:
    """Return which tiles belong together, ``(n_groups, n_tiles)`` of zeros and ones.

    - `scale`: number of steps on the graph around each tile. Or the region of each tile, ``object (n_tiles,)``, `None`
      for tiles without one.
    - `graph`: neighbors of the tiles, ``(n_tiles, n_tiles)``.
    """
    if isinstance(scale, np.ndarray):
        codes, names = pd.factorize(scale)
        inside = np.flatnonzero(codes >= 0)
        if not len(inside):
            raise ValueError("No tile on a spot has a region in the column of `scale`.")
        return sp.csr_matrix((np.ones(len(inside)), (codes[inside], inside)), shape=(len(names), len(codes)))
    if scale != int(scale) or scale < 1:
        raise ValueError(f"Expected `scale` as a whole number of steps, at least 1, or a column, found {scale}.")
    step = ((graph != 0) + sp.eye_array(graph.shape[0])).astype(np.float64)
    reached = step
    for _ in range(int(scale) - 1):
        reached = reached @ step
    return sp.csr_matrix(reached != 0, dtype=np.float64)


def sums(made: contract.Compared, groups: sp.csr_matrix) -> contract.Compared:
    """Return the distributions of sums over groups of tiles.

    Counts of single tiles are independent given their distributions, so aleatoric variances add up. A gene's shift and
    a member's error are taken as the same on all tiles, so epistemic standard deviations add up.
    """
    mean, aleatoric = groups @ made.mean, groups @ made.aleatoric
    epistemic = (groups @ np.sqrt(made.epistemic)) ** 2
    return contract.Compared(mean, aleatoric, epistemic, mean, mean, made.shift_sd, groups @ made.size_factor)


def calibration_of_sums(made: contract.Compared, counts: np.ndarray, *, level: float) -> dict[str, np.ndarray]:
    """Return the coverage and the negative log-likelihood of sums per gene."""
    sd = np.zeros(counts.shape[1]) if made.shift_sd is None else made.shift_sd
    lower, upper = nearest_interval(made.mean, made.variance, sd, coverage=level)
    return {
        "coverage": ((counts >= lower) & (counts <= upper)).mean(axis=0),
        "nll": -log_prob(counts, made.mean, made.variance, sd).mean(axis=0),
    }
