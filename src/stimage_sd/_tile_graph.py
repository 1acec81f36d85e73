"""Batches of tiles as dask tasks, a bounded number of them at a time, on threads or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import cv2
import dask
import dask.array as da
import dask.threaded
import numpy as np
import zarr
from dask.callbacks import Callback
from dask.core import get_dependencies
from dask.highlevelgraph import HighLevelGraph
from dask.task_spec import DataNode, List, Task, TaskRef

from stimage_sd._tile_cutting import Chunk, Cutting
from stimage_sd._tile_results import Results
from stimage_sd._zarr_chunks import ChunkReader

TileFunction = Callable[[np.ndarray], np.ndarray]

#: Batches whose tasks are made at a time. A chunk of the image that two of these spans touch is read in both on
#: threads: about one row of chunks in fifteen on a slide of a million tiles, none on one of 65,000.
SPAN = 2048
#: a cluster gets the next span when it has fewer batches than so many a thread
_BATCHES_A_THREAD = 4


@dataclass(frozen=True)
class Recipe:
    """What the batches of one image share."""

    function: TileFunction
    cutting: Cutting
    results: Results


@dataclass(frozen=True)
class Batch:
    """A batch that is to be run.

    Attributes
    ----------
    key
        Name of its task.
    tasks
        Its task, and those of the chunks it reads.
    n_tiles
        Its size.
    owner
        Number of the image it belongs to.
    """

    key: str
    tasks: dict[Any, Any]
    n_tiles: int
    owner: int


def batches(
    name: str, owner: int, arrays: Sequence[da.Array], centers: np.ndarray, numbers: Sequence[int], recipe: Recipe
) -> Iterator[Batch]:
    """Make the tasks of an image's batches, one batch after the other.

    Parameters
    ----------
    name
        A name that no other run has.
    owner
        Number of the image.
    arrays
        Its levels, lazy ``uint8 (3, y, x)``, each chunk with all channels.
    centers
        ``(n_tiles, 2)`` in the order of visit.
    numbers
        The batches to run.
    recipe
        What is done with each.
    """
    if not len(numbers):
        return
    levels = {view.level: _LevelTasks(arrays[view.level]) for view in recipe.cutting.views}
    shared = f"recipe-{name}"
    size = recipe.results.batch_size
    for number in numbers:
        chosen = centers[number * size : (number + 1) * size]
        chunks = recipe.cutting.chunks(chosen)
        tasks: dict[Any, Any] = {shared: DataNode(shared, recipe)}
        for level, row, column in chunks:
            tasks |= levels[level].of(row, column)
        held = List(*(TaskRef(levels[level].key(row, column)) for level, row, column in chunks))
        key = f"tiles-{name}-{number}"
        tasks[key] = Task(key, _run_batch, TaskRef(shared), held, chunks, chosen, int(number))
        yield Batch(key, tasks, len(chosen), owner)


class _LevelTasks:
    """The tasks of a level's chunks, fused, the last of each laying its channels side by side."""

    def __init__(self, array: da.Array) -> None:
        pixels = da.blockwise(_side_by_side, "yxc", array, "cyx", meta=np.empty((0, 0, 0), dtype=array.dtype))
        (fused,) = dask.optimize(pixels)
        self._name = fused.name
        self._tasks = {key: _read_quickly(key, task) for key, task in dict(fused.__dask_graph__()).items()}

    def key(self, row: int, column: int) -> tuple[str, int, int, int]:
        """Name of a chunk, ``uint8 (y, x, 3)``."""
        return self._name, row, column, 0

    def of(self, row: int, column: int) -> dict[Any, Any]:
        """Give the tasks that a chunk takes."""
        found: dict[Any, Any] = {}
        wanted: list[Any] = [self.key(row, column)]
        while wanted:
            key = wanted.pop()
            if key not in found:
                found[key] = self._tasks[key]
                wanted += get_dependencies(self._tasks, key)
        return found


def _side_by_side(planes: np.ndarray) -> np.ndarray:
    """Lay the channels ``(3, y, x)`` of pixels side by side; a chunk at once is many times as fast as tile by tile."""
    return cv2.merge(tuple(planes))


