"""Nuclei and squares: embedded, learned from spots or cells, predicted, and scored."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.transformations import Sequence, Translation, get_transformation, set_transformation
from typer.testing import CliRunner

import stimage_sd as sti
from stimage_sd import contract
from stimage_sd.cli import app
from stimage_sd.models import get_extractor
from stimage_sd.pp._embed_instances import _batch_size
from stimage_sd.stream.cutting import cut_tile
from stimage_sd.tl._predict.targets import open_target
from stimage_sd.tl._score.cross_validate import shallow_copy

EXTRACTOR = "efficientnet_lite0_stages"


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> SpatialData:
    """Xenium cells of four types, with spots over them, tiles and nuclei embedded."""
    path = tmp_path_factory.mktemp("xenium") / "run"
    sti.datasets.synthetic_xenium(path, size_um=700, n_genes=6, n_markers=2, pixel_um=0.85)
    sdata = sti.io.xenium(path, he_image=path / "he_image.ome.tif", sample="one")
    sti.pp.aggregate(sdata, pitch_um=80)
    sti.pp.tile(sdata)
    sti.pp.embed(sdata, fields_of_view=(1.0,))
    sti.pp.embed(sdata, on="nuclei")
    sti.pp.embed(sdata, on="grid", square_um=20)
    return sdata


@pytest.fixture(scope="module")
def genes(section: SpatialData) -> list[str]:
    return ["IMMUNE_01", "CANCER_EPITHELIAL_01", "STROMAL_01", "SIGNAL001"]


@pytest.fixture(scope="module")
def fits(section: SpatialData, genes: list[str]) -> dict[str, sti.models.InstanceModel]:
    return {
        on: sti.tl.fit_nb(section, genes=genes, on=on, n_members=2, max_epochs=20, rank=4) for on in ("nuclei", "grid")
    }


def test_a_nucleus_is_embedded_as_its_square_of_the_image(section: SpatialData):
    table = section.tables["nuclei_features"]
    extractor = get_extractor(EXTRACTOR)
    image = contract.levels(section, contract.image_name(section))[0].to_numpy()
    centers = contract.places(section, table)
    inside = np.flatnonzero(((centers > 50) & (centers < np.array(image.shape[:0:-1]) - 50)).all(axis=1))[:5]
    for row in inside:
        parts = []
        for field in (8, 25):
            side = round(field / 0.5)
            left, top = np.floor(centers[row] - side / 2 + 0.5 + 1e-6).astype(int)
            tile = cut_tile(image, top=int(top), left=int(left), side=side, target=64)
            parts.append(extractor(tile[None])[0])
        np.testing.assert_allclose(table.obsm[f"X_{EXTRACTOR}"][row], np.concatenate(parts), rtol=1e-3, atol=1e-3)


def test_many_nuclei_make_large_batches(section: SpatialData):
    """A scheduler that serves one batch of 128 nuclei after another keeps twenty cores busy, and no more."""
    extractor = get_extractor(EXTRACTOR)
    sizes = [_batch_size(extractor, count) for count in (1, 131_072, 200_000, 1_000_000, 10_000_000)]
    assert sizes == [128, 128, 192, 976, 1024]
    obsm = section.tables["nuclei_features"].obsm
    before = obsm[f"X_{EXTRACTOR}"].copy()
    sti.pp.embed(section, on="nuclei", batch_size=1024)
    np.testing.assert_array_equal(obsm[f"X_{EXTRACTOR}"], before)


def test_embeddings_do_not_depend_on_workers(section: SpatialData):
    copy = shallow_copy(section)
    del copy.tables["nuclei_features"]
    sti.pp.embed(copy, on="nuclei", n_jobs=1, batch_size=32)
    np.testing.assert_array_equal(
        copy.tables["nuclei_features"].obsm[f"X_{EXTRACTOR}"],
        section.tables["nuclei_features"].obsm[f"X_{EXTRACTOR}"],
    )


@pytest.mark.parametrize("on", ["nuclei", "grid"])
def test_nuclei_add_up_to_their_spots(section: SpatialData, fits, on: str):
    sdata = shallow_copy(section)
    for exposure in (None, 0.3):
        sti.tl.predict(sdata, fits[on], exposure=exposure)
        sti.tl.predict(sdata, fits[on], on=on, exposure=exposure)
        tiles, parts = sdata.tables["predictions"], sdata.tables[f"{on}_predictions"]
        inside = parts[parts.obs["in_tile"].to_numpy()]
        summed = np.zeros(tiles.shape)
        np.add.at(summed, tiles.obs_names.get_indexer(inside.obs["tile"]), np.asarray(inside.X, np.float64))
        if on == "nuclei":
            summed += tiles.layers["background"]
        np.testing.assert_allclose(summed, tiles.X, rtol=2e-5)


def test_a_member_is_a_model_of_nuclei(section: SpatialData, fits):
    whole, part = fits["nuclei"], fits["nuclei"].members[1]
    assert type(part) is sti.models.InstanceModel
    assert "predict with on='nuclei'" in part.facts()["nuclei"]
    assert part.training["members"] == [1]
    opened = [model.open(section, section="one") for model in (whole, part)]
    for every, own in zip(opened[0].r_and_p(slice(0, 9)), opened[1].r_and_p(slice(0, 9)), strict=True):
        np.testing.assert_allclose(own, every[[1]], rtol=1e-5)
    for every, own in zip(*(one.of_instances()[0].r_and_p(slice(0, 9)) for one in opened), strict=True):
        np.testing.assert_allclose(own, every[[1]], rtol=1e-5)


def test_variances_of_nuclei_add_up_too(section: SpatialData, genes):
    sdata = shallow_copy(section)
    model = sti.tl.fit_nb(sdata, genes=genes, on="grid", n_members=2, max_epochs=2, rank=4, exposure=None)
    sti.tl.predict(sdata, model)
    sti.tl.predict(sdata, model, on="grid")
    tiles, parts = sdata.tables["predictions"], sdata.tables["grid_predictions"]
    inside = parts[parts.obs["in_tile"].to_numpy()]
    summed = np.zeros(tiles.shape)
    np.add.at(
        summed, tiles.obs_names.get_indexer(inside.obs["tile"]), np.asarray(inside.layers["aleatoric"], np.float64)
    )
    np.testing.assert_allclose(summed, tiles.layers["aleatoric"], rtol=2e-5)


def test_the_table_annotates_the_nuclei_and_survives_the_disk(section: SpatialData, fits, tmp_path: Path):
    sdata = shallow_copy(section)
    sti.tl.predict(sdata, fits["nuclei"], on="nuclei")
    shapes, table = sd.match_element_to_table(sdata, "nuclei", "nuclei_predictions")
    assert len(shapes["nuclei"]) == table.n_obs == sdata.tables["nuclei_predictions"].n_obs
    sdata.write(tmp_path / "section.zarr")
    again = sd.read_zarr(tmp_path / "section.zarr")
    before = sdata.tables["nuclei_predictions"].X
    sti.tl.predict(again, fits["nuclei"].save(tmp_path / "nuclei.stimage"), on="nuclei")
    np.testing.assert_array_equal(again.tables["nuclei_predictions"].X, before)


def test_predictions_larger_than_memory(section: SpatialData, fits, tmp_path: Path):
    sdata, lazy = shallow_copy(section), shallow_copy(section)
    sti.tl.predict(sdata, fits["nuclei"], on="nuclei")
    sti.tl.predict(lazy, fits["nuclei"], on="nuclei", out=tmp_path / "out")
    np.testing.assert_array_equal(lazy.tables["nuclei_predictions"].X.compute(), sdata.tables["nuclei_predictions"].X)


def test_predicting_does_not_copy_the_embeddings(section: SpatialData, fits):
    """Of a million nuclei they take 1.4 GB."""
    table = contract.instances(section, "nuclei")
    target = open_target(fits["nuclei"], section, on="nuclei", section="one")
    assert target.table.n_obs == table.n_obs
    assert not target.table.obsm
    assert np.shares_memory(target.opened.section.embedded, table.obsm[f"X_{EXTRACTOR}"])
    np.testing.assert_array_equal(
        target.opened.strangeness, fits["nuclei"].features.strangeness(table.obsm[f"X_{EXTRACTOR}"])
    )


def test_cells_are_told_apart_within_spots(section: SpatialData, fits):
    """Learned from spots alone, a marker is higher in the nuclei of its type."""
    sdata = shallow_copy(section)
    contract.activate(sdata, "counts", "counts")
    sti.tl.predict(sdata, fits["nuclei"], on="nuclei")
    scores = sti.tl.evaluate(sdata, key="nuclei_predictions", table_key="counts").set_index("gene")
    assert scores.loc["CANCER_EPITHELIAL_01", "pearson"] > 0.3
    assert scores["iou"].isna().all()
    assert scores["coverage"].between(0.6, 1).all()
    assert scores["morans_i_observed"].notna().all()


def test_scores_at_the_spot_and_downstream_steps(section: SpatialData, fits, genes):
    sdata = shallow_copy(section)
    sti.tl.predict(sdata, fits["nuclei"])
    assert sti.tl.evaluate(sdata)["pearson"].notna().all()
    tiles = sti.tl.fit_nb(sdata, genes=genes, n_members=2, max_epochs=2)
    both = sti.tl.combine([tiles, fits["nuclei"]])
    sti.tl.predict(sdata, both)
    assert sdata.tables["predictions"].uns["prediction"]["n_members"] == 4
    adapted = sti.tl.adapt(fits["nuclei"], sdata)
    sti.tl.predict(sdata, adapted)
    assert sti.tl.sample(sdata, fits["nuclei"], 3).shape == (3, sdata.tables["predictions"].n_obs, len(genes))


@pytest.mark.slow
def test_cells_are_learned_directly_on_a_grid_of_tiles(section: SpatialData, genes):
    sdata = shallow_copy(section)
    del sdata.tables["spot_counts"]
    contract.activate(sdata, "counts", "counts")
    sti.pp.tile(sdata, layout="grid", size_um=55)
    sti.pp.embed(sdata, fields_of_view=(1.0,))
    model = sti.tl.fit_nb(sdata, genes=genes, on="nuclei", n_members=2, max_epochs=10, rank=4)
    assert model.n_per_unit == 1
    sti.tl.predict(sdata, model, on="nuclei")
    scores = sti.tl.evaluate(sdata, key="nuclei_predictions").set_index("gene")
    assert scores.loc["CANCER_EPITHELIAL_01", "pearson"] > 0.4
    assert scores["coverage"].between(0.8, 1).all()
    # sections of spots and of cells learn together
    mixed = sti.tl.fit_nb(
        {"spots": section, "cells": sdata}, genes=genes, on="nuclei", n_members=2, max_epochs=2, rank=4
    )
    assert mixed.n_per_unit > 1


def test_a_cropped_and_shifted_section_gives_the_same_nuclei(section: SpatialData, genes: list[str]):
    model = sti.tl.fit_nb(section, genes=genes, on="nuclei", n_members=2, max_epochs=2, rank=4, standardize="cohort")
    whole = shallow_copy(section)
    sti.tl.predict(whole, model, on="nuclei")
    crop = sti.io.from_spatialdata(
        section.query.bounding_box(
            axes=("x", "y"), min_coordinate=[200, 150], max_coordinate=[1100, 1200], target_coordinate_system="global"
        )
    )
    for _, _, element in crop.gen_spatial_elements():
        placed = get_transformation(element, "global")
        set_transformation(element, Sequence([placed, Translation([1000, -300], axes=("x", "y"))]), "global")
    sti.tl.predict(crop, model, on="nuclei")
    expected, found = whole.tables["nuclei_predictions"], crop.tables["nuclei_predictions"]
    x, y = contract.places(whole, expected).T
    # spots at the border lose nuclei, and nuclei there their nearest tile
    far = (x > 320) & (x < 980) & (y > 270) & (y < 1080)
    names = expected.obs_names[far]
    assert len(names) > 100
    assert set(names) <= set(found.obs_names)
    np.testing.assert_allclose(found[names].X, expected[names].X, rtol=1e-5)
    np.testing.assert_allclose(
        contract.places(crop, found[names]) + np.array([200, 150]), contract.places(whole, expected[names]), atol=1
    )
    # embedded anew, pixels are cut at the same places
    sti.pp.embed(crop, on="nuclei")
    ids = expected.obs["instance_id"][far]
    embedded = [
        table[table.obs.set_index("instance_id").index.get_indexer(ids)].obsm[f"X_{EXTRACTOR}"]
        for table in (crop.tables["nuclei_features"], section.tables["nuclei_features"])
    ]
    np.testing.assert_allclose(*embedded, atol=1e-3)


def test_new_squares_remove_what_was_predicted_of_the_earlier_ones(section: SpatialData, fits):
    sdata = shallow_copy(section)
    sti.tl.predict(sdata, fits["grid"], on="grid")
    sti.pp.embed(sdata, on="grid", square_um=20)  # the same squares
    assert "grid_predictions" in sdata.tables
    with pytest.warns(UserWarning, match="grid_predictions"):
        sti.pp.embed(sdata, on="grid", square_um=40, fields_of_view=(40.0,))
    assert "grid_predictions" not in sdata.tables
    assert len(sdata.shapes["grid_squares"]) == sdata.tables["grid_features"].n_obs
    with pytest.raises(ValueError, match="larger than section"):
        sti.pp.embed(sdata, on="grid", square_um=1e5)
    assert len(sdata.shapes["grid_squares"]) == sdata.tables["grid_features"].n_obs


def test_spots_keep_their_size_where_counts_are_of_cells_by_now(section: SpatialData):
    sdata = shallow_copy(section)
    before = contract.within_tiles(sdata, sdata.tables["nuclei_features"])
    contract.activate(sdata, "counts", "counts")
    after = contract.within_tiles(sdata, sdata.tables["nuclei_features"])
    np.testing.assert_array_equal(after.inside, before.inside)
    np.testing.assert_array_equal(after.uncovered, before.uncovered)


def test_a_section_of_which_a_few_tiles_were_segmented(section: SpatialData, fits, genes):
    sdata = shallow_copy(section)
    within = contract.within_tiles(sdata, sdata.tables["nuclei_features"])
    sdata.tables["nuclei_features"] = sdata.tables["nuclei_features"][within.tile < 3].copy()
    with pytest.raises(ValueError, match="hold none of its nuclei"):
        sti.tl.fit_nb(sdata, genes=genes, on="nuclei", n_members=2, max_epochs=1)
    with pytest.warns(UserWarning, match="hold no nucleus"):
        sti.tl.predict(sdata, fits["nuclei"])


def test_nuclei_are_drawn(section: SpatialData, fits, genes):
    sdata = shallow_copy(section)
    sti.tl.predict(sdata, fits["nuclei"], on="nuclei")
    axes = sti.pl.prediction(sdata, genes[0], key="nuclei_predictions", table_key="counts", zoom=(200, 200, 700, 700))
    drawn = [panel.collections[-1] for panel in np.ravel(axes)]
    assert all(0 < len(collection.get_array()) < sdata.tables["nuclei_predictions"].n_obs for collection in drawn)
    sti.pl.uncertainty(sdata, genes[0], key="nuclei_predictions", zoom=(200, 200, 700, 700))
    plt.close("all")


def test_what_does_not_fit_is_refused(section: SpatialData, fits, genes):
    sdata = shallow_copy(section)
    with pytest.raises(ValueError, match=r"fit_nb\(\.\.\., on='grid'\)"):
        sti.tl.predict(sdata, fits["nuclei"], on="grid")
    with pytest.raises(ValueError, match="rank"):
        sti.tl.fit_nb(sdata, genes=genes, on="nuclei", rank=None)
    with pytest.raises(ValueError, match="paper"):
        sti.tl.fit_nb(sdata, genes=genes, on="nuclei", head="dispersion")
    with pytest.raises(ValueError, match="size_factors"):
        sti.tl.fit_nb(sdata, genes=genes, on="nuclei", size_factors="total")
    bare = shallow_copy(section)
    del bare.tables["nuclei_features"]
    with pytest.raises(KeyError, match=r'pp\.embed\(sdata, on="nuclei"\)'):
        sti.tl.fit_nb(bare, genes=genes, on="nuclei")
    del bare.shapes["nuclei"]
    with pytest.raises(KeyError, match="segment_nuclei"):
        sti.pp.embed(bare, on="nuclei")
    other = shallow_copy(section)
    other.tables["nuclei_features"] = other.tables["nuclei_features"].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sti.pp.embed(other, on="nuclei", fields_of_view=(15.0,))
    with pytest.raises(ValueError, match=r"fields_of_view=\(8\.0, 25\.0\)"):
        sti.tl.predict(other, fits["nuclei"], on="nuclei")
    moved = shallow_copy(section)
    moved.shapes["nuclei"] = moved.shapes["nuclei"].iloc[:10]
    with pytest.raises(ValueError, match="have no shape"):
        sti.tl.predict(moved, fits["nuclei"], on="nuclei")
    instead = r"contribution of each nucleus .* Run `stimage_sd.tl.predict\(.*on=\"grid\""
    for explain in (sti.tl.explain, sti.tl.saliency):
        with pytest.raises(TypeError, match=instead):
            explain(section, fits["grid"], genes[0], tiles=[0])


@pytest.mark.slow
def test_slides_and_the_command_line_find_the_nuclei_themselves(section: SpatialData, genes: list[str], tmp_path: Path):
    sdata = shallow_copy(section)
    model = sti.tl.fit_nb(sdata, genes=genes, on="nuclei", n_members=2, max_epochs=2, rank=4, standardize="cohort")
    path = model.save(tmp_path / "nuclei.stimage")
    slide = sti.datasets.synthetic_slide(tmp_path / "slide", size=1024)
    cohort = sti.tl.predict_cohort([next(slide.glob("*.svs"))], path, out=tmp_path / "cohort")
    assert cohort.shape == (1, len(genes))
    sti.io.slide(next(slide.glob("*.svs"))).write(tmp_path / "slide.zarr")
    done = CliRunner().invoke(
        app, ["predict", str(tmp_path / "slide.zarr"), "--model", str(path), "--on", "nuclei", "--out",
              str(tmp_path / "out.zarr")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = sd.read_zarr(tmp_path / "out.zarr").tables["nuclei_predictions"]
    assert written.n_obs > 20
    assert written.layers["upper"].min() >= 0
    assert "--out NEW.zarr --on nuclei" in CliRunner().invoke(app, ["info", str(path)]).output
