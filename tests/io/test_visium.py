"""Space Ranger's outputs, old and new, and what can be wrong with them."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.io
import scipy.sparse as sp
import spatialdata

from stimage_sd import contract
from stimage_sd.datasets import synthetic_visium, synthetic_visium_hd
from stimage_sd.datasets._tenx_matrix import write_10x_h5
from stimage_sd.io import visium

COARSE = "ignore:No full-resolution image:UserWarning"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_visium(tmp_path_factory.mktemp("visium") / "run7", n_spots=40, n_genes=12, seed=3)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "run7"))


def positions_of(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "spatial" / "tissue_positions.csv", index_col="barcode")


def same_section(first: spatialdata.SpatialData, second: spatialdata.SpatialData) -> None:
    ours, theirs = contract.counts(first), contract.counts(second)
    assert list(ours.obs_names) == list(theirs.obs_names)
    np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())
    np.testing.assert_array_equal(ours.obsm["spatial"], theirs.obsm["spatial"])
    np.testing.assert_array_equal(first.shapes["spots"].radius, second.shapes["spots"].radius)


def test_full_resolution_section(run: Path) -> None:
    sdata = visium(run, image=run / "image.tif")
    table = contract.counts(sdata)
    in_tissue = positions_of(run).query("in_tissue == 1")
    expected = scanpy.read_10x_h5(run / "filtered_feature_bc_matrix.h5")
    assert sdata.attrs["stimage_sd"]["platform"] == "visium"
    assert sdata.attrs["stimage_sd"]["sample"] == "run7"
    assert sdata.attrs["stimage_sd"]["mpp"] == pytest.approx(0.5, rel=0.005)
    assert table.n_obs == len(in_tissue) == 40
    assert table.X.dtype == np.int32
    np.testing.assert_array_equal(table.X.toarray(), expected[table.obs_names].X.toarray())
    rows, columns = (in_tissue.loc[table.obs_names, name] for name in ("pxl_row_in_fullres", "pxl_col_in_fullres"))
    np.testing.assert_array_equal(table.obsm["spatial"], np.column_stack([columns, rows]).astype(float))
    np.testing.assert_array_equal(table.obs["array_row"], in_tissue.loc[table.obs_names, "array_row"])
    np.testing.assert_allclose(sdata.shapes["spots"].radius, 55.0 / 2.0 / sdata.attrs["stimage_sd"]["mpp"])
    assert isinstance(contract.levels(sdata, "he")[0].data, da.Array)


def test_rows_are_y_and_columns_are_x(run: Path) -> None:
    """A dot drawn at a spot's row and column is found under the spot."""
    spot = positions_of(run).query("in_tissue == 1").iloc[7]
    row, column = int(spot["pxl_row_in_fullres"]), int(spot["pxl_col_in_fullres"])
    assert abs(row - column) > 50
    size = contract.levels(visium(run, image=run / "image.tif"), "he")[0].shape[1]
    drawn = np.full((size, size, 3), 255, np.uint8)
    drawn[row - 3 : row + 4, column - 3 : column + 4] = (10, 200, 30)
    cv2.imwrite(str(run / "drawn.png"), drawn[..., ::-1])
    sdata = visium(run, image=run / "drawn.png")
    x, y = contract.counts(sdata).obsm["spatial"][list(contract.counts(sdata).obs_names).index(spot.name)].astype(int)
    np.testing.assert_array_equal(contract.levels(sdata, "he")[0].data[:, y, x].compute(), [10, 200, 30])


