"""Transcripts of a Xenium bundle, read lazily and checked against cells and features."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from spatialdata.models import PointsModel
from spatialdata.transformations import Identity

from stimage_sd import contract
from stimage_sd._cache import cache_dir
from stimage_sd._cache_size import mark_used, trim
from stimage_sd._files import remove_abandoned, replacing
from stimage_sd.io._tenx import unreadable
from stimage_sd.io._xenium_parts import BLOCK, CSV_TYPES, as_text, check_columns, in_boxes

#: smallest number of transcripts per partition, about 60 MB
PARTITION = 1_000_000
#: cell id of transcripts outside all cells
UNASSIGNED = "UNASSIGNED"
#: the same in version 1 and in tables from other programs
NOBODY = ("-1", "")
#: columns kept from the file, and their names in the section
TRANSCRIPT_COLUMNS = {
    "x_location": "x",
    "y_location": "y",
    "z_location": "z",
    "feature_name": "feature_name",
    "qv": "qv",
    "cell_id": "cell_id",
    "overlaps_nucleus": "overlaps_nucleus",
}
REQUIRED_OF_TRANSCRIPTS = ["x_location", "y_location", "feature_name", "qv", "cell_id"]


def read_transcripts(path: Path, cells: geopandas.GeoDataFrame, features: pd.Index) -> dd.DataFrame:
    """Read the transcripts lazily: ``x``, ``y`` and ``z`` in µm, ``feature_name`` categorical, ``qv``, ``cell_id``.

    `cells` are the outlines and `features` the names in the matrix. The transcripts have to match both. Three parts are
    read at once: the metadata of the file, the cells and positions of one row group, and the feature names of all row
    groups. The names are the categories of the lazy column.
    """
    source = path if path.suffix == ".parquet" else _as_parquet(path)
    try:
        with pq.ParquetFile(source, read_dictionary=["feature_name"]) as file:
            check_columns(file.schema_arrow.names, REQUIRED_OF_TRANSCRIPTS, path)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if not sum(sizes):
                raise ValueError("it has no rows")
            names = _feature_names(file)
            sampled = file.read_row_group(int(np.argmax(sizes)), columns=["cell_id", "x_location", "y_location"])
            columns = [name for name in TRANSCRIPT_COLUMNS if name in file.schema_arrow.names]
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_transcripts(names, sampled, cells, features, path)
    parts, starts = _partition(sizes)
    options: dict[str, Any] = {"path": str(source), "names": names}
    meta = _read_rows(((), 0), columns=[TRANSCRIPT_COLUMNS[name] for name in columns], **options)
    points = dd.from_map(
        _read_rows,
        list(zip(parts, starts, strict=True)),
        meta=meta,
        divisions=(*starts, sum(sizes) - 1),
        label="transcripts",
        **options,
    )
    # `PointsModel.parse` on all rows would read the file again for each column, which is 8 times slower. It adds the
    # same attributes to an empty table.
    parsed = PointsModel.parse(
        meta,
        feature_key="feature_name",
        instance_key="cell_id",
        transformations={contract.INSTRUMENT: Identity()},
    )
    points.attrs.update(parsed.attrs)
    PointsModel().validate(points)
    return points


def _feature_names(file: pq.ParquetFile) -> list[str]:
    """Return the sorted feature names in the file. Only dictionaries are decoded, one row group after another."""
    names: set[str] = set()
    n_unnamed = 0
    for group in range(file.num_row_groups):
        for chunk in file.read_row_group(group, columns=["feature_name"])["feature_name"].chunks:
            encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
            names.update(encoded.dictionary.cast(pa.string()).to_pylist())
            n_unnamed += encoded.null_count
    if None in names or n_unnamed:
        raise ValueError(
            f"expected a `feature_name` of every transcript, found {n_unnamed} of {file.metadata.num_rows} without one "
            "(null). Leave these rows out of the file, or copy it again."
        )
    return sorted(names)


def _partition(sizes: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Group the row groups of a file into partitions. Return row groups and first row of each partition."""
    parts: list[tuple[int, ...]] = []
    starts: list[int] = []
    row, current, first = 0, [], 0
    for group, size in enumerate(sizes):
        current.append(group)
        row += size
        if row - first >= PARTITION or group == len(sizes) - 1:
            if row > first:
                parts.append(tuple(current))
                starts.append(first)
            current, first = [], row
    return parts, starts


