"""The section contract: what a section is, what is found in it, what is refused, what survives the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
import spatialdata
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, get_transformation

from stimage_sd import contract, pp

# --------------------------------------------------------------------------------------------------
# what belongs to the section


def test_register_writes_what_belongs_to_the_section(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.full((60, 80, 3), 200, np.uint8), mpp=0.5, sample="s1")
    assert sdata.attrs["stimage_sd"] == {
        "sample": "s1",
        "platform": "slide",
        "image": "he",
        "mpp": 0.5,
        "history": [],
        "image_px": {"he": [60, 80]},
        "image_scale": {"he": {"global": 1.0}},
    }
    assert contract.sample(sdata) == "s1"
    assert contract.require_mpp(sdata, purpose="a test") == 0.5


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_register_refuses_an_impossible_resolution(make_slide: Callable[..., SpatialData], mpp: float) -> None:
    with pytest.raises(ValueError, match="positive number of micrometers per pixel"):
        make_slide(np.zeros((8, 8, 3), np.uint8), mpp=mpp)


def test_register_refuses_an_image_that_is_not_there() -> None:
    sdata = SpatialData(images={"he": contract.build_image([da.zeros((3, 8, 8), dtype=np.uint8)])})
    with pytest.raises(ValueError, match=r"image named 'HE', found \['he'\]"):
        contract.register(sdata, sample="s", platform="slide", image="HE", mpp=None)
    assert "stimage_sd" not in sdata.attrs


@pytest.mark.parametrize("sample", ["", "patient/section"])
def test_register_refuses_a_sample_id_no_store_can_hold(make_slide: Callable[..., SpatialData], sample: str) -> None:
    with pytest.raises(ValueError, match="sample id without a slash"):
        make_slide(np.zeros((8, 8, 3), np.uint8), sample=sample)


def test_unknown_resolution_is_an_error_and_no_guess(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"no known resolution, which `size_um=` needs. Pass `mpp=`"):
        contract.require_mpp(sdata, purpose="`size_um=`")
    assert "microns" not in get_transformation(sdata.images["he"], get_all=True)


def test_record_keeps_steps_in_order_as_plain_values(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.zeros((8, 8, 3), np.uint8))
    contract.record(sdata, "first", path=Path("a/b"), number=np.float32(0.5), array=np.arange(3), none=None)
    contract.record(sdata, "second", nested={1: (1, np.int64(2))}, flag=np.True_, names={"x"})
    first, second = contract.info(sdata)["history"]
    assert first["step"] == "first"
    assert first["parameters"] == {"path": "a/b", "number": 0.5, "array": [0, 1, 2], "none": None}
    assert second["parameters"] == {"nested": {"1": [1, 2]}, "flag": True, "names": ["x"]}
    assert json.loads(json.dumps(first)) == first


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.just(np.float64(0.25)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_plain_values_survive_json(value: object) -> None:
    plain = contract.plain(value)
    assert json.loads(json.dumps(plain)) == plain
    assert contract.plain(plain) == plain


def test_sections_takes_a_section_or_a_cohort(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.zeros((8, 8, 3), np.uint8), sample="one")
    assert contract.sections(sdata) == {"one": sdata}
    assert contract.sections({"named": sdata}) == {"named": sdata}
    with pytest.raises(ValueError, match="empty cohort"):
        contract.sections({})
    with pytest.raises(TypeError, match="SpatialData section or a dict of them, found str"):
        contract.sections("path.zarr")
    with pytest.raises(TypeError, match=r"SpatialData under 'x' of the cohort, found AnnData. .*from_anndata"):
        contract.sections({"x": ad.AnnData(np.zeros((1, 1)))})
    with pytest.raises(TypeError, match="found AnnData"):
        contract.info(ad.AnnData(np.zeros((1, 1))))


# --------------------------------------------------------------------------------------------------
# images


def test_build_image_places_every_level_on_the_finest() -> None:
    levels = [da.zeros((3, *shape), dtype=np.uint8) for shape in ((101, 207), (51, 104), (26, 52))]
    element = contract.build_image(levels, mpp=0.25)
    sdata = SpatialData(images={"he": element})
    assert [array.shape for array in contract.levels(sdata, "he")] == [level.shape for level in levels]
    for number, level in enumerate(levels):
        node = element[f"scale{number}"]["image"]
        # the far corner of every level lies on the far corner of the finest
        corner = np.array([level.shape[1], level.shape[2], 1.0])
        to_global = get_transformation(node, "global").to_affine_matrix(("y", "x"), ("y", "x"))
        np.testing.assert_allclose((to_global @ corner)[:2], [101, 207])
        # the coordinates say the same as the transformation
        half = (np.asarray(node["y"])[0], np.asarray(node["x"])[0])
        np.testing.assert_allclose(half, (0.5 * 101 / level.shape[1], 0.5 * 207 / level.shape[2]))
    to_microns = get_transformation(element, "microns").to_affine_matrix(("y", "x"), ("y", "x"))
    np.testing.assert_allclose(to_microns, np.diag([0.25, 0.25, 1]))
    assert list(element["scale0"]["image"]["c"].values) == ["r", "g", "b"]


def test_microns_of_coarse_levels_count_full_resolution_pixels() -> None:
    element = contract.build_image([da.zeros((3, 64, 32), dtype="u1"), da.zeros((3, 32, 16), dtype="u1")], mpp=0.5)
    sdata = SpatialData(images={"he": element})
    extent = spatialdata.get_extent(sdata, coordinate_system="microns")
    assert (extent["x"], extent["y"]) == ((0, 16), (0, 32))


def test_derived_image_lies_where_its_source_lies(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.full((40, 60, 3), 9, np.uint8), mpp=2.0)
    derived = contract.derive_image(sdata, "he", [level.data for level in contract.levels(sdata, "he")])
    for system in ("global", "microns"):
        ours, theirs = (
            get_transformation(element, system).to_affine_matrix(("y", "x"), ("y", "x"))
            for element in (derived, sdata.images["he"])
        )
        np.testing.assert_allclose(ours, theirs)


def test_thumbnail_reads_no_full_resolution(counted_image: Callable[..., object], make_slide: Callable) -> None:
    image = counted_image(800, 1200, n_levels=4, chunk=128)
    sdata = make_slide(image.levels)
    small, downsample = contract.thumbnail(sdata, "he", max_side=400)
    assert small.shape == (200, 300, 3)
    assert downsample == 4.0
    np.testing.assert_array_equal(small, np.moveaxis(image.arrays[2], 0, -1))
    assert {level for level, _, _ in image.reads} == {2}


def test_thumbnail_of_an_image_without_levels_is_strided(make_slide: Callable[..., SpatialData]) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (500, 999, 3), dtype=np.uint8)
    sdata = make_slide(whole)
    small, downsample = contract.thumbnail(sdata, "he", max_side=100)
    assert max(small.shape) <= 100
    np.testing.assert_array_equal(small, whole[::10, ::10])
    assert downsample == pytest.approx(9.99)


def test_a_single_scale_image_is_a_pyramid_of_one_level() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 40), dtype=np.uint8)
    sdata = SpatialData(images={"picture": Image2DModel.parse(pixels, dims=("c", "y", "x"))})
    (level,) = contract.levels(sdata, "picture")
    assert isinstance(level.data, da.Array)
    np.testing.assert_array_equal(level, pixels)


def test_levels_that_shrink_x_and_y_differently_are_left_out() -> None:
    """One factor places a level's pixels: those of a pyramid with oblong pixels would be placed wrongly."""
    shapes = [(400, 600), (200, 600), (200, 300), (1, 2)]
    element = contract.build_image([da.zeros((3, *shape), dtype=np.uint8) for shape in shapes])
    found = contract.levels(SpatialData(images={"he": element}), "he")
    assert [level.shape[1:] for level in found] == [(400, 600), (200, 300)]


