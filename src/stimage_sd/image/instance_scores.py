"""Scores of found objects against true objects, both given as label maps.

All scores come from two sparse tables: the pixels shared by each pair of a true and a found object, and the matched
pairs. Objects match if they overlap by more than half of their union. In a label map each object then has at most one
partner (Kirillov et al. 2019). An assignment is needed only where polygons of one side overlap each other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stimage_sd.image.assignment import one_to_one


class Overlaps(NamedTuple):
    """Objects of two label maps and their shared pixels.

    - `truth_labels`, `found_labels`: ``int64 (n_truth,)`` and ``(n_found,)``: labels in ascending order, without 0.
    - `truth_areas`, `found_areas`: areas in the same order, ``int64`` in px, ``float64`` for polygons.
    - `truth_rows`, `found_rows`: ``int64 (n_pairs,)``: rows of the objects in these lists, for pairs that share at
      least one pixel.
    - `shared`: ``int64 (n_pairs,)``: pixels that a pair shares.
    """

    truth_labels: NDArray[np.int64]
    found_labels: NDArray[np.int64]
    truth_areas: NDArray[np.number]
    found_areas: NDArray[np.number]
    truth_rows: NDArray[np.int64]
    found_rows: NDArray[np.int64]
    shared: NDArray[np.number]

    @property
    def iou(self) -> NDArray[np.float64]:
        """Return the intersection over union of each pair, ``float64 (n_pairs,)``."""
        union = self.truth_areas[self.truth_rows] + self.found_areas[self.found_rows] - self.shared
        return np.asarray(self.shared / union, dtype=np.float64)

    def among(self, truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> Overlaps:
        """Return the overlaps among selected true and found objects only."""
        kept = truth[self.truth_rows] & found[self.found_rows]
        return Overlaps(
            truth_labels=self.truth_labels[truth],
            found_labels=self.found_labels[found],
            truth_areas=self.truth_areas[truth],
            found_areas=self.found_areas[found],
            truth_rows=(np.cumsum(truth) - 1)[self.truth_rows[kept]],
            found_rows=(np.cumsum(found) - 1)[self.found_rows[kept]],
            shared=self.shared[kept],
        )


class Matches(NamedTuple):
    """Matched pairs of a true and a found object.

    - `truth_rows`, `found_rows`: ``int64 (n_matched,)``: rows of `Overlaps.truth_labels` and `Overlaps.found_labels`,
      each at most once.
    - `iou`: ``float64 (n_matched,)``, above the threshold.
    """

    truth_rows: NDArray[np.int64]
    found_rows: NDArray[np.int64]
    iou: NDArray[np.float64]


class InstanceScores(NamedTuple):
    """Agreement of found objects with true objects.

    Scores with a denominator of 0 are NaN, for example if an image has no true and no found objects.

    - `n_truth`, `n_found`, `n_matched`: number of true objects, of found objects, and of pairs with an IoU above the
      threshold.
    - `precision`, `recall`, `f1`: detection scores. `f1` is also called detection quality, DQ.
    - `segmentation_quality`: mean IoU of the matched pairs, SQ. It is 0 if there are objects but no matches.
    - `panoptic_quality`: product of `f1` and `segmentation_quality`, PQ (Kirillov et al. 2019).
    - `aggregated_jaccard`: AJI (Kumar et al. 2017). The pixels that true objects share with their best partner, over
      the union of these pairs plus the pixels of found objects without a partner.
    - `dice`: dice score over the pixels of all objects together.
    """

    n_truth: int
    n_found: int
    n_matched: int
    precision: float
    recall: float
    f1: float
    segmentation_quality: float
    panoptic_quality: float
    aggregated_jaccard: float
    dice: float


def overlaps(truth: NDArray[np.integer], found: NDArray[np.integer]) -> Overlaps:
    """Count the pixels shared by true and found objects.

    - `truth`, `found`: integer label maps of one shape, 0 outside objects. Labels need not be consecutive.
    - returns: the objects, their areas, and every pair that shares a pixel.

    >>> import numpy as np
    >>> pairs = overlaps(np.array([[1, 1, 0, 7]]), np.array([[0, 4, 4, 4]]))
    >>> pairs.truth_labels, pairs.found_areas, pairs.shared
    (array([1, 7]), array([3]), array([1, 1]))
    """
    truth, found = np.asarray(truth), np.asarray(found)
    if truth.shape != found.shape:
        raise ValueError(f"Expected label maps of one shape, found {truth.shape} and {found.shape}.")
    for name, labels in (("truth", truth), ("found", found)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"Expected `{name}` as a label map of integers, found {labels.dtype}.")
        if labels.size and labels.min() < 0:
            raise ValueError(f"Expected labels of at least 0 in `{name}`, found {labels.min()}.")
    truth_labels, truth_rows = np.unique(truth, return_inverse=True)
    found_labels, found_rows = np.unique(found, return_inverse=True)
    truth_rows, found_rows = truth_rows.ravel(), found_rows.ravel()
    pairs, shared = np.unique(truth_rows * max(len(found_labels), 1) + found_rows, return_counts=True)
    rows, columns = np.divmod(pairs, max(len(found_labels), 1))
    both = (truth_labels[rows] > 0) & (found_labels[columns] > 0)
    # rows among objects only; label 0, if present, comes first
    no_truth, no_found = int((truth_labels[:1] == 0).sum()), int((found_labels[:1] == 0).sum())
    return Overlaps(
        truth_labels=truth_labels[no_truth:].astype(np.int64),
        found_labels=found_labels[no_found:].astype(np.int64),
        truth_areas=np.bincount(truth_rows, minlength=len(truth_labels))[no_truth:].astype(np.int64),
        found_areas=np.bincount(found_rows, minlength=len(found_labels))[no_found:].astype(np.int64),
        truth_rows=(rows[both] - no_truth).astype(np.int64),
        found_rows=(columns[both] - no_found).astype(np.int64),
        shared=shared[both].astype(np.int64),
    )


def matches(pairs: Overlaps, *, threshold: float = 0.5) -> Matches:
    """Match objects by their intersection over union.

    - `pairs`: overlaps of the objects, from `overlaps`.
    - `threshold`: pairs with a larger IoU are the same object. Must be at least 0.5, so that partners are unique.
    - returns: the matched pairs, ordered by row of the true object. Where polygons of one side overlap, an object may
      have several candidates. The assignment then has as many pairs as possible, with the highest total IoU.

    >>> import numpy as np
    >>> matches(overlaps(np.array([[1, 1, 1, 2]]), np.array([[5, 5, 0, 0]]))).iou.round(2)
    array([0.67])
    """
    if not 0.5 <= threshold <= 1:
        raise ValueError(f"Expected `threshold` from 0.5 to 1, found {threshold}.")
    iou = pairs.iou
    same = np.flatnonzero(iou > threshold)
    same = same[one_to_one(pairs.truth_rows[same], pairs.found_rows[same], 1 - iou[same], most=0.5)]
    return Matches(pairs.truth_rows[same], pairs.found_rows[same], iou[same])


def instance_scores(
    truth: NDArray[np.integer], found: NDArray[np.integer], *, threshold: float = 0.5
) -> InstanceScores:
    """Score found objects against true objects.

    - `truth`, `found`: integer label maps of one shape, 0 outside objects.
    - `threshold`: IoU above which two objects are the same, at least 0.5.
    - returns: the scores.

    >>> import numpy as np
    >>> truth = np.array([[1, 1, 1, 0, 2, 2]])
    >>> found = np.array([[1, 1, 0, 0, 0, 3]])
    >>> scores = instance_scores(truth, found)
    >>> scores.n_matched, round(scores.f1, 2), round(scores.panoptic_quality, 2), scores.aggregated_jaccard
    (1, 0.5, 0.33, 0.6)
    """
    return scores_of_overlaps(overlaps(truth, found), threshold=threshold)


def scores_of_overlaps(pairs: Overlaps, *, threshold: float = 0.5) -> InstanceScores:
    """Score found objects against true objects from their overlaps, as `instance_scores` does.

    - `pairs`: overlaps of label maps, from `overlaps`, or of polygons.
    - `threshold`: IoU above which two objects are the same, at least 0.5.
    - returns: the scores.

    >>> import numpy as np
    >>> scores_of_overlaps(overlaps(np.array([[1, 1, 2]]), np.array([[1, 1, 0]]))).recall
    0.5
    """
    matched = matches(pairs, threshold=threshold)
    n_truth, n_found, n_matched = len(pairs.truth_labels), len(pairs.found_labels), len(matched.iou)
    f1 = _ratio(2 * n_matched, n_truth + n_found)
    quality = _ratio(float(matched.iou.sum()), n_matched) if n_matched else _ratio(0, n_truth + n_found)
    return InstanceScores(
        n_truth=n_truth,
        n_found=n_found,
        n_matched=n_matched,
        precision=_ratio(n_matched, n_found),
        recall=_ratio(n_matched, n_truth),
        f1=f1,
        segmentation_quality=quality,
        panoptic_quality=f1 * quality,
        aggregated_jaccard=_aggregated_jaccard(pairs),
        dice=_ratio(2 * float(pairs.shared.sum()), float(pairs.truth_areas.sum() + pairs.found_areas.sum())),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _aggregated_jaccard(pairs: Overlaps) -> float:
    """Compute AJI; true objects may share the same best found object."""
    # best pair of each true object: its last row when sorted by IoU; ties go to the first found object
    order = np.lexsort((-pairs.found_rows, pairs.iou, pairs.truth_rows))
    rows = pairs.truth_rows[order]
    best = order[np.append(rows[1:] != rows[:-1], True)] if len(rows) else order
    shared = float(pairs.shared[best].sum())
    taken = pairs.found_rows[best]
    either = float(pairs.truth_areas.sum() + pairs.found_areas[taken].sum()) - shared
    alone = np.ones(len(pairs.found_labels), dtype=bool)
    alone[taken] = False
    return _ratio(shared, either + float(pairs.found_areas[alone].sum()))
