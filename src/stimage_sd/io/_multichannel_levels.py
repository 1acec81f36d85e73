"""Levels of a TIFF of many channels, read a tile or strip at a time, or mapped into memory.

A level knows its files by path and opens them where it is read, once a process, so that a dask graph over it
can be pickled to any worker.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import cv2
import dask.array as da
import numpy as np
import tifffile
import zarr
from dask.base import tokenize

from stimage_sd.contract import CHUNK
from stimage_sd.io._pyramid import COARSEST

#: types that OpenCV averages by itself
OPENCV_TYPES = ("u1", "u2", "i2", "f4", "f8")
#: what tifffile raises on files that end too early or are no TIFF
BROKEN = (tifffile.TiffFileError, struct.error, ElementTree.ParseError, ValueError, IndexError, KeyError, OSError)


class DamagedFile(ValueError):
    """A file is truncated, damaged or no TIFF; of an image of several files, this one."""

    def __init__(self, path: Path, error: Exception | str) -> None:
        super().__init__(unreadable(path, error))


Index3 = tuple[slice | int, slice | int, slice | int]
#: where a plane lies: file, time of change, place in the file's tree of pages, sample within the page
Plane = tuple[str, int, tuple[int, ...], int | None]


@dataclass(frozen=True)
class PagedLevel:
    """One level of an image whose planes lie in pages of TIFF files."""

    planes: tuple[Plane, ...]
    shape: tuple[int, int, int]
    dtype: np.dtype
    ndim: int = 3

    def __getitem__(self, index: Index3) -> np.ndarray:
        """Read a region of some channels."""
        (channels, rows, columns), dropped = _as_slices(index)
        return np.stack([self._read(plane, rows, columns) for plane in self.planes[channels]])[dropped]

    def _read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        path, changed, page, sample = plane
        try:
            array, planar = _open_page(path, changed, page)
            if sample is None:
                region = array[rows, columns]
            else:
                region = array[sample, rows, columns] if planar else array[rows, columns, sample]
        except (*BROKEN, RuntimeError) as error:
            raise DamagedFile(Path(path), error) from error
        return np.asarray(region, dtype=self.dtype)


@dataclass(frozen=True)
class MappedLevel:
    """An uncompressed image that lies in its file in one piece."""

    path: str
    changed: int
    offset: int
    stored: np.dtype
    layout: tuple[int, ...]
    sample_axis: int | None
    shape: tuple[int, int, int]
    ndim: int = 3

    @property
    def dtype(self) -> np.dtype:
        """The stored type in this machine's byte order."""
        return self.stored.newbyteorder("=")

    def __getitem__(self, index: Index3) -> np.ndarray:
        """Read a region of some channels."""
        mapped = np.memmap(self.path, dtype=self.stored, mode="r", offset=self.offset, shape=self.layout)
        whole = np.asarray(mapped)
        if self.sample_axis is None:
            return np.asarray(whole.reshape(self.shape)[index], dtype=self.dtype)
        (channels, rows, columns), dropped = _as_slices(index)
        pages = np.moveaxis(whole, self.sample_axis, -3).reshape(-1, whole.shape[self.sample_axis], *self.shape[1:])
        return np.concatenate(list(pages[:, :, rows, columns]))[channels].astype(self.dtype)[dropped]


def _as_slices(index: Index3) -> tuple[tuple[slice, ...], tuple[slice | int, ...]]:
    """Return slices alone, and what is left to do: dask asks for a single channel by its number."""
    slices = tuple(part if isinstance(part, slice) else slice(part, part + 1) for part in index)
    return slices, tuple(slice(None) if isinstance(part, slice) else 0 for part in index)


def file_levels(path: Path, series: tifffile.TiffPageSeries) -> list[da.Array]:
    """Return the levels that a file has, after checking that it is as long as it says."""
    keyframe = series.keyframe
    height, width = (series.shape[series.axes.index(axis)] for axis in "YX")
    samples = series.shape[series.axes.index("S")] if "S" in series.axes else 1
    n_planes = prod(series.shape) // (height * width * samples)
    if any(page is None for page in series.pages):
        raise ValueError(f"planes are missing: its description speaks of {n_planes}")
    stored = np.dtype(keyframe.dtype).newbyteorder(keyframe.parent.byteorder)
    base = [page for page in series.pages if page is not None]
    files = {page.parent.filehandle.path for page in base}
    flat = len(series.levels) == 1 and not keyframe.subifds
    if series.dataoffset is not None and flat and len(files) == 1:
        size, end = path.stat().st_size, series.dataoffset + prod(series.shape) * stored.itemsize
        if end > size:
            raise ValueError(f"its directory needs {end} bytes, it has {size}")
        sample_axis = series.axes.index("S") if "S" in series.axes else None
        shape = (n_planes * samples, height, width)
        changed = path.stat().st_mtime_ns
        mapped = MappedLevel(str(path), changed, series.dataoffset, stored, series.shape, sample_axis, shape)
        return [_as_dask(mapped, (1, min(CHUNK, height), min(CHUNK, width)))]
    if len(base) != n_planes:
        raise ValueError(f"{n_planes} planes lie in {len(base)} pages")
    with _Opened(files) as opened:
        trees = [[_at(opened[page.parent.filehandle.path], _place(page)) for page in base]]
        if keyframe.subifds:
            trees += [[_below(page, number) for page in trees[0]] for number in range(len(keyframe.subifds))]
        else:
            trees += [
                [_at(opened[page.parent.filehandle.path], _place(page)) for page in level.pages if page is not None]
                for level in series.levels[1:]
            ]
        if len({len(pages) for pages in trees}) > 1:
            raise ValueError(f"its levels have different numbers of planes: {[len(pages) for pages in trees]}")
        return [_paged(pages, samples, stored.newbyteorder("=")) for pages in trees]


