"""Tiles: where they lie, how much tissue they hold, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely
import spatialdata
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData

from stimage_sd import contract, pp
from stimage_sd.pp._tile import tissue_fraction

PINK = np.array([200, 120, 180], np.uint8)


def half_pink(height: int = 400, width: int = 600) -> np.ndarray:
    image = np.full((height, width, 3), 255, np.uint8)
    image[:, width // 2 :] = PINK
    return image


# --------------------------------------------------------------------------------------------------
# the share of tissue


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    downsample=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    side=st.integers(1, 60),
    center=st.tuples(st.integers(-80, 160), st.integers(-80, 160)),
    seed=st.integers(0, 99),
)
def test_tissue_fraction_is_the_count_of_pixels(
    shape: tuple, downsample: tuple, side: int, center: tuple, seed: int
) -> None:
    """Where a tile's edges fall on whole pixels, the share can be counted pixel by pixel."""
    mask = np.random.default_rng(seed).random(shape) > 0.4
    whole = np.kron(mask, np.ones(downsample, bool))
    left, top = center
    rows, columns = np.arange(top, top + side), np.arange(left, left + side)
    inside_rows = rows[(rows >= 0) & (rows < whole.shape[0])]
    inside_columns = columns[(columns >= 0) & (columns < whole.shape[1])]
    expected = whole[np.ix_(inside_rows, inside_columns)].sum() / side**2
    middle = np.array([[left + side / 2, top + side / 2]])
    found = tissue_fraction(mask, tuple(map(float, downsample)), middle, side=float(side))
    np.testing.assert_allclose(found, [expected], atol=1e-9)


@given(x=st.floats(-5, 25), y=st.floats(-5, 25), side=st.floats(0.3, 12))
def test_tissue_fraction_of_boxes_that_cut_pixels(x: float, y: float, side: float) -> None:
    """Against the overlap of intervals: tissue is the rectangle x 4 to 16, y 6 to 10."""
    mask = np.zeros((10, 10), bool)
    mask[3:5, 2:8] = True
    wide = max(0.0, min(x + side / 2, 16) - max(x - side / 2, 4))
    high = max(0.0, min(y + side / 2, 10) - max(y - side / 2, 6))
    found = tissue_fraction(mask, (2.0, 2.0), np.array([[x, y]]), side=side)
    np.testing.assert_allclose(found, [wide * high / side**2], atol=1e-7)


# --------------------------------------------------------------------------------------------------
# around spots


def test_a_tile_a_spot_of_its_diameter(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5, tiled=False)
    pp.tile(sdata)
    tiles, counts = contract.tiles(sdata), contract.counts(sdata)
    assert list(tiles.obs["spot_id"]) == list(counts.obs_names)
    np.testing.assert_allclose(tiles.obsm["spatial"], counts.obsm["spatial"])
    np.testing.assert_allclose(tiles.obs[["x", "y"]], counts.obsm["spatial"])
    assert contract.tiling(sdata) == {"layout": "spots", "side_px": 20.0, "target_px": 299, "size_um": 50.0}
    bounds = sdata.shapes["tile_squares"].bounds
    np.testing.assert_allclose(bounds["maxx"] - bounds["minx"], 20.0)
    np.testing.assert_allclose((bounds["maxx"] + bounds["minx"]) / 2, counts.obsm["spatial"][:, 0])
    assert tiles.n_vars == 0
    assert sorted(tiles.obs["instance_id"]) == list(sdata.shapes["tile_squares"].index)


def test_size_in_micrometers(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5, mpp=2.5)
    pp.tile(sdata, size_um=100.0, target_px=224)
    assert contract.tiling(sdata) == {"layout": "spots", "side_px": 40.0, "target_px": 224, "size_um": 100.0}
    np.testing.assert_allclose(sdata.shapes["tile_squares"].area, 1600.0)
    extent = spatialdata.get_extent(sdata.shapes["tile_squares"].iloc[:1], coordinate_system="microns")
    assert extent["x"][1] - extent["x"][0] == pytest.approx(100.0)


def test_spots_without_resolution_need_no_micrometers(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5, mpp=None)
    assert "size_um" not in contract.tiling(sdata)
    with pytest.raises(ValueError, match=r"no known resolution, which `size_um=` needs"):
        pp.tile(sdata, size_um=55.0)
    assert contract.tiling(sdata)["side_px"] == 20.0  # as it was


def test_tiles_off_tissue_are_marked_and_kept(make_slide: Callable, make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=6, tiled=False)
    sdata.images["he"] = make_slide(half_pink(320, 320)).images["he"]
    pp.tile(sdata)
    tiles = contract.tiles(sdata)
    assert tiles.n_obs == 36
    # the border between glass and tissue is at x = 160, where the fourth column of spots stands
    fraction = tiles.obs["tissue_fraction"].to_numpy().reshape(6, 6)
    np.testing.assert_allclose(fraction[:, :3], 0)
    np.testing.assert_allclose(fraction[:, 3], 0.5, atol=0.1)
    np.testing.assert_allclose(fraction[:, 4:], 1)
    np.testing.assert_array_equal(tiles.obs["keep"].to_numpy().reshape(6, 6).sum(axis=0), [0, 0, 0, 0, 6, 6])
    pp.tile(sdata, min_tissue=0.3)
    assert contract.tiles(sdata).obs["keep"].sum() == 18


