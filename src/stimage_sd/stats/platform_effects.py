"""Efficiency of genes on one platform relative to another, independent of the shares of cell types.

Source: Cable et al. 2022 (RCTD, Nature Biotechnology 40), "platform effects". There the shares come from a pseudo-bulk.
Here they come from the cells, so a section of a single cell type is not mistaken for a platform effect.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import softmax

#: maximum number of expectation-maximization rounds; change of a log efficiency below which they end
_ROUNDS, _TOLERANCE = 50, 1e-3
#: smallest share of a gene in a type, so that a stray count does not exclude the type
_FLOOR = 1e-6


def gene_efficiencies(counts: csr_matrix, profiles: NDArray[np.floating]) -> NDArray[np.float64]:
    """Estimate the ratio of observed to expected counts per gene, given profiles of the cell types.

    - `counts`: counts of cells, ``(n_cells, n_genes)``.
    - `profiles`: share of each gene in the counts of each type, ``(n_types, n_genes)``.
    - returns: ``float64 (n_genes,)``, positive, with geometric mean 1.

    A count in a cell of type t is of gene g with probability ``p_tg ∝ e_g · m_tg``, for profiles m and efficiencies e.
    Expectation-maximization estimates the type of each cell, the shares of the types, and e. One count is added to the
    observed and expected counts per gene, so that genes with few counts stay close to the others.

    >>> import numpy as np
    >>> from scipy.sparse import csr_matrix
    >>> gene_efficiencies(csr_matrix([[400, 100]] * 50), np.array([[0.5, 0.5]])).round(2).tolist()
    [2.0, 0.5]
    """
    mean = np.maximum(np.asarray(profiles, dtype=np.float64), _FLOOR)
    mean /= mean.sum(axis=1, keepdims=True)
    depth, observed = (np.asarray(counts.sum(axis=axis), dtype=np.float64).ravel() for axis in (1, 0))
    efficiency, shares = np.ones(mean.shape[1]), np.full(len(mean), 1 / len(mean))
    for _ in range(_ROUNDS):
        scaled = mean * efficiency
        whole = scaled.sum(axis=1, keepdims=True)
        belongs = softmax(counts @ np.log(scaled / whole).T + np.log(shares), axis=1)
        shares = (belongs.sum(axis=0) + 1) / (len(depth) + len(mean))
        expected = (depth @ belongs / whole.ravel()) @ mean
        new = (observed + 1) / (expected + 1)
        new /= np.exp(np.log(new).mean())
        change = np.abs(np.log(new / efficiency)).max()
        efficiency = new
        if change < _TOLERANCE:
            break
    return efficiency
