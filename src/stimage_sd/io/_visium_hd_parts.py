"""Files of a Visium HD run: bin positions, scale factors, the slide transformation and outlines of cells."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from stimage_sd.io._geojson_features import Feature, polygon_of, read_features
from stimage_sd.io._section import check_unique
from stimage_sd.io._space_ranger import PIXEL_COLUMNS, POSITION_COLUMNS, TOLERANCE, read_scalefactors
from stimage_sd.io._tenx import BROKEN, Matrix, unreadable

#: newest major version of Space Ranger that this reader supports
NEWEST = 4
SCALES = ["microns_per_pixel", "tissue_hires_scalef"]
BIN_SCALES = ["bin_size_um", "spot_diameter_fullres"]


@dataclass(frozen=True)
class Positions:
    """Positions of the bins of the matrix that are in tissue.

    - `rows`: rows of the bins in the matrix.
    - `lattice`: ``(n, 2)`` row and column in the array.
    - `centers`: ``(n, 2)`` x, y, full-resolution px.
    """

    rows: np.ndarray
    lattice: np.ndarray
    centers: np.ndarray

    def taken(self, chosen: np.ndarray) -> Positions:
        """Return the positions of the bins in a mask."""
        if chosen.all():
            return self
        return Positions(self.rows[chosen], self.lattice[chosen], self.centers[chosen])


@dataclass(frozen=True)
class Scale:
    """Micrometers, and pixels of ``tissue_hires_image.png``, per full-resolution pixel."""

    mpp: float
    hires: float


def read_scale(path: Path, bin_um: int | None) -> Scale:
    """Read the scale factors, and check the bin size. Pass `None` as `bin_um` for cells."""
    values = read_scalefactors(path, SCALES if bin_um is None else [*SCALES, *BIN_SCALES])
    scale = Scale(float(values["microns_per_pixel"]), float(values["tissue_hires_scalef"]))
    if bin_um is None:
        return scale
    by_diameter = values["spot_diameter_fullres"] * scale.mpp
    if values["bin_size_um"] != bin_um or abs(by_diameter / bin_um - 1.0) > TOLERANCE:
        raise ValueError(
            f"Expected bins of {bin_um} µm in {path}, found `bin_size_um` {values['bin_size_um']} and a diameter of "
            f"{by_diameter:.2f} µm (`spot_diameter_fullres` times `microns_per_pixel`). Take the files of one run."
        )
    return scale


def warn_if_newer(matrix: Matrix, path: Path) -> None:
    """Warn if a matrix was written by a newer version of Space Ranger than this reader supports."""
    major = re.search(r"\d+", matrix.version or "")
    if major is not None and int(major.group()) > NEWEST:
        warnings.warn(
            f"{path.name} was written by {matrix.version!r}; this reader supports Space Ranger up to version {NEWEST} "
            "and may fail.",
            UserWarning,
            stacklevel=3,
        )


def read_positions(path: Path, matrix: Matrix, matrix_path: Path) -> Positions:
    """Read the positions of the bins of the matrix that are in tissue, in the order of the matrix.

    A section has millions of 2 µm bins. Names are matched in Arrow, with a tenth of the memory of Python strings.
    """
    try:
        columns = pq.read_schema(path).names
        missing = [name for name in POSITION_COLUMNS if name not in columns]
        if missing:
            raise ValueError(f"columns {columns} without {missing}")
        # Rows are filtered while reading, as most of a slide may have no tissue.
        wanted = pc.field("in_tissue").cast(pa.int64()) == 1
        inside = pq.read_table(path, columns=POSITION_COLUMNS, filters=wanted).combine_chunks()
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise unreadable(path, error) from error
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
        if "raw_" not in matrix_path.name:
            warnings.warn(
                f"{len(unplaced)} of {len(names)} bins of {matrix_path} are not in tissue in {path.name}, and are left "
                "out. Check that both files are of one run.",
                UserWarning,
                stacklevel=4,
            )
    rows = np.flatnonzero(pc.is_valid(where).to_numpy(zero_copy_only=False))
    taken = inside.take(where.drop_null())
    lattice, centers = (
        np.column_stack([taken[name].to_numpy() for name in pair])
        for pair in (("array_row", "array_col"), PIXEL_COLUMNS)
    )
    if not np.isfinite(centers).all() or not np.isfinite(lattice).all():
        raise ValueError(f"Expected finite positions in {path}, found NaN or infinity. Copy it again.")
    del inside, names, where, taken
    # Arrow keeps freed memory, which here is several times the memory in use.
    pa.default_memory_pool().release_unused()
    return Positions(rows, lattice.astype(np.int32), centers.astype(np.float64))


def read_slide_transform(path: Path, slide_um: float) -> np.ndarray | None:
    """Read the ``(3, 3)`` matrix from column and row of the 2 µm squares to pixels, or `None` if the file has none.

    Whole numbers are the centers of the squares. The center of the first square is at 0.
    """
    try:
        with h5py.File(path, "r") as file:
            about = json.loads(file.attrs["metadata_json"])
        pitch = float(about["spot_pitch"])
        matrix = (about.get("transform_matrices") or {}).get("spot_colrow_to_microscope_colrow")
        transform = None if matrix is None else np.asarray(matrix, dtype=np.float64).reshape(3, 3)
    except BROKEN as error:
        raise unreadable(path, error) from error
    if pitch != slide_um:
        raise ValueError(f"Expected a `spot_pitch` of {slide_um} µm in {path}, found {pitch}. Copy it again.")
    return transform


def _one(column: pa.ChunkedArray) -> pa.Array:
    names = column.cast(pa.string())
    return names.chunk(0) if names.num_chunks == 1 else names.combine_chunks()


def read_cells(
    outlines: Path, nuclei: Path | None, matrix: Matrix, matrix_path: Path, scale: float
) -> tuple[np.ndarray, geopandas.GeoDataFrame, geopandas.GeoDataFrame | None]:
    """Return the matrix rows of cells with an outline, the outlines, and the nuclei with their ``cell_id``.

    - `outlines`, `nuclei`: GeoJSON files, full-resolution px.
    - `matrix`, `matrix_path`: counts of the cells, and the file of the counts.
    - `scale`: pixels of the section per full-resolution pixel.
    """
    names, polygons = _read_outlines(outlines, scale)
    check_unique(names, what="cell", where=str(outlines), mend="Copy it again.")
    where = names.get_indexer(matrix.barcodes)
    rows = np.flatnonzero(where >= 0)
    if not len(rows):
        raise ValueError(
            f"Counts and outlines share no cell. {matrix_path} has cells such as {matrix.barcodes[0]!r}, {outlines} "
            f"has cells such as {names[0]!r}. Take both files of one run."
        )
    if len(rows) < len(where):
        warnings.warn(
            f"{len(where) - len(rows)} of {len(where)} cells of {matrix_path} have no outline in {outlines.name}, and "
            "are left out. Check that both files are of one run.",
            UserWarning,
            stacklevel=4,
        )
    cells = geopandas.GeoDataFrame(geometry=polygons[where[rows]], index=matrix.barcodes[rows])
    if nuclei is None:
        return rows, cells, None
    owners, polygons = _read_outlines(nuclei, scale)
    ordinal = pd.Series(owners).groupby(owners.to_numpy()).cumcount() + 1
    index = [owner if count == 1 else f"{owner}_{count}" for owner, count in zip(owners, ordinal, strict=True)]
    return rows, cells, geopandas.GeoDataFrame({"cell_id": owners.to_numpy()}, geometry=polygons, index=index)


def _read_outlines(path: Path, scale: float) -> tuple[pd.Index, np.ndarray]:
    """Return the cell names as in the matrix, and the polygons, of all outlines with an area."""
    features = read_features(path)
    polygons = np.empty(len(features), dtype=object)
    polygons[:] = [polygon_of(feature.get("geometry"), index=index) for index, feature in enumerate(features)]
    there = np.array([polygon is not None for polygon in polygons], dtype=bool)
    if not there.any():
        raise ValueError(f"Expected outlines in {path}, found none. Copy it again.")
    names = pd.Index([_name(feature, path) for feature, has in zip(features, there, strict=True) if has])
    return names, shapely.transform(polygons[there], lambda points: points * scale)


def _name(feature: Feature, path: Path) -> str:
    cell: Any = feature["properties"].get("cell_id")
    if isinstance(cell, str) and cell.startswith("cellid_"):
        return cell
    if isinstance(cell, bool) or not isinstance(cell, int):
        raise ValueError(f"Expected a whole number as `cell_id` of every outline in {path}, found {cell!r}.")
    return f"cellid_{cell:09d}-1"