def test_without_a_full_resolution_image_all_is_in_pixels_of_the_hires(run: Path) -> None:
    full = visium(run, image=run / "image.tif")
    with pytest.warns(UserWarning, match="No full-resolution image given: tissue_hires_image.png"):
        hires = visium(run)
    scale = json.loads((run / "spatial" / "scalefactors_json.json").read_text())["tissue_hires_scalef"]
    assert contract.levels(hires, "he")[0].shape[1] == contract.levels(full, "he")[0].shape[1] * scale
    np.testing.assert_allclose(contract.counts(hires).obsm["spatial"], contract.counts(full).obsm["spatial"] * scale)
    np.testing.assert_allclose(hires.shapes["spots"].radius, full.shapes["spots"].radius * scale)
    assert contract.info(hires)["mpp"] == pytest.approx(contract.info(full)["mpp"] / scale)


@pytest.mark.parametrize("form", ["list", "list with header", "parquet", "outs", "prefix", "mtx"])
def test_every_form_gives_the_same_section(run: Path, form: str) -> None:
    image = run.parent / "image.tif"
    shutil.copy(run / "image.tif", image)
    expected = visium(run, image=image)
    positions = run / "spatial" / "tissue_positions.csv"
    target = run
    if form == "list":
        positions_of(run).to_csv(run / "spatial" / "tissue_positions_list.csv", header=False)
        positions.unlink()
    elif form == "list with header":
        positions.rename(run / "spatial" / "tissue_positions_list.csv")
    elif form == "parquet":
        positions_of(run).reset_index().to_parquet(run / "spatial" / "tissue_positions.parquet")
        positions.unlink()
    elif form == "outs":
        target = run.parent / "run8"
        target.mkdir()
        run.rename(target / "outs")
    elif form == "prefix":
        (run / "filtered_feature_bc_matrix.h5").rename(run / "V1_Breast_filtered_feature_bc_matrix.h5")
        positions.rename(run / "spatial" / "GSM1_tissue_positions.csv")
    else:
        write_mtx(run)
    found = visium(target, image=image)
    same_section(found, expected)
    assert contract.sample(found) == ("run8" if form == "outs" else "run7")


def write_mtx(run: Path, name: str = "filtered_feature_bc_matrix") -> None:
    matrix = run / f"{name}.h5"
    table = scanpy.read_10x_h5(matrix)
    folder = run / name
    folder.mkdir()
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(table.X.T.astype(int)))
    features = "".join(f"{row.gene_ids}\t{name}\tGene Expression\n" for name, row in table.var.iterrows())
    for name, text in (("features.tsv", features), ("barcodes.tsv", "\n".join(table.obs_names) + "\n")):
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx").read_bytes()))
    (folder / "matrix.mtx").unlink()
    matrix.unlink()


@pytest.mark.filterwarnings("ignore:.*alpha channel:UserWarning")
@pytest.mark.filterwarnings(COARSE)
def test_real_cut_down_run(data_dir: Path) -> None:
    with pytest.warns(UserWarning, match="4135 of 4235 in tissue have no counts; 100 are kept"):
        sdata = visium(data_dir / "visium_mini")
    table = contract.counts(sdata)
    assert table.shape == (100, 100)
    # 65 µm over the published spot diameter is the resolution that 10x states for this section.
    assert contract.info(sdata)["mpp"] * 0.150015 == pytest.approx(65.0 / 89.42751063343188, rel=0.01)
    expected = pd.read_csv(data_dir / "visium_mini" / "spatial" / "tissue_positions_list.csv", header=None, index_col=0)
    np.testing.assert_allclose(table.obsm["spatial"], expected.loc[table.obs_names, [5, 4]].to_numpy() * 0.150015)


def test_round_trip(run: Path, tmp_path: Path) -> None:
    sdata = visium(run, image=run / "image.tif")
    sdata.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    same_section(back, sdata)
    assert back.attrs == sdata.attrs
    np.testing.assert_array_equal(
        contract.levels(back, "he")[0].data.compute(), contract.levels(sdata, "he")[0].data.compute()
    )


