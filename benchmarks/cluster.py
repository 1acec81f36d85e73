"""A cohort of 60 small slides on a cluster of two processes, one of which is killed: the numbers of the run on threads.

Tiles are embedded, nuclei segmented and embedded, once on threads and once on a `LocalCluster`. In both embeddings, a
worker is killed (SIGKILL) when a third of the batches are on disk. Every value has to equal that of the run on threads,
bit for bit. Each run has an empty cache.

Run as ``python -m benchmarks.cluster``. Writes ``benchmarks/results/cluster.json``, and ends with an error where a
number differs or no worker was killed in the middle.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from benchmarks.measure import machine, report
from benchmarks.slides import made

N_SLIDES, SIDE, TILE_UM = 60, 1024, 112.0
#: side that tiles are resampled to: small, because what is compared does not depend on it
TARGET_PX = 96
EXTRACTOR = "efficientnet_lite0_stages"
#: tiles or nuclei per batch
BATCH = {"tiles": 4, "nuclei": 128}
Numbers = dict[str, np.ndarray]


def paint(n_slides: int, side: int, folder: Path) -> None:
    """Paint slides of different tissue and stain."""
    import stimage_sd as sti

    for seed in range(n_slides):
        sti.datasets.synthetic_slide(folder / f"slide_{seed:02d}", size=side, seed=seed, stain_seed=seed)


def open_all(slides: list[Path]) -> dict[str, Any]:
    """Open and tile all slides."""
    import stimage_sd as sti

    sections = {path.parent.name: sti.io.slide(path) for path in slides}
    for sdata in sections.values():
        sti.pp.tile(sdata, size_um=TILE_UM, target_px=TARGET_PX)
    return sections


def embed_tiles(sections: dict[str, Any]) -> Numbers:
    """Embed the tiles of all sections with default fields of view; return their embeddings."""
    import stimage_sd as sti

    sti.pp.embed(sections, EXTRACTOR, batch_size=BATCH["tiles"])
    keys = (f"X_{EXTRACTOR}", f"X_{EXTRACTOR}_context")
    return {
        f"{name}/{key}": np.asarray(sdata.tables["tiles"].obsm[key]) for name, sdata in sections.items() for key in keys
    }


def segment(sections: dict[str, Any]) -> Numbers:
    """Segment the nuclei of all sections; return their outlines and measurements."""
    import stimage_sd as sti

    numbers = {}
    for name, sdata in sections.items():
        sti.pp.segment_nuclei(sdata)
        frame = sdata.shapes["nuclei"]
        numbers[f"{name}/points"] = shapely.get_coordinates(frame.geometry.to_numpy())
        numbers[f"{name}/measured"] = frame.drop(columns="geometry").to_numpy()
    return numbers


def embed_nuclei(sections: dict[str, Any]) -> Numbers:
    """Embed the nuclei of all sections; return their embeddings."""
    import stimage_sd as sti

    sti.pp.embed(sections, EXTRACTOR, on="nuclei", batch_size=BATCH["nuclei"])
    return {
        name: np.asarray(sdata.tables["nuclei_features"].obsm[f"X_{EXTRACTOR}"]) for name, sdata in sections.items()
    }


@contextmanager
def killing(client: Any, n_batches: int) -> Iterator[dict[str, int]]:
    """Kill a worker once a third of so many batches are on disk; give what was done by then."""
    from stimage_sd._cache import cache_dir

    # on a busy machine, the worker in place of a killed one may not start within dask's time
    client.cluster.scale(2)
    client.wait_for_workers(2, timeout=300)
    victim = min(client.run(os.getpid).values())
    killed: dict[str, int] = {}
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.02):
            done = len(list((cache_dir() / "stream").glob("*/*.zst")))
            if 3 * done >= n_batches:
                os.kill(victim, signal.SIGKILL)
                killed.update(pid=victim, batches_done=done, batches=n_batches)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        over.set()
        killer.join()


def steps(slides: list[Path], client: Any = None) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """Run all steps, with a killed worker in both embeddings if there is a cluster; return numbers and seconds."""
    sections = open_all(slides)
    numbers: dict[str, Numbers] = {}
    about: dict[str, Any] = {}
    for name, step in (("tiles", embed_tiles), ("segmentation", segment), ("nuclei", embed_nuclei)):
        counts = [
            len(sdata.tables["tiles"] if name == "tiles" else sdata.shapes.get("nuclei", ()))
            for sdata in sections.values()
        ]
        batches = sum(-(-count // BATCH[name]) for count in counts) if name in BATCH else 0
        begin = time.perf_counter()
        kill: AbstractContextManager[dict[str, int]] = nullcontext({})
        if client is not None and batches:
            kill = killing(client, batches)
        with kill as killed:
            numbers[name] = step(sections)
        about[name] = {"seconds": round(time.perf_counter() - begin, 1), "killed": killed, "count": sum(counts)}
    return numbers, about


def run(slides: list[Path]) -> dict[str, Any]:
    """Run on threads and on a cluster, each with an empty cache, and compare."""
    from distributed import Client, LocalCluster

    with tempfile.TemporaryDirectory() as cache:
        os.environ["STIMAGE_SD_CACHE"] = cache
        expected, threads = steps(slides)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["STIMAGE_SD_CACHE"] = cache
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
        try:
            with Client(cluster) as client:
                found, on_cluster = steps(slides, client)
        finally:
            # a busy machine may take longer than dask waits to end a worker
            with suppress(TimeoutError):
                cluster.close()
    return {
        "machine": machine(),
        "slides": len(slides),
        "threads": threads,
        "cluster": on_cluster,
        "arrays": sum(map(len, expected.values())),
        "different": [f"{name}: {array}" for name in expected for array in different(expected[name], found[name])],
    }


def different(one: Numbers, other: Numbers) -> list[str]:
    """Return the names of the arrays that are not the same, bit for bit."""
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or one[name].tobytes() != other[name].tobytes()
    ]


def main() -> None:
    """Run on threads, run on a cluster with a killed worker, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=N_SLIDES)
    options = parser.parse_args()
    folder = made(f"cohort_{options.slides}x{SIDE}", partial(paint, options.slides, SIDE))
    slides = sorted(folder.glob("*/slide.svs"))
    result = run(slides)
    report(Path(__file__).parent / "results" / "cluster.json", result)
    if result["different"]:
        raise SystemExit(f"{len(result['different'])} arrays are not those of the run on threads.")
    for name in BATCH:
        killed = result["cluster"][name]["killed"]
        if not killed or killed["batches_done"] >= killed["batches"]:
            raise SystemExit(f"No worker was killed in the middle of embedding {name}: {killed}.")


if __name__ == "__main__":
    main()
