"""The one driver that runs a function over the tiles of a lazy image.

Reading, cutting, embedding, predicting, segmenting and explaining are all "run `function` on batches of
tiles". A batch of tiles that lie close together is one dask task; it depends on the image chunks its
tiles touch, so a chunk is read (and stain-normalised, where the image is lazy about that) once, and is
freed when its last batch is done. The tasks run on threads, or unchanged on the active
`dask.distributed` client. Each batch writes its own chunk of a zarr array, so memory is bounded by the
batches in flight and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import dask
import dask.array as da
import numpy as np
import xarray as xr
import zarr
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed
from tqdm.auto import tqdm

from stimage_sd._cache import cache_dir

TileFunction = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Window:
    """One square of a pyramid level, px of that level; it may reach over the image's border."""

    level: int
    top: int
    left: int
    side: int


def run_over_tiles(
    pyramid: Sequence[xr.DataArray],
    centers: np.ndarray,
    function: TileFunction,
    *,
    sides: Sequence[float],
    target: int,
    key: str,
    shape: tuple[int, ...] | None = None,
    batch_size: int = 32,
    n_workers: int | None = None,
    description: str = "tiles",
    keep_store: bool = False,
) -> np.ndarray:
    """Run a function over batches of square tiles of a lazy image.

    Parameters
    ----------
    pyramid
        Levels of the image, finest first, each ``uint8 (3, y, x)`` and dask-backed.
    centers
        ``(n_tiles, 2)`` float, x and y of the tile centres, px of the finest level.
    function
        ``uint8 (batch, target, target, 3)`` to an array whose first axis is the batch. It must give a tile
        the same result whatever else is in the batch, and be picklable to run on a cluster.
    sides
        Side of each field of view around a centre, px of the finest level.
    target
        Side to which each field of view is resampled, px.
    key
        What tells this function from another, such as an extractor's name and its weights' hash; part of
        what a resumed run is recognised by.
    shape
        Shape of the result for one tile, where it is known; else the function is tried on a blank tile.
    batch_size
        Tiles a batch: the unit of work and of resumption.
    n_workers
        Threads; all cores by default. Where a `dask.distributed` client is active, it is used instead.
    description
        Label of the progress bar.
    keep_store
        Keep the results on disk after they are complete.

    Returns
    -------
    ``float32 (n_tiles, n_sides, ...)``: the function's result for each tile and field of view.

    Raises
    ------
    ValueError
        If there are no tiles, a centre is not finite, a side, the target or `batch_size` is not positive, or results
        are not of the `shape` that was given.
    """
    centers = np.asarray(centers, dtype=np.float64)
    if centers.ndim != 2 or centers.shape[1] != 2 or centers.shape[0] == 0:
        raise ValueError(f"Expected tile centres as a non-empty (n_tiles, 2) array, found shape {centers.shape}.")
    if not np.isfinite(centers).all():
        raise ValueError("Expected tile centres as finite numbers of pixels, found NaN or infinity.")
    if batch_size < 1:
        raise ValueError(f"Expected `batch_size` of at least 1, found {batch_size}.")
    if target < 1 or not sides or min(sides) <= 0:
        raise ValueError(f"Expected positive tile sides and target, found sides {list(sides)} and target {target}.")
    arrays = [level.data.rechunk({0: -1}) for level in pyramid]
    order = visit_order(centers, arrays[0])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    path = cache_dir() / "stream" / _fingerprint(pyramid, centers, sides, target, key, batch_size)
    shape_of = partial(_shape_of, function, target, shape)
    store = _open_store(path, shape_of, n_tiles=len(centers), n_views=len(sides), batch_size=batch_size)
    done = store["done"][:]
    bar = tqdm(total=len(order), initial=int(sum(len(batches[i]) for i in np.flatnonzero(done))), desc=description)
    with bar:
        tasks = _batch_tasks(arrays, centers, function, batches, done, sides=sides, target=target, store=store)
        _execute(tasks, sizes=[len(batches[i]) for i in np.flatnonzero(~done)], bar=bar, n_workers=n_workers)
    values = np.empty(store["values"].shape, dtype=np.float32)
    values[order] = store["values"][:]
    if not keep_store:
        shutil.rmtree(path, ignore_errors=True)
    return values


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
    rows, columns = _chunk_numbers(centers, array)
    sweep = np.where(rows % 2 == 0, columns, -columns)
    return np.lexsort((centers[:, 0], centers[:, 1], sweep, rows))


def _chunk_numbers(centers: np.ndarray, array: da.Array) -> tuple[np.ndarray, np.ndarray]:
    rows = np.searchsorted(np.cumsum(array.chunks[1]), np.clip(centers[:, 1], 0, array.shape[1] - 1), side="right")
    columns = np.searchsorted(np.cumsum(array.chunks[2]), np.clip(centers[:, 0], 0, array.shape[2] - 1), side="right")
    return rows, columns


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


