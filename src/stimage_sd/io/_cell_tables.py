"""Read cell tables from segmentation programs for multiplex images into one form.

Tables have one row per cell. Position, area and id columns are found by the names below, ignoring case, spaces and
punctuation. The layout tells which columns are intensities.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import os
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from stimage_sd.io._section import check_unique
from stimage_sd.io._text import open_text, punctuation

Unit = Literal["px", "um"]

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
#: columns of a cell's center in a CosMx field of view; fields repeat coordinates
LOCAL = ("CenterX_local_px", "CenterY_local_px")
#: columns of a cell's center, in search order
POSITIONS: list[tuple[str, str, Unit]] = [
    ("x", "y", "px"),
    ("X_centroid", "Y_centroid", "px"),
    ("centroid_x", "centroid_y", "px"),
    ("Centroid X px", "Centroid Y px", "px"),
    ("Centroid X µm", "Centroid Y µm", "um"),
    ("x_um", "y_um", "um"),
    ("CenterX_global_px", "CenterY_global_px", "px"),
    (*LOCAL, "px"),
]
#: columns of a cell's area, in square pixels or square micrometers
AREAS: list[tuple[str, Unit]] = [
    ("size", "px"),
    ("Area", "px"),
    ("Cell: Area px^2", "px"),
    ("Area px^2", "px"),
    ("Cell: Area µm^2", "um"),
    ("Area µm^2", "um"),
]
IDS = ("cell_id", "CellID", "Object ID", "instance_id", "ID")
#: columns that name the image of a cell
PICTURES = ("region", "Image", "ImageID")
#: intensity columns of the CODEX Processor: cycle, channel and marker, such as ``cyc002_ch003:Ki67``
AKOYA = re.compile(r"^cyc\d+_ch\d+(?::(?P<name>.*))?$", re.IGNORECASE)
#: column names of a channel's mean, or else its median, in search order: QuPath (two spellings; whole cell, or else a
#: part of the cell), QuPath with StarDist, and CosMx
STATISTICS = [
    re.compile(pattern)
    for statistic in ("Mean", "Median")
    for pattern in (
        *(
            pattern
            for part in ("Cell", "Nucleus", "Cytoplasm", "Membrane")
            for pattern in (rf"^(?P<name>.+): {part}: {statistic}$", rf"^{part}: (?P<name>.+) {statistic.lower()}$")
        ),
        rf"^(?:ROI: .+: )?(?P<name>[^:]+): {statistic}$",
        rf"^{statistic}\.(?P<name>.+)$",
    )
]
#: numeric columns of other tables that are not intensities, as `_plain` spells them
NOT_INTENSITIES = {
    *("z", "xtile", "ytile", "tile", "tilenum", "tilenr", "tilenumber", "region", "fov", "cluster", "phenotype"),
    *("area", "size", "nucleusarea", "nucleusareapx2", "nucleusareaum2", "perimeter", "diameter", "equivalentdiameter"),
    *("majoraxislength", "minoraxislength", "eccentricity", "solidity", "extent", "orientation", "circularity"),
    *("rowcentroid", "columncentroid", "homogeneity", "label", "unnamed0", ""),
    *("slideid", "slide", "sample", "batch", "patient", "core", "roi", "index", "class", "celltype", "group", "score"),
    *("circ", "intden", "rawintden"),
}
#: words in the names of columns that are not intensities: cell shape and position, cell groups, other statistics than
#: mean and median
NOT_INTENSITY_WORDS = {
    *("length", "width", "height", "perimeter", "perim", "diameter", "radius", "area", "volume", "aspect", "ratio"),
    *("angle", "axis", "eccentricity", "elongation", "solidity", "circularity", "roundness", "compactness"),
    *("convexity", "feret", "caliper", "hull", "bbox", "centroid", "center", "centre", "position", "orientation"),
    *("distance", "dist", "std", "stddev", "stdev", "sd", "variance", "var", "cv", "skew", "skewness", "kurtosis"),
    *("entropy", "gini", "min", "max", "minimum", "maximum", "range", "quantile", "percentile", "probability"),
    *("neighbors", "neighbours", "cluster", "clusters", "metacluster", "leiden", "louvain", "kmeans", "phenograph"),
    *("flowsom", "parc", "phenotype", "community", "neighborhood", "neighbourhood", "niche", "motif", "lda"),
    *("umap", "tsne", "pca"),
}
#: the same kind of word with a number, such as ``umap1``
NUMBERED = re.compile(r"(umap|tsne|pc|kmeans|leiden|louvain|cluster)\d+")
#: number of molecules or genes per cell, such as ``nCount_RNA``
NUMBERS = re.compile(r"^n_?(count|feature|gene|umi|transcript)", re.IGNORECASE)
#: statistics left out where the channel has a mean
REPEATS = {"median", "sum", "total", "integrated", "mode"}
NOT_FCS = (ValueError, KeyError, IndexError, EOFError, NotImplementedError)
NOT_TEXT = (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError, EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class CellTable:
    """Segmented cells of one image.

    - `path`: file that was read.
    - `ids`: unique cell ids; integers where all ids are integers.
    - `positions`: ``(n, 2)`` x, y of the cell centers, in `unit`.
    - `unit`: pixels of the image, or micrometers.
    - `areas`: ``(n,)`` cell areas in square `area_unit`, or `None` where the table has no areas.
    - `area_unit`: pixels or micrometers, squared in `areas`.
    - `intensities`: ``float32 (n, n_channels)``.
    - `columns`: names of the intensity columns in the file.
    - `channels`: channel names from those columns. A name may be empty or repeated.
    - `others`: the remaining columns.
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

    def taken(self, chosen: np.ndarray) -> CellTable:
        """Return the table of the cells that the boolean mask `chosen` selects."""
        if chosen.all():
            return self
        return replace(
            self,
            ids=self.ids[chosen],
            positions=self.positions[chosen],
            areas=None if self.areas is None else self.areas[chosen],
            intensities=self.intensities[chosen],
            others=self.others[chosen],
        )


