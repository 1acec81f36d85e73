"""The tile stream: right pixels, each chunk once, resumed where it stopped, the same whoever runs it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm.auto import tqdm

from stimage_sd._cache import cache_dir
from stimage_sd.stream.cutting import cut_tile, view_of, visit_order
from stimage_sd.stream.driver import TileJob, iterate_over_tiles, run_over_images, run_over_tiles


def flat(tiles: np.ndarray) -> np.ndarray:
    """A function whose result is the tile itself: any wrong pixel shows."""
    return tiles.reshape(len(tiles), -1).astype(np.float32)


def channel_means(tiles: np.ndarray) -> np.ndarray:
    return tiles.mean(axis=(1, 2))


def reference_tile(image: np.ndarray, center: np.ndarray, side: float, factor: float, target: int) -> np.ndarray:
    """A tile the plain way: pad the whole level by mirroring, slice, resample."""
    length = max(1, round(side / factor))
    left, top = (int(np.floor(value / factor - length / 2 + 0.5)) for value in center)
    height, width = image.shape[:2]
    before = (max(0, -top), max(0, -left))
    after = (max(0, top + length - height), max(0, left + length - width))
    padded = np.pad(image, [(before[0], after[0]), (before[1], after[1]), (0, 0)], mode="reflect")
    tile = padded[top + before[0] : top + before[0] + length, left + before[1] : left + before[1] + length]
    if length == target:
        return tile
    how = cv2.INTER_AREA if length > target else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(tile), (target, target), interpolation=how)


def random_centers(n_tiles: int, height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (n_tiles, 2)) * [width, height]


@pytest.fixture(autouse=True)
def _clean_streams() -> Iterator[None]:
    yield
    left = list((cache_dir() / "stream").glob("*"))
    for path in left:
        subprocess.run(["rm", "-rf", str(path)], check=True)


# --------------------------------------------------------------------------------------------------
# pixels


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    left=st.integers(-120, 120),
    top=st.integers(-120, 120),
    side=st.integers(1, 60),
    target=st.integers(1, 20),
)
def test_cut_tile_is_numpys_reflection(height: int, width: int, left: int, top: int, side: int, target: int) -> None:
    image = np.random.default_rng(height * 41 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tile = cut_tile(np.moveaxis(image, -1, 0), top=top, left=left, side=side, target=target)
    center = np.array([left + side / 2, top + side / 2])
    np.testing.assert_array_equal(tile, reference_tile(image, center, side, 1.0, target))


@settings(max_examples=25)
@given(
    height=st.integers(2, 90),
    width=st.integers(2, 90),
    chunk=st.integers(7, 50),
    sides=st.lists(st.floats(0.6, 120), min_size=1, max_size=3),
    target=st.integers(1, 24),
    seed=st.integers(0, 1000),
)
def test_tiles_are_put_together_from_chunks(
    height: int, width: int, chunk: int, sides: list[float], target: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    lazy = da.from_array(np.moveaxis(image, -1, 0), chunks=(3, chunk, chunk))
    # centers on the image and far beyond its borders
    centers = random.uniform(-1.5, 2.5, (7, 2)) * [width, height]
    values = run_over_tiles(
        [xr.DataArray(lazy, dims=("c", "y", "x"))],
        centers,
        flat,
        sides=sides,
        target=target,
        key="geometry",
        batch_size=3,
        n_jobs=1,
    )
    assert values.shape == (7, len(sides), target * target * 3)
    assert values.dtype == np.float32
    for number, center in enumerate(centers):
        for view, side in enumerate(sides):
            expected = reference_tile(image, center, side, 1.0, target)
            np.testing.assert_array_equal(values[number, view], expected.ravel(), err_msg=f"tile {number}, {view}")


@given(
    side=st.floats(1, 2000),
    target=st.integers(1, 400),
    n_levels=st.integers(1, 6),
)
def test_the_level_that_is_read_has_pixels_enough(side: float, target: int, n_levels: int) -> None:
    arrays = [da.zeros((3, 4096 >> level, 4096 >> level), dtype="u1") for level in range(n_levels)]
    view = view_of([xr.DataArray(array, dims=("c", "y", "x")) for array in arrays], side, target)
    level, factor = view.level, view.factor
    assert factor == 2**level
    if level:
        assert side / factor >= 0.999 * target
    if level + 1 < n_levels and side >= target:
        assert side / (2 * factor) < target  # a coarser one would have had to be blown up


def test_fields_of_view_come_from_their_levels(counted_image: Callable) -> None:
    image = counted_image(600, 900, chunk=128, n_levels=3)
    centers = random_centers(40, 600, 900)
    sides, target = [64.0, 128.0, 301.0], 64
    values = run_over_tiles(image.pyramid, centers, flat, sides=sides, target=target, key="views", batch_size=16)
    for view, (side, level) in enumerate(zip(sides, (0, 1, 2), strict=True)):
        pixels = np.moveaxis(image.arrays[level], 0, -1)
        for number, center in enumerate(centers):
            expected = reference_tile(pixels, center, side, 2.0**level, target)
            np.testing.assert_array_equal(values[number, view], expected.ravel())


def test_levels_of_odd_size(counted_image: Callable) -> None:
    image = counted_image(513, 777, chunk=100, n_levels=3)
    centers = random_centers(20, 513, 777, seed=3)
    values = run_over_tiles(image.pyramid, centers, flat, sides=[210.0], target=50, key="odd", batch_size=6)
    level = np.moveaxis(image.arrays[2], 0, -1)
    for number, center in enumerate(centers):
        expected = reference_tile(level, center, 210.0, 777 / 194, 50)
        np.testing.assert_array_equal(values[number, 0], expected.ravel())


def test_results_of_any_shape_keep_it(counted_image: Callable) -> None:
    image = counted_image(200, 200)
    centers = random_centers(5, 200, 200)
    one = run_over_tiles(image.pyramid, centers, lambda t: t[:, 0, 0, 0], sides=[8.0], target=8, key="scalar")
    assert one.shape == (5, 1)
    whole = run_over_tiles(image.pyramid, centers, lambda t: t / 2, sides=[8.0, 9.0], target=8, key="map")
    assert whole.shape == (5, 2, 8, 8, 3)


def test_a_known_shape_spares_the_blank_tile(counted_image: Callable) -> None:
    image = counted_image(60, 60, chunk=20)
    centers = random_centers(5, 60, 60)
    counting = Interrupted()
    options = {"sides": [8.0], "target": 8, "batch_size": 2}
    values = run_over_tiles(image.pyramid, centers, counting, shape=(3,), key="known", **options)
    assert counting.tiles == 5
    np.testing.assert_array_equal(values, run_over_tiles(image.pyramid, centers, channel_means, key="tried", **options))


@pytest.mark.parametrize(("n_given", "batch_size"), [(1, 2), (3, 2)])
def test_more_or_fewer_results_than_tiles_are_refused(counted_image: Callable, n_given: int, batch_size: int) -> None:
    image = counted_image(60, 60, chunk=20)

    def given(tiles: np.ndarray) -> np.ndarray:
        return np.zeros((n_given, 3), np.float32)

    options = {"sides": [8.0], "target": 8, "shape": (3,), "key": "many", "batch_size": batch_size}
    with pytest.raises(ValueError, match=f"each of the {batch_size} tiles of a batch, found {n_given}"):
        run_over_tiles(image.pyramid, random_centers(4, 60, 60), given, **options)


@pytest.mark.parametrize("shape", [(4,), (3, 1)])
def test_a_wrong_shape_is_refused(counted_image: Callable, shape: tuple[int, ...]) -> None:
    image = counted_image(60, 60, chunk=20)
    with pytest.raises(ValueError, match=r"as `shape` says, found \(3,\)"):
        run_over_tiles(
            image.pyramid, random_centers(5, 60, 60), channel_means, sides=[8.0], target=8, key="wrong", shape=shape
        )


# --------------------------------------------------------------------------------------------------
# each chunk once


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_each_chunk_is_computed_once(counted_image: Callable, n_jobs: int) -> None:
    image = counted_image(1000, 1200, chunk=200, n_levels=3)
    centers = random_centers(150, 1000, 1200)
    run_over_tiles(
        image.pyramid,
        centers,
        channel_means,
        sides=[60.0, 130.0, 260.0],
        target=60,
        key="once",
        batch_size=8,
        n_jobs=n_jobs,
    )
    fine = {key: times for key, times in image.reads.items() if key[0] < 2}
    assert len(fine) >= 30 + 9
    assert set(fine.values()) == {1}
    # the coarsest level stands for the image in the key that a run is resumed by: one more read
    assert max(image.reads.values()) <= 2


def test_chunks_that_no_tile_touches_are_not_computed(counted_image: Callable) -> None:
    image = counted_image(1000, 1000, chunk=100, n_levels=3)
    centers = np.array([[150.0, 150.0], [250.0, 150.0]])
    run_over_tiles(image.pyramid, centers, channel_means, sides=[80.0], target=80, key="few")
    assert {key for key in image.reads if key[0] == 0} == {(0, 1, 1), (0, 1, 2)}


def test_order_of_visit_keeps_neighbors_together() -> None:
    random = np.random.default_rng(0)
    array = da.zeros((3, 5000, 7000), chunks=(3, 1000, 1000), dtype="u1")
    centers = random.uniform(0, 1, (2000, 2)) * [7000, 5000]
    order = visit_order(centers, array)
    assert sorted(order) == list(range(2000))
    chunks = [tuple(row) for row in (centers[order] // 1000).astype(int).tolist()]
    changes = sum(one != two for one, two in itertools.pairwise(chunks))
    assert changes == len(set(chunks)) - 1  # a chunk is entered once and left once
    steps = [np.abs(np.subtract(one, two)).sum() for one, two in itertools.pairwise(chunks)]
    assert max(steps) == 1  # always to the chunk next door, the next row begins where the last ended


def test_order_takes_centers_beyond_the_image() -> None:
    array = da.zeros((3, 100, 100), chunks=(3, 50, 50), dtype="u1")
    centers = np.array([[-500.0, -500.0], [900.0, 900.0], [100.0, 100.0], [0.0, 0.0]])
    assert sorted(visit_order(centers, array)) == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------------
# interruption


class Interrupted:
    """Computes channel means; raises in the middle; knows how many tiles it saw."""

    def __init__(self, *, after: int | None = None) -> None:
        self.after = after
        self.tiles = 0
        self.lock = threading.Lock()

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        with self.lock:
            if self.after is not None and self.tiles >= self.after:
                raise RuntimeError("the power went out")
            self.tiles += len(tiles)
        return channel_means(tiles)


def test_an_interrupted_run_goes_on_where_it_stopped(counted_image: Callable) -> None:
    image = counted_image(700, 700, chunk=100)
    centers = random_centers(100, 700, 700)
    options = {"sides": [40.0], "target": 40, "key": "resume", "batch_size": 10, "n_jobs": 1}
    whole = run_over_tiles(image.pyramid, centers, channel_means, **{**options, "key": "uninterrupted"})

    first = Interrupted(after=41)  # a blank tile is tried first, then four batches
    with pytest.raises(RuntimeError, match="the power went out"):
        run_over_tiles(image.pyramid, centers, first, **options)
    assert first.tiles == 41
    second = Interrupted()
    resumed = run_over_tiles(image.pyramid, centers, second, **options)
    assert second.tiles == 60
    np.testing.assert_array_equal(resumed, whole)
    # complete, so nothing is left behind, and the next run is a new one
    assert not list((cache_dir() / "stream").glob("*"))


@pytest.mark.parametrize(
    "change",
    [
        {"key": "other"},
        {"batch_size": 11},
        {"target": 41},
        {"sides": [41.0]},
        {"centers": 1},
        {"image": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_run_does_not_take_up_a_broken_one(counted_image: Callable, change: dict) -> None:
    image = counted_image(300, 300, chunk=100)
    centers = random_centers(30, 300, 300)
    options = {"sides": [40.0], "target": 40, "key": "one", "batch_size": 10, "n_jobs": 1}
    with pytest.raises(RuntimeError, match="power"):
        run_over_tiles(image.pyramid, centers, Interrupted(after=11), **options)
    if "centers" in change:
        centers = random_centers(30, 300, 300, seed=1)
    elif "image" in change:
        image = counted_image(300, 300, chunk=100, seed=1)
    else:
        options.update(change)
    again = Interrupted()
    values = run_over_tiles(image.pyramid, centers, again, **options)
    assert again.tiles == 31
    reference = run_over_tiles(image.pyramid, centers, channel_means, **{**options, "key": "fresh"})
    np.testing.assert_array_equal(values, reference)


@pytest.mark.parametrize("what", ["shape.json", "0.zst"])
@pytest.mark.parametrize("damage", ["empty", "cut", "changed"])
def test_damaged_results_are_said_and_computed_again(counted_image: Callable, what: str, damage: str) -> None:
    image, centers = counted_image(300, 300, chunk=100), random_centers(30, 300, 300)
    options = {"sides": [40.0], "target": 40, "key": "damage", "batch_size": 10, "n_jobs": 1}
    with pytest.raises(RuntimeError, match="power"):
        run_over_tiles(image.pyramid, centers, Interrupted(after=21), **options)
    (file,) = (cache_dir() / "stream").glob(f"*/{what}")
    whole = bytearray(file.read_bytes())
    changed = whole.copy()
    changed[len(whole) // 2] ^= 1
    file.write_bytes({"empty": b"", "cut": whole[:-4], "changed": changed}[damage])
    again = Interrupted()
    with pytest.warns(UserWarning, match="damaged"):
        values = run_over_tiles(image.pyramid, centers, again, **options)
    # a blank tile tells the shape; two batches were done
    assert again.tiles == (31 if what == "shape.json" else 20)
    np.testing.assert_array_equal(values, run_over_tiles(image.pyramid, centers, channel_means, **options))


def test_results_that_are_gone_are_an_error(counted_image: Callable) -> None:
    image, centers = counted_image(200, 200, chunk=100), random_centers(20, 200, 200)

    def purging(tiles: np.ndarray) -> np.ndarray:
        for file in (cache_dir() / "stream").glob("*/0.zst"):
            file.unlink()
        return channel_means(tiles)

    with pytest.raises(OSError, match=r"batch 0 are missing.*STIMAGE_SD_CACHE"):
        run_over_tiles(image.pyramid, centers, purging, sides=[20.0], target=20, key="gone", batch_size=6, n_jobs=1)


def test_two_runs_of_the_same_tiles_do_not_meet(counted_image: Callable) -> None:
    """Whoever finishes first takes nothing from the other; the same between processes, whose locks are the system's."""
    image, centers = counted_image(300, 300, chunk=100), random_centers(30, 300, 300)
    options = {"sides": [40.0], "target": 40, "key": "twice", "shape": (3,), "batch_size": 10, "n_jobs": 1}
    first_is_done, found = threading.Event(), []

    def slow(tiles: np.ndarray) -> np.ndarray:
        assert first_is_done.wait(60)
        return channel_means(tiles)

    thread = threading.Thread(target=lambda: found.append(run_over_tiles(image.pyramid, centers, slow, **options)))
    thread.start()
    while not list((cache_dir() / "stream").glob("*/shape.json")):
        assert thread.is_alive()
    first = run_over_tiles(image.pyramid, centers, channel_means, **options)
    first_is_done.set()
    thread.join()
    np.testing.assert_array_equal(found[0], first)
    assert not list((cache_dir() / "stream").glob("*"))


