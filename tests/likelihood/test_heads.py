"""The heads: their negative binomials are scipy's, members do not know of each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import Array

from stimage_sd.likelihood import negative_binomial
from stimage_sd.likelihood.heads import HEADS, Parameters

N_MEMBERS, N_FEATURES, N_GENES, N_TILES = 3, 5, 4, 7


def made(head: str, *, seed: int = 0) -> tuple[Parameters, np.ndarray, np.ndarray]:
    """Random parameters, features and counts."""
    random = np.random.default_rng(seed)
    mean, dispersion = random.uniform(0.5, 20, N_GENES), random.uniform(0.5, 8, N_GENES)
    parameters = HEADS[head].initial(jax.random.key(seed), mean, dispersion, N_MEMBERS, N_FEATURES)
    parameters = {
        name: array + random.normal(0, 0.3, array.shape).astype(np.float32) for name, array in parameters.items()
    }
    features = random.normal(size=(N_TILES, N_FEATURES)).astype(np.float32)
    return parameters, features, random.poisson(6, (N_TILES, N_GENES)).astype(np.float32)


def r_and_p_64(head: str, parameters: Parameters, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r and p from the paper's formulas, in double precision."""
    weight, bias = (np.asarray(parameters[name], dtype=np.float64) for name in ("weight", "bias"))
    output = np.stack([features.astype(np.float64) @ weight[m] + bias[m] for m in range(len(bias))])
    if head == "paper":
        r, p = output[..., :N_GENES], output[..., N_GENES:]
        return np.log1p(np.exp(r)), 1 / (1 + np.exp(-p))
    r = np.exp(np.asarray(parameters["log_dispersion"], dtype=np.float64))[:, None, :]
    return np.broadcast_to(r, output.shape), r / (r + np.exp(output))


