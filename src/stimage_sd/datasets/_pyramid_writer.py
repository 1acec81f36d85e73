"""Streaming writer of large tiled pyramidal TIFF files, with memory for a few strips only."""

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
#: rows per strip, px; a multiple of the tile side and of the downsampling of all levels
STRIP = 512
#: downsampling from one level to the next, as in slide scanners
STEP = 4
#: smallest side of a level, px
SMALLEST = 1024
QUALITY = 85


def level_sides(size: int) -> list[int]:
    """Return the sides of the levels of a square pyramid, px, finest first, rounded down."""
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
    """Write a square image as a pyramidal TIFF with JPEG tiles.

    - `path`: file to write.
    - `strips`: strips of the image from top to bottom, ``uint8 (STRIP, size, 3)``. The last strip may be lower.
    - `size`: side of the image, px.
    - `mpp`: micrometers per pixel, for the resolution tags.
    - `describe`: function from the side of a level, px, to its description. With `describe`, the images have the order
      of an Aperio slide, with a thumbnail as the second image.
    - returns: the coarsest level, ``uint8 (side, side, 3)``.
    """
    sides = level_sides(size)
    common: dict[str, Any] = {"compression": "jpeg", "metadata": None, "software": False}
    with ThreadPoolExecutor() as pool, tifffile.TiffWriter(path, bigtiff=size**2 > 2**30) as writer:
        levels = [_Level(side, pool) for side in sides]
        coarsest: list[np.ndarray] = []
        for index, level in enumerate(levels):
            tiles = _finest_tiles(strips, levels, coarsest) if index == 0 else _results(level.tiles)
            writer.write(
                tiles,
                shape=(level.side, level.side, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                subfiletype=0 if index == 0 or describe is not None else 1,
                description=None if describe is None else describe(level.side),
                resolution=(1e4 / mpp * level.side / size,) * 2,
                resolutionunit="CENTIMETER",
                **common,
            )
            if index == 0 and describe is not None:
                small = cv2.resize(np.concatenate(coarsest), (SMALLEST, SMALLEST), interpolation=cv2.INTER_AREA)
                writer.write(small, photometric="rgb", rowsperstrip=16, description=describe(SMALLEST), **common)
    return np.concatenate(coarsest)


class _Level:
    """Collects the rows of one level and compresses whole rows of tiles in the background."""

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
    """Yield the tiles of the finest level. Collect tiles of the other levels, and the rows of the coarsest level."""
    for strip in strips:
        before, levels[0].tiles = levels[0].tiles, []
        rows = strip
        levels[0].add(rows)
        for level in levels[1:]:
            rows = _reduce(rows)
            level.add(rows)
        coarsest.append(rows)
        # The previous strip is written while this strip is compressed.
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
        # Tiles at the border are padded to full size with repeated pixels, which JPEG compresses well.
        tile = cv2.copyMakeBorder(tile, 0, int(missing[0]), 0, int(missing[1]), cv2.BORDER_REPLICATE)
    return bytes(
        imagecodecs.jpeg_encode(
            np.ascontiguousarray(tile), level=QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
        )
    )
