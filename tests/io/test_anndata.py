"""Sections from analyses begun with scanpy or squidpy."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
import spatialdata
from anndata import AnnData

from stimage_sd import contract
from stimage_sd.io import from_anndata

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


@pytest.mark.parametrize("place", ["layer", "X", "raw", "named"])
def test_counts_are_found_where_they_are(adata: AnnData, place: str) -> None:
    expected = adata.X.toarray()
    if place == "layer":
        adata.layers["counts"] = adata.X.copy()
    elif place == "named":
        adata.layers["umi"] = adata.X.copy()
    elif place == "raw":
        adata.raw = adata.copy()
    if place != "X":
        scanpy.pp.log1p(adata)
    if place == "raw":
        adata = adata[:, :3].copy()
    sdata = from_anndata(adata, IMAGE, layer="umi" if place == "named" else None)
    np.testing.assert_array_equal(contract.counts(sdata).X.toarray(), expected)
    found = contract.info(sdata)["history"][0]["parameters"]["counts"]
    assert (
        found
        == {
            "layer": "`adata.layers['counts']`",
            "X": "`adata.X`",
            "raw": "`adata.raw.X`",
            "named": "`adata.layers['umi']`",
        }[place]
    )


def test_columns_the_table_needs_for_itself_are_kept_under_another_name(adata: AnnData) -> None:
    adata.obs["region"] = "cortex"
    adata.obs["instance_id"] = np.arange(20) + 100
    sdata = from_anndata(adata, IMAGE)
    table = contract.counts(sdata)
    assert (table.obs["region_original"] == "cortex").all()
    np.testing.assert_array_equal(table.obs["instance_id"], sdata.shapes["spots"].index)


def test_no_counts_anywhere(adata: AnnData) -> None:
    scanpy.pp.log1p(adata)
    with pytest.raises(ValueError, match=r"Expected raw counts in `layers\['counts'\]`, `X` or `raw.X` .*`layer=`"):
        from_anndata(adata, IMAGE)
    adata.layers["scaled"] = adata.X * -1.0
    with pytest.raises(ValueError, match=r"layers\['scaled'\]`, found negative values"):
        from_anndata(adata, IMAGE, layer="scaled")
    with pytest.raises(KeyError, match="No layer 'none'"):
        from_anndata(adata, IMAGE, layer="none")


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
    assert from_anndata(adata, IMAGE, spot_diameter_px=10.0).shapes["spots"].radius.iloc[0] == 5.0
    del adata.obsm["spatial"]
    with pytest.raises(KeyError, match=r'Expected `adata.obsm\["spatial"\]`'):
        from_anndata(adata, IMAGE)


def test_spots_outside_or_nowhere(adata: AnnData) -> None:
    adata.obsm["spatial"][0] = (600.0, 10.0)
    with pytest.raises(ValueError, match=r"inside its image of 500 x 400 px .* found 1 of 20 outside"):
        from_anndata(adata, IMAGE)
    adata.obsm["spatial"][0] = np.nan
    with pytest.raises(ValueError, match="Expected finite spot positions"):
        from_anndata(adata, IMAGE)
