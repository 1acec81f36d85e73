"""Outlines of cells and nuclei from Space Ranger, matched with the matrix of cells."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import shapely

from stimage_sd.io._geojson_features import Feature, polygon_of, read_features
from stimage_sd.io._section import check_unique
from stimage_sd.io._tenx import Matrix


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
