"""The transcripts of a Xenium bundle, read lazily and checked against the cells and the features."""

from __future__ import annotations

import hashlib
import os
import tempfile
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
from stimage_sd.io._xenium_parts import BLOCK, CSV_TYPES, as_text, check_columns, in_boxes, unreadable

#: rows of transcripts a partition, at least: one is some 60 MB
PARTITION = 1_000_000
#: what a transcript outside all cells has for a cell
UNASSIGNED = "UNASSIGNED"
#: the same in the first version, and in tables that other programs wrote
NOBODY = ("-1", "")
#: columns of the transcripts that are kept, and what they are called here
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

    `cells` are the outlines, `features` the names of the matrix; the transcripts have to agree with both. Read at
    once are the file's directory, one part's cells and places, and, a part at a time, which features there are:
    without these a lazy column has no known categories.
    """
    source = path if path.suffix == ".parquet" else _as_parquet(path)
    try:
        with pq.ParquetFile(source, read_dictionary=["feature_name"]) as file:
            check_columns(file.schema_arrow.names, REQUIRED_OF_TRANSCRIPTS, path)
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
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
    # Parsing would put the columns together one by one, and each would read the file again: 8 times slower. What it
    # adds is the same for no rows.
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
    """Gather the names that occur; only dictionaries are decoded, and one part of the column is held at a time."""
    names: set[str] = set()
    for number in range(file.num_row_groups):
        for chunk in file.read_row_group(number, columns=["feature_name"])["feature_name"].chunks:
            encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
            names.update(encoded.dictionary.cast(pa.string()).to_pylist())
    if None in names:
        raise ValueError("some transcripts have no feature name")
    return sorted(names)


def _partition(sizes: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Group a file's row groups into partitions; return the groups and the first row of each."""
    parts: list[tuple[int, ...]] = []
    starts: list[int] = []
    row, current, first = 0, [], 0
    for number, size in enumerate(sizes):
        current.append(number)
        row += size
        if row - first >= PARTITION or number == len(sizes) - 1:
            if row > first:
                parts.append(tuple(current))
                starts.append(first)
            current, first = [], row
    return parts, starts


def _read_rows(
    part: tuple[tuple[int, ...], int], *, path: str, names: list[str], columns: list[str] | None = None
) -> pd.DataFrame:
    """Read one partition; dask asks for the `columns` that it needs."""
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
        own = categories.get_indexer(encoded.dictionary.cast(pa.string()).to_pylist()).astype(np.int32)
        codes.append(own[encoded.indices.to_numpy(zero_copy_only=False)] if len(encoded) else codes[0])
    return pd.Categorical.from_codes(np.concatenate(codes), categories=categories)


def _owners(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return cell ids as text, and one word for no cell."""
    owners = pc.fill_null(as_text(column), UNASSIGNED)
    return pc.if_else(pc.is_in(owners, value_set=pa.array(NOBODY)), UNASSIGNED, owners)


def _check_transcripts(
    names: list[str], sampled: pa.Table, cells: geopandas.GeoDataFrame, features: pd.Index, path: Path
) -> None:
    """Raise where names, cells or places of some transcripts are not those of the run."""
    if not features.isin(names).any():
        raise ValueError(
            f"Expected transcripts of the run's features, such as {features[0]!r}, in {path}, found others, such as "
            f"{names[0]!r}. Take all files of one run."
        )
    encoded = _owners(sampled["cell_id"]).combine_chunks().dictionary_encode()
    found = pd.Index(encoded.dictionary.to_pylist())
    rows = cells.index.get_indexer(found)
    unknown = found[(rows < 0) & (found != UNASSIGNED)]
    # A cut-out has transcripts of cells that lie beyond its border.
    if len(unknown) > len(found) / 2:
        raise ValueError(
            f"Expected transcripts in the run's cells, such as {cells.index[0]!r}, in {path}, found {len(unknown)} of "
            f"{len(found)} cells to be others, such as {unknown[0]!r}. Take all files of one run."
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
    """Return a copy of a CSV file as Parquet, from the cache or by streaming it once."""
    state = path.stat()
    identity = hashlib.sha256(f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:32]
    finished = cache_dir() / "tables" / f"{identity}.parquet"
    if finished.is_file():
        return finished
    finished.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".partial", dir=finished.parent)
    os.close(handle)
    try:
        reading = pyarrow.csv.ReadOptions(block_size=BLOCK)
        with pyarrow.csv.open_csv(path, reading) as rows:
            names = rows.schema.names
        check_columns(names, REQUIRED_OF_TRANSCRIPTS, path)
        # Types are told by a file's first rows, which other columns may belie.
        kept = [name for name in TRANSCRIPT_COLUMNS if name in names]
        converting = pyarrow.csv.ConvertOptions(column_types=CSV_TYPES, include_columns=kept)
        with (
            pyarrow.csv.open_csv(path, reading, convert_options=converting) as rows,
            pq.ParquetWriter(unfinished, rows.schema) as writer,
        ):
            for batch in rows:
                writer.write_batch(batch)
        Path(unfinished).rename(finished)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, error) from error
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return finished
