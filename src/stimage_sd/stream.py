"""The one driver that runs a function over the tiles of lazy images.

Reading, cutting, embedding, predicting, segmenting and explaining are all "run `function` on batches of
tiles". A batch of tiles that lie close together is one dask task; it depends on the image chunks its
tiles touch, so a chunk is read (and stain-normalised, where the image is lazy about that) once, and is
freed when its last batch is done. The tasks run on threads, or unchanged on the active
`dask.distributed` client; those of several images run together. Each batch writes its own file, so memory
is bounded by the batches in flight and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import sys
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from stimage_sd._cache import cache_dir
from stimage_sd._tile_cutting import Cutting, cut_tile, view_of, visit_order
from stimage_sd._tile_graph import Batch, Recipe, TileFunction, batches, run_on_cluster, run_on_threads
from stimage_sd._tile_results import Results, fingerprint

__all__ = [
    "TileJob",
    "active_client",
    "cut_tile",
    "iterate_over_tiles",
    "pixel_positions",
    "run_over_images",
    "run_over_tiles",
    "visit_order",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class TileJob:
    """A function that is to run over the tiles of one image.

    Attributes
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

    Raises
    ------
    ValueError
        If there are no tiles, a centre is not finite, or a side, the target or `batch_size` is not positive.
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
            raise ValueError(f"Expected tile centres as a non-empty (n_tiles, 2) array, found shape {shape}.")
        if not np.isfinite(self.centers).all():
            raise ValueError("Expected tile centres as finite numbers of pixels, found NaN or infinity.")
        if self.batch_size < 1:
            raise ValueError(f"Expected `batch_size` of at least 1, found {self.batch_size}.")
        if self.target < 1 or not self.sides or min(self.sides) <= 0:
            raise ValueError(
                f"Expected positive tile sides and target, found sides {list(self.sides)} and target {self.target}."
            )


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
    arrays = [level.data for level in pyramid]
    view = view_of(arrays, side, target)
    _, height, width = arrays[view.level].shape
    columns, rows = view.pixels(np.asarray(center, dtype=np.float64), width=width, height=height)
    nearest = ((np.arange(target) + 0.5) * view.side / target).astype(np.int64)
    return (columns[nearest] + 0.5) * view.factor, (rows[nearest] + 0.5) * view.factor


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
    pyramid, centers, function, sides, target, key, shape, batch_size
        As in `TileJob`.
    n_workers, description, keep_store
        As in `run_over_images`.

    Returns
    -------
    ``float32 (n_tiles, n_sides, ...)``: the function's result for each tile and field of view.

    Raises
    ------
    ValueError
        If there are no tiles, a centre is not finite, a side, the target or `batch_size` is not positive, or results
        are not of the `shape` that was given.
    """
    job = TileJob(
        pyramid=pyramid, centers=centers, function=function, sides=sides, target=target, key=key, shape=shape,
        batch_size=batch_size,
    )  # fmt: skip
    (values,) = run_over_images([job], n_workers=n_workers, description=description, keep_store=keep_store)
    return values


def run_over_images(
    jobs: Sequence[TileJob], *, n_workers: int | None = None, description: str = "tiles", keep_store: bool = False
) -> Iterator[np.ndarray]:
    """Run functions over batches of tiles of several images, with no core idle between one image and the next.

    Parameters
    ----------
    jobs
        What to run; each is begun when the batches before it are on their way.
    n_workers
        Threads; all cores by default. Where a `dask.distributed` client is active, it is used instead: its workers
        must see the images and `stimage_sd._cache.cache_dir`, to which they write, under the same paths.
    description
        Label of the progress bar.
    keep_store
        Keep the results on disk after they are complete.

    Yields
    ------
    For each job in turn, as soon as it is complete, ``float32 (n_tiles, n_sides, ...)``. The results stay on disk
    until all jobs are complete, so that an interrupted cohort, run again, computes nothing twice.

    Raises
    ------
    ValueError
        If results are not of the `shape` that was given.
    """
    for job in _completed(jobs, n_workers=n_workers, description=description, keep_store=keep_store):
        yield job.results.read(job.order)


def iterate_over_tiles(
    job: TileJob, *, n_workers: int | None = None, description: str = "tiles"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run a function over tiles of a lazy image, and hand on its results one batch after the other.

    For results of which all together are too large for memory: they stay on disk, compressed, until the last one was
    handed on.

    Parameters
    ----------
    job
        What to run.
    n_workers, description
        As in `run_over_images`.

    Yields
    ------
    Row numbers of a batch's tiles, ``int64 (n,)``, and their results, ``float32 (n, n_sides, ...)``. The first comes
    when all tiles are done.

    Raises
    ------
    ValueError
        If results are not of the `shape` that was given.
    """
    for complete in _completed([job], n_workers=n_workers, description=description, keep_store=False):
        for number, start in enumerate(range(0, len(complete.order), job.batch_size)):
            yield complete.order[start : start + job.batch_size], complete.results.batch(number)


