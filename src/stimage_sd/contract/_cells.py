"""Predicted cells: nuclei with a type each, and the table that annotates them; read and written here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd.contract._access import check_no_shapes
from stimage_sd.contract._elements import annotate, build_shapes
from stimage_sd.contract._names import CELL_TYPES, REGION_KEY
from stimage_sd.contract._section import info, sample

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame


def cell_types(sdata: SpatialData) -> AnnData:
    """Return the table of predicted cells, ``obs`` = nuclei, ``var`` = types.

    Raises
    ------
    KeyError
        If none were predicted yet.
    """
    if CELL_TYPES not in sdata.tables:
        raise KeyError(
            f"Section {sample(sdata)!r} has no predicted cells. Run `stimage_sd.tl.predict(sdata, model)` with a cell "
            "classifier first."
        )
    return sdata.tables[CELL_TYPES]


def cell_shapes(sdata: SpatialData) -> str:
    """Return the name of the predicted cells' shapes.

    Raises
    ------
    KeyError
        If none were predicted yet.
    """
    return str(cell_types(sdata).obs[REGION_KEY].iloc[0])


def outlines(frame: GeoDataFrame) -> NDArray[np.object_]:
    """Return shapes as polygons: of one in several parts the largest.

    Examples
    --------
    >>> import geopandas, shapely
    >>> apart = shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(5, 0, 9, 4)])
    >>> outlines(geopandas.GeoDataFrame(geometry=[apart]))[0].area
    16.0
    """
    shapes = np.array(frame.geometry.array, dtype=object)
    for number in np.flatnonzero(shapely.get_type_id(shapes) != shapely.GeometryType.POLYGON):
        shapes[number] = max(shapely.get_parts(shapes[number]), key=shapely.area)
    return shapes


def check_cells_can_be_written(sdata: SpatialData, name: str, *, call: str) -> None:
    """Raise `ValueError` where there are shapes of that name that were not predicted."""
    if CELL_TYPES not in sdata.tables or cell_shapes(sdata) != name:
        check_no_shapes(sdata, name, call=call)


def write_cells(sdata: SpatialData, frame: GeoDataFrame, table: AnnData, *, name: str) -> None:
    """Write predicted cells' shapes and their table; they replace earlier ones."""
    shapes, parsed = build_shapes(frame, mpp=info(sdata)["mpp"]), annotate(table, region=name)
    if CELL_TYPES in sdata.tables:
        before = cell_shapes(sdata)
        del sdata.tables[CELL_TYPES]
        if before in sdata.shapes:
            del sdata.shapes[before]
    sdata.shapes[name] = shapes
    sdata.tables[CELL_TYPES] = parsed
