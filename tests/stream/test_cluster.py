"""Steps on a `dask.distributed` cluster of processes: the same numbers, whoever dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from spatialdata import SpatialData

from stimage_sd import contract, io, models, pp
from stimage_sd._cache import cache_dir
from stimage_sd.pp._nuclear_image import read_nuclei
from stimage_sd.stream import graph
from stimage_sd.stream.cutting import cut_tile
from stimage_sd.stream.driver import TileJob, run_over_images, run_over_tiles


@pytest.fixture(scope="module")
def cluster(_session_cache: None) -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, picture: Callable) -> list[Path]:
    """Two pictures of tissue on glass, as files."""
    folder = tmp_path_factory.mktemp("slides")
    paths = []
    for seed in (0, 1):
        image = np.full((900, 1100, 3), 243, dtype=np.uint8)
        tissue = np.array([190.0, 110.0, 175.0]) + 0.25 * (picture(700, 800, seed=seed, grain=12).astype(float) - 128)
        image[100:800, 150:950] = np.clip(tissue, 0, 255)
        paths.append(folder / f"slide{seed}.png")
        assert cv2.imwrite(str(paths[-1]), image[..., ::-1])
    return paths


def cohort(files: list[Path], *, size_um: float) -> dict[str, SpatialData]:
    sections = {path.stem: io.slide(path, mpp=1.0) for path in files}
    for sdata in sections.values():
        pp.tile(sdata, size_um=size_um)
    return sections


def meeting(folder: Path, n_calls: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns only when so many calls have begun, in whatever thread or process."""

    def meet(tiles: np.ndarray) -> np.ndarray:
        descriptor, _ = __import__("tempfile").mkstemp(dir=folder)
        os.close(descriptor)
        deadline = time.monotonic() + 60
        while len(list(folder.iterdir())) < n_calls:
            if time.monotonic() > deadline:
                raise TimeoutError("the other batch never began")
            time.sleep(0.01)
        return tiles.mean(axis=(1, 2))

    return meet


def log_and_wait(log: Path, delay: float) -> Callable[[np.ndarray], np.ndarray]:
    """A function that takes a while, and says which process ran it."""

    def means(tiles: np.ndarray) -> np.ndarray:
        time.sleep(delay)
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return tiles.mean(axis=(1, 2))

    return means


def logged_rows(log: Path) -> Callable[..., np.ndarray]:
    """A function of a block that says which row of chunks it is of."""

    def block(values: np.ndarray, block_info: Any = None) -> np.ndarray:
        with log.open("a") as file:
            file.write(f"{block_info[0]['chunk-location'][1]}\n")
        return values

    return block


# --------------------------------------------------------------------------------------------------
# in turn


