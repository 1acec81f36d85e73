"""The negative binomial against scipy in double precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from stimage_sd.likelihood import intervals, mean_only
from stimage_sd.likelihood import negative_binomial as nb

COUNTS = np.array([0, 1, 2, 3, 7, 30, 250, 4_321, 1e5, 1e6], dtype=np.float32)
LOGITS = np.array(
    [-30, -20, -12, -10, -9.9, -5, -3, -1, -0.1, 0, 0.3, 0.5412, 0.5414, 1, 2, 5, 10, 20, 30], dtype=np.float32
)

SLOPES_OF_LOGITS = jax.jit(jax.grad(lambda a, b, x: nb.log_prob_from_logits(x, r_logits=a, p_logits=b), argnums=(0, 1)))
SLOPES_OF_MEAN = jax.jit(
    jax.grad(lambda a, b, x: nb.log_prob_from_mean(x, log_mean=a, log_dispersion=b), argnums=(0, 1))
)


def reference_log_prob(x, r, log_p, log_q):
    """Textbook form, in double precision."""
    gammas = scipy.special.gammaln(x + r) - scipy.special.gammaln(r) - scipy.special.gammaln(x + 1)
    return gammas + r * log_p + x * log_q


def reference_from_logits(x, r_logits, p_logits):
    x, r_logits, p_logits = (np.asarray(values, dtype=np.float64) for values in (x, r_logits, p_logits))
    r = np.logaddexp(0, r_logits)
    return reference_log_prob(x, r, -np.logaddexp(0, -p_logits), -np.logaddexp(0, p_logits))


def reference_from_mean(x, log_mean, log_dispersion):
    x, log_mean, log_dispersion = (np.asarray(values, dtype=np.float64) for values in (x, log_mean, log_dispersion))
    log_p = -np.logaddexp(0, log_mean - log_dispersion)
    return reference_log_prob(x, np.exp(log_dispersion), log_p, -np.logaddexp(0, log_dispersion - log_mean))


@pytest.fixture(scope="module")
def grid():
    return [axis.ravel() for axis in np.meshgrid(COUNTS, LOGITS, LOGITS, indexing="ij")]


@pytest.mark.parametrize("r", [1e-3, 0.3, 1.0, 4.5, 200.0])
@pytest.mark.parametrize("p", [1e-3, 0.2, 0.5, 0.93])
def test_likelihood_and_moments_equal_scipy(r, p):
    r32, p32 = np.float32(r), np.float32(p)
    distribution = scipy.stats.nbinom(float(r32), float(p32))
    found = jax.jit(lambda x: nb.log_prob(x, r=r32, p=p32))(COUNTS[:7])
    np.testing.assert_allclose(found, distribution.logpmf(COUNTS[:7]), rtol=1e-5)
    np.testing.assert_allclose(nb.mean(r=r32, p=p32), distribution.mean(), rtol=1e-5)
    np.testing.assert_allclose(nb.variance(r=r32, p=p32), distribution.var(), rtol=1e-5)


def test_from_logits_equals_double_precision(grid):
    x, r_logits, p_logits = grid
    found = nb.log_prob_from_logits(x, r_logits=r_logits, p_logits=p_logits)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference_from_logits(x, r_logits, p_logits), rtol=1e-5)


def test_gradient_of_logits_equals_digammas(grid):
    x, r_logits, p_logits = grid
    total = lambda r, p: nb.log_prob_from_logits(x, r_logits=r, p_logits=p).sum()
    slope_r, slope_p = jax.jit(jax.grad(total, argnums=(0, 1)))(r_logits, p_logits)

    x, r_logits, p_logits = (values.astype(np.float64) for values in grid)
    r, p, q = np.logaddexp(0, r_logits), scipy.special.expit(p_logits), scipy.special.expit(-p_logits)
    digammas = scipy.special.digamma(x + r) - scipy.special.digamma(r)
    log_p = -np.logaddexp(0, -p_logits)
    chain = scipy.special.expit(r_logits)
    # Two terms of opposite sign: at the optimum nothing but their rounding is left.
    scale = chain * (np.abs(digammas) + np.abs(log_p))
    assert np.max(np.abs(slope_r - chain * (digammas + log_p)) / scale) < 2e-6
    assert np.max(np.abs(slope_p - (r * q - x * p)) / (r * q + x * p)) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    x=st.integers(0, 3_000),
    first=st.floats(-8, 8, width=32),
    second=st.floats(-6, 6, width=32),
)
def test_gradients_equal_finite_differences(x, first, second):
    step = 1e-4
    cases = ((SLOPES_OF_LOGITS, reference_from_logits), (SLOPES_OF_MEAN, reference_from_mean))
    for gradient, reference in cases:
        slopes = gradient(jnp.float32(first), jnp.float32(second), jnp.float32(x))
        expected = (
            (reference(x, first + step, second) - reference(x, first - step, second)) / (2 * step),
            (reference(x, first, second + step) - reference(x, first, second - step)) / (2 * step),
        )
        # Relative to the count, which is the size of the terms that cancel.
        np.testing.assert_allclose(slopes, expected, rtol=2e-4, atol=1e-5 * (1 + x))


def test_gradient_of_probability_form_equals_finite_differences():
    x, r, p, step = 6.0, np.float32(1.7), np.float32(0.3), 1e-5
    slopes = jax.grad(lambda r, p: nb.log_prob(x, r=r, p=p), argnums=(0, 1))(r, p)
    log_pmf = lambda r, p: scipy.stats.nbinom(r, p).logpmf(x)
    r, p = float(r), float(p)
    expected = [
        (log_pmf(r + step, p) - log_pmf(r - step, p)) / (2 * step),
        (log_pmf(r, p + step) - log_pmf(r, p - step)) / (2 * step),
    ]
    np.testing.assert_allclose(slopes, expected, rtol=1e-5)


def test_from_mean_equals_double_precision_up_to_the_poisson_limit():
    means = np.array([1e-8, 1e-3, 0.5, 1, 3.3, 17, 1e3, 2e4, 1e6])
    dispersions = np.array([1e-6, 1e-2, 0.5, 0.999, 1, 1.001, 10, 1e3, 1e6])
    log_mean, log_dispersion = (
        axis.ravel().astype(np.float32) for axis in np.meshgrid(np.log(means), np.log(dispersions))
    )
    typical = np.floor(np.exp(log_mean) * 1.02).clip(0, 1e6)
    for x in (*COUNTS, typical):
        found = nb.log_prob_from_mean(x, log_mean=log_mean, log_dispersion=log_dispersion)
        np.testing.assert_allclose(found, reference_from_mean(x, log_mean, log_dispersion), rtol=1e-5)
    poisson = nb.log_prob_from_mean(np.arange(10), log_mean=np.float32(0.5), log_dispersion=np.float32(np.log(1e6)))
    np.testing.assert_allclose(poisson, scipy.stats.poisson(np.exp(0.5)).logpmf(np.arange(10)), rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(r=st.floats(0.01, 50), p=st.floats(0.05, 0.99))
def test_probabilities_sum_to_one(r, p):
    # 4,000 holds all but 1e-9 of the mass of every case, and one shape compiles once.
    log_probabilities = nb.log_prob(np.arange(4_000), r=np.float32(r), p=np.float32(p))
    total = np.exp(np.asarray(log_probabilities, dtype=np.float64)).sum()
    assert total == pytest.approx(1, abs=2e-5)


@pytest.mark.slow
def test_is_transformable_and_strict_about_dtypes():
    counts = jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
    logits = jnp.linspace(-2, 2, 3, dtype=jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        plain = nb.log_prob_from_logits(counts, r_logits=logits, p_logits=logits)
        mapped = jax.jit(jax.vmap(lambda x: nb.log_prob_from_logits(x, r_logits=logits, p_logits=logits)))(counts)
        slope = jax.grad(lambda a: nb.log_prob_from_logits(counts, r_logits=a, p_logits=logits).sum())(logits)
        curved = jax.hessian(lambda a: nb.log_prob_from_mean(3, log_mean=a, log_dispersion=a).sum())(logits[0])
        half = nb.log_prob_from_logits(counts, r_logits=logits.astype(jnp.bfloat16), p_logits=jnp.bfloat16(0.5))
    np.testing.assert_allclose(plain, mapped, rtol=1e-6)
    assert plain.shape == (4, 3)
    assert slope.shape == (3,)
    assert np.all(np.isfinite(slope))
    assert np.isfinite(curved)
    assert half.dtype == jnp.float32


def test_outside_the_support_is_minus_infinity():
    found = nb.log_prob(np.array([-1.0, 0.5, 2.0]), r=1.0, p=0.5)
    assert np.isneginf(found).tolist() == [True, True, False]
    assert nb.log_prob(0, r=2.0, p=1.0) == 0
    assert np.isneginf(nb.log_prob(1, r=2.0, p=1.0))


def test_cdf_equals_scipy():
    x = np.array([-1, 0, 1.5, 20, 3_000])
    r, p = np.array([[0.01], [2.0], [900.0]]), 0.3
    np.testing.assert_allclose(nb.cdf(x, r=r, p=p), scipy.stats.nbinom(r, p).cdf(x), rtol=1e-12)


def mixture_quantile(r, p, probability):
    """Walk up from zero with scipy's distribution function."""
    count = 0
    while scipy.stats.nbinom(r, p).cdf(count).mean() < probability:
        count += 1
    return count


