"""Gene classifier: what was planted is found again, predictions are drawn and scored, files hold it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import esda
import libpysal
import matplotlib as mpl
import numpy as np
import pytest
import scipy.special
import spatialdata
import squidpy as sq
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from stimage_sd import contract, io, models, pp, tl
from stimage_sd.models._gene_classifier import is_high
from stimage_sd.stats import elastic_net
from stimage_sd.stats.spatial import pattern_iou

mpl.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(scope="module")
def fitted(planted: Callable) -> tuple:
    """Two training sections and one to predict, the last gene constant in all; classifiers by both solvers."""
    cohort = planted(("a", "b", "c"), n_side=10, n_features=6, n_genes=5, strength=1.5)
    for sdata in cohort.sections.values():
        counts = contract.counts(sdata)
        dense = counts.X.toarray()
        dense[:, -1] = 3
        counts.X = type(counts.X)(dense)
    train = {name: cohort.sections[name] for name in "ab"}
    options = {"genes": cohort.genes, "extractor": "toy"}
    trained = {solver: tl.fit_gene_classifier(train, solver=solver, **options) for solver in ("proximal", "saga")}
    return cohort, train, trained


def observed_of(sdata: object) -> np.ndarray:
    """High by hand, in the order of the tiles."""
    logged = np.log1p(contract.counts(sdata).X.toarray())
    rows = contract.counts(sdata).obs_names.get_indexer(contract.tiles(sdata).obs["spot_id"])
    deviation = np.where(np.ptp(logged, axis=0) > 0, logged.std(axis=0), np.inf)
    return (((logged - logged.mean(axis=0)) / deviation) > 1e-9)[rows]


def test_what_was_planted_is_found_again_by_either_solver(fitted: tuple) -> None:
    cohort, _, trained = fitted
    test = cohort.sections["c"]
    found = {}
    for solver, model in trained.items():
        tl.predict(test, model)
        found[solver] = contract.gene_classes(test).X.copy()
        scores = tl.evaluate_genes_high(test)
        assert scores["auc"][:4].min() > 0.75
        assert all(model.training["converged"])
    np.testing.assert_allclose(found["proximal"], found["saga"], atol=0.02)


def test_probabilities_are_those_of_the_formula_and_labels_of_the_z_score(fitted: tuple) -> None:
    cohort, train, trained = fitted
    model = trained["proximal"]
    inputs, labels = [], []
    for sdata in train.values():
        values = contract.tiles(sdata).obsm["X_toy"]
        inputs.append((values - values.mean(axis=0)) / values.std(axis=0))
        labels.append(observed_of(sdata))
    expected = elastic_net.fit(np.concatenate(inputs), np.concatenate(labels))
    np.testing.assert_allclose(model.coefficients, expected.coefficients, atol=1e-3)
    np.testing.assert_allclose(model.base_rates, np.concatenate(labels).mean(axis=0), rtol=1e-6)
    test = cohort.sections["c"]
    tl.predict(test, model)
    values = contract.tiles(test).obsm["X_toy"]
    margins = (values - values.mean(axis=0)) / values.std(axis=0) @ model.coefficients.T + model.intercepts
    classes = contract.gene_classes(test)
    np.testing.assert_allclose(classes.X, scipy.special.expit(margins), atol=1e-5)
    np.testing.assert_array_equal(classes.layers["high"], classes.X > 0.5)


def test_scores_are_those_of_scikit_learn_and_the_pattern_iou(fitted: tuple) -> None:
    cohort, _, trained = fitted
    test = cohort.sections["c"]
    tl.predict(test, trained["proximal"])
    classes, observed = contract.gene_classes(test), observed_of(test)
    scores = tl.evaluate_genes_high(test)
    assert list(scores["gene"]) == cohort.genes
    assert set(scores["n_tiles"]) == {100}
    high = np.asarray(classes.layers["high"])
    iou = pattern_iou(high.astype(float), observed.astype(float), classes.obsm["spatial"])
    for gene in range(4):
        row = scores.iloc[gene]
        assert row["base_rate"] == pytest.approx(observed[:, gene].mean())
        assert row["auc"] == pytest.approx(roc_auc_score(observed[:, gene], classes.X[:, gene]), abs=1e-12)
        assert row["f1"] == pytest.approx(f1_score(observed[:, gene], high[:, gene]), abs=1e-12)
        expected = balanced_accuracy_score(observed[:, gene], high[:, gene])
        assert row["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)
        assert row["iou"] == pytest.approx(iou[gene], abs=1e-12)
    # Moran's I by esda, with its own neighbors on the lattice of ten by ten spots
    near = libpysal.weights.lat2W(10, 10, rook=False)
    near.transform = "r"
    for gene in range(4):
        row, truth = scores.iloc[gene], observed[:, gene].astype(float)
        probability = np.asarray(classes.X[:, gene], float)
        assert row["morans_i_observed"] == pytest.approx(esda.Moran(truth, near, permutations=0).I, abs=1e-9)
        assert row["morans_i_predicted"] == pytest.approx(esda.Moran(probability, near, permutations=0).I, abs=1e-6)
        both = esda.Moran_BV(probability, truth, near, permutations=0).I
        assert row["bivariate_morans_i"] == pytest.approx(both, abs=1e-6)
    np.testing.assert_array_equal(classes.var["auc"], scores["auc"])


def test_a_constant_gene_is_never_high_and_has_no_score(fitted: tuple) -> None:
    cohort, _, trained = fitted
    test = cohort.sections["c"]
    for model in trained.values():
        tl.predict(test, model)
        classes = contract.gene_classes(test)
        assert (classes.X[:, -1] == 0).all()
        assert classes.var["base_rate"].iloc[-1] == 0
        row = tl.evaluate_genes_high(test).iloc[-1]
        assert row["base_rate"] == 0
        assert row[["auc", "f1", "balanced_accuracy", "iou"]].isna().all()


def test_equal_counts_are_low_whatever_their_mean_is_rounded_to() -> None:
    counts = np.repeat(np.arange(40)[None], 49, axis=0)
    assert not is_high(counts).any()


def test_a_gene_predicted_high_nowhere_overlaps_nothing(fitted: tuple) -> None:
    cohort, _, trained = fitted
    test = cohort.sections["c"]
    tl.predict(test, trained["proximal"])
    classes = contract.gene_classes(test)
    classes.layers["high"][:, 0] = False
    classes.layers["high"][:, 1] = True
    scores = tl.evaluate_genes_high(test)
    assert scores["iou"][0] == 0
    assert scores["f1"][0] == 0
    assert 0 < scores["iou"][1] < 1


def test_the_cohort_as_one_has_thresholds_of_its_own(fitted: tuple) -> None:
    cohort, train, _ = fitted
    test = cohort.sections["c"]
    model = tl.fit_gene_classifier(train, genes=cohort.genes[:2], extractor="toy", standardize="cohort")
    logged = np.concatenate([np.log1p(contract.counts(sdata).X.toarray()[:, :2]) for sdata in train.values()])
    np.testing.assert_allclose(model.thresholds, logged.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(model.base_rates, (logged > logged.mean(axis=0)).mean(axis=0), rtol=1e-6)
    tl.predict(test, model)
    expected = (np.log1p(contract.counts(test).X.toarray()[:, :2]) > model.thresholds).mean(axis=0)
    np.testing.assert_allclose(tl.evaluate_genes_high(test)["base_rate"], expected)


@pytest.mark.parametrize("n_components", [None, 3])
def test_the_disk_and_another_run_change_nothing(fitted: tuple, tmp_path: Path, n_components: int | None) -> None:
    cohort, train, _ = fitted
    test = cohort.sections["c"]
    options = {"genes": cohort.genes, "extractor": "toy", "n_components": n_components}
    model = tl.fit_gene_classifier(train, **options)
    again = tl.fit_gene_classifier(train, **options)
    np.testing.assert_array_equal(again.coefficients, model.coefficients)
    assert model.coefficients.shape == (5, n_components or 6)
    for path in (tmp_path / "classes.stimage", tmp_path / "classes"):
        back = models.load(model.save(path))
        assert isinstance(back, models.GeneClassifier)
        assert repr(back) == repr(model)
        assert back.tiles == model.tiles
        assert back.training == model.training
        for name in ("coefficients", "intercepts", "thresholds", "base_rates"):
            np.testing.assert_array_equal(getattr(back, name), getattr(model, name))
        tl.predict(test, model)
        first = contract.gene_classes(test).X.copy()
        tl.predict(test, back)
        np.testing.assert_array_equal(contract.gene_classes(test).X, first)


def test_a_file_of_another_form_is_called_damaged(fitted: tuple, tmp_path: Path) -> None:
    import dataclasses

    model = fitted[2]["proximal"]
    broken = dataclasses.replace(model, intercepts=model.intercepts[:2])
    with pytest.raises(ValueError, match="is damaged"):
        models.load(broken.save(tmp_path / "broken.stimage"))


def test_the_table_is_ready_for_squidpy_and_the_disk(fitted: tuple, tmp_path: Path) -> None:
    cohort, _, trained = fitted
    test = cohort.sections["c"]
    tl.predict(test, trained["proximal"])
    tl.evaluate_genes_high(test)
    classes, tiles = contract.gene_classes(test), contract.tiles(test)
    assert classes.X.dtype == np.float32
    assert np.isfinite(classes.obs["ood_score"]).all()
    np.testing.assert_array_equal(classes.obs["instance_id"], tiles.obs["instance_id"])
    np.testing.assert_array_equal(classes.obsm["spatial"], tiles.obsm["spatial"])
    assert classes.uns["spatialdata_attrs"]["region"] == contract.TILE_SQUARES
    assert classes.uns["prediction"]["trained_on"] == ["a", "b"]
    sq.pl.spatial_scatter(classes.copy(), color="G0")
    axes = plt.gcf().axes[0]
    assert axes.collections
    np.testing.assert_allclose(np.ma.filled(axes.collections[0].get_array()), classes.X[:, 0])
    plt.close("all")
    test.write(tmp_path / "c.zarr")
    back = spatialdata.read_zarr(tmp_path / "c.zarr")
    np.testing.assert_array_equal(contract.gene_classes(back).X, classes.X)
    np.testing.assert_allclose(tl.evaluate_genes_high(back)["iou"], classes.var["iou"])


def test_classes_are_not_taken_for_counts(fitted: tuple) -> None:
    cohort, _, trained = fitted
    test = copy.copy(cohort.sections["c"])
    tl.predict(test, trained["proximal"])
    assert contract.counts_name(test) == "counts"
    table = test.tables.pop("counts")
    try:
        assert not contract.has_counts(test)
        tl.predict(test, trained["proximal"])  # takes no molecules
    finally:
        test.tables["counts"] = table


def test_too_few_iterations_are_said(fitted: tuple) -> None:
    cohort, train, _ = fitted
    for solver in ("proximal", "saga"):
        with pytest.warns(UserWarning, match=r"4 of 5 genes did not converge in 1 iterations. Raise `max_iter`"):
            tl.fit_gene_classifier(train, genes=cohort.genes, extractor="toy", solver=solver, max_iter=1, C=10.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "newton"}, ValueError, 'Expected `solver` to be "proximal" or "saga"'),
        ({"standardize": "tile"}, ValueError, 'Expected `standardize` to be "section" or "cohort"'),
        ({"C": -1.0}, ValueError, "Expected `C` to be positive"),
        ({"max_iter": 0}, ValueError, "Expected `max_iter` of at least 1"),
        ({"n_components": 0}, ValueError, "Expected `n_components` of at least 1"),
        ({"genes": ["none"]}, KeyError, "1 of 1 genes are absent"),
        ({"extractor": "resnet50"}, KeyError, "no embeddings by 'resnet50'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(fitted: tuple, options: dict, error: type, message: str) -> None:
    cohort, train, _ = fitted
    with pytest.raises(error, match=message):
        tl.fit_gene_classifier(train, **{"genes": cohort.genes, "extractor": "toy", **options})


def test_what_cannot_be_predicted_or_scored_is_refused(fitted: tuple, make_spots: Callable) -> None:
    cohort, _, trained = fitted
    model = trained["proximal"]
    bare = make_spots(n_side=6, sample="bare")
    with pytest.raises(KeyError, match="has no embeddings by 'toy'"):
        tl.predict({"c": cohort.sections["c"], "bare": bare}, model)
    assert contract.GENE_CLASSES not in bare.tables
    with pytest.raises(KeyError, match=r"no predicted classes of genes. Run `stimage_sd.tl.predict"):
        tl.evaluate_genes_high(bare)
    with pytest.raises(ValueError, match="`size_factors` has no meaning"):
        tl.predict(cohort.sections["c"], model, size_factors="total")


@pytest.mark.slow
def test_markers_of_breast_cancer_are_told_on_a_held_out_section(data_dir: Path) -> None:
    sections = {}
    for name in ("C2", "C3", "C4", "C5"):
        folder = data_dir / "her2st" / name
        sections[name] = io.legacy_st(folder / "counts.tsv.gz", folder / "image.jpg", folder / "spots.tsv", sample=name)
    pp.tile(sections)
    # one field of view: a third of the work
    pp.embed(sections, fields_of_view=(2.0,))
    test = sections.pop("C5")
    genes = ["ERBB2", "GNAS", "FASN", "DDX5", "XBP1", "ACTG1", "FN1", "COL1A1", "CD74", "KRT19"]
    model = tl.fit_gene_classifier(sections, genes=genes)
    assert all(model.training["converged"])
    tl.predict(test, model)
    scores = tl.evaluate_genes_high(test).set_index("gene")
    assert scores["auc"].nlargest(3).min() > 0.7
    assert scores["auc"].mean() > 0.6
    assert scores["balanced_accuracy"].mean() > 0.55
