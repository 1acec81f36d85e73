"""CODEX and other multiplexed sections: tables of several programs, image and H&E, and what can be wrong with them."""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata
import tifffile
from anndata import AnnData
from spatialdata.transformations import get_transformation

from stimage_sd import contract
from stimage_sd.datasets import synthetic_codex
from stimage_sd.io import codex

AKOYA_MPP = 0.377


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codex")
    run = synthetic_codex(folder / "run", n_spots=25, n_proteins=4, seed=3)
    twin = synthetic_codex(folder / "twin", n_spots=25, n_proteins=4, seed=3, table_format="fcs")
    shutil.move(twin / "cells.fcs", run / "cells.fcs")
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def read(run: Path, cells: str = "cells.csv", **arguments: object) -> spatialdata.SpatialData:
    given = {"he_image": run / "he.tif", "alignment": run / "he_alignment.csv"} | arguments
    return codex(run / cells, run / "multiplex.ome.tif", **given)


def rewrite(run: Path, change: object, name: str = "cells.csv", **arguments: object) -> Path:
    """Change the table of cells and write it under another name."""
    frame = change(pd.read_csv(run / "cells.csv"))
    frame.to_csv(run / name, index=False, **arguments)
    return run / name


def small(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------
# real files


def test_real_tonsil(data_dir: Path) -> None:
    path = data_dir / "codex" / "tonsil-akoya-2018-500.csv"
    sdata = codex(path, mpp=AKOYA_MPP)
    table, raw = contract.proteins(sdata), pd.read_csv(path)
    assert table.shape == (500, 32)
    assert table.X.dtype == np.float32
    np.testing.assert_allclose(table[:, "Ki67"].X.ravel(), raw["cyc002_ch003:Ki67"], rtol=1e-6)
    np.testing.assert_allclose(table.obsm["spatial_um"], raw[["x:x", "y:y"]] * AKOYA_MPP)
    np.testing.assert_allclose(table.obsm["spatial"], raw[["x:x", "y:y"]])
    np.testing.assert_allclose(
        np.pi * sdata.shapes["cells"].radius ** 2, raw["size:size"] * AKOYA_MPP**2, err_msg="areas are kept"
    )
    assert list(table.obs_names[:2]) == ["72993", "19306"]
    assert list(sdata.shapes["cells"].index[:2]) == [72993, 19306]
    assert list(table.var_names[table.var["blank"]]) == ["Blank", *(f"Blank-{number}" for number in range(1, 6))]
    assert table.var.loc["Blank-5", "column"] == "cyc008_ch004:Blank"
    assert {"acquisition_region", "tile_num", "size", "homogeneity"} <= set(table.obs)
    assert contract.info(sdata)["mpp"] == AKOYA_MPP
    assert contract.info(sdata)["platform"] == "codex"
    with pytest.raises(ValueError, match=r"tonsil-akoya-2018-500.csv does not state it.*Pass `mpp=`"):
        codex(path)


def test_real_qptiff(data_dir: Path, tmp_path: Path) -> None:
    image = data_dir / "slides" / "small_vectra.qptiff"
    alone = codex(image=image)
    with tifffile.TiffFile(image) as tiff:
        expected = tiff.series[0].asarray()
    levels = contract.levels(alone, "multiplex")
    assert list(levels[0].c.to_numpy()) == ["DAPI", "FITC", "Cy3"]
    np.testing.assert_array_equal(levels[0].data.compute(), expected)
    assert contract.sample(alone) == "small_vectra"
    assert contract.info(alone)["mpp"] == pytest.approx(0.4965, abs=1e-4)
    cells = small(
        tmp_path / "cells.csv", "CellID,DAPI,FITC,X_centroid,Y_centroid,Area\n1,5,2,1900.5,12,80\n2,6,1,3,4,90\n"
    )
    sdata = codex(cells, image)
    assert contract.proteins(sdata).to_df().to_dict("list") == {"DAPI": [5.0, 6.0], "FITC": [2.0, 1.0]}
    small(cells, "CellID,DAPI,X_centroid,Y_centroid\n1,5,12,1900.5\n")
    with pytest.raises(
        ValueError, match=r"cells of .*cells.csv inside .*small_vectra.qptiff of 1920 x 1440 px .* 1 of 1"
    ):
        codex(cells, image)
    chosen = codex(image=image, channels={"Cy3": "CD8", "DAPI": "nuclei"})
    assert list(contract.levels(chosen, "multiplex")[0].c.to_numpy()) == ["CD8", "nuclei"]
    np.testing.assert_array_equal(contract.levels(chosen, "multiplex")[0].data.compute(), expected[[2, 0]])


# --------------------------------------------------------------------------------------------------
# sections


def test_section_with_everything(run: Path) -> None:
    sdata = read(run)
    table, raw = contract.proteins(sdata), pd.read_csv(run / "cells.csv")
    truth = pd.read_csv(run / "truth_cells.csv")
    assert sorted(sdata.images) == ["he", "multiplex"]
    assert contract.info(sdata)["mpp"] == pytest.approx(0.5)
    np.testing.assert_array_equal(table.obs["instance_id"], raw["cell_id:cell_id"])
    np.testing.assert_allclose(table.obsm["spatial_um"], raw[["x:x", "y:y"]] * 0.8)
    # Positions were rounded to pixels of 0.8 µm, which is 1.6 of the H&E's at most in either direction.
    np.testing.assert_allclose(table.obsm["spatial"], truth[["x", "y"]], atol=1.2)
    placed = spatialdata.transform(sdata.shapes["cells"], to_coordinate_system="global").geometry
    np.testing.assert_allclose(np.column_stack([placed.x, placed.y]), table.obsm["spatial"], atol=1e-6)
    assert sdata.shapes["cells"].index.equals(pd.Index(table.obs["instance_id"]))


def test_csv_and_fcs_give_the_same_section(run: Path) -> None:
    ours, theirs = contract.proteins(read(run)), contract.proteins(read(run, "cells.fcs"))
    assert list(ours.var_names) == list(theirs.var_names)
    assert ours.var.equals(theirs.var)
    assert list(ours.obs_names) == list(theirs.obs_names)
    np.testing.assert_allclose(ours.X, theirs.X, rtol=1e-6)
    np.testing.assert_array_equal(ours.obsm["spatial_um"], theirs.obsm["spatial_um"])
    np.testing.assert_array_equal(ours.obs["size"], theirs.obs["size"])


def test_alignment_that_is_given_in_other_ways(run: Path) -> None:
    matrix = np.loadtxt(run / "he_alignment.csv", delimiter=",")
    np.testing.assert_allclose(
        contract.proteins(read(run, alignment=matrix)).obsm["spatial"], contract.proteins(read(run)).obsm["spatial"]
    )
    same = codex(run / "cells.csv", run / "multiplex.ome.tif", he_image=run / "he.tif", alignment=None)
    assert "global" not in get_transformation(same.shapes["cells"], get_all=True)
    with pytest.raises(ValueError, match=r"run.* not placed|not placed on its H&E yet"):
        contract.find_units(same).positions(same)
    contract.place_instrument(same, np.linalg.inv(np.diag([0.8, 0.8, 1.0]) @ matrix))
    np.testing.assert_allclose(contract.proteins(same).obsm["spatial"], contract.proteins(read(run)).obsm["spatial"])
    with pytest.warns(UserWarning, match=r"he.tif states 0.5000 µm per pixel; by `alignment=` it has 0.8000"):
        identical = read(run, alignment=np.eye(3))
    raw = pd.read_csv(run / "cells.csv")
    np.testing.assert_allclose(contract.proteins(identical).obsm["spatial"], raw[["x:x", "y:y"]])


def test_without_an_image_or_an_he(run: Path) -> None:
    sdata = codex(run / "cells.csv", mpp=0.8, sample="bare")
    assert not sdata.images
    assert contract.sample(sdata) == "bare"
    table = contract.proteins(sdata)
    np.testing.assert_allclose(table.obsm["spatial"] * 0.8, table.obsm["spatial_um"])
    assert contract.info(sdata)["image"] is None
    unaligned = codex(image=run / "multiplex.ome.tif", he_image=run / "he.tif")
    assert contract.info(unaligned)["mpp"] == pytest.approx(0.5)
    assert contract.instrument_matrix(unaligned) is None
    aligned = codex(image=run / "multiplex.ome.tif", he_image=run / "he.tif", alignment=run / "he_alignment.csv")
    np.testing.assert_allclose(contract.instrument_matrix(aligned), contract.instrument_matrix(read(run)), atol=1e-9)


def test_the_image_is_never_read_whole(run: Path) -> None:
    sdata = read(run)
    finest = contract.levels(sdata, "multiplex")[0]
    assert isinstance(finest.data, da.Array)
    assert finest.dtype == np.uint16
    assert max(finest.data.chunksize[1:]) <= 1024
    assert finest.data.chunksize[0] == 1
    region = finest.sel(c="AG02")[100:140, 200:260].data.compute()
    expected = tifffile.imread(run / "multiplex.ome.tif")[2, 100:140, 200:260]
    np.testing.assert_array_equal(region, expected)


def test_round_trip(run: Path, tmp_path: Path) -> None:
    sdata = read(run)
    sdata.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    ours, theirs = contract.proteins(sdata), contract.proteins(back)
    np.testing.assert_array_equal(ours.X, theirs.X)
    np.testing.assert_array_equal(ours.obsm["spatial"], theirs.obsm["spatial"])
    pd.testing.assert_frame_equal(ours.var, theirs.var, check_names=False)
    assert back.attrs == sdata.attrs
    np.testing.assert_allclose(contract.instrument_matrix(back), contract.instrument_matrix(sdata))
    assert list(contract.levels(back, "multiplex")[0].c.to_numpy()) == ["DAPI", "AG01", "AG02", "AG03", "AG04"]
    joined = back.tables["proteins"].obs["instance_id"].to_numpy()
    assert set(joined) == set(back.shapes["cells"].index)


def test_squidpy_draws_the_proteins(run: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import squidpy as sq

    table = contract.proteins(read(run))
    sq.pl.spatial_scatter(table, color=["AG01", "AG02"], library_id=contract.sample(read(run)))
    axes = plt.gcf().axes
    assert axes[0].get_title() == "AG01"
    assert len(axes[0].images) == 1
    plt.close("all")


# --------------------------------------------------------------------------------------------------
# channels


def test_choosing_and_renaming_channels(run: Path) -> None:
    sdata = read(run, channels=["AG03", "cyc002_ch002:AG01"])
    assert list(contract.proteins(sdata).var_names) == ["AG03", "AG01"]
    assert contract.levels(sdata, "multiplex")[0].shape[0] == 5
    renamed = read(run, channels={"AG02": "CD8", "DAPI1": "nuclei"})
    table, whole = contract.proteins(renamed), contract.proteins(read(run))
    assert list(table.var_names) == ["CD8", "nuclei"]
    np.testing.assert_array_equal(table.X, whole[:, ["AG02", "DAPI1"]].X)
    assert list(contract.levels(renamed, "multiplex")[0].c.to_numpy()) == ["DAPI", "AG01", "CD8", "AG03", "AG04"]
    with pytest.raises(ValueError, match=r"Expected the channels \['CD3'\] in .*cells.csv, found \['DAPI1', 'Blank'"):
        read(run, channels=["AG01", "CD3"])
    with pytest.raises(ValueError, match="Expected every channel once"):
        read(run, channels={"AG01": "same", "AG02": "same"})
    with pytest.raises(ValueError, match="list of names or a mapping to new ones, found 'AG01'"):
        read(run, channels="AG01")


def test_unnamed_and_repeated_channels(tmp_path: Path) -> None:
    header = "x:x,y:y,cyc001_ch001:DAPI,cyc001_ch002:,cyc002_ch001:DAPI,cyc002_ch002:Empty-2"
    table = contract.proteins(codex(small(tmp_path / "c.csv", f"{header}\n1,2,3,4,-5.5,6\n"), mpp=1.0))
    assert list(table.var_names) == ["DAPI", "cyc001_ch002", "DAPI-1", "Empty-2"]
    assert list(table.var["blank"]) == [False, False, False, True]
    assert table.X.tolist() == [[3.0, 4.0, -5.5, 6.0]]


# --------------------------------------------------------------------------------------------------
# layouts

QUPATH = "Image\tObject ID\tClassification\tCentroid X µm\tCentroid Y µm\tCell: Area µm^2\tNucleus: Area µm^2\t"
LAYOUTS = {
    "mcmicro.csv": "CellID,DAPI,CD3,X_centroid,Y_centroid,Area,Solidity\n7,1,-2,10,20,12.5,0.9\n8,3,4,12,22,10,0.8\n",
    "qupath.tsv": f"{QUPATH}DAPI: Cell: Mean\tCD3: Cell: Mean\tCD3: Nucleus: Mean\n"
    "a.tif\tid-7\tTumor\t5\t10\t3.125\t2\t1\t-2\t9\na.tif\tid-8\t\t6\t11\t2.5\t1\t3\t4\t9\n",
    "old qupath.txt": f"{QUPATH}Cell: DAPI mean\tCell: CD3 mean\tCell: CD3 max\n"
    "a.tif\t7\tTumor\t5\t10\t3.125\t2\t1\t-2\t9\na.tif\t8\t\t6\t11\t2.5\t1\t3\t4\t9\n",
    "plain.csv": '"",cell type,centroid_x,centroid_y,area,CD3,DAPI\n0,B,10,20,12.5,-2,1\n1,T,12,22,10,4,3\n',
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("compressed", [False, True])
def test_every_layout_gives_the_same_cells(name: str, compressed: bool, tmp_path: Path) -> None:
    path = small(tmp_path / name, LAYOUTS[name])
    if compressed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(LAYOUTS[name].encode()))
    sdata = codex(path, mpp=0.5)
    table = contract.proteins(sdata)
    assert sorted(table.var_names) == ["CD3", "DAPI"]
    assert table[:, ["DAPI", "CD3"]].X.tolist() == [[1.0, -2.0], [3.0, 4.0]]
    assert table.obsm["spatial_um"].tolist() == [[5.0, 10.0], [6.0, 11.0]]
    np.testing.assert_allclose(np.pi * sdata.shapes["cells"].radius ** 2, [3.125, 2.5])
    sdata.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    assert list(back.tables["proteins"].obs_names) == list(table.obs_names)


def test_cells_of_unknown_area_get_circles_of_one_size(tmp_path: Path) -> None:
    sdata = codex(small(tmp_path / "c.csv", "x_um,y_um,CD3\n1,2,3\n4,5,6\n"), mpp=0.5)
    assert list(sdata.shapes["cells"].radius) == [4.0, 4.0]
    assert contract.proteins(sdata).obsm["spatial"].tolist() == [[2.0, 4.0], [8.0, 10.0]]


def test_columns_that_a_store_would_refuse(tmp_path: Path) -> None:
    header = "x,y,cyc001_ch001:A,Centroid dist. µm,region,Size px,size PX,instance_id,_index"
    sdata = codex(small(tmp_path / "c.csv", f"{header}\n1,2,3,0.5,1,8,9,4,0\n"), mpp=0.5)
    sdata.write(tmp_path / "section.zarr")
    obs = spatialdata.read_zarr(tmp_path / "section.zarr").tables["proteins"].obs
    assert {"Centroid_dist._um", "acquisition_region", "Size_px", "size_PX-1", "index"} <= set(obs.columns)
    assert list(obs["instance_id"]) == [4]


# --------------------------------------------------------------------------------------------------
# what can be wrong

FILES = ["cells.csv", "cells.fcs", "multiplex.ome.tif", "he.tif", "he_alignment.csv"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "nonsense"])
def test_every_file_in_turn(run: Path, name: str, harm: str) -> None:
    path = run / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "nonsense": b"\x00\xffno" * 500}[harm]
        )
    expected = FileNotFoundError if harm == "missing" else ValueError
    with pytest.raises(expected, match=name.replace(".", r"\.")):
        read(run, "cells.fcs" if name == "cells.fcs" else "cells.csv")


