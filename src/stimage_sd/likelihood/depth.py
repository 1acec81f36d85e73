"""Size factors: how the sequencing depth of a spot changes its counts.

Sequencing keeps each molecule by chance, and a spot of lower depth keeps fewer molecules. Binomial thinning of NB(r, p)
counts by ``s`` gives ``NB(r, p')`` with odds ``(1 - p') / p' = s (1 - p) / p``. The mean is multiplied by ``s``, and
`r` stays the same. For ``s`` above 1, multiplying a gamma-distributed Poisson rate by ``s`` gives the same result.
"""

from __future__ import annotations

import numpy as np

#: smallest size factor, used for spots without counts
_LEAST = 1e-3


def median_total(totals: np.ndarray) -> float:
    """Return the median total count per spot, which corresponds to a size factor of 1.

    - `totals`: total count per spot, over all measured genes.
    - returns: the median, at least 1.

    >>> from stimage_sd.likelihood.depth import median_total
    >>> median_total([500.0, 1000.0, 4000.0])
    1000.0
    """
    return max(float(np.median(totals)), 1.0)


def size_factors(totals: np.ndarray, total: float) -> np.ndarray:
    """Compute the size factor of each spot, its total count divided by a reference total.

    - `totals`: total count per spot, over all measured genes.
    - `total`: total count that corresponds to a size factor of 1.
    - returns: size factors, ``float64 (n_spots,)``, at least 0.001.

    >>> from stimage_sd.likelihood.depth import size_factors
    >>> size_factors([500.0, 0.0], 1000.0).tolist()
    [0.5, 0.001]
    """
    return np.maximum(np.asarray(totals, dtype=np.float64) / total, _LEAST)


def at_depth(p: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Convert the success probability of NB(r, p) to another depth, at the same `r`.

    - `p`: probability of success at a size factor of 1, ``(n_members, n_tiles, n_genes)``.
    - `factors`: size factor per tile, ``(n_tiles,)``.
    - returns: ``p / (p + s (1 - p))``, ``float64`` of the shape of `p`. In float32 the mean would be lost for `p` near
      1.

    >>> import numpy as np
    >>> from stimage_sd.likelihood.depth import at_depth
    >>> at_depth(np.array([[[0.5]]]), np.array([3.0])).tolist()
    [[[0.25]]]
    """
    odds = np.asarray(factors, dtype=np.float64)[:, None] * (1.0 - np.asarray(p, dtype=np.float64))
    return np.asarray(p / (p + odds))
