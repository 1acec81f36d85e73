"""Matrices of 10x Genomics' programs: both HDF5 forms, Matrix Market, types of features, genomes, large counts."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.io
import scipy.sparse as sp

from stimage_sd.datasets._tenx_matrix import write_10x_h5
from stimage_sd.io._tenx import other_types, read_matrix, tables_of

COUNTS = np.array([[4, 0, 7], [0, 9, 1], [2, 2, 0], [0, 0, 5]])
BARCODES = pd.Index([f"{letter * 16}-1" for letter in "ACGT"])


def write(path: Path, counts: np.ndarray = COUNTS, genes: list[str] | None = None, **options: object) -> Path:
    names = pd.Index(genes or [f"G{number}" for number in range(counts.shape[1])])
    write_10x_h5(path, sp.csr_matrix(counts), BARCODES, names, attributes={}, **options)
    return path


def write_folder(folder: Path, *, ending: str, features: str = "features.tsv", prefix: str = "") -> Path:
    """The same matrix as Matrix Market files, with an ending such as ``.gz``."""
    folder.mkdir()
    scipy.io.mmwrite(folder / "made.mtx", sp.coo_matrix(COUNTS.T))
    types = "" if features == "genes.tsv" else "\tGene Expression"
    texts = {
        "matrix.mtx": (folder / "made.mtx").read_text(),
        "barcodes.tsv": "".join(f"{name}\n" for name in BARCODES),
        features: "".join(f"E{number}\tG{number}{types}\n" for number in range(3)),
    }
    (folder / "made.mtx").unlink()
    for name, text in texts.items():
        data = text.encode()
        (folder / f"{prefix}{name}{ending}").write_bytes(gzip.compress(data) if ending else data)
    return folder


@pytest.mark.parametrize("ending", [".gz", ""])
@pytest.mark.parametrize("features", ["features.tsv", "genes.tsv"])
@pytest.mark.parametrize("prefix", ["", "GSM1_"])
def test_folders_with_and_without_gz_are_the_same_matrix(
    tmp_path: Path, ending: str, features: str, prefix: str
) -> None:
    matrix = read_matrix(write_folder(tmp_path / "m", ending=ending, features=features, prefix=prefix))
    np.testing.assert_array_equal(matrix.values.toarray(), COUNTS)
    assert matrix.barcodes.tolist() == BARCODES.tolist()
    assert matrix.features.index.tolist() == ["G0", "G1", "G2"]
    assert set(matrix.features["feature_types"]) == {"Gene Expression"}


def test_h5_is_read_as_scanpy_reads_it(tmp_path: Path, data_dir: Path) -> None:
    for path in (write(tmp_path / "m.h5"), data_dir / "visium_mini" / "filtered_feature_bc_matrix.h5"):
        table = tables_of(read_matrix(path), None, where="here")["counts"]
        expected = scanpy.read_10x_h5(path)
        np.testing.assert_array_equal(table.X.toarray(), expected.X.toarray())
        assert table.obs_names.tolist() == expected.obs_names.tolist()
        assert table.var["gene_ids"].tolist() == expected.var["gene_ids"].tolist()


def test_counts_are_exact_whatever_their_size(tmp_path: Path) -> None:
    """Decimals of 32 bits, through which scanpy reads, are exact up to 2**24."""
    large = COUNTS.copy()
    large[0, 0] = 2**24 + 1
    table = tables_of(read_matrix(write(tmp_path / "m.h5", large)), None, where="here")["counts"]
    assert table.X.dtype == np.int32
    assert table.X[0, 0] == 2**24 + 1


def test_antibodies_are_proteins_and_guides_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m.h5", feature_types=["Gene Expression", "Antibody Capture", "CRISPR Guide Capture"])
    matrix = read_matrix(path)
    tables = tables_of(matrix, np.array([3, 1]), where="here")
    assert tables["counts"].X.toarray().tolist() == [[0], [0]]
    assert tables["proteins"].X.tolist() == [[0.0], [9.0]]
    assert tables["proteins"].X.dtype == np.float32
    assert tables["proteins"].obs_names.tolist() == BARCODES[[3, 1]].tolist()
    assert other_types(matrix) == ["CRISPR Guide Capture"]


def write_old(path: Path, parts: dict[str, tuple[list[str], np.ndarray, list[str]]]) -> Path:
    """The form of Cell Ranger 2: a group for every genome."""
    with h5py.File(path, "w") as file:
        for genome, (barcodes, counts, genes) in parts.items():
            matrix = sp.csr_matrix(counts)
            group = file.create_group(genome)
            group["barcodes"], group["genes"] = np.array(barcodes, "S"), np.array([f"id{name}" for name in genes], "S")
            group["gene_names"], group["shape"] = np.array(genes, "S"), np.array(counts.shape[::-1])
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(matrix, name)
    return path


def test_two_genomes_of_an_old_file(tmp_path: Path) -> None:
    human = (["A-1", "B-1"], np.array([[1, 2], [0, 3]]), ["ACTB", "Same"])
    mouse = (["B-1", "C-1"], np.array([[5, 0], [6, 7]]), ["Actb", "Same"])
    path = write_old(tmp_path / "old.h5", {"GRCh38": human, "mm10": mouse})
    table = tables_of(read_matrix(path), None, where="here")["counts"]
    assert table.obs_names.tolist() == ["A-1", "B-1", "C-1"]
    assert table.var_names.tolist() == ["ACTB", "GRCh38_Same", "Actb", "mm10_Same"]
    assert table.var["genome"].tolist() == ["GRCh38", "GRCh38", "mm10", "mm10"]
    assert table.X.toarray().tolist() == [[1, 2, 0, 0], [0, 3, 5, 0], [0, 0, 6, 7]]
    alone = tables_of(read_matrix(write_old(tmp_path / "one.h5", {"GRCh38": human})), None, where="here")["counts"]
    assert alone.var_names.tolist() == ["ACTB", "Same"]
    assert list(alone.var) == ["gene_ids", "feature_types"]


def test_two_genomes_of_a_new_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.h5", genes=["Same", "G", "Same"])
    with h5py.File(path, "r+") as file:
        file["matrix/features/genome"][...] = np.array([b"GRCh38", b"GRCh38", b"mm10"])
    table = tables_of(read_matrix(path), None, where="here")["counts"]
    assert table.var_names.tolist() == ["GRCh38_Same", "G", "mm10_Same"]
    np.testing.assert_array_equal(table.X.toarray(), COUNTS)


def test_versions_of_ensembl_ids_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "m.h5", genes=["ENSG00000141736.14", "ENSMUSG00000062312.8", "RP11-34P13.7"])
    table = tables_of(read_matrix(path), None, where="here")["counts"]
    assert table.var_names.tolist() == ["ENSG00000141736", "ENSMUSG00000062312", "RP11-34P13.7"]


def test_a_barcode_that_is_there_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        file["matrix/barcodes"][1] = file["matrix/barcodes"][0]
    with pytest.raises(ValueError, match=r"every barcode once in .*m\.h5, found 1 repeated, such as 'AAAA.*Leave one"):
        read_matrix(path)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan])
def test_a_scale_of_proteins_that_is_none(tmp_path: Path, scale: float) -> None:
    path = write(tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["protein_scaling_factor"] = scale
    with pytest.raises(ValueError, match=r"m\.h5 .*protein_scaling_factor is"):
        read_matrix(path)


def test_genes_without_a_single_count_are_kept(tmp_path: Path) -> None:
    table = tables_of(read_matrix(write(tmp_path / "m.h5", np.zeros((4, 3), int))), None, where="here")["counts"]
    assert table.shape == (4, 3)
    assert table.X.nnz == 0
