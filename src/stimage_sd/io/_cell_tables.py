"""Tables of segmented cells, as the programs that segment multiplex images write them, in one form.

The programs agree on a row a cell and on little else. A position, an area and an id are found by the spellings
below, whatever their case, spaces and punctuation; which columns are intensities follows from the layout.
"""

from __future__ import annotations

import csv
import gzip
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import readfcs
from flowio.exceptions import FlowIOException

from stimage_sd.io._section import check_unique

Unit = Literal["px", "um"]

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
#: columns of a cell's centre, in the order in which they are looked for
POSITIONS: list[tuple[str, str, Unit]] = [
    ("x", "y", "px"),
    ("X_centroid", "Y_centroid", "px"),
    ("centroid_x", "centroid_y", "px"),
    ("Centroid X px", "Centroid Y px", "px"),
    ("Centroid X µm", "Centroid Y µm", "um"),
    ("x_um", "y_um", "um"),
]
#: columns of a cell's area, square pixels or micrometres
AREAS: list[tuple[str, Unit]] = [
    ("size", "px"),
    ("Area", "px"),
    ("Cell: Area px^2", "px"),
    ("Area px^2", "px"),
    ("Cell: Area µm^2", "um"),
    ("Area µm^2", "um"),
]
IDS = ("cell_id", "CellID", "Object ID", "instance_id", "ID")
#: columns that tell which picture a cell is of
PICTURES = ("region", "Image", "ImageID")
#: CODEX Processor: cycle, channel and marker, such as ``cyc002_ch003:Ki67``
AKOYA = re.compile(r"^cyc\d+_ch\d+(?::(?P<name>.*))?$", re.IGNORECASE)
#: QuPath's two ways to name a mean intensity: over the whole cell, else over its nucleus
QUPATH = [
    re.compile(pattern)
    for part in ("Cell", "Nucleus")
    for pattern in (rf"^(?P<name>.+): {part}: Mean$", rf"^{part}: (?P<name>.+) mean$")
]
#: numeric columns of other tables that are no intensities, as `_plain` spells them
NOT_INTENSITIES = {
    *("z", "xtile", "ytile", "tile", "tilenum", "tilenr", "tilenumber", "region", "fov", "cluster", "phenotype"),
    *("area", "size", "nucleusarea", "nucleusareapx2", "nucleusareaum2", "perimeter", "diameter", "equivalentdiameter"),
    *("majoraxislength", "minoraxislength", "eccentricity", "solidity", "extent", "orientation", "circularity"),
    *("rowcentroid", "columncentroid", "homogeneity", "label", "unnamed0", ""),
}
NOT_FCS = (FlowIOException, ValueError, KeyError, IndexError, EOFError, NotImplementedError)
NOT_TEXT = (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError, EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class CellTable:
    """Segmented cells of one picture.

    Parameters
    ----------
    path
        The file.
    ids
        A name a cell, each once; integers where they all are.
    positions
        ``(n, 2)`` x, y of the cells' centres, in `unit`.
    unit
        Pixels of the picture, or micrometres.
    areas
        ``(n,)`` cells' areas in squares of `area_unit`; `None` where the table has none.
    area_unit
        Unit of the side of such a square.
    intensities
        ``float32 (n, n_channels)``.
    columns
        The intensities' columns in the file.
    channels
        What those columns name, as it stands: it may be empty, or there twice.
    others
        The remaining columns.
    """

    path: Path
    ids: pd.Index
    positions: np.ndarray
    unit: Unit
    areas: np.ndarray | None
    area_unit: Unit
    intensities: np.ndarray
    columns: list[str]
    channels: list[str]
    others: pd.DataFrame


def read_cells(path: Path) -> CellTable:
    """Read a table of cells.

    Parameters
    ----------
    path
        A ``.csv``, ``.tsv`` or ``.txt`` (tabs), or one of them ending in ``.gz``, or an ``.fcs`` file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is empty, truncated or of another kind, has no positions, ids that are repeated, no intensities, cells
        of several pictures, or anything but finite numbers among positions, areas and intensities.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(
            f"Expected a table of cells (.csv, .tsv, .txt, their .gz, or .fcs) at {path}, found {kind}. Check the path."
        )
    frame = _read_fcs(path) if path.suffix.lower() == ".fcs" else _read_text(path)
    if frame.empty:
        raise ValueError(f"Expected cells in {path}, found {len(frame)} rows of {frame.shape[1]} columns.")
    raw = [str(name) for name in frame.columns]
    short = [_short(name) for name in raw]

    across, down, unit = _find_positions(short, path)
    area, area_unit = _find_area(short)
    identity = next((number for name in IDS if (number := _find(short, name)) is not None), None)
    _check_one_picture(frame, raw, short, path)
    channels = _find_channels(frame, raw, short, used={across, down, area, identity})
    if not channels:
        raise ValueError(f"Expected columns of intensities in {path}, found none among {raw}.")

    ids = pd.RangeIndex(len(frame)) if identity is None else _as_ids(frame.iloc[:, identity])
    check_unique(ids.astype(str), what="cell id", where=str(path))
    left_out = {across, down, identity, *channels}
    rest = [number for number in range(len(raw)) if number not in left_out]
    return CellTable(
        path=path,
        ids=ids,
        positions=_numbers(frame, raw, [across, down], path),
        unit=unit,
        areas=None if area is None else _positive(_numbers(frame, raw, [area], path)[:, 0], raw[area], path),
        area_unit=area_unit,
        intensities=_numbers(frame, raw, list(channels), path).astype(np.float32),
        columns=[raw[number] for number in channels],
        channels=list(channels.values()),
        others=frame.iloc[:, rest].set_axis([short[number] for number in rest], axis=1),
    )


# --------------------------------------------------------------------------------------------------
# files


def _read_text(path: Path) -> pd.DataFrame:
    compressed = path.suffix.lower() == ".gz"
    kind = Path(path.stem).suffix.lower() if compressed else path.suffix.lower()
    if kind not in SEPARATORS:
        raise ValueError(f"Expected a table of cells named .csv, .tsv, .txt, their .gz, or .fcs, found {path}.")
    separator = SEPARATORS[kind]
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if compressed else path.open(encoding="utf-8-sig") as lines:
            names = next(csv.reader(lines, delimiter=separator), [])
        frame = pd.read_csv(path, sep=separator, encoding="utf-8-sig", low_memory=False, skip_blank_lines=True)
    except NOT_TEXT as error:
        raise ValueError(
            f"Expected a complete table of cells in {path}, found that it is empty, damaged or no text "
            f"({' '.join(str(error).split()) or type(error).__name__}). Copy or export it again."
        ) from error
    last = [] if compressed else _last_row(path, separator)
    if len(names) != frame.shape[1] or not isinstance(frame.index, pd.RangeIndex) or len(last) not in (0, len(names)):
        found = len(last) if len(last) not in (0, len(names)) else "another number of"
        raise ValueError(
            f"Expected {len(names)} values a row in {path}, as its header has, found {found} values. The file is "
            "truncated or not what its header says; copy or export it again."
        )
    # Repeated names are told apart later, with those of the picture, not by pandas.
    return frame.set_axis(names, axis=1)


def _last_row(path: Path, separator: str) -> list[str]:
    """Return the fields of a file's last row: pandas fills a row that is cut off, without a word."""
    with path.open("rb") as file:
        file.seek(-min(os.fstat(file.fileno()).st_size, 1 << 20), os.SEEK_END)
        lines = file.read().decode("utf-8", errors="replace").rstrip("\r\n").splitlines()
    return next(csv.reader(lines[-1:], delimiter=separator), [])


def _read_fcs(path: Path) -> pd.DataFrame:
    """Read the events of an FCS file under ``short:long`` names, as the CODEX Processor's CSV has them."""
    try:
        file = readfcs.ReadFCS(path)
        stated = int(file.meta["tot"])
        several = int(file.meta["nextdata"]) != 0
        events, names = file.data, file.channels
    except NOT_FCS as error:
        raise ValueError(
            f"Expected a complete FCS file, found that {path} is empty, truncated, damaged or no FCS "
            f"({' '.join(str(error).split()) or type(error).__name__}). Copy or export it again."
        ) from error
    if several or len(events) != stated or len(names) != events.shape[1]:
        raise ValueError(
            f"Expected one data set of {stated} cells, each with {len(names)} values, in {path}, found "
            f"{'several data sets' if several else f'{len(events)} cells with {events.shape[1]} values'}. "
            "Export the picture's cells again, by themselves."
        )
    long = names["PnS"] if "PnS" in names else pd.Series("", index=names.index)
    together = [
        first if not second.strip() or second == first or ":" in first else f"{first}:{second}"
        for first, second in zip(names["PnN"].astype(str), long.astype(str), strict=True)
    ]
    return events.set_axis(together, axis=1)


# --------------------------------------------------------------------------------------------------
# columns


def _short(name: str) -> str:
    """Return ``x`` for ``x:x``; a name of any other form as it is."""
    first, _, second = name.partition(":")
    return first if first == second else name


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("µ", "u").replace("μ", "u"))


