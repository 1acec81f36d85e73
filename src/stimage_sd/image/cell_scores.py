"""Scores of predicted cell types against true ones: detection, classes, calibration.

Class scores follow section 4.2 of Graham et al. 2019. The F1 of a class counts a wrong class twice as much as a missed
or false cell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from sklearn.metrics import roc_auc_score

from stimage_sd.image.assignment import one_to_one

#: weights of a wrong class (predicted, true), a false cell, and a missed cell
_F1_WEIGHTS = (2.0, 2.0, 1.0, 1.0)


class ClassScores(NamedTuple):
    """Scores of classes, each ``(n_classes,)``, NaN where a score has no cells.

    - `n_truth`, `n_found`: number of true and of predicted cells of the class.
    - `f1_hovernet`: F1 of the class as published for HoVer-Net, over matched and unmatched cells.
    - `precision`, `recall`, `f1`: standard scores. A predicted cell is correct if it is matched to a true cell of the
      same class.
    """

    n_truth: NDArray[np.int64]
    n_found: NDArray[np.int64]
    f1_hovernet: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


def match_centers(
    truth: NDArray[np.floating], found: NDArray[np.floating], *, radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match cells by their centers: as many pairs as possible, then least total distance.

    - `truth`, `found`: cell centers, ``(n, 2)`` and ``(m, 2)``, in one unit.
    - `radius`: largest distance of a pair, in the same unit.
    - returns: rows of the matched pairs in `truth` and in `found`, in the order of `truth`. Each row appears at most
      once.

    Pairs are chosen by `stimage_sd.image.assignment.one_to_one`.

    >>> import numpy as np
    >>> match_centers(np.array([[0.0, 0], [9, 0]]), np.array([[9.0, 2], [50, 0]]), radius=12)
    (array([1]), array([0]))
    """
    nothing = np.empty(0, dtype=np.int64)
    if len(truth) == 0 or len(found) == 0:
        return nothing, nothing
    near = KDTree(truth).sparse_distance_matrix(KDTree(found), radius, output_type="coo_matrix")
    rows, columns, apart = near.row.astype(np.int64), near.col.astype(np.int64), near.data
    chosen = one_to_one(rows, columns, apart, most=radius)
    return rows[chosen], columns[chosen]


def confusion(truth: NDArray[np.integer], found: NDArray[np.integer], *, n_classes: int) -> NDArray[np.int64]:
    """Count pairs of true (rows) and predicted (columns) classes of matched cells.

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

    - `truth`, `found`: class of every true and every predicted cell, 0 to ``n_classes - 1``.
    - `pairs`: rows of the matched cells in `truth` and in `found`.
    - `n_classes`: number of classes.
    - returns: the scores.

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
    """Compute the entropy of class probabilities, scaled from 0 (certain) to 1 (uniform).

    - `probabilities`: class probabilities, ``(n, n_classes)``.
    - returns: ``float64 (n,)``.

    >>> import numpy as np
    >>> entropy(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    p = np.asarray(probabilities, dtype=np.float64)
    terms = np.where(p > 0, -p * np.log(np.maximum(p, 1e-300)), 0.0)
    return np.asarray(terms.sum(axis=1) / np.log(max(p.shape[1], 2)))


def calibration_error(confidence: NDArray[np.floating], right: NDArray[np.bool_], *, n_bins: int = 10) -> float:
    """Compute the expected calibration error, the mean difference of accuracy and confidence.

    - `confidence`: probability of the predicted class, ``(n,)``.
    - `right`: whether the predicted class is correct, ``(n,)``.
    - `n_bins`: number of bins of equal width between 0 and 1.
    - returns: mean over cells of the absolute difference in their bin (Naeini et al. 2015), NaN without cells.

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
    """Return the ROC AUC of uncertainty for detecting wrong predictions, NaN if all are right or all wrong.

    >>> import numpy as np
    >>> separation(np.array([0.1, 0.9, 0.2]), np.array([True, False, True]))
    1.0
    """
    right = np.asarray(right, dtype=bool)
    if right.all() or not right.any():
        return float("nan")
    return float(roc_auc_score(~right, uncertainty))
