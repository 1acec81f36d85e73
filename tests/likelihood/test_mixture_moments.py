"""Moments of mixtures, against scipy's moments of the members and against draws."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from stimage_sd.likelihood.predictive import mixture_moments


@pytest.mark.parametrize("shape", [(1,), (6, 7), (130, 257)])
def test_moments_are_scipys(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    r = random.uniform(0.05, 40, (5, *shape)).astype(np.float32)
    p = random.uniform(0.01, 1, (5, *shape)).astype(np.float32)
    weights = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    found = mixture_moments(r, p, weights=weights)
    members = scipy.stats.nbinom(r.astype(np.float64), p.astype(np.float64))
    means = members.mean()
    mean = np.tensordot(weights, means, axes=1)
    for moment, expected in zip(
        found,
        (mean, np.tensordot(weights, members.var(), axes=1), np.tensordot(weights, (means - mean) ** 2, axes=1)),
        strict=True,
    ):
        assert moment.shape == shape
        assert moment.dtype == np.float32
        np.testing.assert_allclose(moment, expected, rtol=1e-6, atol=1e-12)


def test_a_single_member_has_no_epistemic_variance() -> None:
    r = np.random.default_rng(1).uniform(0.1, 9, (1, 300)).astype(np.float32)
    assert (mixture_moments(r, r / 10, weights=np.ones(1)).epistemic == 0).all()
