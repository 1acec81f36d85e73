"""Xenium bundles of every version, their H&E, real cut-outs, and what can be wrong with them."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import dask
import dask.array as da
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import scipy.io
import shapely
import spatialdata
import spatialdata_io
import tifffile
from dask.callbacks import Callback
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import contract
from stimage_sd.datasets import synthetic_xenium
from stimage_sd.io import _xenium_transcripts as transcripts_module
from stimage_sd.io import from_anndata, xenium

PIXEL_UM = 0.85
VERSIONS = ("1.0", "2.0", "3.0", "4.0")
TABLES = ("cells", "cell_boundaries", "nucleus_boundaries", "transcripts")


def make(path: Path, **options: object) -> Path:
    return synthetic_xenium(path, **{"size_um": 250.0, "n_genes": 9, "seed": 1, "pixel_um": PIXEL_UM, **options})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("xenium")
    made: dict[str, Path] = {}

    def get(version: str) -> Path:
        if version not in made:
            made[version] = (
                make(folder / "other", seed=2) if version == "other" else make(folder / version, version=version)
            )
        return made[version]

    return get


@pytest.fixture
def run(originals: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(originals("3.0"), tmp_path / "run"))


def read(run: Path, **arguments: object) -> SpatialData:
    """Read with the H&E; no warning is expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, message=".*(cells|xenium|alignment|pixel).*")
        return xenium(run, **{"he_image": run / "he_image.ome.tif", **arguments})


def points(sdata: SpatialData) -> pd.DataFrame:
    return sdata.points["transcripts"].compute()


# --------------------------------------------------------------------------------------------------
# every version


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_reads_to_the_same_truth(originals: Callable[[str], Path], version: str) -> None:
    run = originals(version)
    ours = read(run)
    truth, outlines = pd.read_csv(run / "truth_cells.csv"), pd.read_parquet(run / "cell_boundaries.parquet")
    table = ours.tables["counts"]
    assert list(table.obs_names) == truth["cell_id"].astype(str).to_list()
    assert list(table.var_names) == pd.read_csv(run / "truth_genes.csv")["gene"].to_list()
    # The truth of the counts is a recount of the transcripts, straight from the file.
    raw = pd.read_parquet(run / "transcripts.parquet")
    names = raw["feature_name"].map(lambda name: name.decode() if isinstance(name, bytes) else name)
    good = raw["qv"] >= 20
    recount = pd.crosstab(raw["cell_id"].astype(str)[good], names[good])
    recount = recount.reindex(index=table.obs_names, columns=table.var_names, fill_value=0)
    np.testing.assert_array_equal(table.X.toarray(), recount)
    assert table.X.dtype == np.int32
    controls = pd.crosstab(raw["cell_id"].astype(str)[good], names[good]).reindex(table.obs_names, fill_value=0)
    is_control = [not name.startswith(("SIGNAL", "NOISE")) for name in controls]
    np.testing.assert_array_equal(table.obs["control_counts"], controls.loc[:, is_control].sum(axis=1))
    # transcripts
    found = points(ours)
    assert found["feature_name"].astype(str).to_list() == names.to_list()
    np.testing.assert_array_equal(found[["x", "y", "z", "qv"]], raw[["x_location", "y_location", "z_location", "qv"]])
    owners = raw["cell_id"].astype(str).replace("-1", "UNASSIGNED")
    assert found["cell_id"].to_list() == owners.to_list()
    # outlines: 12 vertices and the first again
    for position in (0, len(table) - 1):
        own = outlines.iloc[13 * position : 13 * position + 13][["vertex_x", "vertex_y"]]
        np.testing.assert_allclose(shapely.get_coordinates(ours.shapes["cells"].geometry.iloc[position]), own)
    assert list(ours.shapes["cells"].index) == list(table.obs["instance_id"])
    assert list(ours.shapes["nuclei"]["cell_id"]) == list(table.obs_names)
    # images
    levels = contract.levels(ours, "dapi")
    assert list(levels[0].c.to_numpy()) == ["DAPI"]
    file = next(run.rglob("*.ome.tif")) if version == "1.0" else next((run / "morphology_focus").iterdir())
    file = run / "morphology_focus.ome.tif" if version == "1.0" else file
    np.testing.assert_array_equal(levels[0].data[0].compute(), tifffile.imread(file))
    assert contract.levels(ours, "he")[0].shape == (3, 512, 512)
    section = contract.info(ours)
    assert (section["sample"], section["platform"]) == (version, "xenium")
    assert section["mpp"] == pytest.approx(0.5)
    matrix = np.loadtxt(run / "truth_alignment.csv", delimiter=",")
    expected = np.linalg.inv(np.diag([PIXEL_UM, PIXEL_UM, 1.0]) @ matrix)
    np.testing.assert_allclose(contract.instrument_matrix(ours), expected, atol=1e-9)


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_differ_in_form_alone(originals: Callable[[str], Path], version: str) -> None:
    ours, theirs = read(originals(version)), read(originals("3.0"))
    np.testing.assert_array_equal(ours.tables["counts"].X.toarray(), theirs.tables["counts"].X.toarray())
    np.testing.assert_allclose(ours.tables["counts"].obsm["spatial"], theirs.tables["counts"].obsm["spatial"])
    assert (ours.shapes["cells"].geometry.array == theirs.shapes["cells"].geometry.array).all()
    np.testing.assert_array_equal(points(ours)[["x", "y", "qv"]], points(theirs)[["x", "y", "qv"]])
    outside = [frame["cell_id"].eq("UNASSIGNED").to_numpy() for frame in (points(ours), points(theirs))]
    np.testing.assert_array_equal(*outside)
    assert 0.05 < outside[0].mean() < 0.95


