"""Sections from analyses begun with scanpy, squidpy or stLearn."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import cv2
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
import spatialdata
import squidpy
from anndata import AnnData

from stimage_sd import contract, pp
from stimage_sd.io import from_anndata

# Test modules are imported by path: the builders of other tools' objects are not found otherwise.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interoperability"))
import peers

IMAGE = np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8)


@pytest.fixture
def adata() -> AnnData:
    generator = np.random.default_rng(1)
    return AnnData(
        sp.csr_matrix(generator.poisson(2.0, (20, 6)).astype(np.float32)),
        obs=pd.DataFrame({"cluster": pd.Categorical(list("ab") * 10)}, index=[f"s{number}" for number in range(20)]),
        var=pd.DataFrame({"gene_ids": list("uvwxyz")}, index=[f"G{number}" for number in range(6)]),
        obsm={"spatial": generator.uniform(20, 380, (20, 2))},
        uns={"spatial": {"V1": {"images": {}, "scalefactors": {"spot_diameter_fullres": 30.0}}}},
    )


def test_section_keeps_what_was_there(adata: AnnData) -> None:
    before = adata.copy()
    sdata = from_anndata(adata, IMAGE, mpp=0.5)
    table = contract.counts(sdata)
    assert contract.sample(sdata) == "V1"
    assert table.X.dtype == np.int32
    np.testing.assert_array_equal(table.X.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(table.obsm["spatial"], adata.obsm["spatial"])
    pd.testing.assert_series_equal(table.obs["cluster"], adata.obs["cluster"])
    pd.testing.assert_frame_equal(table.var, adata.var)
    np.testing.assert_allclose(sdata.shapes["spots"].radius, 15.0)
    assert table.uns["spatial"]["V1"]["scalefactors"]["spot_diameter_fullres"] == 30.0
    np.testing.assert_array_equal(np.moveaxis(contract.levels(sdata, "he")[0].data.compute(), 0, -1), IMAGE)
    assert list(adata.obs) == list(before.obs)
    assert list(adata.uns["spatial"]["V1"]) == list(before.uns["spatial"]["V1"])


def test_file_as_image_and_round_trip(adata: AnnData, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "he.png"), IMAGE[..., ::-1])
    sdata = from_anndata(adata, tmp_path / "he.png")
    assert contract.info(sdata)["mpp"] is None
    sdata.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    assert back.attrs == sdata.attrs
    np.testing.assert_array_equal(contract.counts(back).X.toarray(), adata.X.toarray())


@pytest.mark.parametrize("place", ["layer", "X", "raw", "raw of other genes", "named", "no X"])
def test_counts_are_found_where_they_are(adata: AnnData, place: str) -> None:
    expected = adata.X.toarray()
    if place in ("layer", "no X"):
        adata.layers["counts"] = adata.X.copy()
    elif place == "named":
        adata.layers["umi"] = adata.X.copy()
    elif place.startswith("raw"):
        adata.raw = adata.copy()
    if place == "no X":
        adata = AnnData(None, obs=adata.obs, var=adata.var, layers=adata.layers, obsm=adata.obsm, uns=adata.uns)
    elif place != "X":
        scanpy.pp.log1p(adata)
    if place == "raw of other genes":
        adata = adata[:, :3].copy()
        with pytest.warns(UserWarning, match=r"only in `adata.raw`, with 6 genes instead of the 3 .* without `X` of"):
            sdata = from_anndata(adata, IMAGE)
    else:
        sdata = from_anndata(adata, IMAGE, layer="umi" if place == "named" else None)
    np.testing.assert_array_equal(np.asarray(contract.counts(sdata).X.todense()), expected)
    found = contract.info(sdata)["history"][0]["parameters"]["counts"]
    assert (
        found
        == {
            "layer": "`adata.layers['counts']`",
            "no X": "`adata.layers['counts']`",
            "X": "`adata.X`",
            "raw": "`adata.raw.X`",
            "raw of other genes": "`adata.raw.X`",
            "named": "`adata.layers['umi']`",
        }[place]
    )
    if place in ("layer", "raw", "named"):
        # the analysis goes on with its own X
        np.testing.assert_array_equal(sdata.tables["counts"].X.toarray(), adata.X.toarray())
        assert sdata.tables["counts"].X.dtype == np.float32


def test_columns_the_table_needs_for_itself_are_kept_under_another_name(adata: AnnData) -> None:
    adata.obs["region"] = "cortex"
    adata.obs["instance_id"] = np.arange(20) + 100
    sdata = from_anndata(adata, IMAGE)
    table = contract.counts(sdata)
    assert (table.obs["region_original"] == "cortex").all()
    np.testing.assert_array_equal(table.obs["instance_id"], sdata.shapes["spots"].index)


def test_an_index_that_is_named_as_a_column_can_be_written(adata: AnnData, tmp_path: Path) -> None:
    adata.raw = adata.copy()
    for frame in (adata.obs, adata.var, adata.raw.var):
        frame["name"] = np.arange(len(frame))
        frame.index.name = "name"
    sdata = from_anndata(adata, IMAGE, mpp=0.5)
    sdata.write(tmp_path / "section.zarr")
    again = spatialdata.read_zarr(tmp_path / "section.zarr").tables["counts"]
    assert list(again.var_names) == list(adata.var_names)
    assert again.obs["name"].tolist() == list(range(adata.n_obs))


def test_no_counts_anywhere(adata: AnnData) -> None:
    scanpy.pp.log1p(adata)
    with pytest.raises(ValueError, match=r"Expected raw counts in `layers\['counts'\]`, `X` or `raw.X` .*`layer=`"):
        from_anndata(adata, IMAGE)
    adata.layers["scaled"] = adata.X * -1.0
    with pytest.raises(ValueError, match=r"layers\['scaled'\]`, found negative values"):
        from_anndata(adata, IMAGE, layer="scaled")
    with pytest.raises(KeyError, match="No layer 'none'"):
        from_anndata(adata, IMAGE, layer="none")


def test_several_sections_in_one_table_are_refused(adata: AnnData) -> None:
    """`library_id=` names the picture; the spots of the other section would be drawn on it."""
    adata.obs["library_id"] = ["V1"] * 12 + ["V2"] * 8
    with pytest.raises(ValueError, match=r"Expected one section, found \['V1', 'V2'\].*Subset `adata`"):
        from_anndata(adata, IMAGE)
    adata.obs["array_row"], adata.obs["array_col"] = np.arange(20) % 12, np.arange(20) % 12
    assert contract.counts(from_anndata(adata[:12], IMAGE)).n_obs == 12
    del adata.obs["library_id"]
    with pytest.raises(ValueError, match="found 8 of 20 spots with the array position of another spot"):
        from_anndata(adata, IMAGE)


def test_positions_diameter_and_library_that_are_missing(adata: AnnData) -> None:
    adata.uns["spatial"]["V2"] = adata.uns["spatial"]["V1"]
    with pytest.raises(KeyError, match=r"found the libraries \['V1', 'V2'\]"):
        from_anndata(adata, IMAGE)
    assert contract.sample(from_anndata(adata, IMAGE, library_id="V2")) == "V2"
    with pytest.raises(KeyError, match="No library 'V3'"):
        from_anndata(adata, IMAGE, library_id="V3")
    del adata.uns["spatial"]
    with pytest.raises(KeyError, match="Pass `spot_diameter_px=`"):
        from_anndata(adata, IMAGE)
    with pytest.raises(TypeError, match=r"found str. Read a file by `anndata\.read_h5ad`"):
        from_anndata("visium.h5ad", IMAGE)
    assert from_anndata(adata, IMAGE, spot_diameter_px=10.0).shapes["spots"].radius.iloc[0] == 5.0
    del adata.obsm["spatial"]
    with pytest.raises(KeyError, match=r'Expected `adata.obsm\["spatial"\]`'):
        from_anndata(adata, IMAGE)


def test_spots_outside_or_nowhere(adata: AnnData) -> None:
    whole = adata.copy()
    adata.obsm["spatial"][0] = (600.0, 10.0)
    with pytest.warns(UserWarning, match=r"inside its image of 500 x 400 px .* found 1 of 20 outside.* left out"):
        sdata = from_anndata(adata, IMAGE)
    assert contract.counts(sdata).obs_names.tolist() == whole.obs_names[1:].tolist()
    np.testing.assert_array_equal(contract.counts(sdata).X.toarray(), whole[1:].X.toarray())
    np.testing.assert_array_equal(contract.find_units(sdata).positions(sdata), whole[1:].obsm["spatial"])
    adata.obsm["spatial"][:11] = (600.0, 10.0)
    with pytest.raises(
        ValueError, match=r"inside its image of 500 x 400 px .* found 11 of 20 outside.* Pass the image"
    ):
        from_anndata(adata, IMAGE)
    adata.obsm["spatial"][0] = np.nan
    with pytest.raises(ValueError, match=r"Expected finite positions of the spots of section 'V1'.* 1 of 20"):
        from_anndata(adata, IMAGE)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64])
def test_counts_beyond_32_bits_are_kept(adata: AnnData, dtype: type) -> None:
    values = adata.X.toarray().astype(dtype)
    values[0, 0] = 2**31
    values[3, 2] = 2**40 + 1
    for matrix in (values, sp.csr_matrix(values), sp.csc_array(values)):
        adata.X = matrix
        table = contract.counts(from_anndata(adata, IMAGE))
        assert table.X.dtype == np.int64
        np.testing.assert_array_equal(table.X.toarray().astype(object), values.astype(int).astype(object))
    values[0, 0] = 2**31 - 1
    values[3, 2] = 0
    adata.X = values
    assert contract.counts(from_anndata(adata, IMAGE)).X.dtype == np.int32


def test_counts_that_no_integer_holds(adata: AnnData) -> None:
    adata.X = adata.X.toarray().astype(np.float64)
    adata.X[0, 0] = 1e300
    with pytest.raises(ValueError, match=r"counts below 2\*\*63, found 1e\+300"):
        from_anndata(adata, IMAGE)


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csc_array, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("place", ["X", "layer"])
def test_every_kind_of_matrix(adata: AnnData, kind: Any, place: str, tmp_path: Path) -> None:
    expected = adata.X.toarray()
    if place == "X":
        adata.X = kind(expected)
    else:
        adata.layers["raw"], adata.X = kind(expected), np.log1p(expected)
    sdata = from_anndata(adata, IMAGE, mpp=2.0, layer=None if place == "X" else "raw")
    pp.tile(sdata)
    sdata.write(tmp_path / "section.zarr")
    for section in (sdata, spatialdata.read_zarr(tmp_path / "section.zarr")):
        values = contract.counts(section).X
        np.testing.assert_array_equal(values.toarray() if sp.issparse(values) else values, expected)


def test_names_that_are_there_twice_and_versions_of_ensembl(adata: AnnData) -> None:
    adata.var_names = ["ENSG00000141736.14", "ENSG00000141736.13", "A", "A", "B", "C"]
    with pytest.warns(UserWarning, match=r"2 gene name\(s\) appear more than once"):
        table = contract.counts(from_anndata(adata, IMAGE))
    assert table.var_names.tolist() == ["ENSG00000141736", "ENSG00000141736-1", "A", "A-1", "B", "C"]
    adata.obs_names = ["s0", *adata.obs_names[:-1]]
    with pytest.raises(ValueError, match=r"once in `adata.obs_names`, found 1 repeated, such as 's0'.*obs_names_make_"):
        from_anndata(adata, IMAGE)


@pytest.mark.parametrize("place", ["X", "layer"])
def test_antibodies_are_parted_from_genes(adata: AnnData, place: str) -> None:
    kinds = np.array(["Gene Expression", "Antibody Capture"] * 3)
    adata.var["feature_types"] = kinds
    expected = adata.X.toarray()
    if place == "layer":
        adata.layers["counts"], adata.X = adata.X.copy(), adata.X.log1p()
    sdata = from_anndata(adata, IMAGE)
    counts, proteins = contract.counts(sdata), contract.proteins(sdata)
    np.testing.assert_array_equal(counts.X.toarray(), expected[:, ::2])
    np.testing.assert_array_equal(proteins.X, expected[:, 1::2])
    assert proteins.var_names.tolist() == ["G1", "G3", "G5"]
    assert proteins.obs["cluster"].tolist() == adata.obs["cluster"].tolist()
    assert contract.find_units(sdata, against="proteins").names.equals(counts.obs_names)
    assert adata.n_vars == 6


def test_a_section_without_spots(adata: AnnData) -> None:
    with pytest.raises(ValueError, match="Expected spots in section 'V1', found none"):
        from_anndata(adata[:0], IMAGE)


# --------------------------------------------------------------------------------------------------
# what squidpy, scanpy and stLearn give


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


def section(*arguments: Any, **options: Any) -> spatialdata.SpatialData:
    """A section of which nothing is to be warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return from_anndata(*arguments, **options)


