"""Patterns that genes share: what was planted is found, and nothing of what a member does not train on."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from stimage_sd.models._shared_patterns import find_patterns

N_TILES, N_FEATURES, N_GENES = 240, 20, 30
ONES = np.ones(N_TILES)


def planted(n_patterns: int = 2, seed: int = 0) -> tuple[np.ndarray, sp.csr_matrix, np.ndarray]:
    random = np.random.default_rng(seed)
    features = random.normal(size=(N_TILES, N_FEATURES)).astype(np.float32)
    truth = np.linalg.qr(random.normal(size=(N_FEATURES, n_patterns)))[0]
    logarithms = 1.5 + 0.8 * features @ truth @ random.normal(size=(n_patterns, N_GENES))
    return features, sp.csr_matrix(random.poisson(np.exp(logarithms).clip(0, 500)).astype(np.float32)), truth


def halves(*held: slice) -> np.ndarray:
    held_out = np.zeros((len(held), N_TILES), dtype=bool)
    for member, rows in enumerate(held):
        held_out[member, rows] = True
    return held_out


def test_planted_directions_are_found() -> None:
    features, counts, truth = planted()
    found = find_patterns(features, counts, ONES, halves(slice(0, 80), slice(80, 160)), rank=2)
    assert found.basis.shape == (2, N_FEATURES, 2)
    for basis in found.basis:
        directions = np.linalg.qr(basis)[0]
        # cosines of the angles between the planes
        assert np.linalg.svd(directions.T @ truth)[1].min() > 0.97


def test_largest_pattern_has_unit_deviation_and_no_mean_on_the_training_tiles() -> None:
    features, counts, _ = planted()
    found = find_patterns(features, counts, ONES, halves(slice(0, 80)), rank=4)
    seen = found.project(features)
    assert seen.shape == (1, N_TILES, 4)
    np.testing.assert_allclose(seen[0, 80:].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(seen[0, 80:].std(axis=0).max(), 1, rtol=1e-4)
    np.testing.assert_array_equal(found.project(features, members=[0]), seen)


def test_held_out_counts_are_not_looked_at() -> None:
    features, counts, _ = planted()
    held_out = halves(slice(0, 80), slice(0, 80), slice(160, 240))
    before = find_patterns(features, counts, ONES, held_out, rank=2)
    changed = counts.toarray()
    changed[:80] = np.random.default_rng(1).poisson(50, (80, N_GENES))
    after = find_patterns(features, sp.csr_matrix(changed), ONES, held_out, rank=2)
    if before.basis.shape == after.basis.shape:
        # the penalty is chosen on held-out tiles, the directions are not: they agree up to shrinkage
        cosines = np.linalg.svd(np.linalg.qr(before.basis[0])[0].T @ np.linalg.qr(after.basis[0])[0])[1]
        assert cosines.min() > 0.999
    np.testing.assert_array_equal(before.basis[0], before.basis[1])
    assert np.abs(before.basis[0] - before.basis[2]).max() > 1e-4


@pytest.mark.parametrize("n_genes", [1, 3, N_GENES])
def test_rank_is_never_above_the_genes_or_components(n_genes: int) -> None:
    features, counts, _ = planted()
    found = find_patterns(features, counts[:, :n_genes], ONES, halves(slice(0, 80)), rank=25)
    assert found.basis.shape[-1] == min(n_genes, N_FEATURES)


def test_counts_are_divided_by_size_factors() -> None:
    features, counts, _ = planted()
    factors = np.random.default_rng(3).uniform(0.5, 2, N_TILES)
    deep = sp.csr_matrix(counts.toarray() * factors[:, None])
    plain = find_patterns(features, counts, ONES, halves(slice(0, 80)), rank=2)
    divided = find_patterns(features, deep, factors, halves(slice(0, 80)), rank=2)
    np.testing.assert_allclose(divided.basis, plain.basis, atol=1e-4)