def test_cells_lie_on_nuclei_of_the_he(originals: Callable[[str], Path]) -> None:
    run = originals("3.0")
    sdata = read(run)
    truth = pd.read_csv(run / "truth_cells.csv")[["x", "y"]].to_numpy()
    # A cell's center is that of its outline: a few micrometers from its nucleus at most.
    away = np.linalg.norm(sdata.tables["counts"].obsm["spatial"] - truth, axis=1)
    assert np.median(away) * 0.5 < 1.5
    assert away.max() * 0.5 < 4.0
    nuclei = spatialdata.transform(sdata.shapes["nuclei"], to_coordinate_system="global").geometry
    np.testing.assert_allclose(np.column_stack([nuclei.centroid.x, nuclei.centroid.y]), truth, atol=1e-3)
    # The picture agrees: the H&E is dark and the DAPI bright there, more than a random place of the tissue is.
    he, dapi = contract.levels(sdata, "he")[0].data.compute(), contract.levels(sdata, "dapi")[0].data[0].compute()
    x, y = truth.astype(int).T
    inside = shapely.contains_xy(nuclei.union_all(), *np.indices(he.shape[1:])[::-1].reshape(2, -1))
    tissue = he.min(axis=0).ravel() < 200
    assert he[0][y, x].mean() < he[0].ravel()[tissue & ~inside].mean() - 20
    column, row = (sdata.tables["counts"].obsm["spatial_um"] / PIXEL_UM).astype(int).T
    assert dapi[row, column].mean() > 2 * np.median(dapi)


@pytest.mark.parametrize("version", ["1.0", "4.0"])
def test_round_trip(originals: Callable[[str], Path], tmp_path: Path, version: str) -> None:
    sdata = read(originals(version))
    sdata.write(tmp_path / "section.zarr")
    back = spatialdata.read_zarr(tmp_path / "section.zarr")
    ours, theirs = sdata.tables["counts"], back.tables["counts"]
    np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())
    np.testing.assert_array_equal(ours.obsm["spatial"], theirs.obsm["spatial"])
    assert list(ours.obs.columns) == list(theirs.obs.columns)
    assert set(theirs.obs["instance_id"]) == set(back.shapes["cells"].index)
    for name in ("x", "y", "z", "qv", "overlaps_nucleus"):
        np.testing.assert_array_equal(points(sdata)[name], points(back)[name])
    for name in ("feature_name", "cell_id"):
        assert points(sdata)[name].astype(str).to_list() == points(back)[name].astype(str).to_list()
    assert back.attrs == sdata.attrs
    np.testing.assert_allclose(contract.instrument_matrix(back), contract.instrument_matrix(sdata))
    np.testing.assert_array_equal(
        contract.levels(back, "dapi")[0].data.compute(), contract.levels(sdata, "dapi")[0].data.compute()
    )