def test_mixture_interval_equals_scipy():
    generator = np.random.default_rng(0)
    r = np.exp(generator.normal(0.5, 1, (5, 6, 7))).astype(np.float32)
    means = np.exp(generator.normal(0, 2, (6, 7)) + generator.normal(0, 0.5, (5, 6, 7)))
    p = (r / (r + means)).astype(np.float32)
    lower, upper = intervals.mixture_interval(r, p, coverage=0.8)
    assert lower.shape == upper.shape == (6, 7)
    assert lower.dtype == upper.dtype == np.float32
    for tile, gene in np.ndindex(6, 7):
        members = r[:, tile, gene].astype(float), p[:, tile, gene].astype(float)
        assert lower[tile, gene] == mixture_quantile(*members, 0.1)
        assert upper[tile, gene] == mixture_quantile(*members, 0.9)


@pytest.mark.parametrize(("r", "mean"), [(0.05, 5e4), (3.0, 8e4), (5e5, 2e3), (1e4, 1e6)])
def test_mixture_interval_of_large_counts_equals_scipy(r, mean):
    p = r / (r + mean * np.array([[0.9], [1.0], [1.2]]))
    bounds = intervals.mixture_interval(np.full_like(p, r), p)
    for bound, probability in zip(bounds, (0.05, 0.95), strict=True):
        mixture = lambda count: scipy.stats.nbinom(r, p).cdf(count).mean()
        assert mixture(float(bound[0])) >= probability
        assert bound[0] == 0 or mixture(float(bound[0]) - 1) < probability


