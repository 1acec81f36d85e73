"""What a tile costs on a cluster: processor seconds, bytes read, sent, stored and files, for docs/scaling.md.

Run as ``python -m benchmarks.scaling``: a synthetic slide is embedded on a `LocalCluster` of two processes, batches of
a function that costs nothing are scheduled, and an ensemble of random weights predicts. Seconds are of the processor,
not of the clock, so that other work on the machine shows little. Writes ``benchmarks/results/scaling.json``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import machine, report


def means(tiles: np.ndarray) -> np.ndarray:
    """Cost next to nothing."""
    return tiles[:, 0, 0, :].astype(np.float32)


def used(dask_worker: Any) -> tuple[float, float]:
    """Processor seconds of a worker so far, and bytes it sent to others."""
    return time.process_time(), float(dask_worker.transfer_outgoing_bytes_total)


def embedding(slide: Path, n_tiles: int) -> dict[str, float]:
    """Embed tiles of the middle of a slide on two workers of one thread each, three fields of view."""
    from distributed import Client, LocalCluster

    import stimage_sd as sti

    sdata = sti.io.slide(slide)
    sti.pp.tile(sdata, size_um=112.0)
    tiles = sdata.tables["tiles"]
    n_all = tiles.n_obs
    sdata.tables["tiles"] = tiles[:n_tiles].copy()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        few = sdata.tables["tiles"]
        sdata.tables["tiles"] = few[:8].copy()
        sti.pp.embed(sdata, context_rings=0)  # imports, and records the network
        sdata.tables["tiles"] = few
        before, own = client.run(used), time.process_time()
        sti.pp.embed(sdata, context_rings=0, batch_size=32)
        after, driver = client.run(used), time.process_time() - own
    seconds, sent = np.sum([np.subtract(after[key], before[key]) for key in after], axis=0)
    return {
        "tiles": n_tiles,
        "worker_s_a_tile": seconds / n_tiles,
        "driver_and_scheduler_s_a_tile": driver / n_tiles,
        "bytes_between_workers_a_tile": sent / n_tiles,
        "bytes_of_file_a_tile": slide.stat().st_size / n_all,
        "bytes_of_embedding_a_tile": sdata.tables["tiles"].obsm["X_efficientnet_lite0_stages"][0].nbytes,
    }


def store(n_tiles: int = 1024) -> dict[str, float]:
    """Bytes and files on disk of results that look like embeddings."""
    from stimage_sd.stream.results import Results

    values = np.maximum(np.random.default_rng(0).normal(size=(n_tiles, 3, 1280)), 0).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        results = Results.open(Path(folder) / "store", lambda: (1280,), n_tiles=n_tiles, n_views=3, batch_size=32)
        start = time.process_time()
        for number in range(n_tiles // 32):
            results.write(number, values[number * 32 : (number + 1) * 32])
        seconds = time.process_time() - start
        files = list(Path(folder).rglob("*.zst"))
        size = sum(path.stat().st_size for path in files)
    return {
        "bytes_a_tile": size / n_tiles,
        "files_a_batch": len(files) / (n_tiles // 32),
        "write_s_a_batch": seconds / (n_tiles // 32),
    }


def scheduling(side: int) -> dict[str, float]:
    """Batches of tiles side by side, a slide of `side` tiles a side, whose function costs nothing."""
    import dask.array as da
    import xarray as xr
    from distributed import Client, LocalCluster

    from stimage_sd.stream.driver import run_over_tiles

    pixels = side * 224
    pyramid = [
        xr.DataArray(da.zeros((3, pixels >> n, pixels >> n), chunks=(3, 1024, 1024), dtype="u1"), dims=("c", "y", "x"))
        for n in range(3)
    ]
    grid = (np.arange(side) + 0.5) * 224
    centers = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        options: dict[str, Any] = {"sides": [224.0], "target": 224, "shape": (3,)}
        run_over_tiles(pyramid, centers[:64], means, key="warm", **options)
        own, clock = time.process_time(), time.perf_counter()
        run_over_tiles(pyramid, centers, means, key="scheduling", **options)
        own, clock = time.process_time() - own, time.perf_counter() - clock
    n_batches = -(-len(centers) // 32)
    return {"batches": n_batches, "driver_and_scheduler_s_a_batch": own / n_batches, "clock_s": clock}


def predicting(n_tiles: int, n_genes: int = 1000, n_members: int = 10) -> dict[str, float]:
    """Predict a section's tiles by an ensemble of random weights on 16 shared patterns."""
    from stimage_sd.models._nb import NBModel, NBSection
    from stimage_sd.models._shared_patterns import SharedPatterns
    from stimage_sd.tl._predict.predict import LAYERS, SHIFT, _blocks, _results, _shifted

    random = np.random.default_rng(0)
    parameters = {
        "weight": random.normal(0, 0.05, (n_members, 16, 2 * n_genes)).astype(np.float32),
        "bias": np.tile(np.repeat([0.5, -1.0], n_genes).astype(np.float32), (n_members, 1)),
    }
    basis = np.linalg.qr(random.normal(size=(n_members, 256, 16)))[0].astype(np.float32)
    patterns = SharedPatterns(basis, np.zeros((n_members, 256), np.float32))
    genes = tuple(map(str, range(n_genes)))
    unfitted: Any = None
    model: Any = NBModel(genes, unfitted, unfitted, "paper", parameters, np.ones((2, n_genes)), patterns=patterns)
    reduced = random.normal(size=(n_tiles, 256)).astype(np.float32)
    section: Any = NBSection(model, reduced, np.zeros(n_tiles, np.float32))
    seconds = []
    for _ in range(2):  # the first compiles
        start = time.process_time()
        layers, done = _results((n_tiles, n_genes), (*LAYERS, SHIFT), None)
        blocks = _blocks(model, section, n_tiles, done, label="random", unit="tile")
        _shifted(layers, model, blocks, np.full(n_genes, 0.5), exposure=1.0, level=0.9)
        seconds.append(time.process_time() - start)
    return {
        "tiles": n_tiles,
        "s_a_tile": seconds[-1] / n_tiles,
        "bytes_a_tile": sum(values.nbytes for values in layers.values()) / n_tiles,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192, help="side of the synthetic slide, px")
    parser.add_argument("--tiles", type=int, default=320)
    parser.add_argument("--side", type=int, default=128, help="tiles a side of the slide that is scheduled")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    options = parser.parse_args()
    from stimage_sd.datasets import synthetic_slide

    with tempfile.TemporaryDirectory() as folder:
        os.environ["STIMAGE_SD_CACHE"] = str(Path(folder) / "cache")
        synthetic_slide(Path(folder) / "slide", size=options.size)
        results = {
            "machine": machine(),
            "store": store(),
            "predicting": predicting(2048),
            "scheduling": scheduling(options.side),
            "embedding": embedding(Path(folder) / "slide" / "slide.svs", options.tiles),
        }
        report(options.out, results)


if __name__ == "__main__":
    main()
