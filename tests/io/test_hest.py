"""Samples of HEST-1k."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import pyvips
import scipy.sparse as sp
import shapely
import spatialdata

from stimage_sd import contract, pp
from stimage_sd.io import hest

WIDTH, HEIGHT, SPOT_UM, MPP = 2100, 1600, 55.0, 0.7
#: the metadata of a sample of Visium, as HEST writes it: a bare NaN where nothing is known
METADATA = """{"id": "NCBI681", "image_filename": "NCBI681.tif", "organ": "Breast", "species": "Homo sapiens",
 "disease_state": "Cancer", "oncotree_code": "IDC", "patient": NaN, "st_technology": "Visium", "treatment_comment": NaN,
 "pixel_size_um_embedded": 0.5, "pixel_size_um_estimated": 0.7, "fullres_px_width": 2100, "fullres_px_height": 1600,
 "spots_under_tissue": 30, "inter_spot_dist": 100.0, "spot_diameter": 55.0}"""


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generic pyramidal TIFF, as libvips saves it for HEST."""
    generator = np.random.default_rng(0)
    pixels = np.full((HEIGHT, WIDTH, 3), (200, 120, 180), np.uint8)
    pixels[:, :300] = 245
    pixels = np.clip(pixels + generator.integers(-9, 9, pixels.shape), 0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("hest") / "NCBI681.tif"
    image = pyvips.Image.new_from_memory(pixels.tobytes(), WIDTH, HEIGHT, 3, "uchar").copy(interpretation="srgb")
    image.tiffsave(
        str(path), pyramid=True, tile=True, tile_width=256, tile_height=256, compression="jpeg", xres=1000 / MPP,
        yres=1000 / MPP,
    )  # fmt: skip
    return path


@pytest.fixture
def folder(tmp_path: Path, picture_file: Path) -> Path:
    """The folder of a data set of one sample."""
    return made(tmp_path / "hest", picture_file)


def made(folder: Path, picture: Path) -> Path:
    for name in ("st", "wsis", "metadata", "cellvit_seg", "tissue_seg"):
        (folder / name).mkdir(parents=True)
    shutil.copy(picture, folder / "wsis" / "NCBI681.tif")
    (folder / "metadata" / "NCBI681.json").write_text(METADATA)
    sample().write_h5ad(folder / "st" / "NCBI681.h5ad")
    return folder


def sample() -> ad.AnnData:
    generator = np.random.default_rng(1)
    columns, rows = np.meshgrid(np.arange(6), np.arange(5))
    x, y = 400 + 143 * columns.ravel() + 0.5, 200 + 143 * rows.ravel()
    adata = ad.AnnData(
        sp.csr_matrix(generator.poisson(2.0, (30, 7)).astype(np.float32)),
        obs=pd.DataFrame(
            {
                "in_tissue": True, "pxl_col_in_fullres": x, "pxl_row_in_fullres": y,
                "array_row": rows.ravel(), "array_col": columns.ravel(), "n_counts": 1.0,
            },
            index=[f"AAAC{number:04d}-1" for number in range(30)],
        ),
        var=pd.DataFrame({"mito": False}, index=[f"GENE{number}" for number in range(7)]),
        obsm={"spatial": np.stack([x, y], axis=1)},
    )  # fmt: skip
    adata.uns["spatial"] = {
        "ST": {
            "images": {"downscaled_fullres": np.full((762, 1000, 3), 200, np.uint8)},
            "scalefactors": {
                "spot_diameter_fullres": SPOT_UM / MPP, "tissue_downscaled_fullres_scalef": 1000 / WIDTH,
            },
        }
    }  # fmt: skip
    return adata


def cellvit() -> list[dict[str, Any]]:
    """Nuclei as HEST writes them: a list of one MultiPolygon per class."""
    places = {"Neoplastic": [(500, 400), (540, 410)], "Inflammatory": [(700, 500)]}
    return [
        {
            "type": "Feature",
            "id": f"140234-id-{name}",
            "geometry": {
                "type": "MultiPolygon",
                "coordinates": [[[[x, y], [x + 9, y], [x + 9, y + 9], [x, y + 9], [x, y]]] for x, y in corners],
            },
            "properties": {"objectType": "annotation", "classification": {"name": name, "color": [255, 0, 0]}},
        }
        for name, corners in places.items()
    ]


def test_a_sample(folder: Path) -> None:
    sdata = hest(folder, "NCBI681")
    section = contract.info(sdata)
    assert (section["sample"], section["platform"], section["mpp"]) == ("NCBI681", "hest", 0.7)
    assert section["metadata"]["species"] == "Homo sapiens"
    assert section["metadata"]["patient"] is None
    assert [step["step"] for step in section["history"]] == ["io.from_anndata", "io.hest"]
    expected, table = sample(), contract.counts(sdata)
    np.testing.assert_array_equal(table.X.toarray(), expected.X.toarray())
    np.testing.assert_array_equal(table.obsm["spatial"][:, 0], expected.obs["pxl_col_in_fullres"])
    np.testing.assert_array_equal(table.obsm["spatial"][:, 1], expected.obs["pxl_row_in_fullres"])
    np.testing.assert_allclose(sdata.shapes["spots"].radius, SPOT_UM / MPP / 2)
    levels = contract.levels(sdata, "he")
    assert levels[0].shape == (3, HEIGHT, WIDTH)
    assert max(levels[-1].shape) <= 1024
    assert set(sdata.shapes) == {"spots"}


def test_a_sample_goes_through_the_steps(folder: Path, tmp_path: Path) -> None:
    sdata = hest(folder, "NCBI681")
    pp.tile(sdata)
    assert contract.tiling(sdata)["size_um"] == pytest.approx(55)
    sdata.write(tmp_path / "section.zarr")
    assert spatialdata.read_zarr(tmp_path / "section.zarr").attrs == sdata.attrs


@pytest.mark.parametrize("form", ["geojson", "zip", "parquet"])
def test_nuclei_and_tissue(folder: Path, form: str) -> None:
    path = folder / "cellvit_seg" / "NCBI681_cellvit_seg.geojson"
    if form == "geojson":
        path.write_text(json.dumps(cellvit(), indent=4))
    elif form == "zip":
        with zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(path.name, json.dumps(cellvit()))
    else:
        parts = [(feature, part) for feature in cellvit() for part in feature["geometry"]["coordinates"]]
        frame = gpd.GeoDataFrame(
            {"class": [feature["properties"]["classification"]["name"] for feature, _ in parts]},
            geometry=[shapely.Polygon(part[0]) for _, part in parts],
        )
        frame["cell_id"] = np.arange(len(frame))
        frame.to_parquet(path.with_suffix(".parquet"))
    tissue = gpd.GeoDataFrame({"tissue_id": [0]}, geometry=[shapely.box(300, 0, 2000, 1600)])
    tissue.to_file(folder / "tissue_seg" / "NCBI681_contours.geojson", driver="GeoJSON")
    sdata = hest(folder, "NCBI681")
    nuclei = contract.nuclei(sdata)
    assert nuclei["cell_type"].tolist() == ["Neoplastic", "Neoplastic", "Inflammatory"]
    assert [geometry.bounds for geometry in nuclei.geometry][1] == (540, 410, 549, 419)
    assert sdata.shapes["tissue_contours"].area.tolist() == [1700 * 1600]
    assert set(hest(folder, "NCBI681", nuclei=False, tissue=False).shapes) == {"spots"}


def test_resolution_and_diameter_that_are_missing(folder: Path) -> None:
    metadata = json.loads(METADATA.replace("NaN", "null"))
    path = folder / "metadata" / "NCBI681.json"
    path.write_text(json.dumps(metadata | {"pixel_size_um_estimated": float("nan")}))
    assert contract.info(hest(folder, "NCBI681"))["mpp"] == 0.5
    assert contract.info(hest(folder, "NCBI681", mpp=0.6))["mpp"] == 0.6
    adata = sample()
    del adata.uns["spatial"]
    adata.write_h5ad(folder / "st" / "NCBI681.h5ad")
    path.write_text(json.dumps(metadata))
    np.testing.assert_allclose(hest(folder, "NCBI681").shapes["spots"].radius, SPOT_UM / MPP / 2)


def test_spots_outside_the_slide(folder: Path) -> None:
    adata = sample()
    adata.obsm["spatial"][:2, 0] = -40.0
    adata.write_h5ad(folder / "st" / "NCBI681.h5ad")
    with pytest.warns(UserWarning, match="2 of 30 spots of sample 'NCBI681' lie outside its slide of 2100 x 1600 px"):
        sdata = hest(folder, "NCBI681")
    assert contract.counts(sdata).obs_names.tolist() == adata.obs_names[2:].tolist()


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No sample 'TENX1' in .*; it has \['NCBI681'\] \(1 in all\)"):
        hest(folder, "TENX1")
    with pytest.raises(FileNotFoundError, match="Expected the file of sample 'NCBI681' at"):
        hest(folder / "st", "NCBI681")
    with pytest.raises(ValueError, match="Expected `mpp` to be a positive number"):
        hest(folder, "NCBI681", mpp=0)
    path = folder / "metadata" / "NCBI681.json"
    path.write_text(METADATA.replace("2100", "4200"))
    with pytest.raises(ValueError, match=r"Expected a slide of 4200 x 1600 px at .*, found 2100 x 1600 px"):
        hest(folder, "NCBI681")
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"Expected an object of JSON in .*, found list"):
        hest(folder, "NCBI681")
    path.write_text('{"id": ')
    with pytest.raises(ValueError, match=r"Expected JSON in .*, found a file that cannot be read"):
        hest(folder, "NCBI681")
    path.write_text(METADATA)
    (folder / "st" / "NCBI681.h5ad").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"Expected an AnnData object .h5ad. in .*NCBI681.h5ad, found a file"):
        hest(folder, "NCBI681")
