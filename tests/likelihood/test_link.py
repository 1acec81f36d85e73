"""The link between a predictor and counts: against statsmodels, a simulation, and predictors without information."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import statsmodels.api as sm

from stimage_sd.likelihood.link import fit_link


def simulated(n: int = 800, *, slope: float = 0.6, r: float = 5.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Values, counts and depths of one gene."""
    random = np.random.default_rng(seed)
    values, factors = random.normal(2.0, 1.5, n), random.uniform(0.5, 2.0, n)
    mean = factors * np.exp(0.5 + slope * values / 1.5)
    return values[:, None], random.negative_binomial(r, r / (r + mean))[:, None], factors


def test_the_link_is_the_negative_binomial_regression_of_statsmodels() -> None:
    values, counts, factors = simulated()
    link = fit_link(values, sp.csr_matrix(counts), factors)
    z = (values[:, 0] - link.center) / link.scale
    model = sm.GLM(
        counts[:, 0], sm.add_constant(z), offset=np.log(factors),
        family=sm.families.NegativeBinomial(alpha=1 / link.dispersion[0]),
    )  # fmt: skip
    expected = model.fit().params
    # the prior on the slope weighs as one of 800 observations
    np.testing.assert_allclose([link.intercept[0], link.slope[0]], expected, atol=5e-3)
    assert link.dispersion[0] == pytest.approx(5.0, rel=0.3)


def test_planted_slopes_are_found_for_all_genes_at_once() -> None:
    parts = [simulated(3000, slope=slope, seed=3) for slope in (0.0, 0.3, 1.0)]
    values, counts = (np.concatenate([part[which] for part in parts], axis=1) for which in (0, 1))
    link = fit_link(values, sp.csr_matrix(counts), parts[0][2])
    np.testing.assert_allclose(link.slope / link.scale * 1.5, [0.0, 0.3, 1.0], atol=0.05)


@pytest.mark.parametrize("values", [np.full((400, 1), 7.0), np.zeros((400, 1))])
def test_a_constant_predictor_gives_the_mean(values: np.ndarray) -> None:
    _, counts, factors = simulated(400)
    link = fit_link(values, sp.csr_matrix(counts), factors)
    np.testing.assert_allclose(link.means(values), counts.sum() / factors.sum(), rtol=1e-6)


def test_a_predictor_that_falls_where_counts_rise_counts_for_nothing() -> None:
    values, counts, factors = simulated()
    link = fit_link(-values, sp.csr_matrix(counts), factors)
    assert link.slope[0] == 0
    np.testing.assert_allclose(link.means(-values), counts.sum() / factors.sum(), rtol=1e-6)


def test_means_stop_growing_one_deviation_beyond_what_was_seen() -> None:
    values, counts, factors = simulated()
    link = fit_link(values, sp.csr_matrix(counts), factors)
    far, farther = link.means(np.array([[1e3], [1e6]]))
    assert far == farther
    assert far <= link.means(values).max() * np.exp(link.slope[0]) * (1 + 1e-9)
