"""Risk–coverage curves: brute force, bounds, ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stimage_sd.stats.selective import kept, log_scale, risk_coverage

errors = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5)), min_size=1, max_size=30)


def test_risk_is_the_mean_error_of_those_kept() -> None:
    random = np.random.default_rng(0)
    error, uncertainty = random.gamma(1.0, size=50), random.normal(size=50)
    curve = risk_coverage(error, uncertainty)
    for number in range(1, 51):
        threshold = np.sort(uncertainty)[number - 1]
        assert curve.risk[number - 1] == pytest.approx(error[uncertainty <= threshold].mean())
        assert curve.coverage[number - 1] == pytest.approx(number / 50)
        assert curve.oracle[number - 1] == pytest.approx(np.sort(error)[:number].mean())
    assert curve.aurc == pytest.approx(curve.risk.mean())


@given(errors)
def test_no_uncertainty_beats_the_oracle_and_order_is_nothing(pairs: list) -> None:
    error, uncertainty = np.array(pairs).T
    curve = risk_coverage(error, uncertainty)
    assert (curve.risk >= curve.oracle - 1e-9).all()
    assert curve.risk[-1] == pytest.approx(curve.random) == pytest.approx(error.mean())
    np.testing.assert_allclose(risk_coverage(error[::-1], uncertainty[::-1]).risk, curve.risk, atol=1e-9)


def test_an_uncertainty_that_knows_nothing_is_random() -> None:
    error = np.random.default_rng(1).gamma(1.0, size=40)
    np.testing.assert_allclose(risk_coverage(error, np.ones(40)).risk, error.mean())
    assert risk_coverage(error, error).aurc == pytest.approx(risk_coverage(error, error).oracle.mean())
    assert risk_coverage(error, -error).aurc > error.mean()


def test_the_log_scales_uncertainty_is_the_variance_of_log_counts() -> None:
    mean = np.array([50.0, 200.0, 1000.0])
    r = np.full(3, 40.0)
    counts = stats.nbinom.rvs(r, r / (r + mean), size=(200_000, 3), random_state=0)
    error, uncertainty = log_scale(counts[0], mean, mean + mean**2 / r)
    np.testing.assert_allclose(error, np.abs(np.log1p(counts[0]) - np.log1p(mean)))
    np.testing.assert_allclose(uncertainty, np.log1p(counts).var(axis=0), rtol=0.06)


def test_shares_are_rounded_up() -> None:
    curve = np.arange(1.0, 31.0)
    assert kept(curve, [0.01, 0.1, 0.3, 0.5, 0.99, 1.0]).tolist() == [1, 3, 9, 15, 30, 30]


def test_what_cannot_be_sorted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of one length, found \(2,\) and \(3,\)"):
        risk_coverage([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="of one length"):
        risk_coverage([], [])
    with pytest.raises(ValueError, match="Expected finite"):
        risk_coverage([1, np.nan], [1, 2])
