"""Run a function over the tiles of lazy images.

Reading, cutting, embedding, predicting, segmenting and explaining all run a function on batches of tiles. A batch of
neighboring tiles is one dask task that depends on the image chunks of its tiles. So every chunk is read (and lazily
stain-normalized) once, and freed after its last batch. The tasks run on threads, or on the active `dask.distributed`
client. Tasks of several images run together. Every batch writes its own file. This bounds memory by the batches in
flight, and lets an interrupted run resume.
"""

from __future__ import annotations

import sys
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from stimage_sd._cache import cache_dir
from stimage_sd._files import discard, release, remove_abandoned
from stimage_sd._progress import tqdm
from stimage_sd._settings import logger
from stimage_sd.stream.cutting import Cutting, view_of, visit_order
from stimage_sd.stream.graph import Batch, Recipe, TileFunction, batches, run_on_cluster, run_on_threads
from stimage_sd.stream.results import Results, fingerprint, folder_of_run

#: number of jobs with locked folders; every lock is an open file, and a process may open about 1,000 files
_MOST_LOCKS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class TileJob:
    """A function to run over the tiles of one image.

    - `pyramid`: levels of the image, finest first, each ``uint8 (3, y, x)`` and dask-backed.
    - `centers`: ``(n_tiles, 2)`` float, x and y of the tile centers, px of the finest level.
    - `function`: ``uint8 (batch, target, target, 3)`` to an array whose first axis is the batch. The result for a tile
      must not depend on the rest of the batch. On a cluster the function must be picklable.
    - `sides`: sides of the fields of view around a center, px of the finest level.
    - `target`: side to which every field of view is resampled, px.
    - `key`: identifier of the function, such as an extractor's name and the hash of its weights. A resumed run is
      recognized by this key.
    - `shape`: shape of the result for one tile. If `None`, the function is tried on a blank tile.
    - `batch_size`: tiles per batch, the unit of work and of resumption.
    """

    pyramid: Sequence[xr.DataArray]
    centers: np.ndarray
    function: TileFunction
    sides: Sequence[float]
    target: int
    key: str
    shape: tuple[int, ...] | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "centers", np.asarray(self.centers, dtype=np.float64))
        shape = self.centers.shape
        if len(shape) != 2 or shape[1] != 2 or shape[0] == 0:
            raise ValueError(f"Expected tile centers as a non-empty (n_tiles, 2) array, found shape {shape}.")
        if not np.isfinite(self.centers).all():
            raise ValueError("Expected tile centers as finite numbers of pixels, found NaN or infinity.")
        if self.batch_size < 1:
            raise ValueError(f"Expected `batch_size` of at least 1, found {self.batch_size}.")
        if self.target < 1 or not self.sides or min(self.sides) <= 0:
            raise ValueError(
                f"Expected positive tile sides and target, found sides {list(self.sides)} and target {self.target}."
            )


