"""Read levels of tiled slides chunk by chunk through OpenSlide or tifffile.

A level stores the path of its file, and each process opens the file once. A dask graph over the level can therefore be
pickled to any worker.
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
from dask.base import tokenize

from stimage_sd.contract import CHUNK
from stimage_sd.io._multichannel_levels import Index3, as_slices
from stimage_sd.io._tiff_pages import FileState, Place, open_page, place_of
from stimage_sd.io._tiff_region import read_region

#: errors from reading a chunk of a damaged file
BROKEN = (openslide.OpenSlideError, RuntimeError, ValueError, OSError, KeyError, IndexError, TypeError, MemoryError)
#: longest side, in pixels, of a level that OpenSlide may read in one piece
WHOLE = 4096


@dataclass(frozen=True)
class OpenSlideLevel:
    """One level of an OpenSlide image, with transparent pixels blended onto white."""

    file: FileState
    level: int
    shape: tuple[int, int, int]
    downsample: float
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    ndim: ClassVar[int] = 3

    def __getitem__(self, index: Index3) -> np.ndarray:
        """Read a region."""
        (channels, rows, columns), dropped = as_slices(index)
        top, bottom, _ = rows.indices(self.shape[1])
        left, right, _ = columns.indices(self.shape[2])
        # OpenSlide takes positions in pixels of the finest level, and interpolates between pixels of this level.
        # Regions that start at the corner of the slide are not interpolated.
        before = (0, 0) if self.downsample.is_integer() else (left, top)
        corner = (int((left - before[0]) * self.downsample), int((top - before[1]) * self.downsample))
        size = (right - left + before[0], bottom - top + before[1])
        try:
            self.file.check()
            region = _open_openslide(self.file).read_region(corner, self.level, size)
        except BROKEN as error:
            # OpenSlide stays unusable after an error, so the next attempt opens the file again.
            _open_openslide.cache_clear()
            raise ValueError(_damaged(self.file.path, self.level, error)) from error
        asked_for = np.asarray(region)[before[1] :, before[0] :]
        return np.moveaxis(on_white(asked_for), -1, 0)[channels][dropped]


@dataclass(frozen=True)
class TiffLevel:
    """One level of a color TIFF, ``(3, y, x)``, from one page or from three pages with one color per page.

    ``alpha`` is `None` where the page has no fourth sample. Otherwise it says whether colors were multiplied by alpha.
    """

    file: FileState
    level: int
    places: tuple[Place, ...]
    shape: tuple[int, int, int]
    alpha: bool | None = None
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)
    ndim: ClassVar[int] = 3

    def __getitem__(self, index: Index3) -> np.ndarray:
        """Read a region."""
        (channels, rows, columns), dropped = as_slices(index)
        try:
            self.file.check()
            return self._region(channels, rows, columns)[dropped]
        except BROKEN as error:
            raise ValueError(_damaged(self.file.path, self.level, error)) from error

    def _region(self, channels: slice, rows: slice, columns: slice) -> np.ndarray:
        if len(self.places) > 1:
            chosen = list(self.places)[channels]
            return np.concatenate([self._read(place, slice(0, 1), rows, columns) for place in chosen])
        if self.alpha is None:
            return self._read(self.places[0], channels, rows, columns)
        region = self._read(self.places[0], slice(0, 4), rows, columns)
        return np.moveaxis(on_white(np.moveaxis(region, 0, -1), multiplied=self.alpha), -1, 0)[channels]

    def _read(self, place: Place, samples: slice, rows: slice, columns: slice) -> np.ndarray:
        return read_region(open_page(self.file, place), samples, rows, columns)


def as_dask(level: OpenSlideLevel | TiffLevel) -> da.Array:
    """Wrap a level as a dask array with one chunk per task."""
    chunks: tuple[int, ...] = (3, CHUNK, CHUNK)
    if isinstance(level, OpenSlideLevel) and not level.downsample.is_integer():
        chunks = level.shape
    return da.from_array(
        level, chunks=chunks, name=f"level-{tokenize(level)}", lock=False, meta=np.empty((0, 0, 0), "u1")
    )


def openslide_levels(path: Path) -> tuple[list[da.Array], openslide.OpenSlide]:
    """Return the levels that OpenSlide finds in a file, finest first, and the open slide.

    Pixels are never interpolated. A small level that OpenSlide would interpolate is read in one piece. A large one is
    left out, and is later computed from a finer level.
    """
    file = FileState.of(path)
    slide = _open_openslide(file)
    levels = []
    for index, (width, height) in enumerate(slide.level_dimensions):
        downsample = float(slide.level_downsamples[index])
        if downsample.is_integer() or max(height, width) <= WHOLE:
            levels.append(as_dask(OpenSlideLevel(file, index, (3, height, width), downsample)))
    return levels, slide


def openslide_properties(path: Path) -> dict[str, str]:
    """Return the properties that OpenSlide reads from a slide."""
    return dict(_open_openslide(FileState.of(path)).properties)


def scanner(path: Path) -> dict[str, str | float | None]:
    """Return the scanner's ``vendor`` and ``objective_power`` from OpenSlide; `None` where not stated."""
    vendor = openslide.OpenSlide.detect_format(str(path))
    if vendor in (None, "generic-tiff"):
        return {"vendor": None, "objective_power": None}
    power = openslide_properties(path).get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    return {"vendor": vendor, "objective_power": None if power is None else float(power)}


def tiff_levels(path: Path, pages: list[list[tifffile.TiffPage]]) -> list[TiffLevel]:
    """Return the levels of a color TIFF, finest first, from a list of pages per level."""
    file = FileState.of(path)
    levels = []
    for index, level in enumerate(pages):
        first = level[0]
        alpha = None
        if first.samplesperpixel == 4:
            alpha = first.extrasamples[:1] == (tifffile.EXTRASAMPLE.ASSOCALPHA,)
        shape = (3, first.imagelength, first.imagewidth)
        levels.append(TiffLevel(file, index, tuple(place_of(page) for page in level), shape, alpha))
    return levels


# Each process keeps slides open, since opening a slide takes longer than reading a chunk. The file's state is part of
# the cache key, so that a rewritten file is opened again.


@lru_cache(maxsize=16)
def _open_openslide(file: FileState) -> openslide.OpenSlide:
    return openslide.OpenSlide(file.path)


def _damaged(path: str, level: int, error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return (
        f"Expected a readable image, found that level {level} of {path} is damaged, or the file gone "
        f"({words}). Copy or export it again."
    )


def on_white(rgba: np.ndarray, *, multiplied: bool = False) -> np.ndarray:
    """Blend ``uint8 (y, x, 4)`` onto white. ``multiplied`` says that colors were already multiplied by opacity."""
    colors, alpha = rgba[..., :3], rgba[..., 3:]
    if (alpha == 255).all():
        return colors
    opacity = alpha.astype(np.float32) / 255.0
    shown = colors if multiplied else colors * opacity
    return np.rint(np.minimum(shown + 255.0 * (1.0 - opacity), 255.0)).astype(np.uint8)
