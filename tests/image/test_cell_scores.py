"""Scores of typed cells against scikit-learn, scipy and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from stimage_sd.image.cell_scores import calibration_error, class_scores, confusion, entropy, match_centers, separation
from stimage_sd.image.instance_scores import instance_scores, overlaps, scores_of_overlaps


@given(st.integers(0, 10_000), st.floats(1.0, 30.0))
@settings(max_examples=60, deadline=None)
def test_matches_are_the_whole_assignments(seed: int, radius: float) -> None:
    """Group by group it finds what one assignment over all cells finds: as many pairs, of the least total distance."""
    random = np.random.default_rng(seed)
    truth, found = (random.uniform(0, 100, (random.integers(0, 25), 2)) for _ in range(2))
    rows, columns = match_centers(truth, found, radius=radius)
    assert len(set(rows)) == len(rows) == len(set(columns))
    apart = cdist(truth, found) if len(truth) and len(found) else np.zeros((len(truth), len(found)))
    cost = np.where(apart <= radius, apart, 1e5)
    best = linear_sum_assignment(cost)
    real = cost[best] < 1e5
    assert len(rows) == real.sum()
    np.testing.assert_allclose(apart[rows, columns].sum(), cost[best][real].sum(), atol=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_classes_of_matched_cells_equal_scikit_learns(seed: int) -> None:
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 60))
    truth, found = random.integers(0, 4, n), random.integers(0, 4, n)
    order = random.permutation(n)
    # found cells lie in another order
    scores = class_scores(truth, found[order], (np.arange(n), np.argsort(order)), n_classes=4)
    present = [c for c in range(4) if (truth == c).any() or (found == c).any()]
    expected = f1_score(truth, found, labels=range(4), average=None, zero_division=0)
    np.testing.assert_allclose(scores.f1[present], expected[present], atol=1e-12)
    for name, of, where in (("precision", precision_score, found), ("recall", recall_score, truth)):
        there = [c for c in range(4) if (where == c).any()]
        value = of(truth, found, labels=range(4), average=None, zero_division=0)
        np.testing.assert_allclose(getattr(scores, name)[there], value[there], atol=1e-12)
    np.testing.assert_array_equal(confusion(truth, found, n_classes=4), confusion_matrix(truth, found, labels=range(4)))


def published_f1(truth, found, pairs, kind):
    """As Graham et al. define it, counted pair by pair."""
    in_truth, in_found = set(pairs[0]), set(pairs[1])
    right = wrong_found = wrong_truth = 0
    for one, other in zip(*pairs, strict=True):
        right += truth[one] == kind and found[other] == kind
        wrong_found += truth[one] != kind and found[other] == kind
        wrong_truth += truth[one] == kind and found[other] != kind
    made_up = sum(found[n] == kind for n in range(len(found)) if n not in in_found)
    missed = sum(truth[n] == kind for n in range(len(truth)) if n not in in_truth)
    whole = 2 * right + 2 * wrong_found + 2 * wrong_truth + made_up + missed
    return 2 * right / whole if whole else np.nan


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_published_score_of_classes(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth, found = (random.integers(0, 3, random.integers(1, 30)) for _ in range(2))
    n = int(random.integers(0, min(len(truth), len(found)) + 1))
    pairs = np.sort(random.choice(len(truth), n, replace=False)), random.choice(len(found), n, replace=False)
    scores = class_scores(truth, found, pairs, n_classes=3)
    np.testing.assert_allclose(scores.f1_hovernet, [published_f1(truth, found, pairs, kind) for kind in range(3)])


def test_entropy_equals_scipys_of_its_base() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    np.testing.assert_allclose(entropy(p), [scipy_entropy(row, base=5) for row in p])
    assert entropy(np.eye(3)).tolist() == [0, 0, 0]


def test_calibration_error_is_the_bins_mean_gap() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.2, 1.0, 500)
    right = random.random(500) < confidence**2
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence >= low) & ((confidence < low + 0.1) | (low == 0.9))
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert np.isnan(calibration_error(np.empty(0), np.empty(0, bool)))
    assert np.isnan(separation(np.array([0.1, 0.2]), np.array([True, True])))


def test_a_part_of_the_objects_scores_as_if_the_rest_were_not_there() -> None:
    random = np.random.default_rng(0)
    truth, found = random.integers(0, 6, (2, 30, 30))
    pairs = overlaps(truth, found)
    some, others = np.isin(pairs.truth_labels, [1, 3]), np.isin(pairs.found_labels, [2, 3, 5])
    masked = instance_scores(np.where(np.isin(truth, [1, 3]), truth, 0), np.where(np.isin(found, [2, 3, 5]), found, 0))
    np.testing.assert_allclose(scores_of_overlaps(pairs.among(some, others)), masked)
