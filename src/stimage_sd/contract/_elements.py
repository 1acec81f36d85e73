"""Elements as the contract wants them: images, shapes and tables with their coordinate systems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import (
    BaseTransformation,
    Identity,
    Scale,
    Sequence,
    get_transformation,
    set_transformation,
)

from stimage_sd.contract._names import CHUNK, INSTANCE_KEY, REGION_KEY

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame


def levels(sdata: SpatialData, name: str) -> list[xr.DataArray]:
    """Return the pyramid of an image element, finest first, each ``(c, y, x)`` and dask-backed."""
    element = sdata.images[name]
    if isinstance(element, xr.DataArray):
        arrays = [element]
    else:
        arrays = [next(iter(element[scale].data_vars.values())) for scale in element.children]
    arrays = [array.transpose("c", "y", "x") for array in arrays]
    return [
        array
        if isinstance(array.data, da.Array)
        else array.copy(data=da.from_array(array.data, chunks=(-1, CHUNK, CHUNK)))
        for array in arrays
    ]


def build_image(pyramid: list[da.Array], *, mpp: float | None = None) -> xr.DataTree:
    """Build a multiscale image element from lazy levels.

    Parameters
    ----------
    pyramid
        Levels, finest first, each ``uint8 (3, y, x)``.
    mpp
        Micrometres a pixel of the finest level, for the ``"microns"`` coordinate system.

    Returns
    -------
    A `DataTree` that `spatialdata` accepts as a multiscale image.
    """
    height, width = pyramid[0].shape[1:]
    scales: dict[str, xr.Dataset] = {}
    for number, level in enumerate(pyramid):
        array = xr.DataArray(
            level,
            dims=("c", "y", "x"),
            coords={
                "c": ["r", "g", "b"],
                "y": (np.arange(level.shape[1]) + 0.5) * height / level.shape[1],
                "x": (np.arange(level.shape[2]) + 0.5) * width / level.shape[2],
            },
        )
        to_full = Scale([height / level.shape[1], width / level.shape[2]], axes=("y", "x"))
        array.attrs["transform"] = {"global": Identity() if number == 0 else to_full}
        scales[f"scale{number}"] = xr.Dataset({"image": array})
    element = xr.DataTree.from_dict(scales)
    Image2DModel().validate(element)
    if mpp is not None:
        add_microns(element, mpp)
    return element


def build_shapes(frame: GeoDataFrame, *, mpp: float | None) -> GeoDataFrame:
    """Give shapes in H&E pixels the section's coordinate systems."""
    shapes = ShapesModel.parse(frame, transformations={"global": Identity()})
    if mpp is not None:
        add_microns(shapes, mpp)
    return shapes


def annotate(table: AnnData, *, region: str) -> AnnData:
    """Make a table annotate the element `region`, by its column ``instance_id``."""
    table.obs[REGION_KEY] = region
    table.obs[REGION_KEY] = table.obs[REGION_KEY].astype("category")
    if INSTANCE_KEY not in table.obs:
        table.obs[INSTANCE_KEY] = np.arange(table.n_obs)
    table.uns.pop(TableModel.ATTRS_KEY, None)
    return TableModel.parse(table, region=region, region_key=REGION_KEY, instance_key=INSTANCE_KEY)


def is_rgb(array: xr.DataArray) -> bool:
    return array.shape[0] == 3 and array.dtype == np.uint8


def add_microns(element: Any, mpp: float) -> None:
    to_global: BaseTransformation = get_transformation(element, to_coordinate_system="global")
    to_microns = Sequence([to_global, Scale([mpp, mpp], axes=("x", "y"))])
    set_transformation(element, to_microns, to_coordinate_system="microns")
