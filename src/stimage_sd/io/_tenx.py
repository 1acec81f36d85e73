"""Feature-barcode matrices of 10x Genomics: HDF5 in the old and the new layout, and Matrix Market folders."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata import AnnData

from stimage_sd import contract
from stimage_sd.contract import GENES
from stimage_sd.io._section import as_counts, check_unique, unique_genes
from stimage_sd.io._text import open_text

#: feature types of proteins: in Xenium, and of antibodies in Visium
PROTEINS = ("Protein Expression", "Antibody Capture")
#: errors from reading a damaged HDF5 file
BROKEN = (OSError, EOFError, KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError)
#: attribute of an HDF5 file; proteins are stored as whole numbers: intensity times this factor
SCALE = "protein_scaling_factor"


@dataclass(frozen=True)
class Matrix:
    """Counts of all feature types, as stored in the file.

    - `values`: ``(n_barcodes, n_features)``.
    - `barcodes`: unique names of the spots, bins or cells.
    - `features`: one row per feature, indexed by name: ``gene_ids``, ``feature_types``, and ``genome`` if there are
      several.
    - `version`: version of the software that wrote the file, as stated in the file.
    - `protein_scale`: factor from the intensity of a protein to its stored value.
    """

    values: sp.csr_matrix
    barcodes: pd.Index
    features: pd.DataFrame
    version: str | None = None
    protein_scale: float = 1.0


def read_matrix(path: Path) -> Matrix:
    """Read a matrix from an HDF5 file or a folder of Matrix Market files."""
    if path.is_dir():
        matrix = _read_folder(path)
    else:
        try:
            matrix = _read_h5(path)
        except BROKEN as error:
            raise unreadable(path, error) from error
    if not len(matrix.barcodes) or not len(matrix.features):
        raise ValueError(
            f"Expected barcodes and features in {path}, found {len(matrix.barcodes)} and {len(matrix.features)}. Copy "
            "it again."
        )
    check_unique(matrix.barcodes, what="barcode", where=str(path))
    return matrix


def tables_of(matrix: Matrix, rows: np.ndarray | None, *, where: str) -> dict[str, AnnData]:
    """Return the table of counts, and the table of proteins if there are any, for the given rows of a matrix."""
    kinds = matrix.features["feature_types"]
    genes, proteins = np.asarray(kinds == GENES), np.asarray(kinds.isin(PROTEINS))
    if not genes.any():
        raise ValueError(f"Expected features of the type {GENES!r} in {where}, found {sorted(set(kinds))}.")
    # Indexing copies the matrix, and usually all rows are needed.
    values = matrix.values if rows is None else matrix.values[rows]
    names = matrix.barcodes if rows is None else matrix.barcodes[rows]

    def table(chosen: np.ndarray, values: Any) -> AnnData:
        var = matrix.features[chosen]
        var = var.set_axis(unique_genes(var.index, where=where, genomes=var.get("genome")), axis=0)
        return AnnData(X=values, obs=pd.DataFrame(index=names), var=var)

    counted = values if genes.all() else values[:, np.flatnonzero(genes)]
    tables = {contract.COUNTS: table(genes, as_counts(counted, where=where))}
    if proteins.any():
        intensities = values[:, np.flatnonzero(proteins)].toarray() / matrix.protein_scale
        tables[contract.PROTEINS] = table(proteins, intensities.astype(np.float32))
    return tables


def other_types(matrix: Matrix) -> list[str]:
    """Return the feature types other than genes and proteins."""
    return sorted(set(matrix.features["feature_types"]) - {GENES, *PROTEINS})


def unreadable(path: Path, error: Exception) -> ValueError:
    """Return the `ValueError` for a file that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"Expected a complete file as 10x Genomics' software writes it, found that {path} is truncated, damaged or of "
        f"another kind ({reason}). Copy it again."
    )


# --------------------------------------------------------------------------------------------------
# HDF5


def _read_h5(path: Path) -> Matrix:
    with h5py.File(path, "r") as file:
        version, scale = _attribute(file, "software_version"), _attribute(file, SCALE)
        protein_scale = 1.0 if scale is None else float(scale)
        if not 0.0 < protein_scale < np.inf:
            raise ValueError(f"its {SCALE} is {scale}")
        if "matrix" in file:
            values, barcodes, features = _read_group(file["matrix"])
        else:
            values, barcodes, features = _join_genomes({name: _read_group(group) for name, group in file.items()})
    return Matrix(values, barcodes, features, None if version is None else str(version), protein_scale)


def _attribute(file: h5py.File, name: str) -> Any:
    value: Any = file.attrs.get(name)
    if value is None:
        return None
    value = np.asarray(value).ravel()[0]
    return value.decode() if isinstance(value, bytes) else value


