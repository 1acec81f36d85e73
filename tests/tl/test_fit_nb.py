"""Fitting: what was planted is found again, the same seed gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from spatialdata import SpatialData

from stimage_sd import contract, pp, tl
from stimage_sd.models import NBModel, load
from stimage_sd.tl._score.cross_validate import shallow_copy

QUICK = {"extractor": "toy", "n_members": 3, "max_epochs": 8}


@pytest.fixture(scope="module")
def cohort(planted: Callable) -> object:
    return planted()


def train_of(cohort: object) -> dict[str, SpatialData]:
    return {name: sdata for name, sdata in cohort.sections.items() if name != "d"}


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a[:, gene], b[:, gene])[0, 1] for gene in range(a.shape[1])])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["paper", "dispersion"])
def test_planted_truth_is_recovered(cohort: object, head: str) -> None:
    # sections of one patient, since planted genes do not shift
    patients = dict.fromkeys(train_of(cohort), "p")
    model = tl.fit_nb(
        train_of(cohort), genes=cohort.genes, extractor="toy", head=head, n_members=5, max_epochs=150, patience=20,
        patients=patients,
    )  # fmt: skip
    test = shallow_copy(cohort.sections["d"])
    contract.remember(test, patient="p")
    tl.predict(test, model)
    scores = tl.evaluate(test)
    truth = np.log(cohort.mean["d"])
    assert pearson(np.log(contract.predictions(test).X), truth).min() > 0.9
    assert (scores["nll"] < scores["nll_floor"]).mean() > 0.9
    assert scores["nll"].mean() < scores["nll_floor"].mean() - 0.1
    assert 0.85 <= scores["coverage"].mean() <= 0.95
    # the level is no accident of rounding: a mean within a tenth of the truth for most
    assert np.median(np.abs(np.log(contract.predictions(test).X) - truth)) < 0.2


def test_model_says_what_it_was_fitted_on(cohort: object, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="stimage_sd"):
        model = tl.fit_nb(train_of(cohort), genes=cohort.genes, seed=7, **QUICK)
    assert f"Fitting 3 members to {len(cohort.genes)} genes on {3 * 196} tiles, in at most" in caplog.text
    assert isinstance(model, NBModel)
    assert model.genes == tuple(cohort.genes)
    assert model.n_members == 3
    assert model.training["sections"] == ["a", "b", "c"]
    assert model.training["seed"] == 7
    assert model.training["n_tiles"] == 3 * 196
    # with three sections and 30 % each member has one to itself
    assert sorted(map(tuple, model.training["validation"])) == [("a",), ("b",), ("c",)]
    assert model.tiles.extractor == "toy"
    assert model.tiles.size_um == 50.0
    history = model.history
    assert list(history.columns) == ["epoch", "member", "training_nll", "validation_nll"]
    assert len(history) == 3 * history["epoch"].max()
    for member in range(3):
        rows = history[history["member"] == member]
        assert rows["validation_nll"].min() == pytest.approx(model.training["metrics"]["validation_nll"][member])
    assert "toy" in repr(model)
    assert model.facts()["members"] == "3, head 'paper'"


def saved(model: NBModel, folder: Path) -> dict[str, np.ndarray]:
    return load_file(model.save(folder) / "model.safetensors")


def test_same_seed_same_bits(cohort: object, tmp_path: Path) -> None:
    first, again, other = (
        saved(tl.fit_nb(train_of(cohort), genes=cohort.genes, seed=seed, **QUICK), tmp_path / str(number))
        for number, seed in enumerate((3, 3, 4))
    )
    assert set(first) == set(again)
    for name, array in first.items():
        assert array.tobytes() == again[name].tobytes(), name
    assert (first["head.weight"] != other["head.weight"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["paper", "dispersion"])
def test_members_differ_and_one_is_enough(cohort: object, head: str) -> None:
    many = tl.fit_nb(train_of(cohort), genes=cohort.genes, head=head, **QUICK)
    weights = many.parameters["weight"]
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    one = tl.fit_nb(train_of(cohort), genes=cohort.genes, head=head, **{**QUICK, "n_members": 1})
    test = cohort.sections["d"]
    tl.predict(test, one)
    layers = contract.predictions(test).layers
    np.testing.assert_allclose(layers["epistemic"], layers["shift"], rtol=1e-5)
    tl.predict(test, many)
    layers = contract.predictions(test).layers
    assert (layers["epistemic"] > layers["shift"]).mean() > 0.99


def test_a_single_section_is_enough(cohort: object) -> None:
    model = tl.fit_nb(cohort.sections["a"], genes=cohort.genes, **QUICK)
    assert model.training["sections"] == ["a"]
    assert model.training["validation"] == [["a"]] * 3


@pytest.mark.slow
def test_validation_by_name(cohort: object) -> None:
    model = tl.fit_nb(train_of(cohort), genes=cohort.genes, validation=["b"], **QUICK)
    assert model.training["validation"] == [["b"]] * 3


def test_training_stops_early(cohort: object) -> None:
    random = np.random.default_rng(0)
    noise = train_of(cohort)
    kept = {name: contract.tiles(sdata).obsm["X_toy"] for name, sdata in noise.items()}
    try:
        for sdata in noise.values():  # nothing to learn
            contract.tiles(sdata).obsm["X_toy"] = random.normal(size=(196, 12)).astype(np.float32)
        model = tl.fit_nb(noise, genes=cohort.genes, patience=3, **{**QUICK, "max_epochs": 200})
    finally:
        for name, sdata in noise.items():
            contract.tiles(sdata).obsm["X_toy"] = kept[name]
    epochs = model.history["epoch"].max()
    assert epochs < 200
    best = model.training["metrics"]["best_epoch"]
    assert epochs - max(best) >= 3
    # and what is kept is the best epoch, not the last
    losses = model.history.pivot(index="epoch", columns="member", values="validation_nll")
    assert list(losses.idxmin()) == best


def test_size_factors_take_depth_out(planted: Callable) -> None:
    deep = planted(("a", "b", "c"), depth=0.5, seed=5)
    options = {"genes": deep.genes, "extractor": "toy", "n_members": 3, "max_epochs": 80}
    train = {name: deep.sections[name] for name in "ab"}
    model = tl.fit_nb(train, size_factors="total", **options)
    totals = np.concatenate([contract.counts(sdata).X.sum(axis=1).A1 for sdata in train.values()])
    assert model.total == pytest.approx(np.median(totals))
    test = deep.sections["c"]
    tl.predict(test, model)
    median_depth = contract.predictions(test).X.copy()
    np.testing.assert_array_equal(contract.predictions(test).obs["size_factor"], 1)
    tl.predict(test, model, size_factors="total")
    predictions = contract.predictions(test)
    expected = contract.counts(test).X.sum(axis=1).A1 / model.total
    np.testing.assert_allclose(predictions.obs["size_factor"], expected, rtol=1e-5)
    np.testing.assert_allclose(predictions.X, median_depth * expected[:, None], rtol=1e-4)
    with_depth = tl.evaluate(test)
    plain = tl.fit_nb(train, **options)
    tl.predict(test, plain)
    assert with_depth["nll"].mean() < tl.evaluate(test)["nll"].mean()
    assert 0.8 <= with_depth["coverage"].mean() <= 0.97
    with pytest.raises(ValueError, match="fitted without size factors"):
        tl.predict(test, plain, size_factors="total")


@pytest.mark.slow
def test_only_kept_tiles_are_learned_from(planted: Callable) -> None:
    cohort = planted(("a", "b"), n_side=10)
    for sdata in cohort.sections.values():
        tiles = contract.tiles(sdata)
        tiles.obs["keep"] = np.arange(100) >= 30
        tiles.obsm["X_toy"][:30] = 1e6  # would ruin the feature space
    model = tl.fit_nb(cohort.sections, genes=cohort.genes, **QUICK)
    assert model.training["n_tiles"] == 140
    assert model.features.mean.max() < 10
    tl.predict(cohort.sections["a"], model)
    predictions = contract.predictions(cohort.sections["a"])
    assert predictions.n_obs == 70
    assert list(predictions.obs["instance_id"]) == list(range(30, 100))


@pytest.mark.slow
def test_genes_never_seen_are_predicted_finitely(planted: Callable) -> None:
    cohort = planted(("a", "b"), n_side=8)
    for sdata in cohort.sections.values():
        counts = contract.counts(sdata).X.tolil()
        counts[:, 0] = 0
        counts[:, 1] = 5
        contract.counts(sdata).X = counts.tocsr()
    for head in ("paper", "dispersion"):
        model = tl.fit_nb(cohort.sections, genes=cohort.genes, head=head, **QUICK)
        tl.predict(cohort.sections["a"], model)
        predictions = contract.predictions(cohort.sections["a"])
        for values in (predictions.X, *predictions.layers.values()):
            assert np.isfinite(values).all()
        assert predictions.X[:, 0].max() < 0.1
        np.testing.assert_allclose(predictions.X[:, 1], 5, rtol=0.3)


# --------------------------------------------------------------------------------------------------
# refusals


def test_options_out_of_range(cohort: object) -> None:
    for match, options in [
        (r"`head` to be one of \['dispersion', 'paper'\], found 'linear'", {"head": "linear"}),
        ("`n_members` of at least 1, found 0", {"n_members": 0}),
        ("`max_epochs` of at least 1, found 0", {"max_epochs": 0}),
        ("`batch_size` of at least 1, found 0", {"batch_size": 0}),
        ("`n_components` of at least 1, found 0", {"n_components": 0}),
        ("`patience` of at least 1, found 0", {"patience": 0}),
        ("`learning_rate` to be positive .* found 0.0 and 10.0", {"learning_rate": 0.0}),
        ("`weight_decay` .* no less than 0, found 0.03 and -1", {"learning_rate": 0.03, "weight_decay": -1.0}),
        ("`size_factors` to be None or \"total\", found 'log'", {"size_factors": "log"}),
        ("list of different names, found an empty list", {"genes": []}),
        (r"list of different names, found \['G1'\]", {"genes": ["G1", "G2", "G1"]}),
        (r"some, not all, of the sections \['a', 'b', 'c'\], found \['z'\]", {"validation": ["z"]}),
    ]:
        with pytest.raises(ValueError, match=match):
            tl.fit_nb(train_of(cohort), **{"genes": cohort.genes, **QUICK, **options})


def test_missing_genes_are_named_with_their_section(cohort: object) -> None:
    with pytest.raises(KeyError, match=r"2 of 3 genes are absent from section 'a': \['ERBB2', 'CD4'\].*select_genes"):
        tl.fit_nb(train_of(cohort), genes=["ERBB2", "G1", "CD4"], **QUICK)


def test_missing_steps_are_named(cohort: object, make_spots: Callable) -> None:
    with pytest.raises(KeyError, match="no embeddings by 'efficientnet_lite0_stages'"):
        tl.fit_nb(train_of(cohort), genes=cohort.genes)
    with pytest.raises(KeyError, match="'bare' has no tiles"):
        tl.fit_nb(make_spots(n_side=4, tiled=False, sample="bare"), genes=["G0"], extractor="toy")


def test_sections_prepared_unlike_each_other(planted: Callable) -> None:
    cohort = planted(("a", "b"), n_side=6)
    other = cohort.sections["b"]
    how = contract.tiles(other).uns["embeddings"]["toy"]
    for change, match in [
        ({"weights_hash": "ffff"}, "'b' does not match: embeddings by other weights of 'toy'"),
        ({"fields_of_view": [1.0, 2.0]}, r"fields of view \(1.0, 2.0\), expected \(1.0,\): run .*pp.embed"),
        ({"input_px": 224}, "embedded at 224 px, expected 299 px"),
    ]:
        before = dict(how)
        how.update(change)
        with pytest.raises(ValueError, match=match):
            tl.fit_nb(cohort.sections, genes=cohort.genes, **QUICK)
        how.clear()
        how.update(before)
    pp.spatial_context(other, "toy")
    with pytest.raises(ValueError, match="1 rings of context, expected 0"):
        tl.fit_nb(cohort.sections, genes=cohort.genes, **QUICK)


def test_a_section_too_small_to_standardize(planted: Callable) -> None:
    cohort = planted(("a", "b"), n_side=4)
    with pytest.raises(ValueError, match=r"at least 20 tiles, found 16 in section 'a'. Fit with `standardize="):
        tl.fit_nb(cohort.sections, genes=cohort.genes, standardize="section", **QUICK)
    assert tl.fit_nb(cohort.sections, genes=cohort.genes, standardize="cohort", **QUICK).n_members == 3


@pytest.mark.parametrize("rank", [2, None])
def test_rank_is_what_heads_see(cohort: object, tmp_path: Path, rank: int | None) -> None:
    model = tl.fit_nb(train_of(cohort), genes=cohort.genes, rank=rank, **QUICK)
    n_components = model.features.components.shape[1]
    if rank is None:
        assert model.patterns is None
        assert model.parameters["weight"].shape[1] == n_components
    else:
        assert model.patterns.basis.shape[:2] == (3, n_components)
        assert model.parameters["weight"].shape[1] == model.patterns.rank == rank
    assert model.training["options"]["rank"] == rank
    test = cohort.sections["d"]
    tl.predict(test, model)
    means = contract.predictions(test).X.copy()
    tl.predict(test, load(model.save(tmp_path / "model.stimage")))
    np.testing.assert_array_equal(contract.predictions(test).X, means)


def test_a_rank_of_nothing_is_refused(cohort: object) -> None:
    with pytest.raises(ValueError, match="`rank` of at least 1"):
        tl.fit_nb(train_of(cohort), genes=cohort.genes, rank=0, **QUICK)


@pytest.fixture(scope="module")
def seen_by_two(planted: Callable) -> object:
    """A cohort of which each of two extractors sees half of the features, one of them the wider by noise."""
    cohort = planted(("a", "b", "c"), n_features=10, seed=4)
    random = np.random.default_rng(5)
    for sdata in cohort.sections.values():
        tiles = contract.tiles(sdata)
        features = tiles.obsm["X_toy"]
        tiles.obsm["X_wide"] = np.hstack([features[:, 5:], random.normal(size=(len(features), 40))]).astype(np.float32)
        tiles.obsm["X_toy"] = features[:, :5].copy()
        tiles.uns["embeddings"]["wide"] = {**tiles.uns["embeddings"]["toy"], "weights_hash": "fedc"}
    return cohort


@pytest.mark.slow
def test_several_extractors_see_more_than_each(seen_by_two: object, tmp_path: Path) -> None:
    sections, truth = seen_by_two.sections, np.log(seen_by_two.mean["c"])
    train = {name: sections[name] for name in "ab"}
    agreement = {}
    for extractor in ("toy", "wide", ("toy", "wide")):
        model = tl.fit_nb(train, genes=seen_by_two.genes, extractor=extractor, n_members=3, max_epochs=60)
        tl.predict(sections["c"], model)
        agreement[extractor] = pearson(np.log(contract.predictions(sections["c"]).X), truth).mean()
    assert agreement["toy", "wide"] > max(agreement["toy"], agreement["wide"]) + 0.1
    # what five features of one have to say weighs as much as the forty-five of the other
    weight = model.features.weight
    np.testing.assert_allclose((weight[:5] ** 2).sum(), (weight[5:] ** 2).sum(), rtol=1e-5)
    means = contract.predictions(sections["c"]).X.copy()
    assert contract.predictions(sections["c"]).uns["prediction"]["extractor"] == "toy+wide"
    back = load(model.save(tmp_path / "two.stimage"))
    assert [tiles.extractor for tiles in back.embeddings] == ["toy", "wide"]
    tl.predict(sections["c"], back)
    np.testing.assert_array_equal(contract.predictions(sections["c"]).X, means)


def test_a_section_that_lacks_one_of_the_extractors(seen_by_two: object, cohort: object) -> None:
    train = {name: seen_by_two.sections[name] for name in "ab"}
    model = tl.fit_nb(train, genes=seen_by_two.genes, extractor=("toy", "wide"), n_members=1, max_epochs=2)
    with pytest.raises(KeyError, match="no embeddings by 'wide'"):
        tl.predict(cohort.sections["d"], model)
    with pytest.raises(ValueError, match="a name or different names, found"):
        tl.fit_nb(train, genes=seen_by_two.genes, extractor=("toy", "toy"), n_members=1)
