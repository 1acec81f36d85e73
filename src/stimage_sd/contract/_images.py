"""Find, read and build the H&E image of a section: its levels and thumbnail."""

from __future__ import annotations

import sys

import dask.array as da
import dask.threaded
import numpy as np
import xarray as xr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import (
    BaseTransformation,
    Identity,
    MapAxis,
    Scale,
    Sequence,
    Translation,
    get_transformation,
    set_transformation,
)

from stimage_sd._zarr_chunks import guarded
from stimage_sd.contract._affine import affine, scale_of
from stimage_sd.contract._elements import add_microns, instrument_elements, is_rgb
from stimage_sd.contract._names import CHUNK, single
from stimage_sd.contract._section import image_shape, info, remember, sample

#: pixels of a coarse level that a crop may add or lose along an axis
_ENDS = 2


def image_name(sdata: SpatialData, image_key: str | None = None) -> str:
    """Return `image_key`, or by default the name of the section's H&E image.

    In an object from other software, the H&E is the only RGB image, or the first RGB image that `image_key` names. The
    name is then stored in the section.
    """
    name = find_image(sdata, image_key)
    about = info(sdata)
    if about["image"] is None and is_rgb(levels(sdata, name)[0]):
        # without an H&E, the stored resolution is that of the coordinate system
        to_system = get_transformation(sdata.images[name], get_all=True).get(about.get("coordinate_system", "global"))
        mpp = about["mpp"]
        if mpp is not None:
            mpp = None if to_system is None else float(mpp) * scale_of(affine(to_system, name))
        remember(sdata, image=name, mpp=mpp)
    return name


def find_image(sdata: SpatialData, image_key: str | None = None) -> str:
    """Return the same name as `image_name`, without storing it in the section."""
    name = image_key if image_key is not None else info(sdata)["image"]
    if name is None:
        name = single(rgb_images(sdata), what="RGB image", argument="image_key", found=sorted(sdata.images))
    if name not in sdata.images:
        raise KeyError(f"No image {name!r} in section {sample(sdata)!r}; its images: {sorted(sdata.images)}.")
    return name


def rgb_images(sdata: SpatialData) -> list[str]:
    """Return the names of the images that may be an H&E: 8-bit RGB and not measured by an instrument."""
    measured = instrument_elements(sdata)  # three channels of fluorescence are no colors
    return [name for name in sdata.images if name not in measured and is_rgb(levels(sdata, name)[0])]


def working_image_name(sdata: SpatialData, image_key: str | None = None) -> str:
    """Return `image_key`, else the stain-normalized H&E if there is one, else the H&E."""
    normalized = info(sdata).get("normalized_image")
    if image_key is None and normalized in sdata.images:
        return str(normalized)
    return image_name(sdata, image_key)


def levels(sdata: SpatialData, name: str) -> list[xr.DataArray]:
    """Return the levels of an image element, finest first, each ``(c, y, x)`` and dask-backed.

    The coordinates ``x`` and ``y`` of a level are the centers of its pixels, px of the finest level. Levels with
    different downsampling in x and y are left out. So are levels of a single row or column.
    """
    element = sdata.images[name]
    if isinstance(element, xr.DataArray):
        arrays = [element]
    else:
        arrays = [next(iter(element[scale].data_vars.values())) for scale in element.children]
    arrays = [_lazy(array.transpose("c", "y", "x")) for array in arrays]
    arrays = [array for array in arrays if array is arrays[0] or _is_even(array, arrays[0])]
    start = _leading_translation(get_transformation(arrays[0], get_all=True))
    size = info(sdata).get("image_px", {}).get(name)
    return [_centered(array, arrays[0], start, size) for array in arrays]


def was_cropped(sdata: SpatialData, name: str) -> bool:
    """Return whether an image was cropped, by its size when it was read or else by its transformations."""
    element = sdata.images[name]
    size = info(sdata).get("image_px", {}).get(name)
    if size is not None:
        return image_shape(element) != list(size)
    start = _leading_translation(get_transformation(element, get_all=True))
    return any(value > 0 for value in start.values())


def _lazy(array: xr.DataArray) -> xr.DataArray:
    if isinstance(array.data, da.Array):
        return array.copy(data=guarded(array.data))
    return array.copy(data=da.from_array(array.data, chunks=(-1, CHUNK, CHUNK)))


def _is_even(level: xr.DataArray, finest: xr.DataArray) -> bool:
    """Return whether a level is downsampled equally in x and y, within the pixel at each end that a crop may change."""
    width, height = level.sizes["x"], level.sizes["y"]
    apart = abs(width - height * finest.sizes["x"] / finest.sizes["y"])
    return min(width, height) > 1 and apart <= _ENDS * max(1.0, finest.sizes["x"] / finest.sizes["y"])


