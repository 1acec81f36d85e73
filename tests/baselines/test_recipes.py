"""Recipes against scikit-learn and closed forms, on arrays alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import nbinom
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from stimage_sd import baselines
from stimage_sd.baselines import MeanOnly, NearestTiles, Retrieval, Ridge
from stimage_sd.likelihood.dispersion import fit_dispersion, interval_level
from stimage_sd.likelihood.mean_only import fit_mean_only
from stimage_sd.models import Recipe, SectionData, TrainingSection
from stimage_sd.models._recipe import folds, recipes
from stimage_sd.stats.spatial import pearson


def made(number: int, *, n_tiles: int = 90, n_genes: int = 7, rank: int = 2) -> TrainingSection:
    """A section whose log means follow a few directions of its embeddings; one tile in ten is not measured."""
    law, random = np.random.default_rng(5), np.random.default_rng([5, number])
    weights = law.normal(size=(20, rank)) @ law.normal(size=(rank, n_genes)) * 0.12
    embeddings = random.normal(size=(n_tiles, 20)).astype(np.float32)
    rows = np.flatnonzero(np.arange(n_tiles) % 10 != 9)
    counts = random.poisson(np.exp(law.uniform(3, 4, n_genes) + embeddings @ weights))[rows]
    positions = np.stack(np.divmod(np.arange(n_tiles), 10), axis=1).astype(float)
    return TrainingSection((embeddings,), positions, rows, sp.csr_matrix(counts), counts.sum(axis=1).astype(float))


@pytest.fixture(scope="module")
def train() -> list[TrainingSection]:
    return [made(number) for number in range(3)]


@pytest.fixture(scope="module")
def test() -> TrainingSection:
    return made(9)


def stacked(sections: list[TrainingSection]) -> tuple[np.ndarray, np.ndarray]:
    embeddings = np.concatenate([section.embeddings[0][section.rows] for section in sections])
    return embeddings, np.concatenate([section.counts.toarray() for section in sections])


def logs(recipe: object, sections: list[TrainingSection], section: SectionData, seed: int = 0) -> np.ndarray:
    return np.log1p(recipe.mean(recipe.fit(sections, seed=seed), section))


@pytest.mark.parametrize("n_components", [5, 20])
def test_ridge_equals_scikit_learn(train, test, n_components):
    embeddings, counts = stacked(train)
    scaler = StandardScaler().fit(embeddings)
    reducer = PCA(n_components, svd_solver="full").fit(scaler.transform(embeddings))
    head = SklearnRidge(alpha=37.0).fit(reducer.transform(scaler.transform(embeddings)), np.log1p(counts))
    expected = head.predict(reducer.transform(scaler.transform(test.embeddings[0])))
    recipe = Ridge(n_components=n_components, penalty=37.0, standardize="cohort")
    np.testing.assert_allclose(logs(recipe, train, test), expected, atol=2e-4)


def test_ridge_without_penalty_is_least_squares(train, test):
    embeddings, counts = stacked(train)
    with_one = np.c_[embeddings, np.ones(len(embeddings))]
    solved, *_ = np.linalg.lstsq(with_one, np.log1p(counts), rcond=None)
    expected = np.c_[test.embeddings[0], np.ones(len(test.positions))] @ solved
    recipe = Ridge(penalty=0.0, standardize="cohort")
    np.testing.assert_allclose(logs(recipe, train, test), expected, atol=1e-3)


def test_low_rank_is_the_best_fit_of_its_rank(train):
    recipe = Ridge(penalty=0.0, standardize="cohort", rank=2)
    full = Ridge(penalty=0.0, standardize="cohort")
    _, counts = stacked(train)
    low, whole = (np.concatenate([logs(one, train, s)[s.rows] for s in train]) for one in (recipe, full))
    # of all fits of a rank, the one that least squares allows is the full fit's own truncation
    centered = whole - whole.mean(axis=0)
    left, singular, right = np.linalg.svd(centered, full_matrices=False)
    expected = (left[:, :2] * singular[:2]) @ right[:2] + np.log1p(counts).mean(axis=0)
    np.testing.assert_allclose(low, expected, atol=2e-3)
    assert np.linalg.matrix_rank(low - low.mean(axis=0), tol=1e-2) == 2


@pytest.mark.slow
def test_held_out_penalty_is_the_better_of_the_extremes(train, test):
    def agreement(penalty: object) -> float:
        predicted = logs(Ridge(penalty=penalty), train, test)[test.rows]
        return float(np.mean(pearson(predicted, np.log1p(test.counts.toarray()))))

    assert agreement("held-out") >= max(agreement(1e-6), agreement(1e6)) - 0.01
    # the benchmark's own rule is a number
    learned = Ridge(penalty="hest").fit(train, seed=0)
    assert learned["penalty"][0] == pytest.approx(100 / (20 * 7))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nearest_tiles_equal_scikit_learn(train, test, metric):
    embeddings, counts = stacked(train)
    scaler = StandardScaler().fit(embeddings)
    reducer = PCA(20, svd_solver="full").fit(scaler.transform(embeddings))
    head = KNeighborsRegressor(9, metric=metric).fit(reducer.transform(scaler.transform(embeddings)), np.log1p(counts))
    expected = head.predict(reducer.transform(scaler.transform(test.embeddings[0])))
    found = logs(NearestTiles(k=9, metric=metric, standardize="cohort"), train, test)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_mean_only_equals_the_mean_only_fit(train, test):
    _, counts = stacked(train)
    found = MeanOnly().mean(MeanOnly().fit(train, seed=0), test)
    np.testing.assert_allclose(found, np.tile(fit_mean_only(counts).mean, (90, 1)), rtol=1e-6)


@pytest.mark.slow
def test_retrieval_finds_what_was_planted(train, test):
    predicted = logs(Retrieval(k=20, n_shared=32, n_epochs=30, batch_size=64), train, test)[test.rows]
    agreement = pearson(predicted, np.log1p(test.counts.toarray()))
    assert agreement.mean() > 0.4
    floor = logs(MeanOnly(), train, test)[test.rows]
    observed = np.log1p(test.counts.toarray())
    assert ((predicted - observed) ** 2).mean() < 0.9 * ((floor - observed) ** 2).mean()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [MeanOnly(), Ridge(rank=2), NearestTiles(k=5), Retrieval(k=5, n_epochs=2)])
def test_same_seed_same_arrays(train, recipe):
    first, again = recipe.fit(train, seed=3), recipe.fit(train, seed=3)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("recipe", [Ridge(standardize="section"), NearestTiles(standardize="section")])
def test_staining_of_a_whole_section_does_not_count(train, test, recipe):
    stained = SectionData((test.embeddings[0] * 3 + 2,), test.positions)
    np.testing.assert_allclose(logs(recipe, train, stained), logs(recipe, train, test), atol=1e-3)


def test_extractors_have_the_same_weight(train, test):
    def doubled(section: TrainingSection) -> TrainingSection:
        # the same features four times over are one extractor, and weigh no more than they did
        return TrainingSection(
            (section.embeddings[0][:, :10], np.tile(section.embeddings[0][:, 10:], (1, 4))),
            section.positions, section.rows, section.counts, section.totals,
        )  # fmt: skip

    def single(section: TrainingSection) -> TrainingSection:
        return TrainingSection(
            (section.embeddings[0][:, :10], section.embeddings[0][:, 10:]),
            section.positions, section.rows, section.counts, section.totals,
        )  # fmt: skip

    # total variance is the number of features, so the penalty is in its units
    many = logs(Ridge(penalty=50.0), [doubled(s) for s in train], doubled(test))
    once = logs(Ridge(penalty=20.0), [single(s) for s in train], single(test))
    np.testing.assert_allclose(many, once, atol=1e-3)


def test_lognorm_does_not_see_depth(train, test):
    recipe = Ridge(penalty=10.0, target="lognorm")

    def deepened(section: TrainingSection) -> TrainingSection:
        factor = np.random.default_rng(1).integers(1, 5, len(section.rows))
        counts = sp.csr_matrix(section.counts.multiply(factor[:, None])).astype(int)
        return TrainingSection(section.embeddings, section.positions, section.rows, counts, section.totals * factor)

    share = recipe.mean(recipe.fit(train, seed=0), test)
    deep = recipe.mean(recipe.fit([deepened(s) for s in train], seed=0), test)
    np.testing.assert_allclose(share / share.sum(1, keepdims=True), deep / deep.sum(1, keepdims=True), rtol=1e-3)


def test_folds_leave_out_every_measured_tile_once(train):
    for sections in (train, train[:1]):
        held = [section for fold in folds(sections) for section in fold.test]
        assert sum(len(section.rows) for section in held) == sum(len(section.rows) for section in sections)
    for fold in folds(train[:1]):
        assert not set(fold.train[0].rows) & set(fold.test[0].rows)


def test_dispersion_is_that_of_highest_likelihood():
    random = np.random.default_rng(0)
    means, truth = random.uniform(2, 20, (3000, 3)), np.array([0.7, 4.0, 30.0])
    counts = random.negative_binomial(truth, truth / (truth + means))
    found = fit_dispersion(counts, means)
    np.testing.assert_allclose(found, truth, rtol=0.15)
    for gene, r in enumerate(found.astype(float)):
        at = [nbinom.logpmf(counts[:, gene], s, s / (s + means[:, gene])).sum() for s in (0.99 * r, r, 1.01 * r)]
        assert at[1] >= max(at[0], at[2])
    level = interval_level(counts, means, truth, coverage=0.9)
    assert 0.8 <= level <= 0.92


def test_hyperparameters_are_checked():
    with pytest.raises(ValueError, match="`k` of NearestTiles to be an integer of 1 or more, found 0"):
        NearestTiles(k=0)
    with pytest.raises(ValueError, match="`penalty` of Ridge to be a number of 0 or more"):
        Ridge(penalty="best")
    with pytest.raises(ValueError, match="`target` of MeanOnly to be one of"):
        MeanOnly(target="raw")
    with pytest.raises(ValueError, match="a `dropout` between 0 and 1"):
        Retrieval(dropout=1.0)


def test_all_recipes_are_public_and_go_by_their_names():
    assert set(recipes()) >= {"mean_only", "ridge", "nearest_tiles", "retrieval"}
    assert {recipe.__name__ for recipe in recipes().values()} <= set(baselines.__all__)
    assert all(isinstance(recipe(), Recipe) for recipe in recipes().values())
