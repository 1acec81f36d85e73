"""The tables of a Xenium bundle: cells, counts and boundaries, each checked against the cells.

Ids and names are text in some versions, bytes in others and integers in the first; here they are text.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import scipy.io
import scipy.sparse as sp
import shapely
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity

from stimage_sd import contract
from stimage_sd.io._section import check_unique

#: a cell's centre may lie this far outside the box of its nucleus or outline, µm
NEAR_UM = 10.0
#: types of the columns that CSV files may show otherwise in their first rows
CSV_TYPES = {
    "cell_id": pa.string(),
    "feature_name": pa.string(),
    **dict.fromkeys(("vertex_x", "vertex_y", "x_centroid", "y_centroid", "cell_area", "nucleus_area"), pa.float64()),
    **dict.fromkeys(("x_location", "y_location", "z_location", "qv"), pa.float32()),
}
#: bytes of a CSV file that are read at a time
BLOCK = 1 << 26


@dataclass(frozen=True)
class Matrix:
    """Counts as the bundle has them, all kinds of features.

    Parameters
    ----------
    values
        ``(n_cells, n_features)``.
    cells
        Cell ids.
    features
        A row a feature: index the name, ``gene_ids``, ``feature_types``.
    """

    values: sp.csr_matrix
    cells: pd.Index
    features: pd.DataFrame


def read_cells(path: Path) -> pd.DataFrame:
    """Read the cells: index the id, ``x_centroid`` and ``y_centroid`` in µm, and whatever else is known of them."""
    frame = _as_frame(_read_table(path, ["cell_id", "x_centroid", "y_centroid"])).set_index("cell_id")
    check_unique(frame.index, what="cell", where=str(path))
    if not np.isfinite(frame[["x_centroid", "y_centroid"]].to_numpy(dtype=np.float64)).all():
        raise ValueError(f"Expected finite positions of cells in {path}, found NaN or infinity.")
    return frame


def read_matrix(path: Path) -> Matrix:
    """Read the matrix of cells and features, from its HDF5 file or the folder of Matrix Market files."""
    if path.is_dir():
        matrix = _read_mtx(path)
    else:
        try:
            matrix = _read_h5(path)
        except (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise unreadable(path, error) from error
    check_unique(matrix.cells, what="cell", where=str(path))
    if not len(matrix.cells) or not len(matrix.features):
        raise ValueError(f"Expected cells and features in {path}, found {matrix.values.shape}.")
    return matrix


def check_same_cells(matrix: Matrix, cells: pd.DataFrame, *, matrix_path: Path, cells_path: Path) -> None:
    """Raise `ValueError` where the matrix is not of the cells."""
    common = matrix.cells.isin(cells.index)
    if not common.all() or len(matrix.cells) != len(cells):
        raise ValueError(
            f"{matrix_path.name} and {cells_path.name} are of different cells: the matrix has {len(matrix.cells)}, as "
            f"{matrix.cells[0]!r}, the table {len(cells)}, as {cells.index[0]!r}, and {int(common.sum())} are in both. "
            f"Take both files of one run (these are in {matrix_path.parent})."
        )


# --------------------------------------------------------------------------------------------------
# boundaries


def read_cell_boundaries(path: Path, cells: pd.DataFrame) -> geopandas.GeoDataFrame:
    """Read the cells' outlines, µm, one row a cell in the order of `cells`; a cell in pieces is a multipolygon."""
    owners, polygons = _read_polygons(path)
    _check_known(owners, polygons, cells, path)
    ids = cells.index
    rows = ids.get_indexer(pd.Index(owners))
    order = np.argsort(rows, kind="stable")
    polygons = polygons[order]
    unique, first, pieces = np.unique(rows[order], return_index=True, return_counts=True)
    outlines = polygons[first]
    for number in np.flatnonzero(pieces > 1):
        outlines[number] = shapely.multipolygons(polygons[first[number] : first[number] + pieces[number]])
    if len(unique) < len(ids):
        lacking = ids[np.setdiff1d(np.arange(len(ids)), unique)]
        warnings.warn(
            f"{len(lacking)} of {len(ids)} cells have no outline in {path.name}, such as {lacking[0]!r}: they are in "
            "the table of counts, not among the shapes.",
            UserWarning,
            stacklevel=3,
        )
    return _as_shapes(geopandas.GeoDataFrame(geometry=outlines, index=ids[unique]))


