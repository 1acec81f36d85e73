"""Patches and features of TRIDENT and CLAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import spatialdata
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData

from stimage_sd import contract, pp
from stimage_sd.io import read_tile_features
from stimage_sd.io._tile_features import _sides
from stimage_sd.models._specification import specification

PINK = np.full((512, 768, 3), (200, 120, 180), np.uint8)
#: upper left corners, column by column as TRIDENT goes
CORNERS = np.array([[x, y] for x in range(0, 768, 128) for y in range(0, 512, 128)])
FEATURES = np.random.default_rng(0).normal(size=(len(CORNERS), 16)).astype(np.float32)


def trident(path: Path, **changes: Any) -> Path:
    """A file as TRIDENT writes it: one row per chunk, attributes on both, None as text."""
    attributes = {
        "patch_size": 64, "patch_size_level0": 128, "level0_magnification": 40, "target_magnification": 20,
        "overlap": 0, "name": "slide", "savetodir": "None", "level0_width": 768, "level0_height": 512,
    } | changes.pop("attributes", {})  # fmt: skip
    arrays = {"features": FEATURES, "coords": CORNERS} | changes
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values is not None:
                file.create_dataset(
                    name, data=values, maxshape=(None, *values.shape[1:]), chunks=(1, *values.shape[1:])
                )
        if "features" in file:
            file["features"].attrs.update({"name": "slide", "savetodir": "features_uni"})
        if "coords" in file:
            file["coords"].attrs.update({name: value for name, value in attributes.items() if value is not Ellipsis})
    return path


@pytest.fixture
def slide(make_slide: Any) -> SpatialData:
    return make_slide(PINK, mpp=0.25)


def test_tridents_file(slide: SpatialData, tmp_path: Path) -> None:
    read_tile_features(slide, trident(tmp_path / "slide.h5"), extractor="uni")
    table = contract.tiles(slide)
    np.testing.assert_array_equal(table.obsm["X_uni"], FEATURES)
    np.testing.assert_array_equal(table.obs[["x", "y"]], CORNERS + 64)
    np.testing.assert_array_equal(contract.tile_squares(slide), np.hstack([CORNERS, CORNERS + 128]))
    assert contract.tiling(slide) == {"layout": "grid", "side_px": 128.0, "target_px": 64, "size_um": 32.0}
    assert table.obs["keep"].all()
    assert table.obs["tissue_fraction"].isna().all()
    assert table.uns["embeddings"]["uni"]["source"] == "TRIDENT"
    found = specification(slide, "uni")
    assert (found.side_px, found.size_um, found.fields_of_view, found.context_rings) == (128.0, 32.0, (1.0,), 0)
    assert slide.shapes["tile_squares"].index.tolist() == table.obs["instance_id"].tolist()


def test_the_table_is_that_of_tile(slide: SpatialData, make_slide: Any, tmp_path: Path) -> None:
    read_tile_features(slide, trident(tmp_path / "slide.h5"), extractor="uni")
    other = make_slide(PINK, mpp=0.25)
    pp.tile(other, size_um=32)
    ours, theirs = contract.tiles(slide), contract.tiles(other)
    assert list(ours.obs) == list(theirs.obs)
    assert ours.obs.dtypes.to_dict() == theirs.obs.dtypes.to_dict()
    assert set(ours.uns) - {"embeddings"} == set(theirs.uns)
    assert {tuple(row) for row in contract.tile_squares(slide)} == {tuple(row) for row in contract.tile_squares(other)}


def test_the_section_goes_on_from_there(slide: SpatialData, tmp_path: Path) -> None:
    read_tile_features(slide, trident(tmp_path / "slide.h5"), extractor="uni")
    slide.write(tmp_path / "section.zarr")
    section = spatialdata.read_zarr(tmp_path / "section.zarr")
    pp.spatial_context(section, "uni")
    assert contract.tiles(section).obsm["X_uni_context"].shape == FEATURES.shape
    read_tile_features(section, trident(tmp_path / "slide.h5", features=FEATURES * 2), extractor="uni")
    np.testing.assert_array_equal(contract.tiles(section).obsm["X_uni"], FEATURES * 2)
    assert "X_uni_context" not in contract.tiles(section).obsm


@pytest.mark.parametrize("batched", [False, True])
def test_older_files_of_trident(slide: SpatialData, tmp_path: Path, batched: bool) -> None:
    path = trident(
        tmp_path / "slide.h5",
        features=(FEATURES[None] if batched else FEATURES).astype(np.float16),
        attributes={"patch_size_level0": ..., "level0_width": ..., "level0_height": "None"},
    )
    read_tile_features(slide, path, extractor="uni")
    assert contract.tiling(slide)["side_px"] == 128.0
    assert contract.tiles(slide).obsm["X_uni"].dtype == np.float32
    np.testing.assert_allclose(contract.tiles(slide).obsm["X_uni"], FEATURES, atol=2e-3)


def clam(path: Path, *, with_attributes: bool) -> Path:
    """A file of features as CLAM writes it, or of patches as ``create_patches_fp.py`` does, with features."""
    with h5py.File(path, "w") as file:
        file["features"] = FEATURES
        file["coords"] = CORNERS.astype(np.int32)
        if with_attributes:
            attributes = {"patch_size": 32, "patch_level": 1, "downsample": (4.0, 4.0), "name": "slide"}
            attributes |= {"downsampled_level_dim": (192, 128), "level_dim": (192, 128), "save_path": "patches"}
            file["coords"].attrs.update(attributes)
    return path


def test_clams_file(slide: SpatialData, tmp_path: Path) -> None:
    path = clam(tmp_path / "slide.h5", with_attributes=False)
    with pytest.raises(
        ValueError, match=r"Expected the side of a patch .* Pass `side_px=`.*`patch_size \* downsample`"
    ):
        read_tile_features(slide, path, extractor="resnet50")
    assert "tiles" not in slide.tables
    read_tile_features(slide, path, extractor="resnet50", side_px=128)
    assert contract.tiling(slide) == {"layout": "grid", "side_px": 128.0, "target_px": 128, "size_um": 32.0}
    np.testing.assert_array_equal(contract.tile_squares(slide)[:, :2], CORNERS)


def test_clams_attributes(slide: SpatialData, tmp_path: Path) -> None:
    read_tile_features(slide, clam(tmp_path / "slide.h5", with_attributes=True), extractor="resnet50")
    assert contract.tiling(slide)["side_px"] == 128.0
    assert contract.tiling(slide)["target_px"] == 32
    assert contract.tiles(slide).uns["embeddings"]["resnet50"]["source"] == "CLAM"


@given(st.integers(16, 1024), st.floats(1, 64), st.integers(1, 4))
def test_sides_of_clam(patch_size: int, downsample: float, custom: int) -> None:
    attributes = {"patch_size": np.int64(patch_size), "patch_level": np.int64(2)}
    attributes |= {"downsample": np.array([downsample, downsample]), "custom_downsample": custom}
    side, target, source = _sides(attributes, None, Path("slide.h5"))
    assert side == pytest.approx(patch_size * downsample * custom)
    assert (target, source) == (patch_size, "CLAM")
    del attributes["downsample"]
    with pytest.raises(ValueError, match="Pass `side_px=`"):
        _sides(attributes, None, Path("slide.h5"))


def test_features_are_joined_to_tiles_by_place(slide: SpatialData, tmp_path: Path) -> None:
    pp.tile(slide, size_um=32)
    before = contract.tiles(slide).obs.copy()
    order = np.random.default_rng(1).permutation(len(CORNERS))
    extra = np.vstack([CORNERS[order], [[30, 30]]])
    path = trident(
        tmp_path / "slide.h5", coords=extra, features=np.vstack([FEATURES[order], np.zeros((1, 16), np.float32)])
    )
    read_tile_features(slide, path, extractor="uni")
    table = contract.tiles(slide)
    assert table.obs.equals(before)
    corners = contract.tile_squares(slide)[:, :2]
    for corner, features in zip(corners, table.obsm["X_uni"], strict=True):
        row = np.flatnonzero((corner == CORNERS).all(axis=1))[0]
        np.testing.assert_array_equal(features, FEATURES[row])
    assert contract.info(slide)["history"][-1]["parameters"]["joined"] is True


def test_tiles_at_other_places(slide: SpatialData, tmp_path: Path) -> None:
    pp.tile(slide, size_um=32)
    path = trident(tmp_path / "slide.h5", coords=CORNERS + np.array([20, 0]))
    with pytest.raises(ValueError, match=r"has tiles of 128.0 px; 24 of 24 have no patch .* `del sdata.tables"):
        read_tile_features(slide, path, extractor="uni")
    assert "X_uni" not in contract.tiles(slide).obsm
    del slide.tables["tiles"]
    read_tile_features(slide, path, extractor="uni")
    np.testing.assert_array_equal(contract.tile_squares(slide)[:, 0], CORNERS[:, 0] + 20)


def test_repeated_places(slide: SpatialData, tmp_path: Path) -> None:
    path = trident(
        tmp_path / "slide.h5", coords=np.vstack([CORNERS, CORNERS[:3]]), features=np.vstack([FEATURES, FEATURES[3:6]])
    )
    with pytest.warns(UserWarning, match="3 of 27 patches in slide.h5 are at the position of an earlier patch"):
        read_tile_features(slide, path, extractor="uni")
    np.testing.assert_array_equal(contract.tiles(slide).obsm["X_uni"], FEATURES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": None}, KeyError, r"Expected `features` and `coords` in .*, found \['coords'\]"),
        ({"features": FEATURES[0]}, ValueError, r"found one of the slide \(16,\) for 24 patches"),
        ({"features": FEATURES[:9]}, ValueError, r"found \(9, 16\) and \(24, 2\)"),
        ({"features": FEATURES[:0], "coords": CORNERS[:0]}, ValueError, "Expected patches in .*, found none"),
        ({"features": FEATURES * np.nan}, ValueError, "found NaN or infinity in 24 of 24 rows"),
        ({"coords": CORNERS * 2}, ValueError, r"found 18 of 24 outside; they reach to x 1408, y 896"),
        ({"attributes": {"level0_width": 3000}}, ValueError, "states a slide of 3000 x 512 px"),
        ({"attributes": {"patch_size_level0": 0}}, ValueError, "Expected the side of a patch"),
    ],
)
def test_files_that_are_refused(
    slide: SpatialData, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = trident(tmp_path / "slide.h5", **changes)
    with pytest.raises(error, match=message):
        read_tile_features(slide, path, extractor="uni")
    assert not slide.tables


def test_arguments_that_are_refused(slide: SpatialData, tmp_path: Path) -> None:
    path = trident(tmp_path / "slide.h5")
    with pytest.raises(ValueError, match=r"Expected `side_px=128`, as the attributes .* found 256"):
        read_tile_features(slide, path, extractor="uni", side_px=256)
    with pytest.raises(ValueError, match="Expected `side_px` to be a positive number"):
        read_tile_features(slide, path, extractor="uni", side_px=-1)
    with pytest.raises(ValueError, match=r"Expected letters, .* found 'uni/v2'"):
        read_tile_features(slide, path, extractor="uni/v2")
    with pytest.raises(FileNotFoundError, match="Expected an HDF5 file of features at"):
        read_tile_features(slide, tmp_path / "none.h5", extractor="uni")
    path.write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match=r"Expected an HDF5 file at .*, found one that cannot be read"):
        read_tile_features(slide, path, extractor="uni")