def _find(short: list[str], name: str) -> int | None:
    plain = [_plain(column) for column in short]
    return plain.index(_plain(name)) if _plain(name) in plain else None


def _find_positions(short: list[str], path: Path) -> tuple[int, int, Unit]:
    for first, second, unit in POSITIONS:
        across, down = _find(short, first), _find(short, second)
        if across is not None and down is not None:
            return across, down, unit
    wanted = ", ".join(f"{first!r} and {second!r}" for first, second, _ in POSITIONS)
    raise ValueError(
        f"Expected the cells' positions in {path}, in columns {wanted}, found none of these among {short}. Rename the "
        "columns."
    )


def _find_area(short: list[str]) -> tuple[int | None, Unit]:
    return next(((number, unit) for name, unit in AREAS if (number := _find(short, name)) is not None), (None, "px"))


def _check_one_picture(frame: pd.DataFrame, raw: list[str], short: list[str], path: Path) -> None:
    for name in PICTURES:
        number = _find(short, name)
        # Elsewhere a region is a part of the tissue that someone outlined.
        if number is None or (name == "region" and not any(AKOYA.match(column) for column in raw)):
            continue
        found = frame.iloc[:, number].unique()
        if len(found) > 1:
            raise ValueError(
                f"Expected the cells of one picture in {path}, found {len(found)} by column {raw[number]!r}: "
                f"{found[:5].tolist()}. Write a table for each, and read each as a section."
            )


