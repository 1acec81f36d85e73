"""What users do with the objects they have: aggregate, tile, predict, go on."""

from __future__ import annotations

import warnings
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import peers
import pytest
import scanpy as sc
import shapely
import spatialdata
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Translation, get_transformation

import stimage_sd as sti
from stimage_sd import contract


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*(cropped image|INFO|feature_key).*")


# --------------------------------------------------------------------------------------------------
# Xenium


@pytest.mark.slow
@pytest.mark.parametrize("labels", [True, False])
def test_pseudo_spots_of_their_xenium_are_those_of_ours(labels: bool, bundles: Path) -> None:
    """Micrometers were taken for pixels, which gave six times as many spots as there are."""
    theirs = sti.io.from_spatialdata(peers.io_xenium(bundles, labels=labels).data)
    run = peers.xenium_bundle(bundles)
    ours = sti.io.xenium(run, he_image=run / "he_image.ome.tif")
    for section in (theirs, ours):
        sti.pp.aggregate(section, spot_um=55, pitch_um=100)
        sti.pp.aggregate(section, "cells", onto="spots")
    assert contract.mpp(theirs) == pytest.approx(contract.mpp(ours), rel=1e-6)
    assert abs(theirs.tables["spot_counts"].n_obs - ours.tables["spot_counts"].n_obs) <= 1
    places = [contract.find_units(section).positions(section) for section in (theirs, ours)]
    np.testing.assert_allclose(places[0].mean(axis=0), places[1].mean(axis=0), atol=2.0)
    # cells' sums over the same spots: all cells are there, at their places
    sums = [section.tables["spot_counts"].X.sum() for section in (theirs, ours)]
    assert sums[0] == pytest.approx(sums[1], rel=0.02)


def test_cells_are_typed_after_they_were_aggregated(bundles: Path) -> None:
    section = sti.io.from_spatialdata(peers.io_xenium(bundles).data)
    sti.pp.aggregate(section)
    cells = section.tables["table"]
    sti.pp.annotate_cells(section, labels=dict.fromkeys(cells.obs_names, "tumor"))
    assert (cells.obs["cell_type"] == "tumor").all()
    assert (section.shapes["cell_boundaries"]["cell_type"] == "tumor").all()
    assert "cell_type" not in section.tables["spot_counts"].obs


@pytest.mark.slow
def test_cells_are_no_spots(bundles: Path) -> None:
    section = sti.io.from_spatialdata(peers.io_xenium(bundles).data)
    sti.pp.tile(section, size_um=55, min_tissue=0.1)
    assert contract.tiling(section)["layout"] == "grid"
    sti.pp.tile(section, layout="spots", shapes_key="cell_boundaries", size_um=20, min_tissue=0.0)
    assert contract.tiles(section).n_obs == section.tables["table"].n_obs


# --------------------------------------------------------------------------------------------------
# Visium HD


@pytest.mark.slow
def test_pseudo_spots_of_their_visium_hd_are_those_of_ours(bundles: Path) -> None:
    peer = peers.io_visium_hd(bundles)
    theirs, ours = sti.io.from_spatialdata(peer.data, table="square_016um"), peer.own()
    for section in (theirs, ours):
        assert not contract.stands_on_spots(section)
        sti.pp.aggregate(section, "cells")
        sti.pp.tile(section, min_tissue=0.1)
    assert abs(contract.tiles(theirs).n_obs - contract.tiles(ours).n_obs) <= 2
    assert contract.tiling(theirs)["size_um"] == pytest.approx(55.0, rel=0.01)


# --------------------------------------------------------------------------------------------------
# translated, concatenated, normalized


def test_the_tile_of_a_spot_on_a_red_square_is_red() -> None:
    image = np.full((3, 400, 400), 235, np.uint8)
    image[:, 80:140, 60:120] = np.array([200, 20, 40], np.uint8)[:, None, None]
    moved = Translation([500, 500], axes=("x", "y"))
    he = Image2DModel.parse(image, dims=("c", "y", "x"), transformations={"global": moved})
    spots = geopandas.GeoDataFrame({"radius": [20.0]}, geometry=[shapely.Point(590.0, 610.0)])
    section = SpatialData(images={"scan": he}, shapes={"spots": ShapesModel.parse(spots)})
    sti.pp.tile(section, shapes_key="spots", min_tissue=0.0)
    sti.pp.embed(section, "tissue_statistics", fields_of_view=(1.0,), context_rings=0)
    np.testing.assert_allclose(contract.tile_squares(section), [[70.0, 90.0, 110.0, 130.0]])
    assert set(get_transformation(section.shapes["tile_squares"], get_all=True)) == {"global"}
    back = spatialdata.transform(section.shapes["tile_squares"], to_coordinate_system="global")
    np.testing.assert_allclose(back.total_bounds, [570, 590, 610, 630])


