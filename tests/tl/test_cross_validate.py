"""Folds are of whole sections, nothing of the held-out one reaches the fit, and what is finished is not done again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import esda
import libpysal
import numpy as np
import pandas as pd
import pytest
import shapely
from sklearn.neighbors import kneighbors_graph
from spatialdata import SpatialData

from stimage_sd import contract, pp, tl

FIT = {"extractor": "toy", "n_members": 2, "max_epochs": 3, "head": "dispersion"}


class Recorder:
    """A recipe that fits, and remembers what it was handed."""

    def __init__(self, *, breaks_without: str | None = None, **options: Any) -> None:
        self.options = FIT | options
        self._calls: list[dict] = []
        self._breaks_without = breaks_without

    def __call__(self, cohort: dict[str, SpatialData], *, genes: list[str], seed: int = 0) -> object:
        self._calls.append({"sections": list(cohort), "genes": list(genes), "seed": seed})
        if self._breaks_without is not None and self._breaks_without not in cohort:
            raise RuntimeError("the machine went down")
        return tl.fit_nb(cohort, genes=genes, seed=seed, **self.options)


@pytest.fixture
def cohort(planted: Callable) -> SimpleNamespace:
    made = planted(("a", "b", "c"), n_side=8, n_genes=6, n_features=5)
    return SimpleNamespace(sections=made.sections, genes=made.genes)


def test_each_section_is_scored_by_a_model_of_the_others(cohort) -> None:
    table = tl.cross_validate(
        cohort.sections, {"nb": partial(tl.fit_nb, **FIT), "wide": partial(tl.fit_nb, **FIT, n_components=2)},
        genes=cohort.genes, seed=3,
    )  # fmt: skip
    assert list(table.columns)[:5] == ["section", "model", "gene", "metric", "value"]
    assert len(table) == 3 * 2 * 6 * 9
    assert list(dict.fromkeys(table["section"])) == ["a", "b", "c"]
    assert (table["fold"] == table["section"]).all()
    assert (table["fit_seconds"] > 0).all()
    assert table["peak_mb"].between(50, 100_000).all()
    # by hand, on one fold
    model = tl.fit_nb({name: cohort.sections[name] for name in "ac"}, genes=cohort.genes, seed=3, **FIT)
    tl.predict(cohort.sections["b"], model)
    by_hand = tl.evaluate(cohort.sections["b"]).set_index("gene")
    found = table[(table["section"] == "b") & (table["model"] == "nb")].pivot(
        index="gene", columns="metric", values="value"
    )
    pd.testing.assert_frame_equal(
        found.sort_index(), by_hand[found.columns].sort_index(), check_names=False, check_exact=True, check_dtype=False
    )


def test_cells_on_no_lattice_are_scored_on_a_graph(cohort, tmp_path: Path) -> None:
    for number, sdata in enumerate(cohort.sections.values()):
        squares = sdata.shapes["tile_squares"]
        x, y = np.random.default_rng(number).uniform(0, 400, (2, len(squares)))
        squares.geometry = shapely.box(x, y, x + 20, y + 20)
        contract.tiles(sdata).obsm["spatial"] = np.stack([x + 10, y + 10], axis=1)
    arguments = {"genes": cohort.genes[:2], "out": tmp_path, "keep_predictions": True}
    recipe = {"nb": partial(tl.fit_nb, **FIT)}
    nearest = partial(kneighbors_graph, n_neighbors=4)
    with pytest.warns(UserWarning, match="The IoU is left out"):
        table = tl.cross_validate(cohort.sections, recipe, graph=nearest, **arguments)
    values = table.set_index(["section", "gene", "metric"])["value"]
    for name, sdata in cohort.sections.items():
        near = libpysal.weights.KNN(contract.tiles(sdata).obsm["spatial"], k=4)
        near.transform = "r"
        for gene in cohort.genes[:2]:
            counts = np.log1p(contract.counts(sdata)[:, gene].X.toarray().ravel())
            expected = esda.Moran(counts, near, permutations=0).I
            assert values[name, gene, "morans_i_observed"] == pytest.approx(expected, abs=1e-6)
    # the same by section, from another folder; of another graph, results are not taken
    by_section = {name: nearest(contract.tiles(sdata).obsm["spatial"]) for name, sdata in cohort.sections.items()}
    with pytest.raises(ValueError, match="graph"):
        tl.cross_validate(cohort.sections, recipe, graph=by_section, **arguments)
    with pytest.raises(KeyError, match=r"`graph` to have weights of section 'b', found \['a'\]"):
        tl.evaluate(cohort.sections["b"], graph={"a": by_section["a"]})
    with pytest.raises(ValueError, match=r"between the 64 compared tiles of section 'b', found .* of shape \(2, 2\)"):
        tl.evaluate(cohort.sections["b"], graph=np.eye(2))


@pytest.mark.slow
def test_the_held_out_sections_counts_do_not_reach_the_predictions(cohort) -> None:
    recipe = {"nb": partial(tl.fit_nb, **FIT)}
    tl.cross_validate(cohort.sections, recipe, genes=3, keep_predictions=True)
    before = contract.predictions(cohort.sections["a"]).copy()
    counts = contract.counts(cohort.sections["a"])
    counts.X = counts.X.copy()
    counts.X.data[:] = np.random.default_rng(5).integers(0, 900, counts.X.nnz)
    tl.cross_validate(cohort.sections, recipe, genes=3, keep_predictions=True)
    after = contract.predictions(cohort.sections["a"])
    assert list(after.var_names) == list(before.var_names)
    np.testing.assert_array_equal(after.X, before.X)
    for layer in before.layers:
        np.testing.assert_array_equal(after.layers[layer], before.layers[layer])


@pytest.mark.slow
def test_all_sections_of_a_patient_are_held_out_together(cohort) -> None:
    recipe = Recorder()
    table = tl.cross_validate(
        cohort.sections, {"nb": recipe}, strategy="leave-one-patient-out", patients={"a": "P1", "b": "P2", "c": "P1"},
        genes=["G1", "G4"], seed=9,
    )  # fmt: skip
    assert [call["sections"] for call in recipe._calls] == [["b"], ["a", "c"]]
    assert {call["seed"] for call in recipe._calls} == {9}
    assert table.groupby("section")["fold"].unique().str[0].to_dict() == {"a": "P1", "b": "P2", "c": "P1"}


@pytest.mark.slow
def test_genes_are_chosen_on_the_training_sections(cohort) -> None:
    recipe = Recorder()
    table = tl.cross_validate(cohort.sections, {"nb": recipe}, genes=3)
    for held_out, call in zip("abc", recipe._calls, strict=True):
        training = {name: sdata for name, sdata in cohort.sections.items() if name != held_out}
        assert call["genes"] == pp.select_genes(training, n_top=3)
        assert set(table.loc[table["section"] == held_out, "gene"]) == set(call["genes"])
    asked: list[list[str]] = []

    def last(training: dict[str, SpatialData]) -> list[str]:
        asked.append(list(training))
        return ["G5"]

    tl.cross_validate(cohort.sections, {"nb": Recorder()}, genes=last)
    assert asked == [["b", "c"], ["a", "c"], ["a", "b"]]


def test_sections_are_left_as_they_were(cohort) -> None:
    history = [len(contract.info(sdata)["history"]) for sdata in cohort.sections.values()]
    tl.cross_validate(cohort.sections, {"nb": Recorder()}, genes=cohort.genes)
    assert all(contract.PREDICTIONS not in sdata.tables for sdata in cohort.sections.values())
    assert [len(contract.info(sdata)["history"]) for sdata in cohort.sections.values()] == history
    tl.cross_validate(cohort.sections, {"nb": Recorder()}, genes=cohort.genes, keep_predictions="nb")
    kept = contract.predictions(cohort.sections["b"])
    assert kept.uns["prediction"]["trained_on"] == ["a", "c"]
    assert contract.info(cohort.sections["b"])["history"][-1]["step"] == "tl.cross_validate"


def test_an_interrupted_run_goes_on(cohort, tmp_path: Path) -> None:
    whole = tl.cross_validate(cohort.sections, {"nb": Recorder()}, genes=cohort.genes)
    breaking = Recorder(breaks_without="c")
    with pytest.raises(RuntimeError, match="went down") as caught:
        tl.cross_validate(cohort.sections, {"nb": breaking}, genes=cohort.genes, out=tmp_path / "run")
    assert "model 'nb' on fold 'c'" in caught.value.__notes__[0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["nb@a", "nb@b"]
    mended = Recorder()
    resumed = tl.cross_validate(cohort.sections, {"nb": mended}, genes=cohort.genes, out=tmp_path / "run")
    assert [call["sections"] for call in mended._calls] == [["a", "b"]]
    pd.testing.assert_frame_equal(resumed.iloc[:, :6], whole.iloc[:, :6])
    untouched = Recorder()
    again = tl.cross_validate(cohort.sections, {"nb": untouched}, genes=cohort.genes, out=tmp_path / "run")
    assert untouched._calls == []
    pd.testing.assert_frame_equal(again, resumed)


def test_results_of_other_settings_are_refused(cohort, tmp_path: Path) -> None:
    run = partial(tl.cross_validate, cohort.sections, out=tmp_path)
    run({"nb": Recorder()}, genes=cohort.genes)
    fitted = Recorder()
    with pytest.raises(ValueError, match=r"model 'nb' on fold 'a' .* other settings: `genes` was .* `out=`"):
        run({"nb": fitted}, genes=cohort.genes[:3])
    with pytest.raises(ValueError, match=r"`recipe\.options\.max_epochs` was 3, is 4"):
        run({"nb": Recorder(max_epochs=4)}, genes=cohort.genes)
    with pytest.raises(ValueError, match="`seed` was 0, is 1"):
        run({"nb": fitted}, genes=cohort.genes, seed=1)
    with pytest.raises(ValueError, match="`transform` was 'log1p', is 'raw'"):
        run({"nb": fitted}, genes=cohort.genes, transform="raw")
    contract.counts(cohort.sections["c"]).X.data[0] += 1
    with pytest.raises(ValueError, match=r"`sections\.c\.counts` was"):
        run({"nb": fitted}, genes=cohort.genes)
    assert fitted._calls == []


@pytest.mark.slow
def test_a_new_model_is_added_to_finished_ones(cohort, tmp_path: Path) -> None:
    first = Recorder()
    tl.cross_validate(cohort.sections, {"nb": first}, genes=cohort.genes, out=tmp_path)
    second, again = Recorder(n_components=2), Recorder()
    table = tl.cross_validate(
        cohort.sections, {"nb": again, "a/b": second}, genes=cohort.genes, out=tmp_path, keep_predictions="nb"
    )
    assert set(table["model"]) == {"nb", "a/b"}
    assert len(second._calls) == 3
    # predictions had not been kept, so those folds were fitted again; now they are on disk
    assert len(again._calls) == 3
    del cohort.sections["a"].tables["predictions"]
    third = Recorder()
    tl.cross_validate(cohort.sections, {"nb": third}, genes=cohort.genes, out=tmp_path, keep_predictions=True)
    assert third._calls == []
    assert contract.predictions(cohort.sections["a"]).n_vars == 6


def test_refusals(cohort) -> None:
    sections, nb = cohort.sections, {"nb": Recorder()}
    with pytest.raises(KeyError, match=r"No recipe goes by the name .*ridge.*; known: \[.*nb.*\]"):
        tl.cross_validate(sections, ["nb", "ridge"], genes=2)
    with pytest.raises(TypeError, match=r"'x' as a recipe, a callable .* found int"):
        tl.cross_validate(sections, {"x": 3}, genes=2)
    with pytest.raises(TypeError, match=r"return a fitted model .* found dict"):
        tl.cross_validate(sections, {"x": lambda cohort, *, genes: {}}, genes=2)
    with pytest.raises(ValueError, match=r"two sections or more.* found \['a'\]"):
        tl.cross_validate({"a": sections["a"]}, nb, genes=2)
    with pytest.raises(ValueError, match=r"two patients or more.* found \['P'\]"):
        tl.cross_validate(sections, nb, genes=2, strategy="leave-one-patient-out", patients=dict.fromkeys("abc", "P"))
    with pytest.raises(KeyError, match=r"each section's patient, found none for .*b.*c"):
        tl.cross_validate(sections, nb, genes=2, strategy="leave-one-patient-out", patients={"a": "P"})
    with pytest.raises(ValueError, match='pass `strategy="leave-one-patient-out"`'):
        tl.cross_validate(sections, nb, genes=2, patients={"a": "P"})
    with pytest.raises(ValueError, match="found 'leave-one-tile-out'"):
        tl.cross_validate(sections, nb, genes=2, strategy="leave-one-tile-out")
    with pytest.raises(KeyError, match=r"1 of 2 genes are absent from section .*NO"):
        tl.cross_validate(sections, nb, genes=["G1", "NO"])
    with pytest.raises(ValueError, match=r"the one model whose predictions to keep, of \['nb', 'x'\], found True"):
        tl.cross_validate(sections, {**nb, "x": Recorder()}, genes=2, keep_predictions=True)