def _find_channels(frame: pd.DataFrame, raw: list[str], short: list[str], used: set[int | None]) -> dict[int, str]:
    """Return the columns of intensities and what they name."""
    akoya = {number: match for number, name in enumerate(raw) if (match := AKOYA.match(name))}
    if akoya:
        return {number: (match["name"] or "").strip() for number, match in akoya.items()}
    for pattern in QUPATH:
        qupath = {number: match for number, name in enumerate(raw) if (match := pattern.match(name))}
        if qupath:
            return {number: match["name"] for number, match in qupath.items()}
    known = NOT_INTENSITIES | {_plain(name) for pair in POSITIONS for name in pair[:2]}
    known |= {_plain(name) for name, _ in AREAS} | {_plain(name) for name in IDS + PICTURES}
    return {
        number: name
        for number, name in enumerate(short)
        if number not in used and _plain(name) not in known and _is_measured(frame.iloc[:, number])
    }


def _is_measured(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _as_ids(values: pd.Series) -> pd.Index:
    """Return ids as integers where they are, as an FCS file has them as decimals."""
    if pd.api.types.is_numeric_dtype(values) and (values == values.round()).all():
        return pd.Index(values.to_numpy(dtype=np.int64))
    return pd.Index(values.astype(str).to_numpy(dtype=object))


def _numbers(frame: pd.DataFrame, raw: list[str], columns: list[int], path: Path) -> np.ndarray:
    """Return columns as finite float64, ``(n, n_columns)``."""
    values = np.empty((len(frame), len(columns)), dtype=np.float64)
    for place, number in enumerate(columns):
        column = frame.iloc[:, number]
        if not _is_measured(column):
            raise ValueError(f"Expected numbers in column {raw[number]!r} of {path}, found text or nothing.")
        values[:, place] = column.to_numpy(dtype=np.float64)
        wrong = ~np.isfinite(values[:, place])
        if wrong.any():
            raise ValueError(
                f"Expected finite numbers in column {raw[number]!r} of {path}, found {int(wrong.sum())} missing or "
                f"infinite, the first in row {int(np.argmax(wrong)) + 1}. Drop these cells, or export them again."
            )
    return values


def _positive(areas: np.ndarray, column: str, path: Path) -> np.ndarray:
    if areas.min() <= 0.0:
        raise ValueError(
            f"Expected positive areas in column {column!r} of {path}, found {areas.min():g} in row "
            f"{int(np.argmin(areas)) + 1}. Drop cells without any."
        )
    return areas