def test_each_sample_of_a_cohort_keeps_its_own_spots(bundles: Path) -> None:
    """Of two samples in one coordinate system, both samples' spots were laid on the first one's image."""
    two = peers.cohort(bundles, shared_coordinates=True)
    for peer in two.values():
        both = peer.data
        sti.pp.tissue_mask(both, image_key=peer.image, key_added="where")
        sti.pp.tile(both, image_key=peer.image, shapes_key=peer.shapes, table_key=peer.table, min_tissue=0.0)
        tiles = contract.tiles(both)
        assert set(tiles.obs["spot_id"]) == set(peer.pixels.index)
        found = contract.tile_geometry(both, image_key=peer.image).centers
        np.testing.assert_allclose(found, peer.pixels.loc[tiles.obs["spot_id"].astype(str)], atol=1e-6)
        both.attrs = {}


@pytest.mark.slow
def test_a_cohort_in_one_object_is_learned_from(bundles: Path) -> None:
    found = sti.io.from_spatialdata(peers.cohort(bundles)["one"].data)
    assert isinstance(found, dict)
    for section in found.values():
        sti.pp.tile(section, min_tissue=0.0)
        sti.pp.embed(section, "tissue_statistics", fields_of_view=(1.0,), context_rings=0)
    genes = sti.pp.select_genes(found, n_top=3)
    model = sti.tl.fit_nb(found, genes=genes, extractor="tissue_statistics", n_members=2, max_epochs=2, n_components=4)
    sti.tl.predict(found, model)
    assert set(sti.tl.evaluate(found)["section"]) == set(found)


@pytest.mark.slow
def test_a_normalized_table_is_refused_with_the_layer_that_has_counts(bundles: Path) -> None:
    peer = peers.lognormalize(peers.own_visium(bundles))
    section = peer.data
    with pytest.raises(ValueError, match=r"found .* not a whole number. Its layer 'counts' holds counts: pass `layer="):
        sti.pp.select_genes(section, n_top=3)
    sti.pp.tile(section, min_tissue=0.0)  # positions need no counts
    sti.pp.embed(section, "tissue_statistics", fields_of_view=(1.0,), context_rings=0)
    genes = sti.pp.select_genes(section, n_top=3, layer="counts")
    model = sti.tl.fit_nb(
        section, genes=genes, extractor="tissue_statistics", n_members=2, max_epochs=2, n_components=4, layer="counts"
    )
    sti.tl.predict(section, model)
    by_layer = sti.tl.evaluate(section, layer="counts")
    adopted = sti.io.from_spatialdata(section)
    np.testing.assert_allclose(sti.tl.evaluate(adopted)["pearson"], by_layer["pearson"])
    assert sti.pp.select_genes(adopted, n_top=3) == genes
    with pytest.raises(KeyError, match=r"No layer 'raw' .* its layers: \['counts'\]"):
        sti.tl.evaluate(section, layer="raw")


# --------------------------------------------------------------------------------------------------
# steps that make earlier results untrue


def test_new_tiles_take_old_predictions_with_them(make_spots, planted) -> None:
    cohort = planted(("a", "b"), n_side=6, n_features=4, n_genes=3)
    section = cohort.sections["a"]
    model = sti.tl.fit_nb(
        cohort.sections, genes=cohort.genes, extractor="toy", n_members=2, max_epochs=2, n_components=3
    )
    sti.tl.predict(section, model)
    sti.tl.predict(section, model, key_added="second")
    assert {"predictions", "second"} <= set(section.tables)
    np.testing.assert_array_equal(section.tables["second"].X, section.tables["predictions"].X)
    assert len(sti.tl.evaluate(section, key="second")) == len(cohort.genes)
    assert "pearson" not in section.tables["predictions"].var
    with pytest.raises(ValueError, match="table 'counts' already, and it holds no predictions"):
        sti.tl.predict(section, model, key_added="counts")
    with pytest.warns(UserWarning, match="has new tiles. .* are removed: predictions, second"):
        sti.pp.tile(section, size_um=30, min_tissue=0.0)
    assert not {"predictions", "second"} & set(section.tables)


