"""Shifts of genes and the predictive distribution: moments, probabilities and intervals against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from stimage_sd.likelihood import predictive, shifts
from stimage_sd.likelihood.pit import pit_histogram
from stimage_sd.likelihood.predictive import MixtureMoments
from stimage_sd.tl._fit.held_out_level import HeldOutSums, learn_shifts, prior_sd, spot_sd

SD = st.floats(0.0, 1.2)
MEAN = st.floats(1e-3, 200.0)
INVERSE = st.floats(1e-3, 3.0)


@given(SD)
def test_strata_have_the_moments_of_the_shift(sd: float) -> None:
    means, variances = shifts.strata(np.array([sd]))
    assert means.mean() == pytest.approx(1)
    assert (means**2 * (1 + variances)).mean() == pytest.approx(np.exp(sd**2))
    assert (np.diff(means[:, 0]) > -1e-12).all()


def moved(mean: float, inverse: float, sd: float) -> predictive.Predictive:
    """One negative binomial with a shift."""
    variance = mean + inverse * mean**2
    return predictive.predictive(MixtureMoments(*np.array([[[mean]], [[variance]], [[0.0]]])), np.array([sd]))


@settings(deadline=None)
@given(MEAN, INVERSE, SD)
def test_components_have_the_mean_and_the_variance(mean: float, inverse: float, sd: float) -> None:
    made = moved(mean, inverse, sd)
    r, p = predictive.components(made.mean, made.variance, made.sd)
    means, variances = scipy.stats.nbinom.stats(r, p)
    assert means.mean() == pytest.approx(mean, rel=1e-6)
    assert (variances + means**2).mean() - mean**2 == pytest.approx(made.variance[0, 0], rel=1e-5)


@pytest.mark.parametrize("sd", [0.17, 0.47, 0.7])
@pytest.mark.parametrize(("mean", "inverse"), [(0.3, 0.5), (4.0, 0.3), (60.0, 0.1)])
def test_probabilities_are_near_the_integral_over_the_shift(mean: float, inverse: float, sd: float) -> None:
    made = moved(mean, inverse, sd)
    counts = np.unique(np.round(mean * np.array([0.0, 0.5, 1.0, 1.5, 3.0])))
    found = predictive.cdf(counts[:, None], made.mean, made.variance, made.sd)[:, 0]

    def shifted(z: float, count: float) -> float:
        at = mean * np.exp(sd * z - sd**2 / 2)
        return float(scipy.stats.nbinom.cdf(count, 1 / inverse, 1 / (1 + inverse * at)) * scipy.stats.norm.pdf(z))

    exact = [scipy.integrate.quad(shifted, -8, 8, args=(count,))[0] for count in counts]
    np.testing.assert_allclose(found, exact, atol=0.016, rtol=0)


@settings(deadline=None, max_examples=30)
@given(MEAN, INVERSE, SD)
def test_logarithms_are_of_the_steps_of_the_distribution_function(mean: float, inverse: float, sd: float) -> None:
    made = moved(mean, inverse, sd)
    counts = np.arange(0.0, 6.0)[:, None]
    at = made.mean, made.variance, made.sd
    steps = predictive.cdf(counts, *at) - predictive.cdf(counts - 1, *at)
    np.testing.assert_allclose(np.exp(predictive.log_prob(counts, *at)), steps, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("r", [0.01, 1.0, 30.0, 1e6, 1e9])
@pytest.mark.parametrize("mean", [1e-3, 1.0, 50.0, 1e4])
def test_log_pmf_is_scipys(mean: float, r: float) -> None:
    counts = np.array([0.0, 1.0, 7.0, 1000.0, 20_000.0])
    p = r / (r + mean)
    found = predictive.log_pmf(counts, np.full(5, r), np.full(5, p))
    np.testing.assert_allclose(found, scipy.stats.nbinom.logpmf(counts, r, p), rtol=1e-6, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-3, 50.0), INVERSE, SD, st.floats(0.3, 0.97))
def test_intervals_are_the_nearest_of_all(mean: float, inverse: float, sd: float, coverage: float) -> None:
    made = moved(mean, inverse, sd)
    at = made.mean, made.variance, made.sd
    lower, upper = (int(bound[0, 0]) for bound in predictive.nearest_interval(*at, coverage=coverage))
    below = predictive.cdf(np.arange(-1.0, upper + 3)[:, None], *at)[:, 0]  # of -1, 0, 1, ...
    tail = (1 - coverage) / 2
    assert abs(below[lower] - tail) <= np.abs(below - tail).min() + 1e-9
    contained = below[1:] - below[lower]
    assert abs(contained[upper] - coverage) <= np.abs(contained[lower:] - coverage).min() + 1e-9
    assert lower <= upper


def test_large_counts_have_intervals_too() -> None:
    mean = np.array([[3e4, 4e5]])
    made = predictive.predictive(MixtureMoments(mean, mean + 0.05 * mean**2, np.zeros((1, 2))), np.array([0.3, 0.3]))
    lower, upper = predictive.nearest_interval(made.mean, made.variance, made.sd)
    at = made.mean, made.variance, made.sd
    assert predictive.cdf(upper, *at) - predictive.cdf(lower - 1, *at) == pytest.approx(0.9, abs=1e-3)
    with pytest.raises(ValueError, match="Expected `coverage` to lie between 0 and 1, found 1"):
        predictive.nearest_interval(*at, coverage=1.0)


@pytest.mark.parametrize("exposure", [0.07, 0.5, 1.0, 3.0])
def test_a_distribution_moves_with_depth_as_thinned_counts_do(exposure: float) -> None:
    random = np.random.default_rng(0)
    r, means, sd = np.array([2.0, 5.0, 9.0]), np.array([20.0, 30.0, 24.0]), 0.4
    variances = means + means**2 / r
    moments = MixtureMoments(*(np.array([[value]]) for value in (means.mean(), variances.mean(), means.var())))
    made = predictive.predictive(moments, np.array([sd]), exposure=exposure)
    member = random.integers(3, size=400_000)
    shift = np.exp(sd * random.normal(size=len(member)) - sd**2 / 2)
    rate = random.gamma(r[member]) * means[member] / r[member] * shift
    counts = random.poisson(exposure * rate)
    assert counts.mean() == pytest.approx(made.mean[0, 0], rel=0.01)
    assert counts.var() == pytest.approx(made.variance[0, 0], rel=0.03)
    # what measuring the shift would remove
    known = means.mean() * exposure * shift
    assert known.var() == pytest.approx(np.expm1(sd**2) * made.mean[0, 0] ** 2, rel=0.02)
    assert made.shift[0, 0] == pytest.approx(
        np.expm1(sd**2) * (moments.mean**2 + moments.epistemic)[0, 0] * exposure**2
    )


def simulated(
    n_patients: int, n_sections: int, between: np.ndarray, within: float, *, seed: int = 0
) -> tuple[HeldOutSums, list[str]]:
    """Sums over held-out sections whose genes are shifted by patient and by section."""
    random = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), n_sections)
    shift = random.normal(size=(n_patients, len(between)))[patients] * between
    shift += within * random.normal(size=(len(patients), len(between)))
    expected = np.tile(random.uniform(200, 5000, len(between)), (len(patients), 1))
    variance = 3 * expected
    counts = np.maximum(random.normal(expected * np.exp(shift), np.sqrt(variance)), 0)
    return HeldOutSums(counts, expected, variance), [f"p{patient}" for patient in patients]


def test_variances_of_genes_are_learned_from_many_patients() -> None:
    between = np.repeat([0.1, 0.4, 0.9], 200)
    section, patient = learn_shifts(*simulated(30, 3, between, 0.2))
    for value in (0.4, 0.9):
        expected = np.sqrt(value**2 + 0.2**2 / 3)
        assert np.sqrt((patient[between == value] ** 2).mean()) == pytest.approx(expected, rel=0.15)
    # a tenth of the weight is that of the typical gene, which holds genes that do not shift up
    assert np.median(patient[between == 0.1]) < 0.25
    assert np.median(section) == pytest.approx(0.2 * np.sqrt(1 + 1 / 3), rel=0.1)


def test_few_patients_are_shrunk_towards_each_other_and_the_prior() -> None:
    between = np.repeat([0.1, 0.9], 300)
    _, few = learn_shifts(*simulated(2, 3, between, 0.1))
    _, many = learn_shifts(*simulated(40, 3, between, 0.1))
    assert few.std() < many.std()
    # without patients' shifts at all, the prior still holds a part
    _, none = learn_shifts(*simulated(2, 3, np.zeros(300), 0.1))
    assert 0.2 < np.median(none) < shifts.PATIENT.sd


def test_one_patient_leaves_the_prior_to_another() -> None:
    sums, patients = simulated(1, 4, np.zeros(300), 0.17)
    section, patient = learn_shifts(sums, patients)
    assert np.unique(patient) == pytest.approx(prior_sd(1, 4)[1])
    assert np.median(section) == pytest.approx(0.17, rel=0.2)
    same, other = learn_shifts(sums, None)
    np.testing.assert_array_equal(np.stack([same, other]), np.stack([section, patient]))
    # a part of one section is no other section
    alone = HeldOutSums(*(part[:1] for part in sums))
    np.testing.assert_allclose(learn_shifts(alone, ["p0"])[0], prior_sd(1, 1)[0], rtol=1e-6)


def test_the_row_is_that_of_the_patient() -> None:
    table = np.array([[0.1, 0.3], [0.5, 0.4]])
    np.testing.assert_array_equal(shifts.shift_of(table, known=True), table[0])
    np.testing.assert_array_equal(shifts.shift_of(table, known=False), table[1])
    np.testing.assert_allclose(shifts.shift_of(table, known=None), np.sqrt((table**2).mean(axis=0)))


def test_the_posterior_is_the_normal_one() -> None:
    ratio, noise, sd = np.array([0.7, -0.2, 1.5]), np.array([0.05, 0.4, 1e-4]), np.array([0.5, 0.3, 0.6])
    mean, left = shifts.posterior(ratio, noise, sd)
    grid = np.linspace(-4, 4, 200_001)
    for gene in range(3):
        weight = scipy.stats.norm.logpdf(grid, -(sd[gene] ** 2) / 2, sd[gene])
        weight = np.exp(weight + scipy.stats.norm.logpdf(ratio[gene], grid, np.sqrt(noise[gene])))
        weight /= weight.sum()
        center = weight @ grid
        assert left[gene] == pytest.approx(np.sqrt(weight @ (grid - center) ** 2), rel=1e-3)
        assert mean[gene] == pytest.approx(weight @ np.exp(grid), rel=1e-3)


def test_the_histogram_is_flat_for_true_distributions_alone() -> None:
    random = np.random.default_rng(3)
    mean, sd = random.uniform(0.05, 30.0, (400, 60)), np.full(60, 0.4)
    # a shift of its own per count, which are then independent
    rate = random.gamma(5.0, size=mean.shape) / 5 * mean * np.exp(0.4 * random.normal(size=mean.shape) - 0.08)
    counts = random.poisson(rate).astype(float)
    variance = mean + mean**2 * (np.exp(0.16) * (1 + 1 / 5) - 1)
    upto, below = (predictive.cdf(values, mean, variance, sd) for values in (counts, counts - 1))
    np.testing.assert_allclose(pit_histogram(upto, below), 1, atol=0.06)
    narrow = [predictive.cdf(values, mean, mean + 0.05 * mean**2, 0 * sd) for values in (counts, counts - 1)]
    assert pit_histogram(*narrow)[[0, -1]].min() > 1.3


def test_the_common_factor_of_a_spot_is_recovered() -> None:
    random = np.random.default_rng(2)
    sections = np.repeat(["a", "b", "c"], 400)
    expected = random.uniform(500, 2000, 1200) * np.repeat([1.0, 0.5, 2.0], 400)  # exposures differ
    seen = random.poisson(expected * np.exp(0.4 * random.normal(size=1200)) * np.repeat([1.0, 3.0, 1.0], 400))
    totals = HeldOutSums(seen, expected, expected)
    assert spot_sd(totals, sections) == pytest.approx(0.4, rel=0.06)
    exact = HeldOutSums(random.poisson(expected), expected, expected)
    assert spot_sd(exact, sections) < 0.03


def test_genes_without_counts_do_not_hide_the_shifts_of_others() -> None:
    sums, patients = simulated(12, 2, np.full(300, 0.6), 0.1)
    few = HeldOutSums(*(np.concatenate([part, part[:, :60] / 5000], axis=1) for part in sums))
    few.counts[:, 300:] = np.round(few.counts[:, 300:])
    _, patient = learn_shifts(few, patients)
    assert np.median(patient[:300]) == pytest.approx(0.6, rel=0.15)
    # what counting hides is taken from the other genes
    assert np.median(patient[300:]) == pytest.approx(0.6, rel=0.25)