def test_a_crop_of_a_pyramid_down_to_one_column_is_tiled(make_slide: Callable[..., SpatialData]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 640, 3), dtype=np.uint8)
    pyramid = [da.from_array(np.moveaxis(pixels[::step, ::step], -1, 0).copy()) for step in (1, 2, 4, 8, 16, 32)]
    whole = make_slide(pyramid)
    part = spatialdata.bounding_box_query(
        whole, axes=("x", "y"), min_coordinate=[100, 0], max_coordinate=[140, 64], target_coordinate_system="global"
    )
    assert min(part["he"]["scale5"]["image"].shape) == 1
    assert [level.sizes["x"] for level in contract.levels(part, "he")] == [40, 20, 10, 6, 3]


@pytest.mark.parametrize(("shape", "dtype"), [((1, 9, 9), "u1"), ((3, 9, 9), "u2"), ((4, 9, 9), "u1")])
def test_what_is_no_8_bit_rgb_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    image = Image2DModel.parse(np.ones(shape, dtype), dims=("c", "y", "x"))
    sdata = SpatialData(images={"gray": image, "he": contract.build_image([da.ones((3, 9, 9), dtype="u1")])})
    with pytest.raises(ValueError, match=rf"8-bit RGB .* found {shape[0]} channel\(s\) of uint"):
        contract.check_rgb(sdata, "gray")
    with pytest.raises(ValueError, match=r"8-bit RGB .*`image_key=`"):
        pp.tissue_mask(sdata, image_key="gray")
    assert not sdata.labels