def test_a_crop_does_not_change_the_object_it_was_cut_from(bundles: Path) -> None:
    """SpatialData gives crops the attributes of the whole, the same dictionary."""
    section = peers.own_visium(bundles).data
    before = sti.contract.info(section)
    crop = section.query.bounding_box(
        axes=("x", "y"), min_coordinate=[300, 300], max_coordinate=[1200, 1200], target_coordinate_system="global"
    )
    sti.pp.stain_normalize(crop, method="reinhard")
    sti.pp.tile(crop, min_tissue=0.0)
    assert sti.contract.info(section) == before
    assert sti.contract.info(crop)["normalized_image"] == "he_normalized"


# --------------------------------------------------------------------------------------------------
# LazySlide


@pytest.mark.parametrize("image", [True, False])
def test_tiles_and_features_of_lazyslide_are_taken_over(image: bool, bundles: Path, tmp_path: Path) -> None:
    peer = peers.lazyslide_store(bundles, tmp_path, image=image)
    if not image:
        with pytest.raises(ValueError, match=r"holds no image.*Pass the slide as `slide=`"):
            sti.io.from_spatialdata(peer.data)
    slide = peers.visium_bundle(bundles) / "image.tif"
    section = sti.io.from_spatialdata(peer.data, slide=None if image else slide)
    tiles = contract.tiles(section)
    np.testing.assert_allclose(contract.tile_geometry(section).centers, peer.pixels)
    np.testing.assert_allclose(tiles.obsm["X_tiny"], peer.counts.X)
    assert contract.mpp(section) == pytest.approx(peers.MPP)
    assert 0.3 < contract.tissue(section)[0].mean() < 0.7
    assert not contract.has_counts(section)
    sti.pp.spatial_context(section, "tiny")


def test_a_resolution_that_no_microscope_has_is_not_believed(bundles: Path, tmp_path: Path) -> None:
    """LazySlide takes the dots per inch of a TIFF for its resolution: 264.58 micrometers per pixel."""
    peer = peers.lazyslide_store(bundles, tmp_path)
    peer.data.attrs["slide_properties"]["mpp"] = 264.58
    assert contract.mpp(sti.io.from_spatialdata(peer.data)) is None


# --------------------------------------------------------------------------------------------------
# what is refused


def test_coordinate_systems_that_contradict_each_other_are_refused(bundles: Path) -> None:
    peer = peers.io_visium(bundles)
    shapes = peer.data.shapes[peer.shapes]
    spatialdata.transformations.set_transformation(
        shapes, Translation([200, 0], axes=("x", "y")), to_coordinate_system="tissue_downscaled_hires"
    )
    with pytest.raises(ValueError, match=r"place 'tissue' at different pixels.*from_spatialdata.*coordinate_system"):
        sti.io.from_spatialdata(peer.data, image="tissue_hires_image")
    section = sti.io.from_spatialdata(peer.data, image="tissue_full_image", coordinate_system="tissue")
    places = contract.find_units(section).positions(section)
    np.testing.assert_allclose(places, peer.pixels.loc[contract.find_units(section).names])


def test_a_xenium_he_without_alignment_is_refused(bundles: Path) -> None:
    peer = peers.io_xenium(bundles)
    spatialdata.transformations.set_transformation(
        peer.data.images["he_image"], spatialdata.transformations.Identity(), to_coordinate_system="global"
    )
    with pytest.raises(ValueError, match=r"'he_image' of this Xenium object has no alignment.*pp\.register"):
        sti.io.from_spatialdata(peer.data)
    assert "stimage_sd" not in peer.data.attrs


