"""A cohort of slides from files to a row each: what fails is said, what is done is not done again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import cv2
import numpy as np
import pandas as pd
import pytest
import spatialdata
import tifffile
from distributed import Client, LocalCluster
from spatialdata import SpatialData
from typer.testing import CliRunner

from stimage_sd import datasets, models, pp, tl
from stimage_sd.cli import app
from stimage_sd.datasets._tissue_painter import Tissue
from stimage_sd.datasets._truth import draw_genes, log_mean
from stimage_sd.models import NBModel
from stimage_sd.stats.lattice import neighbor_graph
from stimage_sd.stats.spatial import morans_i

pytestmark = pytest.mark.slow
N_SLIDES, SIZE = 12, 1024


@pytest.fixture(scope="module")
def model(synthetic: Callable[..., SpatialData]) -> NBModel:
    """A model of one field of view, which knows other slides from its own."""
    train = {f"s{seed}": synthetic(n_spots=60, n_genes=12, seed=seed) for seed in (1, 2)}
    pp.tile(train)
    pp.embed(train, fields_of_view=(1.0,), context_rings=0)
    return tl.fit_nb(train, genes=pp.select_genes(train, n_top=8), n_members=2, max_epochs=10, standardize="cohort")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Twelve pyramidal TIFFs: one that cannot be read, one blank, one that states no resolution."""
    folder = tmp_path_factory.mktemp("slides")
    rows = []
    for number in range(N_SLIDES):
        run = datasets.synthetic_slide(folder / f"run{number}", size=SIZE, n_genes=12, seed=number)
        rows.append({"path": str(run / "slide.svs"), "slide": f"slide{number}", "patient": f"P{number // 2}"})
    unreadable = Path(rows[3]["path"])
    unreadable.write_bytes(unreadable.read_bytes()[:5000])
    rows[5]["path"] = str(folder / "blank.tif")
    tifffile.imwrite(rows[5]["path"], np.full((SIZE, SIZE, 3), 243, np.uint8), tile=(256, 256), photometric="rgb",
                     resolution=(20_000, 20_000), resolutionunit="CENTIMETER")  # fmt: skip
    whole = tifffile.imread(rows[7]["path"], key=0)
    rows[7]["path"] = str(folder / "unknown.tif")
    with tifffile.TiffWriter(rows[7]["path"]) as tiff:
        tiff.write(whole, tile=(256, 256), photometric="rgb", subifds=1)
        half = cv2.resize(whole, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        tiff.write(half, tile=(256, 256), photometric="rgb", subfiletype=1)
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def predicted(
    slides: pd.DataFrame, model: NBModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ad.AnnData, Path]:
    out = tmp_path_factory.mktemp("cohort")
    with pytest.warns(UserWarning, match=r"2 of 12 slides failed: \['slide3', 'slide7'\]. 'slide3': .*slides.csv"):
        return tl.predict_cohort(slides, model, out=out, stores=True), out


def test_the_three_that_fail_are_reported_and_the_others_predicted(predicted: tuple, slides: pd.DataFrame) -> None:
    cohort, out = predicted
    report = cohort.uns["slides"]
    assert report["status"].value_counts().to_dict() == {"predicted": 9, "failed": 2, "dropped": 1}
    assert report.loc["slide3", "status"] == "failed"
    assert "slide.svs" in report.loc["slide3", "reason"]
    assert report.loc["slide5", "reason"] == "quality: no tissue"
    assert "mpp" in report.loc["slide7", "reason"]
    assert cohort.obs_names.tolist() == [f"slide{n}" for n in range(N_SLIDES) if n not in (3, 5, 7)]
    assert cohort.obs["patient"].tolist() == slides["patient"].drop([3, 5, 7]).tolist()
    assert (cohort.obs["mpp"] == 0.5).all()
    read = ad.read_h5ad(out / "cohort.h5ad")
    np.testing.assert_array_equal(read.X, cohort.X)
    assert pd.read_csv(out / "slides.csv", index_col="slide")["status"].to_dict() == report["status"].to_dict()


def test_rows_are_sums_over_the_tiles(predicted: tuple, model: NBModel) -> None:
    cohort, out = predicted
    section = spatialdata.read_zarr(out / "stores" / "slide2.zarr")
    table = section.tables["predictions"]
    values, row = np.asarray(table.X, dtype=np.float64), cohort["slide2"]
    assert row.obs["n_tiles"].iloc[0] == table.n_obs
    np.testing.assert_allclose(row.X[0], values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(row.layers["median"][0], np.median(values, axis=0), rtol=1e-5)
    np.testing.assert_allclose(row.layers["q90"][0], np.quantile(values, 0.9, axis=0), rtol=1e-5)
    np.testing.assert_allclose(row.layers["heterogeneity"][0], values.std(axis=0) / values.mean(axis=0), rtol=1e-4)
    graph = neighbor_graph(np.asarray(table.obsm["spatial"]), n_neighbors=6)
    np.testing.assert_allclose(row.layers["morans_i"][0], morans_i(np.log1p(values), graph), rtol=1e-4)
    alone = tl.pseudobulk(section)
    np.testing.assert_array_equal(alone.X[0], row.X[0])
    assert not section.images


def test_what_is_done_is_not_done_again(
    predicted: tuple, slides: pd.DataFrame, model: NBModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, out = predicted
    opened = []
    monkeypatch.setattr("stimage_sd.tl._cohort.predict_cohort.io.slide", lambda path, **_: opened.append(path) or 1 / 0)
    again = tl.predict_cohort(slides, model, out=out)
    # the quality of both that can be opened is known; what failed is tried again
    assert sorted(opened) == sorted([slides["path"][3], slides["path"][7]])
    np.testing.assert_array_equal(again.X, cohort.X)


def test_a_missing_resolution_can_be_given(predicted: tuple, slides: pd.DataFrame, model: NBModel) -> None:
    _, out = predicted
    found = tl.predict_cohort(slides.iloc[[6, 7]].assign(mpp=[np.nan, 0.5]), model, out=out)
    assert found.obs["mpp"].tolist() == [0.5, 0.5]
    assert (found.uns["slides"]["status"] == "predicted").all()


def test_a_killed_run_goes_on(predicted: tuple, slides: pd.DataFrame, model: NBModel, tmp_path: Path) -> None:
    cohort, _ = predicted
    slides.to_csv(tmp_path / "slides.csv", index=False)
    model.save(tmp_path / "model.stimage")
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import pandas as pd, stimage_sd as sti
            from pathlib import Path
            folder = Path({str(tmp_path)!r})
            model = sti.models.load(folder / "model.stimage")
            sti.tl.predict_cohort(pd.read_csv(folder / "slides.csv"), model, out=folder / "out")
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    complete = tmp_path / "out" / "predicted"
    end = time.monotonic() + 300
    while len(list(complete.glob("*.npz"))) < 3 and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in complete.glob("*.npz")}
    assert 3 <= len(before) < 9
    names = {name: str(tmp_path / name) for name in ("slides.csv", "model.stimage", "out")}
    options = ["--model", names["model.stimage"], "--out", names["out"]]
    done = CliRunner().invoke(app, ["cohort", names["slides.csv"], *options])
    assert done.exit_code == 0, done.output
    assert "9 of 12 slides x 8 genes" in done.output
    assert "slide5: dropped: quality: no tissue" in done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "out" / "cohort.h5ad").X, cohort.X)


