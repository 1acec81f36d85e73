"""Spatial weights that users give: of one section, by section, or by a function of positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp

from stimage_sd.stats.lattice import neighbor_graph

Weights: TypeAlias = sp.spmatrix | sp.sparray
#: spatial weights, or weights by section, or a function from positions ``(n, 2)`` to weights
Graph: TypeAlias = Weights | Mapping[str, Weights] | Callable[[np.ndarray], Any]


def weights_of(graph: Graph | None, positions: np.ndarray, *, section: str) -> sp.csr_matrix:
    """Return the spatial weights of a section's tiles, by default of the neighbors on their lattice.

    Raises
    ------
    KeyError
        If weights are given by section, and those of this one are missing.
    ValueError
        If the weights are not sparse, or of another number of tiles. Or if the tiles are on no lattice and no weights
        are given.

    Examples
    --------
    >>> from functools import partial
    >>> from sklearn.neighbors import kneighbors_graph
    >>> corners = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [5.0, 5.0]])
    >>> weights_of(partial(kneighbors_graph, n_neighbors=2), corners, section="a").sum()
    np.float64(8.0)
    """
    if isinstance(graph, Mapping) and section not in graph:
        raise KeyError(f"Expected `graph` to have weights of section {section!r}, found {sorted(graph)}.")
    if graph is None:
        return sp.csr_matrix(neighbor_graph(positions))
    made: Any = graph[section] if isinstance(graph, Mapping) else graph
    made = made(positions) if callable(made) else made
    if not sp.issparse(made) or made.shape != (len(positions),) * 2:
        raise ValueError(
            f"Expected `graph` as sparse weights between the {len(positions)} compared tiles of section {section!r}, "
            f"found {type(made).__name__} of shape {np.shape(made)}."
        )
    return sp.csr_matrix(made)
