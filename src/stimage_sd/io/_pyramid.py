"""Image pyramids: halving an image, lazily or while it streams by once, and keeping the result on disk.

A JPEG, a PNG or a striped TIFF can only be read from top to bottom. Such a file is streamed once into a
chunked pyramid in the cache folder, and every later access is to that pyramid. The levels are built in
the same pass, a strip at a time, so that the full resolution never stands in memory.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import zarr
from tqdm.auto import tqdm
from zarr.codecs import BloscCodec

from stimage_sd._cache import cache_dir
from stimage_sd.contract import CHUNK

#: halving stops at the first level whose longer side is at most this, px
COARSEST = 1024
#: columns written at a time, px
WRITTEN = 4 * CHUNK
#: part of the cache key: raise it when the layout on disk changes
LAYOUT = 1
#: an unfinished pyramid of this age was left by a process that died, seconds
ABANDONED = 6 * 3600.0

#: reads rows `start` to `stop` of an image as ``uint8 (stop - start, x, 3)``; called from top to bottom
ReadRows = Callable[[int, int], np.ndarray]


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Return ``(y, x)`` of every level of a pyramid, finest first, each half the one before, rounded up."""
    shapes = [(height, width)]
    while max(shapes[-1]) > COARSEST:
        shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
    return shapes


def halve(image: np.ndarray) -> np.ndarray:
    """Halve ``uint8 (y, x, c)`` by the mean of 2 × 2 pixels; an odd last row or column is repeated."""
    height, width = image.shape[:2]
    if height % 2 or width % 2:
        image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)


def halve_lazily(level: da.Array) -> da.Array:
    """Halve a lazy ``uint8 (3, y, x)`` level as `halve` does, chunk by chunk."""
    even = level.rechunk((3, CHUNK, CHUNK))
    rows, columns = (tuple((size + 1) // 2 for size in sizes) for sizes in even.chunks[1:])
    halved = even.map_blocks(_halve_block, chunks=((3,), rows, columns), dtype=np.uint8, meta=np.empty((0, 0, 0), "u1"))
    return halved.rechunk((3, CHUNK, CHUNK))


def extend_lazily(levels: list[da.Array]) -> list[da.Array]:
    """Append halved levels until the coarsest has `COARSEST` px at most; they cost a read of the level before."""
    extended = list(levels)
    while max(extended[-1].shape[1:]) > COARSEST:
        extended.append(halve_lazily(extended[-1]))
    return extended


def cached_pyramid(
    source: Path, *, part: str, height: int, width: int, open_rows: Callable[[], ReadRows]
) -> list[da.Array]:
    """Return the pyramid of an image that streams by, from the cache or by streaming it once.

    Parameters
    ----------
    source
        The image file; its path, size and time of change are the key, so that a changed file is read again.
    part
        What of the file is streamed; part of the key.
    height, width
        Size of the finest level, px.
    open_rows
        Opens the image for reading from top to bottom. Called only where the cache has no pyramid.

    Returns
    -------
    Levels, finest first, lazy ``uint8 (3, y, x)``.
    """
    state = source.stat()
    identity = f"{LAYOUT}|{source.resolve()}|{state.st_size}|{state.st_mtime_ns}|{part}"
    folder = cache_dir() / "images"
    finished = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.zarr"
    if not finished.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder, finished.stem)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{finished.stem}.", suffix=".partial", dir=folder))
        try:
            _stream(open_rows(), unfinished, height=height, width=width, label=source.name)
            _publish(unfinished, finished)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    group = zarr.open_group(finished, mode="r")
    return [da.from_zarr(group[str(number)]) for number in range(len(level_shapes(height, width)))]


class _LevelWriter:
    """Gathers the rows of one level and writes them in whole rows of chunks, in the background."""

    def __init__(self, array: zarr.Array, pool: ThreadPoolExecutor, pending: list[Future[None]]) -> None:
        self.array = array
        self.pool = pool
        self.pending = pending
        self.rows: list[np.ndarray] = []
        self.start = 0

    def add(self, rows: np.ndarray) -> None:
        self.rows.append(rows)
        if sum(part.shape[0] for part in self.rows) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        rows = self.rows[0] if len(self.rows) == 1 else np.concatenate(self.rows)
        # At most one strip is being written while the next is decoded: memory stays at a few strips.
        while self.pending:
            self.pending.pop(0).result()
        self.pending.append(self.pool.submit(self._write, self.start, rows))
        self.start += rows.shape[0]
        self.rows = []

    def _write(self, start: int, rows: np.ndarray) -> None:
        # Colours are parted first, a few chunks at a time: chunk by chunk out of interleaved colours takes twice as
        # long, and the whole strip at once needs its memory again.
        for left in range(0, rows.shape[1], WRITTEN):
            block = rows[:, left : left + WRITTEN]
            planes = np.empty((3, *block.shape[:2]), dtype=np.uint8)
            cv2.split(block, list(planes))
            self.array[:, start : start + rows.shape[0], left : left + block.shape[1]] = planes


def _stream(read_rows: ReadRows, folder: Path, *, height: int, width: int, label: str) -> None:
    group = zarr.open_group(folder, mode="w")
    # LZ4 without shuffling: as fast to write as nothing at all and a quarter of the disk.
    compressor = BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle")
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        writers = [
            _LevelWriter(
                group.create_array(
                    str(number), shape=(3, *shape), chunks=(3, CHUNK, CHUNK), dtype="uint8", compressors=compressor
                ),
                pool,
                pending,
            )
            for number, shape in enumerate(level_shapes(height, width))
        ]
        # A strip's height is a power of two that every halving divides, so no strip but the last is ever odd.
        for start in tqdm(range(0, height, CHUNK), desc=f"Reading {label}", unit="strip", delay=2.0, leave=False):
            rows = read_rows(start, min(start + CHUNK, height))
            for number, writer in enumerate(writers):
                writer.add(rows if number == 0 else (rows := halve(rows)))
        for writer in writers:
            writer.flush()
        for write in pending:
            write.result()


def _publish(unfinished: Path, finished: Path) -> None:
    try:
        unfinished.rename(finished)
    except OSError:
        # Another process finished the same pyramid first: its copy is as good.
        if not finished.is_dir():
            raise


def _remove_abandoned(folder: Path, stem: str) -> None:
    for left in folder.glob(f"{stem}.*.partial"):
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


def _halve_block(block: np.ndarray) -> np.ndarray:
    return np.moveaxis(halve(np.ascontiguousarray(np.moveaxis(block, 0, -1))), -1, 0)