def test_working_image_is_the_normalized_one_where_there_is_one(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.full((40, 60, 3), 9, np.uint8))
    assert contract.working_image_name(sdata) == "he"
    sdata.images["better"] = contract.build_image([da.ones((3, 40, 60), dtype="u1")])
    contract.remember(sdata, normalized_image="better")
    assert contract.working_image_name(sdata) == "better"
    assert contract.working_image_name(sdata, "he") == "he"
    assert contract.image_name(sdata) == "he"
    with pytest.raises(KeyError, match=r"No image 'other' .* its images: \['better', 'he'\]"):
        contract.working_image_name(sdata, "other")


# --------------------------------------------------------------------------------------------------
# counts


def spots_and_counts(values: object, *, spatial: bool = True, region: str = "spots") -> tuple[gpd.GeoDataFrame, object]:
    n_spots = values.shape[0]
    points = np.stack([np.arange(n_spots), np.arange(n_spots)], axis=1) * 10.0 + 10
    shapes = ShapesModel.parse(gpd.GeoDataFrame({"radius": np.full(n_spots, 4.0)}, geometry=shapely.points(points)))
    table = ad.AnnData(X=values, obs=pd.DataFrame(index=[f"b{number}" for number in range(n_spots)]))
    if spatial:
        table.obsm["spatial"] = points
    return shapes, contract.annotate(table, region=region)


def foreign(tables: dict[str, object], shapes: dict[str, gpd.GeoDataFrame]) -> SpatialData:
    image = contract.build_image([da.full((3, 100, 100), 200, dtype="u1")])
    return SpatialData(images={"tissue_image": image}, tables=tables, shapes=shapes)


@pytest.mark.parametrize("make", [np.asarray, sp.csr_matrix, sp.csc_matrix], ids=["dense", "csr", "csc"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, -2.0], [0.0, 3.0]], r"negative values \(lowest -2.0\)"),
        ([[1.0, 2.5], [0.0, 3.0]], r"raw counts in table 'counts' .* found .*2\.5.* before normalization"),
        ([[1.0, np.nan], [0.0, 3.0]], "not finite numbers"),
        ([[1.0, np.inf], [0.0, 3.0]], "not finite numbers"),
    ],
    ids=["negative", "fraction", "nan", "inf"],
)
def test_what_is_no_count_is_refused(make: Callable, values: list, message: str) -> None:
    shapes, table = spots_and_counts(make(np.array(values)))
    sdata = foreign({"counts": table}, {"spots": shapes})
    with pytest.raises(ValueError, match=message):
        contract.counts(sdata)


