"""Store tiles on disk, so minibatches in any order need no second pass over the image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from stimage_sd.stream.cutting import visit_order
from stimage_sd.stream.driver import run_over_tiles

#: bytes of tiles held in memory during cutting
_MOST_BYTES = 256_000_000


class TileStore:
    """A file of uint8 tiles of one size, stored one after another.

    - `path`: file to write. An existing file is replaced.
    - `n_tiles`: number of tiles.
    - `side_px`: side of a tile, px.
    """

    def __init__(self, path: Path, *, n_tiles: int, side_px: int) -> None:
        self._path, self._shape = path, (side_px, side_px, 3)
        self._size = 3 * side_px**2
        self._n_tiles = n_tiles
        with path.open("wb") as file:
            file.truncate(n_tiles * self._size)

    def cut(self, pyramid: Sequence[xr.DataArray], centers: np.ndarray, *, side: float, first: int, label: str) -> None:
        """Cut tiles out of a lazy image and write them from position `first` on."""
        order = visit_order(centers, pyramid[0].data)
        # tiles arrive as float32
        step = max(32, _MOST_BYTES // (8 * self._size))
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            tiles = run_over_tiles(
                pyramid,
                centers[rows],
                _as_they_are,
                sides=[side],
                target=self._shape[0],
                key="tiles",
                description=label,
            )[:, 0]
            with self._path.open("r+b") as file:
                for row, tile in zip(rows, tiles, strict=True):
                    file.seek((first + int(row)) * self._size)
                    file.write(tile.astype(np.uint8).tobytes())

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read tiles by row, as ``uint8 (n_rows, side, side, 3)``."""
        tiles = np.empty((len(rows), *self._shape), dtype=np.uint8)
        # no memory map: pages of a mapped file would count as memory of the process
        with self._path.open("rb") as file:
            for index, row in enumerate(rows):
                file.seek(int(row) * self._size)
                tiles[index] = np.frombuffer(file.read(self._size), dtype=np.uint8).reshape(self._shape)
        return tiles

    def digest(self) -> str:
        """Compute the sha256 of all tiles."""
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __len__(self) -> int:
        return self._n_tiles


def _as_they_are(tiles: np.ndarray) -> np.ndarray:
    return tiles
