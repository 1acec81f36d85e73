"""Scores of found objects are what counting pair by pair gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stimage_sd.image.instance_scores import instance_scores, matches, overlaps

MAPS = hnp.arrays(np.int32, (6, 7), elements=st.integers(0, 4))


def brute_force(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The definitions, written out: a set of pixels an object, every pair compared."""

    def objects(labels: np.ndarray) -> list[set[tuple[int, int]]]:
        return [set(map(tuple, np.argwhere(labels == label).tolist())) for label in np.unique(labels) if label]

    true, hits = objects(truth), objects(found)
    iou = [[len(one & other) / len(one | other) for other in hits] for one in true]
    pairs = [value for row in iou for value in row if value > 0.5]
    n_matched = len(pairs)
    intersection, union, used = 0, 0, set()
    for row, one in zip(iou, true, strict=True):
        best = int(np.argmax(row)) if row and max(row) > 0 else None
        intersection += 0 if best is None else len(one & hits[best])
        union += len(one) if best is None else len(one | hits[best])
        used |= set() if best is None else {best}
    union += sum(len(other) for number, other in enumerate(hits) if number not in used)
    pixels_true, pixels_found = set().union(*true), set().union(*hits)
    either = len(true) + len(hits)
    return {
        "n_matched": n_matched,
        "precision": n_matched / len(hits) if hits else math.nan,
        "recall": n_matched / len(true) if true else math.nan,
        "f1": 2 * n_matched / either if either else math.nan,
        "panoptic_quality": sum(pairs) / (either / 2) if either else math.nan,
        "aggregated_jaccard": intersection / union if union else math.nan,
        "dice": 2 * len(pixels_true & pixels_found) / (len(pixels_true) + len(pixels_found)) if either else math.nan,
    }


@given(truth=MAPS, found=MAPS)
def test_scores_are_those_of_the_definitions(truth: np.ndarray, found: np.ndarray) -> None:
    scores = instance_scores(truth, found)
    for name, expected in brute_force(truth, found).items():
        assert getattr(scores, name) == pytest.approx(expected, nan_ok=True), name


@given(truth=MAPS, found=MAPS, seed=st.integers(0, 100))
def test_labels_are_names_only(truth: np.ndarray, found: np.ndarray, seed: int) -> None:
    names = np.concatenate([[0], 1 + np.random.default_rng(seed).choice(10**6, 4, replace=False)])
    renamed = instance_scores(names[truth], found.astype(np.uint8))
    np.testing.assert_allclose(renamed, instance_scores(truth, found))


@given(truth=MAPS, found=MAPS)
def test_a_partner_is_the_only_one(truth: np.ndarray, found: np.ndarray) -> None:
    pairs = overlaps(truth, found)
    matched = matches(pairs)
    assert len(set(matched.truth_rows.tolist())) == len(set(matched.found_rows.tolist())) == len(matched.iou)
    assert pairs.truth_areas.sum() == np.count_nonzero(truth)
    assert pairs.shared.sum() == np.count_nonzero((truth > 0) & (found > 0))
    assert (matched.iou > 0.5).all()


@given(labels=MAPS)
def test_what_is_the_same_is_perfect(labels: np.ndarray) -> None:
    scores = instance_scores(labels, labels)
    expected = 1.0 if labels.any() else math.nan
    for name in ("f1", "segmentation_quality", "panoptic_quality", "aggregated_jaccard", "dice"):
        assert getattr(scores, name) == pytest.approx(expected, nan_ok=True), name


def test_half_of_the_union_is_no_match_and_a_miss_is_zero() -> None:
    half = instance_scores(np.array([[1, 1]]), np.array([[1, 0]]))
    assert (half.n_matched, half.f1, half.segmentation_quality, half.panoptic_quality) == (0, 0.0, 0.0, 0.0)
    missed = instance_scores(np.array([[1, 1]]), np.array([[0, 0]]))
    assert (missed.recall, missed.f1, missed.aggregated_jaccard, missed.dice) == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(missed.precision)


def test_a_found_object_may_be_the_best_of_two_but_is_not_counted_as_left_over() -> None:
    truth = np.array([[1, 1, 1, 1, 2, 0, 0]])
    found = np.array([[3, 3, 3, 3, 3, 0, 4]])
    # intersections 4 and 1, unions 5 and 5, and one pixel of nobody
    assert instance_scores(truth, found).aggregated_jaccard == pytest.approx(5 / 11)


@pytest.mark.parametrize(
    ("truth", "found", "threshold", "message"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), 0.5, r"of one shape, found \(2, 2\) and \(2, 3\)"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), 0.5, "`truth` as a label map of integers, found float64"),
        (np.zeros((2, 2), int), np.full((2, 2), -1), 0.5, "at least 0 in `found`, found -1"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), 0.4, "`threshold` from 0.5 to 1, found 0.4"),
    ],
)
def test_errors(truth: np.ndarray, found: np.ndarray, threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instance_scores(truth, found, threshold=threshold)


def test_matches_are_cellposes() -> None:
    """Cellpose counts as many true, false and missed objects, where it is installed."""
    metrics = pytest.importorskip("cellpose.metrics")
    random = np.random.default_rng(0)
    truth, found = (np.kron(random.integers(0, 9, (6, 6)), np.ones((5, 5), int)) for _ in range(2))
    found = np.where(random.random(found.shape) < 0.7, truth, found)
    scores = instance_scores(truth, found)
    _, true, false, missed = metrics.average_precision(truth.astype(np.int32), found.astype(np.int32), threshold=[0.5])
    assert scores.n_matched == int(true[0])
    assert (scores.n_found - scores.n_matched, scores.n_truth - scores.n_matched) == (int(false[0]), int(missed[0]))
