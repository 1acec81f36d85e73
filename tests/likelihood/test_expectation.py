"""The expected logarithm against sums over scipy's negative binomial and Poisson."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from stimage_sd.likelihood.expectation import expected_log1p


def by_sum(mean: float, r: float | None, scale: float) -> float:
    deviation = np.sqrt(mean + (0 if r is None else mean**2 / r))
    counts = np.arange(int(mean + 80 * deviation + 200))
    mass = scipy.stats.poisson.pmf(counts, mean) if r is None else scipy.stats.nbinom.pmf(counts, r, r / (r + mean))
    return float((mass * np.log1p(scale * counts)).sum())


@pytest.mark.parametrize("mean", [1e-3, 0.05, 0.7, 4.0, 60.0, 900.0])
@pytest.mark.parametrize("r", [0.2, 1.0, 12.0, 3e3, None])
@pytest.mark.parametrize("scale", [0.02, 1.0, 40.0, 2e4])
def test_is_the_sum_over_counts(mean: float, r: float | None, scale: float) -> None:
    variance = mean + (0 if r is None else mean**2 / r)
    ours = expected_log1p(np.array([mean]), np.array([variance]), scale=scale)[0]
    assert ours == pytest.approx(by_sum(mean, r, scale), rel=2e-5, abs=2e-9)


def test_large_means_and_blocks() -> None:
    mean = np.full((3, 200_000), 1e6)
    mean[:, ::2] = 0.0
    ours = expected_log1p(mean, 1.0001 * mean, scale=np.array([[1.0], [2.0], [0.5]]))
    np.testing.assert_array_equal(ours[:, ::2], 0)
    expected = np.log1p(1e6 * np.array([[1.0], [2.0], [0.5]]))
    assert np.abs(ours[:, 1::2] / expected - 1).max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    mean=st.floats(1e-4, 1e4), ratio=st.floats(1.0, 50.0), scale=st.floats(1e-3, 1e3), more=st.floats(1.01, 3.0)
)  # fmt: skip
def test_is_below_the_logarithm_of_the_mean_and_rises(mean: float, ratio: float, scale: float, more: float) -> None:
    values = np.array([mean, mean * more])
    ours = expected_log1p(values, values * ratio, scale=scale)
    assert (ours <= np.log1p(scale * values) * (1 + 1e-5)).all()  # Jensen
    assert (ours >= 0).all()
    wider = expected_log1p(values, values * ratio * 2, scale=scale)
    assert (wider <= ours * (1 + 1e-5)).all()


@pytest.mark.parametrize(("mean", "scale"), [(-1.0, 1.0), (np.nan, 1.0), (1.0, -2.0), (1.0, np.inf)])
def test_negative_or_undefined_is_refused(mean: float, scale: float) -> None:
    with pytest.raises(ValueError, match="finite and no less than 0"):
        expected_log1p(np.array([mean]), np.array([2.0]), scale=scale)
