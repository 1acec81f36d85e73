"""`stimage-sd info` on everything that the package reads or writes, and on files that it does not know."""

from __future__ import annotations

import json
import re
from pathlib import Path

import anndata as ad
import cv2
import geopandas
import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
import tifffile
from spatialdata.models import Image2DModel, ShapesModel, TableModel

from stimage_sd import datasets, io, models
from stimage_sd._describe import describe

MODELS = Path(__file__).parent / "models" / "stored"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, _session_cache: None) -> Path:
    """Small runs of all platforms."""
    folder = tmp_path_factory.mktemp("runs")
    datasets.synthetic_visium(folder / "visium", n_spots=20, n_genes=6)
    datasets.synthetic_xenium(folder / "xenium", size_um=150.0, n_genes=6)
    datasets.synthetic_visium_hd(folder / "hd", size_um=150.0, n_genes=6)
    return folder


@pytest.fixture(autouse=True)
def _no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the pixels of a TIFF or of a stored image are decoded."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pixels were read")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    monkeypatch.setattr("stimage_sd.io._raster._stream_with_vips", refuse)


def facts(path: Path) -> dict[str, str]:
    """The lines of a description as names and values."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in describe(path).splitlines())


def test_runs_of_space_ranger_and_xenium(runs: Path) -> None:
    visium, hd, xenium = (facts(runs / name) for name in ("visium", "hd", "xenium"))
    assert visium["folder"] == "Visium run 'visium' of Space Ranger"
    assert visium["next"] == f'stimage_sd.io.visium("{runs / "visium"}", image="he.tif")'
    assert hd["folder"].startswith("Visium HD run")
    assert "stimage_sd.io.visium_hd" in hd["next"]
    experiment = json.loads(next((runs / "xenium").rglob("experiment.xenium")).read_text())
    assert xenium["folder"].startswith("Xenium run 'xenium', version")
    assert "transcripts" in xenium["parts"]
    assert "num_cells" not in experiment or xenium["cells"] == str(experiment["num_cells"])
    assert xenium["next"].startswith(f'stimage_sd.io.xenium("{runs / "xenium"}"')


def test_an_incomplete_run_is_refused_as_its_reader_does(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "spatial").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="Expected a Space Ranger output"):
        describe(tmp_path / "run")


def test_matrices_and_features(runs: Path, tmp_path: Path) -> None:
    matrix = next((runs / "visium").rglob("*.h5"))
    assert facts(matrix)["counts"] == "20 x 6"
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((5, 1024), np.float32), np.zeros((5, 2), np.int64)
    assert facts(tmp_path / "features.h5")["features"] == "5 patches x 1,024"
    assert "io.read_tile_features" in facts(tmp_path / "features.h5")["next"]


@pytest.mark.parametrize("mpp", [None, 0.25])
def test_images(tmp_path: Path, mpp: float | None) -> None:
    path = tmp_path / "he.ome.tif"
    metadata = {} if mpp is None else {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
    tifffile.imwrite(path, np.zeros((96, 160, 3), np.uint8), photometric="rgb", tile=(64, 64), metadata=metadata)
    found = facts(path)
    assert found["image"] == "OME-TIFF"
    assert found["size"] == "160 x 96 px, 1 level(s)"
    assert found["colors"] == "RGB"
    assert found["resolution"] == ("not stated" if mpp is None else "0.25 µm per pixel")
    assert found["next"] == f'stimage_sd.io.slide("{path}"{", mpp=MPP" if mpp is None else ""})'


def test_images_of_several_channels_and_without_levels(tmp_path: Path) -> None:
    many = tmp_path / "multiplex.ome.tif"
    tifffile.imwrite(many, np.zeros((5, 40, 60), np.uint16), photometric="minisblack", metadata={"axes": "CYX"})
    assert facts(many)["colors"] == "5 channel(s), no 8-bit RGB"
    assert facts(many)["next"] == f'stimage_sd.io.codex(cells, "{many}")'
    cv2.imwrite(str(tmp_path / "he.png"), np.zeros((30, 40, 3), np.uint8))
    assert facts(tmp_path / "he.png")["size"] == "40 x 30 px, 1 level(s)"


def test_whole_slides(tmp_path: Path) -> None:
    path = datasets.synthetic_slide(tmp_path / "made", size=1024) / "slide.svs"
    found = facts(path)
    assert found["size"].startswith("1,024 x 1,024 px")
    assert found["resolution"] == "0.5 µm per pixel"
    assert found["next"] == f'stimage_sd.io.slide("{path}")'


def test_tables(runs: Path, tmp_path: Path) -> None:
    def table(name: str, text: str) -> dict[str, str]:
        (tmp_path / name).write_text(text)
        return facts(tmp_path / name)

    slides = table("slides.csv", f"slide,path,mpp\na,{runs},0.5\nb,none.svs,0.5\n")
    assert slides["rows"] == "2"
    assert slides["first"] == f"'{runs}' is there"
    assert slides["next"] == f"stimage-sd cohort {tmp_path / 'slides.csv'} --model MODEL --out DIR"
    assert "io.read_loupe" in table("clusters.csv", "Barcode,Cluster\nAAA-1,1\n")["next"]
    assert "io.legacy_st(counts" in table("spots.tsv", "x\ty\tpixel_x\tpixel_y\tselected\n1\t2\t3\t4\t1\n")["next"]
    counts = table("counts.tsv", "\tERBB2\tCD4\n10x12\t3\t0\n11x12\t0\t1\n")
    assert counts["file"] == "counts of legacy Spatial Transcriptomics"
    assert counts["rows"] == "2"
    assert counts["columns"] == "2: ERBB2, CD4"
    assert "io.codex" in table("cells.csv", "Object ID,Centroid X µm,Centroid Y µm,CD3: Mean\n1,2,3,4\n")["next"]
    assert table("scores.csv", "section,gene,pearson\na,ERBB2,0.5\n")["file"] == "scores of stimage_sd.tl.evaluate"
    assert "io.codex" in table("akoya.csv", "cell_id:cell_id,x:x,cyc001_ch001:DAPI1\n1,2,3\n")["next"]
    genes = table("genes.txt", "ERBB2\nCD4\n")
    assert genes["genes"] == "2: ERBB2, CD4"
    assert "--genes" in genes["next"]


def test_tables_that_only_look_like_counts_are_unknown(tmp_path: Path) -> None:
    path = tmp_path / "clusters.tsv"
    for text in ("\tpatient\tlabel\n10x12\tP1\t3\n", "\tlabel\tx\ty\n10x12\tP1\t10\t12\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="no known kind"):
            describe(path)


def test_geojson(tmp_path: Path) -> None:
    ring = [[0, 0], [9, 0], [9, 9], [0, 0]]
    tumor = {"objectType": "annotation", "classification": {"name": "Tumor"}}
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": tumor}
    path = tmp_path / "regions.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature] * 2}))
    assert facts(path)["objects"] == "2 annotation"
    assert facts(path)["classes"] == "Tumor (2)"
    assert facts(path)["next"] == f'stimage_sd.io.read_geojson(section, "{path}")'


def test_anndata(tmp_path: Path) -> None:
    adata = ad.AnnData(np.ones((3, 2), np.float32), obsm={"spatial": np.zeros((3, 2))})
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    for name in ("a.h5ad", "a.zarr"):
        found = facts(tmp_path / name)
        assert found["AnnData"] == "3 x 2"
        assert found["next"].endswith('"), "he.tif")')
    adata.uns["spatial"] = {"library": {"images": {"hires": np.zeros((4, 4, 3), np.float32)}}}
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert facts(tmp_path / "b.h5ad")["images"] == "library (hires: reduced, the H&E file has finer tiles)"
    ad.AnnData(np.ones((3, 2), np.float32)).write_h5ad(tmp_path / "cells.h5ad")
    assert "pp.annotate_cells" in facts(tmp_path / "cells.h5ad")["next"]


def test_objects_of_other_tools(tmp_path: Path) -> None:
    he = Image2DModel.parse(np.full((3, 300, 400), 200, np.uint8), dims=("c", "y", "x"))
    spots = geopandas.GeoDataFrame({"radius": [20.0]}, geometry=[shapely.Point(100, 120)])
    obs = pd.DataFrame({"region": pd.Categorical(["spots"]), "id": [0]}, ["a"])
    table = ad.AnnData(np.ones((1, 2), np.float32), obs=obs)
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="id")
    theirs = spatialdata.SpatialData(
        images={"scan": he}, shapes={"spots": ShapesModel.parse(spots)}, tables={"counts": table}
    )
    theirs.write(tmp_path / "theirs.zarr")
    text = describe(tmp_path / "theirs.zarr")
    assert "SpatialData  of another tool" in text
    assert "tables       counts (1 x 2)" in text
    assert "adopted as   H&E 'scan', resolution unknown" in text
    assert "io.from_spatialdata" in text
    theirs.images["other"] = Image2DModel.parse(np.full((3, 50, 60), 9, np.uint8), dims=("c", "y", "x"))
    theirs.write(tmp_path / "unclear.zarr")
    assert "to settle    Found more than one RGB image: ['other', 'scan']" in describe(tmp_path / "unclear.zarr")


def test_own_stores_and_folders_of_results(runs: Path, tmp_path: Path) -> None:
    section = io.visium(runs / "visium", image=runs / "visium" / "image.tif", sample="own")
    results = tmp_path / "results"
    results.mkdir()
    del section.images["he"]
    section.write(results / "section.zarr")
    (results / "report.html").write_text("<html></html>")
    assert facts(results)["stores"] == "1: section.zarr"
    assert facts(results)["next"] == f"stimage-sd info {results / 'section.zarr'}"
    assert "section      own (visium)" in describe(results / "section.zarr")
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    uns = {"slides": pd.DataFrame({"status": ["predicted"]}), "prediction": {}}
    table = ad.AnnData(np.ones((2, 3), np.float32), uns=uns)
    table.write_h5ad(cohort / "cohort.h5ad")
    pd.DataFrame({"slide": list("abc"), "status": ["predicted", "predicted", "failed"]}).to_csv(cohort / "slides.csv")
    assert facts(cohort)["slides"] == "2 predicted, 1 failed"


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.stimage")), ids=lambda path: path.stem)
def test_models_of_every_kind(path: Path) -> None:
    found = facts(path)
    assert found["model"] == type(models.load(path)).__name__
    assert found["next"]


def test_folders_of_slides_and_of_hest(tmp_path: Path) -> None:
    for name in ("a.svs", "b.svs", "c.ndpi"):
        (tmp_path / name).touch()
    assert facts(tmp_path)["files"] == "2 .svs, 1 .ndpi"
    assert 'glob("*.svs")' in facts(tmp_path)["next"]
    hest = tmp_path / "hest"
    for part in ("st", "wsis"):
        (hest / part).mkdir(parents=True)
    (hest / "st" / "TENX99.h5ad").touch()
    assert facts(hest)["next"] == f'stimage_sd.io.hest("{hest}", "TENX99")'


def test_unknown_files_say_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_text("no data")
    for path in (tmp_path / "notes.doc", tmp_path):
        with pytest.raises(ValueError, match=r"is of no known kind.* Known are zarr stores of SpatialData"):
            describe(path)
    with pytest.raises(FileNotFoundError, match="Nothing at"):
        describe(tmp_path / "missing")
    (tmp_path / "broken.h5ad").write_text("no data")
    with pytest.raises(ValueError, match="Expected an AnnData object"):
        describe(tmp_path / "broken.h5ad")
