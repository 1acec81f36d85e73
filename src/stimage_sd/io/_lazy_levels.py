"""Levels of tiled slides, read a chunk at a time through OpenSlide or tifffile.

A level knows its file by path and opens it where it is read, once a process, so that a dask graph over
it can be pickled to any worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import dask.array as da
import numpy as np
import openslide
import tifffile
import zarr
from dask.base import tokenize

from stimage_sd.contract import CHUNK

Index = tuple[slice, slice, slice]
#: what reading a chunk of a damaged file raises
BROKEN = (openslide.OpenSlideError, RuntimeError, ValueError, OSError)


@dataclass(frozen=True)
class OpenSlideLevel:
    """One level of a slide that OpenSlide opens; transparent pixels lie on white."""

    path: str
    changed: int
    level: int
    shape: tuple[int, int, int]
    downsample: float
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    ndim: ClassVar[int] = 3

    def __getitem__(self, index: Index) -> np.ndarray:
        """Read a region."""
        channels, rows, columns = index
        top, bottom, _ = rows.indices(self.shape[1])
        left, right, _ = columns.indices(self.shape[2])
        corner = (round(left * self.downsample), round(top * self.downsample))
        size = (right - left, bottom - top)
        try:
            region = _open_openslide(self.path, self.changed).read_region(corner, self.level, size)
        except BROKEN as error:
            # OpenSlide answers nothing any more after an error: the next attempt opens the file again.
            _open_openslide.cache_clear()
            raise ValueError(_damaged(self.path, self.level, error)) from error
        return np.moveaxis(_on_white(np.asarray(region)), -1, 0)[channels]


@dataclass(frozen=True)
class TiffLevel:
    """One level of a tiled RGB TIFF; `colour_axis` is where its three colours lie: 0 where each has a plane."""

    path: str
    changed: int
    level: int
    shape: tuple[int, int, int]
    colour_axis: int
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    ndim: ClassVar[int] = 3

    def __getitem__(self, index: Index) -> np.ndarray:
        """Read a region."""
        channels, rows, columns = index
        try:
            array = _open_tiff_level(self.path, self.changed, self.level)
            if self.colour_axis == 0:
                return np.asarray(array[index])
            return np.moveaxis(np.asarray(array[rows, columns, channels]), -1, 0)
        except BROKEN as error:
            raise ValueError(_damaged(self.path, self.level, error)) from error


def as_dask(level: OpenSlideLevel | TiffLevel) -> da.Array:
    """Wrap a level, a chunk a task."""
    return da.from_array(
        level, chunks=(3, CHUNK, CHUNK), name=f"level-{tokenize(level)}", lock=False, meta=np.empty((0, 0, 0), "u1")
    )


def openslide_levels(path: Path) -> tuple[list[da.Array], openslide.OpenSlide]:
    """Return the levels OpenSlide finds in a file, finest first, and the open slide."""
    changed = path.stat().st_mtime_ns
    slide = _open_openslide(str(path), changed)
    levels = [
        as_dask(OpenSlideLevel(str(path), changed, number, (3, height, width), slide.level_downsamples[number]))
        for number, (width, height) in enumerate(slide.level_dimensions)
    ]
    return levels, slide


def scanner(path: Path) -> dict[str, str | float | None]:
    """Return the scanner's ``vendor`` and ``objective_power`` where a slide states them, through OpenSlide."""
    vendor = openslide.OpenSlide.detect_format(str(path))
    if vendor in (None, "generic-tiff"):
        return {"vendor": None, "objective_power": None}
    properties = _open_openslide(str(path), path.stat().st_mtime_ns).properties
    power = properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    return {"vendor": vendor, "objective_power": None if power is None else float(power)}


def tiff_levels(path: Path, series: tifffile.TiffPageSeries) -> list[da.Array]:
    """Return the levels tifffile finds in the first series of a tiled RGB TIFF, finest first."""
    colour_axis = next(series.axes.index(axis) for axis in "SC" if axis in series.axes)
    changed = path.stat().st_mtime_ns
    levels = []
    for number, level in enumerate(series.levels):
        height, width = (size for axis, size in enumerate(level.shape) if axis != colour_axis)
        levels.append(as_dask(TiffLevel(str(path), changed, number, (3, height, width), colour_axis)))
    return levels


# Slides are kept open a process: opening one takes longer than reading a chunk. Both libraries read
# from several threads at once. `changed` is part of the key, so that a rewritten file is opened again.


@lru_cache(maxsize=16)
def _open_openslide(path: str, changed: int) -> openslide.OpenSlide:
    return openslide.OpenSlide(path)


@lru_cache(maxsize=64)
def _open_tiff_level(path: str, changed: int, level: int) -> zarr.Array:
    return zarr.open_array(tifffile.imread(path, aszarr=True, series=0, level=level), mode="r")


def _damaged(path: str, level: int, error: Exception) -> str:
    return (
        f"Expected a readable image, found that level {level} of {path} is damaged, or the file gone "
        f"({' '.join(str(error).split())}). Copy or export it again."
    )


def _on_white(rgba: np.ndarray) -> np.ndarray:
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    if (alpha == 255).all():
        return colours
    opacity = alpha.astype(np.float32) / 255.0
    return np.rint(colours * opacity + 255.0 * (1.0 - opacity)).astype(np.uint8)