@pytest.mark.parametrize("where", ["threads", "cluster"])
def test_chunks_are_read_row_by_row(where: str, cluster: LocalCluster, tmp_path: Path) -> None:
    """Rows are let go before those after the next are read, so that memory does not grow with the slide's height."""
    zeros = da.zeros((3, 1280, 1280), chunks=(3, 128, 128), dtype=np.uint8)
    rows = zeros.map_blocks(logged_rows(tmp_path / "rows"), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    pyramid = [xr.DataArray(rows, dims=("c", "y", "x")), xr.DataArray(zeros[:, :128, :128], dims=("c", "y", "x"))]
    centers = (np.stack(np.divmod(np.arange(45**2), 45), axis=1) + 0.5) * 28
    job = TileJob(
        pyramid=pyramid, centers=centers, function=log_and_wait(tmp_path / "calls", 0.005), sides=[28.0], target=28,
        key=where, shape=(3,), batch_size=8,
    )  # fmt: skip
    with Client(cluster) if where == "cluster" else nullcontext() as client:
        if client is not None:  # a worker that has yet to import the package keeps its first chunk waiting
            client.run(import_module, "stimage_sd.stream.graph")
        (values,) = run_over_images([job])
    assert not values.any()
    read = np.array((tmp_path / "rows").read_text().split(), dtype=int)
    np.testing.assert_array_equal(np.unique(read), np.arange(10))
    assert read[0] <= 1
    # a row's chunks are followed by the next row's, whose tops its last tiles reach into
    assert (np.maximum.accumulate(read) - read).max() <= 2


# --------------------------------------------------------------------------------------------------
# the same numbers


def test_normalized_and_embedded_as_on_threads(files: list[Path], cluster: LocalCluster) -> None:
    def embedded() -> dict[str, np.ndarray]:
        sections = cohort(files, size_um=160.0)
        pp.stain_normalize(sections)
        pp.embed(sections, fields_of_view=(1.0, 2.0))
        return {
            f"{sample}/{key}": contract.tiles(sdata).obsm[key]
            for sample, sdata in sections.items()
            for key in ("X_efficientnet_lite0_stages", "X_efficientnet_lite0_stages_context")
        }

    on_threads = embedded()
    with Client(cluster) as client:
        on_cluster = embedded()
        loaded = client.run(lambda: "onnxruntime" in __import__("sys").modules)
    assert any(loaded.values())  # the workers ran the network
    assert on_threads.keys() == on_cluster.keys()
    for key, values in on_threads.items():
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(on_cluster[key], values, err_msg=key)


def test_results_of_unknown_shape_as_on_threads(cluster: LocalCluster, tmp_path: Path) -> None:
    """Tiles of two fields of view cross the borders of chunks; a blank tile tells the shape."""
    image = np.random.default_rng(0).integers(0, 256, (3, 600, 600), dtype=np.uint8)
    pyramid = [xr.DataArray(da.from_array(image, chunks=(3, 150, 150)), dims=("c", "y", "x"))]
    centers = np.random.default_rng(1).uniform(0, 600, (80, 2))

    def means(where: str) -> np.ndarray:
        function = log_and_wait(tmp_path / where, 0.05)
        return run_over_tiles(pyramid, centers, function, sides=[32.0, 64.0], target=32, key=where, batch_size=8)

    with Client(cluster):
        on_cluster = means("cluster")
    np.testing.assert_array_equal(on_cluster, means("threads"))
    pids = set((tmp_path / "cluster").read_text().split())
    assert len(pids - {str(os.getpid())}) == 2  # both workers worked


def test_quality_as_on_threads(files: list[Path], cluster: LocalCluster) -> None:
    def quality() -> tuple[pd.DataFrame, list[np.ndarray]]:
        sections = {path.stem: io.slide(path, mpp=1.0) for path in files}
        table = pp.slide_qc(sections)
        return table, [np.asarray(sdata.labels["quality"]) for sdata in sections.values()]

    table, labels = quality()
    with Client(cluster):
        table_too, labels_too = quality()
    pd.testing.assert_frame_equal(table_too, table, check_exact=True)
    for one, two in zip(labels, labels_too, strict=True):
        np.testing.assert_array_equal(one, two)


def test_nuclei_to_register_by_as_on_threads(files: list[Path], cluster: LocalCluster) -> None:
    sdata = io.slide(files[0], mpp=1.0)
    here = read_nuclei(sdata, contract.IMAGE, None, pixel_um=1.0, working_um=2.0)
    with Client(cluster):
        there = read_nuclei(sdata, contract.IMAGE, None, pixel_um=1.0, working_um=2.0)
    assert here.picture.contrast.std() > 0
    np.testing.assert_array_equal(here.picture.contrast, there.picture.contrast)
    np.testing.assert_array_equal(here.picture.padding, there.picture.padding)
    np.testing.assert_array_equal(here.to_full, there.to_full)


# --------------------------------------------------------------------------------------------------
# several sections at once


@pytest.mark.parametrize("where", ["threads", "cluster"])
def test_a_cohort_is_spread_by_section(files: list[Path], cluster: LocalCluster, tmp_path: Path, where: str) -> None:
    """Each section is one batch; neither is done before both have begun."""
    jobs = [
        TileJob(
            pyramid=contract.levels(io.slide(path, mpp=1.0), contract.IMAGE),
            centers=np.array([[300.0, 300.0], [500.0, 400.0]]),
            function=meeting(tmp_path, 2),
            sides=[64.0],
            target=32,
            key=f"meeting-{where}",
            shape=(3,),
        )
        for path in files
    ]
    if where == "threads":
        results = list(run_over_images(jobs, n_jobs=2))
    else:
        with Client(cluster) as client:
            client.wait_for_workers(2, timeout=60)
            results = list(run_over_images(jobs))
    for job, values in zip(jobs, results, strict=True):
        alone = run_over_tiles(
            job.pyramid, job.centers, lambda tiles: tiles.mean(axis=(1, 2)), sides=[64.0], target=32, key="alone"
        )
        np.testing.assert_array_equal(values, alone)


def test_tasks_in_flight_are_bounded(files: list[Path], cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "SPAN", 4)
    centers = np.random.default_rng(0).uniform(100, 800, (300, 2))
    pyramid = contract.levels(io.slide(files[0], mpp=1.0), contract.IMAGE)
    options = {"sides": [32.0], "target": 32, "key": "bounded", "batch_size": 2}

    def means(tiles: np.ndarray) -> np.ndarray:
        return tiles.mean(axis=(1, 2))

    most, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, len(cluster.scheduler.tasks))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with Client(cluster):
        values = run_over_tiles(pyramid, centers, means, **options)
    stop.set()
    watcher.join()
    np.testing.assert_array_equal(values, run_over_tiles(pyramid, centers, means, **options))
    # 150 batches; at most 4 of a span and 7 that were left of those before, each with its chunks and the recipe
    assert 4 <= most <= 40