def deeper(p: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Of counts thinned by a factor: those odds of failure, times the factor."""
    odds = factors.astype(np.float64)[:, None] * (1 - p) / p
    return 1 / (1 + odds)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_r_and_p_are_the_papers(head: str) -> None:
    parameters, features, _ = made(head)
    r, p = HEADS[head].r_and_p(parameters, features)
    assert r.shape == p.shape == (N_MEMBERS, N_TILES, N_GENES)
    expected_r, expected_p = r_and_p_64(head, parameters, features)
    np.testing.assert_allclose(r, expected_r, rtol=2e-5)
    np.testing.assert_allclose(p, expected_p, rtol=2e-5)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_a_new_member_predicts_the_mean_only_fit(head: str) -> None:
    mean, dispersion = np.array([0.02, 1.0, 40.0, 900.0]), np.array([0.05, 2.0, 9.0, 300.0])
    parameters = HEADS[head].initial(jax.random.key(0), mean, dispersion, N_MEMBERS, N_FEATURES)
    r, p = HEADS[head].r_and_p(parameters, np.zeros((1, N_FEATURES), np.float32))
    np.testing.assert_allclose(scipy.stats.nbinom.mean(r, p)[:, 0], np.tile(mean, (N_MEMBERS, 1)), rtol=1e-3)
    # the paper's head starts genes that are nearly Poisson at an r of 90
    dispersion = np.minimum(dispersion, 90) if head == "paper" else dispersion
    np.testing.assert_allclose(
        scipy.stats.nbinom.var(r, p)[:, 0], np.tile(mean + mean**2 / dispersion, (N_MEMBERS, 1)), rtol=1e-3
    )
    # all that there is to learn has a gradient at the start
    counts = np.random.default_rng(0).negative_binomial(dispersion, dispersion / (dispersion + mean), (50, N_GENES))
    log_prob = HEADS[head].log_prob
    gradient = jax.grad(
        lambda parameters: log_prob(parameters, np.zeros((50, N_FEATURES)), counts, np.ones(50, np.float32)).sum()
    )(parameters)
    assert np.abs(np.asarray(gradient["bias"])).min() > 0
    weights = np.asarray(parameters["weight"])
    assert np.abs(weights[0] - weights[1]).min() > 0  # members begin at different places
    assert np.abs(weights).max() < 0.01


@pytest.mark.parametrize("head", sorted(HEADS))
def test_rare_and_nearly_poisson_genes_keep_their_mean_in_float32(head: str) -> None:
    mean, dispersion = np.array([1e-3, 1e-2, 0.3, 5.0]), np.full(N_GENES, 1e4)
    parameters = HEADS[head].initial(jax.random.key(0), mean, dispersion, 1, N_FEATURES)
    r, p = HEADS[head].r_and_p(parameters, np.zeros((1, N_FEATURES), np.float32))
    np.testing.assert_allclose(negative_binomial.mean(r=r, p=p)[0, 0], mean, rtol=5e-3)
    np.testing.assert_allclose(negative_binomial.variance(r=r, p=p)[0, 0], mean, rtol=0.06)


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("exposed", [False, True], ids=["unit", "exposed"])
def test_log_prob_is_scipys(head: str, exposed: bool) -> None:
    """A size factor s makes NB(r, p) an NB(r, p / (p + s (1 - p))), whose mean is s times as large."""
    parameters, features, counts = made(head)
    factors = np.linspace(0.2, 3, N_TILES).astype(np.float32) if exposed else np.ones(N_TILES, np.float32)
    r, p = r_and_p_64(head, parameters, features)
    expected = scipy.stats.nbinom.logpmf(counts, r, deeper(p, factors))
    ours = HEADS[head].log_prob(parameters, features, counts, factors)
    assert ours.shape == (N_MEMBERS, N_TILES, N_GENES)
    np.testing.assert_allclose(ours, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("exposed", [False, True], ids=["unit", "exposed"])
def test_gradients_are_finite_differences(head: str, exposed: bool) -> None:
    parameters, features, counts = made(head)
    factors = np.linspace(0.2, 3, N_TILES).astype(np.float32) if exposed else np.ones(N_TILES, np.float32)

    def total(parameters: Parameters) -> Array:
        return HEADS[head].log_prob(parameters, features, counts, factors).sum()

    gradient = jax.grad(total)(parameters)

    def total_64(parameters: dict[str, np.ndarray]) -> float:
        r, p = r_and_p_64(head, parameters, features)
        return float(scipy.stats.nbinom.logpmf(counts, r, deeper(p, factors)).sum())

    wide = {name: np.asarray(array, dtype=np.float64) for name, array in parameters.items()}
    random = np.random.default_rng(1)
    for name, array in wide.items():
        for index in [tuple(random.integers(0, array.shape)) for _ in range(6)]:
            step = np.zeros_like(array)
            step[index] = 1e-5
            slope = (total_64({**wide, name: array + step}) - total_64({**wide, name: array - step})) / 2e-5
            np.testing.assert_allclose(gradient[name][index], slope, rtol=1e-3, atol=2e-3, err_msg=f"{name} {index}")


@pytest.mark.parametrize("head", sorted(HEADS))
def test_members_do_not_know_of_each_other(head: str) -> None:
    parameters, features, counts = made(head)
    ones = np.ones(N_TILES, np.float32)

    def of_member(parameters: Parameters, member: int) -> Array:
        return HEADS[head].log_prob(parameters, features, counts, ones)[member].sum()

    gradient = jax.grad(of_member)(parameters, 1)
    for array in gradient.values():
        assert np.abs(array[1]).max() > 0
        np.testing.assert_array_equal(np.asarray(array)[[0, 2]], 0)
    # a member alone computes what it computes among others
    alone = {name: array[1:2] for name, array in parameters.items()}
    np.testing.assert_allclose(
        HEADS[head].log_prob(alone, features, counts, ones)[0],
        HEADS[head].log_prob(parameters, features, counts, ones)[1],
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("head", sorted(HEADS))
def test_everything_stays_finite_far_out(head: str) -> None:
    parameters, features, _ = made(head)
    counts = np.array([[0, 1, 1e4, 1e6]] * N_TILES, dtype=np.float32)
    factors = np.array([1e-3, 1e-2, 0.1, 1, 10, 100, 1000], np.float32)

    def total(parameters: Parameters, scale: float) -> Array:
        return HEADS[head].log_prob(parameters, scale * features, counts, factors).sum()

    for scale in (0.0, 10.0, 1e3, 1e6):
        value, gradient = jax.value_and_grad(total)(parameters, scale)
        assert jnp.isfinite(value)
        assert all(bool(jnp.isfinite(array).all()) for array in gradient.values())
        r, p = HEADS[head].r_and_p(parameters, scale * features)
        assert bool(((r > 0) & (p > 0) & (p < 1)).all())
