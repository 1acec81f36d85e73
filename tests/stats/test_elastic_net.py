"""Elastic-net logistic regression: scikit-learn's optimum, its conditions, and what must not matter."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from stimage_sd.stats import elastic_net


def problem(n_rows: int = 160, n_features: int = 24, n_targets: int = 3, seed: int = 0) -> tuple:
    """Correlated features of unlike importance, standardized, and noisy labels."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((n_features, n_features)) / np.arange(1, n_features + 1)[:, None]
    features = random.standard_normal((n_rows, n_features)) @ mixing
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    truth = random.standard_normal((n_features, n_targets)) * (random.random((n_features, n_targets)) < 0.2)
    noise = random.logistic(size=(n_rows, n_targets))
    labels = features @ truth + noise > 0.7 * np.arange(n_targets)
    return features.astype(np.float32), labels


def by_scikit(features: np.ndarray, labels: np.ndarray, **options: float) -> tuple[np.ndarray, np.ndarray]:
    models = []
    with warnings.catch_warnings():
        # `penalty` is needed before scikit-learn 1.8 and deprecated since
        warnings.simplefilter("ignore", FutureWarning)
        for target in labels.T:
            model = LogisticRegression(
                penalty="elasticnet", solver="saga", tol=1e-7, max_iter=20_000, random_state=0, **options
            )
            models.append(model.fit(features.astype(np.float64), target))
    return np.stack([model.coef_[0] for model in models]), np.array([model.intercept_[0] for model in models])


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("C", [0.05, 0.1, 1.0, 10.0])
def test_the_optimum_is_scikit_learns(C: float, l1_ratio: float) -> None:
    features, labels = problem()
    found = elastic_net.fit(features, labels, C=C, l1_ratio=l1_ratio, tolerance=1e-7)
    coefficients, intercepts = by_scikit(features, labels, C=C, l1_ratio=l1_ratio)
    expected = elastic_net.objective(features, labels, coefficients, intercepts, C=C, l1_ratio=l1_ratio)
    reached = elastic_net.objective(features, labels, found.coefficients, found.intercepts, C=C, l1_ratio=l1_ratio)
    assert found.converged.all()
    np.testing.assert_allclose(reached, expected, rtol=1e-4)
    np.testing.assert_allclose(found.objective, reached, rtol=1e-5)
    if l1_ratio > 0:
        assert np.mean((found.coefficients != 0) == (np.abs(coefficients) > 1e-5)) > 0.95


def test_more_features_than_rows_reach_scikit_learns_optimum_too() -> None:
    features, labels = problem(n_rows=60, n_features=150)
    found = elastic_net.fit(features, labels, C=0.3, tolerance=1e-7)
    expected = elastic_net.objective(features, labels, *by_scikit(features, labels, C=0.3, l1_ratio=0.5), C=0.3)
    np.testing.assert_allclose(found.objective, expected, rtol=1e-4)


def test_the_conditions_of_optimality_hold() -> None:
    features, labels = problem(seed=3)
    C, l1_ratio = 0.1, 0.5
    found = elastic_net.fit(features, labels, C=C, l1_ratio=l1_ratio, tolerance=1e-8)
    residuals = scipy.special.expit(features @ found.coefficients.T + found.intercepts) - labels
    slope = C * features.T.astype(np.float64) @ residuals + (1 - l1_ratio) * found.coefficients.T
    at_zero = found.coefficients.T == 0
    assert at_zero.any()
    assert not at_zero.all()
    assert np.abs(slope[at_zero]).max() <= l1_ratio + 0.01
    np.testing.assert_allclose(slope[~at_zero], -l1_ratio * np.sign(found.coefficients.T[~at_zero]), atol=0.01)
    np.testing.assert_allclose(residuals.sum(axis=0), 0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("n_rows", "n_features"), [(160, 40), (40, 160)])