def test_given_and_estimated_resolution(run: Path) -> None:
    assert contract.info(visium(run, image=run / "image.tif", mpp=0.25))["mpp"] == 0.25
    positions = positions_of(run)
    lone = positions.query("in_tissue == 1").index[:1]
    positions.loc[lone].to_csv(run / "spatial" / "tissue_positions.csv")
    sdata = visium(run, image=run / "image.tif")
    assert contract.info(sdata)["mpp"] == pytest.approx(0.5)
    assert contract.info(sdata)["history"][0]["parameters"]["mpp_source"] == "spot diameter"


def test_pitch_and_diameter_that_disagree(run: Path) -> None:
    path = run / "spatial" / "scalefactors_json.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"spot_diameter_fullres": 100.0}))
    with pytest.warns(UserWarning, match="which gives 0.500. µm per pixel and is used; .* 0.6500"):
        sdata = visium(run, image=run / "image.tif")
    assert contract.info(sdata)["mpp"] == pytest.approx(0.5, rel=0.005)


def test_image_of_another_size(run: Path) -> None:
    size = contract.levels(visium(run, image=run / "image.tif"), "he")[0].shape[1]
    cv2.imwrite(str(run / "larger.png"), np.full((2 * size, 2 * size, 3), 255, np.uint8))
    with pytest.warns(UserWarning, match="the input image of Space Ranger had about"):
        visium(run, image=run / "larger.png")
    cv2.imwrite(str(run / "smaller.png"), np.full((300, 300, 3), 255, np.uint8))
    with (
        pytest.warns(UserWarning, match="had about"),
        pytest.raises(ValueError, match="inside its image of 300 x 300 px"),
    ):
        visium(run, image=run / "smaller.png")


def test_repeated_genes(run: Path) -> None:
    import h5py

    with h5py.File(run / "filtered_feature_bc_matrix.h5", "r+") as file:
        names = file["matrix/features/name"]
        names[1] = names[0]
    with pytest.warns(UserWarning, match=r"1 gene name\(s\) appear more than once .*SIGNAL001"):
        table = contract.counts(visium(run, image=run / "image.tif"))
    assert table.var_names[1] == "SIGNAL001-1"


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("filtered_feature_bc_matrix.h5", "did not find run7/filtered_feature_bc_matrix.h5 or"),
        ("spatial/tissue_positions.csv", "did not find spatial/tissue_positions.parquet or"),
        ("spatial/scalefactors_json.json", "did not find spatial/scalefactors_json.json"),
    ],
)
def test_missing_parts(run: Path, removed: str, message: str) -> None:
    (run / removed).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        visium(run, image=run / "image.tif")