def test_fcs_without_its_packages_says_which_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "readfcs", None)
    with pytest.raises(ModuleNotFoundError, match=r'readfcs.*pip install "stimage-sd\[codex\]"'):
        read(run, "cells.fcs")


def test_truncation_anywhere_is_noticed_in_fcs(run: Path) -> None:
    content = (run / "cells.fcs").read_bytes()
    for kept in (20, 100, 600, len(content) - 1, len(content) - 400):
        (run / "cells.fcs").write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"complete FCS file, found that .*cells\.fcs"):
            codex(run / "cells.fcs", mpp=0.8)
    (run / "cells.fcs").write_bytes(content.replace(b"|$NEXTDATA|0|", b"|$NEXTDATA|9|"))
    with pytest.raises(ValueError, match=r"cells\.fcs"):
        codex(run / "cells.fcs", mpp=0.8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y,CD3\n", "Expected cells in .*c.csv, found 0 rows"),
        ("x,y,CD3\n1,2,3\n4,5\n", "Expected 3 values per row in .*c.csv"),
        ("x,y,CD3\n1,2,3,4\n4,5,6,7\n", "Expected 3 values per row in .*c.csv"),
        ("x,y,CD3\n1,2,3\n4,5,6,7\n", "complete table of cells in .*c.csv"),
        ("x,y,CD3\n1,2,\n4,5,6\n", "finite numbers in column 'CD3' of .*c.csv, found 1 missing or infinite.* in row 1"),
        ("x,y,CD3\n1,2,3\n4,inf,6\n", "finite numbers in column 'y' of .*c.csv, .* in row 2"),
        ("x,y,CD3\n1,two,3\n4,5,6\n", "Expected numbers in column 'y' of .*c.csv, found text"),
        ("x,y,cyc001_ch001:CD3\n1,2,high\n", "Expected numbers in column 'cyc001_ch001:CD3' of .*c.csv"),
        ("x,y,area\n1,2,3\n", "columns of intensities in .*c.csv, found none among"),
        ("x,y,size,CD3\n1,2,0,3\n", "positive areas in column 'size' of .*c.csv, found 0 in row 1"),
        ("id,x,y,CD3\n5,1,2,3\n5,2,3,4\n", "every cell id once in .*c.csv, found 1 repeated, such as '5'"),
        (
            "region,x,y,cyc001_ch001:A\n1,1,2,3\n2,2,3,4\n",
            r"one picture in .*c.csv, found 2 by column 'region': \[1, 2\]",
        ),
        ("Image,x,y,CD3\na,1,2,3\nb,2,3,4\n", "one picture in .*c.csv, found 2 by column 'Image'"),
    ],
)
def test_tables_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        codex(small(tmp_path / "c.csv", text), mpp=0.5)


