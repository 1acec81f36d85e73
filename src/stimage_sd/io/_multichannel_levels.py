"""Read levels of a TIFF with many channels tile by tile or strip by strip, or map them into memory.

A level stores the paths of its files, and each process opens a file once. A dask graph over the level can therefore be
pickled to any worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import tifffile
from dask.base import tokenize

from stimage_sd.contract import CHUNK
from stimage_sd.io._pyramid import COARSEST
from stimage_sd.io._tiff_open import BROKEN, DamagedFile
from stimage_sd.io._tiff_pages import FileState, Place, open_page, page_at, page_below, place_of
from stimage_sd.io._tiff_region import read_region

#: dtypes that OpenCV can average
OPENCV_TYPES = ("u1", "u2", "i2", "f4", "f8")
Index3 = tuple[slice | int, slice | int, slice | int]
#: location of a plane: file, place in the page tree of the file, sample within the page
Plane = tuple[FileState, Place, int]


@dataclass(frozen=True)
class PagedLevel:
    """One level of an image with planes in pages of TIFF files."""

    planes: tuple[Plane, ...]
    shape: tuple[int, int, int]
    dtype: np.dtype
    ndim: int = 3

    def __getitem__(self, index: Index3) -> np.ndarray:
        """Read a region of the selected channels."""
        (channels, rows, columns), dropped = as_slices(index)
        return np.stack([self._read(plane, rows, columns) for plane in self.planes[channels]])[dropped]

    def _read(self, plane: Plane, rows: slice, columns: slice) -> np.ndarray:
        file, place, sample = plane
        try:
            file.check()
            region = read_region(open_page(file, place), slice(sample, sample + 1), rows, columns)
        except (*BROKEN, RuntimeError) as error:
            raise DamagedFile(Path(file.path), error) from error
        return np.asarray(region[0], dtype=self.dtype)


@dataclass(frozen=True)
class MappedLevel:
    """An uncompressed image stored in one piece."""

    file: FileState
    offset: int
    stored: np.dtype
    layout: tuple[int, ...]
    sample_axis: int | None
    shape: tuple[int, int, int]
    ndim: int = 3

    @property
    def dtype(self) -> np.dtype:
        """Return the stored dtype in native byte order."""
        return self.stored.newbyteorder("=")

    def __getitem__(self, index: Index3) -> np.ndarray:
        """Read a region of the selected channels."""
        try:
            self.file.check()
        except ValueError as error:
            raise DamagedFile(Path(self.file.path), error) from error
        mapped = np.memmap(self.file.path, dtype=self.stored, mode="r", offset=self.offset, shape=self.layout)
        whole = np.asarray(mapped)
        if self.sample_axis is None:
            return np.asarray(whole.reshape(self.shape)[index], dtype=self.dtype)
        (channels, rows, columns), dropped = as_slices(index)
        pages = np.moveaxis(whole, self.sample_axis, -3).reshape(-1, whole.shape[self.sample_axis], *self.shape[1:])
        return np.concatenate(list(pages[:, :, rows, columns]))[channels].astype(self.dtype)[dropped]


def as_slices(index: Index3) -> tuple[tuple[slice, ...], tuple[slice | int, ...]]:
    """Return the index as slices, and a second index that drops the axes selected by number."""
    slices = tuple(part if isinstance(part, slice) else slice(part, part + 1) for part in index)
    return slices, tuple(slice(None) if isinstance(part, slice) else 0 for part in index)


def file_levels(path: Path, series: tifffile.TiffPageSeries) -> list[da.Array]:
    """Return the levels stored in a file, after checking that the file is not truncated."""
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
        mapped = MappedLevel(FileState.of(path), series.dataoffset, stored, series.shape, sample_axis, shape)
        return [_as_dask(mapped, (1, min(CHUNK, height), min(CHUNK, width)))]
    if len(base) != n_planes:
        raise ValueError(f"{n_planes} planes lie in {len(base)} pages")
    with _Opened(files) as opened:
        trees = [[page_at(opened[page.parent.filehandle.path], place_of(page)) for page in base]]
        if keyframe.subifds:
            trees += [[page_below(page, subifd) for page in trees[0]] for subifd in range(len(keyframe.subifds))]
        else:
            trees += [
                [
                    page_at(opened[page.parent.filehandle.path], place_of(page))
                    for page in level.pages
                    if page is not None
                ]
                for level in series.levels[1:]
            ]
        if len({len(pages) for pages in trees}) > 1:
            raise ValueError(f"its levels have different numbers of planes: {[len(pages) for pages in trees]}")
        return [_paged(pages, samples, stored.newbyteorder("=")) for pages in trees]


def _paged(pages: list[tifffile.TiffPage], samples: int, dtype: np.dtype) -> da.Array:
    """Build a level from pages, with one plane per page or per sample of a page."""
    planes: list[Plane] = []
    for page in pages:
        file = Path(page.parent.filehandle.path)
        state = FileState.of(file)
        ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or max(ends) > state.size:
            raise DamagedFile(file, f"its directory needs {max(ends, default=0)} bytes, it has {state.size}")
        planes += [(state, place_of(page), sample) for sample in range(samples)]
    first = pages[0]
    height, width = first.imagelength, first.imagewidth
    if first.is_tiled:
        sides = tuple(max(1, CHUNK // side) * side for side in (first.tilelength, first.tilewidth))
    else:
        # Strips span the whole width, so narrower chunks would read each strip several times.
        strip = min(first.rowsperstrip, height)
        sides = (max(1, CHUNK * CHUNK // width // strip) * strip, width)
    level = PagedLevel(tuple(planes), (len(planes), height, width), dtype)
    return _as_dask(level, (1, min(sides[0], height), min(sides[1], width)))


def _as_dask(level: PagedLevel | MappedLevel, chunks: tuple[int, int, int]) -> da.Array:
    meta = np.empty((0, 0, 0), level.dtype)
    return da.from_array(level, chunks=chunks, name=f"multichannel-{tokenize(level)}", lock=False, meta=meta)


class _Opened(dict[str, tifffile.TiffFile]):
    """Several open TIFF files, by path. Pages are found without the OME description that spans the files."""

    def __init__(self, paths: set[str]) -> None:
        super().__init__({path: tifffile.TiffFile(path, _multifile=False) for path in sorted(paths)})

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        for tiff in self.values():
            tiff.close()


def extend_channels(levels: list[da.Array]) -> list[da.Array]:
    """Append halved levels until the coarsest level is small. Computing a level reads the level before."""
    extended = list(levels)
    while max(extended[-1].shape[1:]) > COARSEST:
        even = extended[-1].rechunk((1, CHUNK, CHUNK))
        rows, columns = (tuple((size + 1) // 2 for size in sizes) for sizes in even.chunks[1:])
        chunks = (even.chunks[0], rows, columns)
        halved = even.map_blocks(_halve, chunks=chunks, dtype=even.dtype, meta=np.empty((0, 0, 0), even.dtype))
        extended.append(halved.rechunk((1, CHUNK, CHUNK)))
    return extended


def _halve(block: np.ndarray) -> np.ndarray:
    """Halve one channel, ``(1, y, x)``, by the mean of 2 × 2 pixels. An odd last row or column is repeated."""
    plane = np.pad(block[0], [(0, size % 2) for size in block.shape[1:]], mode="edge")
    if plane.dtype.str[1:] in OPENCV_TYPES:
        return cv2.resize(plane, (plane.shape[1] // 2, plane.shape[0] // 2), interpolation=cv2.INTER_AREA)[None]
    mean = plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean(axis=(1, 3))
    return (mean if plane.dtype.kind == "f" else np.rint(mean)).astype(plane.dtype)[None]