def pixel_positions(
    pyramid: Sequence[xr.DataArray], center: np.ndarray, *, side: float, target: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the image positions of the pixels of a field of view, as `run_over_tiles` cuts it.

    - `pyramid`: levels of the image, finest first.
    - `center`: x and y of the tile's center, px of the finest level.
    - `side`: side of the field of view, px of the finest level.
    - `target`: side to which the field of view is resampled, px.
    - returns: x of the columns and y of the rows, each ``float64 (target,)``, px of the finest level. A position is the
      center of the nearest pixel of the level. Positions beyond the image border are mirrored, as the pixels are.
    """
    view = view_of(pyramid, side, target)
    _, height, width = pyramid[view.level].shape
    columns, rows = view.pixels(np.asarray(center, dtype=np.float64), width=width, height=height)
    nearest = ((np.arange(target) + 0.5) * view.side / target).astype(np.int64)
    left, top = view.start
    return left + (columns[nearest] + 0.5) * view.factor, top + (rows[nearest] + 0.5) * view.factor


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
    n_jobs: int | None = None,
    description: str = "tiles",
    keep_store: bool = False,
) -> np.ndarray:
    """Run a function over batches of square tiles of a lazy image.

    - `pyramid`, `centers`, `function`, `sides`, `target`, `key`, `shape`, `batch_size`: as in `TileJob`.
    - `n_jobs`, `description`, `keep_store`: as in `run_over_images`.
    - returns: ``float32 (n_tiles, n_sides, ...)``: the function's result per tile and field of view.
    """
    job = TileJob(
        pyramid=pyramid, centers=centers, function=function, sides=sides, target=target, key=key, shape=shape,
        batch_size=batch_size,
    )  # fmt: skip
    (values,) = run_over_images([job], n_jobs=n_jobs, description=description, keep_store=keep_store)
    return values


def run_over_images(
    jobs: Sequence[TileJob], *, n_jobs: int | None = None, description: str = "tiles", keep_store: bool = False
) -> Iterator[np.ndarray]:
    """Run functions over batches of tiles of several images, without idle cores between images.

    - `jobs`: the jobs to run. A job is opened once the batches of the jobs before it are submitted.
    - `n_jobs`: number of threads. All cores by default. An active `dask.distributed` client is used instead of threads.
      Its workers must see the images and `stimage_sd._cache.cache_dir`, where they write, under the same paths.
    - `description`: label of the progress bar.
    - `keep_store`: keep the results on disk after all jobs are complete.
    - yields: ``float32 (n_tiles, n_sides, ...)`` per job, in order, as soon as the job is complete. The results stay on
      disk until all jobs are complete, so an interrupted cohort that is run again computes nothing twice.
    """
    for job in _completed(jobs, n_jobs=n_jobs, description=description, keep_store=keep_store):
        yield job.results.read(job.order)


def iterate_over_tiles(
    job: TileJob, *, n_jobs: int | None = None, description: str = "tiles"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run a function over the tiles of a lazy image, and yield the results batch by batch.

    Use this for results that are too large for memory. They stay on disk, compressed, until the last batch is yielded.

    - `job`: the job to run.
    - `n_jobs`, `description`: as in `run_over_images`.
    - yields: row numbers of a batch's tiles, ``int64 (n,)``, and their results, ``float32 (n, n_sides, ...)``. The
      first batch is yielded when all tiles are done.
    """
    for complete in _completed([job], n_jobs=n_jobs, description=description, keep_store=False):
        for batch, start in enumerate(range(0, len(complete.order), job.batch_size)):
            yield complete.order[start : start + job.batch_size], complete.results.batch(batch)


def _completed(jobs: Sequence[TileJob], *, n_jobs: int | None, description: str, keep_store: bool) -> Iterator[_Opened]:
    """Run jobs together, and yield them in order once their results are on disk."""
    opened: deque[_Opened] = deque()
    complete: list[_Opened] = []

    def collected() -> Iterator[_Opened]:
        """Yield the complete jobs, up to the first incomplete job."""
        while opened and done[opened[0].owner] == opened[0].n_pending:
            complete.append(opened.popleft())
            try:
                yield complete[-1]
            finally:
                release(complete[-1].lock)

    n_tiles = sum(len(job.centers) for job in jobs)
    logger.info("%s: %d tiles of %d images.", description, n_tiles, len(jobs))
    remove_abandoned(cache_dir() / "stream")
    with ExitStack() as held, tqdm(total=n_tiles, desc=description) as bar:
        held.callback(_let_go, opened)  # after an error, jobs are incomplete
        pending = _pending(jobs, opened, bar)
        client = active_client()
        finished = (
            run_on_threads(pending, bar=bar, n_jobs=n_jobs)
            if client is None
            else run_on_cluster(client, pending, bar=bar)
        )
        done: Counter[int] = Counter()
        with closing(finished):
            for batch in finished:
                done[batch.owner] += 1
                yield from collected()
        yield from collected()  # jobs that had no pending batches
    if not keep_store:
        for job in complete:
            job.results.remove()


@dataclass(frozen=True)
class _Opened:
    """A job with an open results folder, and the number of batches that were pending when it was opened."""

    owner: int
    order: np.ndarray
    results: Results
    lock: int | None
    n_pending: int


def _let_go(jobs: deque[_Opened]) -> None:
    """Release the locks of jobs."""
    for job in jobs:
        release(job.lock)


def _pending(jobs: Sequence[TileJob], opened: deque[_Opened], bar: Any) -> Iterator[Batch]:
    """Open the jobs one by one, and yield their pending batches."""
    for owner, job in enumerate(jobs):
        arrays = [level.data.rechunk({0: -1}) for level in job.pyramid]
        order = visit_order(job.centers, arrays[0])
        name = fingerprint(job.pyramid, job.centers, job.sides, job.target, job.key, job.batch_size)
        used = {one.results.path for one in opened}
        folder, lock = folder_of_run(cache_dir() / "stream", name, used=used, hold=len(opened) < _MOST_LOCKS)
        try:
            results = Results.open(
                folder,
                partial(_shape_of, job),
                n_tiles=len(order),
                n_views=len(job.sides),
                batch_size=job.batch_size,
            )
        except Exception:
            discard(folder, lock)
            raise
        numbers = results.pending()
        before = len(order) - sum(min(job.batch_size, len(order) - batch * job.batch_size) for batch in numbers)
        if not bar.disable:
            bar.initial += before
        bar.update(before)
        if before:
            logger.info("%d of %d tiles are in the cache.", before, len(order))
        opened.append(_Opened(owner, order, results, lock, len(numbers)))
        recipe = Recipe(job.function, Cutting.of(job.pyramid, job.sides, job.target), results)
        # a unique name, because other runs on the cluster may use the same image
        yield from batches(uuid.uuid4().hex, owner, arrays, job.centers[order], numbers, recipe)


def _shape_of(job: TileJob) -> tuple[int, ...]:
    """Return the shape of the result for one tile, if necessary from a blank tile."""
    if job.shape is not None:
        return job.shape
    blank = np.full((1, job.target, job.target, 3), 255, dtype=np.uint8)
    return tuple(np.asarray(job.function(blank)).shape[1:])


def active_client() -> Any | None:
    """Return the active `dask.distributed` client of this process, or `None`."""
    if "distributed" not in sys.modules:
        return None
    try:
        return sys.modules["distributed"].default_client()
    except ValueError:
        return None