def test_positions_that_are_not_found_are_spoken_of(tmp_path: Path) -> None:
    path = small(tmp_path / "c.csv", "pos_a,pos_b,CD3\n1,2,3\n")
    with pytest.raises(
        ValueError, match=r"c.csv, in columns 'x' and 'y', 'X_centroid' .* among \['pos_a', 'pos_b', 'CD3'"
    ):
        codex(path, mpp=0.5)


QUPATH_STARDIST = (
    "Image\tObject ID\tCentroid X µm\tCentroid Y µm\tDetection probability\tArea µm^2\tLength µm\tCircularity\t"
    "Solidity\tMax diameter µm\tMin diameter µm\tDAPI: Mean\tDAPI: Median\tDAPI: Std.Dev.\tDAPI: Max\tCD3: Mean\t"
    "CD3: Median\tCD3: Std.Dev.\tCD3: Max\n"
    "a.tif\tid-7\t5\t10\t0.9\t3.1\t6\t0.9\t0.95\t2\t1.5\t1\t1\t0.5\t2\t-2\t-2\t0.1\t0\n"
)
COSMX = (
    "fov,cell_ID,cell_id,Area,Area.um2,AspectRatio,Width,Height,CenterX_local_px,CenterY_local_px,CenterX_global_px,"
    "CenterY_global_px,Mean.DAPI,Max.DAPI,Mean.CD3,Max.CD3,nCount_RNA,nFeature_RNA\n"
    "1,1,c_1_1,90,3,1.2,9,10,5,6,105,106,1,9,-2,7,300,90\n2,1,c_1_2_1,80,2,1.1,8,9,5,6,205,206,1,8,-2,7,200,80\n"
)
SCIMAP = (
    "CellID,DAPI,CD3,CD3_std,X_centroid,Y_centroid,column_centroid,Area,MajorAxisLength,Eccentricity,imageid,leiden,"
    "kmeans,phenograph_cluster,spatial_lda_1,umap_1,UMAP2,neighborhood_10,nCount\n"
    "7,1,-2,0.5,5,6,6,90,9,0.5,a,3,2,11,0.2,4.5,1.5,2,80\n"
)
FIJI = "Label,X,Y,Area,Perim.,Circ.,Feret,StdDev,Min,Max,AR_ratio,DAPI_mean,DAPI_median,DAPI_sum,CD3_mean,CD3_sd\n"
FIJI += "a,5,6,90,30,0.9,12,0.4,0,9,1.2,1,1.1,90,-2,0.3\n"


