"""Objects that look right and are not: refused, or read as they are, and never guessed."""

from __future__ import annotations

import geopandas
import numpy as np
import pandas as pd
import peers
import pytest
import scipy.sparse as sp
import shapely
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, BaseTransformation, Identity, MapAxis, Scale, set_transformation

import stimage_sd as sti
from stimage_sd import contract

PLACES = np.array([[x, y] for y in (60.0, 160.0) for x in (50.0, 150.0, 250.0)])


def image(dtype: str = "uint8", channels: list[str] | None = None) -> object:
    pixels = np.full((3, 200, 300), 200, dtype)
    names = ["r", "g", "b"] if channels is None else channels
    return Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=names, transformations={"global": Identity()})


def points(places: np.ndarray = PLACES, index: list | None = None) -> geopandas.GeoDataFrame:
    frame = geopandas.GeoDataFrame({"radius": np.full(len(places), 10.0)}, geometry=shapely.points(places), index=index)
    return ShapesModel.parse(frame, transformations={"global": Identity()})


def table(region: str, ids: list) -> AnnData:
    counts = sp.csr_matrix(np.arange(4 * len(ids)).reshape(len(ids), 4) % 7)
    obs = pd.DataFrame({"region": pd.Categorical([region] * len(ids)), "instance": ids})
    obs.index = [f"u{number}" for number in range(len(ids))]
    return TableModel.parse(AnnData(counts, obs=obs), region=region, region_key="region", instance_key="instance")


def with_table(own: AnnData, name: str = "table", **shapes: geopandas.GeoDataFrame) -> SpatialData:
    return SpatialData(images={"he": image()}, shapes=shapes or {"spots": points()}, tables={name: own})


def test_shapes_are_not_found_by_whole_numbers_alone() -> None:
    """The annotated element is gone, and another has the same numbers."""
    data = SpatialData(
        images={"he": image()}, shapes={"spots_b": points()}, tables={"table": table("spots_a", [*range(6)])}
    )
    with pytest.raises(KeyError, match="Found no shapes with the units of table 'table'"):
        sti.io.from_spatialdata(data)


@pytest.mark.parametrize("bin_um", [8, 16])
def test_bins_that_are_labels_lie_where_their_squares_do(bin_um: int, bundles) -> None:
    peer = peers.io_visium_hd(bundles, labels=True, bin_um=bin_um)
    section = sti.io.from_spatialdata(peer.data, table=f"square_{bin_um:03d}um")
    units = contract.find_units(section)
    np.testing.assert_allclose(units.positions(section), peer.pixels.loc[units.names], atol=1e-3)
    assert len(units.names) == len(peer.pixels)


def test_units_that_labels_do_not_have_are_refused() -> None:
    painted = np.zeros((200, 300), np.uint16)
    for number, (x, y) in enumerate(PLACES.astype(int)):
        painted[y - 5 : y + 5, x - 5 : x + 5] = number + 1
    labels = Labels2DModel.parse(painted, dims=("y", "x"), transformations={"global": Identity()})
    data = SpatialData(
        images={"he": image()}, labels={"cells": labels}, tables={"table": table("cells", [*range(1, 7)])}
    )
    section = sti.io.from_spatialdata(data)
    np.testing.assert_allclose(contract.find_units(section).positions(section), PLACES)
    data.tables["table"] = table("cells", [*range(1, 9)])
    with pytest.raises(ValueError, match=r"2 of 8 units of table 'table' are not in 'cells', such as 7"):
        sti.io.from_spatialdata(data)


def test_an_empty_shape_moves_no_other() -> None:
    places = [shapely.Point(PLACES[0]), shapely.Point(), *map(shapely.Point, PLACES[1:])]
    frame = geopandas.GeoDataFrame({"radius": np.full(7, 10.0)}, geometry=places)
    spots = ShapesModel.parse(frame, transformations={"global": Identity()})
    data = with_table(table("spots", [0, 2, 3, 4, 5, 6]), spots=spots)
    np.testing.assert_allclose(contract.find_units(data).positions(data), PLACES)


def test_ids_of_another_type_are_refused() -> None:
    data = SpatialData(
        images={"he": image()},
        shapes={"spots": points(index=[*"abcdef"])},
        tables={"table": table("spots", [*range(6)])},
    )
    with pytest.raises(ValueError, match="None of the 6 rows of table 'table' has an id of the shapes 'spots'"):
        sti.io.from_spatialdata(data)