@pytest.mark.parametrize("dtype", ["int32", "uint16", "float32", "float64"])
def test_counts_of_any_number_type_are_taken(dtype: str) -> None:
    shapes, table = spots_and_counts(sp.csr_matrix(np.array([[0, 1], [70, 3]], dtype)))
    assert contract.counts(foreign({"counts": table}, {"spots": shapes})).n_obs == 2


def test_positions_are_those_of_the_shapes_whatever_the_table_says() -> None:
    shapes, table = spots_and_counts(np.ones((3, 2), int), spatial=False)
    sdata = foreign({"counts": table}, {"spots": shapes})
    expected = shapely.get_coordinates(shapes.geometry)
    np.testing.assert_array_equal(contract.find_units(sdata).positions(sdata), expected)
    table.obsm["spatial"] = expected + 77
    np.testing.assert_array_equal(contract.find_units(sdata).positions(sdata), expected)


def test_a_table_that_annotates_nothing_has_counts_and_no_positions() -> None:
    shapes, table = spots_and_counts(np.ones((3, 2), int))
    del table.uns["spatialdata_attrs"]
    sdata = foreign({"counts": table}, {"spots": shapes})
    assert contract.counts(sdata).n_obs == 3
    with pytest.raises(ValueError, match=r"'counts' .* does not say which shapes its rows belong to.*from_anndata"):
        contract.find_units(sdata)


def test_one_candidate_is_found_and_several_are_listed() -> None:
    shapes, table = spots_and_counts(np.ones((3, 2), int))
    sdata = foreign({"rna": table}, {"spots": shapes})
    assert contract.counts_name(sdata) == "rna"
    assert contract.units_name(sdata) == "spots"
    assert contract.image_name(sdata) == "tissue_image"

    both = foreign({"rna": table, "protein": table.copy()}, {"spots": shapes})
    with pytest.raises(KeyError, match=r"more than one table of counts: \['protein', 'rna'\].*`table_key=`"):
        contract.counts(both)
    assert contract.counts_name(both, "rna") == "rna"
    with pytest.raises(KeyError, match=r"no table of counts among \['protein', 'rna'\]"):
        contract.counts(both, contract.Source("absent"))
    with pytest.raises(KeyError, match=r"No shapes 'cells'.*\['spots'\]"):
        contract.units_name(both, "cells", "rna")


def test_our_own_tables_are_no_counts(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5)
    sdata.tables["rna"] = sdata.tables.pop("counts")
    assert "tiles" in sdata.tables
    assert contract.counts_name(sdata) == "rna"
    del sdata.tables["rna"]
    with pytest.raises(KeyError, match=r"no table of counts.*reader that has molecules"):
        contract.counts_name(sdata)


def test_missing_steps_are_named(make_slide: Callable[..., SpatialData]) -> None:
    sdata = make_slide(np.full((40, 60, 3), 9, np.uint8), sample="bare")
    for function, call in [
        (contract.tissue, "stimage_sd.pp.tissue_mask"),
        (contract.tiles, "stimage_sd.pp.tile"),
        (contract.predictions, "stimage_sd.tl.predict"),
    ]:
        with pytest.raises(KeyError, match=rf"'bare' has no .* Run `{call}"):
            function(sdata)


def test_missing_embeddings_name_the_extractor(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5, features=np.zeros((25, 2)))
    with pytest.raises(KeyError, match=r"no embeddings by 'resnet50' \(found \['toy'\]\).*embed\(sdata, 'resnet50'\)"):
        contract.embeddings(sdata, "resnet50")


def test_a_few_features_may_be_zero(make_spots: Callable[..., SpatialData]) -> None:
    shares = np.eye(4)[np.arange(25) % 4]
    shares[3] = 0
    sdata = make_spots(n_side=5, features=shares)
    np.testing.assert_array_equal(contract.embeddings(sdata, "toy"), shares)