@settings(max_examples=50, deadline=None)
@given(
    coverage=st.floats(0.05, 0.995),
    members=st.lists(st.tuples(st.floats(0.01, 40), st.floats(0.02, 1.0)), min_size=1, max_size=4),
)
def test_mixture_interval_holds_its_coverage(coverage, members):
    r, p = np.array(members)[..., None].transpose(1, 0, 2)
    lower, upper = intervals.mixture_interval(r, p, coverage=coverage)
    mass = (nb.cdf(upper, r=r, p=p) - nb.cdf(lower - 1, r=r, p=p)).mean(axis=0)
    assert lower <= upper
    assert mass >= coverage - 1e-9


def test_mixture_interval_names_what_is_wrong():
    good = np.full((2, 3), 0.5)
    with pytest.raises(ValueError, match=r"one shape .* found \(2, 3\) and \(3,\)"):
        intervals.mixture_interval(good, good[0])
    with pytest.raises(ValueError, match=r"`r` > 0 .* found `r` from -0.5"):
        intervals.mixture_interval(-good, good)
    with pytest.raises(ValueError, match=r"`p` in \(0, 1\]"):
        intervals.mixture_interval(good, np.where(good > 0, np.nan, good))
    with pytest.raises(ValueError, match=r"between 0 and 1, found 1\.5"):
        intervals.mixture_interval(good, good, coverage=1.5)


