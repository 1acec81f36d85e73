"""Kaplan-Meier curves, the log-rank test and the ridge Cox regression against lifelines and scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from stimage_sd.stats.survival import kaplan_meier, log_rank_p, ridge_cox


def patients(seed: int, n_patients: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardized covariates, times with ties, and events."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(n_patients, 4))
    values = (values - values.mean(axis=0)) / values.std(axis=0)
    time = np.ceil(10 * random.exponential(np.exp(-values[:, 0])))
    return values, time, random.random(n_patients) < 0.6


@pytest.mark.parametrize("seed", range(3))
def test_curves_and_limits_are_lifelines(seed: int) -> None:
    lifelines = pytest.importorskip("lifelines", reason="it caps pandas, and is installed on the oldest Python")
    _, time, event = patients(seed)
    expected, found = lifelines.KaplanMeierFitter().fit(time, event), kaplan_meier(time, event)
    np.testing.assert_allclose(found.share, expected.predict(found.time), rtol=1e-12)
    limits = expected.confidence_interval_.reindex(found.time, method="ffill").to_numpy()
    inner = (found.share > 0) & (found.share < 1)
    np.testing.assert_allclose(np.stack([found.lower, found.upper], axis=1)[inner], limits[inner], rtol=1e-10)
    assert found.time[-1] == time.max()
    between = np.array([0.0, 0.5, 7.5, time.max()])
    np.testing.assert_allclose(found.at(between), expected.predict(between), rtol=1e-12)


def test_curves_without_events_or_survivors() -> None:
    none = kaplan_meier([2.0, 5.0], [False, False])
    assert none.time.tolist() == [0.0, 5.0]
    assert none.share.tolist() == none.lower.tolist() == none.upper.tolist() == [1.0, 1.0]
    last = kaplan_meier([2.0, 5.0], [True, True])
    assert last.share.tolist() == [1.0, 0.5, 0.0]
    assert (last.lower <= last.share).all()
    assert (last.share <= last.upper).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_log_rank_test_is_scipys(seed: int) -> None:
    values, time, event = patients(seed)
    high = values[:, 1] > 0
    samples = [
        scipy.stats.CensoredData(uncensored=time[rows & event], right=time[rows & ~event]) for rows in (high, ~high)
    ]
    assert log_rank_p(time, event, high) == pytest.approx(scipy.stats.logrank(*samples).pvalue, rel=1e-9)


def test_the_log_rank_test_of_several_groups_is_lifelines() -> None:
    statistics = pytest.importorskip("lifelines.statistics", reason="it caps pandas, and is on the oldest Python")
    values, time, event = patients(4, n_patients=600)
    group = np.digitize(values[:, 0], [-0.5, 0.5])
    expected = statistics.multivariate_logrank_test(time, group, event).p_value
    assert expected < 1e-15  # far below where one minus the distribution function is exact
    assert log_rank_p(time, event, group) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0])
def test_the_ridge_regression_is_lifelines(penalty: float) -> None:
    lifelines = pytest.importorskip("lifelines", reason="it caps pandas, and is installed on the oldest Python")
    values, time, event = patients(5)
    # lifelines divides by the standard deviation of a sample
    of_sample = penalty * (len(values) - 1) / len(values)
    fitted = lifelines.CoxPHFitter(penalizer=of_sample, l1_ratio=0.0).fit(
        pd.DataFrame(values).assign(time=time, event=event), "time", "event", fit_options={"precision": 1e-9}
    )
    np.testing.assert_allclose(ridge_cox(values, time, event, penalty=penalty), fitted.params_, rtol=1e-5, atol=1e-7)


def test_perfect_order_has_finite_weights() -> None:
    values = np.linspace(-1, 1, 20)[:, None]
    weights = ridge_cox(values, np.arange(20.0, 0, -1), np.ones(20, bool), penalty=0.1)
    assert 0 < weights[0] < 100


@pytest.mark.parametrize(
    ("time", "event", "match"),
    [
        ([1.0, np.nan, 3.0], [1, 0, 1], "finite times of at least 0"),
        ([1.0, -2.0, 3.0], [1, 0, 1], "finite times of at least 0"),
        ([1.0, 2.0, 3.0], [1, np.nan, 0], "events of 1 .seen. and 0 .censored., found .*nan"),
        ([1.0, 2.0, 3.0], [2, 1, 2], r"found \[1, 2\]"),
        ([1.0, 2.0, 3.0], [1, 0], "one time and one event per patient"),
        ([], [], "one time and one event per patient"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(time: list, event: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kaplan_meier(time, event)
    with pytest.raises(ValueError, match=match):
        log_rank_p(time, event, ["a", "b", "b"][: len(time)])


def test_groups_that_no_event_compares_have_no_p_value() -> None:
    assert np.isnan(log_rank_p([1, 2, 3, 4], [0, 0, 0, 0], list("aabb")))
    # the one patient of the second group is gone before the first event
    assert np.isnan(log_rank_p([1, 2, 3, 4], [0, 1, 1, 1], list("baaa")))
