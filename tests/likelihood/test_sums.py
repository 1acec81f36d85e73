"""The sums that training uses, against scipy in double precision and against the accurate likelihood."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from stimage_sd.likelihood import negative_binomial as nb
from stimage_sd.likelihood.sums import P_LOGITS, R_LOGITS, summed_log_prob

COUNTS = np.array([0, 1, 2, 3, 7, 30, 250, 4_321, 1e5], dtype=np.float32)
R = np.array([-14.9, -12, -9, -5, -2, -0.7, 0, 0.6, 2, 7, 30, 99], dtype=np.float32)
P = np.array([-14.9, -12, -9, -5, -2, -0.7, 0, 0.6, 2, 5, 9, 14.9], dtype=np.float32)


@pytest.fixture(scope="module")
def grid() -> list[np.ndarray]:
    """Every combination as a tile of its own with one gene, of one member."""
    return [axis.ravel() for axis in np.meshgrid(COUNTS, R, P, indexing="ij")]


def exact(x: np.ndarray, r_logits: np.ndarray, p_logits: np.ndarray, size: float) -> tuple[np.ndarray, ...]:
    """Log-probability and its slopes in the logits, textbook forms in double precision."""
    x, a, b = (np.asarray(values, dtype=np.float64) for values in (x, r_logits, p_logits))
    b = b - np.log(size)
    r, log_p, log_q = np.logaddexp(0, a), -np.logaddexp(0, -b), -np.logaddexp(0, b)
    gammas = scipy.special.gammaln(x + r) - scipy.special.gammaln(r) - scipy.special.gammaln(x + 1)
    slope = scipy.special.digamma(x + r) - scipy.special.digamma(r) + log_p
    return (
        gammas + r * log_p + x * log_q,
        slope * scipy.special.expit(a),
        r * scipy.special.expit(-b) - x * scipy.special.expit(b),
        r,
    )


@jax.jit
def found(x: jax.Array, a: jax.Array, b: jax.Array, size: jax.Array) -> tuple[jax.Array, ...]:
    values, back = jax.vjp(lambda a, b: summed_log_prob(x, a, b, size), a, b)
    return values, *back(jnp.ones_like(values))


@pytest.mark.parametrize("size", [1.0, 0.2, 6.0])
def test_values_and_slopes_are_scipys_to_the_stated_tolerance(grid: list[np.ndarray], size: float) -> None:
    x, a, b = grid
    parts = found(x[:, None], a[None, :, None], b[None, :, None], jnp.full(len(x), size, jnp.float32))
    value, slope_a, slope_b = (np.asarray(part, dtype=np.float64).ravel() for part in parts)
    wanted, wanted_a, wanted_b, r = exact(x, a, b, size)
    assert (np.abs(value - wanted) <= 1e-5 + 1e-6 * (x + r + np.abs(wanted))).all()
    # a slope in the logit of r is a difference of terms as large as r times the logarithm of p
    assert (np.abs(slope_a - wanted_a) <= 1e-5 + 1e-5 * np.abs(wanted_a) + 1e-6 * r * (1 + np.abs(b))).all()
    assert (np.abs(slope_b - wanted_b) <= 1e-6 + 1e-6 * (x + r)).all()


def test_sum_over_genes_is_that_of_the_accurate_likelihood() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (2, 3, 40, 500)).astype(np.float32)
    counts = random.negative_binomial(0.5, 0.3, (40, 500)).astype(np.float32)
    expected = nb.log_prob_from_logits(counts[None], r_logits=logits[0], p_logits=logits[1]).sum(axis=-1)
    np.testing.assert_allclose(summed_log_prob(counts, *logits, jnp.ones(40)), expected, rtol=2e-6)


def test_beyond_the_limits_nothing_changes_and_there_is_no_slope() -> None:
    counts, one = jnp.array([[3.0]]), jnp.ones(1)
    for a, b in ((1e3, 0.0), (-1e3, 0.0), (0.0, 1e3), (0.0, -1e3)):
        value, slope_a, slope_b = found(counts, jnp.full((1, 1, 1), a), jnp.full((1, 1, 1), b), one)
        nearest = np.clip(a, *R_LOGITS), np.clip(b, *P_LOGITS)
        limit = found(counts, *(jnp.full((1, 1, 1), each) for each in nearest), one)
        assert value == limit[0]
        assert (slope_a if a else slope_b) == 0
        assert (slope_b if a else slope_a) != 0
