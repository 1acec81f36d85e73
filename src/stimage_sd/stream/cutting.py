"""Find the image chunks that tiles touch, and cut the tiles out of these chunks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import cv2
import dask.array as da
import numpy as np
import xarray as xr

#: coordinates are the same up to this difference, px
_SAME = 1e-3
#: tolerance for corners just below a whole pixel after transformations, px
_ROUNDING = 1e-6
#: level, row and column of a chunk
Chunk = tuple[int, int, int]


def visit_order(centers: np.ndarray, array: da.Array) -> np.ndarray:
    """Return an order of tiles in which successive tiles share image chunks.

    - `centers`: ``(n_tiles, 2)`` x and y, px.
    - `array`: the finest level, ``(3, y, x)``.
    - returns: ``int64 (n_tiles,)``: row numbers of the tiles, chunk row by chunk row, in alternating direction.
    """
    rows, columns = (
        np.searchsorted(np.cumsum(array.chunks[axis]), np.clip(values, 0, array.shape[axis] - 1), side="right")
        for axis, values in ((1, centers[:, 1]), (2, centers[:, 0]))
    )
    sweep = np.where(rows % 2 == 0, columns, -columns)
    return np.lexsort((centers[:, 0], centers[:, 1], sweep, rows))


def cut_tile(level: np.ndarray, *, top: int, left: int, side: int, target: int) -> np.ndarray:
    """Cut one square out of an image in memory, with reflected borders, and resample the square.

    - `level`: ``uint8 (3, y, x)``.
    - `top`, `left`, `side`: the square, px. The square may reach over the image border.
    - `target`: side after resampling, px. Shrinking averages areas, enlarging is bilinear.
    - returns: ``uint8 (target, target, 3)``.
    """
    rows, columns = _reflected(top, side, level.shape[1]), _reflected(left, side, level.shape[2])
    return _resample(np.moveaxis(level[:, rows[:, None], columns], 0, -1), target)


def _resample(tile: np.ndarray, target: int) -> np.ndarray:
    if tile.shape[0] == target:
        return np.ascontiguousarray(tile)
    how = cv2.INTER_AREA if tile.shape[0] > target else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(tile), (target, target), interpolation=how)


def _reflected(start: int, length: int, size: int) -> np.ndarray:
    """Return the indices of a run of pixels, mirrored at both borders without repeating the border pixel."""
    if size == 1:
        return np.zeros(length, dtype=np.int64)
    period = 2 * (size - 1)
    index = np.arange(start, start + length) % period
    return np.where(index < size, index, period - index)


@dataclass(frozen=True)
class View:
    """A field of view and the image level to read it from.

    - `level`: number of the level.
    - `factor`: pixels of the finest level per pixel of the level.
    - `start`: x and y of the level's corner, px of the finest level. Nonzero for a coarse level of a cropped image.
    - `side`: side of the field of view, px of the level.
    """

    level: int
    factor: float
    start: tuple[float, float]
    side: int

    def corners(self, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return left and top of the squares around centers, px of the level, also beyond the border."""
        corners = np.floor((centers - self.start) / self.factor - self.side / 2 + 0.5 + _ROUNDING).astype(np.int64)
        return corners[:, 0], corners[:, 1]

    def pixels(self, center: np.ndarray, *, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Return columns and rows of the square around a center, px of the level, mirrored at the level's borders."""
        (left,), (top,) = self.corners(center[None])
        return _reflected(int(left), self.side, width), _reflected(int(top), self.side, height)


def view_of(pyramid: Sequence[xr.DataArray], side: float, target: int) -> View:
    """Return the field of view at the coarsest level with at least `target` pixels per side."""
    placed = [placement(pyramid, level) for level in range(len(pyramid))]
    level = coarsest_level([factor for factor, _ in placed], side / target)
    factor, start = placed[level]
    return View(level, factor, start, max(1, round(side / factor)))


def coarsest_level(downsampling: Sequence[float], most: float, *, tolerance: float = 1e-3) -> int:
    """Return the last level that is downsampled at most `most` times, or the finest level if there is none."""
    sufficient = [level for level, factor in enumerate(downsampling) if factor <= most * (1 + tolerance)]
    return sufficient[-1] if sufficient else 0


def placement(pyramid: Sequence[xr.DataArray], level: int) -> tuple[float, tuple[float, float]]:
    """Return the downsampling of a level, and x and y of its corner in px of the finest level."""
    array, ratio = pyramid[level], pyramid[0].sizes["x"] / pyramid[level].sizes["x"]
    if level == 0 or not {"x", "y"} <= set(array.coords):
        return ratio, (0.0, 0.0)
    x, y = (np.asarray(array.coords[axis], dtype=np.float64) for axis in ("x", "y"))
    if np.abs(x[[0, -1]] - np.array([0.5, len(x) - 0.5]) * ratio).max() < _SAME:
        factor = ratio
    else:
        factor = round(float(x[-1] - x[0]) / max(len(x) - 1, 1), 6)
    start = (float(axis[0]) - factor / 2 for axis in (x, y))
    left, top = (0.0 if abs(value) < max(_SAME, 0.02 * factor) else round(value, 6) for value in start)
    return factor, (left, top)


@dataclass(frozen=True)
class Cutting:
    """Plan for cutting tiles out of the chunks of an image.

    - `layout`: heights and widths of the chunks, per level.
    - `views`: the fields of view.
    - `target`: side to which every field of view is resampled, px.
    """

    layout: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    views: tuple[View, ...]
    target: int

    @classmethod
    def of(cls, pyramid: Sequence[xr.DataArray], sides: Sequence[float], target: int) -> Cutting:
        """Plan the cutting of an image with levels ``(3, y, x)``, finest first."""
        layout = tuple((level.data.chunks[1], level.data.chunks[2]) for level in pyramid)
        return cls(layout, tuple(view_of(pyramid, side, target) for side in sides), target)

    @cached_property
    def borders(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the borders of the rows and columns of chunks, per level, px."""
        return [
            (np.concatenate([[0], np.cumsum(rows)]), np.concatenate([[0], np.cumsum(columns)]))
            for rows, columns in self.layout
        ]

    def chunks(self, centers: np.ndarray) -> list[Chunk]:
        """Return the sorted chunks that tiles touch in any field of view."""
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
        """Cut tiles out of chunks ``uint8 (y, x, 3)``.

        The list has one array ``uint8 (n_tiles, target, target, 3)`` per field of view.
        """
        views = [np.empty((len(centers), self.target, self.target, 3), dtype=np.uint8) for _ in self.views]
        for view, tiles in zip(self.views, views, strict=True):
            for tile, left, top in zip(tiles, *(corner.tolist() for corner in view.corners(centers)), strict=True):
                self._assemble(view, left, top, held, tile)
        return views

    def _assemble(self, view: View, left: int, top: int, held: Mapping[Chunk, np.ndarray], tile: np.ndarray) -> None:
        """Assemble a tile from the chunks that it touches."""
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
    """Return the first pixel and the number of pixels of a run, and their order if the run is mirrored."""
    if start >= 0 and start + length <= size:
        return start, length, None
    index = _reflected(start, length, size)
    first = int(index.min())
    return first, int(index.max()) - first + 1, index - first


def _span(start: np.ndarray, length: int, borders: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the first and last chunk that runs of pixels touch along one axis, mirrored at the image borders."""
    size = int(borders[-1])
    first, last = start.copy(), start + length - 1
    for run in np.flatnonzero((first < 0) | (last >= size)):
        index = _reflected(int(start[run]), length, size)
        first[run], last[run] = index.min(), index.max()
    chunks = np.searchsorted(borders[1:], [first, last], side="right")
    return chunks[0].tolist(), chunks[1].tolist()


def _touched(start: int, length: int, borders: np.ndarray) -> range:
    return range(bisect_right(borders, start) - 1, bisect_left(borders, start + length))


def _overlap(start: int, length: int, chunk: np.ndarray) -> tuple[slice, slice]:
    """Return the overlap of a run of pixels and a chunk, as a slice of the run and a slice of the chunk."""
    first, last = max(start, int(chunk[0])), min(start + length, int(chunk[1]))
    return slice(first - start, last - start), slice(first - int(chunk[0]), last - int(chunk[0]))
