"""How well typed cells agree with true ones: detection, classes, calibration.

Source of the scores of classes: Graham et al. 2019, section 4.2: a class' F1 counts a wrong class twice as much as a
cell that is missed or made up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from sklearn.metrics import roc_auc_score

#: weights of a wrong class of either kind, of a cell that is made up, and of one that is missed
_F1_WEIGHTS = (2.0, 2.0, 1.0, 1.0)


class ClassScores(NamedTuple):
    """Scores of classes, each ``float64 (n_classes,)``.

    A score of nothing is NaN: a class that is neither true nor predicted.

    Attributes
    ----------
    n_truth, n_found
        Cells of the class.
    f1_hovernet
        The published F1 of a class, over matched and unmatched cells.
    precision, recall, f1
        The same counted plainly: a found cell is right where it is matched to a true one of its class.
    """

    n_truth: NDArray[np.int64]
    n_found: NDArray[np.int64]
    f1_hovernet: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


def match_centres(
    truth: NDArray[np.floating], found: NDArray[np.floating], *, radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match cells by their centres: as many as can be, and then the nearest ones.

    Parameters
    ----------
    truth, found
        ``(n, 2)`` and ``(m, 2)``, in one unit.
    radius
        Farthest that a pair may be apart.

    Returns
    -------
    Rows of the matched pairs in `truth` and in `found`, each at most once, in the order of `truth`.

    Notes
    -----
    The assignment of least total distance (Hungarian), group of neighbours by group, so that it is quick for a slide's
    cells.

    Examples
    --------
    >>> import numpy as np
    >>> match_centres(np.array([[0.0, 0], [9, 0]]), np.array([[9.0, 2], [50, 0]]), radius=12)
    (array([1]), array([0]))
    """
    nothing = np.empty(0, dtype=np.int64)
    if len(truth) == 0 or len(found) == 0:
        return nothing, nothing
    near = KDTree(truth).sparse_distance_matrix(KDTree(found), radius, output_type="coo_matrix")
    rows, columns, apart = near.row.astype(np.int64), near.col.astype(np.int64), near.data
    if len(rows) == 0:
        return nothing, nothing
    graph = csr_matrix((np.ones(len(rows)), (rows, columns + len(truth))), shape=(len(truth) + len(found),) * 2)
    group = connected_components(graph, directed=False)[1][rows]
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    pairs = [_assigned(rows[part], columns[part], apart[part], radius) for part in np.split(order, starts[1:])]
    matched = np.concatenate(pairs)
    matched = matched[np.argsort(matched[:, 0], kind="stable")]
    return matched[:, 0], matched[:, 1]


def _assigned(
    rows: NDArray[np.int64], columns: NDArray[np.int64], apart: NDArray[np.float64], radius: float
) -> NDArray[np.int64]:
    """Pairs of one group of neighbours, ``(n, 2)``."""
    if len(rows) == 1:
        return np.stack([rows, columns], axis=1)
    (own_rows, row), (own_columns, column) = (np.unique(of, return_inverse=True) for of in (rows, columns))
    # so far that one pair more is always worth it
    far = 2.0 * radius * (min(len(own_rows), len(own_columns)) + 1)
    cost = np.full((len(own_rows), len(own_columns)), far)
    cost[row, column] = apart
    chosen = linear_sum_assignment(cost)
    real = cost[chosen] < far
    return np.stack([own_rows[chosen[0][real]], own_columns[chosen[1][real]]], axis=1)


