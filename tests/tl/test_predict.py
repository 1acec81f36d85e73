"""Prediction: layers against scipy, and what is refused before anything is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import spatialdata
import squidpy as sq
import zarr

from stimage_sd import contract, models, pl, tl
from stimage_sd.tl._predict import predict as predict_module


@pytest.fixture(scope="module")
def fitted(planted: Callable) -> tuple:
    """A cohort and a model for each head."""
    cohort = planted(("a", "b", "c"), n_side=8, n_features=6, n_genes=5)
    train = {name: cohort.sections[name] for name in "ab"}
    options = {"genes": cohort.genes, "extractor": "toy", "n_members": 3, "max_epochs": 6, "exposure": None}
    return cohort, {head: tl.fit_nb(train, head=head, **options) for head in ("paper", "dispersion")}


def members(model: models.NBModel, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r and p of every member by the formulas, in double precision."""
    space = model.features
    if space.standardize == "section":
        scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    else:
        scaled = (features - space.mean) / space.deviation
    reduced = scaled.astype(np.float64) @ space.components
    weight, bias = (model.parameters[name].astype(np.float64) for name in ("weight", "bias"))
    basis, center = model.patterns.basis.astype(np.float64), model.patterns.center.astype(np.float64)
    seen = np.einsum("mtf,mfk->mtk", reduced[None] - center[:, None], basis)
    output = np.einsum("mtk,mko->mto", seen, weight) + bias[:, None]
    if model.head == "paper":
        r, p = np.split(output, 2, axis=-1)
        return np.log1p(np.exp(r)), 1 / (1 + np.exp(-p))
    r = np.exp(model.parameters["log_dispersion"].astype(np.float64))[:, None] * np.ones_like(output)
    return r, r / (r + np.exp(output))


