"""The files of a Visium HD run: the matrix of bins, their positions, scale factors, and the slide's transformation."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse as sp

from stimage_sd.io._section import check_unique

#: the newest Space Ranger whose outputs this reader was written for
NEWEST = 4
#: two ways to the same number may differ by this much
TOLERANCE = 0.05
POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
SCALES = ["bin_size_um", "microns_per_pixel", "spot_diameter_fullres", "tissue_hires_scalef"]
#: what reading a damaged HDF5 file ends in
BROKEN = (OSError, EOFError, KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Matrix:
    """Counts as the file has them.

    Parameters
    ----------
    values
        ``(n_bins, n_features)``.
    barcodes
        Names of the bins.
    features
        A row a feature: index the name, ``gene_ids``, ``feature_types``.
    version
        What the file says of the software that wrote it.
    """

    values: sp.csr_matrix
    barcodes: pd.Index
    features: pd.DataFrame
    version: str | None


@dataclass(frozen=True)
class Positions:
    """Where the bins in tissue lie that the matrix has.

    Parameters
    ----------
    rows
        Their rows in the matrix.
    lattice
        ``(n, 2)`` row and column in the array.
    centres
        ``(n, 2)`` x, y, full-resolution px.
    n_in_tissue
        Bins in tissue, whether the matrix has them or not.
    """

    rows: np.ndarray
    lattice: np.ndarray
    centres: np.ndarray
    n_in_tissue: int


@dataclass(frozen=True)
class Scale:
    """Micrometres a full-resolution pixel, and pixels of the high-resolution image a full-resolution pixel."""

    mpp: float
    hires: float


def find_entry(folder: Path, name: str) -> Path | None:
    """Return the entry of a folder that has a name, with or without a prefix."""
    found = [folder / name] if (folder / name).exists() else sorted(folder.glob(f"*_{name}"))
    if len(found) > 1:
        raise ValueError(
            f"Expected one {name} in {folder}, found {[entry.name for entry in found]}. Give each run its own folder."
        )
    return found[0] if found else None


def read_scale(path: Path, bin_um: int) -> Scale:
    """Read the scale factors, and check that they are of bins of this size."""
    try:
        scales = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected JSON in {path}, found something else ({error}). Copy it again.") from error
    found = scales if isinstance(scales, dict) else {}
    wrong = [name for name in SCALES if not (isinstance(found.get(name), int | float) and 0 < found[name] < np.inf)]
    if wrong:
        raise ValueError(
            f"Expected positive {SCALES} in {path}, found {scales!r}; missing or not positive: {wrong}. Copy it again."
        )
    by_diameter = found["spot_diameter_fullres"] * found["microns_per_pixel"]
    if found["bin_size_um"] != bin_um or abs(by_diameter / bin_um - 1.0) > TOLERANCE:
        raise ValueError(
            f"Expected bins of {bin_um} µm in {path}, found `bin_size_um` {found['bin_size_um']} and a diameter of "
            f"{by_diameter:.2f} µm (`spot_diameter_fullres` times `microns_per_pixel`). Take the files of one run."
        )
    return Scale(float(found["microns_per_pixel"]), float(found["tissue_hires_scalef"]))


def read_matrix(path: Path) -> Matrix:
    """Read a matrix of bins and features."""
    try:
        with h5py.File(path, "r") as file:
            version = _software(file)
            group = file["matrix"]
            n_features, n_bins = (int(size) for size in group["shape"][:])
            # Stored by columns, features × bins; the same arrays by rows are bins × features. Numbers of features fit
            # 32 bits, and are half the matrix in memory.
            parts = (group["data"][:], group["indices"].astype(np.int32)[:], group["indptr"][:])
            values = sp.csr_matrix(parts, shape=(n_bins, n_features))
            values.check_format(full_check=True)
            barcodes = pd.Index(group["barcodes"].asstr()[:].astype(object))
            kinds = {"gene_ids": "id", "feature_types": "feature_type"}
            columns = {name: group["features"][own].asstr()[:].astype(object) for name, own in kinds.items()}
            features = pd.DataFrame(columns, index=pd.Index(group["features"]["name"].asstr()[:].astype(object)))
        if len(barcodes) != n_bins or len(features) != n_features:
            raise ValueError(f"{len(barcodes)} names of {n_bins} bins, {len(features)} names of {n_features} features")
    except BROKEN as error:
        raise _unreadable(path, error) from error
    if not n_bins or not n_features:
        raise ValueError(f"Expected bins and features in {path}, found {n_bins} and {n_features}. Copy it again.")
    check_unique(barcodes, what="bin", where=str(path))
    number = re.search(r"\d+", version or "")
    if number is not None and int(number.group()) > NEWEST:
        warnings.warn(
            f"{path.name} was written by {version!r}; this reader knows Space Ranger up to version {NEWEST} and tries.",
            UserWarning,
            stacklevel=3,
        )
    return Matrix(values, barcodes, features, version)


def read_positions(path: Path, matrix: Matrix, matrix_path: Path) -> Positions:
    """Read the positions of the bins in tissue that the matrix has, in its order.

    There are millions of bins at 2 µm; names are matched within Arrow, in a tenth of the memory of Python's strings.
    """
    try:
        found = pq.read_schema(path).names
        missing = [name for name in POSITION_COLUMNS if name not in found]
        if missing:
            raise ValueError(f"columns {found} without {missing}")
        # Filtered as it is read: most of a slide may be bare.
        inside = pq.read_table(path, columns=POSITION_COLUMNS, filters=pc.field("in_tissue") == 1).combine_chunks()
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from error
    lacking = [name for name in POSITION_COLUMNS if inside[name].null_count]
    if not inside.num_rows or lacking:
        raise ValueError(
            f"Expected bins in tissue with all of {POSITION_COLUMNS} in {path}, found {lacking or 'none in tissue'}. "
            "Copy it again."
        )
    if pc.count_distinct(inside["barcode"]).as_py() != inside.num_rows:
        raise ValueError(f"Expected every bin once in {path}, found some repeated. Copy it again.")
    names = pa.array(matrix.barcodes.to_numpy(), pa.string())
    where = pc.index_in(names, value_set=_one(inside["barcode"]))
    unplaced = names.filter(pc.is_null(where))
    if len(unplaced):
        everywhere = pq.read_table(path, columns=["barcode"])["barcode"]
        unknown = unplaced.filter(pc.invert(pc.is_in(unplaced, value_set=_one(everywhere))))
        if len(unknown) or len(unplaced) == len(names):
            example = f"{len(unknown)} without, as {unknown[0].as_py()!r}" if len(unknown) else "none of them in tissue"
            raise ValueError(
                f"Expected every bin of {matrix_path} in {path}, found {example} (the positions are such as "
                f"{inside['barcode'][0].as_py()!r}). Take both files of one run and one size."
            )
    rows = np.flatnonzero(pc.is_valid(where).to_numpy(zero_copy_only=False))
    taken = inside.take(where.drop_null())
    lattice, centres = (
        np.column_stack([taken[name].to_numpy() for name in pair])
        for pair in (("array_row", "array_col"), ("pxl_col_in_fullres", "pxl_row_in_fullres"))
    )
    if not np.isfinite(centres).all() or not np.isfinite(lattice).all():
        raise ValueError(f"Expected finite positions in {path}, found NaN or infinity. Copy it again.")
    n_in_tissue = inside.num_rows
    del inside, names, where, taken
    # Arrow keeps what it has freed, which here is several times what is left.
    pa.default_memory_pool().release_unused()
    return Positions(rows, lattice.astype(np.int32), centres.astype(np.float64), n_in_tissue)


def read_slide_transform(path: Path, slide_um: float) -> np.ndarray | None:
    """Read the ``(3, 3)`` matrix from column and row of the slide's squares to pixels; `None` where none was written.

    Squares count their centres: the first is number 0 and has its centre there.
    """
    try:
        with h5py.File(path, "r") as file:
            about = json.loads(file.attrs["metadata_json"])
        pitch = float(about["spot_pitch"])
        matrix = (about.get("transform_matrices") or {}).get("spot_colrow_to_microscope_colrow")
        transform = None if matrix is None else np.asarray(matrix, dtype=np.float64).reshape(3, 3)
    except BROKEN as error:
        raise _unreadable(path, error) from error
    if pitch != slide_um:
        raise ValueError(f"Expected a `spot_pitch` of {slide_um} µm in {path}, found {pitch}. Copy it again.")
    return transform


def _software(file: h5py.File) -> str | None:
    value: Any = file.attrs.get("software_version")
    if value is None:
        return None
    value = np.asarray(value).ravel()[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def _one(column: pa.ChunkedArray) -> pa.Array:
    names = column.cast(pa.string())
    return names.chunk(0) if names.num_chunks == 1 else names.combine_chunks()


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"Expected a complete file as Space Ranger writes it, found that {path} is truncated, damaged or of another "
        f"kind ({reason}). Copy it again."
    )