@pytest.mark.parametrize("deep", [False, True])
def test_mean_only_fit_has_the_highest_likelihood(deep):
    generator = np.random.default_rng(1)
    size_factors = np.exp(generator.normal(0, 0.5, 400)) if deep else None
    depth = np.ones(400) if size_factors is None else size_factors
    means, dispersions = np.exp(generator.normal(0, 1.5, (2, 20)))
    counts = generator.negative_binomial(dispersions, dispersions / (dispersions + depth[:, None] * means))
    fit = mean_only.fit_mean_only(counts, size_factors)
    np.testing.assert_allclose(fit.mean, counts.sum(axis=0) / depth.sum())
    np.testing.assert_allclose(fit.p, fit.r / (fit.r + fit.mean))
    for gene in range(20):
        expected = depth * fit.mean[gene]

        def loss(log_r, gene=gene, expected=expected):
            r = np.exp(log_r)
            return -scipy.stats.nbinom(r, r / (r + expected)).logpmf(counts[:, gene]).sum()

        best = scipy.optimize.minimize_scalar(loss, bounds=np.log([1e-6, 1e6]), method="bounded")
        assert loss(np.log(fit.r[gene])) <= best.fun + 1e-6
    sparse = mean_only.fit_mean_only(scipy.sparse.csr_matrix(counts), size_factors)
    np.testing.assert_array_equal(sparse.r, fit.r)


def test_mean_only_fit_of_genes_without_overdispersion():
    fit = mean_only.fit_mean_only(np.array([[0, 2], [0, 2], [0, 2]]))
    assert fit.mean.tolist() == [0, 2]
    assert fit.p[0] == 1
    assert fit.r[1] == pytest.approx(1e6)


def test_mean_only_fit_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"raw counts .* found 0\.5"):
        mean_only.fit_mean_only(np.array([[1.0], [0.5]]))
    with pytest.raises(ValueError, match=r"`size_factors` to be 2 positive numbers.* found shape \(3,\)"):
        mean_only.fit_mean_only(np.ones((2, 1)), np.ones(3))


@pytest.mark.slow
def test_the_interval_of_a_weighted_mixture_is_scipys() -> None:
    random = np.random.default_rng(3)
    r, p = random.uniform(0.3, 20, (4, 50)), random.uniform(0.05, 0.9, (4, 50))
    # one cell of counts too large for the recurrence
    r[:, 0], p[:, 0] = 40.0, 1e-3
    weights = np.array([0.5, 0.3, 0.2, 0.0])
    lower, upper = intervals.mixture_interval(r, p, coverage=0.8, weights=weights)
    counts = np.arange(200_000)
    for cell in range(50):
        cdf = weights @ scipy.stats.nbinom.cdf(counts[None], r[:, cell, None], p[:, cell, None])
        assert lower[cell] == (cdf < 0.1).sum()
        assert upper[cell] == (cdf < 0.9).sum()
    with pytest.raises(ValueError, match="Expected 4 `weights`"):
        intervals.mixture_interval(r, p, weights=[0.5, 0.5])