def test_missing_folder_image_or_hires(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected the folder of a Space Ranger run"):
        visium(run / "elsewhere")
    with pytest.raises(FileNotFoundError, match="Expected an image file at"):
        visium(run, image=run / "none.tif")
    (run / "spatial" / "tissue_hires_image.png").unlink()
    with pytest.raises(FileNotFoundError, match="Pass the full-resolution image as `image=`"):
        visium(run)


def test_no_shared_barcode(run: Path) -> None:
    positions = positions_of(run)
    positions.index = [name.replace("-1", "-9") for name in positions.index]
    positions.index.name = "barcode"
    positions.to_csv(run / "spatial" / "tissue_positions.csv")
    with pytest.raises(ValueError, match=r"share no barcode. .*-1'.*-9'"):
        visium(run, image=run / "image.tif")


def test_tables_that_are_not_space_rangers(run: Path) -> None:
    positions_of(run).drop(columns="array_col").to_csv(run / "spatial" / "tissue_positions.csv")
    with pytest.raises(ValueError, match=r"Expected the columns .*array_col"):
        visium(run, image=run / "image.tif")
    (run / "spatial" / "scalefactors_json.json").write_text('{"spot_diameter_fullres": 0}')
    with pytest.raises(ValueError, match="missing or not positive"):
        visium(run, image=run / "image.tif")
    (run / "spatial" / "scalefactors_json.json").write_text("nothing")
    with pytest.raises(ValueError, match="Expected JSON in"):
        visium(run, image=run / "image.tif")


def test_folders_of_something_else(run: Path) -> None:
    shutil.copy(run / "filtered_feature_bc_matrix.h5", run / "A_filtered_feature_bc_matrix.h5")
    (run / "filtered_feature_bc_matrix.h5").rename(run / "B_filtered_feature_bc_matrix.h5")
    with pytest.raises(ValueError, match=r"Expected one filtered_feature_bc_matrix.h5"):
        visium(run)
    (run / "binned_outputs").mkdir()
    with pytest.raises(ValueError, match="Visium HD"):
        visium(run)


# --------------------------------------------------------------------------------------------------
# what people have


def change_positions(run: Path, change: Callable[[pd.DataFrame], object]) -> None:
    """Write the positions anew, with a change that is made in place."""
    positions = positions_of(run)
    change(positions)
    positions.to_csv(run / "spatial" / "tissue_positions.csv")


def test_counts_and_positions_that_differ_are_spoken_of(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Barcodes of", category=UserWarning)
        visium(run, image=run / "image.tif")
    inside = positions_of(run).query("in_tissue == 1").index

    def leave_out(positions: pd.DataFrame) -> None:
        positions.loc[inside[:12], "in_tissue"] = 0
        positions.loc[positions.index.difference(inside)[:5], "in_tissue"] = 1

    change_positions(run, leave_out)
    message = r"12 of 40 with counts are not in tissue, 5 of 33 in tissue have no counts; 28 are kept.* of one section"
    with pytest.warns(UserWarning, match=message):
        sdata = visium(run, image=run / "image.tif")
    assert sorted(contract.counts(sdata).obs_names) == sorted(inside[12:])


@pytest.mark.parametrize("form", ["quoted", "BOM", "UTF-16", "semicolons", "boolean", "list with BOM"])
def test_positions_as_other_programs_save_them(run: Path, form: str) -> None:
    expected = visium(run, image=run / "image.tif")
    path = run / "spatial" / "tissue_positions.csv"
    text = path.read_text()
    if form == "quoted":
        positions_of(run).to_csv(path, quoting=csv.QUOTE_ALL)
    elif form == "BOM":
        path.write_text(text, encoding="utf-8-sig")
    elif form == "UTF-16":
        path.write_text(text, encoding="utf-16")
    elif form == "semicolons":
        path.write_text(text.replace(",", ";"))
    elif form == "boolean":
        positions_of(run).astype({"in_tissue": bool}).to_csv(path)
    else:
        listed = positions_of(run).to_csv(header=False, quoting=csv.QUOTE_NONNUMERIC)
        path.unlink()
        (run / "spatial" / "tissue_positions_list.csv").write_text(listed, encoding="utf-8-sig")
    same_section(visium(run, image=run / "image.tif"), expected)


def test_spots_off_the_image_are_left_out_and_counted(run: Path) -> None:
    expected = visium(run, image=run / "image.tif")
    inside = positions_of(run).query("in_tissue == 1").index
    change_positions(run, lambda table: table.__setitem__(
        "pxl_col_in_fullres", table["pxl_col_in_fullres"].where(~table.index.isin(inside[:3]), -40)))  # fmt: skip
    with pytest.warns(UserWarning, match=r"spots of section 'run7' inside its image .*3 of 40 outside.* left out"):
        sdata = visium(run, image=run / "image.tif")
    table, whole = contract.counts(sdata), contract.counts(expected)
    assert sorted(table.obs_names) == sorted(inside[3:])
    np.testing.assert_array_equal(table.X.toarray(), whole[table.obs_names].X.toarray())
    units = contract.find_units(sdata)
    np.testing.assert_array_equal(units.positions(sdata), whole[table.obs_names].obsm["spatial"])
    change_positions(run, lambda table: table.__setitem__("pxl_col_in_fullres", -40))
    with pytest.raises(ValueError, match=r"40 of 40 outside.*Pass the image"):
        visium(run, image=run / "image.tif", mpp=0.5)


@pytest.mark.parametrize("form", ["h5", "mtx"])
def test_a_raw_matrix_gives_the_spots_in_tissue(run: Path, form: str) -> None:
    expected = visium(run, image=run / "image.tif")
    path = run / "filtered_feature_bc_matrix.h5"
    table = scanpy.read_10x_h5(path)
    path.unlink()
    names = positions_of(run).index
    counts = np.full((len(names), table.n_vars), 7)
    counts[names.get_indexer(table.obs_names)] = table.X.toarray()
    write_10x_h5(run / "raw_feature_bc_matrix.h5", sp.csr_matrix(counts), names, table.var_names, attributes={})
    if form == "mtx":
        write_mtx(run, "raw_feature_bc_matrix")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Barcodes of", category=UserWarning)
        found = visium(run, image=run / "image.tif")
    names = contract.counts(expected).obs_names
    np.testing.assert_array_equal(
        contract.counts(found)[names].X.toarray(), contract.counts(expected)[names].X.toarray()
    )


def test_antibodies_become_proteins_of_the_same_spots(run: Path, tmp_path: Path) -> None:
    path = run / "filtered_feature_bc_matrix.h5"
    table = scanpy.read_10x_h5(path)
    types = ["Gene Expression"] * 9 + ["Antibody Capture"] * 2 + ["Custom"]
    counts = sp.csr_matrix(table.X, dtype=np.int32)
    write_10x_h5(path, counts, table.obs_names, table.var_names, attributes={}, feature_types=types)
    with pytest.warns(UserWarning, match=r"Features of the types \['Custom'\] .* left out"):
        sdata = visium(run, image=run / "image.tif")
    proteins = contract.proteins(sdata)
    assert contract.counts(sdata).n_vars == 9
    assert proteins.var_names.tolist() == table.var_names[9:11].tolist()
    np.testing.assert_array_equal(proteins.X, counts[:, 9:11].toarray())
    assert proteins.obs_names.tolist() == contract.counts(sdata).obs_names.tolist()
    np.testing.assert_array_equal(proteins.obsm["spatial"], contract.counts(sdata).obsm["spatial"])
    assert contract.find_units(sdata, against="proteins").shapes == "spots"
    sdata.write(tmp_path / "section.zarr")
    np.testing.assert_array_equal(contract.proteins(spatialdata.read_zarr(tmp_path / "section.zarr")).X, proteins.X)


def test_barcodes_that_are_there_twice(run: Path) -> None:
    positions = positions_of(run)
    pd.concat([positions, positions.iloc[:1]]).to_csv(run / "spatial" / "tissue_positions.csv")
    with pytest.raises(ValueError, match=r"every barcode once in .*tissue_positions\.csv, found 1 repeated.*Leave one"):
        visium(run, image=run / "image.tif")


def test_positions_that_are_missing(run: Path) -> None:
    positions = positions_of(run).astype({"pxl_row_in_fullres": float})
    positions.iloc[3, 3] = np.nan
    positions.to_csv(run / "spatial" / "tissue_positions.csv")
    with pytest.raises(ValueError, match=r"numbers in every row of .*tissue_positions\.csv"):
        visium(run, image=run / "image.tif")


def test_folders_of_visium_hd_are_referred_to_their_reader(tmp_path: Path) -> None:
    run = synthetic_visium_hd(tmp_path / "hd", size_um=250.0, n_genes=9)
    folder = run / "binned_outputs" / "square_008um"
    for path in (run, folder):
        with pytest.raises(ValueError, match=r"stimage_sd\.io\.visium_hd"):
            visium(path)
    scales = json.loads((folder / "spatial" / "scalefactors_json.json").read_text())
    del scales["bin_size_um"]
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    with pytest.raises(ValueError, match=r"found bins .* such as 's_008um_.*stimage_sd\.io\.visium_hd"):
        visium(folder)
