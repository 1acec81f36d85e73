"""Make dask tasks from batches of tiles, and run a bounded number of them on threads or on a cluster."""

from __future__ import annotations

import time
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

from stimage_sd._settings import settings
from stimage_sd._zarr_chunks import ChunkReader
from stimage_sd.stream.cutting import Chunk, Cutting
from stimage_sd.stream.results import Results

TileFunction = Callable[[np.ndarray], np.ndarray]

#: Number of batches per span. The tasks of a span are made together. On threads, a chunk that two spans touch is read
#: twice: about one row of chunks in 15 on a slide of a million tiles, none on a slide of 65,000 tiles.
SPAN = 2048
#: a cluster gets the next span when it has fewer batches per thread than this
_BATCHES_A_THREAD = 4
#: time without workers after which a run fails, and interval between checks, seconds
_WITHOUT_WORKERS, _ASKED = 45.0, 1.0


@dataclass(frozen=True)
class Recipe:
    """Function, cutting plan and results folder that all batches of an image share."""

    function: TileFunction
    cutting: Cutting
    results: Results


@dataclass(frozen=True)
class Batch:
    """A batch of tiles to run.

    - `key`: name of the batch's task.
    - `tasks`: the task of the batch and the tasks of the chunks that it reads.
    - `n_tiles`: number of tiles.
    - `owner`: number of the image that the batch belongs to.
    """

    key: str
    tasks: dict[Any, Any]
    n_tiles: int
    owner: int


def batches(
    name: str, owner: int, arrays: Sequence[da.Array], centers: np.ndarray, numbers: Sequence[int], recipe: Recipe
) -> Iterator[Batch]:
    """Yield the batches of an image with their tasks.

    - `name`: a unique name of the run.
    - `owner`: number of the image.
    - `arrays`: levels of the image, lazy ``uint8 (3, y, x)``, with all channels in every chunk.
    - `centers`: ``(n_tiles, 2)`` in visit order.
    - `numbers`: numbers of the batches to run.
    - `recipe`: the recipe that the batches share.
    """
    if not len(numbers):
        return
    levels = {view.level: _LevelTasks(arrays[view.level]) for view in recipe.cutting.views}
    shared = f"recipe-{name}"
    size = recipe.results.batch_size
    for batch in numbers:
        chosen = centers[batch * size : (batch + 1) * size]
        chunks = recipe.cutting.chunks(chosen)
        tasks: dict[Any, Any] = {shared: DataNode(shared, recipe)}
        for level, row, column in chunks:
            tasks |= levels[level].of(row, column)
        held = List(*(TaskRef(levels[level].key(row, column)) for level, row, column in chunks))
        key = f"tiles-{name}-{batch}"
        tasks[key] = Task(key, _run_batch, TaskRef(shared), held, chunks, chosen, int(batch))
        yield Batch(key, tasks, len(chosen), owner)


class _LevelTasks:
    """Fused tasks that read the chunks of a level as ``(y, x, 3)``."""

    def __init__(self, array: da.Array) -> None:
        pixels = da.blockwise(_side_by_side, "yxc", array, "cyx", meta=np.empty((0, 0, 0), dtype=array.dtype))
        (fused,) = dask.optimize(pixels)
        self._name = fused.name
        self._tasks = {key: _read_quickly(key, task) for key, task in dict(fused.__dask_graph__()).items()}

    def key(self, row: int, column: int) -> tuple[str, int, int, int]:
        """Return the task name of a chunk, ``uint8 (y, x, 3)``."""
        return self._name, row, column, 0

    def of(self, row: int, column: int) -> dict[Any, Any]:
        """Return the tasks that a chunk needs."""
        tasks: dict[Any, Any] = {}
        wanted: list[Any] = [self.key(row, column)]
        while wanted:
            key = wanted.pop()
            if key not in tasks:
                tasks[key] = self._tasks[key]
                wanted += get_dependencies(self._tasks, key)
        return tasks


