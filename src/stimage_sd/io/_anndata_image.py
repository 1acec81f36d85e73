"""Find the H&E of an `AnnData` from scanpy, squidpy or stLearn, and place ``obsm["spatial"]`` on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from anndata import AnnData
from numpy.typing import NDArray

from stimage_sd.io._raster import open_raster, raster_from_array
from stimage_sd.io._space_ranger import TOLERANCE

#: scale factors that Space Ranger writes beside ``spot_diameter_fullres`` and other tools do not
_OF_SPACE_RANGER = ("fiducial_diameter_fullres", "tissue_hires_scalef")
#: stLearn's name of the full-resolution image, whose pixels ``obsm["spatial"]`` counts
_FULL = "fulres"
#: stLearn's columns of x and y
_STLEARN = ("imagecol", "imagerow")


@dataclass(frozen=True)
class Library:
    """An entry of ``uns["spatial"]``.

    - `name`: key of the entry, or `None` where ``uns["spatial"]`` has no entry.
    - `images`, `scalefactors`, `metadata`: parts of the entry, unchanged.
    - `quality`: name of the image whose pixels stLearn's columns of ``obs`` count.
    """

    name: str | None = None
    images: Mapping[str, Any] = field(default_factory=dict)
    scalefactors: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    quality: str | None = None

    @property
    def of_space_ranger(self) -> bool:
        """Return whether the scale factors are Space Ranger's, with the diameter of a nominal spot."""
        return all(name in self.scalefactors for name in _OF_SPACE_RANGER)

    def scale(self, image: str) -> float | None:
        """Return the pixels of an image per pixel of ``obsm["spatial"]``."""
        scale = 1.0 if image == _FULL else self.scalefactors.get(f"tissue_{image}_scalef")
        return float(scale) if scale is not None and scale > 0 else None

    def best_image(self) -> str | None:
        """Return the name of the image with the most pixels."""
        scales = {name: scale for name in self.images if (scale := self.scale(name)) is not None}
        return max(scales, key=lambda name: scales[name]) if scales else None

    def full_size(self) -> tuple[float, float] | None:
        """Return the height and width of the full-resolution image that the scale factors imply."""
        name = self.best_image()
        if name is None:
            return None
        height, width = np.shape(self.images[name])[:2]
        scale = float(self.scale(name) or 1.0)
        return height / scale, width / scale


def find_library(adata: AnnData, library_id: str | None) -> Library:
    """Return the library of `adata`, or an empty library."""
    spatial = adata.uns.get("spatial", {})
    # stLearn's `use_quality` may stand beside the libraries
    libraries = {name: entry for name, entry in spatial.items() if isinstance(entry, Mapping)}
    if library_id is None:
        if not libraries:
            return Library()
        if len(libraries) > 1:
            raise KeyError(
                f"Expected one section, found the libraries {sorted(libraries)} in `adata.uns['spatial']`. "
                "Subset `adata` to one of them and name it with `library_id=`."
            )
        library_id = next(iter(libraries))
    if library_id not in libraries:
        raise KeyError(f"No library {library_id!r} in `adata.uns['spatial']`; its libraries: {sorted(libraries)}.")
    entry = libraries[library_id]
    parts = {name: entry.get(name) or {} for name in ("images", "scalefactors", "metadata")}
    return Library(library_id, **parts, quality=entry.get("use_quality", spatial.get("use_quality")))


def positions_of(adata: AnnData, library: Library) -> NDArray[np.float64]:
    """Return x and y of the observations, ``(n, 2)``, in pixels of the full-resolution image."""
    if "spatial" in adata.obsm:
        return np.array(adata.obsm["spatial"], dtype=np.float64)[:, :2]
    if set(_STLEARN) <= set(adata.obs):
        scale = None if library.quality is None else library.scale(library.quality)
        if scale is None:
            raise KeyError(
                f"Expected the scale of `obs['imagecol']` and `obs['imagerow']`, found the quality {library.quality!r} "
                f"and the scale factors {sorted(library.scalefactors)}. Set `adata.obsm['spatial']` to the positions "
                "in pixels of the full-resolution image."
            )
        return adata.obs[list(_STLEARN)].to_numpy(dtype=np.float64) / scale
    raise KeyError(
        f'Expected `adata.obsm["spatial"]` (x, y in pixels of the image), found {sorted(adata.obsm)}. '
        "Set it to the spots' positions."
    )


