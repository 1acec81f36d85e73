"""The feature space: scikit-learn's principal components, and who is a stranger to them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from stimage_sd.models._features import LEAST_TILES, FeatureSpace


def embeddings(n_tiles: int, *, seed: int = 0, n_features: int = 20, shift: float = 0.0) -> np.ndarray:
    """Correlated features of unlike scale and offset."""
    mixing = np.random.default_rng(99).normal(size=(n_features, n_features))
    latent = np.random.default_rng(seed).normal(size=(n_tiles, n_features)) * np.geomspace(5, 0.05, n_features)
    return ((latent @ mixing) * np.geomspace(0.1, 10, n_features) + np.arange(n_features) + shift).astype(np.float32)


def scaled(values: np.ndarray, by: np.ndarray | None = None) -> np.ndarray:
    by = values if by is None else by
    return (values.astype(np.float64) - by.mean(axis=0, dtype=np.float64)) / by.std(axis=0, dtype=np.float64)


def same_up_to_sign(ours: np.ndarray, theirs: np.ndarray, rtol: float) -> None:
    signs = np.sign((ours * theirs).sum(axis=0))
    np.testing.assert_allclose(ours, theirs * signs, atol=rtol * np.abs(theirs).max())


@pytest.mark.parametrize("standardize", ["section", "cohort"])
def test_reduced_is_sklearns_pca(standardize: str) -> None:
    sections = {"a": embeddings(120, seed=1), "b": embeddings(80, seed=2, shift=3.0)}
    space = FeatureSpace.fit(sections, n_components=6, standardize=standardize, seed=0)
    whole = np.concatenate(list(sections.values()))
    if standardize == "section":
        prepared = np.concatenate([scaled(values) for values in sections.values()])
    else:
        prepared = scaled(whole)
    theirs = PCA(6, svd_solver="full").fit_transform(prepared)
    theirs /= theirs[:, 0].std()  # in units of the largest component's deviation
    ours = np.concatenate([space.reduce(values) for values in sections.values()])
    assert ours.dtype == np.float32
    same_up_to_sign(ours, theirs, rtol=5e-3)


def test_a_new_section_is_standardised_by_itself_or_by_the_cohort() -> None:
    sections = {"a": embeddings(100, seed=1), "b": embeddings(100, seed=2)}
    new = embeddings(60, seed=3)
    stained = 1.7 * new + 4.0  # as another stain or scanner might shift all its tiles
    own = FeatureSpace.fit(sections, n_components=5, standardize="section", seed=0)
    np.testing.assert_allclose(own.reduce(stained), own.reduce(new), atol=2e-4)
    cohort = FeatureSpace.fit(sections, n_components=5, standardize="cohort", seed=0)
    assert np.abs(cohort.reduce(stained) - cohort.reduce(new)).max() > 1
    # a tile's place in the space of the cohort does not depend on its company
    np.testing.assert_allclose(cohort.reduce(new[:1])[0], cohort.reduce(new)[0], atol=1e-5)


def test_constant_features_are_no_trouble() -> None:
    values = embeddings(50)
    values[:, 3] = 7.0
    for standardize in ("section", "cohort"):
        space = FeatureSpace.fit({"a": values}, n_components=5, standardize=standardize, seed=0)
        assert np.isfinite(space.reduce(values)).all()
        assert np.abs(space.components[3]).max() < 1e-6


@pytest.mark.parametrize(
    ("n_tiles", "n_features", "asked", "found"), [(200, 20, 256, 20), (25, 40, 256, 24), (50, 8, 3, 3), (50, 1, 5, 1)]
)
def test_components_are_as_many_as_there_can_be(n_tiles: int, n_features: int, asked: int, found: int) -> None:
    values = embeddings(n_tiles, n_features=n_features)
    space = FeatureSpace.fit({"a": values}, n_components=asked, standardize="section", seed=0)
    assert space.reduce(values).shape == (n_tiles, found)


def test_too_few_tiles_to_standardise_a_section() -> None:
    space = FeatureSpace.fit({"a": embeddings(60)}, n_components=4, standardize="section", seed=0)
    few = embeddings(LEAST_TILES - 1)
    with pytest.raises(ValueError, match=rf"at least {LEAST_TILES} tiles, found {LEAST_TILES - 1}. Fit with `stand"):
        space.reduce(few)
    space.reduce(embeddings(LEAST_TILES))
    FeatureSpace.fit({"a": few}, n_components=4, standardize="cohort", seed=0).reduce(few[:1])


def test_strangers_are_told_from_the_familiar() -> None:
    space = FeatureSpace.fit({"a": embeddings(400, seed=1)}, n_components=5, standardize="section", seed=0)
    familiar = space.strangeness(embeddings(400, seed=2))
    assert (familiar > 1).mean() == pytest.approx(0.05, abs=0.04)
    assert space.strangeness(embeddings(50, seed=3, shift=60.0)).min() > 1
    assert space.strangeness(embeddings(400, seed=1)).dtype == np.float32
    assert (space.strangeness(embeddings(400, seed=1)) > 1).mean() == pytest.approx(0.05, abs=0.003)


def test_seed_decides_and_arrays_bring_it_back() -> None:
    sections = {"a": embeddings(100)}
    one, two = (FeatureSpace.fit(sections, n_components=5, standardize="section", seed=0) for _ in range(2))
    np.testing.assert_array_equal(one.components, two.components)
    back = FeatureSpace.from_arrays(one.arrays(), standardize="section")
    np.testing.assert_array_equal(back.reduce(sections["a"]), one.reduce(sections["a"]))
    assert all(name.startswith("features.") for name in one.arrays())


def test_a_large_cohort_is_sampled() -> None:
    """More tiles than the decomposition looks at: nearly the same space."""
    values = np.concatenate([embeddings(15_000, seed=seed) for seed in range(3)])
    many = FeatureSpace.fit({"a": values}, n_components=3, standardize="section", seed=0)
    theirs = PCA(3, svd_solver="full").fit_transform(scaled(values))
    ours = many.reduce(values)
    for component in range(3):
        assert abs(np.corrcoef(ours[:, component], theirs[:, component])[0, 1]) > 0.99