@pytest.mark.parametrize(
    ("name", "text", "channels"),
    [
        ("stardist.tsv", QUPATH_STARDIST, ["DAPI", "CD3"]),
        ("cosmx.csv", COSMX, ["DAPI", "CD3"]),
        ("scimap.csv", SCIMAP, ["DAPI", "CD3"]),
        ("fiji.csv", FIJI, ["DAPI_mean", "CD3_mean"]),
    ],
)
def test_measurements_that_are_no_proteins_stay_beside_them(
    name: str, text: str, channels: list[str], tmp_path: Path
) -> None:
    table = contract.proteins(codex(small(tmp_path / name, text), mpp=0.5))
    assert table.var_names.tolist() == channels
    assert table.X[0].tolist() == [1.0, -2.0]
    columns = len(text.splitlines()[0].split("\t" if name.endswith(".tsv") else ","))
    assert table.obs.shape[1] >= columns - 2 - 3  # but for channels, position and id


def test_cosmx_is_placed_by_its_whole_slide(tmp_path: Path) -> None:
    table = contract.proteins(codex(small(tmp_path / "cosmx.csv", COSMX), mpp=0.12))
    assert table.obsm["spatial"].tolist() == [[105.0, 106.0], [205.0, 206.0]]
    assert table.obs_names.tolist() == ["c_1_1", "c_1_2_1"]
    local = COSMX.replace("_global_", "_elsewhere_")
    with pytest.raises(ValueError, match=r"cells of one picture in .*cosmx.csv, found 2 by column 'fov'"):
        codex(small(tmp_path / "cosmx.csv", local), mpp=0.12)