def test_as_spatialdata_io_reads_it(originals: Callable[[str], Path]) -> None:
    run = originals("3.0")
    theirs = spatialdata_io.xenium(
        run, cells_labels=False, nucleus_labels=False, morphology_mip=False, aligned_images=False
    )
    ours = read(run)
    table, reference = ours.tables["counts"], theirs.tables["table"]
    assert list(table.obs_names) == list(reference.obs["cell_id"].astype(str))
    assert list(table.var_names) == list(reference.var_names)
    np.testing.assert_array_equal(table.X.toarray(), reference.X.toarray())
    np.testing.assert_allclose(table.obsm["spatial_um"], reference.obsm["spatial"])
    outlines = theirs.shapes["cell_boundaries"].geometry
    assert list(outlines.index.astype(str)) == list(ours.shapes["cells"].index)
    assert shapely.equals_exact(outlines.to_numpy(), ours.shapes["cells"].geometry.to_numpy(), 1e-3).all()
    nuclei = theirs.shapes["nucleus_boundaries"].geometry
    assert shapely.equals_exact(nuclei.to_numpy(), ours.shapes["nuclei"].geometry.to_numpy(), 1e-3).all()
    found, expected = points(ours), theirs.points["transcripts"].compute()
    np.testing.assert_array_equal(found[["x", "y", "z", "qv"]], expected[["x", "y", "z", "qv"]])
    assert found["feature_name"].astype(str).to_list() == expected["feature_name"].astype(str).to_list()
    assert found["cell_id"].to_list() == expected["cell_id"].astype(str).to_list()
    image = next(iter(theirs.images["morphology_focus"]["scale0"].data_vars.values()))
    np.testing.assert_array_equal(image.data.compute(), contract.levels(ours, "dapi")[0].data.compute())


# --------------------------------------------------------------------------------------------------
# transcripts


class Computed(Callback):
    """Counts the tasks that dask runs."""

    def __init__(self) -> None:
        super().__init__(pretask=self.count)
        self.tasks = 0

    def count(self, *_: object) -> None:
        self.tasks += 1


def test_transcripts_are_lazy_in_partitions(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcripts_module, "PARTITION", 500)
    table = pq.read_table(run / "transcripts.parquet")
    pq.write_table(table, run / "transcripts.parquet", row_group_size=200)
    with Computed() as computed, dask.config.set(scheduler="synchronous"):
        sdata = read(run, he_image=None)
    assert computed.tasks == 0
    lazy = sdata.points["transcripts"]
    assert lazy.npartitions == -(-table.num_rows // 600)
    assert lazy.known_divisions
    categories = lazy["feature_name"].cat
    assert categories.known
    names = sorted(set(table["feature_name"].to_pylist()))
    assert list(categories.categories) == names
    second = lazy.partitions[1].compute()
    assert list(second.index[[0, -1]]) == [600, 1199]
    np.testing.assert_array_equal(second["x"], table["x_location"].to_numpy()[600:1200])
    assert list(lazy[["qv"]].compute().columns) == ["qv"]
    assert len(lazy.loc[1150:1250].compute()) == 101
    whole = lazy.compute()
    assert list(whole.index) == list(range(table.num_rows))
    assert whole["feature_name"].astype(str).to_list() == table["feature_name"].to_pylist()


def test_damaged_transcripts_are_named_when_they_are_read(run: Path) -> None:
    with pq.ParquetFile(run / "transcripts.parquet") as file:
        at = next(
            chunk.data_page_offset
            for number in range(file.metadata.num_columns)
            if (chunk := file.metadata.row_group(0).column(number)).path_in_schema == "z_location"
        )
    sdata = read(run)
    with (run / "transcripts.parquet").open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 2000)
    with pytest.raises(ValueError, match=r"transcripts\.parquet is truncated, damaged"):
        points(sdata)


# --------------------------------------------------------------------------------------------------
# other forms


def as_csv(run: Path, ending: str) -> None:
    for name in TABLES:
        table = pq.read_table(run / f"{name}.parquet")
        (run / f"{name}.parquet").unlink()
        path = run / f"{name}{ending}"
        with pa.output_stream(path, compression="gzip" if ending.endswith("gz") else None) as stream:
            pyarrow.csv.write_csv(table, stream)


