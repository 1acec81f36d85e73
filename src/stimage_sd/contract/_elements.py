"""Build and inspect single elements: RGB images, the shapes that a table annotates, tables of counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import (
    BaseTransformation,
    Identity,
    Scale,
    Sequence,
    get_transformation,
    set_transformation,
)

from stimage_sd.contract._names import (
    CELL_TYPES,
    INSTANCE_KEY,
    INSTRUMENT,
    REGION_KEY,
    TILE_SQUARES,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

#: key in ``uns`` that marks a table of predicted cells
PREDICTED_CELLS = "predicted_cells"
#: key in ``uns`` that marks tables of nuclei or squares within tiles, with embeddings or predictions
INSTANCES = "instances"
#: number of values that are checked to tell a table of counts from other tables
_LOOKED_AT = 100_000


def build_shapes(frame: GeoDataFrame, *, mpp: float | None) -> GeoDataFrame:
    """Build a shapes element for a reader from coordinates in pixels of the H&E (``"global"``)."""
    shapes = ShapesModel.parse(frame, transformations={"global": Identity()})
    if mpp is not None:
        add_microns(shapes, mpp)
    return shapes


def annotate(table: AnnData, *, region: str) -> AnnData:
    """Make a table annotate the element `region` by its column ``instance_id``."""
    table.obs[REGION_KEY] = region
    table.obs[REGION_KEY] = table.obs[REGION_KEY].astype("category")
    if INSTANCE_KEY not in table.obs:
        table.obs[INSTANCE_KEY] = np.arange(table.n_obs)
    table.uns.pop(TableModel.ATTRS_KEY, None)
    return TableModel.parse(table, region=region, region_key=REGION_KEY, instance_key=INSTANCE_KEY)


def is_rgb(array: xr.DataArray) -> bool:
    """Return whether an image is 8-bit RGB. Three channels with the names of stains are not RGB."""
    return array.shape[0] == 3 and array.dtype == np.uint8 and _are_colors(array)


def _are_colors(array: xr.DataArray) -> bool:
    if "c" not in array.coords:
        return True
    names = [str(name).lower() for name in array.coords["c"].values]
    return all(name.isdigit() for name in names) or [name[:1] for name in names[:3]] == ["r", "g", "b"]


def add_microns(element: Any, mpp: float) -> None:
    """Add the coordinate system ``"microns"`` to an element that has ``"global"``."""
    to_global: BaseTransformation = get_transformation(element, to_coordinate_system="global")
    to_microns = Sequence([to_global, Scale([mpp, mpp], axes=("x", "y"))])
    set_transformation(element, to_microns, to_coordinate_system="microns")


def instrument_elements(sdata: SpatialData) -> dict[str, Any]:
    """Return the elements with a transformation to the instrument's micrometers, by name."""
    return {
        name: element
        for _, name, element in sdata.gen_spatial_elements()
        if INSTRUMENT in get_transformation(element, get_all=True)
    }


def keys_of(table: AnnData) -> dict[str, Any]:
    """Return a table's annotation keys (region, region key, instance key), or an empty dict if it has none."""
    return dict(table.uns.get(TableModel.ATTRS_KEY, {}))


def regions_of(table: AnnData) -> list[str]:
    """Return the names of the elements that a table annotates."""
    region = keys_of(table).get(TableModel.REGION_KEY)
    if region is None:
        return []
    return [region] if isinstance(region, str) else [str(name) for name in region]


def is_result(name: str, table: AnnData) -> bool:
    """Return whether a table holds results of this package, such as predictions, and no measurements."""
    if (name == CELL_TYPES and PREDICTED_CELLS in table.uns) or INSTANCES in table.uns:
        return True
    # spatialdata.concatenate renames the tiles to "tile_squares-<sample>"
    return any(region.startswith(TILE_SQUARES) for region in regions_of(table))


def counts_problem(values: Any) -> str | None:
    """Return why a dense or sparse matrix does not hold counts, or `None` if it does."""
    if values is None:
        return "no values"
    values = values.compute() if hasattr(values, "compute") else values
    values = values.to_memory() if hasattr(values, "to_memory") else values
    data = np.asarray(values.data if hasattr(values, "tocsr") else values)
    if data.size == 0:
        return None
    if not np.issubdtype(data.dtype, np.number) or not np.isfinite(data).all():
        return "values that are not finite numbers"
    if data.min() < 0:
        return f"negative values (lowest {data.min()})"
    if not np.issubdtype(data.dtype, np.integer) and (data != np.round(data)).any():
        return f"{data[data != np.round(data)][0]!r}, which is not a whole number"
    return None


def looks_like_counts(table: AnnData) -> bool:
    """Return whether the first values of a table, or of one of its layers, are counts."""
    n_rows = max(1, _LOOKED_AT // max(table.n_vars, 1))
    matrices = [table.X, *(table.layers[name] for name in table.layers if name is not None)]
    return any(matrix is not None and counts_problem(matrix[:n_rows]) is None for matrix in matrices)
