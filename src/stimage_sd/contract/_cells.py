"""Read and write predicted cells: nuclei with a cell type, and the table that annotates them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd.contract._counts import Source, counts
from stimage_sd.contract._elements import PREDICTED_CELLS, annotate, is_result, regions_of
from stimage_sd.contract._frame import pixel_frame
from stimage_sd.contract._names import CELL_TYPES, REGION_KEY
from stimage_sd.contract._results import check_no_shapes
from stimage_sd.contract._section import sample
from stimage_sd.contract._tables import cell_table_names, holds_counts
from stimage_sd.contract._units import units_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from geopandas import GeoDataFrame


def cell_types(sdata: SpatialData) -> AnnData:
    """Return the table of predicted cells: ``obs`` are nuclei, ``var`` are cell types.

    Raises
    ------
    KeyError
        If the section has no predicted cells.
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
        If the section has no predicted cells.
    """
    return str(cell_types(sdata).obs[REGION_KEY].iloc[0])


def outlines(frame: GeoDataFrame) -> NDArray[np.object_]:
    """Return shapes as polygons. A multipolygon is replaced by its largest part.

    Examples
    --------
    >>> import geopandas, shapely
    >>> apart = shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(5, 0, 9, 4)])
    >>> outlines(geopandas.GeoDataFrame(geometry=[apart]))[0].area
    16.0
    """
    shapes = np.array(frame.geometry.array, dtype=object)
    for index in np.flatnonzero(shapely.get_type_id(shapes) != shapely.GeometryType.POLYGON):
        shapes[index] = max(shapely.get_parts(shapes[index]), key=shapely.area)
    return shapes


def counts_of_shapes(sdata: SpatialData, shapes: str, source: Source | None = None) -> tuple[pd.Index, AnnData] | None:
    """Return ids of measured cells among some shapes, and their counts, or `None` if no table has counts of them.

    Parameters
    ----------
    sdata
        The section.
    shapes
        Name of the shapes.
    source
        Table and layer. Default: the first table of counts that annotates the shapes.
    """
    table, layer = source or Source()
    for name in [table] if table is not None else cell_table_names(sdata):
        if not holds_counts(sdata, name) or shapes not in regions_of(sdata.tables[name]):
            continue
        units = units_of(sdata, name, shapes)
        counted = counts(sdata, Source(name, layer))
        where = counted.obs_names.get_indexer(units.names)
        return units.ids[where >= 0], counted[where[where >= 0]]
    return None


def check_cells_can_be_written(sdata: SpatialData, name: str, *, call: str) -> None:
    """Raise `ValueError` if predicted cells would replace a table or shapes that were not predicted."""
    if CELL_TYPES in sdata.tables and not is_result(CELL_TYPES, sdata.tables[CELL_TYPES]):
        raise ValueError(
            f"Section {sample(sdata)!r} has a table {CELL_TYPES!r} already, and it holds no predicted cells. Rename it "
            f"first: `sdata[{CELL_TYPES + '_measured'!r}] = sdata.tables.pop({CELL_TYPES!r})`."
        )
    if CELL_TYPES not in sdata.tables or cell_shapes(sdata) != name:
        check_no_shapes(sdata, name, call=call)


def write_cells(
    sdata: SpatialData, frame: GeoDataFrame, table: AnnData, *, name: str, image_key: str | None = None
) -> None:
    """Write the table and shapes of predicted cells, and remove earlier predicted cells.

    The coordinates of `frame` are pixels of `image_key`, or of the H&E by default.
    """
    shapes, parsed = pixel_frame(sdata, image_key).shapes(frame), annotate(table, region=name)
    parsed.uns[PREDICTED_CELLS] = True
    if CELL_TYPES in sdata.tables:
        before = cell_shapes(sdata)
        del sdata.tables[CELL_TYPES]
        if before in sdata.shapes:
            del sdata.shapes[before]
    sdata.shapes[name] = shapes
    sdata.tables[CELL_TYPES] = parsed
