"""Where what an instrument measured lies on the H&E."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import (
    Affine,
    BaseTransformation,
    Scale,
    Sequence,
    get_transformation,
    set_transformation,
)

from stimage_sd.contract._elements import add_microns
from stimage_sd.contract._names import INSTRUMENT, SPATIAL_UM
from stimage_sd.contract._section import info, sample


def build_multichannel(pyramid: list[da.Array], *, channels: list[str], pixel_um: float) -> xr.DataTree:
    """Build a multiscale image of any number of channels, lazy, in the instrument's micrometres.

    Parameters
    ----------
    pyramid
        Levels, finest first, each ``(c, y, x)`` of any integer or floating type.
    channels
        A name a channel, each once.
    pixel_um
        Micrometres a pixel of the finest level.

    Returns
    -------
    A `DataTree` that `spatialdata` accepts as a multiscale image, with a transformation to ``"instrument"``.

    Raises
    ------
    ValueError
        If names and channels do not match, or a name appears twice.
    """
    if len(channels) != pyramid[0].shape[0] or len(set(channels)) != len(channels):
        raise ValueError(
            f"Expected {pyramid[0].shape[0]} different channel names, one a channel, found {len(channels)}: {channels}."
        )
    height, width = pyramid[0].shape[1:]
    scales: dict[str, xr.Dataset] = {}
    for number, level in enumerate(pyramid):
        along_y, along_x = height / level.shape[1], width / level.shape[2]
        array = xr.DataArray(
            level,
            dims=("c", "y", "x"),
            coords={
                "c": channels,
                "y": (np.arange(level.shape[1]) + 0.5) * along_y,
                "x": (np.arange(level.shape[2]) + 0.5) * along_x,
            },
        )
        array.attrs["transform"] = {INSTRUMENT: Scale([along_y * pixel_um, along_x * pixel_um], axes=("y", "x"))}
        scales[f"scale{number}"] = xr.Dataset({"image": array})
    element = xr.DataTree.from_dict(scales)
    Image2DModel().validate(element)
    return element


def instrument_elements(sdata: SpatialData) -> dict[str, Any]:
    """Return the elements that have a transformation to the instrument's micrometres, by name."""
    return {
        name: element
        for _, name, element in sdata.gen_spatial_elements()
        if INSTRUMENT in get_transformation(element, get_all=True)
    }


def place_instrument(sdata: SpatialData, matrix: np.ndarray) -> None:
    """Place what the instrument measured on the section's pixels.

    Parameters
    ----------
    sdata
        The section.
    matrix
        ``(3, 3)``, from ``(x, y, 1)`` in the instrument's micrometres to ``"global"``, pixels of the H&E at full
        resolution.

    Returns
    -------
    Nothing; every element with a transformation to ``"instrument"`` gets one to ``"global"``, and to
    ``"microns"``; every table with ``obsm["spatial_um"]`` gets ``obsm["spatial"]``. A resolution of the section
    that was unknown follows from the matrix's scale.

    Raises
    ------
    ValueError
        If the matrix is not a finite, invertible affine one.
    KeyError
        If the section has nothing that an instrument measured.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not np.allclose(matrix[2], [0.0, 0.0, 1.0]):
        raise ValueError(f"Expected a finite affine matrix (3, 3) whose last row is 0, 0, 1, found {matrix.tolist()}.")
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    if scale < 1e-6:
        raise ValueError(f"Expected an invertible matrix, found one that folds the plane: {matrix.tolist()}.")
    elements = instrument_elements(sdata)
    if not elements:
        raise KeyError(f"Section {sample(sdata)!r} has no element with the coordinate system {INSTRUMENT!r}.")
    section = info(sdata)
    if section["mpp"] is None:
        section["mpp"] = 1.0 / scale
        for _, name, element in sdata.gen_spatial_elements():
            if name not in elements and "global" in get_transformation(element, get_all=True):
                add_microns(element, 1.0 / scale)
    to_global = Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))
    for element in elements.values():
        own: BaseTransformation = get_transformation(element, to_coordinate_system=INSTRUMENT)
        set_transformation(element, Sequence([own, to_global]), to_coordinate_system="global")
        add_microns(element, float(section["mpp"]))
    for table in sdata.tables.values():
        if SPATIAL_UM in table.obsm:
            positions = np.asarray(table.obsm[SPATIAL_UM], dtype=np.float64)
            table.obsm["spatial"] = positions @ matrix[:2, :2].T + matrix[:2, 2]


def instrument_matrix(sdata: SpatialData) -> np.ndarray | None:
    """Return the ``(3, 3)`` matrix from the instrument's micrometres to ``"global"``; `None` before it is placed."""
    for element in instrument_elements(sdata).values():
        if "global" in get_transformation(element, get_all=True):
            own, placed = (
                get_transformation(element, to_coordinate_system=name).to_affine_matrix(("x", "y"), ("x", "y"))
                for name in (INSTRUMENT, "global")
            )
            return np.asarray(placed @ np.linalg.inv(own))
    return None