@pytest.mark.parametrize("of", ["own", "context"])
@pytest.mark.parametrize("chunk", [(slice(8, 16), slice(None)), (slice(8, 16), slice(128, 300)), (slice(None),) * 2])
def test_embeddings_of_zeros_are_those_of_a_missing_chunk(make_spots: Callable, of: str, chunk: tuple) -> None:
    sdata = make_spots(n_side=5, features=np.maximum(np.random.default_rng(0).normal(size=(25, 300)), 0))
    table = contract.tiles(sdata)
    table.obsm["X_toy"][:, 50:60] = 0  # features that no tile has
    table.obsm["X_toy_context"] = table.obsm["X_toy"].copy()
    np.testing.assert_array_equal(contract.embeddings(sdata, "toy"), table.obsm["X_toy"])
    table.obsm["X_toy" if of == "own" else "X_toy_context"][chunk] = 0
    n_lost = len(range(25)[chunk[0]])
    with pytest.raises(ValueError, match=rf"zeros for {n_lost} tiles.*pp.embed"):
        contract.embeddings(sdata, "toy")
    table.obs["keep"] = ~np.isin(np.arange(25), np.arange(25)[chunk[0]])
    contract.embeddings(sdata, "toy")


def test_a_store_that_was_moved_is_an_error_and_not_black(make_slide: Callable, tmp_path: Path) -> None:
    made = make_slide(np.full((300, 260, 3), 180, np.uint8))
    contract.write_tissue(made, np.ones((30, 26), dtype=bool), downsample=(10.0, 10.0))
    made.write(tmp_path / "there.zarr")
    sdata = spatialdata.read_zarr(tmp_path / "there.zarr")
    assert (contract.thumbnail(sdata, "he")[0] == 180).all()
    (tmp_path / "there.zarr").rename(tmp_path / "moved.zarr")
    with pytest.raises(FileNotFoundError, match="moved or deleted"):
        contract.thumbnail(sdata, "he")
    with pytest.raises(FileNotFoundError, match="moved or deleted"):
        contract.tissue(sdata)


def test_align_to_spots_matches_by_name_whatever_the_order(make_spots: Callable[..., SpatialData]) -> None:
    counts = np.arange(25)[:, None] * np.array([[1, 2]])
    sdata = make_spots(n_side=5, counts=counts)
    shuffled = contract.tiles(sdata)[np.random.default_rng(0).permutation(25)].copy()
    shuffled.obs["spot_id"] = shuffled.obs["spot_id"].astype(str)
    shuffled.obs.iloc[3, shuffled.obs.columns.get_loc("spot_id")] = "not measured"
    rows, aligned = contract.align_to_spots(sdata, shuffled)
    assert 3 not in rows
    assert len(rows) == 24
    assert list(aligned.obs_names) == list(shuffled.obs["spot_id"].iloc[rows])
    np.testing.assert_allclose(aligned.obsm["spatial"], shuffled.obsm["spatial"][rows])


def test_align_refuses_tiles_off_spots(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5)
    tiles = contract.tiles(sdata).copy()
    strangers = tiles.copy()
    strangers.obs["spot_id"] = "x"
    with pytest.raises(KeyError, match=r"No tile of section .*made.* sits on one of its measured units.*pp\.tile"):
        contract.align_to_spots(sdata, strangers)
    del tiles.obs["spot_id"]
    with pytest.raises(KeyError, match=r'do not sit on spots.*layout="spots"'):
        contract.align_to_spots(sdata, tiles)


# --------------------------------------------------------------------------------------------------
# tissue, and the disk


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    factor=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mpp=st.none() | st.floats(0.1, 5),
)
def test_tissue_round_trip(height: int, width: int, factor: tuple[int, int], mpp: float | None) -> None:
    mask = np.random.default_rng(height * width).random((height, width)) > 0.5
    whole = da.zeros((3, height * factor[0], width * factor[1]), dtype="u1")
    sdata = SpatialData(images={"he": contract.build_image([whole])})
    contract.register(sdata, sample="s", platform="p", image="he", mpp=mpp)
    contract.write_tissue(sdata, mask, downsample=factor)
    back, downsample = contract.tissue(sdata)
    np.testing.assert_array_equal(back, mask)
    np.testing.assert_allclose(downsample, factor)
    assert ("microns" in get_transformation(sdata.labels["tissue"], get_all=True)) == (mpp is not None)


