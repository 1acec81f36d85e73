"""Heads whose spots are sums of nuclei, against scipy and against the paper's head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from stimage_sd.likelihood import instances, negative_binomial
from stimage_sd.likelihood.heads import HEADS
from stimage_sd.likelihood.instances import Bags
from stimage_sd.likelihood.sums import softplus, summed_log_prob_of_r

N_GENES, N_MEMBERS = 4, 2


def made(seed: int, sizes: list[int], *, background: float = 0.0) -> tuple[dict[str, jax.Array], Bags]:
    """Random heads and spots of some sizes."""
    random = np.random.default_rng(seed)
    n, spot = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    parameters = instances.initial(
        jax.random.key(seed), np.full(N_GENES, 5.0), np.full(N_GENES, 2.0), N_MEMBERS, 3, 2, n_nuclei=3
    )
    parameters = {
        name: array + random.normal(0, 0.3, array.shape).astype(np.float32) for name, array in parameters.items()
    }
    bags = Bags(
        jnp.asarray(random.normal(size=(N_MEMBERS, len(sizes), 2)), jnp.float32),
        jnp.asarray(random.normal(size=(N_MEMBERS, n, 3)), jnp.float32),
        jnp.asarray(spot, jnp.int32),
        jnp.full(len(sizes), background, jnp.float32),
        jnp.asarray(random.normal(size=len(sizes)), jnp.float32),
    )
    return parameters, bags


@settings(max_examples=15)  # every shape is compiled
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 100), st.floats(0.05, 1))
def test_a_spot_has_the_distribution_of_the_sum_of_its_nuclei(sizes, seed, background):
    parameters, bags = made(seed, sizes, background=background)
    counts = np.random.default_rng(seed).poisson(5, (len(sizes), N_GENES))
    depth = np.random.default_rng(seed + 1).uniform(0.2, 3, len(sizes))
    r, p = (np.asarray(a, np.float64) for a in instances.r_and_p_of_nuclei(parameters, bags))
    r_background, p_spot = (
        np.asarray(a, np.float64) for a in instances.r_and_p_of_background(parameters, bags.context, bags.background)
    )
    summed = r_background.copy()
    for nucleus, spot in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        summed[:, spot] += r[:, nucleus]
        np.testing.assert_array_equal(p[:, nucleus], p_spot[:, spot])
    at_depth = p_spot / (p_spot + depth[:, None] * (1 - p_spot))
    expected = scipy.stats.nbinom.logpmf(counts, summed, at_depth).sum(axis=-1)
    found = instances.summed_log_prob(
        parameters, bags, jnp.asarray(counts, jnp.float32), jnp.asarray(depth, jnp.float32)
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)


def test_the_sum_of_simulated_nuclei_follows_the_distribution_of_the_spot():
    parameters, bags = made(3, [4], background=0.5)
    r, p = instances.r_and_p_of_nuclei(parameters, bags)
    r_background, p_spot = instances.r_and_p_of_background(parameters, bags.context, bags.background)
    of_spot, _ = instances.r_and_p(parameters, bags)
    random = np.random.default_rng(0)
    parts = np.concatenate([r[0], r_background[0]]), np.concatenate([p[0], p_spot[0]])
    drawn = random.negative_binomial(*(np.asarray(a, np.float64) for a in parts), (20_000, 5, N_GENES)).sum(axis=1)
    for gene in range(N_GENES):
        values = np.arange(drawn.max() + 1)
        expected = scipy.stats.nbinom.cdf(values, float(of_spot[0, 0, gene]), float(p_spot[0, 0, gene]))
        seen = (drawn[:, gene, None] <= values).mean(axis=0)
        assert np.abs(seen - expected).max() < 0.015


def test_a_spot_of_one_nucleus_is_the_papers_head():
    parameters, bags = made(0, [1, 1, 1])
    # the paper's head has no hidden layer, and its r sees the features of one tile
    absent = ("weight_context", "weight_hidden", "crowding")
    parameters = {**parameters, **{name: jnp.zeros_like(parameters[name]) for name in absent}}
    # the paper's head sees one set of features: here those of the nucleus, then those of the spot
    features = jnp.concatenate([bags.features, bags.context], axis=-1)
    zeros = jnp.zeros((N_MEMBERS, 2, N_GENES)), jnp.zeros((N_MEMBERS, 3, N_GENES))
    weight = jnp.concatenate(
        [
            jnp.concatenate([parameters["weight_nuclei"], zeros[0]], axis=1),
            jnp.concatenate([zeros[1], parameters["weight_p"]], axis=1),
        ],
        axis=-1,
    )
    paper = {"weight": weight, "bias": jnp.concatenate([parameters["bias"], parameters["bias_p"]], axis=-1)}
    for found, expected in zip(
        instances.r_and_p(parameters, bags), HEADS["paper"].r_and_p(paper, features), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5)
    counts, ones = jnp.asarray(np.random.default_rng(0).poisson(4, (3, N_GENES)), jnp.float32), jnp.ones(3)
    np.testing.assert_allclose(
        instances.summed_log_prob(parameters, bags, counts, ones),
        HEADS["paper"].summed_log_prob(paper, features, counts, ones),
        rtol=1e-4,
    )


def test_padding_and_the_order_of_nuclei_do_not_matter():
    parameters, bags = made(1, [2, 0, 3], background=0.3)
    order = np.array([4, 1, 0, 3, 2])
    padded = Bags(
        bags.context,
        jnp.pad(bags.features[:, order], ((0, 0), (0, 6), (0, 0)), constant_values=7.0),
        jnp.pad(bags.spot[order], (0, 6), constant_values=3),
        bags.background,
        bags.crowding,
    )
    counts, ones = jnp.full((3, N_GENES), 4.0), jnp.ones(3)
    np.testing.assert_allclose(
        instances.summed_log_prob(parameters, padded, counts, ones),
        instances.summed_log_prob(parameters, bags, counts, ones),
        rtol=1e-6,
    )


def test_gradients_equal_those_of_the_accurate_likelihood():
    parameters, bags = made(2, [3, 1, 5], background=0.4)
    counts, ones = jnp.asarray([[0.0, 3, 80, 1], [2, 0, 5, 9], [30, 1, 0, 700]]), jnp.asarray([1.0, 0.3, 2.0])

    def fast(parameters: dict[str, jax.Array]) -> jax.Array:
        return instances.summed_log_prob(parameters, bags, counts, ones).sum()

    def accurate(parameters: dict[str, jax.Array]) -> jax.Array:
        r, p = instances.r_and_p(parameters, bags)
        p = p / (p + ones[:, None] * (1 - p))
        return negative_binomial.log_prob(counts[None], r=r, p=p).sum()

    assert float(fast(parameters)) == pytest.approx(float(accurate(parameters)), rel=1e-5)
    found, expected = jax.grad(fast)(parameters), jax.grad(accurate)(parameters)
    for name in parameters:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-3, atol=2e-3 * np.abs(expected[name]).max())


@given(st.floats(-80, 80))
def test_softplus_and_its_slope(x):
    value, slope = jax.value_and_grad(softplus)(jnp.float32(x))
    assert float(value) == pytest.approx(float(np.logaddexp(0, np.float64(np.float32(x)))), rel=1e-5, abs=1e-30)
    assert float(slope) == pytest.approx(float(jax.nn.sigmoid(jnp.float32(x))), rel=1e-5, abs=1e-30)


@given(st.integers(0, 5000), st.floats(1e-4, 1e4), st.floats(-10, 10), st.floats(0.01, 20))
def test_the_likelihood_of_r_equals_scipys(count, r, p_logits, depth):
    r, p_logits, depth = (float(np.float32(v)) for v in (r, p_logits, depth))
    found = summed_log_prob_of_r(
        jnp.full((1, 1), float(count)), jnp.full((1, 1, 1), r), jnp.full((1, 1, 1), p_logits), jnp.full(1, depth)
    )
    p = 1 / (1 + depth * np.exp(-p_logits))
    expected = float(scipy.stats.nbinom.logpmf(count, r, p))
    assert float(found[0, 0]) == pytest.approx(expected, abs=1e-4 + 3e-6 * (count + r + abs(expected)))
