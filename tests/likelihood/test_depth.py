"""Size factors: thinned counts follow the distribution that is said of them, in closed form and on real counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from stimage_sd.likelihood import depth
from stimage_sd.likelihood.mean_only import fit_mean_only

#: multiples of r that are compared; 0.3 is what a sum of so many draws would have
RS = (0.3, 0.5, 0.8, 1.0, 1.25, 2.0, 3.3)


@pytest.mark.parametrize("factor", [0.1, 0.5, 0.9])
def test_a_thinned_negative_binomial_is_the_one_at_that_depth(factor: float) -> None:
    """The sum over all counts before thinning, by scipy."""
    r, p, before = 2.5, 0.2, np.arange(400)
    after = np.arange(30)
    kept = scipy.stats.binom.pmf(after[:, None], before, factor) @ scipy.stats.nbinom.pmf(before, r, p)
    deeper = depth.at_depth(np.full((1, 1, 1), p), np.array([factor]))[0, 0, 0]
    np.testing.assert_allclose(kept, scipy.stats.nbinom.pmf(after, r, deeper), atol=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 0.1, 1.0, 10.0])
def test_the_mean_is_multiplied_and_r_stays(factor: float) -> None:
    r, p = np.array([0.1, 3.0, 100.0]), np.array([1e-4, 0.5, 1 - 2**-20], dtype=np.float32)
    deeper = depth.at_depth(p[None, None], np.array([factor]))[0, 0]
    mean = r * (1 - p.astype(np.float64)) / p
    np.testing.assert_allclose(r * (1 - deeper) / deeper, factor * mean, rtol=1e-6)


def test_spots_without_counts_keep_a_factor_and_the_median_is_no_less_than_one() -> None:
    assert depth.median_total(np.zeros(3)) == 1.0
    np.testing.assert_array_equal(depth.size_factors(np.array([0, 50, 200]), 100.0), [1e-3, 0.5, 2.0])


@pytest.mark.parametrize("section", ["A1", "D1"])
def test_real_counts_keep_their_r_when_they_are_thinned(data_dir: Path, section: str) -> None:
    table = pd.read_csv(data_dir / "her2st_counts" / f"{section}.tsv.gz", sep="\t", index_col=0)
    counts, totals = table.to_numpy(), table.to_numpy().sum(axis=1)
    factors = depth.size_factors(totals, depth.median_total(totals))
    whole = fit_mean_only(counts, factors)
    # genes that show an r both before and after
    chosen = np.flatnonzero((whole.mean > 3) & (whole.r < 10))
    counts, share = counts[:, chosen], 0.3
    thinned = np.random.default_rng(0).binomial(counts, share)
    found = fit_mean_only(thinned, share * factors)
    assert len(chosen) >= 20
    np.testing.assert_allclose(np.median(found.mean / whole.mean[chosen]), 1.0, atol=0.02)
    np.testing.assert_allclose(np.median(found.r / whole.r[chosen]), 1.0, atol=0.05)
    # the distribution of the whole counts, at the depth of the thinned ones, is theirs; one of another r is not
    at_depth = depth.at_depth(np.broadcast_to(whole.p[chosen], (1, *counts.shape)), share * factors)[0]
    r, odds = whole.r[chosen], (1 - at_depth) / at_depth
    log_prob = {times: scipy.stats.nbinom.logpmf(thinned, times * r, times / (times + odds)).sum() for times in RS}
    assert max(log_prob, key=log_prob.__getitem__) == 1.0
