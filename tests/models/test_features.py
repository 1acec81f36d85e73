"""The feature space: scikit-learn's principal components, and who is a stranger to them."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from sklearn.covariance import LedoitWolf, ShrunkCovariance
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from stimage_sd import contract, models, pp
from stimage_sd.models._features import LEAST_TILES, FeatureSpace, distances, shrunk_covariance


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


def test_a_new_section_is_standardized_by_itself_or_by_the_cohort() -> None:
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


def test_too_few_tiles_to_standardize_a_section() -> None:
    space = FeatureSpace.fit({"a": embeddings(60)}, n_components=4, standardize="section", seed=0)
    few = embeddings(LEAST_TILES - 1)
    with pytest.raises(ValueError, match=rf"at least {LEAST_TILES} tiles, found {LEAST_TILES - 1}. Fit with `stand"):
        space.reduce(few)
    space.reduce(embeddings(LEAST_TILES))
    FeatureSpace.fit({"a": few}, n_components=4, standardize="cohort", seed=0).reduce(few[:1])


def test_distances_are_those_of_sklearns_shrunk_covariance() -> None:
    values = scaled(embeddings(300, seed=1)).astype(np.float32)
    new = scaled(embeddings(100, seed=2), embeddings(300, seed=1)).astype(np.float32)
    theirs = LedoitWolf().fit(values)
    assert 0.001 < theirs.shrinkage_ < 0.5
    covariance = shrunk_covariance(values, seed=0)
    np.testing.assert_allclose(distances(new, covariance), np.sqrt(theirs.mahalanobis(new)), rtol=2e-3)
    np.testing.assert_allclose(distances(values, covariance), np.sqrt(theirs.mahalanobis(values)), rtol=2e-3)


def test_components_left_out_have_one_variance() -> None:
    """More features than components: the full matrix that is meant, put together and inverted by numpy."""
    values = scaled(embeddings(120, seed=1, n_features=60)).astype(np.float32)
    covariance = shrunk_covariance(values, seed=0)
    directions = covariance.directions.astype(np.float64)
    assert directions.shape == (60, 30)
    beyond = np.eye(60) - directions @ directions.T
    full = directions * covariance.variances[:-1] @ directions.T + covariance.variances[-1] * beyond
    assert np.trace(full) == pytest.approx((values**2).sum() / 120, rel=1e-3)
    new = scaled(embeddings(40, seed=2, n_features=60)).astype(np.float32)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", new, np.linalg.inv(full), new))
    np.testing.assert_allclose(distances(new, covariance), expected, rtol=2e-3)


def test_strangeness_is_the_distance_in_units_of_unseen_tiles() -> None:
    sections = {name: embeddings(300, seed=seed) for seed, name in enumerate("abc")}
    space = FeatureSpace.fit(sections, n_components=5, standardize="section", seed=0)
    whole = np.concatenate(list(sections.values()))
    theirs = np.sqrt(LedoitWolf().fit(scaled(whole)).mahalanobis(scaled(embeddings(50, seed=9), whole)))
    found = space.strangeness(embeddings(50, seed=9))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found / found[0], theirs / theirs[0], rtol=3e-2)
    unseen = []
    for name in "abc":
        others = np.concatenate([values for other, values in sections.items() if other != name])
        own = LedoitWolf().fit(scaled(others)).shrinkage_
        # shrunk as a covariance of all 900 tiles
        fitted = ShrunkCovariance(shrinkage=own * 600 / 900).fit(scaled(others))
        unseen.append(np.sqrt(fitted.mahalanobis(scaled(sections[name], others))))
    np.testing.assert_allclose(theirs / found, np.percentile(np.concatenate(unseen), 95), rtol=4e-2)


@pytest.mark.parametrize("n_sections", [1, 2, 5])
def test_strangers_are_told_from_the_familiar(n_sections: int) -> None:
    sections = {f"s{seed}": embeddings(300, seed=seed) for seed in range(n_sections)}
    space = FeatureSpace.fit(sections, n_components=5, standardize="section", seed=0)
    familiar = space.strangeness(embeddings(2000, seed=20))
    assert (familiar > 1).mean() == pytest.approx(0.05, abs=0.04)
    assert space.strangeness(embeddings(50, seed=21, shift=60.0)).min() > 1


def test_strangers_that_are_usual_feature_by_feature_are_told_too() -> None:
    """Each feature as it is among the familiar, but not together: what a distance feature by feature cannot see."""
    values = embeddings(600, seed=1)
    space = FeatureSpace.fit({"a": values}, n_components=5, standardize="section", seed=0)
    random = np.random.default_rng(0)
    shuffled = np.stack([random.permutation(column) for column in embeddings(300, seed=2).T], axis=1)
    familiar, strange = space.strangeness(embeddings(300, seed=3)), space.strangeness(shuffled)
    labels = np.repeat([0, 1], 300)
    assert roc_auc_score(labels, np.concatenate([familiar, strange])) > 0.98
    by_feature = [(scaled(tiles, values) ** 2).mean(axis=1) for tiles in (embeddings(300, seed=3), shuffled)]
    assert roc_auc_score(labels, np.concatenate(by_feature)) < 0.7


@pytest.mark.slow
def test_noise_and_inverted_pictures_are_strangers(synthetic: Callable) -> None:
    """Real embeddings of a synthetic section's tiles, half of them to learn from, and of planted ones."""
    section = synthetic(n_spots=240, n_genes=10, seed=3)
    image = np.moveaxis(contract.levels(section, "he")[0].to_numpy(), 0, -1)
    pp.tile(section)
    table = contract.tiles(section)
    side = int(contract.tiling(section)["side_px"])
    corners = (np.asarray(table.obsm["spatial"])[table.obs["keep"].to_numpy()] - side / 2).round().astype(int)
    tiles = np.stack([image[max(y, 0) : max(y, 0) + side, max(x, 0) : max(x, 0) + side] for x, y in corners])
    tiles = np.stack([cv2.resize(tile, (128, 128), interpolation=cv2.INTER_AREA) for tile in tiles])
    extractor = models.get_extractor("efficientnet_lite0")
    random = np.random.default_rng(0)
    known, held = tiles[::2], tiles[1::2]
    space = FeatureSpace.fit({"a": extractor(known)}, n_components=32, standardize="cohort", seed=0)
    real = space.strangeness(extractor(held))
    planted = {
        "noise": random.integers(0, 256, (20, 128, 128, 3), dtype=np.uint8),
        "inverted": 255 - held[:20],
    }
    # a network trained to see shapes in any color minds an inverted picture less
    for kind, least in (("noise", 0.95), ("inverted", 0.75)):
        found = space.strangeness(extractor(planted[kind]))
        labels = np.r_[np.zeros(len(real)), np.ones(len(found))]
        assert roc_auc_score(labels, np.r_[real, found]) > least, kind


def test_seed_decides_and_arrays_bring_it_back() -> None:
    sections = {"a": embeddings(100)}
    one, two = (FeatureSpace.fit(sections, n_components=5, standardize="section", seed=0) for _ in range(2))
    np.testing.assert_array_equal(one.components, two.components)
    back = FeatureSpace.from_arrays(one.arrays(), standardize="section")
    np.testing.assert_array_equal(back.reduce(sections["a"]), one.reduce(sections["a"]))
    np.testing.assert_array_equal(back.strangeness(sections["a"]), two.strangeness(sections["a"]))
    assert all(name.startswith("features.") for name in one.arrays())


def test_a_large_cohort_is_sampled() -> None:
    """More tiles than the decomposition looks at: nearly the same space."""
    values = np.concatenate([embeddings(15_000, seed=seed) for seed in range(3)])
    many = FeatureSpace.fit({"a": values}, n_components=3, standardize="section", seed=0)
    theirs = PCA(3, svd_solver="full").fit_transform(scaled(values))
    ours = many.reduce(values)
    for component in range(3):
        assert abs(np.corrcoef(ours[:, component], theirs[:, component])[0, 1]) > 0.99