def _side_by_side(planes: np.ndarray) -> np.ndarray:
    """Convert a chunk from ``(3, y, x)`` to ``(y, x, 3)``, many times faster than tile by tile."""
    pixels = np.moveaxis(planes, 0, -1)
    # readers of tiled files return pixels with their colors side by side in memory
    return pixels if pixels.flags.c_contiguous else cv2.merge(tuple(planes))


def _read_quickly(key: Any, task: Any) -> Any:
    """Replace a task's zarr array by a `ChunkReader` where possible."""
    reader = ChunkReader.of(task.value) if isinstance(task, DataNode) and isinstance(task.value, zarr.Array) else None
    return task if reader is None else DataNode(key, reader)


def _run_batch(recipe: Recipe, held: list[np.ndarray], chunks: list[Chunk], centers: np.ndarray, batch: int) -> int:
    """Cut a batch of tiles, run the function, write the result, and return the batch number."""
    views = recipe.cutting.cut(centers, dict(zip(chunks, held, strict=True)))
    recipe.results.write(batch, np.stack([np.asarray(recipe.function(v), dtype=np.float32) for v in views], axis=1))
    return batch


# --------------------------------------------------------------------------------------------------
# running batches


def run_on_threads(pending: Iterator[Batch], *, bar: Any, n_jobs: int | None) -> Generator[Batch]:
    """Run batches on threads, advance the bar, and yield the batches of every completed span."""
    for span in _spans(pending):
        by_key = {batch.key: batch for batch in span}
        with _InTurn(by_key, bar):
            dask.threaded.get(_graph(span), list(by_key), num_workers=n_jobs or settings.n_jobs)
        yield from span


def run_on_cluster(client: Any, pending: Iterator[Batch], *, bar: Any) -> Generator[Batch]:
    """Run batches on a `dask.distributed` client. Yield every batch when it is done, and advance the bar.

    Spans are submitted without a gap, with just enough batches to keep all threads busy. A scheduler with a million
    tasks needs minutes and gigabytes before it runs the first. Tasks have the same order as on threads.
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
                # a dict would be named by hashing its whole content; a high-level graph has a name
                graph = HighLevelGraph.from_collections("tiles", tasks)
                turn = dict(zip(tasks, count(-n_tasks, -1)))
                graph.layers["tiles"].annotations = {"priority": turn.get}
                n_tasks += len(tasks)
                running.update(client.get(graph, [batch.key for batch in span], sync=False))
                span = next(spans, None)
                continue
            _wait(running, client)
            future = next(running)
            future.result()
            batch = by_key.pop(future.key)
            bar.update(batch.n_tiles)
            yield batch
    finally:
        running.clear()  # cancels running tasks


def _wait(running: Any, client: Any) -> None:
    """Wait until a batch is done. Raise `RuntimeError` if the cluster stays without workers."""
    with_workers = asked = time.monotonic()
    while not running.has_ready():
        time.sleep(0.01)
        now = time.monotonic()
        if now - asked < min(_ASKED, _WITHOUT_WORKERS):  # every check is a call to the scheduler
            continue
        asked = now
        if client.scheduler_info()["workers"]:
            with_workers = now
        elif now - with_workers > _WITHOUT_WORKERS:
            raise RuntimeError(
                f"The cluster has had no workers for {_WITHOUT_WORKERS:.0f} s. Start some (`client.wait_for_workers` "
                "waits for them), and run the step again. The step resumes where it stopped."
            )


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
    """Run batches in the order in which they were made, and advance a bar after every batch."""

    # dask's own order keeps several rows of chunks in memory

    def __init__(self, batches: dict[str, Batch], bar: Any) -> None:
        super().__init__(start_state=self._start_state, posttask=self._posttask)
        self._batches = batches
        self._bar = bar

    def _start_state(self, graph: dict[Any, Any], state: dict[str, Any]) -> None:
        """Sort the ready tasks, mostly chunks to read, by the first batch that waits for them."""
        turn = {key: position for position, key in enumerate(graph)}
        state["ready"].sort(key=turn.__getitem__, reverse=True)  # the last is taken first

    def _posttask(self, key: Any, *_: Any) -> None:
        if key in self._batches:
            self._bar.update(self._batches[key].n_tiles)
