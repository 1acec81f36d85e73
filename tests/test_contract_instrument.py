"""What an instrument measured: placed on the H&E, found by later steps, and what is refused before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dask.array as da
import dask.dataframe as dd
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
import squidpy as sq
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData
from spatialdata.models import PointsModel, ShapesModel
from spatialdata.transformations import Identity, get_transformation

from stimage_sd import contract, pp
from stimage_sd._squidpy import attach_spatial
from stimage_sd.io._raster import raster_from_array

POSITIONS_UM = np.array([[20.0, 30.0], [60.0, 30.0], [60.0, 80.0], [100.0, 40.0]])
PIXEL_UM = 0.5
#: a quarter turn, three pixels a micrometer, and a shift
TURN = np.array([[0.0, -3.0, 400.0], [3.0, 0.0, 50.0], [0.0, 0.0, 1.0]])


def measured_section(*, image: bool = True, mpp: float | None = 1 / 3) -> SpatialData:
    """Four cells, their transcripts and a DAPI image in micrometers, beside an H&E of 500 px that is not aligned."""
    own = {contract.INSTRUMENT: Identity()}
    cells = gpd.GeoDataFrame(geometry=shapely.buffer(shapely.points(POSITIONS_UM), 5.0))
    points = dd.from_pandas(
        pd.DataFrame({"x": POSITIONS_UM[:, 0], "y": POSITIONS_UM[:, 1], "feature_name": list("abab")}), npartitions=2
    )
    dapi = contract.build_multichannel(
        [da.zeros((1, 400, 400), dtype=np.uint16), da.zeros((1, 200, 200), dtype=np.uint16)],
        channels=["DAPI"],
        pixel_um=PIXEL_UM,
    )
    images = {contract.DAPI: dapi}
    if image:
        images[contract.IMAGE] = contract.build_image(raster_from_array(np.full((500, 500, 3), 200, np.uint8)))
    sdata = SpatialData(
        images=images,
        shapes={contract.CELLS: ShapesModel.parse(cells, transformations=own)},
        points={contract.TRANSCRIPTS: PointsModel.parse(points, transformations=own, feature_key="feature_name")},
    )
    contract.register(sdata, sample="s", platform="xenium", image=contract.IMAGE if image else None, mpp=mpp)
    table = AnnData(
        X=np.arange(8).reshape(4, 2),
        obs=pd.DataFrame(index=[f"cell-{number}" for number in range(4)]),
        var=pd.DataFrame(index=["a", "b"]),
        obsm={contract.SPATIAL_UM: POSITIONS_UM.copy()},
    )
    sdata.tables[contract.COUNTS] = contract.annotate(table, region=contract.CELLS)
    return sdata


def test_a_multichannel_image_lies_in_micrometers() -> None:
    dapi = measured_section().images[contract.DAPI]
    assert list(dapi["scale0"]["image"].coords["c"].to_numpy()) == ["DAPI"]
    for scale, pixel in [("scale0", PIXEL_UM), ("scale1", 2 * PIXEL_UM)]:
        matrix = dapi[scale]["image"].attrs["transform"][contract.INSTRUMENT].to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([pixel, pixel, 1.0]))


@pytest.mark.parametrize("channels", [["DAPI"], ["a", "a"], ["a", "b", "c"]])
def test_channel_names_are_one_a_channel(channels: list[str]) -> None:
    with pytest.raises(ValueError, match="Expected 2 different channel names"):
        contract.build_multichannel([da.zeros((2, 8, 8))], channels=channels, pixel_um=1.0)


def test_before_it_is_placed_nothing_claims_to_lie_on_the_image() -> None:
    sdata = measured_section()
    assert contract.instrument_matrix(sdata) is None
    assert set(contract.instrument_elements(sdata)) == {"cells", "transcripts", "dapi"}
    for element in contract.instrument_elements(sdata).values():
        assert set(get_transformation(element, get_all=True)) == {contract.INSTRUMENT}
    with pytest.raises(ValueError, match=r"not placed on its H&E yet.* Run `stimage_sd.pp.register\(sdata\)`"):
        contract.find_units(sdata).positions(sdata)


def test_placing_moves_every_element_and_table() -> None:
    sdata = measured_section()
    contract.place_instrument(sdata, TURN)
    expected = np.column_stack([400.0 - 3.0 * POSITIONS_UM[:, 1], 50.0 + 3.0 * POSITIONS_UM[:, 0]])
    np.testing.assert_allclose(contract.counts(sdata).obsm["spatial"], expected)
    moved = spatialdata.transform(sdata.shapes[contract.CELLS], to_coordinate_system="global")
    centroids = moved.geometry.centroid
    np.testing.assert_allclose(np.column_stack([centroids.x, centroids.y]), expected, atol=1e-9)
    points = spatialdata.transform(sdata.points[contract.TRANSCRIPTS], to_coordinate_system="global").compute()
    np.testing.assert_allclose(points[["x", "y"]].to_numpy(), expected)
    dapi = get_transformation(sdata.images[contract.DAPI], "global").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(dapi, TURN @ np.diag([PIXEL_UM, PIXEL_UM, 1.0]))
    microns = get_transformation(sdata.shapes[contract.CELLS], "microns").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(microns, np.diag([1 / 3, 1 / 3, 1.0]) @ TURN)
    np.testing.assert_allclose(contract.instrument_matrix(sdata), TURN)


def test_a_resolution_that_was_unknown_follows_from_the_scale() -> None:
    sdata = measured_section(mpp=None)
    contract.place_instrument(sdata, TURN)
    assert contract.info(sdata)["mpp"] == pytest.approx(1 / 3)
    microns = get_transformation(sdata.images[contract.IMAGE], "microns").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(microns, np.diag([1 / 3, 1 / 3, 1.0]))


@given(
    first=st.tuples(st.floats(-3, 3), st.floats(0.3, 3), st.floats(-500, 500)),
    second=st.tuples(st.floats(-3, 3), st.floats(0.3, 3), st.floats(-500, 500)),
)
def test_placing_again_replaces(first: tuple[float, float, float], second: tuple[float, float, float]) -> None:
    def similarity(angle: float, scale: float, shift: float) -> np.ndarray:
        cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
        return np.array([[cosine, -sine, shift], [sine, cosine, -shift], [0.0, 0.0, 1.0]])

    sdata = measured_section()
    contract.place_instrument(sdata, similarity(*first))
    contract.place_instrument(sdata, similarity(*second))
    np.testing.assert_allclose(contract.instrument_matrix(sdata), similarity(*second), atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(2), "finite affine matrix"),
        (np.full((3, 3), np.nan), "finite affine matrix"),
        (np.array([[1.0, 0, 0], [0, 1, 0], [0.1, 0, 1]]), "last row is 0, 0, 1"),
        (np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]), "a singular one"),
    ],
)
def test_what_is_no_placement_is_refused_and_changes_nothing(matrix: np.ndarray, message: str) -> None:
    sdata = measured_section()
    with pytest.raises(ValueError, match=message):
        contract.place_instrument(sdata, matrix)
    assert contract.instrument_matrix(sdata) is None
    assert "spatial" not in sdata.tables[contract.COUNTS].obsm


def test_a_section_without_anything_to_place_says_so(make_slide: Callable[..., SpatialData]) -> None:
    with pytest.raises(KeyError, match="no element with the coordinate system 'instrument'"):
        contract.place_instrument(make_slide(np.zeros((8, 8, 3), np.uint8)), np.eye(3))


def test_a_section_without_an_h_and_e_has_no_image_name() -> None:
    sdata = measured_section(image=False, mpp=PIXEL_UM)
    contract.place_instrument(sdata, np.diag([2.0, 2.0, 1.0]))
    assert contract.info(sdata)["image"] is None
    with pytest.raises(KeyError, match=r"Found no RGB image among \['dapi'\]"):
        contract.image_name(sdata)
    attach_spatial(sdata)
    assert "spatial" not in contract.counts(sdata).uns


def test_three_channels_of_fluorescence_are_no_colors() -> None:
    three = contract.build_multichannel(
        [da.zeros((3, 64, 64), dtype=np.uint8)], channels=["DAPI", "CD3", "CD20"], pixel_um=0.5
    )
    sdata = SpatialData(images={contract.MULTIPLEX: three})
    contract.register(sdata, sample="s", platform="codex", image=None, mpp=0.5)
    with pytest.raises(KeyError, match="no RGB image"):
        contract.image_name(sdata)


def test_squidpy_draws_the_cells_where_they_were_placed() -> None:
    sdata = measured_section()
    contract.place_instrument(sdata, TURN)
    attach_spatial(sdata)
    factors = contract.counts(sdata).uns["spatial"]["s"]["scalefactors"]
    # circles of 5 µm radius, as polygons of a few corners, at three pixels a micrometer
    assert factors["spot_diameter_fullres"] == pytest.approx(30.0, rel=0.02)
    sq.pl.spatial_scatter(contract.counts(sdata), color="a", library_id="s")


def test_everything_survives_the_disk(tmp_path: Path) -> None:
    sdata = measured_section()
    contract.place_instrument(sdata, TURN)
    attach_spatial(sdata)
    sdata.write(tmp_path / "s.zarr")
    again = spatialdata.read_zarr(tmp_path / "s.zarr")
    np.testing.assert_allclose(contract.instrument_matrix(again), TURN)
    np.testing.assert_allclose(contract.counts(again).obsm["spatial"], contract.counts(sdata).obsm["spatial"])
    assert list(again.images[contract.DAPI]["scale0"]["image"].coords["c"].to_numpy()) == ["DAPI"]
    contract.place_instrument(again, np.eye(3))
    np.testing.assert_allclose(contract.counts(again).obsm["spatial"], POSITIONS_UM)


# --------------------------------------------------------------------------------------------------
# which table later steps take


def test_the_table_made_last_is_taken_and_a_key_overrules_it(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=4)
    other = contract.counts(sdata).copy()
    sdata.tables[contract.SPOT_COUNTS] = other
    assert contract.counts_name(sdata) == contract.COUNTS
    contract.activate(sdata, "counts", contract.SPOT_COUNTS)
    assert contract.counts_name(sdata) == contract.SPOT_COUNTS
    assert contract.counts_name(sdata, contract.COUNTS) == contract.COUNTS
    del sdata.tables[contract.SPOT_COUNTS]
    assert contract.counts_name(sdata) == contract.COUNTS


def test_proteins_are_no_counts(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=4)
    table = contract.counts(sdata).copy()
    del sdata.tables[contract.COUNTS]
    assert not contract.has_units(sdata)
    # compensated intensities may be negative and are no integers
    table.X = table.X.toarray().astype(np.float32) * 0.3 - 0.1
    sdata.tables[contract.PROTEINS] = table
    assert contract.has_units(sdata)
    assert not contract.has_counts(sdata)
    assert contract.measured(sdata) is contract.proteins(sdata)
    assert contract.units_name(sdata) == contract.SPOTS
    with pytest.raises(KeyError, match="no table of counts"):
        contract.counts(sdata)


@pytest.mark.parametrize("name", [contract.CELLS, contract.BINS, contract.NUCLEI])
def test_cells_and_bins_are_tiled_by_a_grid_unless_asked_otherwise(name: str, make_spots: Callable) -> None:
    sdata = make_spots(n_side=6, tiled=False)
    table = contract.counts(sdata).copy()
    sdata.shapes[name] = sdata.shapes.pop(contract.SPOTS)
    del sdata.tables[contract.COUNTS]
    sdata.tables[contract.COUNTS] = contract.annotate(table, region=name)
    assert not contract.stands_on_spots(sdata)
    pp.tile(sdata, size_um=50.0)
    assert contract.tiling(sdata)["layout"] == "grid"
    pp.tile(sdata, size_um=50.0, layout="spots")
    assert list(contract.tiles(sdata).obs["spot_id"]) == list(table.obs_names)