def test_a_run_with_its_bar_switched_off_goes_on_where_it_stopped(
    counted_image: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stimage_sd.stream.driver.tqdm", partial(tqdm, disable=True))  # as TQDM_DISABLE=1 does
    image, centers = counted_image(300, 300, chunk=100), random_centers(30, 300, 300)
    options = {"sides": [40.0], "target": 40, "key": "silent", "batch_size": 10, "n_jobs": 1}
    with pytest.raises(RuntimeError, match="power"):
        run_over_tiles(image.pyramid, centers, Interrupted(after=11), **options)
    values = run_over_tiles(image.pyramid, centers, Interrupted(), **options)
    np.testing.assert_array_equal(values, run_over_tiles(image.pyramid, centers, channel_means, **options))


def test_a_complete_store_is_kept_when_asked_and_not_computed_again(counted_image: Callable) -> None:
    image = counted_image(200, 200, chunk=100)
    centers = random_centers(20, 200, 200)
    options = {"sides": [20.0], "target": 20, "key": "kept", "batch_size": 6, "keep_store": True}
    first = run_over_tiles(image.pyramid, centers, channel_means, **options)
    (store,) = (cache_dir() / "stream").glob("*")
    assert sorted(path.name for path in store.iterdir()) == [".lock", "0.zst", "1.zst", "2.zst", "3.zst", "shape.json"]
    silent = Interrupted(after=0)
    np.testing.assert_array_equal(run_over_tiles(image.pyramid, centers, silent, **options), first)
    assert silent.tiles == 0


def test_an_interrupted_cohort_goes_on_in_the_section_where_it_stopped(counted_image: Callable) -> None:
    """Three sections of ten batches each, two of them the same picture."""
    images = [counted_image(300, 300, chunk=100, seed=seed) for seed in (0, 1, 0)]
    centers = [random_centers(50, 300, 300, seed=seed) for seed in (0, 1, 0)]

    def jobs(function: Callable) -> list[TileJob]:
        return [
            TileJob(
                pyramid=image.pyramid, centers=each, function=function, sides=[40.0], target=40, key="cohort",
                batch_size=5, shape=(3,),
            )
            for image, each in zip(images, centers, strict=True)
        ]  # fmt: skip

    first = Interrupted(after=85)
    with pytest.raises(RuntimeError, match="the power went out"):
        list(run_over_images(jobs(first), n_jobs=1))
    second = Interrupted()
    results = list(run_over_images(jobs(second), n_jobs=1))
    assert (first.tiles, second.tiles) == (85, 65)
    for image, each, values in zip(images, centers, results, strict=True):
        alone = run_over_tiles(image.pyramid, each, channel_means, sides=[40.0], target=40, key="alone")
        np.testing.assert_array_equal(values, alone)
    assert not list((cache_dir() / "stream").glob("*"))


def test_a_complete_section_stays_on_disk_until_its_cohort_is_complete(counted_image: Callable) -> None:
    images = [counted_image(200, 200, seed=seed) for seed in (0, 1)]
    counting = Interrupted()
    jobs = [
        TileJob(
            pyramid=image.pyramid, centers=random_centers(6, 200, 200), function=counting, sides=[20.0], target=20,
            key="half", shape=(3,),
        )
        for image in images
    ]  # fmt: skip
    running = run_over_images(jobs, n_jobs=1)
    first = next(running)
    running.close()
    np.testing.assert_array_equal(next(iter(run_over_images(jobs, n_jobs=1))), first)
    assert counting.tiles == 12


# --------------------------------------------------------------------------------------------------
# whoever runs it


def test_threads_agree_bit_for_bit(counted_image: Callable) -> None:
    image = counted_image(600, 600, chunk=100, n_levels=2)
    centers = random_centers(120, 600, 600)
    results = [
        run_over_tiles(
            image.pyramid,
            centers,
            flat,
            sides=[30.0, 90.0],
            target=30,
            key=f"threads-{n_jobs}",
            batch_size=7,
            n_jobs=n_jobs,
        )
        for n_jobs in (1, 2, 4)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_batch_size_does_not_show(counted_image: Callable) -> None:
    image = counted_image(300, 300, chunk=100)
    centers = random_centers(31, 300, 300)
    results = [
        run_over_tiles(image.pyramid, centers, flat, sides=[30.0], target=30, key="size", batch_size=size)
        for size in (1, 8, 31, 500)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


MEMORY = """
    import resource
    import dask.array as da, numpy as np, xarray as xr
    from stimage_sd.stream.driver import run_over_tiles

    def noise(block_info=None):
        (_, top), (_, bottom) = (0, 0), (0, 0)
        shape = block_info[None]["chunk-shape"]
        return np.random.default_rng(block_info[None]["chunk-location"]).integers(0, 256, shape, dtype=np.uint8)

    def lazy(side, chunk=1024):
        edges = tuple(min(chunk, side - start) for start in range(0, side, chunk))
        return xr.DataArray(da.map_blocks(noise, chunks=((3,), edges, edges), dtype=np.uint8,
                            meta=np.empty((0, 0, 0), np.uint8)), dims=("c", "y", "x"))

    def means(tiles):
        return tiles.mean(axis=(1, 2))

    side, n_side = {side}, {n_side}
    pyramid = [lazy(side), lazy(side // 16)]
    run_over_tiles(pyramid[1:], np.full((1, 2), 100.0), means, sides=[224.0], target=224, key="warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grid = (np.arange(n_side) + 0.5) * side / n_side
    centers = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    values = run_over_tiles(pyramid, centers, means, sides=[224.0], target=224, key="memory", n_jobs=2)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(len(values), (after - before) / 1024)
"""


def peak_memory(folder: Path, *, side: int, n_side: int) -> tuple[int, float]:
    """Tiles, and MB above what the process had before the run."""
    script = folder / "memory.py"
    script.write_text(textwrap.dedent(MEMORY).format(side=side, n_side=n_side))
    environment = {**os.environ, "STIMAGE_SD_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    tiles, megabytes = done.stdout.split()
    return int(tiles), float(megabytes)


@pytest.mark.slow
def test_memory_is_bounded_by_batches_in_flight(tmp_path: Path) -> None:
    """The finest level has 1.2 GB; a row of its chunks 63 MB."""
    tiles, some = peak_memory(tmp_path, side=20_000, n_side=22)
    more_tiles, more = peak_memory(tmp_path, side=20_000, n_side=44)
    assert (tiles, more_tiles) == (484, 1936)
    assert some < 350
    assert more < 350
    assert more < some + 100


# --------------------------------------------------------------------------------------------------
# refusals


def test_bad_input_is_refused(counted_image: Callable) -> None:
    pyramid = counted_image(50, 50).pyramid
    options = {"target": 10, "key": "bad"}
    with pytest.raises(ValueError, match=r"non-empty \(n_tiles, 2\) array, found shape \(0, 2\)"):
        run_over_tiles(pyramid, np.zeros((0, 2)), channel_means, sides=[10.0], **options)
    with pytest.raises(ValueError, match=r"found shape \(4,\)"):
        run_over_tiles(pyramid, np.zeros(4), channel_means, sides=[10.0], **options)
    with pytest.raises(ValueError, match="finite numbers of pixels, found NaN or infinity"):
        run_over_tiles(pyramid, np.array([[np.nan, 1.0]]), channel_means, sides=[10.0], **options)
    for sides, target in (([], 10), ([0.0], 10), ([-3.0, 4.0], 10), ([10.0], 0)):
        with pytest.raises(ValueError, match="positive tile sides and target"):
            run_over_tiles(pyramid, np.ones((1, 2)), channel_means, sides=sides, target=target, key="bad")
    with pytest.raises(ValueError, match="`batch_size` of at least 1, found 0"):
        run_over_tiles(pyramid, np.ones((1, 2)), channel_means, sides=[10.0], batch_size=0, **options)
    assert not list((cache_dir() / "stream").glob("*"))


# --------------------------------------------------------------------------------------------------
# batch by batch


def test_batches_are_the_whole_one_after_the_other(counted_image: Callable[..., object]) -> None:
    image = counted_image(300, 400, chunk=64)
    centers = random_centers(23, 300, 400)
    options = {"sides": [40.0, 60.0], "target": 20, "key": "batches", "batch_size": 5}
    whole = run_over_tiles(image.pyramid, centers, channel_means, **options)
    job = TileJob(pyramid=image.pyramid, centers=centers, function=channel_means, shape=(3,), **options)
    seen = []
    for rows, values in iterate_over_tiles(job, n_jobs=1):
        np.testing.assert_array_equal(values, whole[rows])
        assert values.dtype == np.float32
        seen.append(rows)
    assert [len(rows) for rows in seen] == [5, 5, 5, 5, 3]
    assert sorted(np.concatenate(seen).tolist()) == list(range(23))
    assert not list((cache_dir() / "stream").glob("*"))


def test_batches_that_nobody_asked_for_are_not_lost(counted_image: Callable[..., object]) -> None:
    """Who stops in the middle finds all results done when they begin again."""
    image = counted_image(200, 200, chunk=64)
    centers = random_centers(9, 200, 200)
    calls = []

    def counting(tiles: np.ndarray) -> np.ndarray:
        calls.append(len(tiles))
        return channel_means(tiles)

    options = {"sides": [30.0], "target": 10, "key": "left", "shape": (3,), "batch_size": 4}
    job = TileJob(pyramid=image.pyramid, centers=centers, function=counting, **options)
    first = next(iterate_over_tiles(job))
    assert sum(calls) == 9
    again = list(iterate_over_tiles(job))
    assert sum(calls) == 9
    np.testing.assert_array_equal(again[0][1], first[1])
