"""Writing a large picture that streams by as a tiled pyramidal TIFF, in the memory of a few strips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile

#: side of a tile, px
TILE = 256
#: rows of a strip, px: whole rows of tiles, and divided by every level's downsampling
STRIP = 512
#: each level is the one before, reduced by this; slide scanners' own step
STEP = 4
#: no level has a shorter side, px; nor is there more than `STRIP` can be divided by
SMALLEST = 1024
QUALITY = 85


def level_sides(size: int) -> list[int]:
    """Return the sides of a square pyramid's levels, px, finest first; remainders are cut off."""
    sides = [size]
    while sides[-1] // STEP >= SMALLEST and STEP ** len(sides) <= STRIP:
        sides.append(sides[-1] // STEP)
    return sides


def write_pyramid(
    path: Path,
    strips: Iterable[np.ndarray],
    *,
    size: int,
    mpp: float,
    describe: Callable[[int], str] | None = None,
) -> np.ndarray:
    """Write a square picture as a tiled TIFF with JPEG tiles, level after level.

    Parameters
    ----------
    path
        File to write.
    strips
        The picture from top to bottom, each ``uint8 (STRIP, size, 3)``, the last one as high as what is left.
    size
        Side of the picture, px.
    mpp
        Micrometres a pixel, for the resolution tags.
    describe
        Returns the description of the level of a given side, px. The order of the images is then that of an Aperio
        slide, whose second image is a thumbnail.

    Returns
    -------
    The coarsest level, ``uint8 (side, side, 3)``.
    """
    sides = level_sides(size)
    common: dict[str, Any] = {"compression": "jpeg", "metadata": None, "software": False}
    with ThreadPoolExecutor() as pool, tifffile.TiffWriter(path, bigtiff=size**2 > 2**30) as writer:
        levels = [_Level(side, pool) for side in sides]
        coarsest: list[np.ndarray] = []
        for number, level in enumerate(levels):
            tiles = _finest_tiles(strips, levels, coarsest) if number == 0 else _results(level.tiles)
            writer.write(
                tiles,
                shape=(level.side, level.side, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                subfiletype=0 if number == 0 or describe is not None else 1,
                description=None if describe is None else describe(level.side),
                resolution=(1e4 / mpp * level.side / size,) * 2,
                resolutionunit="CENTIMETER",
                **common,
            )
            if number == 0 and describe is not None:
                small = cv2.resize(np.concatenate(coarsest), (SMALLEST, SMALLEST), interpolation=cv2.INTER_AREA)
                writer.write(small, photometric="rgb", rowsperstrip=16, description=describe(SMALLEST), **common)
    return np.concatenate(coarsest)


class _Level:
    """Gathers the rows of one level and compresses them in whole rows of tiles, in the background."""

    def __init__(self, side: int, pool: ThreadPoolExecutor) -> None:
        self.side = side
        self.pool = pool
        self.rows: list[np.ndarray] = []
        self.tiles: list[Future[bytes]] = []

    def add(self, rows: np.ndarray) -> None:
        self.rows.append(rows)
        if sum(part.shape[0] for part in self.rows) >= TILE:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        rows = self.rows[0] if len(self.rows) == 1 else np.concatenate(self.rows)
        self.rows = []
        for top in range(0, rows.shape[0], TILE):
            for left in range(0, self.side, TILE):
                self.tiles.append(self.pool.submit(_compress, rows[top : top + TILE, left : left + TILE]))


def _finest_tiles(strips: Iterable[np.ndarray], levels: list[_Level], coarsest: list[np.ndarray]) -> Iterator[bytes]:
    """Yield the finest level's tiles; the others' are gathered on the way, and the coarsest's rows as they are."""
    for strip in strips:
        before, levels[0].tiles = levels[0].tiles, []
        rows = strip
        levels[0].add(rows)
        for level in levels[1:]:
            rows = _reduce(rows)
            level.add(rows)
        coarsest.append(rows)
        # The strip before is written while this one is compressed.
        yield from _results(before)
    for level in levels:
        level.flush()
    yield from _results(levels[0].tiles)


def _results(tiles: list[Future[bytes]]) -> Iterator[bytes]:
    for tile in tiles:
        yield tile.result()


def _reduce(rows: np.ndarray) -> np.ndarray:
    height, width = rows.shape[0] // STEP, rows.shape[1] // STEP
    if height == 0:
        return np.empty((0, width, 3), dtype=np.uint8)
    return cv2.resize(rows[: height * STEP, : width * STEP], (width, height), interpolation=cv2.INTER_AREA)


def _compress(tile: np.ndarray) -> bytes:
    missing = TILE - np.array(tile.shape[:2])
    if missing.any():
        # A tile at the border is whole as well; its last pixels are repeated, which JPEG hardly needs bytes for.
        tile = cv2.copyMakeBorder(tile, 0, int(missing[0]), 0, int(missing[1]), cv2.BORDER_REPLICATE)
    return bytes(
        imagecodecs.jpeg_encode(
            np.ascontiguousarray(tile), level=QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
        )
    )