@pytest.mark.parametrize("head", ["paper", "dispersion"])
def test_layers_are_scipys(fitted: tuple, head: str) -> None:
    cohort, trained = fitted
    model, test = trained[head], cohort.sections["c"]
    tl.predict(test, model)
    predictions = contract.predictions(test)
    r, p = members(model, contract.embeddings(test, "toy").astype(np.float64))
    mean, variance = scipy.stats.nbinom.mean(r, p), scipy.stats.nbinom.var(r, p)
    np.testing.assert_allclose(predictions.X, mean.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(predictions.layers["aleatoric"], variance.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(predictions.layers["epistemic"], mean.var(axis=0), rtol=5e-3, atol=1e-5)
    np.testing.assert_array_equal(
        predictions.layers["total_variance"], predictions.layers["aleatoric"] + predictions.layers["epistemic"]
    )
    assert (predictions.layers["lower"] <= predictions.layers["upper"]).all()
    for layer in (predictions.X, *predictions.layers.values()):
        assert layer.dtype == np.float32


@pytest.mark.parametrize("conformal", [True, False])
def test_intervals_are_central_ones_of_the_mixture(fitted: tuple, conformal: bool) -> None:
    cohort, trained = fitted
    model, test = trained["paper"], cohort.sections["c"]
    tl.predict(test, model, conformal=conformal)
    predictions = contract.predictions(test)
    level = model.interval_level if conformal else 0.9
    assert predictions.uns["prediction"]["interval_level"] == level
    r, p = members(model, contract.embeddings(test, "toy").astype(np.float64))
    counts = np.arange(2000)[:, None, None, None]
    cdf = scipy.stats.nbinom.cdf(counts, r[None], p[None]).mean(axis=1)
    for layer, probability in (("lower", (1 - level) / 2), ("upper", (1 + level) / 2)):
        expected = (cdf < probability).sum(axis=0)
        # where the distribution function comes within float32 of the level either count will do
        assert (predictions.layers[layer] != expected).mean() < 0.01
        assert np.abs(predictions.layers[layer] - expected).max() <= 1


def test_table_is_ready_for_squidpy_and_the_disk(fitted: tuple, tmp_path: Path) -> None:
    cohort, trained = fitted
    test = cohort.sections["c"]
    tl.predict(test, trained["paper"])
    predictions = contract.predictions(test)
    tiles = contract.tiles(test)
    assert list(predictions.var_names) == cohort.genes
    np.testing.assert_array_equal(predictions.obs["instance_id"], tiles.obs["instance_id"])
    np.testing.assert_array_equal(predictions.obsm["spatial"], tiles.obsm["spatial"])
    assert list(predictions.obs["spot_id"]) == list(tiles.obs["spot_id"])
    assert predictions.uns["spatialdata_attrs"]["region"] == "tile_squares"
    assert list(predictions.uns["spatial"]) == ["c"]
    assert predictions.uns["prediction"]["trained_on"] == ["a", "b"]
    sq.gr.spatial_neighbors(predictions)
    sq.gr.spatial_autocorr(predictions, mode="moran", genes=cohort.genes[:2], n_perms=None)
    assert np.isfinite(predictions.uns["moranI"]["I"]).all()
    test.write(tmp_path / "c.zarr")
    back = contract.predictions(spatialdata.read_zarr(tmp_path / "c.zarr"))
    np.testing.assert_array_equal(back.X, predictions.X)
    for name, layer in predictions.layers.items():
        np.testing.assert_array_equal(back.layers[name], layer)


def test_predicting_again_gives_the_same_and_from_a_file_too(fitted: tuple, tmp_path: Path) -> None:
    cohort, trained = fitted
    test = cohort.sections["c"]
    tl.predict(test, trained["paper"])
    first = contract.predictions(test).copy()
    tl.predict(test, models.load(trained["paper"].save(tmp_path / "m.stimage")))
    second = contract.predictions(test)
    np.testing.assert_array_equal(first.X, second.X)
    for name in first.layers:
        np.testing.assert_array_equal(first.layers[name], second.layers[name])


def test_blocks_do_not_show(fitted: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort, trained = fitted
    test = cohort.sections["c"]
    tl.predict(test, trained["paper"])
    whole = contract.predictions(test).X.copy()
    import stimage_sd.tl._predict.predict as module

    monkeypatch.setattr(module, "_BLOCK", 3 * 5 * 7)  # seven tiles at a time; 64 is no multiple of it
    tl.predict(test, trained["paper"])
    np.testing.assert_allclose(contract.predictions(test).X, whole, rtol=1e-5)


def test_on_disk_it_is_the_same(fitted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask arrays over zarr, block by block; scores, pictures and the store take them as they are."""
    cohort, trained = fitted
    test = cohort.sections["c"]
    tl.predict(test, trained["paper"])
    expected, scores = contract.predictions(test), tl.evaluate(test)
    monkeypatch.setattr("stimage_sd.tl._predict.predict._BLOCK", 3 * 5 * 16)
    monkeypatch.setattr("stimage_sd.tl._predict.predict._CHUNK", 5 * 16)
    tl.predict(test, trained["paper"], out=tmp_path / "out")
    found = contract.predictions(test)
    assert isinstance(found.X, da.Array)
    np.testing.assert_allclose(found.X.compute(), expected.X, rtol=1e-5)
    for name, layer in expected.layers.items():
        assert isinstance(found.layers[name], da.Array)
        # blocks of another size round last digits otherwise, which a variance between members shows
        np.testing.assert_allclose(found.layers[name].compute(), layer, rtol=1e-4)
    pd.testing.assert_frame_equal(tl.evaluate(test), scores, rtol=1e-4)
    pl.prediction(test, cohort.genes[0])
    test.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr").tables["predictions"]
    np.testing.assert_allclose(back.X, expected.X, rtol=1e-5)
    with pytest.raises(FileExistsError, match="has predictions already"):
        tl.predict(test, trained["paper"], out=tmp_path / "out")


def test_a_full_disk_leaves_no_folder_and_the_same_call_works_again(
    fitted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, trained = fitted
    both, out = {name: cohort.sections[name] for name in "bc"}, tmp_path / "out"
    before = {name: sdata.tables.get("predictions") for name, sdata in both.items()}
    write, written = zarr.Array.__setitem__, []

    def full(self: zarr.Array, rows: object, values: object) -> None:
        written.append(rows)
        if len(written) == 9:  # in the second section
            raise OSError(28, "No space left on device")
        write(self, rows, values)

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(OSError, match="No space left"):
        tl.predict(both, trained["paper"], out=out)
    monkeypatch.undo()
    assert not list(out.iterdir())
    assert {name: sdata.tables.get("predictions") for name, sdata in both.items()} == before

    tl.predict(both, trained["paper"], out=out)
    found = {name: contract.predictions(sdata).X.compute() for name, sdata in both.items()}
    tl.predict(both, trained["paper"])
    for name, sdata in both.items():
        np.testing.assert_allclose(found[name], contract.predictions(sdata).X, rtol=1e-5)


def test_an_interrupted_run_goes_on_where_it_stopped(
    fitted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, trained = fitted
    test, model, out = copy.copy(cohort.sections["c"]), trained["paper"], tmp_path / "out"
    monkeypatch.setattr(predict_module, "_BLOCK", 8 * len(model.genes) * model.n_members)
    write, written = zarr.Array.__setitem__, []

    def interrupted(self: zarr.Array, rows: slice, values: object) -> None:
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append(rows.start)
        write(self, rows, values)

    monkeypatch.setattr(zarr.Array, "__setitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tl.predict(test, model, out=out)
    assert not [path for path in out.iterdir() if not path.name.startswith(".")]
    again: list[int] = []
    monkeypatch.setattr(
        zarr.Array, "__setitem__", lambda self, rows, values: (again.append(rows.start), write(self, rows, values))
    )
    tl.predict(test, model, out=out)
    assert max(written) in again
    assert not set(again) & (set(written) - {max(written)})
    assert [path.name for path in out.iterdir()] == ["c"]
    found = contract.predictions(test).X.compute()
    tl.predict(test, model)
    np.testing.assert_array_equal(found, contract.predictions(test).X)


def test_what_another_model_left_is_not_taken_over(
    fitted: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, trained = fitted
    test, out = copy.copy(cohort.sections["c"]), tmp_path / "out"

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tl.predict(test, trained["paper"], out=out)
    tl.predict(test, trained["dispersion"], out=out)
    assert [path.name for path in out.iterdir()] == ["c"]


def test_a_chunk_that_is_gone_is_an_error_and_not_zeros(fitted: tuple, tmp_path: Path) -> None:
    cohort, trained = fitted
    test = copy.copy(cohort.sections["c"])
    tl.predict(test, trained["paper"], out=tmp_path / "out")
    (tmp_path / "out" / "c" / "mean" / "c" / "0" / "0").unlink()
    with pytest.raises(FileNotFoundError, match=r"mean/c/0/0.*run the step"):
        contract.predictions(test).X.compute()


def test_a_section_without_molecules_is_predicted(fitted: tuple) -> None:
    cohort, trained = fitted
    test = copy.copy(cohort.sections["c"])
    table = test.tables.pop("counts")
    try:
        tl.predict(test, trained["paper"])
        assert contract.predictions(test).n_obs == 64
    finally:
        test.tables["counts"] = table


def test_shifted_tiles_are_told_apart(fitted: tuple) -> None:
    cohort, trained = fitted
    test = cohort.sections["c"]
    tiles = contract.tiles(test)
    kept = tiles.obsm["X_toy"].copy()
    try:
        tl.predict(test, trained["paper"])
        assert np.median(contract.predictions(test).obs["ood_score"]) < 1
        tiles.obsm["X_toy"][:10] += 8
        tl.predict(test, trained["paper"])
        scores = contract.predictions(test).obs["ood_score"].to_numpy()
        assert scores[:10].min() > 2
        assert np.median(scores[10:]) < 1
    finally:
        tiles.obsm["X_toy"] = kept


# --------------------------------------------------------------------------------------------------
# tiles that are not those of the model

STAIN = {
    "method": "macenko",
    "concentrations": "match",
    "reference": {
        "method": "macenko",
        "white_point": [240.0, 240.0, 240.0],
        "stain_matrix": [[0.6, 0.1, 0.0], [0.7, 0.9, 0.0], [0.3, 0.1, 1.0]],
        "concentrations": [1.0, 0.8],
        "mean": None,
        "deviation": None,
    },
}


def other_stain(**change: object) -> str:
    return json.dumps({**STAIN, **change})


@pytest.mark.parametrize(
    ("expected", "embedding", "tiling", "match"),
    [
        ({}, {}, {"size_um": 55.0}, r"tiles of 55.0 µm, expected 50.0 µm: run .*size_um=50\)`"),
        ({"size_um": None, "side_px": 30.0}, {}, {}, "tiles of 20 px, expected 30 px, and no resolution"),
        ({}, {"weights_hash": "feed" * 4}, {}, r"other weights of 'toy' \(feedfeed, expected 01234567\)"),
        ({}, {"fields_of_view": [1.0, 2.0]}, {}, r"fields of view \(1.0, 2.0\), expected \(1.0,\): run .*pp.embed"),
        ({}, {"input_px": 224}, {}, "embedded at 224 px, expected 299 px: run `stimage_sd.pp.tile"),
        ({"context_rings": 1}, {}, {}, r"0 rings of context, expected 1: run .*context_rings=1"),
        ({}, {"stain": json.dumps(STAIN)}, {}, "stain-normalized image, expected the image as it is"),
        ({"stain": STAIN}, {}, {}, r"without stain normalization, expected 'macenko': run .*stain_normalize"),
        ({"stain": STAIN}, {"stain": other_stain(concentrations="keep")}, {}, "by 'macenko' to another reference"),
        ({"stain": STAIN}, {"stain": other_stain(reference={**STAIN["reference"], "white_point": [250.0] * 3})}, {},
         "another reference: run"),
    ],
    ids=["size", "side", "weights", "fields", "input", "context", "stained", "unstained", "amounts", "reference"],
)  # fmt: skip
def test_tiles_that_do_not_match_are_refused(
    fitted: tuple, expected: dict, embedding: dict, tiling: dict, match: str
) -> None:
    cohort, trained = fitted
    test = cohort.sections["c"]
    test.tables.pop("predictions", None)
    model = replace(trained["paper"], tiles=replace(trained["paper"].tiles, **expected))
    table = contract.tiles(test)
    kept = copy.deepcopy((table.uns["embeddings"], table.uns["tiling"]))
    table.uns["embeddings"]["toy"].update(embedding)
    table.uns["tiling"].update(tiling)
    try:
        with pytest.raises(ValueError, match=rf"Section 'c' does not match: .*{match}"):
            tl.predict({"c": test}, model)
    finally:
        table.uns["embeddings"], table.uns["tiling"] = kept
    assert "predictions" not in test.tables


def test_the_same_stain_reference_matches(fitted: tuple) -> None:
    cohort, trained = fitted
    test = cohort.sections["c"]
    model = replace(trained["paper"], tiles=replace(trained["paper"].tiles, stain=STAIN))
    table = contract.tiles(test)
    table.uns["embeddings"]["toy"]["stain"] = json.dumps(STAIN)
    test.tables.pop("predictions", None)
    try:
        tl.predict(test, model)
    finally:
        table.uns["embeddings"]["toy"]["stain"] = ""
    assert list(contract.predictions(test).var_names) == list(model.genes)


def test_one_bad_section_stops_the_cohort_before_anything_is_written(fitted: tuple, make_spots: Callable) -> None:
    cohort, trained = fitted
    test = cohort.sections["c"]
    test.tables.pop("predictions", None)
    with pytest.raises(KeyError, match="'bare' has no tiles"):
        tl.predict({"c": test, "bare": make_spots(n_side=5, tiled=False, sample="bare")}, trained["paper"])
    assert "predictions" not in test.tables


def test_another_extractor(fitted: tuple) -> None:
    cohort, trained = fitted
    model = replace(trained["paper"], tiles=replace(trained["paper"].tiles, extractor="resnet50"))
    with pytest.raises(KeyError, match=r"no embeddings by 'resnet50' \(found \['toy'\]\)"):
        tl.predict(cohort.sections["c"], model)
