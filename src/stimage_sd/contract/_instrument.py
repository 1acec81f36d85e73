"""Place elements that an instrument measured on the H&E."""

from __future__ import annotations

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

from stimage_sd.contract._affine import affine, scale_of
from stimage_sd.contract._elements import add_microns, instrument_elements
from stimage_sd.contract._frame import pixel_frame
from stimage_sd.contract._names import INSTRUMENT, SPATIAL_UM
from stimage_sd.contract._section import info, remember, sample


def build_multichannel(pyramid: list[da.Array], *, channels: list[str], pixel_um: float) -> xr.DataTree:
    """Build a lazy multiscale image with any number of channels, in the instrument's micrometers.

    - `pyramid`: levels, finest first, each ``(c, y, x)`` of any integer or floating type.
    - `channels`: one unique name per channel.
    - `pixel_um`: micrometers per pixel of the finest level.
    - returns: a `DataTree` that `spatialdata` accepts as a multiscale image, with a transformation to ``"instrument"``.
    """
    if len(channels) != pyramid[0].shape[0] or len(set(channels)) != len(channels):
        raise ValueError(f"Expected {pyramid[0].shape[0]} different channel names, found {len(channels)}: {channels}.")
    height, width = pyramid[0].shape[1:]
    scales: dict[str, xr.Dataset] = {}
    for index, level in enumerate(pyramid):
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
        scales[f"scale{index}"] = xr.Dataset({"image": array})
    element = xr.DataTree.from_dict(scales)
    Image2DModel().validate(element)
    return element


def place_instrument(sdata: SpatialData, matrix: np.ndarray) -> None:
    """Place the instrument's elements and tables on the pixels of the section.

    - `sdata`: the section.
    - `matrix`: ``(3, 3)``, from ``(x, y, 1)`` in the instrument's micrometers to pixels of the H&E at full resolution.
    - returns: nothing. Every element with a transformation to ``"instrument"`` gets one to each coordinate system of
      the H&E. Every table with ``obsm["spatial_um"]`` gets ``obsm["spatial"]`` in pixels of the H&E. If the section's
      resolution was unknown, it is set from the scale of the matrix.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not np.allclose(matrix[2], [0.0, 0.0, 1.0]):
        raise ValueError(f"Expected a finite affine matrix (3, 3) whose last row is 0, 0, 1, found {matrix.tolist()}.")
    scale = scale_of(matrix)
    if scale < 1e-6:
        raise ValueError(f"Expected an invertible matrix, found a singular one: {matrix.tolist()}.")
    elements = instrument_elements(sdata)
    if not elements:
        raise KeyError(f"Section {sample(sdata)!r} has no element with the coordinate system {INSTRUMENT!r}.")
    if info(sdata)["mpp"] is None:
        remember(sdata, mpp=1.0 / scale)
        for _, name, element in sdata.gen_spatial_elements():
            if name not in elements and "global" in get_transformation(element, get_all=True):
                add_microns(element, 1.0 / scale)
    to_pixels = Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))
    for element in elements.values():
        to_instrument: BaseTransformation = get_transformation(element, to_coordinate_system=INSTRUMENT)
        for system, after in pixel_frame(sdata).transformations.items():
            set_transformation(element, Sequence([to_instrument, to_pixels, after]), to_coordinate_system=system)
    for table in sdata.tables.values():
        if SPATIAL_UM in table.obsm:
            positions = np.asarray(table.obsm[SPATIAL_UM], dtype=np.float64)
            table.obsm["spatial"] = positions @ matrix[:2, :2].T + matrix[:2, 2]


def instrument_matrix(sdata: SpatialData) -> np.ndarray | None:
    """Return the ``(3, 3)`` matrix from instrument micrometers to H&E pixels, or `None` if unknown."""
    frame = pixel_frame(sdata)
    for name, element in instrument_elements(sdata).items():
        placed = get_transformation(element, get_all=True)
        if set(placed) & set(frame.transformations):
            return np.asarray(frame.matrix(element, name) @ np.linalg.inv(affine(placed[INSTRUMENT], name)))
    return None