def test_damaged_results_of_slides_are_made_again(
    predicted: tuple, slides: pd.DataFrame, model: NBModel, tmp_path: Path
) -> None:
    cohort, complete = predicted
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    (out / "quality" / "slide0.json").write_bytes(b"")
    result = out / "predicted" / "slide1.npz"
    result.write_bytes(result.read_bytes()[:200])
    with pytest.warns(RuntimeWarning, match="damaged") as said:
        found = tl.predict_cohort(slides.iloc[:3], model, out=out)
    named = [str(warning.message) for warning in said if issubclass(warning.category, RuntimeWarning)]
    assert [any(name in text for text in named) for name in ("slide0.json", "slide1.npz")] == [True, True]
    np.testing.assert_array_equal(found.X, cohort[["slide0", "slide1", "slide2"]].X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        tl.predict_cohort(slides.iloc[:3], model, out=out)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_cluster_gives_the_same(
    predicted: tuple, slides: pd.DataFrame, model: NBModel, n_workers: int, tmp_path: Path
) -> None:
    cohort, _ = predicted
    with (
        LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        found = tl.predict_cohort(slides.iloc[:3], model, out=tmp_path)
    np.testing.assert_array_equal(found.X, cohort[found.obs_names].X)


def test_bad_tables_say_what_to_do(slides: pd.DataFrame, model: NBModel, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="Expected a column 'path'"):
        tl.predict_cohort(slides.drop(columns="path"), model, out=tmp_path)
    with pytest.raises(ValueError, match=r"unique name per slide .* found \['slide'"):
        tl.predict_cohort(list(slides["path"][:2]), model, out=tmp_path)
    with pytest.raises(ValueError, match="at least one slide, found none"):
        tl.predict_cohort([], model, out=tmp_path)
    with pytest.raises(ValueError, match="None of the 1 slides could be predicted, for instance 'slide3'"):
        tl.predict_cohort(slides.iloc[[3]], model, out=tmp_path)
    done = CliRunner().invoke(app, ["cohort", str(tmp_path / "no.csv"), "--model", "m", "--out", str(tmp_path)])
    assert done.exit_code != 0


def test_predicted_bulk_follows_the_planted(synthetic: Callable[..., SpatialData], tmp_path: Path) -> None:
    """Slides of one staining; what staining adds to a slide is not told from what its tissue does (docs)."""
    train = {f"s{seed}": synthetic(n_spots=120, n_genes=30, seed=seed) for seed in range(1, 5)}
    pp.tile(train)
    pp.embed(train, fields_of_view=(1.0,), context_rings=0)
    model = tl.fit_nb(train, genes=pp.select_genes(train, n_top=30), n_members=4, standardize="cohort")
    paths = {f"w{seed}": datasets.synthetic_slide(tmp_path / f"w{seed}", size=1280, n_genes=30, seed=seed)
             for seed in range(10, 22)}  # fmt: skip
    table = pd.DataFrame({"slide": list(paths), "path": [str(path / "slide.svs") for path in paths.values()]})
    found = tl.predict_cohort(table, model, out=tmp_path / "out", stores=True)
    genes = draw_genes(30, 0)
    planted = []
    for name in paths:
        places = (
            spatialdata.read_zarr(tmp_path / "out" / "stores" / f"{name}.zarr").tables["predictions"].obsm["spatial"]
        )
        planted.append(np.exp(log_mean(Tissue(1280, 0.5, int(name[1:])), np.asarray(places), genes)).mean(axis=0))
    bulk = ad.AnnData(np.log(np.array(planted)), pd.DataFrame(index=list(paths)), pd.DataFrame(index=genes.index))
    scores = tl.bulk_correlation(found, bulk).genes
    signal = scores[scores["gene"].str.startswith("SIGNAL")]["pearson"]
    assert len(signal) > 15
    assert signal.median() > 0.8
    assert (signal > 0.6).all()


def test_a_model_that_sees_sections_alone_warns(
    slides: pd.DataFrame, synthetic: Callable[..., SpatialData], tmp_path: Path
) -> None:
    train = synthetic(n_spots=60, n_genes=12, seed=1)
    pp.tile(train)
    pp.embed(train, fields_of_view=(1.0,), context_rings=0)
    alone = tl.fit_nb(train, genes=pp.select_genes(train, n_top=4), n_members=2, max_epochs=2)
    assert isinstance(alone, models.NBModel)
    with pytest.warns(UserWarning, match=r'removes .* fit the model with `standardize="cohort"`'):
        tl.predict_cohort(slides.iloc[:1], alone, out=tmp_path)
    shutil.rmtree(tmp_path)