def _read_group(group: h5py.Group) -> tuple[sp.csr_matrix, pd.Index, pd.DataFrame]:
    """Read a group in the new or old layout. The old layout has one group per genome and only genes."""
    n_features, n_barcodes = (int(size) for size in group["shape"][:])
    # The file holds features × barcodes by columns. Read by rows, the same arrays are barcodes × features. 32 bits are
    # enough for feature numbers and halve the memory of the indices.
    parts = (group["data"][:], group["indices"].astype(np.int32)[:], group["indptr"][:])
    values = sp.csr_matrix(parts, shape=(n_barcodes, n_features))
    values.check_format(full_check=True)
    barcodes = _names(group["barcodes"])
    if "features" in group:
        names = _names(group["features"]["name"])
        kinds = {"gene_ids": "id", "feature_types": "feature_type", "genome": "genome"}
        columns = {
            name: _names(group["features"][stored]) for name, stored in kinds.items() if stored in group["features"]
        }
    else:
        names, columns = _names(group["gene_names"]), {"gene_ids": _names(group["genes"])}
        columns["feature_types"] = pd.Index([GENES] * len(names))
    features = pd.DataFrame({name: column.to_numpy() for name, column in columns.items()}, index=names)
    if features.get("genome") is not None and features.loc[features["feature_types"] == GENES, "genome"].nunique() < 2:
        del features["genome"]
    if len(barcodes) != n_barcodes or len(features) != n_features or "feature_types" not in features:
        raise ValueError(f"{len(barcodes)} names of {n_barcodes} barcodes, {len(features)} of {n_features} features")
    return values, barcodes, features


def _names(dataset: h5py.Dataset) -> pd.Index:
    return pd.Index(dataset.asstr()[:].astype(object))


def _join_genomes(
    parts: dict[str, tuple[sp.csr_matrix, pd.Index, pd.DataFrame]],
) -> tuple[sp.csr_matrix, pd.Index, pd.DataFrame]:
    """Join the genomes of an old file side by side. Barcodes missing from a genome get zero counts for its genes."""
    if not parts:
        raise ValueError("it has no matrix")
    barcodes = pd.Index(list(dict.fromkeys(name for _, names, _ in parts.values() for name in names)))
    blocks = []
    for values, names, _ in parts.values():
        check_unique(names, what="barcode", where="the matrix of one genome")
        rows = barcodes.get_indexer(names)
        placing = sp.csr_matrix((np.ones(len(rows), values.dtype), (rows, np.arange(len(rows)))), shape=(
            len(barcodes), len(rows)))  # fmt: skip
        blocks.append(placing @ values)
    features = pd.concat([part.assign(genome=genome) for genome, (_, _, part) in parts.items()])
    if len(parts) < 2:
        del features["genome"]
    return sp.csr_matrix(sp.hstack(blocks, format="csr")), barcodes, features


# --------------------------------------------------------------------------------------------------
# Matrix Market


def _read_folder(folder: Path) -> Matrix:
    values = sp.csr_matrix(_read_part(folder, ["matrix.mtx"], scipy.io.mmread)).T.tocsr()
    features = _read_part(folder, ["features.tsv", "genes.tsv"], _read_names)
    barcodes = _read_part(folder, ["barcodes.tsv"], _read_names)
    if features.shape[1] < 2 or values.shape != (len(barcodes), len(features)):
        raise ValueError(
            f"Expected barcodes, and features with id, name and type, for a matrix of {values.shape} in {folder}, "
            f"found {len(barcodes)} in barcodes.tsv and {features.shape} in features.tsv. Copy the folder again."
        )
    # Older folders have genes.tsv without feature types, and all features are genes.
    kinds = features[2].to_numpy() if features.shape[1] > 2 else GENES
    columns = {"gene_ids": features[0].to_numpy(), "feature_types": kinds}
    return Matrix(values, pd.Index(barcodes[0]), pd.DataFrame(columns, index=pd.Index(features[1].to_numpy())))


def _read_names(path: Path) -> pd.DataFrame:
    with open_text(path) as lines:
        return pd.read_csv(lines, sep="\t", header=None, dtype=str, keep_default_na=False)


def _read_part(folder: Path, names: list[str], read: Callable[[Path], Any]) -> Any:
    """Read one file of the folder, gzipped or plain, with or without a prefix."""
    for name in (f"{name}{ending}" for name in names for ending in (".gz", "")):
        files = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*_{name}"))
        if len(files) > 1:
            raise ValueError(f"Expected one {name} in {folder}, found {[file.name for file in files]}. Leave one.")
        if files:
            try:
                return read(files[0])
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise unreadable(files[0], error) from error
    raise FileNotFoundError(f"Expected {names[0]}.gz or {names[0]} in {folder}, found neither. Copy the folder again.")