def confusion(truth: NDArray[np.integer], found: NDArray[np.integer], *, n_classes: int) -> NDArray[np.int64]:
    """Count pairs of true (rows) and predicted (columns) classes of matched cells.

    Examples
    --------
    >>> import numpy as np
    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), n_classes=2).tolist()
    [[1, 0], [1, 1]]
    """
    pairs = np.asarray(truth, dtype=np.int64) * n_classes + np.asarray(found, dtype=np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def class_scores(
    truth: NDArray[np.integer],
    found: NDArray[np.integer],
    pairs: tuple[NDArray[np.integer], NDArray[np.integer]],
    *,
    n_classes: int,
) -> ClassScores:
    """Score the classes of matched and unmatched cells.

    Parameters
    ----------
    truth, found
        Class of every true and every found cell, 0 to ``n_classes - 1``.
    pairs
        Rows of the matched cells in `truth` and in `found`.
    n_classes
        How many classes there are.

    Returns
    -------
    The scores.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([0, 1, 2])
    >>> class_scores(np.array([0, 0, 1]), np.array([0, 1, 1]), (rows, rows), n_classes=2).f1.round(2)
    array([0.67, 0.67])
    """
    truth, found = np.asarray(truth), np.asarray(found)
    table = confusion(truth[pairs[0]], found[pairs[1]], n_classes=n_classes)
    n_truth, n_found = (np.bincount(of, minlength=n_classes) for of in (truth, found))
    right = np.diag(table)
    wrong_found, wrong_truth = table.sum(axis=0) - right, table.sum(axis=1) - right
    made_up, missed = n_found - table.sum(axis=0), n_truth - table.sum(axis=1)
    weighted = sum(
        weight * count for weight, count in zip(_F1_WEIGHTS, (wrong_found, wrong_truth, made_up, missed), strict=True)
    )
    return ClassScores(
        n_truth=n_truth,
        n_found=n_found,
        f1_hovernet=_ratios(2 * right, 2 * right + weighted),
        precision=_ratios(right, n_found),
        recall=_ratios(right, n_truth),
        f1=_ratios(2 * right, n_truth + n_found),
    )


def _ratios(part: NDArray[np.generic], whole: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=np.asarray(whole) > 0)


def entropy(probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
    """Entropy of class probabilities, in units of the most that so many classes can have: 0 sure, 1 none the wiser.

    Parameters
    ----------
    probabilities
        ``(n, n_classes)``.

    Returns
    -------
    ``float64 (n,)``.

    Examples
    --------
    >>> import numpy as np
    >>> entropy(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    p = np.asarray(probabilities, dtype=np.float64)
    terms = np.where(p > 0, -p * np.log(np.maximum(p, 1e-300)), 0.0)
    return np.asarray(terms.sum(axis=1) / np.log(max(p.shape[1], 2)))


def calibration_error(confidence: NDArray[np.floating], right: NDArray[np.bool_], *, n_bins: int = 10) -> float:
    """Compute the expected calibration error: how far the share that is right is from what was claimed.

    Parameters
    ----------
    confidence
        ``(n,)``, probability of the predicted class.
    right
        ``(n,)``, whether it is the true one.
    n_bins
        Bins of equal width between 0 and 1.

    Returns
    -------
    The mean over cells of the difference of their bin (Naeini et al. 2015); NaN without cells.

    Examples
    --------
    >>> import numpy as np
    >>> calibration_error(np.array([0.8, 0.8, 0.8, 0.8, 0.8]), np.array([1, 1, 1, 1, 0], bool))
    0.0
    """
    if len(confidence) == 0:
        return float("nan")
    bins = np.minimum((np.asarray(confidence) * n_bins).astype(np.int64), n_bins - 1)
    claimed, true = (np.bincount(bins, of, minlength=n_bins) for of in (confidence, np.asarray(right, dtype=float)))
    return round(float(np.abs(claimed - true).sum() / len(confidence)), 12)


def separation(uncertainty: NDArray[np.floating], right: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of telling wrong from right by uncertainty; NaN where all are alike.

    Examples
    --------
    >>> import numpy as np
    >>> separation(np.array([0.1, 0.9, 0.2]), np.array([True, False, True]))
    1.0
    """
    right = np.asarray(right, dtype=bool)
    if right.all() or not right.any():
        return float("nan")
    return float(roc_auc_score(~right, uncertainty))