def test_proteins_whose_names_say_otherwise(tmp_path: Path) -> None:
    text = "x,y,CD8,Clusterin,Perforin,PCA3,HLA Class I,SDHA,cluster,MAX\n1,2,3,4,5,6,7,8,9,10\n"
    path = small(tmp_path / "c.csv", text)
    names = ["CD8", "Clusterin", "Perforin", "PCA3", "HLA Class I", "SDHA"]
    assert contract.proteins(codex(path, mpp=0.5)).var_names.tolist() == names
    chosen = contract.proteins(codex(path, mpp=0.5, channels=["MAX", "CD8"]))
    assert chosen.to_df().to_dict("list") == {"MAX": [10.0], "CD8": [3.0]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("compressed", [False, True])
def test_tables_in_other_encodings(encoding: str, compressed: bool, tmp_path: Path) -> None:
    data = LAYOUTS["qupath.tsv"].encode(encoding)
    path = tmp_path / ("c.tsv.gz" if compressed else "c.tsv")
    path.write_bytes(gzip.compress(data) if compressed else data)
    table = contract.proteins(codex(path, mpp=0.5))
    assert table.to_df().to_dict("list") == {"DAPI": [1.0, 3.0], "CD3": [-2.0, 4.0]}
    assert table.obsm["spatial_um"].tolist() == [[5.0, 10.0], [6.0, 11.0]]


def test_cells_off_the_image_are_left_out_and_counted(run: Path) -> None:
    expected = contract.proteins(read(run))
    off = list(range(3))
    rewrite(run, lambda frame: frame.assign(**{"x:x": frame["x:x"].where(~frame.index.isin(off), -5)}), "off.csv")
    with pytest.warns(UserWarning, match=rf"cells of .*off.csv inside .*3 of {expected.n_obs} outside.* left out"):
        sdata = read(run, "off.csv")
    table = contract.proteins(sdata)
    assert table.obs_names.tolist() == expected.obs_names[3:].tolist()
    np.testing.assert_array_equal(table.X, expected.X[3:])
    np.testing.assert_array_equal(table.obsm["spatial"], expected.obsm["spatial"][3:])
    np.testing.assert_array_equal(sdata.shapes["cells"].radius, read(run).shapes["cells"].radius[3:])


def test_an_outlined_region_is_no_picture(tmp_path: Path) -> None:
    path = small(tmp_path / "c.csv", "x,y,region,CD3\n1,2,tumor,3\n1,2,stroma,3\n")
    assert list(contract.proteins(codex(path, mpp=0.5)).obs["acquisition_region"]) == ["tumor", "stroma"]


def test_inconsistent_files(run: Path) -> None:
    far = rewrite(run, lambda frame: frame.assign(**{"x:x": frame["x:x"] + 90_000}), "far.csv")
    with pytest.raises(ValueError, match=r"cells of .*far\.csv inside .*multiplex\.ome\.tif"):
        read(run, far.name)
    backwards = np.linalg.inv(np.loadtxt(run / "he_alignment.csv", delimiter=","))
    backwards[:2, 2] += 9000.0
    np.savetxt(run / "he_alignment.csv", backwards, delimiter=",")
    with pytest.raises(ValueError, match=r"cells on he\.tif .*he_alignment\.csv places them all outside"):
        read(run)
    with pytest.raises(ValueError, match=r"cells on he\.tif .*places them all outside"):
        codex(image=run / "multiplex.ome.tif", he_image=run / "he.tif", alignment=backwards)


def test_arguments_that_do_not_go_together(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected cells, a multiplex image or both, found neither"):
        codex()
    with pytest.raises(ValueError, match="found no H&E"):
        codex(run / "cells.csv", mpp=0.8, alignment=np.eye(3))
    with pytest.raises(ValueError, match="positive number of micrometers per pixel, found -1"):
        codex(run / "cells.csv", mpp=-1)
    with pytest.raises(FileNotFoundError, match=r"at .*run, found a folder"):
        codex(run, mpp=0.8)
    with pytest.raises(ValueError, match=r"named .csv, .tsv, .txt, their .gz, or .fcs, found .*cells.parquet"):
        codex(small(tmp_path / "cells.parquet", "x"), mpp=0.8)
    tifffile.imwrite(tmp_path / "bare.tif", np.zeros((2, 1000, 1000), np.uint16))
    with pytest.raises(ValueError, match=r"bare.tif does not state it. Pass `mpp=`"):
        codex(run / "cells.csv", tmp_path / "bare.tif")


def test_a_resolution_that_is_given_wins(run: Path) -> None:
    table: AnnData = contract.proteins(codex(run / "cells.csv", run / "multiplex.ome.tif", mpp=0.4))
    np.testing.assert_allclose(table.obsm["spatial_um"], 0.4 * pd.read_csv(run / "cells.csv")[["x:x", "y:y"]])


@pytest.mark.parametrize(("separator", "decimal"), [(";", ","), (";", "."), ("\t", "."), (",", ".")])
def test_tables_of_every_language(tmp_path: Path, separator: str, decimal: str) -> None:
    """QuPath writes numbers as the computer's language has them."""
    random = np.random.default_rng(0)
    places, values = random.uniform(10, 300, (20, 2)), random.uniform(0, 5, (20, 2))
    frame = pd.DataFrame({
        "Object ID": [f"id, {number}" for number in range(20)],
        "Centroid X µm": places[:, 0],
        "Centroid Y µm": places[:, 1],
        "Cell: CD3 mean": values[:, 0],
        "Cell: CD8 mean": values[:, 1],
    })  # fmt: skip
    frame.to_csv(tmp_path / "cells.csv", sep=separator, decimal=decimal, index=False)
    table = codex(tmp_path / "cells.csv", mpp=0.5).tables["proteins"]
    assert table.var_names.tolist() == ["CD3", "CD8"]
    np.testing.assert_allclose(table.X, values, rtol=1e-5)
    np.testing.assert_allclose(table.obsm["spatial"], places / 0.5)
