"""Image pyramids: built lazily, or streamed once into the cache folder.

A JPEG, PNG or striped TIFF can only be read from top to bottom. Such a file is streamed once into a chunked pyramid in
the cache folder. All later reads use that pyramid. All levels are built in one pass, strip by strip, so the
full-resolution image is never held in memory.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import dask.array as da
import numpy as np
import zarr
from zarr.codecs import BloscCodec

from stimage_sd._cache import cache_dir
from stimage_sd._cache_size import mark_used, trim
from stimage_sd._files import remove_abandoned, replacing
from stimage_sd._progress import tqdm
from stimage_sd._zarr_chunks import WholeStore, is_whole
from stimage_sd.contract import CHUNK

#: longest side of the coarsest level, px
COARSEST = 1024
#: columns written per block, px
WRITTEN = 4 * CHUNK
#: layout version, part of the cache key; raise this number when the layout on disk changes
LAYOUT = 2

#: function that reads rows `start` to `stop` as ``uint8 (stop - start, x, 3)``; called from top to bottom
ReadRows = Callable[[int, int], np.ndarray]


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Return ``(y, x)`` of all pyramid levels, finest first. Each level halves the previous one, rounded up."""
    shapes = [(height, width)]
    while max(shapes[-1]) > COARSEST:
        shapes.append(((shapes[-1][0] + 1) // 2, (shapes[-1][1] + 1) // 2))
    return shapes


def halve(image: np.ndarray) -> np.ndarray:
    """Halve ``uint8 (y, x, c)`` by the mean of 2 × 2 pixels. An odd last row or column is repeated."""
    height, width = image.shape[:2]
    if height % 2 or width % 2:
        image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)


def halve_lazily(level: da.Array) -> da.Array:
    """Halve a lazy ``uint8 (3, y, x)`` level chunk by chunk, with `halve`."""
    even = level.rechunk((3, CHUNK, CHUNK))
    rows, columns = (tuple((size + 1) // 2 for size in sizes) for sizes in even.chunks[1:])
    halved = even.map_blocks(_halve_block, chunks=((3,), rows, columns), dtype=np.uint8, meta=np.empty((0, 0, 0), "u1"))
    return halved.rechunk((3, CHUNK, CHUNK))


def extend_lazily(levels: list[da.Array]) -> list[da.Array]:
    """Append halved levels until the longer side is at most `COARSEST` px. Reading a level reads the previous one."""
    extended = list(levels)
    while max(extended[-1].shape[1:]) > COARSEST:
        extended.append(halve_lazily(extended[-1]))
    return extended


def cached_pyramid(
    source: Path, *, part: str, height: int, width: int, open_rows: Callable[[], ReadRows]
) -> list[da.Array]:
    """Return the pyramid of an image from the cache, or stream the image once to build the pyramid.

    - `source`: the image file. Its path, size and modification time are in the cache key, so a changed file is read
      again.
    - `part`: name of the image within the file. Also in the cache key.
    - `height`, `width`: size of the finest level, px.
    - `open_rows`: opens the image for reading from top to bottom. Called only if the cache has no pyramid.
    - returns: levels, finest first, lazy ``uint8 (3, y, x)``.
    """
    state = source.stat()
    identity = f"{LAYOUT}|{source.resolve()}|{state.st_size}|{state.st_mtime_ns}|{part}"
    folder = cache_dir().absolute() / "images"
    finished = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.zarr"
    shapes = level_shapes(height, width)
    if not is_whole(finished, names=[str(level) for level in range(len(shapes))]):
        if finished.exists():
            warnings.warn(
                f"Parts of the cached image {finished} are missing; {source.name} is read again.",
                UserWarning,
                stacklevel=2,
            )
        remove_abandoned(folder)
        # If another process writes the same pyramid, the later copy replaces an identical one.
        with replacing(finished) as unfinished:
            _stream(open_rows(), unfinished, height=height, width=width, label=source.name)
        trim()
    mark_used(finished)
    group = zarr.open_group(WholeStore(finished, read_only=True), mode="r")
    return [da.from_zarr(group[str(level)]) for level in range(len(shapes))]


class _LevelWriter:
    """Collects the rows of one level and writes whole rows of chunks in the background."""

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
        # Only one strip is written while the next one is decoded, so memory stays at a few strips.
        while self.pending:
            self.pending.pop(0).result()
        self.pending.append(self.pool.submit(self._write, self.start, rows))
        self.start += rows.shape[0]
        self.rows = []

    def _write(self, start: int, rows: np.ndarray) -> None:
        # Colors are split for a few chunks at once. Splitting chunk by chunk takes twice as long. Splitting the whole
        # strip doubles its memory.
        for left in range(0, rows.shape[1], WRITTEN):
            block = rows[:, left : left + WRITTEN]
            planes = np.empty((3, *block.shape[:2]), dtype=np.uint8)
            cv2.split(block, list(planes))
            self.array[:, start : start + rows.shape[0], left : left + block.shape[1]] = planes


def _stream(read_rows: ReadRows, folder: Path, *, height: int, width: int, label: str) -> None:
    group = zarr.open_group(folder, mode="w")
    # LZ4 without shuffling writes as fast as uncompressed data and needs a quarter of the disk space.
    compressor = BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle")
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        writers = [
            _LevelWriter(
                group.create_array(
                    str(level),
                    shape=(3, *shape),
                    chunks=(3, CHUNK, CHUNK),
                    dtype="uint8",
                    compressors=compressor,
                    config={"write_empty_chunks": True},
                ),
                pool,
                pending,
            )
            for level, shape in enumerate(level_shapes(height, width))
        ]
        # The height of a strip is a power of two, so only the last strip can have an odd height after halving.
        for start in tqdm(range(0, height, CHUNK), desc=f"Reading {label}", unit="strip", delay=2.0, leave=False):
            rows = read_rows(start, min(start + CHUNK, height))
            for level, writer in enumerate(writers):
                writer.add(rows if level == 0 else (rows := halve(rows)))
        for writer in writers:
            writer.flush()
        for write in pending:
            write.result()


def _halve_block(block: np.ndarray) -> np.ndarray:
    return np.moveaxis(halve(np.ascontiguousarray(np.moveaxis(block, 0, -1))), -1, 0)
