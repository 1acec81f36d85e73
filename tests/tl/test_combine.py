"""Combining models: the law of total variance, weights that can be derived, what does not go together, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from stimage_sd import contract, models, tl
from stimage_sd.tl._predict.held_out import held_out_blocks


@pytest.fixture(scope="module")
def fitted(planted: Callable) -> tuple:
    """A cohort with two extractors, a model over each, and a poor one."""
    cohort = planted(("a", "b", "c", "d"), n_side=10, n_features=6, n_genes=6, strength=1.2)
    for sdata in cohort.sections.values():
        tiles = contract.tiles(sdata)
        # another extractor sees half of what the first does, and noise
        noise = np.random.default_rng(5).normal(size=(tiles.n_obs, 3))
        tiles.obsm["X_other"] = np.hstack([tiles.obsm["X_toy"][:, :3], noise]).astype(np.float32)
        tiles.uns["embeddings"]["other"] = {**tiles.uns["embeddings"]["toy"], "weights_hash": "fedc"}
    train = {name: cohort.sections[name] for name in "ab"}
    options = {"genes": cohort.genes, "max_epochs": 12, "exposure": None}
    good = tl.fit_nb(train, extractor="toy", n_members=3, **options)
    other = tl.fit_nb(train, extractor="other", n_members=2, **options)
    return cohort, good, other


def layers(section: object) -> dict[str, np.ndarray]:
    table = contract.predictions(section)
    return {"mean": table.X.copy(), **{name: layer.copy() for name, layer in table.layers.items()}}


def test_variances_follow_the_law_of_total_variance(fitted: tuple) -> None:
    cohort, good, other = fitted
    test = cohort.sections["c"]
    each = []
    for model in (good, other):
        tl.predict(test, model)
        each.append(layers(test))
    share = np.array([0.7, 0.3])
    both = tl.combine([good, other], weights=[7, 3])
    np.testing.assert_allclose(both.member_weights, [0.7 / 3] * 3 + [0.15] * 2)
    tl.predict(test, both)
    found = layers(test)
    means = np.stack([one["mean"] for one in each]).astype(np.float64)
    mean = np.tensordot(share, means, axes=1)
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-4)
    aleatoric = np.tensordot(share, np.stack([one["aleatoric"] for one in each]), axes=1)
    np.testing.assert_allclose(found["aleatoric"], aleatoric, rtol=1e-4)
    between = np.tensordot(share, (means - mean) ** 2, axes=1)
    within = np.tensordot(share, np.stack([one["epistemic"] for one in each]), axes=1)
    np.testing.assert_allclose(found["epistemic"], within + between, rtol=2e-3, atol=1e-5)
    # the extractors disagree, and the combination says so
    assert between.mean() > 0.2 * within.mean()


def test_intervals_are_scipys_of_the_mixture(fitted: tuple) -> None:
    cohort, good, other = fitted
    test = cohort.sections["c"]
    both = tl.combine([good, other], weights=[0.2, 0.8])
    tl.predict(test, both)
    found = layers(test)
    each = [model.open(test, section="c").r_and_p(slice(0, 30)) for model in (good, other)]
    grid = np.arange(1500)[:, None, None, None]
    cdf = sum(
        share * scipy.stats.nbinom.cdf(grid, r[None].astype(float), p[None].astype(float)).mean(axis=1)
        for share, (r, p) in zip((0.2, 0.8), each, strict=True)
    )
    for layer, probability in (("lower", (1 - both.interval_level) / 2), ("upper", (1 + both.interval_level) / 2)):
        expected = (cdf < probability).sum(axis=0)
        assert (found[layer][:30] != expected).mean() < 0.01


def test_a_model_combined_with_itself_or_alone_is_itself(fitted: tuple) -> None:
    cohort, good, _ = fitted
    test = cohort.sections["c"]
    tl.predict(test, good)
    alone = layers(test)
    for combination in (tl.combine([good]), tl.combine([good, good], weights=[1, 4])):
        tl.predict(test, combination)
        for name, layer in layers(test).items():
            np.testing.assert_allclose(layer, alone[name], rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(combination.floor, good.floor, rtol=1e-4)
        assert combination.interval_level == pytest.approx(good.interval_level)


def test_strangeness_and_description_are_of_all_models(fitted: tuple) -> None:
    cohort, good, other = fitted
    both = tl.combine([good, other], weights=[0.25, 0.75])
    test = cohort.sections["d"]
    opened = [model.open(test, section="d").strangeness for model in (good, other)]
    np.testing.assert_allclose(both.open(test, section="d").strangeness, 0.25 * opened[0] + 0.75 * opened[1], rtol=1e-5)
    assert both.description["extractor"] == "toy + other"
    assert both.training["sections"] == ["a", "b"]
    assert isinstance(both, models._predictor.Predictor)


def test_the_floor_has_the_moments_of_the_mixture(fitted: tuple) -> None:
    _, good, other = fitted
    doubled = replace(other, floor=(other.floor * np.array([[2.0], [0.5]])).astype(np.float32))
    floor = tl.combine([good, doubled], weights=[0.4, 0.6]).floor.astype(np.float64)
    mean, r = (np.stack([model.floor[row] for model in (good, doubled)]).astype(np.float64) for row in (0, 1))
    p = r / (r + mean)
    share = np.array([0.4, 0.6])
    first = share @ scipy.stats.nbinom.mean(r, p)
    second = share @ (scipy.stats.nbinom.var(r, p) + mean**2)
    np.testing.assert_allclose(floor[0], first, rtol=1e-5)
    np.testing.assert_allclose(floor[0] + floor[0] ** 2 / floor[1], second - first**2, rtol=1e-4)


def test_fewer_genes_are_said_aloud_and_kept_in_order(fitted: tuple) -> None:
    cohort, good, _ = fitted
    train = {name: cohort.sections[name] for name in "ab"}
    few = tl.fit_nb(train, extractor="other", genes=["G4", "G1", "G2"], n_members=2, max_epochs=3, exposure=None)
    with pytest.warns(
        UserWarning, match=r"different genes, \[6, 3\] of them\. The combination predicts the 3 genes in common"
    ):
        both = tl.combine([good, few])
    assert both.genes == ("G1", "G2", "G4")
    test = cohort.sections["c"]
    means = []
    for model in (good, few, both):
        tl.predict(test, model)
        means.append(contract.predictions(test).to_df()[list(both.genes)].to_numpy())
    np.testing.assert_allclose(means[2], (means[0] + means[1]) / 2, rtol=1e-4)
    np.testing.assert_allclose(both.floor[0], (good.floor[0][[1, 2, 4]] + few.floor[0][[1, 2, 0]]) / 2, rtol=1e-5)
    with pytest.raises(ValueError, match="no gene in common"):
        tl.combine([few, replace(few, genes=("X", "Y", "Z"))])


def test_validation_weights_are_a_softmax_of_the_models_own(fitted: tuple) -> None:
    _, good, other = fitted
    loss = [np.mean(model.training["metrics"]["validation_nll"]) for model in (good, other)]
    odds = np.exp((loss[1] - loss[0]) / 0.01)
    # three members on two sections in turn, and two: not the same counts
    with pytest.raises(ValueError, match=r"models 0 and 1 are of different held-out tiles.*Pass `validation="):
        tl.combine([good, other], weights="validation")
    even = replace(good, training={**good.training, "validation": other.training["validation"]})
    weights = tl.combine([even, other], weights="validation").weights
    np.testing.assert_allclose(weights, [odds / (1 + odds), 1 / (1 + odds)], rtol=1e-6)
    assert weights[0] > 0.5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fingerprints": [{"section": "a"}, {"section": "z"}]}, "of different sections"),
        ({"metrics": {}}, r"Model 1 \(NBModel\) has no validation likelihood. Pass `validation="),
    ],
)
def test_validation_likelihoods_that_do_not_compare(fitted: tuple, change: dict, match: str) -> None:
    _, good, _ = fitted
    with pytest.raises(ValueError, match=match):
        tl.combine([good, replace(good, training={**good.training, **change})], weights="validation")


def test_validation_likelihoods_compare_where_sections_go_by_other_names(fitted: tuple) -> None:
    _, good, _ = fitted
    other = {"a": "x", "b": "y"}
    training = {
        **good.training,
        "sections": list(other.values()),
        "fingerprints": [{**entry, "section": other[entry["section"]]} for entry in good.training["fingerprints"]],
        "validation": [[other[name] for name in names] for names in good.training["validation"]],
    }
    combined = tl.combine([good, replace(good, training=training)], weights="validation")
    np.testing.assert_allclose(combined.weights, 0.5)


def test_stacking_finds_the_most_likely_mixture(fitted: tuple) -> None:
    cohort, good, other = fitted
    validation = cohort.sections["c"]
    both = tl.combine([good, other], weights="validation", validation=validation)
    probability = []
    for model in (good, other):
        (block,) = next(iter(held_out_blocks(model, {"c": validation}, None)))[1]
        counts = contract.counts(validation)[:, list(model.genes)].X.toarray()
        np.testing.assert_array_equal(block.counts, counts)
        probability.append(scipy.stats.nbinom.pmf(counts, block.r, block.p).mean(axis=0).ravel())

    def loss(weight: float) -> float:
        return -np.log(weight * probability[0] + (1 - weight) * probability[1]).mean()

    best = scipy.optimize.minimize_scalar(loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-6})
    assert both.weights[0] == pytest.approx(best.x, abs=2e-3)
    assert loss(both.weights[0]) <= min(loss(0.0), loss(1.0), loss(0.5)) + 1e-6
    # what found the weights is not new to the combination
    assert both.training["sections"] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="trained on"):
        tl.calibrate(validation, both)


def test_what_does_not_go_together_is_refused(fitted: tuple) -> None:
    cohort, good, other = fitted
    with pytest.raises(ValueError, match="Expected at least one model"):
        tl.combine([])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="Expected 2 `weights`, none negative and not all 0"):
            tl.combine([good, other], weights=weights)
    with pytest.raises(ValueError, match='Expected `weights` to be "equal", "validation" or'):
        tl.combine([good, other], weights="best")
    with pytest.raises(ValueError, match="`validation` finds weights only with"):
        tl.combine([good, other], validation=cohort.sections["c"])
    with pytest.raises(ValueError, match=r"trained on \['a', 'b'\], so \['a'\] cannot show.*to find weights on"):
        tl.combine([good, other], weights="validation", validation={"a": cohort.sections["a"]})
    for total in (None, 120.0):
        with pytest.raises(ValueError, match=r"depths relative to different totals"):
            tl.combine([replace(good, total=100.0), replace(other, total=total)])


def test_a_section_without_one_of_the_embeddings(fitted: tuple, make_spots: Callable) -> None:
    cohort, good, other = fitted
    features = contract.embeddings(cohort.sections["c"], "toy")
    counts = contract.counts(cohort.sections["c"]).X
    section = make_spots(n_side=10, counts=counts, features=features, genes=cohort.genes, sample="new")
    with pytest.raises(KeyError, match="no embeddings by 'other'"):
        tl.predict(section, tl.combine([good, other]))
    assert contract.PREDICTIONS not in section.tables


def test_files_hold_all_models(fitted: tuple, tmp_path: Path) -> None:
    cohort, good, other = fitted
    both = tl.combine([tl.combine([good, other], weights=[1, 3]), good], weights=[0.5, 0.5])
    test = cohort.sections["c"]
    tl.predict(test, both)
    before = layers(test)
    for name in ("both.stimage", "folder"):
        back = models.load(both.save(tmp_path / name))
        assert type(back) is models.CombinedModel
        assert (back.genes, back.weights, back.total, back.training) == (both.genes, both.weights, None, both.training)
        assert back.interval_level == both.interval_level
        tl.predict(test, back)
        for layer, values in layers(test).items():
            np.testing.assert_array_equal(values, before[layer])
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_combinations_are_refused(fitted: tuple, tmp_path: Path) -> None:
    _, good, other = fitted
    path = tl.combine([good, other]).save(tmp_path / "folder")
    # as of version 1, which has no checksum that would refuse any change
    content = json.loads((path / "config.json").read_text()) | {"format_version": 1}
    del content["checksum"]
    config = json.dumps(content)
    for before, after, match in (
        ('"kind": "nb"', '"kind": "forest"', r"folder holds a model of kind 'forest'"),
        ('"weights": [', '"weights": [0.1, ', "damaged: .*3 weights of 2 models"),
        ('"parts": [', '"pieces": [', "damaged: 'parts'"),
    ):
        assert before in config
        (path / "config.json").write_text(config.replace(before, after, 1))
        with pytest.raises(ValueError, match=match):
            models.load(path)
