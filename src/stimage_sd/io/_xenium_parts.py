"""Cells and boundaries of a Xenium bundle, checked against each other.

Depending on the version, the files hold ids and names as text, bytes or integers. Here they are always text.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import shapely
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity

from stimage_sd import contract
from stimage_sd.io._section import check_unique
from stimage_sd.io._tenx import Matrix, unreadable

#: largest distance of a cell center from the bounding box of its nucleus or outline, µm
NEAR_UM = 10.0
#: column types for CSV files, as types guessed from the first rows may be wrong
CSV_TYPES = {
    "cell_id": pa.string(),
    "feature_name": pa.string(),
    **dict.fromkeys(("vertex_x", "vertex_y", "x_centroid", "y_centroid", "cell_area", "nucleus_area"), pa.float64()),
    **dict.fromkeys(("x_location", "y_location", "z_location", "qv"), pa.float32()),
}
#: bytes of a CSV file read per block
BLOCK = 1 << 26


def read_cells(path: Path) -> pd.DataFrame:
    """Read the table of cells, indexed by id, with ``x_centroid`` and ``y_centroid`` in µm and all other columns."""
    frame = _as_frame(_read_table(path, ["cell_id", "x_centroid", "y_centroid"])).set_index("cell_id")
    check_unique(frame.index, what="cell", where=str(path))
    if not np.isfinite(frame[["x_centroid", "y_centroid"]].to_numpy(dtype=np.float64)).all():
        raise ValueError(f"Expected finite positions of cells in {path}, found NaN or infinity.")
    return frame


def check_same_cells(matrix: Matrix, cells: pd.DataFrame, *, matrix_path: Path, cells_path: Path) -> None:
    """Raise `ValueError` if matrix and table of cells have different cells."""
    common = matrix.barcodes.isin(cells.index)
    if not common.all() or len(matrix.barcodes) != len(cells):
        raise ValueError(
            f"{matrix_path.name} and {cells_path.name} are of different cells: the matrix has {len(matrix.barcodes)}, "
            f"as {matrix.barcodes[0]!r}, the table {len(cells)}, as {cells.index[0]!r}, and {int(common.sum())} are in "
            f"both. Take both files of one run (these are in {matrix_path.parent})."
        )


# --------------------------------------------------------------------------------------------------
# boundaries


def read_cell_boundaries(path: Path, cells: pd.DataFrame) -> geopandas.GeoDataFrame:
    """Read the cell outlines, µm, one row per cell in the order of `cells`. Cells in pieces become multipolygons."""
    owners, polygons = _read_polygons(path)
    _check_known(owners, polygons, cells, path)
    ids = cells.index
    rows = ids.get_indexer(pd.Index(owners))
    order = np.argsort(rows, kind="stable")
    polygons = polygons[order]
    unique, first, pieces = np.unique(rows[order], return_index=True, return_counts=True)
    outlines = polygons[first]
    for cell in np.flatnonzero(pieces > 1):
        outlines[cell] = shapely.multipolygons(polygons[first[cell] : first[cell] + pieces[cell]])
    if len(unique) < len(ids):
        lacking = ids[np.setdiff1d(np.arange(len(ids)), unique)]
        warnings.warn(
            f"{len(lacking)} of {len(ids)} cells have no outline in {path.name}, such as {lacking[0]!r}: they are in "
            "the table of counts, but not in the shapes.",
            UserWarning,
            stacklevel=3,
        )
    return _as_shapes(geopandas.GeoDataFrame(geometry=outlines, index=ids[unique]))


def read_nucleus_boundaries(path: Path | None, cells: pd.DataFrame, *, where: Path) -> geopandas.GeoDataFrame | None:
    """Read the outlines of nuclei, µm, with ``cell_id``. The index of the second nucleus of a cell ends in ``_2``.

    An imported segmentation may have no nuclei, with an empty or missing file. The function then warns and returns
    `None`.
    """
    owners, polygons = (np.empty(0), np.empty(0)) if path is None else _read_polygons(path, may_be_empty=True)
    if path is None or not len(owners):
        warnings.warn(
            f"No nuclei in {where}: nucleus_boundaries is {'missing' if path is None else 'empty'}, as after an import "
            "of a segmentation without nuclei. The section has no shapes 'nuclei'; segment them on its H&E with "
            "`stimage_sd.pp.segment_nuclei(sdata)`.",
            UserWarning,
            stacklevel=3,
        )
        return None
    _check_known(owners, polygons, cells, path)
    ordinal = pd.Series(owners).groupby(owners).cumcount().to_numpy() + 1
    index = [owner if count == 1 else f"{owner}_{count}" for owner, count in zip(owners, ordinal, strict=True)]
    return _as_shapes(geopandas.GeoDataFrame({"cell_id": owners}, geometry=polygons, index=index))


def _read_polygons(path: Path, *, may_be_empty: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the cell id and the polygon of each outline with an area."""
    table = _read_table(path, ["cell_id", "vertex_x", "vertex_y"], may_be_empty=may_be_empty)
    if not table.num_rows:
        return np.empty(0, dtype=object), np.empty(0, dtype=object)
    encoded = as_text(table["cell_id"]).combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    vertices = np.column_stack([table[name].to_numpy() for name in ("vertex_x", "vertex_y")]).astype(np.float64)
    if not np.isfinite(vertices).all():
        raise ValueError(f"Expected finite vertices in {path}, found NaN or infinity.")
    # From version 2 on, `label_id` separates several outlines of one cell.
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
    # A line or a point has no area, so its cell counts as a cell without outline.
    if not (lengths > 3).any():
        return np.empty(0, dtype=object), np.empty(0, dtype=object)
    enclosing = np.repeat(lengths > 3, lengths)
    polygon = np.repeat(np.arange(len(starts)), lengths)[enclosing]
    _, dense = np.unique(polygon, return_inverse=True)
    rings = shapely.linearrings(vertices[enclosing], indices=dense)
    owners = np.asarray(encoded.dictionary.to_pylist(), dtype=object)[codes[starts[lengths > 3]]]
    return owners, np.asarray(shapely.polygons(rings))