def read_nucleus_boundaries(path: Path, cells: pd.DataFrame) -> geopandas.GeoDataFrame:
    """Read the nuclei's outlines, µm, with ``cell_id``; of a cell's second nucleus the index ends in ``_2``."""
    owners, polygons = _read_polygons(path)
    _check_known(owners, polygons, cells, path)
    number = pd.Series(owners).groupby(owners).cumcount().to_numpy() + 1
    index = [owner if count == 1 else f"{owner}_{count}" for owner, count in zip(owners, number, strict=True)]
    return _as_shapes(geopandas.GeoDataFrame({"cell_id": owners}, geometry=polygons, index=index))


def _read_polygons(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the cell id and the polygon of every outline that encloses an area."""
    table = _read_table(path, ["cell_id", "vertex_x", "vertex_y"])
    encoded = as_text(table["cell_id"]).combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    vertices = np.column_stack([table[name].to_numpy() for name in ("vertex_x", "vertex_y")]).astype(np.float64)
    if not np.isfinite(vertices).all():
        raise ValueError(f"Expected finite vertices in {path}, found NaN or infinity.")
    # From version 2 on `label_id` tells several outlines of one cell apart.
    keys = table["label_id"].to_numpy() if "label_id" in table.column_names else codes
    starts = _starts(keys)
    if len(np.unique(keys[starts])) < len(starts):
        order = np.argsort(keys, kind="stable")
        keys, codes, vertices = keys[order], codes[order], vertices[order]
        starts = _starts(keys)
    lengths = np.diff(starts, append=len(keys))
    ends = np.append(starts[1:], len(keys)) - 1
    closed = (vertices[starts] == vertices[ends]).all(axis=1)
    if closed[:-1].all() and not closed[-1] and len(closed) > 1:
        raise unreadable(path, ValueError("its last outline does not end where it begins"))
    # A line or a point encloses nothing: its cell is one without outline.
    if not (lengths > 3).any():
        return np.empty(0, dtype=object), np.empty(0, dtype=object)
    enclosing = np.repeat(lengths > 3, lengths)
    number = np.repeat(np.arange(len(starts)), lengths)[enclosing]
    _, dense = np.unique(number, return_inverse=True)
    rings = shapely.linearrings(vertices[enclosing], indices=dense)
    owners = np.asarray(encoded.dictionary.to_pylist(), dtype=object)[codes[starts[lengths > 3]]]
    return owners, np.asarray(shapely.polygons(rings))


def _starts(keys: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))


def _check_known(owners: np.ndarray, polygons: np.ndarray, cells: pd.DataFrame, path: Path) -> None:
    """Raise where outlines are of other cells, or lie elsewhere: runs of version 1 all count from 1."""
    ids = cells.index
    rows = ids.get_indexer(pd.Index(owners))
    unknown = owners[rows < 0]
    if len(unknown) or not len(owners):
        found = f"{len(unknown)} of {len(owners)} others, such as {unknown[0]!r}" if len(unknown) else "none"
        raise ValueError(
            f"Expected outlines of the run's cells, such as {ids[0]!r}, in {path}, found {found}. Take all files of "
            "one run."
        )
    apart = ~in_boxes(cells[["x_centroid", "y_centroid"]].to_numpy(dtype=np.float64)[rows], shapely.bounds(polygons))
    if apart.mean() > 0.5:
        raise ValueError(
            f"Expected outlines around the centres of the run's cells in {path}, found {apart.mean():.0%} of them more "
            f"than {NEAR_UM:.0f} µm away, such as that of {owners[apart][0]!r}. Take all files of one run."
        )


def in_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether points ``(n, 2)`` lie in boxes ``(n, 4)``, or at most `NEAR_UM` outside."""
    inside = (points >= boxes[:, :2] - NEAR_UM) & (points <= boxes[:, 2:] + NEAR_UM)
    return np.asarray(inside.all(axis=1))


def _as_shapes(frame: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    frame.index = frame.index.astype(str)
    frame.index.name = None
    return ShapesModel.parse(frame, transformations={contract.INSTRUMENT: Identity()})


# --------------------------------------------------------------------------------------------------
# files


def _read_table(path: Path, required: list[str]) -> pa.Table:
    """Read a Parquet or CSV file whole and check that it has rows and columns."""
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, error) from error
    check_columns(table.column_names, required, path)
    lacking = [name for name in required if table[name].null_count]
    if not table.num_rows or lacking:
        raise ValueError(f"Expected rows with all of {required} in {path}, found {lacking or 'no rows'}.")
    return table


def _read_csv(path: Path) -> pa.Table:
    options = pyarrow.csv.ConvertOptions(column_types=CSV_TYPES)
    return pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(block_size=BLOCK), convert_options=options)