def as_folder(run: Path) -> None:
    """The matrix as a folder of Matrix Market files."""
    folder = run / "cell_feature_matrix"
    folder.mkdir()
    with h5py.File(run / "cell_feature_matrix.h5") as file:
        matrix, features = file["matrix"], file["matrix/features"]
        rows, cells = matrix["shape"][:]
        values = scipy.sparse.csc_matrix((matrix["data"], matrix["indices"], matrix["indptr"]), shape=(rows, cells))
        columns = {name: features[name].asstr()[:] for name in ("id", "name", "feature_type")}
        barcodes = matrix["barcodes"].asstr()[:]
    with gzip.open(folder / "matrix.mtx.gz", "wb") as stream:
        scipy.io.mmwrite(stream, values)
    options = {"sep": "\t", "header": False, "index": False}
    pd.DataFrame(columns).to_csv(folder / "features.tsv.gz", **options)
    pd.DataFrame(barcodes).to_csv(folder / "barcodes.tsv.gz", **options)
    (run / "cell_feature_matrix.h5").unlink()


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_text_forms(originals: Callable[[str], Path], run: Path, ending: str) -> None:
    as_csv(run, ending)
    as_folder(run)
    ours, theirs = read(run), read(originals("3.0"))
    np.testing.assert_array_equal(ours.tables["counts"].X.toarray(), theirs.tables["counts"].X.toarray())
    assert ours.tables["counts"].var.equals(theirs.tables["counts"].var)
    np.testing.assert_allclose(ours.tables["counts"].obsm["spatial"], theirs.tables["counts"].obsm["spatial"])
    assert shapely.equals_exact(ours.shapes["cells"].geometry, theirs.shapes["cells"].geometry, 1e-3).all()
    found, expected = points(ours), points(theirs)
    np.testing.assert_allclose(found[["x", "y", "z", "qv"]], expected[["x", "y", "z", "qv"]], rtol=1e-6)
    for name in ("feature_name", "cell_id"):
        assert found[name].astype(str).to_list() == expected[name].astype(str).to_list()


def test_text_whose_first_rows_look_like_whole_numbers(run: Path) -> None:
    """The first megabytes of a long file may hold whole numbers alone."""
    frame = pd.read_parquet(run / "transcripts.parquet")
    repeated = pd.concat([frame.assign(qv=40)] * 12)
    head = repeated.to_csv(index=False)
    (run / "transcripts.parquet").unlink()
    (run / "transcripts.csv").write_text(head + frame.to_csv(index=False, header=False))
    assert points(read(run))["qv"].to_numpy()[-len(frame) :] == pytest.approx(frame["qv"].to_numpy(), rel=1e-6)


def test_the_folder_outs_and_names_with_a_prefix(run: Path, tmp_path: Path) -> None:
    shutil.move(run, tmp_path / "sample7" / "outs")
    assert contract.sample(xenium(tmp_path / "sample7")) == "sample7"
    assert contract.sample(xenium(tmp_path / "sample7" / "outs")) == "sample7"
    folder = tmp_path / "sample7" / "outs"
    for entry in list(folder.iterdir()):
        entry.rename(folder / f"Breast_{entry.name}")
    for name in ("cells.parquet", "experiment.xenium"):
        (folder / f"._Breast_{name}").write_bytes(b"\x00\x05\x16\x07")
    sdata = read(folder, he_image=folder / "Breast_he_image.ome.tif")
    assert "spatial" in sdata.tables["counts"].obsm
    shutil.copy(folder / "Breast_cell_feature_matrix.h5", folder / "Lung_cell_feature_matrix.h5")
    with pytest.raises(ValueError, match=r"one cell_feature_matrix.h5 in .*\['Breast_cell_fea.*', 'Lung_cell_fea.*'\]"):
        xenium(folder)