def test_a_batch_keeps_one_core_busy(cluster: LocalCluster) -> None:
    """As many workers as cores are not more threads than cores: cutting and ONNX Runtime stay on theirs."""

    def seconds() -> tuple[float, float]:
        extractor = models.get_extractor("efficientnet_lite0")
        image = np.random.default_rng(0).integers(0, 256, (3, 1200, 1200), dtype=np.uint8)
        clock, processor = time.perf_counter(), time.process_time()
        for side in (224, 448, 1196):
            extractor(np.stack([cut_tile(image, top=0, left=0, side=side, target=224)] * 8))
        return time.perf_counter() - clock, time.process_time() - processor

    with Client(cluster) as client:
        client.submit(seconds, pure=False).result()
        clock, processor = client.submit(seconds, pure=False).result()
    assert processor < 1.25 * clock


# --------------------------------------------------------------------------------------------------
# death


def test_a_worker_killed_in_the_middle_of_embed_loses_nothing(
    files: list[Path], cluster: LocalCluster, tmp_path: Path
) -> None:
    def embed(name: str, delay: float) -> dict[str, np.ndarray]:
        models.register_extractor(
            name, log_and_wait(tmp_path / name, delay), input_size=32, embedding_size=3, weights_hash=name
        )
        sections = cohort(files, size_um=64.0)
        fields = {"fields_of_view": (1.0, 2.0), "wide_fields": "separate"}
        pp.embed(sections, name, **fields, context_rings=0, batch_size=8)
        return {sample: contract.tiles(sdata).obsm[f"X_{name}"] for sample, sdata in sections.items()}

    killed_after = []

    def kill(victim: int) -> None:
        """Kill a worker when some batches are in the store, and not all."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done = len(list((cache_dir() / "stream").glob("*/*.zst")))
            if done >= 4 and str(victim) in (tmp_path / "slow").read_text().split():
                os.kill(victim, signal.SIGKILL)
                killed_after.append(done)
                return
            time.sleep(0.01)

    with Client(cluster) as client:
        client.wait_for_workers(2, timeout=60)
        victim = min(client.run(os.getpid).values())
        killer = threading.Thread(target=kill, args=(victim,))
        killer.start()
        on_cluster = embed("slow", delay=0.15)
        killer.join()
    on_threads = embed("quick", delay=0.0)
    n_batches = sum(-(-len(values) // 8) for values in on_threads.values())
    assert killed_after
    assert killed_after[0] < n_batches
    for sample, values in on_threads.items():
        np.testing.assert_array_equal(on_cluster[sample], values)
    calls = (tmp_path / "slow").read_text().split()
    assert victim in set(map(int, calls))
    assert set(map(int, calls)) - {victim}
    assert os.getpid() not in set(map(int, calls))
    # a batch calls twice, once per field; what the victim had in hand is done again, and nothing that was written
    assert 2 * n_batches <= len(calls) <= 2 * n_batches + 4
    assert not list((cache_dir() / "stream").glob("*"))


def test_a_cluster_without_workers_is_an_error_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stimage_sd.stream.graph._WITHOUT_WORKERS", 0.2)
    level = xr.DataArray(da.zeros((3, 64, 64), dtype=np.uint8), dims=("c", "y", "x"))
    job = TileJob(
        pyramid=[level], centers=np.full((4, 2), 32.0), function=np.zeros_like, sides=[8.0], target=8, key="alone",
        shape=(8, 8, 3),
    )  # fmt: skip
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as nobody,
        Client(nobody),
        pytest.raises(RuntimeError, match=r"no workers for .* resumes where it stopped"),
    ):
        list(run_over_images([job]))
