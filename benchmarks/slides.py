"""Synthetic slides for the comparisons: painted once a size, in a process of their own, and kept between runs."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

#: where they are kept; `TMPDIR` moves it
FOLDER = Path(tempfile.gettempdir()) / "stimage-sd-slides"


def made(name: str, make: Callable[[Path], object]) -> Path:
    """Give a file or folder by name, making it where it is not there: in a new process, whose memory is not ours.

    Parameters
    ----------
    name
        Its name in `FOLDER`.
    make
        Writes it to the path it is given; a function of a module, or a `functools.partial` of one.
    """
    path = FOLDER / name
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            unfinished = Path(folder) / name
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                pool.submit(make, unfinished).result()
            shutil.move(unfinished, path)
    return path


def slide(side: int) -> Path:
    """Give a slide of `side` px a side as an Aperio scanner writes it: JPEG tiles of 256 px, levels a fourth each."""
    return made(f"slide_{side}", partial(_paint, side)) / "slide.svs"


def _paint(side: int, path: Path) -> None:
    import stimage_sd as sti

    sti.datasets.synthetic_slide(path, size=side)


def needs_bench(package: str) -> ModuleNotFoundError:
    """Give the error to raise where a peer is not installed."""
    return ModuleNotFoundError(f'Found no {package}, which this side runs: `pip install -e ".[bench]"`.')