def stains(run: Path) -> list[np.ndarray]:
    """Two more stains beside the nuclei, a file each, each of which describes only itself."""
    folder = run / "morphology_focus"
    dapi = tifffile.imread(next(folder.iterdir()))
    shutil.rmtree(folder)
    folder.mkdir()
    planes = [dapi, dapi // 2, dapi // 3]
    for number, (name, plane) in enumerate(zip(["dapi", "atp1a1_cd45", "18s"], planes, strict=True)):
        tifffile.imwrite(folder / f"ch{number:04}_{name}.ome.tif", plane, metadata={"axes": "YX"}, tile=(256, 256))
    return planes


def test_several_stains(run: Path) -> None:
    planes = stains(run)
    level = contract.levels(read(run), "dapi")[0]
    assert list(level.c.to_numpy()) == ["DAPI", "atp1a1_cd45", "18s"]
    np.testing.assert_array_equal(level.data.compute(), planes)
    second = run / "morphology_focus" / "ch0001_atp1a1_cd45.ome.tif"
    tifffile.imwrite(second, planes[1][:-9])
    with pytest.raises(ValueError, match=r"stains of one size.*ch0001_atp1a1_cd45.ome.tif"):
        read(run)
    second.write_bytes(second.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"ch0001_atp1a1_cd45.ome.tif is truncated"):
        read(run)


def test_proteins_are_a_table_of_their_own(run: Path) -> None:
    with h5py.File(run / "cell_feature_matrix.h5", "r+") as file:
        kinds = file["matrix/features/feature_type"][:].astype(object)
        kinds[:2] = b"Protein Expression"
        del file["matrix/features/feature_type"]
        file["matrix/features/feature_type"] = kinds.astype("S")
        values = file["matrix/data"][:].astype(np.float32)
        of_proteins = np.isin(file["matrix/indices"][:], [0, 1])
        values[of_proteins] += 0.25
        del file["matrix/data"]
        file["matrix/data"] = values
    sdata = read(run)
    counts, proteins = sdata.tables["counts"], sdata.tables["proteins"]
    assert counts.n_vars == 7
    assert proteins.n_vars == 2
    assert proteins.X.dtype == np.float32
    assert set(np.unique(np.asarray(proteins.X) % 1)) == {0.0, 0.25}
    np.testing.assert_array_equal(counts.obsm["spatial"], proteins.obsm["spatial"])


def test_proteins_are_intensities_and_not_the_whole_numbers_of_the_file(originals: Callable[[str], Path]) -> None:
    run = originals("4.0")
    truth = pd.read_csv(run / "truth_proteins.csv", index_col="cell_id")
    proteins = read(run).tables["proteins"]
    np.testing.assert_allclose(proteins.X, truth, rtol=1e-6)
    assert proteins.var_names.tolist() == list(truth)
    with h5py.File(run / "cell_feature_matrix.h5") as file:
        assert file.attrs["protein_scaling_factor"] == 10.0
    theirs = spatialdata_io.xenium(
        run, cells_boundaries=False, nucleus_boundaries=False, cells_as_circles=False, cells_labels=False,
        nucleus_labels=False, transcripts=False, morphology_mip=False, morphology_focus=False, aligned_images=False,
        gex_only=False,
    )  # fmt: skip
    np.testing.assert_allclose(proteins.X, theirs.tables["table"][:, list(truth)].X.toarray(), rtol=1e-6)


@pytest.mark.parametrize("form", [".parquet", ".csv"])
def test_an_imported_segmentation_without_nuclei(run: Path, form: str, tmp_path: Path) -> None:
    expected = read(run)
    path = run / "nucleus_boundaries.parquet"
    empty = pd.read_parquet(path).iloc[:0]
    path.unlink()
    if form == ".csv":
        empty.to_csv(run / "nucleus_boundaries.csv", index=False)
    else:
        empty.to_parquet(path)
    cells = pd.read_parquet(run / "cells.parquet").assign(nucleus_area=np.nan, nucleus_count=0)
    cells.to_parquet(run / "cells.parquet")
    with pytest.warns(UserWarning, match=r"No nuclei in .*run: nucleus_boundaries is empty"):
        sdata = xenium(run, he_image=run / "he_image.ome.tif")
    assert list(sdata.shapes) == ["cells"]
    np.testing.assert_array_equal(sdata.tables["counts"].X.toarray(), expected.tables["counts"].X.toarray())
    sdata.write(tmp_path / "section.zarr")
    assert "nuclei" not in spatialdata.read_zarr(tmp_path / "section.zarr").shapes


def test_transcripts_without_a_name(run: Path) -> None:
    path = run / "transcripts.parquet"
    frame = pd.read_parquet(path)
    frame.loc[[2, 5, 9], "feature_name"] = None
    frame.to_parquet(path)
    message = (
        rf"transcripts\.parquet: expected a `feature_name` of every .* 3 of {len(frame)} without .*Leave these rows"
    )
    with pytest.raises(ValueError, match=message):
        read(run)


def test_cells_in_pieces_and_without_outline(run: Path) -> None:
    path = run / "cell_boundaries.parquet"
    frame = pd.read_parquet(path)
    first, last = frame["cell_id"].iloc[0], frame["cell_id"].iloc[-1]
    piece = frame[frame["cell_id"] == first].assign(label_id=frame["label_id"].max() + 1)
    piece["vertex_x"] += 30.0
    pd.concat([frame[frame["cell_id"] != last], piece]).to_parquet(path)
    nuclei = pd.read_parquet(run / "nucleus_boundaries.parquet")
    twin = nuclei[nuclei["cell_id"] == first].assign(label_id=nuclei["label_id"].max() + 1)
    pd.concat([nuclei, twin]).to_parquet(run / "nucleus_boundaries.parquet")
    with pytest.warns(UserWarning, match=f"1 of .* cells have no outline in cell_boundaries.parquet, such as '{last}'"):
        sdata = xenium(run)
    shapes = sdata.shapes["cells"]
    assert shapes.geometry.loc[first].geom_type == "MultiPolygon"
    assert shapes.geometry.loc[first].area == pytest.approx(2 * shapely.Polygon(piece[["vertex_x", "vertex_y"]]).area)
    assert last not in shapes.index
    assert last in sdata.tables["counts"].obs_names
    assert list(sdata.shapes["nuclei"].index[[0, -1]]) == [first, f"{first}_2"]


# --------------------------------------------------------------------------------------------------
# the H&E


def test_alignment_in_every_way(run: Path, tmp_path: Path) -> None:
    matrix = np.loadtxt(run / "truth_alignment.csv", delimiter=",")
    expected = read(run).tables["counts"].obsm["spatial"]
    for given in (matrix, matrix[:2], run / "truth_alignment.csv", str(run / "truth_alignment.csv")):
        np.testing.assert_allclose(read(run, alignment=given).tables["counts"].obsm["spatial"], expected)
    # Beside an H&E that lies elsewhere, under its own name.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(run / "he_image.ome.tif", elsewhere / "slide.ome.tif")
    shutil.move(run / "he_imagealignment.csv", elsewhere / "slidealignment.csv")
    found = read(run, he_image=elsewhere / "slide.ome.tif")
    np.testing.assert_allclose(found.tables["counts"].obsm["spatial"], expected)
    shutil.move(elsewhere / "slidealignment.csv", run / "any_imagealignment.csv")
    found = read(run, he_image=elsewhere / "slide.ome.tif")
    np.testing.assert_allclose(found.tables["counts"].obsm["spatial"], expected)
    shutil.copy(run / "any_imagealignment.csv", elsewhere / "second_imagealignment.csv")
    with pytest.raises(ValueError, match=r"Expected one alignment of slide\.ome\.tif, found"):
        read(run, he_image=elsewhere / "slide.ome.tif")


def test_a_matrix_that_maps_the_other_way_is_refused(run: Path) -> None:
    matrix = np.loadtxt(run / "truth_alignment.csv", delimiter=",")
    with pytest.raises(ValueError, match=r"np.linalg.inv"):
        read(run, alignment=np.linalg.inv(matrix))
    # Even where it happens to place cells on the H&E, its scale tells.
    inverse = np.linalg.inv(matrix)
    inverse[:2, 2] += matrix[:2, :2] @ [256, 256] + matrix[:2, 2] - (inverse[:2, :2] @ [256, 256] + inverse[:2, 2])
    with pytest.raises(ValueError, match=r"he_image.ome.tif states 0.5000 .*by its inverse 0.5000"):
        read(run, alignment=inverse)
    far = matrix.copy()
    far[:2, 2] += 1e5
    with pytest.raises(ValueError, match=r"`alignment=` places them all outside"):
        read(run, alignment=far)


@pytest.mark.parametrize(
    "wrong", [np.eye(4), np.zeros((3, 3)), np.full((3, 3), np.nan), [[1, 0, 0], [0, 1, 0], [1, 0, 1]]]
)
def test_no_affine_matrix(run: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"Expected (a matrix|an invertible affine matrix).* in `alignment`"):
        read(run, alignment=wrong)


def test_without_an_alignment_cells_are_not_placed(run: Path) -> None:
    (run / "he_imagealignment.csv").unlink()
    sdata = read(run)
    assert "spatial" not in sdata.tables["counts"].obsm
    assert contract.instrument_matrix(sdata) is None
    assert "global" not in get_transformation(sdata.points["transcripts"], get_all=True)
    assert contract.info(sdata)["mpp"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="not placed on its H&E"):
        contract.find_units(sdata).positions(sdata)


def test_without_an_he_the_morphology_image_is_global(run: Path) -> None:
    sdata = read(run, he_image=None)
    table = sdata.tables["counts"]
    np.testing.assert_allclose(table.obsm["spatial"] * PIXEL_UM, table.obsm["spatial_um"])
    assert contract.info(sdata)["mpp"] == PIXEL_UM
    with pytest.raises(ValueError, match="found no H&E"):
        read(run, he_image=None, alignment=np.eye(3))
    bare = read(run, dapi=False)
    assert list(bare.images) == ["he"]
    np.testing.assert_allclose(
        bare.tables["counts"].obsm["spatial"], read(run).tables["counts"].obsm["spatial"], err_msg="same place"
    )


def test_images_stay_lazy(run: Path) -> None:
    with Computed() as computed, dask.config.set(scheduler="synchronous"):
        sdata = read(run, alignment=None)
        tasks = computed.tasks
    for name in ("he", "dapi"):
        finest = contract.levels(sdata, name)[0].data
        assert isinstance(finest, da.Array)
        assert max(finest.chunksize) <= 1024
    # Only the thumbnail of squidpy's plots was read.
    assert tasks < 40


# --------------------------------------------------------------------------------------------------
# what can be wrong

FILES = [
    "experiment.xenium",
    "cell_feature_matrix.h5",
    "cells.parquet",
    "cell_boundaries.parquet",
    "nucleus_boundaries.parquet",
    "transcripts.parquet",
    "morphology_focus/morphology_focus_0000.ome.tif",
    "he_image.ome.tif",
    "he_imagealignment.csv",
]


@pytest.mark.parametrize("name", FILES)
def test_every_file_truncated_or_empty(originals: Callable[[str], Path], run: Path, name: str) -> None:
    path = run / name
    content = path.read_bytes()
    length = len(content.rstrip())
    for kept in (0, 4, length // 10, length // 2, int(0.9 * length), length - 1):
        path.write_bytes(content[:kept])
        if name.endswith(".csv") and kept == length - 1:
            continue  # the last number of a text loses a digit: "1.0" becomes "1."
        with pytest.raises(ValueError, match=Path(name).name.replace(".", r"\.")):
            read(run)
    path.write_bytes(b"\x00\xffno" * 500)
    with pytest.raises(ValueError, match=Path(name).name.replace(".", r"\.")):
        read(run)


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("experiment.xenium", "he_imagealignment.csv")])
def test_every_file_missing(run: Path, name: str) -> None:
    (run / name).unlink()
    if name == "nucleus_boundaries.parquet":
        with pytest.warns(UserWarning, match=r"No nuclei in .*: nucleus_boundaries is missing.*segment_nuclei"):
            assert list(xenium(run).shapes) == ["cells"]
        return
    named = "morphology_focus" if "/" in name else name.removesuffix(".parquet").replace(".", r"\.")
    with pytest.raises(FileNotFoundError, match=named):
        read(run)