def _read_quickly(key: Any, task: Any) -> Any:
    """Have a zarr array that chunks are read from read by a `ChunkReader`, where it can be."""
    reader = ChunkReader.of(task.value) if isinstance(task, DataNode) and isinstance(task.value, zarr.Array) else None
    return task if reader is None else DataNode(key, reader)


def _run_batch(recipe: Recipe, held: list[np.ndarray], chunks: list[Chunk], centers: np.ndarray, number: int) -> int:
    """Cut a batch of tiles, run the function on every field of view, write the result; return the batch."""
    views = recipe.cutting.cut(centers, dict(zip(chunks, held, strict=True)))
    recipe.results.write(number, np.stack([np.asarray(recipe.function(v), dtype=np.float32) for v in views], axis=1))
    return number


# --------------------------------------------------------------------------------------------------
# running them


def run_on_threads(pending: Iterator[Batch], *, bar: Any, n_workers: int | None) -> Generator[Batch]:
    """Run batches on threads, a span at a time; give those that are done and move a bar."""
    for span in _spans(pending):
        by_key = {batch.key: batch for batch in span}
        with _InTurn(by_key, bar):
            dask.threaded.get(_graph(span), list(by_key), num_workers=n_workers)
        yield from span


def run_on_cluster(client: Any, pending: Iterator[Batch], *, bar: Any) -> Generator[Batch]:
    """Run batches on a `dask.distributed` client; give each that is done and move a bar.

    Spans follow each other without a gap, and no more batches are handed over than keep all threads busy: a
    scheduler that is given a million tasks at once spends minutes and gigabytes on them before the first runs. Of those
    it has, the tasks that the first batch waits for come first, as on threads.
    """
    from distributed import as_completed

    running: Any = as_completed()
    by_key: dict[str, Batch] = {}
    spans = _spans(pending)
    span: list[Batch] | None = next(spans, None)
    n_tasks = 0
    try:
        while span is not None or by_key:
            if span is not None and len(by_key) < _BATCHES_A_THREAD * max(1, sum(client.nthreads().values())):
                by_key |= {batch.key: batch for batch in span}
                tasks = _graph(span)
                # a high-level graph has a name; a dict would get one by hashing all it holds
                graph = HighLevelGraph.from_collections("tiles", tasks)
                turn = dict(zip(tasks, count(-n_tasks, -1)))
                graph.layers["tiles"].annotations = {"priority": turn.get}
                n_tasks += len(tasks)
                running.update(client.get(graph, [batch.key for batch in span], sync=False))
                span = next(spans, None)
                continue
            future = next(running)
            future.result()
            batch = by_key.pop(future.key)
            bar.update(batch.n_tiles)
            yield batch
    finally:
        running.clear()  # gives up what is still running


def _spans(pending: Iterator[Batch]) -> Iterator[list[Batch]]:
    span: list[Batch] = []
    for batch in pending:
        span.append(batch)
        if len(span) == SPAN:
            yield span
            span = []
    if span:
        yield span


def _graph(span: list[Batch]) -> dict[Any, Any]:
    graph: dict[Any, Any] = {}
    for batch in span:
        graph.update(batch.tasks)
    return graph


class _InTurn(Callback):
    """Have batches run in the order they were made in, and move a bar whenever one is done.

    By dask's own order several rows of chunks were in memory at a time.
    """

    def __init__(self, batches: dict[str, Batch], bar: Any) -> None:
        super().__init__(start_state=self._start_state, posttask=self._posttask)
        self._batches = batches
        self._bar = bar

    def _start_state(self, graph: dict[Any, Any], state: dict[str, Any]) -> None:
        """Sort what is ready, mostly chunks that are to be read, by the first batch that waits for it."""
        turn = {key: number for number, key in enumerate(graph)}
        state["ready"].sort(key=turn.__getitem__, reverse=True)  # the last is taken first

    def _posttask(self, key: Any, *_: Any) -> None:
        if key in self._batches:
            self._bar.update(self._batches[key].n_tiles)