def _starts(keys: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))


def _check_known(owners: np.ndarray, polygons: np.ndarray, cells: pd.DataFrame, path: Path) -> None:
    """Raise if outlines belong to other cells or lie elsewhere. Ids alone are not enough: version 1 counts from 1."""
    ids = cells.index
    rows = ids.get_indexer(pd.Index(owners))
    unknown = owners[rows < 0]
    if len(unknown) or not len(owners):
        examples = f"{len(unknown)} of {len(owners)} others, such as {unknown[0]!r}" if len(unknown) else "none"
        raise ValueError(
            f"Expected outlines of the run's cells, such as {ids[0]!r}, in {path}, found {examples}. Take all files of "
            "one run."
        )
    apart = ~in_boxes(cells[["x_centroid", "y_centroid"]].to_numpy(dtype=np.float64)[rows], shapely.bounds(polygons))
    if apart.mean() > 0.5:
        raise ValueError(
            f"Expected outlines around the centers of the run's cells in {path}, found {apart.mean():.0%} of them more "
            f"than {NEAR_UM:.0f} µm away, such as that of {owners[apart][0]!r}. Take all files of one run."
        )


def in_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return whether points ``(n, 2)`` lie in boxes ``(n, 4)``, or at most `NEAR_UM` outside."""
    inside = (points >= boxes[:, :2] - NEAR_UM) & (points <= boxes[:, 2:] + NEAR_UM)
    return np.asarray(inside.all(axis=1))


def _as_shapes(frame: geopandas.GeoDataFrame) -> geopandas.GeoDataFrame:
    frame.index = frame.index.astype(str)
    frame.index.name = None
    return ShapesModel.parse(frame, transformations={contract.INSTRUMENT: Identity()})


# --------------------------------------------------------------------------------------------------
# files


def _read_table(path: Path, required: list[str], *, may_be_empty: bool = False) -> pa.Table:
    """Read a Parquet or CSV file into memory, and check its columns and that it has rows."""
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, error) from error
    check_columns(table.column_names, required, path)
    lacking = [name for name in required if table[name].null_count]
    if lacking or not (table.num_rows or may_be_empty):
        raise ValueError(f"Expected rows with all of {required} in {path}, found {lacking or 'no rows'}.")
    return table


def _read_csv(path: Path) -> pa.Table:
    options = pyarrow.csv.ConvertOptions(column_types=CSV_TYPES)
    return pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(block_size=BLOCK), convert_options=options)


def check_columns(columns: list[str], required: list[str], path: Path) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        raise ValueError(f"Expected the columns {required} in {path}, found {columns}; missing: {missing}.")


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