def _centered(
    level: xr.DataArray, finest: xr.DataArray, start: dict[str, float], size: list[int] | None
) -> xr.DataArray:
    """Assign the coordinates of pixel centers to a level."""
    coords = {
        axis: _centers(level.sizes[axis], finest.sizes[axis], start.get(axis, 0.0), whole)
        for axis, whole in zip(("y", "x"), size or (None, None), strict=True)
    }
    return level.assign_coords(coords)


def _centers(n: int, n_finest: int, start: float, n_whole: int | None) -> np.ndarray:
    """Return the centers of a level's pixels along one axis, px of the finest level."""
    # A crop keeps the pixels with centers inside the box, so coarse levels begin and end beside the finest level.
    # SpatialData stretches coarse levels to the finest one. Here their pixels keep their places.
    ratio = n_finest / n
    factor = round(ratio)
    in_step = n * factor == n_finest
    was_cropped = start > 0 and (n_whole != n_finest if n_whole is not None else not in_step)
    if n == n_finest or not was_cropped or abs(n * factor - n_finest) > 2 * factor:
        return (np.arange(n) + 0.5) * ratio
    first = np.ceil(start / factor - 0.5) * factor - start
    return first + (np.arange(n) + 0.5) * factor


def _leading_translation(transformations: dict[str, BaseTransformation]) -> dict[str, float]:
    """Return the translation at the start of an image's transformations, which crops add."""
    shift = {"x": 0.0, "y": 0.0}
    if not transformations:
        return shift
    for step in _steps(next(iter(transformations.values()))):
        if isinstance(step, Identity):
            continue
        if not isinstance(step, Translation):
            break
        for axis in shift:
            shift[axis] += float(step.to_translation_vector((axis,))[0])
    return shift


def _steps(transformation: BaseTransformation) -> list[BaseTransformation]:
    if isinstance(transformation, Sequence):
        return [step for part in transformation.transformations for step in _steps(part)]
    return [transformation] if not isinstance(transformation, MapAxis) else []


def build_image(pyramid: list[da.Array], *, mpp: float | None = None) -> xr.DataTree:
    """Build a multiscale image element from lazy levels.

    - `pyramid`: levels, finest first, each ``uint8 (3, y, x)``.
    - `mpp`: micrometers per pixel of the finest level, for the coordinate system ``"microns"``.
    - returns: a `DataTree` that `spatialdata` accepts as a multiscale image.
    """
    height, width = pyramid[0].shape[1:]
    scales: dict[str, xr.Dataset] = {}
    for index, level in enumerate(pyramid):
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
        array.attrs["transform"] = {"global": Identity() if index == 0 else to_full}
        scales[f"scale{index}"] = xr.Dataset({"image": array})
    element = xr.DataTree.from_dict(scales)
    Image2DModel().validate(element)
    if mpp is not None:
        add_microns(element, mpp)
    return element


def derive_image(sdata: SpatialData, source: str, pyramid: list[da.Array]) -> xr.DataTree:
    """Build an image element from lazy levels, with the transformations of the image `source`."""
    element = build_image(pyramid)
    transformations = get_transformation(sdata.images[source], get_all=True)
    set_transformation(element, transformations, set_all=True)
    return element


def thumbnail(sdata: SpatialData, name: str, *, max_side: int = 1500) -> tuple[np.ndarray, float]:
    """Return a small copy of an image and its downsampling factor.

    The finest level with sides up to `max_side` is read. If there is no such level, the coarsest level is strided
    lazily, so that the full resolution is never in memory.

    - `sdata`: the section.
    - `name`: name of an image element.
    - `max_side`: longest side of the thumbnail, px.
    - returns: the thumbnail, ``uint8 (y, x, 3)``, and the full-resolution pixels per thumbnail pixel.
    """
    pyramid = levels(sdata, name)
    fitting = [array for array in pyramid if max(array.shape[1:]) <= max_side]
    if fitting:
        level = fitting[0].data
    else:
        step = int(np.ceil(max(pyramid[-1].shape[1:]) / max_side))
        level = pyramid[-1].data[:, ::step, ::step]
    # dask imports all of distributed to look for a client, and there is none before somebody else imported it
    scheduler = None if "distributed" in sys.modules else dask.threaded.get
    small = np.ascontiguousarray(np.moveaxis(np.asarray(level.compute(scheduler=scheduler)), 0, -1))
    return small, pyramid[0].shape[2] / small.shape[1]


def check_rgb(sdata: SpatialData, name: str) -> None:
    """Raise `ValueError` if an image is not 8-bit RGB."""
    array = levels(sdata, name)[0]
    if not is_rgb(array):
        raise ValueError(
            f"Expected the H&E {name!r} to be 8-bit RGB (3 channels of uint8), found {array.shape[0]} channel(s) of "
            f"{array.dtype}. Choose another image with `image_key=`, or convert it."
        )