def test_leading_eigenvectors_alone_lead_to_the_same_optimum(
    n_rows: int, n_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = problem(n_rows, n_features)
    exact = elastic_net.fit(features, labels, tolerance=1e-7)
    monkeypatch.setattr(elastic_net, "_EXACT", 8)
    monkeypatch.setattr(elastic_net, "_RANK", 6)
    partial = elastic_net.fit(features, labels, tolerance=1e-7)
    assert partial.converged.all()
    np.testing.assert_allclose(partial.objective, exact.objective, rtol=1e-5)
    np.testing.assert_allclose(partial.coefficients, exact.coefficients, atol=2e-2)


@pytest.mark.slow
@settings(max_examples=10)
@given(order=st.permutations(range(4)), seed=st.integers(0, 3))
def test_permuting_targets_permutes_solutions(order: list[int], seed: int) -> None:
    features, labels = problem(n_rows=80, n_features=10, n_targets=4, seed=seed)
    labels[0], labels[1] = True, False
    plain = elastic_net.fit(features, labels, tolerance=1e-7)
    permuted = elastic_net.fit(features, labels[:, order], tolerance=1e-7)
    np.testing.assert_allclose(permuted.objective, plain.objective[order], rtol=1e-5)
    np.testing.assert_allclose(permuted.coefficients, plain.coefficients[order], atol=1e-2)


@settings(max_examples=10)
@given(column=st.integers(0, 9), seed=st.integers(0, 3))
def test_duplicate_features_share_their_weight(column: int, seed: int) -> None:
    features, labels = problem(n_rows=80, n_features=10, n_targets=2, seed=seed)
    doubled = np.concatenate([features, features[:, [column]]], axis=1)
    found = elastic_net.fit(doubled, labels, C=1.0, tolerance=1e-7)
    np.testing.assert_allclose(found.coefficients[:, column], found.coefficients[:, -1], atol=1e-3)
    # a second copy can only help
    assert (found.objective <= elastic_net.fit(features, labels, C=1.0, tolerance=1e-7).objective * (1 + 1e-5)).all()


def test_exchanging_the_classes_changes_every_sign() -> None:
    features, labels = problem()
    one = elastic_net.fit(features, labels, tolerance=1e-8)
    other = elastic_net.fit(features, ~labels, tolerance=1e-8)
    np.testing.assert_allclose(other.coefficients, -one.coefficients, atol=1e-3)
    np.testing.assert_allclose(other.intercepts, -one.intercepts, atol=1e-3)


def test_a_shift_of_the_features_moves_only_the_intercept() -> None:
    features, labels = problem()
    plain = elastic_net.fit(features, labels, tolerance=1e-7)
    shifted = elastic_net.fit(features + 5, labels, tolerance=1e-7)
    np.testing.assert_allclose(shifted.coefficients, plain.coefficients, atol=1e-3)
    np.testing.assert_allclose(shifted.intercepts, plain.intercepts - 5 * plain.coefficients.sum(axis=1), atol=1e-2)


def test_the_same_call_gives_the_same_bits() -> None:
    features, labels = problem()
    one, other = elastic_net.fit(features, labels), elastic_net.fit(features, labels)
    np.testing.assert_array_equal(one.coefficients, other.coefficients)
    np.testing.assert_array_equal(one.intercepts, other.intercepts)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
def test_separable_labels_do_not_diverge(l1_ratio: float) -> None:
    features, _ = problem()
    labels = features[:, :3] > 0
    found = elastic_net.fit(features, labels, C=10.0, l1_ratio=l1_ratio)
    assert found.converged.all()
    assert np.isfinite(found.coefficients).all()
    assert np.abs(found.coefficients).max() < 100
    np.testing.assert_array_equal(features @ found.coefficients.T + found.intercepts > 0, labels)


def test_one_class_gets_its_base_rate_and_leaves_the_others_alone() -> None:
    features, labels = problem()
    beside = np.concatenate([labels, np.zeros((len(labels), 1), bool), np.ones((len(labels), 1), bool)], axis=1)
    found, alone = elastic_net.fit(features, beside), elastic_net.fit(features, labels)
    assert (found.coefficients[3:] == 0).all()
    assert found.intercepts[3:].tolist() == [-np.inf, np.inf]
    assert found.objective[3:].tolist() == [0, 0]
    assert found.converged.all()
    np.testing.assert_array_equal(found.coefficients[:3], alone.coefficients)


def test_features_that_are_all_constant_leave_the_base_rate() -> None:
    labels = np.arange(20)[:, None] < 5
    found = elastic_net.fit(np.ones((20, 3)), labels)
    assert (found.coefficients == 0).all()
    assert scipy.special.expit(found.intercepts[0]) == pytest.approx(0.25, abs=1e-4)


def test_too_few_steps_are_not_called_converged() -> None:
    features, labels = problem()
    found = elastic_net.fit(features, labels, C=10.0, max_iterations=2)
    assert found.n_iterations == 2
    assert not found.converged.any()


def test_progress_counts_every_target_once() -> None:
    features, labels = problem(n_targets=5)
    told: list[int] = []
    elastic_net.fit(features, labels, progress=told.append)
    assert sum(told) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": np.zeros((3, 1), bool)}, r"of the same rows, found shapes \(160, 24\) and \(3, 1\)"),
        ({"features": np.full((160, 24), np.nan)}, "`features` to be finite"),
        ({"labels": np.full((160, 1), 2)}, "`labels` to be bool, or 0 and 1"),
        ({"C": 0.0}, "`C` to be positive, found 0.0"),
        ({"l1_ratio": 1.5}, "`l1_ratio` between 0 and 1, found 1.5"),
        ({"tolerance": 0.0}, "`tolerance` to be positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options: dict, message: str) -> None:
    features, labels = problem()
    arguments = {"features": features, "labels": labels, **options}
    with pytest.raises(ValueError, match=message):
        elastic_net.fit(**arguments)
