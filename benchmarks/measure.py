"""Seconds and peak memory of the steps of a run."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

#: what does the work of a comparison: names of modules, and of the packages that they belong to
PACKAGES = {
    "cv2": "opencv-python-headless",
    "esda": "esda",
    "imagecodecs": "imagecodecs",
    "jax": "jax",
    "lazyslide": "lazyslide",
    "lime": "lime",
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "openslide": "openslide-python",
    "pyvips": "pyvips",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "squidpy": "squidpy",
    "staintools": "staintools",
    "tifffile": "tifffile",
    "timm": "timm",
    "torch": "torch",
    "torchstain": "torchstain",
    "zarr": "zarr",
}


def resident_megabytes() -> float:
    """Resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Return the versions of the packages that this process has imported and that do the work of comparisons."""
    return {package: metadata.version(package) for module, package in PACKAGES.items() if module in sys.modules}


@dataclass
class Steps:
    """Steps of a run: wall-clock seconds each, and the highest resident memory while each ran.

    Attributes
    ----------
    start_megabytes
        Resident memory when the measuring began, after the imports.
    rows
        A dict a step.
    """

    start_megabytes: float = field(default_factory=resident_megabytes)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure what happens inside; memory is sampled every 10 ms."""
        peak = [resident_megabytes()]
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.01):
                peak[0] = max(peak[0], resident_megabytes())

        watcher = threading.Thread(target=sample, daemon=True)
        watcher.start()
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            stop.set()
            watcher.join()
            self.rows.append(
                {
                    "step": name,
                    "seconds": round(seconds, 2),
                    "peak_mb_above_imports": round(max(peak[0], resident_megabytes()) - self.start_megabytes),
                }
            )


def with_cpu_seconds(job: Callable[[], Mapping[str, Any]]) -> Callable[[], Mapping[str, Any]]:
    """Add the processor's seconds, of all threads, to the figures of a job."""

    def measured() -> Mapping[str, Any]:
        begin = time.process_time()
        figures = job()
        return {**figures, "cpu_seconds": round(time.process_time() - begin, 2)}

    return measured


def report(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, and print it as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