def _completed(
    jobs: Sequence[TileJob], *, n_workers: int | None, description: str, keep_store: bool
) -> Iterator[_Opened]:
    """Run jobs together; give each in turn once all its results are on disk, where they stay until the last is."""
    opened: deque[_Opened] = deque()
    complete: list[_Opened] = []

    def collected() -> Iterator[_Opened]:
        """Give the jobs that are complete, up to the first that is not."""
        while opened and done[opened[0].owner] == opened[0].n_pending:
            complete.append(opened.popleft())
            yield complete[-1]

    with tqdm(total=sum(len(job.centers) for job in jobs), desc=description) as bar:
        pending = _pending(jobs, opened, bar)
        client = active_client()
        finished = (
            run_on_threads(pending, bar=bar, n_workers=n_workers)
            if client is None
            else run_on_cluster(client, pending, bar=bar)
        )
        done: Counter[int] = Counter()
        with closing(finished):
            for batch in finished:
                done[batch.owner] += 1
                yield from collected()
        yield from collected()  # those of which nothing was left to run
    if not keep_store:
        for job in complete:
            job.results.remove()


@dataclass(frozen=True)
class _Opened:
    """A job whose store is open, and how many of its batches were not done then."""

    owner: int
    order: np.ndarray
    results: Results
    n_pending: int


def _pending(jobs: Sequence[TileJob], opened: deque[_Opened], bar: Any) -> Iterator[Batch]:
    """Open one job after the other, and give its batches that are not done."""
    names: Counter[str] = Counter()
    for owner, job in enumerate(jobs):
        arrays = [level.data.rechunk({0: -1}) for level in job.pyramid]
        order = visit_order(job.centers, arrays[0])
        name = fingerprint(job.pyramid, job.centers, job.sides, job.target, job.key, job.batch_size)
        names[name] += 1
        # the same image may be there twice
        folder = name if names[name] == 1 else f"{name}-{names[name]}"
        results = Results.open(
            cache_dir() / "stream" / folder,
            partial(_shape_of, job),
            n_tiles=len(order),
            n_views=len(job.sides),
            batch_size=job.batch_size,
        )
        numbers = results.pending()
        before = len(order) - sum(min(job.batch_size, len(order) - number * job.batch_size) for number in numbers)
        bar.initial += before
        bar.update(before)
        opened.append(_Opened(owner, order, results, len(numbers)))
        recipe = Recipe(job.function, Cutting.of(arrays, job.sides, job.target), results)
        # other runs on the same cluster may be of the same image
        yield from batches(uuid.uuid4().hex, owner, arrays, job.centers[order], numbers, recipe)


def _shape_of(job: TileJob) -> tuple[int, ...]:
    """Shape of the result for one tile, as a blank one tells where it is not known."""
    if job.shape is not None:
        return job.shape
    blank = np.full((1, job.target, job.target, 3), 255, dtype=np.uint8)
    return tuple(np.asarray(job.function(blank)).shape[1:])


def active_client() -> Any | None:
    """Return the `dask.distributed` client that is active in this process, if any."""
    if "distributed" not in sys.modules:
        return None
    try:
        return sys.modules["distributed"].default_client()
    except ValueError:
        return None
