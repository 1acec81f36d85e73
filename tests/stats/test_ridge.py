"""The ridge against scikit-learn and a plain singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from stimage_sd.stats.ridge import Moments, RidgePath


def data(n: int = 40, n_features: int = 6, n_targets: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    features = random.normal(size=(n, n_features)) * np.arange(1, n_features + 1) + 3
    weights = random.normal(size=(n_features, 2)) @ random.normal(size=(2, n_targets))
    return features, features @ weights + random.normal(size=(n, n_targets)) + 5


@pytest.mark.parametrize("penalty", [0.0, 0.5, 40.0])
def test_coefficients_are_scikit_learns(penalty: float) -> None:
    features, targets = data()
    ours = RidgePath.solve(Moments.of(features, targets))
    theirs = Ridge(alpha=penalty).fit(features, targets)
    np.testing.assert_allclose(ours.coefficients(penalty), theirs.coef_.T, atol=1e-8)
    np.testing.assert_allclose(
        (features - ours.center) @ ours.coefficients(penalty) + ours.intercept, theirs.predict(features), atol=1e-7
    )


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 38), seed=st.integers(0, 1000))
def test_moments_of_parts_add_up(cut: int, seed: int) -> None:
    features, targets = data(seed=seed)
    whole = RidgePath.solve(Moments.of(features, targets))
    parts = RidgePath.solve(Moments.of(features[:cut], targets[:cut]) + Moments.of(features[cut:], targets[cut:]))
    np.testing.assert_allclose(parts.coefficients(1.0), whole.coefficients(1.0), atol=1e-8)


# more targets than features and fewer: the decomposition goes either way
@pytest.mark.parametrize(("n_features", "n_targets"), [(6, 9), (9, 4)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_keeps_the_leading_directions_of_the_fitted_values(n_features: int, n_targets: int, rank: int) -> None:
    features, targets = data(n_features=n_features, n_targets=n_targets)
    path = RidgePath.solve(Moments.of(features, targets))
    centered = features - features.mean(axis=0)
    fitted = centered @ path.coefficients(0.7)
    left, singular, right = np.linalg.svd(fitted, full_matrices=False)
    expected = (left[:, :rank] * singular[:rank]) @ right[:rank]
    np.testing.assert_allclose(centered @ path.coefficients(0.7, rank), expected, atol=1e-7)
    basis, loadings = path.patterns(0.7, rank)
    assert basis.shape == (n_features, rank)
    np.testing.assert_allclose(loadings @ loadings.T, np.eye(rank), atol=1e-9)
    np.testing.assert_allclose(basis @ loadings, path.coefficients(0.7, rank), atol=1e-9)
    deviations = (centered @ basis).std(axis=0)
    assert (np.diff(deviations) < 1e-9).all()


def test_a_constant_feature_says_nothing() -> None:
    features, targets = data()
    features[:, 2] = 7.0
    coefficients = RidgePath.solve(Moments.of(features, targets)).coefficients(0.0)
    np.testing.assert_allclose(coefficients[2], 0, atol=1e-9)
    assert np.isfinite(coefficients).all()