def pixel_positions(
    pyramid: Sequence[xr.DataArray], center: np.ndarray, *, side: float, target: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of a field of view come from, as `run_over_tiles` cuts it.

    Parameters
    ----------
    pyramid
        Levels of the image, finest first.
    center
        x and y of the tile's centre, px of the finest level.
    side
        Side of the field of view, px of the finest level.
    target
        Side to which it is resampled, px.

    Returns
    -------
    x of the columns and y of the rows, each ``float64 (target,)``, px of the finest level: the middle of the level's
    pixel that is nearest. Beyond the image's border they are mirrored, as the pixels are.
    """
    level, factor = _level_of(pyramid, side, target)
    window = _window(np.asarray(center, dtype=np.float64), side, level, factor)
    nearest = ((np.arange(target) + 0.5) * window.side / target).astype(np.int64)
    _, height, width = pyramid[level].shape
    columns, rows = _reflected(window.left, window.side, width), _reflected(window.top, window.side, height)
    return (columns[nearest] + 0.5) * factor, (rows[nearest] + 0.5) * factor


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


# --------------------------------------------------------------------------------------------------
# the store of results


def _open_store(
    path: Path, shape_of: Callable[[], tuple[int, ...]], *, n_tiles: int, n_views: int, batch_size: int
) -> zarr.Group:
    if (path / "ready").exists():
        return zarr.open_group(path, mode="r+")
    shutil.rmtree(path, ignore_errors=True)
    shape = shape_of()
    group = zarr.open_group(path, mode="w")
    group.create_array(
        "values", shape=(n_tiles, n_views, *shape), chunks=(batch_size, n_views, *shape), dtype="float32"
    )
    group.create_array("done", shape=(-(-n_tiles // batch_size),), chunks=(1,), dtype="bool")
    (path / "ready").touch()
    return group


def _shape_of(function: TileFunction, target: int, known: tuple[int, ...] | None) -> tuple[int, ...]:
    """Shape of the result for one tile, as a blank one tells where it is not known."""
    if known is not None:
        return known
    return tuple(function(np.full((1, target, target, 3), 255, dtype=np.uint8)).shape[1:])


def _fingerprint(
    pyramid: Sequence[xr.DataArray], centers: np.ndarray, sides: Sequence[float], target: int, key: str, batch_size: int
) -> str:
    """Hash what the results depend on; the coarsest level stands for the image."""
    coarsest = pyramid[-1].data
    step = max(1, max(coarsest.shape[1:]) // 512)
    digest = hashlib.sha256(np.ascontiguousarray(coarsest[:, ::step, ::step].compute()).tobytes())
    digest.update(json.dumps([[level.shape for level in pyramid], list(sides), target, key, batch_size]).encode())
    digest.update(np.ascontiguousarray(centers).tobytes())
    return digest.hexdigest()[:32]


# --------------------------------------------------------------------------------------------------
# the graph


def _batch_tasks(
    arrays: Sequence[da.Array],
    centers: np.ndarray,
    function: TileFunction,
    batches: Sequence[np.ndarray],
    done: np.ndarray,
    *,
    sides: Sequence[float],
    target: int,
    store: zarr.Group,
) -> list[Delayed]:
    views = [_level_of(arrays, side, target) for side in sides]
    chunks = {level: arrays[level].to_delayed() for level in {level for level, _ in views}}
    shared = delayed(function, pure=False, traverse=False)
    # opened once for all batches, which may be of two tiles
    results = delayed(_Results(store["values"], store["done"]), traverse=False)
    name = f"tiles-{Path(store.store.root).name}"
    tasks = []
    for number in np.flatnonzero(~done).tolist():
        windows = [
            [_window(center, side, level, factor) for center in centers[batches[number]]]
            for side, (level, factor) in zip(sides, views, strict=True)
        ]
        needed = sorted({chunk for view in windows for window in view for chunk in _touched(window, arrays)})
        tasks.append(
            delayed(_run_batch, pure=False)(
                shared,
                [chunks[level][0, row, column] for level, row, column in needed],
                delayed(_Plan(needed, windows, [array.chunks for array in arrays], target), traverse=False),
                results,
                int(number),
                dask_key_name=f"{name}-{number}",
            )
        )
    return tasks


@dataclass(frozen=True)
class _Results:
    """Where batches are written: their values, and which are done."""

    values: zarr.Array
    done: zarr.Array


@dataclass(frozen=True)
class _Plan:
    """What a batch needs to know to cut its tiles out of the chunks it is given."""

    chunks: list[tuple[int, int, int]]
    windows: list[list[_Window]]
    layout: list[tuple[tuple[int, ...], ...]]
    target: int


def _level_of(arrays: Sequence[da.Array] | Sequence[xr.DataArray], side: float, target: int) -> tuple[int, float]:
    """Coarsest level at which a field of view still has the target's pixels, and its downsampling."""
    factors = [arrays[0].shape[2] / array.shape[2] for array in arrays]
    sufficient = [number for number, factor in enumerate(factors) if side / factor >= target * 0.999]
    level = sufficient[-1] if sufficient else 0
    return level, factors[level]


def _window(center: np.ndarray, side: float, level: int, factor: float) -> _Window:
    length = max(1, round(side / factor))
    left, top = (int(np.floor(value / factor - length / 2 + 0.5)) for value in center)
    return _Window(level, top, left, length)


def _touched(window: _Window, arrays: Sequence[da.Array]) -> list[tuple[int, int, int]]:
    array = arrays[window.level]
    rows = _chunks_of(_reflected(window.top, window.side, array.shape[1]), array.chunks[1])
    columns = _chunks_of(_reflected(window.left, window.side, array.shape[2]), array.chunks[2])
    return [(window.level, row, column) for row in rows for column in columns]


def _chunks_of(index: np.ndarray, lengths: tuple[int, ...]) -> range:
    first, last = np.searchsorted(np.cumsum(lengths), [index.min(), index.max()], side="right")
    return range(int(first), int(last) + 1)


def _run_batch(function: TileFunction, chunks: list[np.ndarray], plan: _Plan, results: _Results, number: int) -> int:
    """Cut a batch of tiles, run the function on every field of view, write the result; return the batch."""
    held = dict(zip(plan.chunks, chunks, strict=True))
    views = [np.stack([_assemble(window, held, plan) for window in view]) for view in plan.windows]
    values = np.stack([np.asarray(function(view), dtype=np.float32) for view in views], axis=1)
    if values.shape[2:] != results.values.shape[2:]:  # zarr would repeat a single value
        raise ValueError(
            f"Expected a result of shape {results.values.shape[2:]} for each tile, as `shape` says, "
            f"found {values.shape[2:]}."
        )
    start = number * results.values.chunks[0]
    results.values[start : start + len(values)] = values
    results.done[number] = True
    return number


def _assemble(window: _Window, held: dict[tuple[int, int, int], np.ndarray], plan: _Plan) -> np.ndarray:
    """Put a tile together from the chunks it touches."""
    layout = plan.layout[window.level]
    starts = [np.concatenate([[0], np.cumsum(lengths)]) for lengths in layout]
    rows = _reflected(window.top, window.side, int(starts[1][-1]))
    columns = _reflected(window.left, window.side, int(starts[2][-1]))
    top, left = rows.min(), columns.min()
    block = np.empty((rows.max() - top + 1, columns.max() - left + 1, 3), dtype=np.uint8)
    for row in _chunks_of(rows, layout[1]):
        to_rows, from_rows = _overlap(top, block.shape[0], starts[1][row : row + 2])
        for column in _chunks_of(columns, layout[2]):
            to_columns, from_columns = _overlap(left, block.shape[1], starts[2][column : column + 2])
            part = held[window.level, row, column][:, from_rows, from_columns]
            # plane by plane: four times as fast as all channels of one pixel after the other
            for channel in range(3):
                block[to_rows, to_columns, channel] = part[channel]
    if any(index[-1] - index[0] != window.side - 1 for index in (rows, columns)):  # mirrored at a border
        block = block[(rows - top)[:, None], columns - left]
    return _resample(block, plan.target)


def _overlap(start: int, length: int, chunk: np.ndarray) -> tuple[slice, slice]:
    """Where a run of pixels and a chunk overlap: the slice of the run, the slice of the chunk."""
    first, last = max(start, chunk[0]), min(start + length, chunk[1])
    return slice(first - start, last - start), slice(first - chunk[0], last - chunk[0])


# --------------------------------------------------------------------------------------------------
# running it


class _Progress(Callback):
    """Move a bar whenever one of the named tasks is done."""

    def __init__(self, sizes: dict[str, int], bar: Any) -> None:
        super().__init__(posttask=self._posttask)
        self._sizes = sizes
        self._bar = bar

    def _posttask(self, key: Any, *_: Any) -> None:
        self._bar.update(self._sizes.get(key, 0))


def _execute(tasks: list[Delayed], *, sizes: list[int], bar: Any, n_workers: int | None) -> None:
    by_key = dict(zip((task.key for task in tasks), sizes, strict=True))
    if not tasks:
        return
    client = active_client()
    if client is None:
        with _Progress(by_key, bar):
            dask.compute(*tasks, scheduler="threads", num_workers=n_workers, optimize_graph=False)
        return
    from distributed import as_completed

    for future in as_completed(client.compute(tasks, optimize_graph=False)):
        future.result()
        bar.update(by_key[future.key])


def active_client() -> Any | None:
    """Return the `dask.distributed` client that is active in this process, if any."""
    if "distributed" not in sys.modules:
        return None
    try:
        return sys.modules["distributed"].default_client()
    except ValueError:
        return None