def test_spots_outside_the_image_get_no_tile_and_are_counted(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5)
    before = contract.tiles(sdata).copy()
    spots = sdata.shapes["spots"]
    for place in (shapely.Point(5000.0, 20.0), shapely.Point(np.nan, 20.0)):
        spots.loc[7, "geometry"] = place
        with pytest.warns(
            UserWarning, match=r"1 of 25 spots of section 'made' lie outside its image .* as 'spot-7' at"
        ):
            pp.tile(sdata)
        kept = before.obs["spot_id"] != "spot-7"
        np.testing.assert_array_equal(contract.tiles(sdata).obsm["spatial"], before[kept].obsm["spatial"])
        assert contract.tiles(sdata).obs["spot_id"].tolist() == before[kept].obs["spot_id"].tolist()
    spots["geometry"] = [shapely.Point(5000.0, 20.0)] * 13 + list(spots.geometry[13:])
    with pytest.raises(ValueError, match=r"13 of 25 spots lie outside the image of 280 x 280 px, such as 'spot-0' at "):
        pp.tile(sdata)


def test_cells_without_a_diameter_need_a_size(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5, tiled=False)
    outlines = gpd.GeoDataFrame(geometry=sdata.shapes["spots"].buffer(8).to_numpy())
    sdata.shapes["spots"] = contract.build_shapes(outlines, mpp=2.5)
    with pytest.raises(ValueError, match=r"no circles, so they have no diameter. Pass `size_um=`"):
        pp.tile(sdata)
    pp.tile(sdata, size_um=50.0)
    assert contract.tiling(sdata)["side_px"] == 20.0


# --------------------------------------------------------------------------------------------------
# a grid


def test_a_grid_covers_the_tissue_and_nothing_else(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(half_pink(), mpp=0.5)
    pp.tile(sdata, size_um=25.0)
    tiles = contract.tiles(sdata)
    assert contract.tiling(sdata)["layout"] == "grid"
    assert "spot_id" not in tiles.obs
    assert tiles.n_obs == 8 * 6
    assert tiles.obs["x"].min() == 325.0
    assert (np.diff(np.sort(tiles.obs["x"].unique())) == 50.0).all()
    assert tiles.obs["keep"].all()


def test_a_grid_with_a_stride_overlaps_and_stays_on_the_image(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.broadcast_to(PINK, (210, 330, 3)).copy(), mpp=1.0)
    pp.tile(sdata, size_um=100.0, stride_um=50.0)
    bounds = sdata.shapes["tile_squares"].total_bounds
    assert bounds[0] >= 0
    assert bounds[1] >= 0
    assert bounds[2] <= 330
    assert bounds[3] <= 210
    # what is left over is shared by both borders
    assert bounds[0] == pytest.approx(330 - bounds[2])
    assert contract.tiles(sdata).n_obs == 5 * 3


def test_a_grid_may_be_laid_over_a_section_with_spots(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5)
    pp.tile(sdata, layout="grid", size_um=50.0)
    assert "spot_id" not in contract.tiles(sdata).obs
    assert contract.tiles(sdata).n_obs == 14 * 14


def test_refused_grids(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(half_pink(), mpp=0.5, sample="s")
    for error, match, arguments in [
        (ValueError, "has no spots to take the tiles' size from. Pass `size_um=`", {}),
        (KeyError, "no table of counts", {"layout": "spots", "size_um": 25.0}),
        (ValueError, '"spots" or "grid", found \'hexagon\'', {"layout": "hexagon", "size_um": 25.0}),
        (ValueError, "smaller than the image of 600 x 400 px, found a side of 2000 px", {"size_um": 1000.0}),
        (ValueError, "positive size, found -50.0 px", {"size_um": -25.0}),
        (ValueError, "positive size, found 0.0 px", {"size_um": 0.0}),
        (ValueError, "`stride_um` .* positive, found 0", {"size_um": 25.0, "stride_um": 0.0}),
        (ValueError, "`stride_um` .* positive, found -1", {"size_um": 25.0, "stride_um": -1.0}),
        (ValueError, "`target_px` .* at least 1, found 0", {"size_um": 25.0, "target_px": 0}),
        (ValueError, r"No tile of section 's' has 101% tissue \(most: 100%\)", {"size_um": 25.0, "min_tissue": 1.01}),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            pp.tile(sdata, **arguments)
        assert not sdata.tables
        assert not sdata.shapes


def test_no_tissue_at_all(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.full((300, 300, 3), 250, np.uint8), mpp=0.5)
    with pytest.raises(ValueError, match="no tissue"):
        pp.tile(sdata, size_um=25.0)
    assert not sdata.tables


def test_no_pixel_of_the_full_resolution_is_read(counted_image: Callable, make_slide: Callable) -> None:
    image = counted_image(0, 0, image=half_pink(1600, 2000), n_levels=2)
    sdata = make_slide(image.levels, mpp=0.5)
    pp.tile(sdata, size_um=50.0)
    assert image.full_reads() == 0


def test_tiling_again_replaces_and_survives_the_disk(make_spots: Callable[..., SpatialData], tmp_path: Path) -> None:
    sdata = make_spots(n_side=5)
    contract.tiles(sdata).obsm["X_toy"] = np.zeros((25, 2))
    pp.tile(sdata, size_um=75.0)
    assert "X_toy" not in contract.tiles(sdata).obsm  # embeddings of other tiles
    sdata.write(tmp_path / "s.zarr")
    back = spatialdata.read_zarr(tmp_path / "s.zarr")
    assert contract.tiling(back) == contract.tiling(sdata)
    pp.tile(back)
    assert contract.tiling(back)["side_px"] == 20.0