@pytest.mark.parametrize("name", [f"{name}.csv.gz" for name in TABLES])
def test_truncated_text(run: Path, name: str) -> None:
    as_csv(run, ".csv.gz")
    path = run / name
    content = path.read_bytes()
    for kept in (0, 5, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read(run)


@pytest.mark.parametrize("name", ["matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"])
def test_matrix_folder_that_is_damaged(run: Path, name: str) -> None:
    as_folder(run)
    path = run / "cell_feature_matrix" / name
    content = path.read_bytes()
    for kept in (0, 5, len(content) // 2, len(content) - 9):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read(run)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        read(run)


@pytest.mark.parametrize("name", ["cell_feature_matrix.h5", *(f"{table}.parquet" for table in TABLES)])
def test_files_of_another_run(originals: Callable[[str], Path], run: Path, name: str) -> None:
    shutil.copy(originals("other") / name, run / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        xenium(run)


@pytest.mark.parametrize("name", [f"{table}.parquet" for table in TABLES[1:]])
def test_files_of_another_run_with_the_same_cell_ids(run: Path, name: str) -> None:
    """Runs of the first version all count from 1; where their cells lie tells them apart."""
    frame = pd.read_parquet(run / name)
    column = next(column for column in ("vertex_x", "x_location") if column in frame)
    frame[column] = frame[column].max() - frame[column]
    frame.to_parquet(run / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        xenium(run)


def test_transcripts_of_another_panel(run: Path) -> None:
    frame = pd.read_parquet(run / "transcripts.parquet")
    frame.assign(feature_name="X" + frame["feature_name"]).to_parquet(run / "transcripts.parquet")
    with pytest.raises(ValueError, match=r"features, such as 'SIGNAL001', in .*transcripts\.parquet.*'XBLANK|'X"):
        read(run)


def test_experiment_of_another_run_is_spoken_of(originals: Callable[[str], Path], run: Path) -> None:
    shutil.copy(originals("other") / "experiment.xenium", run / "experiment.xenium")
    with pytest.warns(UserWarning, match=r"experiment.xenium of .* states \d+ cells, cells.parquet has \d+"):
        xenium(run)


def change_experiment(run: Path, **values: object) -> None:
    path = run / "experiment.xenium"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_newer_versions_are_tried(run: Path) -> None:
    change_experiment(run, analysis_sw_version="xenium-5.0.1.2")
    with pytest.warns(
        UserWarning, match="experiment.xenium is of version 'xenium-5.0.1.2'.* versions 1 to 4 and may fail"
    ):
        assert xenium(run).tables["counts"].n_vars == 9
    change_experiment(run, xenium_ranger={"version": "xenium-3.1.0.5"})
    assert read(run).attrs["stimage_sd"]["history"][0]["parameters"]["version"] == "xenium-3.1.0.5"


def test_without_experiment(run: Path) -> None:
    (run / "experiment.xenium").unlink()
    with pytest.warns(UserWarning, match=r"No experiment.xenium in .*run: version and pixel size"):
        sdata = xenium(run)
    assert contract.info(sdata)["mpp"] == pytest.approx(PIXEL_UM)


@pytest.mark.parametrize("size", [None, 0, -0.2, "small"])
def test_experiment_without_a_pixel_size(run: Path, size: object) -> None:
    change_experiment(run, pixel_size=size)
    with pytest.raises(ValueError, match=r"positive `pixel_size` in .*experiment\.xenium"):
        read(run)


def test_pixel_sizes_that_disagree(run: Path) -> None:
    change_experiment(run, pixel_size=0.2125)
    with pytest.raises(
        ValueError, match=r"experiment.xenium and morphology_focus_0000.ome.tif disagree.*`pixel_size_um="
    ):
        read(run)
    assert contract.info(read(run, he_image=None, pixel_size_um=PIXEL_UM))["mpp"] == PIXEL_UM
    with pytest.raises(ValueError, match=r"cells on morphology_focus_0000.ome.tif .* outside.*`origin_um="):
        read(run, he_image=None, pixel_size_um=0.2125)
    for wrong in ((np.nan, 0.0), (1.0,)):
        with pytest.raises(ValueError, match="two finite numbers"):
            read(run, origin_um=wrong)
    with pytest.raises(FileNotFoundError, match=r"folder of a Xenium output bundle at .*cells.parquet"):
        xenium(run / "cells.parquet")


# --------------------------------------------------------------------------------------------------
# real files


def test_real_tables_that_do_not_belong_together(data_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cell_feature_matrix.h5 and cells.parquet .* has 30, .* 10000, .* 0 are in both"
    ):
        xenium(data_dir / "xenium_tables")


def test_real_cut_out(data_dir: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No experiment.xenium"):
        sdata = xenium(data_dir / "xenium_tiny", pixel_size_um=1.7, origin_um=(997.0, 997.0))
    table, raw = sdata.tables["counts"], pd.read_parquet(data_dir / "xenium_tiny" / "cells.parquet")
    raw = raw.set_index("cell_id").loc[table.obs_names]
    assert table.shape == (526, 27)
    # The matrix was cut down to 30 features, the sums are those of all.
    assert (raw["transcript_counts"] >= table.X.sum(axis=1).A1).all()
    # Areas were measured on masks, of which outlines of twelve corners cut something off, and more of small ones.
    for shapes, column, share in (("cells", "cell_area", 0.979), ("nuclei", "nucleus_area", 0.928)):
        area = sdata.shapes[shapes].geometry.area.to_numpy()
        ratio = area / raw[column].to_numpy()
        assert np.median(ratio) == pytest.approx(share, abs=0.002)
        assert np.corrcoef(area, raw[column])[0, 1] > 0.998
    assert len(points(sdata)) == 5260
    centers = shapely.points(raw[["x_centroid", "y_centroid"]])
    assert shapely.dwithin(sdata.shapes["cells"].geometry.to_numpy(), centers, 2.0).mean() > 0.98
    height, width = contract.levels(sdata, "dapi")[0].shape[1:]
    inside = ((table.obsm["spatial"] >= 0) & (table.obsm["spatial"] < (width, height))).all(axis=1)
    assert inside.mean() > 0.95
    sdata.write(tmp_path / "tiny.zarr")
    assert spatialdata.read_zarr(tmp_path / "tiny.zarr").tables["counts"].shape == (526, 27)


def test_real_cut_out_says_what_it_needs(data_dir: Path) -> None:
    with (
        pytest.warns(UserWarning, match="No experiment.xenium"),
        pytest.raises(ValueError, match=r"100% outside.*cells span x 995 to 1405.*`origin_um="),
    ):
        xenium(data_dir / "xenium_tiny")


def test_real_points_of_another_reader(data_dir: Path) -> None:
    sdata = spatialdata.read_zarr(data_dir / "xenium_points.spatialdata.zarr")
    (name,) = sdata.points
    assert len(sdata.points[name]) == 213_191
    assert {"x", "y", "feature_name"} <= set(sdata.points[name].columns)


def test_real_cells_on_a_crop_of_their_he(data_dir: Path) -> None:
    import anndata

    adata = anndata.read_h5ad(data_dir / "xenium_he" / "NCBI858.h5ad")
    # Its x_pixel is the row.
    adata.obsm["spatial"] = adata.obs[["y_pixel", "x_pixel"]].to_numpy()
    sdata = from_anndata(adata, data_dir / "xenium_he" / "NCBI858.jpg", sample="NCBI858", spot_diameter_px=20.0)
    assert contract.counts(sdata).shape == (200, 338)
    assert contract.levels(sdata, "he")[0].shape[0] == 3