def spots_px(sdata: spatialdata.SpatialData) -> np.ndarray:
    units = contract.find_units(sdata)
    return np.column_stack([units.positions(sdata), np.full(len(units.names), units.diameter(sdata))])


def full_pitch(peer: peers.Peer) -> float:
    """Pitch of the array, px of the full image, measured without the package."""
    places = peer.painted.to_numpy()
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    near = peer.counts.obs[["array_row", "array_col"]].to_numpy(dtype=int)
    steps = np.abs(near[:, None] - near[None])
    return float(np.median(apart[(steps == (0, 2)).all(axis=2) | (steps == (1, 1)).all(axis=2)]))


@pytest.mark.parametrize("floats", [False, True])
def test_the_full_image_beside_the_table(bundles: Path, floats: bool) -> None:
    peer = peers.squidpy_visium(bundles, floats=floats)
    sdata = section(peer.data, peer.array)
    pp.tile(sdata)
    geometry = contract.tile_geometry(sdata)
    np.testing.assert_allclose(geometry.centers, peer.painted.to_numpy(), atol=1e-6)
    np.testing.assert_allclose(geometry.side, 0.55 * full_pitch(peer), atol=1e-6)
    np.testing.assert_allclose(contract.mpp(sdata), 100.0 / full_pitch(peer), rtol=1e-9)
    assert contract.tiles(sdata).obs["spot_id"].tolist() == peer.data.obs_names.tolist()
    own = peer.own()
    np.testing.assert_allclose(spots_px(sdata), spots_px(own)[own.tables["counts"].obs_names.get_indexer(
        peer.data.obs_names)], atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("floats", [False, True])
def test_the_hires_image_alone(bundles: Path, floats: bool) -> None:
    peer = peers.hires_only(bundles, floats=floats)
    with pytest.warns(
        UserWarning, match=r"image 'hires' of library 'tissue' is the H&E .* 1\.098 µm per pixel, 2\.2 times"
    ):
        sdata = from_anndata(peer.data)
    np.testing.assert_array_equal(np.moveaxis(contract.levels(sdata, "he")[0].data.compute(), 0, -1), peer.picture())
    pp.tile(sdata)
    geometry, full = contract.tile_geometry(sdata), section(peer.data, peers.painted_image(bundles))
    np.testing.assert_allclose(geometry.centers, peer.pixels.to_numpy(), atol=1e-6)
    np.testing.assert_allclose(geometry.side, 0.55 * full_pitch(peer) / peer.reduction, atol=1e-6)
    mpp = contract.mpp(sdata)
    np.testing.assert_allclose(mpp, contract.mpp(full) * peer.reduction, rtol=1e-9)
    np.testing.assert_allclose(geometry.centers * mpp, spots_px(full)[:, :2] * contract.mpp(full), atol=1e-6)
    assert contract.tiling(sdata)["size_um"] == pytest.approx(55.0)


def test_the_largest_image_is_taken_and_none_is_an_error(bundles: Path) -> None:
    peer = peers.squidpy_visium(bundles)
    with pytest.warns(UserWarning, match="image 'hires'"):
        assert contract.image_size(from_anndata(peer.data)) == (peers.HIRES, peers.HIRES)
    del peer.data.uns["spatial"]["tissue"]["images"]["hires"]
    with pytest.warns(UserWarning, match="image 'lowres'"):
        sdata = from_anndata(peer.data, mpp=0.5)
    assert contract.image_size(sdata) == (peers.LOWRES, peers.LOWRES)
    np.testing.assert_allclose(spots_px(sdata)[:, :2], peer.painted.to_numpy() * peers.LOWRES / peers.SIDE, atol=1e-6)
    assert contract.mpp(sdata) == pytest.approx(0.5 * peers.SIDE / peers.LOWRES)
    del peer.data.uns["spatial"]["tissue"]["images"]["lowres"]
    with pytest.raises(KeyError, match=r"Expected an image in .* Pass the H&E as `image=`"):
        from_anndata(peer.data)


def test_the_file_that_squidpy_noted(bundles: Path) -> None:
    peer = peers.squidpy_visium(bundles)
    library = peer.data.uns["spatial"]["tissue"]
    library["metadata"]["source_image_path"] = str(peers.visium_bundle(bundles) / "image.tif")
    sdata = section(peer.data)
    assert contract.image_size(sdata) == (peers.SIDE, peers.SIDE)
    np.testing.assert_allclose(spots_px(sdata)[:, :2], peer.painted.to_numpy(), atol=1e-6)
    assert sdata.tables["counts"].uns["spatial"]["tissue"]["metadata"] == library["metadata"]
    # a file of another size is not the full-resolution image
    library["metadata"]["source_image_path"] = str(peers.visium_bundle(bundles) / "spatial" / "tissue_hires_image.png")
    library["images"].pop("hires")
    with pytest.warns(UserWarning, match="image 'lowres'"):
        from_anndata(peer.data)


def test_an_image_of_another_size_is_told(bundles: Path) -> None:
    peer = peers.squidpy_visium(bundles)
    hires = peer.data.uns["spatial"]["tissue"]["images"]["hires"]
    with (
        pytest.warns(UserWarning, match=r"has 700 x 700 px.* about 1536 x 1536 px. Pass that image, or leave `image`"),
        pytest.raises(ValueError, match="33 of 40 outside"),
    ):
        from_anndata(peer.data, hires)


@pytest.mark.parametrize("lazy", [False, True])
def test_fractions_and_bytes_are_the_same_pixels(adata: AnnData, lazy: bool) -> None:
    fraction = (IMAGE / 255.0).astype(np.float32)
    sdata = section(adata, da.from_array(fraction, chunks=(150, 200, 3)) if lazy else fraction)
    np.testing.assert_array_equal(np.moveaxis(contract.levels(sdata, "he")[0].data.compute(), 0, -1), IMAGE)
    with pytest.raises(ValueError, match="Expected an RGB image"):
        from_anndata(adata, IMAGE[..., 0])


@pytest.mark.parametrize(("quality", "nested"), [("hires", False), ("hires", True), ("fulres", False)])
def test_stlearn(bundles: Path, quality: Any, nested: bool) -> None:
    peer = peers.stlearn_visium(bundles, quality=quality, nested=nested)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sdata = from_anndata(peer.data)
    assert [True for each in caught if "No full-resolution image" in str(each.message)] == [True] * (quality == "hires")
    np.testing.assert_allclose(spots_px(sdata)[:, :2], peer.pixels.to_numpy(), atol=1e-6)
    np.testing.assert_allclose(spots_px(sdata)[:, 2], 0.55 * full_pitch(peer) / peer.reduction, atol=1e-6)
    np.testing.assert_array_equal(sdata.tables["counts"].obs["sum_counts"], peer.data.obs["sum_counts"])
    assert contract.sample(sdata) == "tissue"
    # its own columns, where there is nothing else
    del peer.data.obsm["spatial"]
    again = section(peer.data, peers.painted_image(bundles))
    np.testing.assert_allclose(spots_px(again)[:, :2], peer.painted.to_numpy(), atol=1e-6)
    (peer.data.uns["spatial"]["tissue"] if nested else peer.data.uns["spatial"]).pop("use_quality")
    if quality == "hires":
        with pytest.raises(KeyError, match=r"Expected the scale of `obs\['imagecol'\]`"):
            from_anndata(peer.data, peers.painted_image(bundles))


# --------------------------------------------------------------------------------------------------
# ImageContainer


@pytest.mark.parametrize("reduced", [False, True])
def test_a_container_has_its_scale(bundles: Path, reduced: bool) -> None:
    container, peer = peers.image_container(bundles, reduced=reduced)
    sdata = section(peer.data, container)
    np.testing.assert_array_equal(np.moveaxis(contract.levels(sdata, "he")[0].data.compute(), 0, -1), peer.picture())
    np.testing.assert_allclose(spots_px(sdata)[:, :2], peer.pixels.to_numpy(), atol=1e-6)
    np.testing.assert_allclose(spots_px(sdata)[:, 2], 0.55 * full_pitch(peer) / peer.reduction, atol=1e-6)
    np.testing.assert_allclose(contract.mpp(sdata), 100 / full_pitch(peer) * peer.reduction, rtol=1e-9)


def marked() -> tuple[np.ndarray, AnnData]:
    """A picture with a bright disk of 15 px at every spot, and its table."""
    generator = np.random.default_rng(3)
    places = np.stack(np.meshgrid(np.arange(60, 600, 90), np.arange(70, 450, 90)), axis=-1).reshape(-1, 2).astype(float)
    places += generator.integers(-8, 9, places.shape)
    image = np.zeros((500, 640, 3), np.uint8)
    for x, y in places:
        cv2.circle(image, (int(x), int(y)), 15, (255, 255, 255), -1)
    table = AnnData(
        generator.poisson(3.0, (len(places), 4)).astype(np.float32),
        obsm={"spatial": places + 0.5},
        uns={"spatial": {"V1": {"scalefactors": {"spot_diameter_fullres": 31.0}}}},
    )
    table.obs_names = [f"s{number}" for number in range(len(places))]
    return image, table


def disks(sdata: spatialdata.SpatialData) -> np.ndarray:
    """How far the disk's own middle is from every spot, px of the H&E."""
    picture = np.asarray(contract.levels(sdata, "he")[0].data.compute())[0].astype(float)
    places = spots_px(sdata)
    apart = []
    for x, y, diameter in places:
        half = int(diameter)
        left, top = int(x) - half, int(y) - half
        part = picture[max(top, 0) : top + 2 * half + 1, max(left, 0) : left + 2 * half + 1]
        rows, columns = np.indices(part.shape)
        middle = np.array([(columns * part).sum(), (rows * part).sum()]) / part.sum() + 0.5
        apart.append(middle + np.array([max(left, 0) - x, max(top, 0) - y]))
    return np.array(apart)


@pytest.mark.parametrize("case", ["crop", "crop and scale", "scale and crop", "padded", "padded and scaled", "twice"])
def test_crops_of_a_container(case: str) -> None:
    image, table = marked()
    whole = squidpy.im.ImageContainer(image, layer="image", library_id="V1")
    container = {
        "crop": lambda: whole.crop_corner(100, 150, size=(301, 403)),
        "crop and scale": lambda: whole.crop_corner(100, 150, size=(301, 403), scale=0.7),
        "scale and crop": lambda: whole.crop_corner(0, 0, size=(500, 640), scale=0.5).crop_corner(
            50, 75, size=(151, 203)
        ),
        "padded": lambda: whole.crop_corner(-40, -60, size=(400, 500)),
        "padded and scaled": lambda: whole.crop_corner(-41, -61, size=(403, 507), scale=0.6),
        "twice": lambda: whole.crop_corner(50, 60, size=(400, 500)).crop_corner(50, 90, size=(301, 403)),
    }[case]()
    inside = container.subset(table)
    # spots whose disk the border does not cut
    scale = container.data.attrs["scale"]
    placed = from_anndata(inside, container)
    places, (width, height) = spots_px(placed), contract.image_size(placed)
    far = ((places[:, :2] > 20) & (places[:, :2] < np.array([width, height]) - 20)).all(axis=1)
    assert far.sum() >= 6
    np.testing.assert_allclose(disks(placed)[far], 0.0, atol=0.05 if scale == 1 else 0.35)
    np.testing.assert_allclose(places[:, 2], 31.0 * scale, rtol=3e-3)
    with pytest.raises(ValueError, match=r"within the crop of the `ImageContainer`.*container.subset\(adata\)"):
        from_anndata(table, container)


def test_layers_and_libraries_of_a_container() -> None:
    image, table = marked()
    container = squidpy.im.ImageContainer(image, layer="image", library_id="V1")
    container.add_img(image[..., :1], layer="mask")
    with pytest.raises(KeyError, match=r"Expected one layer .* found \['image', 'mask'\].*`img_layer=`"):
        from_anndata(table, container)
    with pytest.raises(KeyError, match="No layer 'none'"):
        from_anndata(table, container, img_layer="none")
    with pytest.raises(ValueError, match="Expected an RGB image"):
        from_anndata(table, container, img_layer="mask")
    with pytest.raises(ValueError, match="`img_layer` is for an `ImageContainer`"):
        from_anndata(table, image, img_layer="image")
    assert contract.image_size(section(table, container, img_layer="image")) == (640, 500)
    stack = squidpy.im.ImageContainer.concat(
        [squidpy.im.ImageContainer(each, layer="image") for each in (image, 255 - image)], library_ids=["V0", "V1"]
    )
    sdata = section(table, stack)
    np.testing.assert_array_equal(np.moveaxis(contract.levels(sdata, "he")[0].data.compute(), 0, -1), 255 - image)
    table.uns["spatial"]["V2"] = table.uns["spatial"].pop("V1")
    with pytest.raises(KeyError, match=r"No library 'V2' in the `ImageContainer`; its libraries: \['V0', 'V1'\]"):
        from_anndata(table, stack)


# --------------------------------------------------------------------------------------------------
# the spot's diameter and the resolution


FACTORS = {"spot_diameter_fullres": 65.0, "fiducial_diameter_fullres": 105.0, "tissue_hires_scalef": 0.5}


@pytest.mark.parametrize(
    ("factors", "options", "diameter", "mpp"),
    [
        (FACTORS, {}, 55.0, 1.0),
        (FACTORS, {"spot_diameter_px": 40.0}, 40.0, 1.0),
        (FACTORS, {"mpp": 0.9}, 55.0, 0.9),
        ({"spot_diameter_fullres": 65.0}, {}, 65.0, None),
        ({"spot_diameter_fullres": 65.0, "tissue_downscaled_fullres_scalef": 0.1}, {}, 65.0, None),
    ],
)
def test_whose_diameter_it_is(
    adata: AnnData, factors: dict[str, float], options: dict[str, float], diameter: float, mpp: float | None
) -> None:
    adata.uns["spatial"]["V1"]["scalefactors"] = factors
    sdata = section(adata, IMAGE, **options)
    np.testing.assert_allclose(sdata.shapes["spots"].radius, diameter / 2)
    assert contract.mpp(sdata) == mpp
    # an array that is not hexagonal says nothing
    rows, columns = np.divmod(np.arange(20), 5)
    adata.obs["array_row"], adata.obs["array_col"] = rows, columns
    adata.obsm["spatial"] = np.stack([20 + 60.0 * columns, 20 + 60.0 * rows], axis=1)
    np.testing.assert_allclose(section(adata, IMAGE, **options).shapes["spots"].radius, diameter / 2)
    adata.obs["array_row"], adata.obs["array_col"] = rows, 2 * columns + rows % 2
    np.testing.assert_allclose(section(adata, IMAGE, **options).shapes["spots"].radius, diameter / 2)


def test_resolution_of_the_file(bundles: Path, tmp_path: Path) -> None:
    import tifffile

    peer = peers.squidpy_visium(bundles)
    for stated, told in ((0.49, False), (0.4, True)):
        path = tmp_path / f"{stated}.tif"
        per_cm = 10_000 / stated
        tifffile.imwrite(path, peer.array, tile=(256, 256), resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
        if told:
            with pytest.warns(
                UserWarning, match=r"states 0.4000 µm per pixel, and this value is used. The spots of 'tissue' are"
            ):
                sdata = from_anndata(peer.data, path)
        else:
            sdata = section(peer.data, path)
        assert contract.mpp(sdata) == pytest.approx(stated)
        assert contract.mpp(section(peer.data, path, mpp=0.5)) == 0.5


# --------------------------------------------------------------------------------------------------
# the analysis goes on


@pytest.mark.slow
def test_an_analysis_survives(bundles: Path, tmp_path: Path) -> None:
    peer = peers.lognormalize(peers.squidpy_visium(bundles))
    adata = peer.data
    adata.raw = adata.copy()
    adata.obs["cell type"] = pd.Categorical(["a", "b"] * 20)
    adata.obs["in_tissue"] = 0
    adata.uns["cell type_colors"] = ["#ff0000", "#0000ff"]
    adata.varm["loadings"] = np.ones((12, 2))
    squidpy.gr.spatial_neighbors(adata)
    scanpy.pp.pca(adata, n_comps=3)
    before = adata.copy()
    with pytest.warns(
        UserWarning, match=r"2 of the names .*obs\['cell type'\]: 'cell_type', uns\['cell type_colors'\]"
    ):
        sdata = from_anndata(adata, peer.array)
    sdata.write(tmp_path / "section.zarr")
    for table in (sdata.tables["counts"], spatialdata.read_zarr(tmp_path / "section.zarr").tables["counts"]):
        assert table.obs_names.equals(before.obs_names)
        np.testing.assert_array_equal(table.X.toarray(), before.X.toarray())
        np.testing.assert_array_equal(table.layers["counts"].toarray(), before.layers["counts"].toarray())
        np.testing.assert_array_equal(table.raw.X.toarray(), before.raw.X.toarray())
        assert set(table.obsp) == set(before.obsp)
        np.testing.assert_array_equal(
            table.obsp["spatial_connectivities"].toarray(), before.obsp["spatial_connectivities"].toarray()
        )
        assert set(table.varm) == {"loadings", "PCs"}
        assert {"pca", "log1p", "spatial_neighbors", "cell_type_colors"} <= set(table.uns)
        assert table.obs["cell_type"].tolist() == before.obs["cell type"].tolist()
        np.testing.assert_array_equal(table.obsm["X_pca"], before.obsm["X_pca"])
    np.testing.assert_array_equal(contract.counts(sdata).X.toarray(), before.layers["counts"].toarray())
    # and the analysis itself is as it was
    assert adata.uns.keys() == before.uns.keys()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pp.select_genes(sdata, n_top=3)


def test_a_file_that_stays_on_disk(adata: AnnData, tmp_path: Path) -> None:
    import anndata

    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(contract.counts(from_anndata(backed, IMAGE)).X.toarray(), adata.X.toarray())


def test_squidpy_draws_on_the_section(bundles: Path) -> None:
    import matplotlib.pyplot as plt

    peer = peers.hires_only(bundles)
    with pytest.warns(UserWarning, match="No full-resolution image"):
        sdata = from_anndata(peer.data)
    ax = squidpy.pl.spatial_scatter(sdata.tables["counts"], color=peer.data.var_names[0], return_ax=True)
    scale = sdata.tables["counts"].uns["spatial"]["tissue"]["scalefactors"]["tissue_hires_scalef"]
    extents = [path.get_extents() for path in ax.collections[0].get_paths()]
    np.testing.assert_allclose(
        [(box.x0 + box.x1, box.y0 + box.y1) for box in extents], 2 * scale * peer.pixels.to_numpy(), atol=1e-3
    )
    np.testing.assert_allclose(extents[0].width, 0.55 * full_pitch(peer) / peer.reduction * scale, rtol=1e-3)
    np.testing.assert_array_equal(np.asarray(ax.images[0].get_array())[100, 200], peer.array[100, 200])
    plt.close("all")