def _read_rows(
    part: tuple[tuple[int, ...], int], *, path: str, names: list[str], columns: list[str] | None = None
) -> pd.DataFrame:
    """Read one partition. dask passes the `columns` it needs."""
    groups, start = part
    wanted = [raw for raw, name in TRANSCRIPT_COLUMNS.items() if columns is None or name in columns]
    try:
        with pq.ParquetFile(path, read_dictionary=["feature_name"]) as file:
            present = [name for name in wanted if name in file.schema_arrow.names]
            table = file.read_row_groups(list(groups), columns=present)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(Path(path), error) from error
    read: dict[str, Any] = {}
    for raw in table.column_names:
        column = table[raw]
        if raw == "feature_name":
            read[raw] = _as_categorical(column, names)
        elif raw == "cell_id":
            read[raw] = pd.array(_owners(column), dtype="string[pyarrow]")
        else:
            read[TRANSCRIPT_COLUMNS[raw]] = column.to_numpy()
    frame = pd.DataFrame(read, index=pd.RangeIndex(start, start + table.num_rows))
    return frame if columns is None else frame[columns]


def _as_categorical(column: pa.ChunkedArray, names: list[str]) -> pd.Categorical[str]:
    categories = pd.Index(names)
    codes = [np.empty(0, dtype=np.int32)]
    for chunk in column.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        positions = categories.get_indexer(encoded.dictionary.cast(pa.string()).to_pylist()).astype(np.int32)
        codes.append(positions[encoded.indices.to_numpy(zero_copy_only=False)] if len(encoded) else codes[0])
    return pd.Categorical.from_codes(np.concatenate(codes), categories=categories)


def _owners(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return cell ids as text, with `UNASSIGNED` for transcripts outside all cells."""
    owners = pc.fill_null(as_text(column), UNASSIGNED)
    return pc.if_else(pc.is_in(owners, value_set=pa.array(NOBODY)), UNASSIGNED, owners)


def _check_transcripts(
    names: list[str], sampled: pa.Table, cells: geopandas.GeoDataFrame, features: pd.Index, path: Path
) -> None:
    """Raise if feature names, cells or positions of a sample of transcripts do not match the run."""
    if not features.isin(names).any():
        raise ValueError(
            f"Expected transcripts of the run's features, such as {features[0]!r}, in {path}, found others, such as "
            f"{names[0]!r}. Take all files of one run."
        )
    encoded = _owners(sampled["cell_id"]).combine_chunks().dictionary_encode()
    values = pd.Index(encoded.dictionary.to_pylist())
    rows = cells.index.get_indexer(values)
    unknown = values[(rows < 0) & (values != UNASSIGNED)]
    # A bundle cut out of a larger one has transcripts of cells outside its border.
    if len(unknown) > len(values) / 2:
        raise ValueError(
            f"Expected transcripts in the run's cells, such as {cells.index[0]!r}, in {path}, found {len(unknown)} of "
            f"{len(values)} cells to be others, such as {unknown[0]!r}. Take all files of one run."
        )
    owners = rows[encoded.indices.to_numpy(zero_copy_only=False)]
    points = np.column_stack([sampled[name].to_numpy() for name in ("x_location", "y_location")])[owners >= 0]
    apart = ~in_boxes(points, cells.geometry.bounds.to_numpy()[owners[owners >= 0]])
    if apart.size and apart.mean() > 0.5:
        raise ValueError(
            f"Expected transcripts within the outlines of their cells in {path}, found {apart.mean():.0%} elsewhere. "
            "Take all files of one run."
        )


def _as_parquet(path: Path) -> Path:
    """Return a Parquet copy of a CSV file, from the cache or by streaming the file once."""
    state = path.stat()
    identity = hashlib.sha256(f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:32]
    finished = cache_dir() / "tables" / f"{identity}.parquet"
    if _is_parquet(finished):
        mark_used(finished)
        return finished
    remove_abandoned(finished.parent)
    with replacing(finished) as unfinished:
        try:
            reading = pyarrow.csv.ReadOptions(block_size=BLOCK)
            with pyarrow.csv.open_csv(path, reading) as rows:
                names = rows.schema.names
            check_columns(names, REQUIRED_OF_TRANSCRIPTS, path)
            # pyarrow guesses types from the first rows, so the types are set and other columns are left out.
            kept = [name for name in TRANSCRIPT_COLUMNS if name in names]
            converting = pyarrow.csv.ConvertOptions(column_types=CSV_TYPES, include_columns=kept)
            with (
                pyarrow.csv.open_csv(path, reading, convert_options=converting) as rows,
                pq.ParquetWriter(unfinished, rows.schema) as writer,
            ):
                for batch in rows:
                    writer.write_batch(batch)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise unreadable(path, error) from error
    trim()
    return finished


def _is_parquet(path: Path) -> bool:
    """Return whether a table is in the cache. Warn if the cached table is damaged."""
    try:
        pq.read_metadata(path)
    except FileNotFoundError:
        return False
    except (pa.ArrowException, OSError):
        warnings.warn(f"The cached table {path} is damaged and is written again.", UserWarning, stacklevel=2)
        return False
    return True