@pytest.mark.slow
def test_a_xenium_he_without_alignment_is_registered_before_it_is_adopted(bundles: Path) -> None:
    peer = peers.io_xenium(bundles)
    spatialdata.transformations.set_transformation(
        peer.data.images["he_image"], spatialdata.transformations.Identity(), to_coordinate_system="global"
    )
    # pixels of the user's own annotation, before the reader's shapes in micrometers
    shapes = dict(peer.data.shapes)
    for name in shapes:
        del peer.data.shapes[name]
    square = geopandas.GeoDataFrame({"radius": [9.0]}, geometry=[shapely.Point(30, 30)])
    peer.data.shapes["annotation"] = ShapesModel.parse(square)
    for name, frame in shapes.items():
        peer.data.shapes[name] = frame
    registration = sti.pp.register(peer.data)
    assert (registration.moving, registration.fixed) == ("he_image", "morphology_focus")
    section = sti.io.from_spatialdata(peer.data)
    assert contract.mpp(section) == pytest.approx(peers.MPP, rel=0.01)
    units = contract.find_units(section)
    apart = np.linalg.norm(units.positions(section) - peer.pixels.loc[units.names], axis=1) * peers.MPP
    assert np.median(apart) < 2.0  # µm


def test_nuclei_of_spatialdata_io_are_found_by_their_name(bundles: Path) -> None:
    section = sti.io.from_spatialdata(peers.io_xenium(bundles).data)
    with pytest.raises(KeyError, match=r"no column 'cell_type'.*annotate_cells"):
        sti.pl.cells(section)
    names = contract.find_units(section).names
    given = pd.Series(np.where(np.arange(len(names)) % 3, "immune", "stromal"), index=names)
    sti.pp.annotate_cells(section, labels=given)
    nuclei = section.shapes["nucleus_boundaries"]
    assert (nuclei["cell_type"].astype(str) == given.loc[nuclei["cell_id"]].to_numpy()).all()
    shown = sti.pl.cells(section).get_legend().get_texts()
    assert {text.get_text() for text in shown} == {f"{kind} ({n:,})" for kind, n in given.value_counts().items()}
    assert contract.nuclei_name(section) == "nucleus_boundaries"
    assert contract.nuclei_name(section, "cell_boundaries") == "cell_boundaries"


def test_units_off_the_image_are_refused(bundles: Path) -> None:
    peer = peers.io_visium(bundles)
    peer.data.shapes[peer.shapes].geometry = peer.data.shapes[peer.shapes].geometry.translate(5000, 0)
    with pytest.raises(ValueError, match=r"100% of the units 'tissue' lie off the H&E 'tissue_full_image'"):
        sti.io.from_spatialdata(peer.data)


def test_nothing_ambiguous_is_guessed(bundles: Path) -> None:
    peer = peers.io_visium_hd(bundles)
    with pytest.raises(KeyError, match=r"more than one table of counts: .*square_008um.* Choose one with `table=`"):
        sti.io.from_spatialdata(peer.data)
    with pytest.raises(KeyError, match="No table 'counts'"):
        sti.io.from_spatialdata(peer.data, table="counts")
    with pytest.raises(KeyError, match="No coordinate system 'global' of the H&E"):
        sti.io.from_spatialdata(peer.data, table="square_016um", coordinate_system="global")
    with pytest.raises(TypeError, match="Expected a SpatialData object, found AnnData"):
        sti.io.from_spatialdata(sc.AnnData(np.zeros((1, 1))))


# --------------------------------------------------------------------------------------------------
# readers of spatialdata-io


@pytest.mark.slow
def test_read_merscope_with_an_he_beside_it(bundles: Path) -> None:
    import cv2

    peer = peers.io_merscope(bundles)
    he = bundles / "beside.png"
    cv2.imwrite(str(he), peers.painted_image(bundles)[..., ::-1])
    matrix = peers.matrix(peer.data.images["he"], "global")
    section = sti.io.read(
        "merscope", peers.merscope_bundle(bundles) / "region_0", he_image=he, alignment=matrix, sample="m",
        options={"z_layers": 3, "backend": "dask_image"},
    )  # fmt: skip
    units = contract.find_units(section)
    np.testing.assert_allclose(units.positions(section), peer.pixels.loc[units.names], atol=1e-3)
    assert contract.mpp(section) == pytest.approx(peers.MPP, rel=1e-6)
    assert (contract.sample(section), contract.info(section)["platform"]) == ("m", "merscope")


def test_read_names_its_readers() -> None:
    with pytest.raises(ValueError, match=r"No reader of 'visum'. Expected one of .*'merscope'.*'visium'"):
        sti.io.read("visum", "run")
