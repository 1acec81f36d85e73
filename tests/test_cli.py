"""The command line, on small synthetic sections."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import matplotlib.image as mpimg
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from typer.testing import CliRunner, Result

from stimage_sd import __version__, _demo, contract, datasets, io, models, pp, tl
from stimage_sd._store import staged
from stimage_sd.cli import app

COMMANDS = ("demo", "train", "predict", "evaluate", "explain", "cache", "info")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """Run what is to fail; return the one line that says why."""
    outcome = run(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert "Traceback" not in outcome.output
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("stimage-sd: error: ")]
    assert len(errors) == 1
    assert outcome.stderr.rstrip().endswith(errors[0])
    return errors[0]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory, _session_cache: None) -> Path:
    """Stores of two sections to train on, one to test and a slide without counts; a model of the first two."""
    folder = tmp_path_factory.mktemp("stores")
    for seed, name in enumerate(("first", "second", "test")):
        bundle = datasets.synthetic_visium(folder / f"run-{name}", n_spots=30, n_genes=9, seed=seed)
        io.visium(bundle, image=bundle / "image.tif", sample=name).write(folder / f"{name}.zarr")
    io.slide(bundle / "image.tif", mpp=0.5, sample="slide").write(folder / "slide.zarr")
    arguments = ["--n-top", 6, "--n-members", 2, "--max-epochs", 2, "--out", folder / "model.stimage"]
    outcome = run("train", folder / "first.zarr", folder / "second.zarr", *arguments)
    assert outcome.exit_code == 0, outcome.output
    return folder


@pytest.fixture(scope="session")
def prediction(stores: Path) -> Result:
    """What was said when the test section was predicted."""
    arguments = ["--model", stores / "model.stimage", "--out", stores / "predicted.zarr"]
    outcome = run("predict", stores / "test.zarr", *arguments)
    assert outcome.exit_code == 0, outcome.output
    return outcome


@pytest.fixture(scope="session")
def predicted(stores: Path, prediction: Result) -> Path:
    """The test section with predictions."""
    return stores / "predicted.zarr"


# --------------------------------------------------------------------------------------------------
# the program


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.exit_code == 0
    assert "Usage: " in outcome.output


def test_help_lists_the_commands_and_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from stimage_sd.cli import app; "
        "print(CliRunner().invoke(app, ['--help']).output); "
        "print('heavy:', sorted({'jax', 'squidpy', 'spatialdata', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert all(command in done.stdout for command in COMMANDS)
    assert "heavy: []" in done.stdout


def test_python_m_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stimage_sd", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.stdout.strip() == f"stimage-sd {__version__}"


def test_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    outcome = run("--traceback", "info", tmp_path / "nothing")
    assert outcome.exit_code == 2
    assert "Traceback" in outcome.stderr
    assert "FileNotFoundError" in outcome.stderr


# --------------------------------------------------------------------------------------------------
# explain


def test_explain_writes_scores_and_a_figure(stores: Path, tmp_path: Path) -> None:
    sdata = spatialdata.read_zarr(stores / "test.zarr")
    spots = np.asarray(sdata.tables["counts"].obsm["spatial"])
    discs = shapely.buffer(shapely.points(np.concatenate([spots - 12, spots, spots + 15])), 6)
    sdata.shapes["nuclei"] = contract.build_shapes(GeoDataFrame(geometry=discs), mpp=None)
    sdata.write(tmp_path / "section.zarr")
    gene = models.load(stores / "model.stimage").genes[0]
    arguments = ["--model", stores / "model.stimage", "--gene", gene, "--n-samples", 12, "--out", tmp_path / "out.zarr"]
    more = ["--n-tiles", 1, "--of", "mean", "--of", "epistemic", "--figure", tmp_path / "explained.png"]
    outcome = run("explain", tmp_path / "section.zarr", *arguments, *more)
    assert outcome.exit_code == 0, outcome.output
    assert f"explaining {gene} on 1 tiles" in outcome.stdout
    assert f"{gene}: held-out R²" in outcome.stdout
    back = spatialdata.read_zarr(tmp_path / "out.zarr")
    assert {f"lime_{gene}", f"lime_{gene}_epistemic"} <= set(back.shapes["nuclei_explained"].columns)
    assert back.tables["explanations"].n_obs == 1
    assert (tmp_path / "explained.png").stat().st_size > 10_000
    # superpixels in place of the nuclei
    arguments = ["--model", stores / "model.stimage", "--gene", gene, "--n-samples", 12, "--overwrite"]
    outcome = run("explain", tmp_path / "out.zarr", *arguments, "--tile", 3, "--segments", "slic")
    assert outcome.exit_code == 0, outcome.output
    back = spatialdata.read_zarr(tmp_path / "out.zarr")
    assert "nuclei_explained" not in back.shapes
    assert set(back.shapes["segments_explained"]["tile"]) == {3}


def test_explain_without_nuclei_says_what_to_run(stores: Path, tmp_path: Path) -> None:
    arguments = ["--model", stores / "model.stimage", "--gene", "SIGNAL003", "--out", tmp_path / "out.zarr"]
    assert "pp.segment_nuclei" in refused("explain", stores / "test.zarr", *arguments)
    assert not (tmp_path / "out.zarr").exists()


# --------------------------------------------------------------------------------------------------
# train


def test_train_runs_what_is_missing_and_leaves_the_stores(stores: Path, tmp_path: Path) -> None:
    before = listing(stores / "first.zarr")
    genes = tmp_path / "genes.txt"
    genes.write_text("SIGNAL002\nSIGNAL001\nNOISE001\n")
    arguments = ["--genes", genes, "--n-members", 2, "--max-epochs", 1, "--stain", "none", "--head", "dispersion"]
    outcome = run("train", stores / "first.zarr", *arguments, "--out", tmp_path / "model.stimage")
    assert outcome.exit_code == 0, outcome.output
    assert "- first: tiling\n- first: embedding (efficientnet_lite0_stages)\n" in outcome.stdout
    assert "stain normalization" not in outcome.stdout
    model = models.load(tmp_path / "model.stimage")
    assert model.genes == ("SIGNAL002", "SIGNAL001", "NOISE001")
    assert (model.head, model.n_members, model.tiles.stain) == ("dispersion", 2, None)
    assert listing(stores / "first.zarr") == before


def test_train_normalizes_to_the_first_section(stores: Path) -> None:
    model = models.load(stores / "model.stimage")
    first = spatialdata.read_zarr(stores / "first.zarr")
    own = pp.stain_normalize(first)
    assert model.tiles.stain["method"] == "vahadane"
    np.testing.assert_allclose(model.tiles.stain["reference"]["stain_matrix"], own.stain_matrix, rtol=1e-5)
    assert model.training["sections"] == ["first", "second"]


def test_train_takes_prepared_sections_as_they_are(stores: Path, tmp_path: Path) -> None:
    section = spatialdata.read_zarr(stores / "first.zarr")
    pp.tile(section)
    pp.embed(section, fields_of_view=(1.0,), context_rings=0)
    section.write(tmp_path / "prepared.zarr")
    arguments = ["--n-top", 3, "--n-members", 1, "--max-epochs", 1, "--out", tmp_path / "model"]
    outcome = run("train", tmp_path / "prepared.zarr", *arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "embedding (" not in outcome.stdout
    assert models.load(tmp_path / "model").tiles.fields_of_view == (1.0,)


def test_train_refuses(stores: Path, tmp_path: Path) -> None:
    first, out = stores / "first.zarr", tmp_path / "model.stimage"
    empty, foreign = tmp_path / "empty.txt", tmp_path / "foreign.txt"
    empty.write_text("\n")
    foreign.write_text("NO_SUCH_GENE")
    assert "No zarr store at" in refused("train", tmp_path / "no.zarr", "--out", out)
    assert "found none" in refused("train", first, "--out", out, "--genes", empty)
    assert "No list of genes at" in refused("train", first, "--out", out, "--genes", tmp_path / "no.txt")
    assert "None of the 1 genes is measured" in refused("train", first, "--out", out, "--genes", foreign)
    assert "--genes is the whole list" in refused("train", first, "--out", out, "--genes", foreign, "--n-top", 3)
    assert "Was one given twice?" in refused("train", first, first, "--out", out)
    assert "Found no table of counts" in refused("train", stores / "slide.zarr", "--out", out)
    assert not out.exists()
    before = (stores / "model.stimage").read_bytes()
    assert "pass --overwrite" in refused("train", first, "--out", stores / "model.stimage")
    assert (stores / "model.stimage").read_bytes() == before


# --------------------------------------------------------------------------------------------------
# predict


def test_predict_writes_what_the_functions_give(stores: Path, predicted: Path) -> None:
    model = models.load(stores / "model.stimage")
    section = spatialdata.read_zarr(stores / "test.zarr")
    pp.stain_normalize(section, model.tiles.stain["reference"])
    pp.tile(section)
    pp.embed(section)
    tl.predict(section, model)
    read = spatialdata.read_zarr(predicted)
    np.testing.assert_array_equal(contract.predictions(read).X, contract.predictions(section).X)
    assert [step["step"] for step in contract.info(read)["history"]][-1] == "tl.predict"
    assert set(read.tables) == {"counts", "tiles", "predictions"}
    assert set(read.images) == {"he"}
    assert "tissue" in read.labels
    np.testing.assert_array_equal(read.images["he"]["scale0"]["image"], section.images["he"]["scale0"]["image"])


def test_predict_says_which_steps_it_ran(prediction: Result, stores: Path) -> None:
    assert prediction.stdout.splitlines() == [
        "- test: stain normalization (vahadane, to the model's reference)",
        "- test: tiling",
        "- test: embedding (efficientnet_lite0_stages)",
        "- test: predicting 6 genes",
        f"Predictions in {stores / 'predicted.zarr'}. Next: stimage-sd info {stores / 'predicted.zarr'}",
    ]


def test_predict_on_a_slide_back_into_its_store(stores: Path, tmp_path: Path) -> None:
    path = tmp_path / "slide.zarr"
    shutil.copytree(stores / "slide.zarr", path)
    for _ in range(2):  # the second time, tiles and embeddings are there
        outcome = run("predict", path, "--model", stores / "model.stimage", "--overwrite")
        assert outcome.exit_code == 0, outcome.output
    assert "tiling" not in outcome.stdout
    section = spatialdata.read_zarr(path)
    assert contract.tiling(section)["layout"] == "grid"
    assert contract.tiling(section)["size_um"] == pytest.approx(55.0, rel=0.01)
    assert contract.predictions(section).n_vars == 6
    assert [entry.name for entry in tmp_path.iterdir()] == ["slide.zarr"]


def test_predict_adds_the_context_that_is_missing(stores: Path, tmp_path: Path) -> None:
    model = models.load(stores / "model.stimage")
    section = spatialdata.read_zarr(stores / "test.zarr")
    pp.stain_normalize(section, model.tiles.stain["reference"])
    pp.tile(section)
    pp.embed(section, context_rings=0)
    del section.images["he_normalized"]
    section.write(tmp_path / "section.zarr")
    outcome = run(
        "predict", tmp_path / "section.zarr", "--model", stores / "model.stimage", "--out", tmp_path / "new.zarr"
    )
    assert outcome.exit_code == 0, outcome.output
    assert "context of the tiles (1 rings)" in outcome.output
    assert "embedding (" not in outcome.stdout
    read = spatialdata.read_zarr(tmp_path / "new.zarr")
    assert "X_efficientnet_lite0_stages_context" in contract.tiles(read).obsm


def test_predict_refuses(stores: Path, tmp_path: Path) -> None:
    test, model, out = stores / "test.zarr", stores / "model.stimage", tmp_path / "new.zarr"
    before = listing(test)
    assert "pass --overwrite" in refused("predict", test, "--model", model)
    assert "No zarr store, image or slide at" in refused(
        "predict", tmp_path / "no.zarr", "--model", model, "--out", out
    )
    assert "No model at" in refused("predict", test, "--model", tmp_path / "no.stimage", "--out", out)
    assert "Expected a complete image" in refused("predict", model, "--model", model, "--out", out)
    table = tmp_path / "adata.h5ad"
    table.write_bytes(b"not read")
    assert "stimage_sd.io.from_anndata(" in refused("predict", table, "--model", model, "--out", out)
    picture = tmp_path / "he.png"
    cv2.imwrite(str(picture), np.full((64, 64, 3), 200, np.uint8))
    assert "Pass --mpp: about 0.25" in refused("predict", picture, "--model", model, "--out", out)
    cut = tmp_path / "cut.stimage"
    cut.write_bytes(model.read_bytes()[:1000])
    assert "truncated" in refused("predict", test, "--model", cut, "--out", out)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    assert "not replaced" in refused("predict", test, "--model", model, "--out", mine, "--overwrite")
    assert (mine / "thesis.txt").exists()
    assert not out.exists()
    assert listing(test) == before


def test_predict_on_other_tiles_says_which_step_differs(stores: Path, tmp_path: Path) -> None:
    section = spatialdata.read_zarr(stores / "test.zarr")
    pp.tile(section, size_um=80)
    section.write(tmp_path / "section.zarr")
    line = refused(
        "predict", tmp_path / "section.zarr", "--model", stores / "model.stimage", "--out", tmp_path / "new.zarr"
    )
    assert "tiles of 80.0 µm, expected 55.0 µm: run `stimage_sd.pp.tile(sdata, size_um=55" in line


def test_a_write_that_fails_leaves_the_store(
    stores: Path, predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "section.zarr"
    shutil.copytree(predicted, path)
    before = listing(path)

    def fail(self: SpatialData, element_name: str, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SpatialData, "write_element", fail)
    assert "No space left" in refused("predict", path, "--model", stores / "model.stimage", "--overwrite")
    assert listing(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["section.zarr"]


def test_staging_survives_an_interruption(tmp_path: Path) -> None:
    target = tmp_path / "scores.csv"
    target.write_text("old")

    def write_half() -> None:
        with staged(target, overwrite=True) as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


# --------------------------------------------------------------------------------------------------
# evaluate, info


def test_evaluate_prints_and_writes_the_scores(predicted: Path, tmp_path: Path) -> None:
    csv = tmp_path / "scores.csv"
    outcome = run("evaluate", predicted, "--csv", csv)
    assert outcome.exit_code == 0, outcome.output
    scores = tl.evaluate(spatialdata.read_zarr(predicted))
    pd.testing.assert_frame_equal(pd.read_csv(csv), scores, check_dtype=False, rtol=1e-5)
    assert re.search(rf"Pearson \(log1p\) +{scores['pearson'].mean():.3f}\n", outcome.output)
    best = scores.loc[scores["pearson"].idxmax()]
    assert f"best predicted: {best['gene']} {best['pearson']:.2f}" in outcome.output
    assert "pass --overwrite" in refused("evaluate", predicted, "--csv", csv)
    assert run("evaluate", predicted, "--csv", csv, "--overwrite").exit_code == 0


def test_evaluate_refuses(stores: Path, tmp_path: Path) -> None:
    csv = tmp_path / "scores.csv"
    assert "has no predictions" in refused("evaluate", stores / "test.zarr", "--csv", csv)
    assert not csv.exists()


def test_evaluate_against_proteins(predicted: Path, tmp_path: Path) -> None:
    sdata = spatialdata.read_zarr(predicted)
    gene = contract.predictions(sdata).var_names[0]
    table = contract.counts(sdata)[:, [gene]].copy()
    table.var_names = ["CD20"]
    sdata.tables[contract.PROTEINS] = contract.annotate(table, region=contract.SPOTS)
    sdata.write(tmp_path / "s.zarr")
    names = tmp_path / "names.csv"
    names.write_text(f"gene,channel\n{gene},CD20\n")
    outcome = run("evaluate", tmp_path / "s.zarr", "--against", "proteins", "--names", names)
    assert outcome.exit_code == 0, outcome.output
    scores = tl.evaluate(sdata, against="proteins", names={gene: "CD20"})
    assert f"best predicted: {gene} {scores['pearson'][0]:.2f}" in outcome.output
    assert "NLL" not in outcome.output
    names.write_text("A B C\n")
    assert "one gene and its other name per line" in refused(
        "evaluate", tmp_path / "s.zarr", "--against", "proteins", "--names", names
    )


def test_info_tells_what_to_run_next(stores: Path, predicted: Path) -> None:
    raw = run("info", stores / "test.zarr")
    assert raw.exit_code == 0, raw.output
    assert "section      test (visium)" in raw.output
    assert "tables       counts 30 x 9" in raw.output
    assert f"next         stimage-sd train {stores / 'test.zarr'}" in raw.output
    done = run("info", predicted).output
    assert "predictions  6 genes, 2 members, trained on first, second" in done
    assert "pp.stain_normalize" in done
    assert f"next         stimage-sd evaluate {predicted}" in done


def test_info_of_a_model(stores: Path) -> None:
    outcome = run("info", stores / "model.stimage")
    assert outcome.exit_code == 0, outcome.output
    assert "model        NBModel\ngenes        6: " in outcome.output
    assert "members      2, head 'paper'" in outcome.output
    assert "tiles        55 µm, stain-normalized (vahadane)" in outcome.output
    assert "trained on   first, second" in outcome.output


def test_info_refuses(stores: Path, tmp_path: Path) -> None:
    assert "Nothing at" in refused("info", tmp_path / "nothing")
    assert "is of no known kind" in refused("info", tmp_path)
    text = tmp_path / "notes.stimage"
    text.write_text("no model")
    assert "Expected a stimage-sd model" in refused("info", text)
    broken = tmp_path / "broken.zarr"
    shutil.copytree(stores / "test.zarr", broken)
    (broken / "zarr.json").write_text('{"attributes": ')
    assert "Expected the zarr store of a section" in refused("info", broken)


# --------------------------------------------------------------------------------------------------
# demo


@pytest.mark.slow
def test_demo_does_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(_demo.run_demo, n_spots=30, n_genes=9, n_members=2, max_epochs=2)
    monkeypatch.setattr(_demo, "run_demo", small)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "scores.csv").write_text("of an earlier run")
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    assert "holds scores.csv already" in refused("demo", "--out", tmp_path / "demo")
    outcome = run("demo", "--out", tmp_path / "demo", "--overwrite")
    assert outcome.exit_code == 0, outcome.output
    assert {entry.name for entry in (tmp_path / "demo").iterdir()} == {*_demo.PRODUCTS, "notes.txt"}
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]
    figures = sorted(path.name.split("_")[0] for path in (tmp_path / "demo" / "figures").iterdir())
    assert figures == ["calibration.png", "prediction", "scores.png", "tiles.png", "training.png", "uncertainty"]
    for path in (tmp_path / "demo" / "figures").iterdir():
        assert mpimg.imread(path)[..., :3].std() > 0.02
    section = spatialdata.read_zarr(tmp_path / "demo" / "test_section.zarr")
    scores = pd.read_csv(tmp_path / "demo" / "scores.csv")
    np.testing.assert_allclose(scores["pearson"], contract.predictions(section).var["pearson"], rtol=1e-5)
    assert models.load(tmp_path / "demo" / "model.stimage").training["sections"] == [
        "training_1",
        "training_2",
        "training_3",
    ]
    assert outcome.stdout.splitlines()[-1].startswith(f"In {tmp_path / 'demo'}: test_section.zarr")


def test_demo_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    assert "is a file" in refused("demo", "--out", tmp_path / "demo")