def test_the_resolution_is_that_of_the_pixels_not_of_their_place() -> None:
    section = sti.io.from_spatialdata(
        SpatialData(images={"he": image()}, shapes={"spots": points()}), shapes="spots", mpp=0.5
    )
    set_transformation(section.images["he"], Scale([2, 2], axes=("x", "y")), "global")
    assert contract.mpp(section) == 0.5


def test_an_image_that_is_left_has_its_own_resolution(bundles) -> None:
    """A query in the small image's coordinate system drops the full one."""
    section = sti.io.from_spatialdata(peers.io_visium(bundles).data)
    whole = contract.mpp(section, "tissue_hires_image")
    left = section.filter_by_coordinate_system("tissue_downscaled_hires")
    assert "tissue_full_image" not in left.images
    assert contract.mpp(sti.io.from_spatialdata(left)) == pytest.approx(whole)


def test_an_he_that_is_added_later_has_its_own_resolution(bundles) -> None:
    peer = peers.io_xenium(bundles)
    he = peer.data.images.pop("he_image")
    section = sti.io.from_spatialdata(peer.data)
    section.images["he_image"] = he
    sti.pp.tile(section, size_um=50, layout="grid", min_tissue=0.0)
    assert contract.tiling(section)["side_px"] == pytest.approx(50 / peers.MPP, rel=1e-6)


def test_a_resolution_that_contradicts_the_array_is_told(bundles) -> None:
    peer = peers.io_visium(bundles)
    with pytest.warns(UserWarning, match=r"0.25 micrometers per pixel as given; by its array.* 0.5"):
        assert contract.mpp(sti.io.from_spatialdata(peer.data, mpp=0.25)) == 0.25
    set_transformation(peer.data.images[peer.image], Scale([264, 264], axes=("x", "y")), "microns")
    peer.data.attrs = {}
    with pytest.raises(ValueError, match="264 micrometers per pixel of its H&E, which no microscope has"):
        sti.io.from_spatialdata(peer.data)


def test_tables_of_other_tools_are_not_overwritten() -> None:
    data = SpatialData(
        images={"he": image()}, shapes={"spots": points()}, tables={"tiles": table("spots", [*range(6)])}
    )
    assert contract.counts_name(data) == "tiles"
    contract.write_tissue(data, np.ones((20, 30), bool), downsample=(10.0, 10.0))
    with pytest.raises(ValueError, match="a table 'tiles' already, from other software"):
        sti.pp.tile(data, min_tissue=0.0)
    assert data.tables["tiles"].n_vars == 4


@pytest.mark.parametrize(
    "transformation",
    [
        MapAxis({"x": "z", "y": "y"}),
        Affine(
            np.array([[1.0, 0, 0.2, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
            input_axes=("x", "y", "z"),
            output_axes=("x", "y", "z"),
        ),
    ],
    ids=["x-is-z", "x-leans-on-z"],
)
def test_a_section_that_leans_on_depth_is_refused(transformation: BaseTransformation) -> None:
    """Where x and y depend on z, no matrix of x and y places the units."""
    data = with_table(table("spots", [*range(6)]))
    set_transformation(data["spots"], transformation, "global")
    with pytest.raises(ValueError, match=r"Expected an affine transformation of x and y for 'spots'.*rasterize"):
        sti.io.from_spatialdata(data)


def test_three_stains_are_no_he() -> None:
    data = SpatialData(images={"stains": image(channels=["DAPI", "CD3", "CK"])}, shapes={"spots": points()})
    with pytest.raises(KeyError, match="Found no RGB image"):
        contract.image_name(data)


def test_an_he_of_sixteen_bit_is_refused() -> None:
    data = SpatialData(images={"he": image("uint16")}, shapes={"spots": points()})
    with pytest.raises(ValueError, match="'he' has colors of uint16 in 3 channels; an H&E is 8-bit RGB"):
        sti.io.from_spatialdata(data)


def test_what_was_said_before_holds() -> None:
    data = SpatialData(
        images={"he": image()}, shapes={"spots": points()}, tables={"table": table("spots", [*range(6)])}
    )
    counts = data.tables["table"]
    counts.layers["spliced"] = 2 * counts.X
    section = sti.io.from_spatialdata(data, layer="spliced")
    assert contract.counts(sti.io.from_spatialdata(section, mpp=0.5)).X.sum() == 2 * counts.X.sum()