def check_columns(found: list[str], required: list[str], path: Path) -> None:
    missing = [name for name in required if name not in found]
    if missing:
        raise ValueError(f"Expected the columns {required} in {path}, found {found}; missing: {missing}.")


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string())


def _as_frame(table: pa.Table) -> pd.DataFrame:
    frame = pd.DataFrame(index=pd.RangeIndex(table.num_rows))
    for name in table.column_names:
        column = table[name]
        if name == "cell_id":
            frame[name] = np.asarray(as_text(column).to_pylist(), dtype=object)
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
            frame[name] = column.to_numpy()
        else:
            frame[name] = pd.Categorical(as_text(column).to_pylist())
    return frame


def _read_h5(path: Path) -> Matrix:
    with h5py.File(path, "r") as file:
        group = file["matrix"]
        n_features, n_cells = (int(size) for size in group["shape"][:])
        parts = (group["data"][:], group["indices"][:], group["indptr"][:])
        # Stored by columns, features × cells; the same arrays by rows are cells × features.
        values = sp.csr_matrix(parts, shape=(n_cells, n_features))
        values.check_format(full_check=True)
        cells = pd.Index(group["barcodes"].asstr()[:].astype(object))
        kinds = {"gene_ids": "id", "feature_types": "feature_type"}
        columns = {name: group["features"][own].asstr()[:].astype(object) for name, own in kinds.items()}
        names = pd.Index(group["features"]["name"].asstr()[:].astype(object))
    if len(cells) != n_cells or len(names) != n_features:
        raise ValueError(f"{len(cells)} names of {n_cells} cells, {len(names)} names of {n_features} features")
    return Matrix(values, cells, pd.DataFrame(columns, index=names))


def _read_mtx(folder: Path) -> Matrix:
    values = sp.csr_matrix(_read_part(folder, "matrix.mtx", scipy.io.mmread)).T.tocsr()
    options = {"sep": "\t", "header": None, "dtype": str, "keep_default_na": False}
    features = _read_part(folder, "features.tsv", pd.read_csv, **options)
    barcodes = _read_part(folder, "barcodes.tsv", pd.read_csv, **options)
    if features.shape[1] < 3 or values.shape != (len(barcodes), len(features)):
        raise ValueError(
            f"Expected cells and features, these with id, name and type, for a matrix of {values.shape} in {folder}, "
            f"found {len(barcodes)} in barcodes.tsv and {features.shape} in features.tsv. Copy the folder again."
        )
    columns = {"gene_ids": features[0].to_numpy(), "feature_types": features[2].to_numpy()}
    return Matrix(values, pd.Index(barcodes[0]), pd.DataFrame(columns, index=pd.Index(features[1].to_numpy())))


def _read_part(folder: Path, name: str, read: Callable[..., Any], **options: Any) -> Any:
    """Read one file of the Matrix Market folder, compressed or not."""
    path = next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"Expected {name}.gz or {name} in {folder}, found neither. Copy the folder again.")
    try:
        return read(path, **options)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"Expected a complete file as the Xenium instrument writes it, found that {path} is truncated, damaged or of "
        f"another kind ({reason}). Copy it again."
    )