def test_everything_survives_the_disk(make_spots: Callable[..., SpatialData], tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(36, 3))
    sdata = make_spots(n_side=6, features=features, sample="kept", stripes=True)
    pp.spatial_context(sdata, "toy")
    sdata.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")

    assert contract.info(back) == contract.info(sdata)
    assert contract.tiling(back) == contract.tiling(sdata)
    np.testing.assert_array_equal(contract.tissue(back)[0], contract.tissue(sdata)[0])
    np.testing.assert_array_equal(contract.embeddings(back, "toy"), contract.embeddings(sdata, "toy"))
    pd.testing.assert_frame_equal(
        contract.tiles(back).obs, contract.tiles(sdata).obs, check_dtype=False, check_categorical=False
    )
    for name in ("tile_squares", "spots"):
        matrix = get_transformation(back.shapes[name], "microns").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(matrix, np.diag([2.5, 2.5, 1.0]))
    assert len(contract.levels(back, "he")) == len(contract.levels(sdata, "he"))
    # and goes on from there
    pp.tile(back, size_um=80.0)
    pp.stain_normalize(back, method="reinhard")
    assert contract.working_image_name(back) == "he_normalized"
    assert contract.tiling(back)["side_px"] == pytest.approx(32.0)


def test_tables_annotate_their_shapes(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=5)
    for name, shapes in (("tiles", "tile_squares"), ("counts", "spots")):
        attributes = sdata.tables[name].uns[TableModel.ATTRS_KEY]
        assert attributes["region"] == shapes
        joined, table = spatialdata.join_spatialelement_table(
            sdata=sdata, spatial_element_names=shapes, table_name=name, how="inner"
        )
        assert table.n_obs == 25
        centers = np.stack([joined[shapes].centroid.x, joined[shapes].centroid.y], axis=1)
        np.testing.assert_allclose(centers, table.obsm["spatial"])


# --------------------------------------------------------------------------------------------------
# objects that no reader of ours made


def test_spatialdata_blobs_with_keys_given() -> None:
    sdata = spatialdata.datasets.blobs(length=128)
    pink = np.full((3, 128, 128), 255, np.uint8)
    pink[:, 20:110, 20:110] = np.array([200, 120, 180], np.uint8)[:, None, None]
    sdata.images["histology"] = Image2DModel.parse(pink, dims=("c", "y", "x"), transformations={"global": Identity()})
    assert contract.image_name(sdata) == "histology"  # the other images are no 8-bit RGB

    pp.tissue_mask(sdata, image_key="histology")
    assert contract.tissue(sdata)[0].mean() == pytest.approx(90**2 / 128**2, abs=0.02)
    with pytest.raises(ValueError, match="no known resolution"):
        pp.tile(sdata, layout="grid", size_um=10.0)


def test_two_rgb_images_need_a_key_and_the_key_is_enough() -> None:
    shapes, table = spots_and_counts(np.ones((8, 2), int))
    sdata = foreign({"rna": table}, {"circles": shapes})
    table.uns[TableModel.ATTRS_KEY]["region"] = "circles"
    table.obs["region"] = pd.Categorical(["circles"] * 8)
    pink = np.broadcast_to(np.array([200, 120, 180], np.uint8)[:, None, None], (3, 100, 100))
    sdata.images["histology"] = contract.build_image([da.from_array(np.ascontiguousarray(pink))])
    with pytest.raises(KeyError, match=r"more than one RGB image: \['histology', 'tissue_image'\].*`image_key=`"):
        pp.tissue_mask(sdata)

    pp.tissue_mask(sdata, image_key="histology")
    pp.tile(sdata, image_key="histology", table_key="rna", shapes_key="circles")
    assert contract.tiling(sdata)["side_px"] == 8.0
    assert contract.tiles(sdata).obs["keep"].all()


