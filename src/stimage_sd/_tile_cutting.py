"""Where tiles lie in the chunks of an image, and how they are cut out of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import cv2
import dask.array as da
import numpy as np

#: level, row and column of a chunk
Chunk = tuple[int, int, int]


def visit_order(centers: np.ndarray, array: da.Array) -> np.ndarray:
    """Order tiles so that neighbours in the order share image chunks.

    Parameters
    ----------
    centers
        ``(n_tiles, 2)`` x and y, px.
    array
        The finest level, ``(3, y, x)``.

    Returns
    -------
    ``int64 (n_tiles,)``: row numbers, chunk row by chunk row, each run through in the turn of the last.
    """
    rows, columns = (
        np.searchsorted(np.cumsum(array.chunks[axis]), np.clip(values, 0, array.shape[axis] - 1), side="right")
        for axis, values in ((1, centers[:, 1]), (2, centers[:, 0]))
    )
    sweep = np.where(rows % 2 == 0, columns, -columns)
    return np.lexsort((centers[:, 0], centers[:, 1], sweep, rows))


def cut_tile(level: np.ndarray, *, top: int, left: int, side: int, target: int) -> np.ndarray:
    """Cut one square out of an image in memory, borders reflected, and resample it.

    Parameters
    ----------
    level
        ``uint8 (3, y, x)``.
    top, left, side
        The square, px; it may reach over the border.
    target
        Side after resampling, px: by area where it shrinks, bilinear where it grows.

    Returns
    -------
    ``uint8 (target, target, 3)``.
    """
    rows, columns = _reflected(top, side, level.shape[1]), _reflected(left, side, level.shape[2])
    return _resample(np.moveaxis(level[:, rows[:, None], columns], 0, -1), target)


def _resample(tile: np.ndarray, target: int) -> np.ndarray:
    if tile.shape[0] == target:
        return np.ascontiguousarray(tile)
    how = cv2.INTER_AREA if tile.shape[0] > target else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(tile), (target, target), interpolation=how)


def _reflected(start: int, length: int, size: int) -> np.ndarray:
    """Indices of a run of pixels, mirrored at both borders without repeating the border pixel."""
    if size == 1:
        return np.zeros(length, dtype=np.int64)
    period = 2 * (size - 1)
    index = np.arange(start, start + length) % period
    return np.where(index < size, index, period - index)


@dataclass(frozen=True)
class View:
    """One field of view: the level it is read from, that level's downsampling, its side there, px."""

    level: int
    factor: float
    side: int

    def corners(self, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Left and top of the squares around some centres, px of the level; they may reach over the border."""
        corners = np.floor(centers / self.factor - self.side / 2 + 0.5).astype(np.int64)
        return corners[:, 0], corners[:, 1]

    def pixels(self, center: np.ndarray, *, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns and rows of the square around a centre, px of the level, mirrored beyond the borders of the level."""
        (left,), (top,) = self.corners(center[None])
        return _reflected(int(left), self.side, width), _reflected(int(top), self.side, height)


def view_of(arrays: Sequence[da.Array], side: float, target: int) -> View:
    """Field of view at the coarsest level at which it still has the target's pixels."""
    factors = [arrays[0].shape[2] / array.shape[2] for array in arrays]
    sufficient = [number for number, factor in enumerate(factors) if side / factor >= target * 0.999]
    level = sufficient[-1] if sufficient else 0
    return View(level, factors[level], max(1, round(side / factors[level])))


@dataclass(frozen=True)
class Cutting:
    """How tiles are cut out of the chunks of an image.

    Attributes
    ----------
    layout
        Heights and widths of the chunks of each level.
    views
        The fields of view.
    target
        Side to which each is resampled, px.
    """

    layout: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    views: tuple[View, ...]
    target: int

    @classmethod
    def of(cls, arrays: Sequence[da.Array], sides: Sequence[float], target: int) -> Cutting:
        """Plan the fields of view of an image, levels ``(3, y, x)``, finest first."""
        layout = tuple((array.chunks[1], array.chunks[2]) for array in arrays)
        return cls(layout, tuple(view_of(arrays, side, target) for side in sides), target)

    @cached_property
    def borders(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each level, where its rows and columns of chunks begin, and the last ends, px."""
        return [
            (np.concatenate([[0], np.cumsum(rows)]), np.concatenate([[0], np.cumsum(columns)]))
            for rows, columns in self.layout
        ]

    def chunks(self, centers: np.ndarray) -> list[Chunk]:
        """List the chunks that tiles touch in any field of view, in order."""
        touched = set()
        for view in self.views:
            left, top = view.corners(centers)
            rows, columns = self.borders[view.level]
            spans = zip(*_span(top, view.side, rows), *_span(left, view.side, columns), strict=True)
            for first_row, last_row, first_column, last_column in set(spans):
                ranges = range(first_row, last_row + 1), range(first_column, last_column + 1)
                touched |= {(view.level, row, column) for row, column in product(*ranges)}
        return sorted(touched)

    def cut(self, centers: np.ndarray, held: Mapping[Chunk, np.ndarray]) -> list[np.ndarray]:
        """Cut tiles out of chunks ``uint8 (y, x, 3)``: of each field of view ``uint8 (n_tiles, target, target, 3)``."""
        views = [np.empty((len(centers), self.target, self.target, 3), dtype=np.uint8) for _ in self.views]
        for view, tiles in zip(self.views, views, strict=True):
            for tile, left, top in zip(tiles, *(corner.tolist() for corner in view.corners(centers)), strict=True):
                self._assemble(view, left, top, held, tile)
        return views

    def _assemble(self, view: View, left: int, top: int, held: Mapping[Chunk, np.ndarray], tile: np.ndarray) -> None:
        """Put a tile together from the chunks it touches."""
        row_borders, column_borders = self.borders[view.level]
        top, height, rows = _inside(top, view.side, int(row_borders[-1]))
        left, width, columns = _inside(left, view.side, int(column_borders[-1]))
        as_it_is = rows is None and columns is None and view.side == self.target
        block = tile if as_it_is else np.empty((height, width, 3), dtype=np.uint8)
        for row in _touched(top, height, row_borders):
            to_rows, from_rows = _overlap(top, height, row_borders[row : row + 2])
            for column in _touched(left, width, column_borders):
                to_columns, from_columns = _overlap(left, width, column_borders[column : column + 2])
                block[to_rows, to_columns] = held[view.level, row, column][from_rows, from_columns]
        if rows is not None:
            block = block[rows]
        if columns is not None:
            block = block[:, columns]
        if not as_it_is:
            tile[:] = _resample(block, self.target)


def _inside(start: int, length: int, size: int) -> tuple[int, int, np.ndarray | None]:
    """First and number of the pixels that a run covers, and their order where it is mirrored at a border."""
    if start >= 0 and start + length <= size:
        return start, length, None
    index = _reflected(start, length, size)
    first = int(index.min())
    return first, int(index.max()) - first + 1, index - first


def _span(start: np.ndarray, length: int, borders: np.ndarray) -> tuple[list[int], list[int]]:
    """First and last chunk that runs of pixels touch along one axis, mirrored at the image's borders."""
    size = int(borders[-1])
    first, last = start.copy(), start + length - 1
    for number in np.flatnonzero((first < 0) | (last >= size)):
        index = _reflected(int(start[number]), length, size)
        first[number], last[number] = index.min(), index.max()
    chunks = np.searchsorted(borders[1:], [first, last], side="right")
    return chunks[0].tolist(), chunks[1].tolist()


def _touched(start: int, length: int, borders: np.ndarray) -> range:
    return range(bisect_right(borders, start) - 1, bisect_left(borders, start + length))


def _overlap(start: int, length: int, chunk: np.ndarray) -> tuple[slice, slice]:
    """Where a run of pixels and a chunk overlap: the slice of the run, the slice of the chunk."""
    first, last = max(start, int(chunk[0])), min(start + length, int(chunk[1]))
    return slice(first - start, last - start), slice(first - int(chunk[0]), last - int(chunk[0]))