def read_cells(path: Path, wanted: Collection[str] = ()) -> CellTable:
    """Read a table of segmented cells.

    - `path`: a ``.csv``, ``.tsv`` or ``.txt`` (tabs) file, plain or gzipped (``.gz``), or an ``.fcs`` file.
    - `wanted`: numeric columns to read as intensities, whatever their names.
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
    identity = _find_ids(frame, short)
    # Positions within a field of view are ambiguous across several fields.
    _check_one_picture(frame, raw, short, path, ("fov",) if _plain(short[across]) == _plain(LOCAL[0]) else ())
    channels = _find_channels(frame, raw, short, used={across, down, area, identity}, wanted=wanted)
    if not channels:
        raise ValueError(f"Expected columns of intensities in {path}, found none among {raw}.")

    ids = pd.RangeIndex(len(frame)) if identity is None else _as_ids(frame.iloc[:, identity])
    check_unique(ids.astype(str), what="cell id", where=str(path))
    left_out = {across, down, identity, *channels}
    rest = [column for column in range(len(raw)) if column not in left_out]
    return CellTable(
        path=path,
        ids=ids,
        positions=_numbers(frame, raw, [across, down], path),
        unit=unit,
        areas=None if area is None else _positive(_numbers(frame, raw, [area], path)[:, 0], raw[area], path),
        area_unit=area_unit,
        intensities=_numbers(frame, raw, list(channels), path).astype(np.float32),
        columns=[raw[column] for column in channels],
        channels=list(channels.values()),
        others=frame.iloc[:, rest].set_axis([short[column] for column in rest], axis=1),
    )


# --------------------------------------------------------------------------------------------------
# files


def _read_text(path: Path) -> pd.DataFrame:
    kind = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if kind not in SEPARATORS:
        raise ValueError(f"Expected a table of cells named .csv, .tsv, .txt, their .gz, or .fcs, found {path}.")
    try:
        with open_text(path) as lines:
            encoding, compressed = lines.encoding, isinstance(lines.buffer, gzip.GzipFile)
            marks = punctuation(lines, SEPARATORS[kind])
            separator = marks["sep"]
            names = next(csv.reader(lines, delimiter=separator), [])
            lines.seek(0)
            frame = pd.read_csv(lines, **marks, low_memory=False, skip_blank_lines=True)
    except NOT_TEXT as error:
        raise ValueError(
            f"Expected a complete table of cells in {path}, found that it is empty, damaged or not text "
            f"({' '.join(str(error).split()) or type(error).__name__}). Copy or export it again."
        ) from error
    last = [] if compressed else _last_row(path, separator, encoding)
    if len(names) != frame.shape[1] or not isinstance(frame.index, pd.RangeIndex) or len(last) not in (0, len(names)):
        n_values = len(last) if len(last) not in (0, len(names)) else "another number of"
        raise ValueError(
            f"Expected {len(names)} values per row in {path}, as its header has, found {n_values} values. The file is "
            "truncated or not what its header says; copy or export it again."
        )
    # Undo pandas' suffixes: repeated names get theirs later, together with the image's names.
    return frame.set_axis(names, axis=1)


def _last_row(path: Path, separator: str, encoding: str) -> list[str]:
    """Return the fields of the last row, since pandas silently fills a truncated row."""
    with path.open("rb") as file:
        begins_little = file.read(2) == codecs.BOM_UTF16_LE
        # an even number of bytes, since UTF-16 has two bytes per character
        file.seek(-min(os.fstat(file.fileno()).st_size // 2 * 2, 1 << 20), os.SEEK_END)
        if encoding == "utf-16":
            encoding = "utf-16-le" if begins_little else "utf-16-be"
        lines = file.read().decode(encoding, errors="replace").rstrip("\r\n").splitlines()
    return next(csv.reader(lines[-1:], delimiter=separator), [])


def _read_fcs(path: Path) -> pd.DataFrame:
    """Read the events of an FCS file with ``short:long`` names, as in the CSV of the CODEX Processor."""
    try:
        import readfcs
        from flowio.exceptions import FlowIOException
    except ImportError as error:
        raise ModuleNotFoundError(
            f'Found no {error.name}, which {path} needs. Install it with `pip install "stimage-sd[codex]"`, or export '
            "the cells as CSV."
        ) from error
    try:
        file = readfcs.ReadFCS(path)
        stated = int(file.meta["tot"])
        several = int(file.meta["nextdata"]) != 0
        events, names = file.data, file.channels
    except (FlowIOException, *NOT_FCS) as error:
        raise ValueError(
            f"Expected a complete FCS file, found that {path} is empty, truncated, damaged or not FCS "
            f"({' '.join(str(error).split()) or type(error).__name__}). Copy or export it again."
        ) from error
    if several or len(events) != stated or len(names) != events.shape[1]:
        raise ValueError(
            f"Expected one data set of {stated} cells, each with {len(names)} values, in {path}, found "
            f"{'several data sets' if several else f'{len(events)} cells with {events.shape[1]} values'}. "
            "Export the cells of this image again, in a file without other data."
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
    """Return ``x`` for ``x:x``, and any other name unchanged."""
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
    return next(((column, unit) for name, unit in AREAS if (column := _find(short, name)) is not None), (None, "px"))


def _find_ids(frame: pd.DataFrame, short: list[str]) -> int | None:
    """Return the number of the id column: the first with unique values, or else the first."""
    names = {_plain(name): rank for rank, name in reversed(list(enumerate(IDS)))}
    ranked = sorted((names[_plain(name)], column) for column, name in enumerate(short) if _plain(name) in names)
    return next((n for _, n in ranked if frame.iloc[:, n].is_unique), ranked[0][1] if ranked else None)


def _check_one_picture(
    frame: pd.DataFrame, raw: list[str], short: list[str], path: Path, others: tuple[str, ...]
) -> None:
    for name in PICTURES + others:
        index = _find(short, name)
        # "region" is an image only in the CODEX Processor. Elsewhere it is an outlined tissue area.
        if index is None or (name == "region" and not any(AKOYA.match(column) for column in raw)):
            continue
        pictures = frame.iloc[:, index].unique()
        if len(pictures) > 1:
            raise ValueError(
                f"Expected the cells of one picture in {path}, found {len(pictures)} by column {raw[index]!r}: "
                f"{pictures[:5].tolist()}. Write one table per picture, and read each table as a section."
            )


def _find_channels(
    frame: pd.DataFrame, raw: list[str], short: list[str], *, used: set[int | None], wanted: Collection[str]
) -> dict[int, str]:
    """Return the numbers of the intensity columns with their channel names."""
    akoya = {column: match for column, name in enumerate(raw) if (match := AKOYA.match(name))}
    if akoya:
        return {column: (match["name"] or "").strip() for column, match in akoya.items()}
    for pattern in STATISTICS:
        means = {column: match["name"] for column, name in enumerate(raw) if (match := pattern.match(name))}
        if means:
            return means
    known = NOT_INTENSITIES | {_plain(name) for pair in POSITIONS for name in pair[:2]}
    known |= {_plain(name) for name, _ in AREAS} | {_plain(name) for name in IDS + PICTURES}
    if {"ar", "round"} <= {_plain(name) for name in short}:
        known |= {"ar", "round"}  # ImageJ's aspect ratio and roundness; AR without "round" is the androgen receptor
    candidates = {
        column: name
        for column, name in enumerate(short)
        if column not in used and _is_measured(frame.iloc[:, column])
        and (name in wanted or not (_plain(name) in known or NUMBERS.match(name) or _is_no_protein(name)))
    }  # fmt: skip
    stems = [_words(name) - {"mean"} for name in candidates.values() if "mean" in _words(name)]
    return {
        column: name
        for column, name in candidates.items()
        if name in wanted or not (_words(name) & REPEATS and _words(name) - REPEATS in stems)
    }


def _words(name: str) -> set[str]:
    """Return the words of a name in lower case. ``AspectRatio`` has two words."""
    return set(re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))


def _is_no_protein(name: str) -> bool:
    return any(word in NOT_INTENSITY_WORDS or NUMBERED.fullmatch(word) for word in _words(name))


def _is_measured(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _as_ids(values: pd.Series) -> pd.Index:
    """Return ids as integers where all are whole numbers, since FCS files store ids as decimals."""
    if pd.api.types.is_numeric_dtype(values) and (values == values.round()).all():
        return pd.Index(values.to_numpy(dtype=np.int64))
    return pd.Index(values.astype(str).to_numpy(dtype=object))


def _numbers(frame: pd.DataFrame, raw: list[str], columns: list[int], path: Path) -> np.ndarray:
    """Return columns as finite float64, ``(n, n_columns)``."""
    values = np.empty((len(frame), len(columns)), dtype=np.float64)
    for place, index in enumerate(columns):
        column = frame.iloc[:, index]
        if not _is_measured(column):
            raise ValueError(f"Expected numbers in column {raw[index]!r} of {path}, found text or nothing.")
        values[:, place] = column.to_numpy(dtype=np.float64)
        wrong = ~np.isfinite(values[:, place])
        if wrong.any():
            raise ValueError(
                f"Expected finite numbers in column {raw[index]!r} of {path}, found {int(wrong.sum())} missing or "
                f"infinite, the first in row {int(np.argmax(wrong)) + 1}. Drop these cells, or export them again."
            )
    return values


def _positive(areas: np.ndarray, column: str, path: Path) -> np.ndarray:
    if areas.min() <= 0.0:
        raise ValueError(
            f"Expected positive areas in column {column!r} of {path}, found {areas.min():g} in row "
            f"{int(np.argmin(areas)) + 1}. Drop cells without an area."
        )
    return areas