def _paged(pages: list[tifffile.TiffPage], samples: int, dtype: np.dtype) -> da.Array:
    """Build a level of pages, a page a plane or several samples of one."""
    planes: list[Plane] = []
    for page in pages:
        file = Path(page.parent.filehandle.path)
        state = file.stat()
        ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or max(ends) > state.st_size:
            raise DamagedFile(file, f"its directory needs {max(ends, default=0)} bytes, it has {state.st_size}")
        own = [None] if samples == 1 else list(range(samples))
        planes += [(str(file), state.st_mtime_ns, _place(page), sample) for sample in own]
    first = pages[0]
    height, width = first.imagelength, first.imagewidth
    if first.is_tiled:
        sides = tuple(max(1, CHUNK // side) * side for side in (first.tilelength, first.tilewidth))
    else:
        # Strips run over the whole width: narrower chunks would read each of them several times.
        strip = min(first.rowsperstrip, height)
        sides = (max(1, CHUNK * CHUNK // width // strip) * strip, width)
    level = PagedLevel(tuple(planes), (len(planes), height, width), dtype)
    return _as_dask(level, (1, min(sides[0], height), min(sides[1], width)))


def _as_dask(level: PagedLevel | MappedLevel, chunks: tuple[int, int, int]) -> da.Array:
    meta = np.empty((0, 0, 0), level.dtype)
    return da.from_array(level, chunks=chunks, name=f"multichannel-{tokenize(level)}", lock=False, meta=meta)


class _Opened(dict[str, tifffile.TiffFile]):
    """Several TIFF files, open at once: their pages are found without a description that spans them."""

    def __init__(self, paths: set[str]) -> None:
        super().__init__({path: tifffile.TiffFile(path) for path in sorted(paths)})

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        for tiff in self.values():
            tiff.close()


def _place(page: tifffile.TiffPage | tifffile.TiffFrame) -> tuple[int, ...]:
    return tuple(page.treeindex)


def _at(tiff: tifffile.TiffFile, place: Sequence[int]) -> tifffile.TiffPage:
    page = tiff.pages[place[0]].aspage()
    for number in place[1:]:
        page = _below(page, number)
    return page


def _below(page: tifffile.TiffPage, number: int) -> tifffile.TiffPage:
    """Return one of a page's sub-directories, which hold its coarser levels."""
    try:
        if page.pages is None:
            raise ValueError("it lacks the coarser levels that others have")
        return page.pages[number].aspage()
    except BROKEN as error:
        raise DamagedFile(Path(page.parent.filehandle.path), error) from error


# Pages are kept open a process; `changed` is part of the key, so that a rewritten file is opened again.


@lru_cache(maxsize=64)
def _open_file(path: str, changed: int) -> tifffile.TiffFile:
    tiff = tifffile.TiffFile(path)
    # All pages of a file share its handle, and so its position: pixels are read under this lock.
    tiff.filehandle.set_lock(True)
    return tiff


@lru_cache(maxsize=1024)
def _open_page(path: str, changed: int, place: tuple[int, ...]) -> tuple[zarr.Array, bool]:
    tiff = _open_file(path, changed)
    # tifffile reads directories without the lock, while another thread may read pixels.
    with tiff.filehandle.lock:
        page = _at(tiff, place)
        store = page.aszarr()
    # zarr opens in a thread of its own, which may wait for the lock: it must be free.
    return zarr.open_array(store, mode="r"), page.planarconfig == 2


def extend_channels(levels: list[da.Array]) -> list[da.Array]:
    """Append halved levels until the coarsest is small; each costs a read of the level before."""
    extended = list(levels)
    while max(extended[-1].shape[1:]) > COARSEST:
        even = extended[-1].rechunk((1, CHUNK, CHUNK))
        rows, columns = (tuple((size + 1) // 2 for size in sizes) for sizes in even.chunks[1:])
        chunks = (even.chunks[0], rows, columns)
        halved = even.map_blocks(_halve, chunks=chunks, dtype=even.dtype, meta=np.empty((0, 0, 0), even.dtype))
        extended.append(halved.rechunk((1, CHUNK, CHUNK)))
    return extended


def _halve(block: np.ndarray) -> np.ndarray:
    """Halve one channel, ``(1, y, x)``, by the mean of 2 × 2 pixels; an odd last row or column is repeated."""
    plane = np.pad(block[0], [(0, size % 2) for size in block.shape[1:]], mode="edge")
    if plane.dtype.str[1:] in OPENCV_TYPES:
        return cv2.resize(plane, (plane.shape[1] // 2, plane.shape[0] // 2), interpolation=cv2.INTER_AREA)[None]
    mean = plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean(axis=(1, 3))
    return (mean if plane.dtype.kind == "f" else np.rint(mean)).astype(plane.dtype)[None]


def unreadable(path: Path, error: Exception | str) -> str:
    """Say that a file is damaged, and what to do."""
    return (
        f"Expected a complete TIFF image, found that {path} is truncated, damaged or no TIFF "
        f"({' '.join(str(error).split()) or type(error).__name__}). Copy or export it again."
    )