@dataclass(frozen=True)
class Picture:
    """An image and the transformation of ``obsm["spatial"]`` to its pixels: ``spatial * scale + shift``.

    - `levels`: pyramid levels, finest first, each a lazy ``uint8 (3, y, x)``.
    - `name`: description, for errors and the history.
    - `scale`, `shift`: scale and shift of x and y.
    - `mpp`: micrometers per pixel that the file states, or `None`.
    - `is_crop`: whether the image is a crop of the full-resolution image.
    - `is_reduced`: whether the image is a reduced image of the library.
    """

    levels: list[da.Array]
    name: str
    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    mpp: float | None = None
    is_crop: bool = False
    is_reduced: bool = False

    @property
    def mean_scale(self) -> float:
        """Return the pixels of the image per pixel of ``obsm["spatial"]``, mean of x and y."""
        return float(np.sqrt(self.scale[0] * self.scale[1]))

    def place(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Transform positions to pixels of the image."""
        return positions * self.scale + self.shift

    def size(self) -> tuple[int, int]:
        """Return width and height in pixels."""
        height, width = self.levels[0].shape[1:]
        return width, height


def open_picture(image: Any, library: Library, *, img_layer: str | None) -> Picture:
    """Open the image given to `stimage_sd.io.from_anndata`, or the best image of the library."""
    if img_layer is not None and not is_container(image):
        raise ValueError(f"`img_layer` is for an `ImageContainer`, found `image` to be a {type(image).__name__}.")
    if image is None:
        return _source(library) or _own(library)
    if is_container(image):
        picture = _of_container(image, library, img_layer)
    elif isinstance(image, str | Path):
        levels, mpp = open_raster(image)
        picture = Picture(levels, str(image), mpp=mpp)
    else:
        picture = Picture(raster_from_array(image), f"array {tuple(image.shape)}")
    _check_size(picture, library)
    return picture


def is_container(image: Any) -> bool:
    """Return whether an image is squidpy's `ImageContainer`, without importing squidpy."""
    return isinstance(getattr(image, "data", None), xr.Dataset)


def _source(library: Library) -> Picture | None:
    """Open the full-resolution image that squidpy noted, if it exists with the right size."""
    path = library.metadata.get("source_image_path")
    if path is None or not Path(str(path)).is_file():
        return None
    levels, mpp = open_raster(str(path))
    picture = Picture(levels, str(path), mpp=mpp)
    return picture if _size_as_implied(picture, library) in (None, True) else None


def _own(library: Library) -> Picture:
    name = library.best_image()
    if name is None:
        raise KeyError(
            f"Expected an image in `adata.uns['spatial'][{library.name!r}]['images']` with its scale factor, found "
            f"images {sorted(library.images)} and scale factors {sorted(library.scalefactors)}. Pass the H&E as "
            "`image=`."
        )
    scale = float(library.scale(name) or 1.0)
    levels = raster_from_array(np.asarray(library.images[name]))
    return Picture(levels, f"image {name!r} of library {library.name!r}", (scale, scale), is_reduced=name != _FULL)


def _of_container(container: Any, library: Library, img_layer: str | None) -> Picture:
    """Open a layer of squidpy's `ImageContainer`. Its attributes state scale, crop and padding."""
    data, names = container.data, list(container.data.data_vars)
    if img_layer is None and len(names) != 1:
        raise KeyError(f"Expected one layer in the `ImageContainer`, found {names}. Choose one with `img_layer=`.")
    if img_layer is not None and img_layer not in names:
        raise KeyError(f"No layer {img_layer!r} in the `ImageContainer`; its layers: {names}.")
    array = data[names[0] if img_layer is None else img_layer]
    if array.sizes.get("z", 1) > 1:
        libraries = array.coords["z"].to_numpy().tolist()
        if library.name not in libraries:
            raise KeyError(
                f"No library {library.name!r} in the `ImageContainer`; its libraries: {libraries}. Name one of them "
                "with `library_id=`."
            )
        array = array.isel(z=libraries.index(library.name))
    elif "z" in array.dims:
        array = array.isel(z=0)
    lazy = array.transpose("y", "x", ...).data
    name = f"layer {array.name!r} of an ImageContainer"
    scale = float(data.attrs.get("scale", 1.0))
    coords, padding = data.attrs.get("coords"), data.attrs.get("padding")
    if coords is None or coords.x1 == coords.x0:  # not a crop
        return Picture(raster_from_array(lazy), name, (scale, scale))
    # a resampled crop has whole pixels, so its true scale differs slightly from the stated scale
    pads = (0.0, 0.0, 0.0, 0.0) if padding is None else (padding.x_pre, padding.x_post, padding.y_pre, padding.y_post)
    stated = (coords.x1 - coords.x0 + pads[0] + pads[1], coords.y1 - coords.y0 + pads[2] + pads[3])
    size = (array.sizes["x"], array.sizes["y"])
    exact = [whole / part if abs(whole - part) < 1 else 1.0 for whole, part in zip(size, stated, strict=True)]
    shift = (pads[0] - coords.x0, pads[2] - coords.y0)
    return Picture(
        raster_from_array(lazy),
        name,
        scale=(scale * exact[0], scale * exact[1]),
        shift=(shift[0] * exact[0], shift[1] * exact[1]),
        is_crop=True,
    )


def _size_as_implied(picture: Picture, library: Library) -> bool | None:
    """Return whether an image has the size that the scale factors imply; `None` if unknown."""
    implied = library.full_size()
    if implied is None or picture.is_crop:
        return None
    sides = [size / scale for size, scale in zip(picture.size()[::-1], picture.scale[::-1], strict=True)]
    return all(abs(size / wanted - 1.0) <= TOLERANCE for size, wanted in zip(sides, implied, strict=True))


def _check_size(picture: Picture, library: Library) -> None:
    """Warn where the image does not have the size of the full-resolution image."""
    implied = library.full_size()
    if implied is None or _size_as_implied(picture, library) is not False:
        return
    width, height = picture.size()
    mend = (
        "Set the container's `data.attrs['scale']` to pixels of its image per pixel of the full-resolution image."
        if "ImageContainer" in picture.name
        else f"Pass that image, or leave `image` out to use the image {library.best_image()!r}."
    )
    warnings.warn(
        f"The image ({picture.name}) has {width} x {height} px. Positions are in pixels of the full-resolution image. "
        f"By the scale factors of library {library.name!r}, that image has about {implied[1]:.0f} x {implied[0]:.0f} "
        f"px. {mend}",
        UserWarning,
        stacklevel=4,
    )
