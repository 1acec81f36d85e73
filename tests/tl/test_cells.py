"""Cells from bundle to held-out section: labels, registration, training, scores; seams, resumption, errors."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
import squidpy as sq
from anndata import AnnData
from spatialdata import SpatialData

import stimage_sd as sti
from stimage_sd import contract
from stimage_sd.models import CellClassifier
from stimage_sd.nn.hovernet import HoVerNetSize
from stimage_sd.tl._cells.cell_tiles import CellTiles, typed_nuclei

pytestmark = pytest.mark.slow
#: so small that an epoch takes a second
TINY = HoVerNetSize(8, (1, 1, 1, 1), (1, 1), 3)
FIT = {"tile_px": 128, "batch_size": 4, "learning_rate": 3e-3}
#: a third of the tiles, for tests that do not ask what was learned
FEW = {**FIT, "min_nuclei": 16}
Section = Callable[[int], SpatialData]


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Section:
    """Sections of planted types: read, registered (no alignment is given), their cells annotated by a reference."""
    reference = sti.datasets.synthetic_reference(n_markers=4)
    made: dict[int, SpatialData] = {}

    def make(seed: int) -> SpatialData:
        if seed not in made:
            run = tmp_path_factory.mktemp("runs") / f"run{seed}"
            sti.datasets.synthetic_xenium(
                run, size_um=450, n_genes=6, seed=seed, pixel_um=0.425, n_markers=4, align=False
            )
            sdata = sti.io.xenium(run, he_image=run / "he_image.ome.tif", sample=f"run{seed}")
            sti.pp.register(sdata)
            sti.pp.annotate_cells(sdata, reference, merge=reference.uns["merge"])
            sti.pp.tissue_mask(sdata)
            truth = pd.read_csv(run / "truth_cells.csv", index_col=0)["cell_type"]
            found = sdata.tables["counts"].obs["cell_type"].astype(str)
            assert (found == truth.reindex(found.index)).mean() > 0.98
            made[seed] = sdata
        return _copy(made[seed])

    return make


def _copy(sdata: SpatialData) -> SpatialData:
    shapes = {name: frame.copy() for name, frame in sdata.shapes.items()}
    copy = SpatialData(images=dict(sdata.images), labels=dict(sdata.labels), shapes=shapes, tables=dict(sdata.tables))
    copy.attrs = dict(sdata.attrs)
    return copy


@pytest.fixture(scope="module")
def model(section: Section) -> CellClassifier:
    return sti.tl.fit_cell_classifier({"run11": section(11)}, n_epochs=10, **{**FIT, "batch_size": 2})


@pytest.fixture(scope="module")
def held_out(section: Section, model: CellClassifier) -> SpatialData:
    sdata = section(13)
    sti.tl.predict_cells(sdata, model, key_added="nuclei_predicted")
    return sdata


# --------------------------------------------------------------------------------------------------
# what is learned


def test_a_held_out_sections_cells_are_found_and_told_apart(held_out: SpatialData) -> None:
    for match in ("iou", "centers"):
        scores = sti.tl.evaluate_cells(held_out, match=match)
        summary = scores.summary.iloc[0]
        assert summary["f1"] >= 0.85
        assert summary["mean_f1"] >= 0.75
        assert summary["accuracy"] > 0.85
        assert scores.confusion["n"].sum() <= summary["n_matched"]
    assert _held_true(held_out.tables["cell_types"]) > 0.85
    assert scores.facts()["detection"].startswith("F1 ")


def test_entropy_tells_wrong_types_from_right_ones(section: Section, model: CellClassifier) -> None:
    """On a noisy scan, where some are wrong: planted colors alone are told apart without a mistake."""
    sdata = section(13)
    image = np.asarray(contract.levels(sdata, "he")[0].data)
    noise = np.random.default_rng(0).normal(0, 15, image.shape)
    noisy = contract.build_image([da.from_array(np.clip(image + noise, 0, 255).astype(np.uint8), chunks=512)])
    scan = SpatialData(images={"he": noisy}, labels=dict(sdata.labels), shapes={"nuclei": sdata.shapes["nuclei"]})
    contract.register(scan, sample="noisy", platform="slide", image="he", mpp=0.5)
    sti.tl.predict_cells(scan, model, key_added="nuclei_predicted")
    summary = sti.tl.evaluate_cells(scan).summary.iloc[0]
    assert 0.6 < summary["accuracy"] < 0.99
    assert summary["entropy_auc"] > 0.7


def test_a_batch_that_is_not_full_is_filled_up_by_its_own_tiles(section: Section, tmp_path: Path) -> None:
    sdata = section(12)
    classes = sorted(sdata.shapes["nuclei"]["cell_type"].astype(str).unique())
    nuclei = {"run12": typed_nuclei(sdata, classes, shapes_key=None)}
    tiles = CellTiles.cut(
        {"run12": sdata}, nuclei, tmp_path / "tiles", mpp=0.5, tile_px=128, min_nuclei=2, image_key=None
    )
    pictures, targets = tiles.batch(np.array([3, 1]), 5, seed=None)
    np.testing.assert_array_equal(pictures[[2, 3, 4]], pictures[[0, 1, 0]])
    assert targets.weight.tolist() == [1, 1, 0, 0, 0]
    assert targets.nuclear[:2].any()
    assert not targets.nuclear[2:].any()


def test_labels_of_others_teach_nothing(section: Section) -> None:
    train = section(11)
    frame = train.shapes["nuclei"]
    frame["cell_type"] = np.random.default_rng(0).permutation(frame["cell_type"].astype(str))
    shuffled = sti.tl.fit_cell_classifier(train, n_epochs=5, **{**FIT, "batch_size": 2})
    test = section(13)
    sti.tl.predict_cells(test, shuffled, key_added="nuclei_predicted")
    scores = sti.tl.evaluate_cells(test)
    assert scores.summary["f1"].iloc[0] > 0.7  # nuclei are nuclei
    # four near ties: which type is ahead is luck, a planted type at a time, and how likely the true one is held is not
    assert _held_true(test.tables["cell_types"]) < 0.35


def _held_true(table: AnnData) -> float:
    """Mean probability of the true type, of the nuclei that have one."""
    known = table[table.obs["true_type"].notna()]
    columns = known.var_names.get_indexer(known.obs["true_type"].astype(str))
    return float(np.asarray(known.X)[np.arange(known.n_obs), columns].mean())


def test_what_is_written(held_out: SpatialData, model: CellClassifier, tmp_path: Path) -> None:
    frame, table = held_out.shapes["nuclei_predicted"], held_out.tables["cell_types"]
    assert list(table.var_names) == list(model.classes) == ["cancer epithelial", "endothelial", "immune", "stromal"]
    np.testing.assert_allclose(np.asarray(table.X).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(table.X), frame[[f"p_{name}" for name in model.classes]].to_numpy())
    assert (frame["cell_type"].astype(str) == np.array(model.classes)[np.asarray(table.X).argmax(axis=1)]).all()
    assert frame["entropy"].between(0, 1).all()
    np.testing.assert_allclose(frame["area"], frame.geometry.area * 0.25)
    assert table.obsm["X_cell_features"].shape == (table.n_obs, 8)
    assert np.isfinite(table.uns["background_features"]).all()
    assert len(table.uns["background_features"]) > 100
    sq.gr.spatial_neighbors(table, coord_type="generic", delaunay=True)
    sq.gr.nhood_enrichment(table, cluster_key="cell_type", show_progress_bar=False, n_perms=50)
    assert np.diag(table.uns["cell_type_nhood_enrichment"]["zscore"]).mean() > 0
    held_out.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    pd.testing.assert_frame_equal(back.tables["cell_types"].obs, table.obs, check_categorical=False)
    assert back.shapes["nuclei_predicted"]["cell_type"].tolist() == frame["cell_type"].tolist()


def test_a_slide_without_molecules(held_out: SpatialData, model: CellClassifier) -> None:
    """`tl.predict` writes `nuclei`, the same ones; again, it replaces its own; and only in tiles, those in them."""
    bare = SpatialData(images={"he": held_out.images["he"]}, labels={"tissue": held_out.labels["tissue"]})
    contract.register(bare, sample="bare", platform="slide", image="he", mpp=0.5)
    sti.tl.predict(bare, model)
    expected = held_out.shapes["nuclei_predicted"]
    assert shapely.equals(bare.shapes["nuclei"].geometry.array, expected.geometry.array).all()
    sti.pp.tile(bare, layout="grid", size_um=100)
    sti.tl.predict_cells(bare, model, tiles=[3, 4])
    left, top, right, bottom = contract.tile_squares(bare, [3, 4]).T
    x, y = shapely.get_coordinates(bare.shapes["nuclei"].geometry.centroid.array).T
    assert 0 < len(x) < len(expected)
    inside = (x[:, None] > left - 2) & (x[:, None] < right + 2) & (y[:, None] > top - 2) & (y[:, None] < bottom + 2)
    assert inside.any(axis=1).all()
    assert bare.tables["cell_types"].n_obs == len(x)


def test_seams_neither_double_nor_lose(held_out: SpatialData, model: CellClassifier) -> None:
    """Other blocks, and the slide moved by half a tile: as many cells, to half a per cent, and none twice."""
    image = contract.levels(held_out, "he")[0].data
    moved = da.pad(image, ((0, 0), (64, 0), (64, 0)), constant_values=244).rechunk((3, 512, 512))
    mask = np.pad(np.asarray(held_out.labels["tissue"].data), 0)
    numbers = []
    for level, block_size in ((image, 128), (image, 512), (moved, 128)):
        sdata = SpatialData(images={"he": contract.build_image([level])})
        contract.register(sdata, sample="one", platform="slide", image="he", mpp=0.5)
        sti.pp.tile(sdata, layout="grid", size_um=64, min_tissue=0.0)
        sti.tl.predict_cells(sdata, model, block_size=block_size)
        shapes = sdata.shapes["nuclei"].geometry.array
        one, other = shapely.STRtree(shapes).query(shapes, predicate="overlaps")
        shared = shapely.area(shapely.intersection(shapes[one], shapes[other]))
        assert (shared < 0.5 * np.minimum(shapes[one].area, shapes[other].area)).all()
        numbers.append(len(shapes))
    assert mask.any()
    assert max(numbers) - min(numbers) <= max(2, 0.005 * numbers[0])


# --------------------------------------------------------------------------------------------------
# runs that stop and go on


def test_models_are_saved_whole(model: CellClassifier, held_out: SpatialData, tmp_path: Path) -> None:
    loaded = sti.models.load(model.save(tmp_path / "cells.stimage"))
    image = np.asarray(contract.levels(held_out, "he")[0].data[:, 300:503, 300:541])
    tiles = np.moveaxis(image, 0, -1)[None]
    for other in (loaded, pickle.loads(pickle.dumps(model))):
        for found, expected in zip(other(tiles), model(tiles), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert other.key == model.key
    assert model(tiles)[1].shape == (1, 203, 241, 4 + 8)
    assert loaded.facts()["types"].startswith("4: cancer epithelial")
    assert loaded.training["history"] == model.training["history"]


def test_a_killed_run_goes_on_to_the_same_network(section: Section, tmp_path: Path) -> None:
    sdata = section(12)
    sdata.write(tmp_path / "run12.zarr")
    script = tmp_path / "fit.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, spatialdata, stimage_sd as sti
            from stimage_sd.nn.hovernet import HoVerNetSize
            sdata = spatialdata.read_zarr({str(tmp_path / "run12.zarr")!r})
            sti.tl.fit_cell_classifier({{"run12": sdata}}, size=HoVerNetSize(8, (1, 1, 1, 1), (1, 1), 3), n_epochs=2,
                                       tile_px=128, batch_size=4, learning_rate=3e-3, min_nuclei=16,
                                       checkpoint=sys.argv[1])
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "state")], stderr=subprocess.DEVNULL)
    state, end = tmp_path / "state" / "state.safetensors", time.monotonic() + 300
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    options = {"size": TINY, "n_epochs": 2, **FEW}
    whole = sti.tl.fit_cell_classifier({"run12": sdata}, **options)
    resumed = sti.tl.fit_cell_classifier({"run12": sdata}, checkpoint=tmp_path / "state", **options)
    assert resumed.key == whole.key
    assert resumed.training["history"] == whole.training["history"]
    with pytest.raises(ValueError, match="differs in learning_rate"):
        sti.tl.fit_cell_classifier(
            {"run12": sdata}, checkpoint=tmp_path / "state", **(options | {"learning_rate": 1e-4})
        )


class Counting:
    """A finder that counts its calls, and stops at one of them."""

    def __init__(self, model: CellClassifier, stop: int | None = None) -> None:
        self.classes, self.mpp, self.n_values, self.key = model.classes, model.mpp, model.n_values, "counting"
        self._model, self._stop, self.calls = model, stop, 0

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        if self.calls == self._stop:
            raise RuntimeError("stopped")
        return self._model(images)


def test_an_interrupted_slide_goes_on(section: Section, held_out: SpatialData, model: CellClassifier) -> None:
    sdata = section(13)
    options = {"key_added": "nuclei_predicted", "block_size": 128, "n_jobs": 1}
    stopping, going, whole = Counting(model, stop=20), Counting(model), Counting(model)
    with pytest.raises(RuntimeError, match="stopped"):
        sti.tl.predict_cells(sdata, stopping, **options)
    assert "nuclei_predicted" not in sdata.shapes
    sti.tl.predict_cells(sdata, going, **options)
    found = sdata.shapes["nuclei_predicted"].geometry.array
    sti.tl.predict_cells(sdata, whole, **options)
    assert going.calls <= whole.calls - 15
    assert shapely.equals(found, sdata.shapes["nuclei_predicted"].geometry.array).all()


def test_cross_validation_by_section(section: Section, tmp_path: Path) -> None:
    cohort = {f"run{n}": section(n) for n in (12, 13)}
    models = {"tiny": partial(sti.tl.fit_cell_classifier, size=TINY, n_epochs=2, **FEW)}
    table = sti.tl.cross_validate_cells(cohort, models, out=tmp_path)
    assert set(table["section"]) == set(cohort)
    assert (table["section"] == table["fold"]).all()
    assert {"all", "immune"} <= set(table["cell_type"])
    assert all("cell_types" not in sdata.tables for sdata in cohort.values())
    pd.testing.assert_frame_equal(sti.tl.cross_validate_cells(cohort, models, out=tmp_path), table)
    with pytest.raises(TypeError, match="found NoneType"):
        sti.tl.cross_validate_cells(cohort, {"none": lambda cohort: None})


def test_the_validation_sections_best_epoch_is_kept(section: Section) -> None:
    cohort = {f"run{n}": section(n) for n in (12, 13)}
    fitted = sti.tl.fit_cell_classifier(cohort, size=TINY, validation="run13", n_epochs=2, **FEW)
    losses = fitted.training["history"]["validation_loss"]
    assert fitted.training["best_epoch"] == int(np.argmin(losses)) + 1
    assert fitted.training["validation"] == ["run13"]


# --------------------------------------------------------------------------------------------------
# bad input


def test_errors_of_fitting_say_what_to_do(section: Section) -> None:
    sdata = section(12)
    fit = partial(sti.tl.fit_cell_classifier, size=TINY, n_epochs=1)
    with pytest.raises(ValueError, match=r"none of \['plasma'\].*Leave the class out"):
        fit({"a": sdata}, classes=["immune", "plasma"])
    with pytest.raises(ValueError, match="`tile_px` divisible by 8, found 100"):
        fit({"a": sdata}, tile_px=100)
    with pytest.raises(KeyError, match="name sections of"):
        fit({"a": sdata}, validation="b")
    with pytest.raises(ValueError, match="larger than a tile of 4096 px"):
        fit({"a": sdata}, tile_px=4096)
    with pytest.raises(ValueError, match="at least 500 nuclei"):
        fit({"a": sdata}, min_nuclei=500)
    with pytest.raises(ValueError, match=r"0.25 µm per pixel or finer, found 0.5.*`mpp=0.5`"):
        fit({"a": sdata}, mpp=0.25)
    with pytest.raises(ValueError, match=r"one of .*'published', 'small'"):
        fit({"a": sdata}, size="huge")
    nameless = sdata.shapes["nuclei"].drop(columns="cell_type")
    sdata.shapes["nuclei"] = nameless
    with pytest.raises(KeyError, match=r"no column 'cell_type'.*annotate_cells"):
        fit({"a": sdata})


def test_a_registration_that_failed_is_seen(section: Section) -> None:
    fit = partial(sti.tl.fit_cell_classifier, size=TINY, n_epochs=1, tile_px=128)
    for shift, message in (((12.0, 9.0), r"dark.*registration failed"), ((4000.0, 0.0), r"off it.*pp.register")):
        sdata = section(12)
        frame = contract.nuclei(sdata)
        moved = gpd.GeoDataFrame({"cell_type": frame["cell_type"]}, geometry=frame.geometry.translate(*shift))
        del sdata.shapes["nuclei"]
        contract.write_shapes(sdata, moved, name="nuclei")
        with pytest.raises(ValueError, match=message):
            fit({"a": sdata})


def test_errors_of_predicting_and_scoring(section: Section, model: CellClassifier) -> None:
    sdata = section(12)
    with pytest.raises(ValueError, match="has shapes 'nuclei' already"):
        sti.tl.predict(sdata, model)
    with pytest.raises(KeyError, match=r"no predicted cells. Run `stimage_sd.tl.predict"):
        sti.tl.evaluate_cells(sdata)
    with pytest.raises(ValueError, match="predicts no counts"):
        sti.tl.predict(sdata, model, size_factors="total")
    coarse = SpatialData(images={"he": sdata.images["he"]}, labels={"tissue": sdata.labels["tissue"]})
    contract.register(coarse, sample="coarse", platform="slide", image="he", mpp=1.0)
    with pytest.raises(ValueError, match=r"at 0.5 µm per pixel or finer, as the network was trained on, found 1"):
        sti.tl.predict(coarse, model)
    del coarse.labels["tissue"]
    contract.remember(coarse, mpp=0.5)
    with pytest.raises(KeyError, match=r"no tissue mask. Run `stimage_sd.pp.tissue_mask"):
        sti.tl.predict(coarse, model)
    with pytest.raises(ValueError, match='"iou" or "centers"'):
        sti.tl.evaluate_cells(sdata, match="nearest")
