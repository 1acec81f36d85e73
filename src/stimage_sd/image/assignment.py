"""One-to-one assignment of objects: as many pairs as possible, then lowest total cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components


def one_to_one(
    rows: NDArray[np.integer], columns: NDArray[np.integer], cost: NDArray[np.floating], *, most: float
) -> NDArray[np.int64]:
    """Choose pairs from candidates so that every object has at most one partner.

    - `rows`, `columns`: numbers of the objects of the candidate pairs, ``(n,)`` each.
    - `cost`: cost of each pair, from 0 to `most`.
    - `most`: largest possible cost of a pair.
    - returns: numbers of the chosen pairs, in the order of `rows`.

    The assignment has the most pairs, and among such assignments the lowest total cost (Hungarian algorithm). Each
    connected group of candidates is assigned separately, which is fast for the cells of a slide.

    >>> import numpy as np
    >>> one_to_one(np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([0.1, 0.4, 0.4]), most=1.0).tolist()
    [1, 2]
    """
    if len(rows) == 0:
        return np.empty(0, dtype=np.int64)
    n_rows = int(rows.max()) + 1
    size = n_rows + int(columns.max()) + 1
    graph = csr_matrix((np.ones(len(rows)), (rows, columns + n_rows)), shape=(size, size))
    group = connected_components(graph, directed=False)[1][rows]
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    chosen = np.concatenate([_of_group(part, rows, columns, cost, most) for part in np.split(order, starts[1:])])
    return chosen[np.argsort(rows[chosen], kind="stable")]


def _of_group(
    pairs: NDArray[np.int64], rows: NDArray[np.integer], columns: NDArray[np.integer], cost: NDArray[np.floating],
    most: float,
) -> NDArray[np.int64]:  # fmt: skip
    """Choose among the pairs of one connected group."""
    if len(pairs) == 1:
        return pairs
    (own_rows, row), (own_columns, column) = (np.unique(of[pairs], return_inverse=True) for of in (rows, columns))
    # a cost so high that one more pair always pays off
    far = 2.0 * most * (min(len(own_rows), len(own_columns)) + 1)
    table, pair_at = np.full((len(own_rows), len(own_columns)), far), np.full((len(own_rows), len(own_columns)), -1)
    table[row, column], pair_at[row, column] = cost[pairs], pairs
    chosen = pair_at[linear_sum_assignment(table)]
    return np.asarray(chosen[chosen >= 0], dtype=np.int64)