def test_a_single_foreign_table_is_tiled_by_its_spots() -> None:
    shapes, table = spots_and_counts(np.ones((8, 2), int))
    sdata = foreign({"table": table}, {"spots": shapes})
    sdata.images["tissue_image"] = contract.build_image(
        [da.from_array(np.ascontiguousarray(np.broadcast_to(np.array([[[200]], [[120]], [[180]]], "u1"), (3, 99, 99))))]
    )
    pp.tile(sdata)
    assert contract.tiling(sdata)["layout"] == "spots"
    assert list(contract.tiles(sdata).obs["spot_id"]) == list(table.obs_names)


def test_genes_and_shapes_that_are_there_twice_are_named(make_spots: Callable[..., SpatialData]) -> None:
    sdata = make_spots(n_side=3, genes=["A", "B", "B", "C"], tiled=False, sample="left")
    message = (
        r"every gene once in table 'counts' of section 'left', found 1 repeated, such as 'B'.*var_names_make_unique"
    )
    with pytest.raises(ValueError, match=message):
        contract.counts(sdata)
    sdata = make_spots(n_side=3, tiled=False, sample="left")
    sdata.tables["counts"].obs_names = ["s", "s", *"abcdefg"]
    with pytest.raises(ValueError, match=r"once in table 'counts' of section 'left', found 's' more.*obs_names_make_"):
        contract.counts(sdata)
    sdata.shapes["spots"].index = [0, 0, *range(2, 9)]
    with pytest.raises(
        ValueError, match=r"index of shapes 'spots' of section 'left', found 0 more than once. Keep one"
    ):
        contract.counts(sdata)


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csc_array])
@pytest.mark.parametrize("layer", [None, "raw"])
def test_sparse_arrays_and_versions_of_ensembl_ids(
    make_spots: Callable[..., SpatialData], kind: type, layer: str | None
) -> None:
    sdata = make_spots(n_side=4, genes=["ENSG00000141736.14", "ENSMUSG00000062312.8", "A.1", "B"], tiled=False)
    table = sdata.tables.pop("counts")
    expected = table.X.toarray()
    if layer is None:
        table.X = kind(table.X)
    else:
        table.layers[layer] = kind(table.X)
    sdata.tables["counts"] = table
    found = contract.counts(sdata, contract.Source(layer=layer))
    assert isinstance(found.X, sp.csr_matrix)
    np.testing.assert_array_equal(found.X.toarray(), expected)
    assert found.var_names.tolist() == ["ENSG00000141736", "ENSMUSG00000062312", "A.1", "B"]
    assert sdata.tables["counts"].var_names[0] == "ENSG00000141736.14"
    assert len(pp.select_genes(sdata, n_top=2)) == 2


@pytest.mark.parametrize("layer", [None, "counts"])
def test_antibodies_in_a_table_of_counts_are_no_genes(
    make_spots: Callable[..., SpatialData], layer: str | None
) -> None:
    """As `spatialdata_io.visium` reads them: one table with genes and antibodies."""
    values = np.random.default_rng(0).poisson(3.0, (25, 5))
    values[:, 3:] *= 1000
    sdata = make_spots(n_side=5, counts=values, genes=["A", "B", "C", "CD3E", "CD3E.1"])
    table = sdata.tables["counts"]
    table.var["feature_types"] = ["Gene Expression"] * 3 + ["Antibody Capture"] * 2
    table.layers["counts"] = table.X.copy()
    counts = contract.counts(sdata, contract.Source(None, layer))
    assert counts.var_names.tolist() == ["A", "B", "C"]
    np.testing.assert_array_equal(counts.X.toarray(), values[:, :3])
    table.var["feature_types"] = ["Custom"] * 5  # types that say nothing of genes
    assert contract.counts(sdata).n_vars == 5
