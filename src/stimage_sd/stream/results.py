"""Write the results of batches of tiles to a folder from which a run can resume."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path

import imagecodecs
import numpy as np
import xarray as xr

from stimage_sd._files import LOCK, UNFINISHED, discard, release, take, write_whole

#: advice for a folder that a worker does not see
_SHARED = (
    "All processes that compute must see it under the same path: set STIMAGE_SD_CACHE to a folder that they share."
)
#: suffix of the files of completed batches
_ENDING = ".zst"


@dataclass(frozen=True)
class Results:
    """The results folder of a run, with one compressed file per completed batch.

    A file takes 0.1 ms per batch. A zarr array takes 1.7 ms per batch on one thread at a time, while a network needs
    9 ms for two tiles. The object is pickled as a path, so all workers of a cluster write to the same folder.

    - `path`: the folder.
    - `shape`: shape of all results, ``(n_tiles, n_views, ...)``, in visit order.
    - `batch_size`: tiles per batch. The last batch may have fewer.
    """

    path: Path
    shape: tuple[int, ...]
    batch_size: int

    @classmethod
    def open(
        cls, path: Path, shape_of: Callable[[], tuple[int, ...]], *, n_tiles: int, n_views: int, batch_size: int
    ) -> Results:
        """Open the folder of an interrupted run, or make a new one that stores the shape and its checksum."""
        about = path / "shape.json"
        try:
            shape, checksum = json.loads(about.read_bytes())
        except (FileNotFoundError, ValueError, TypeError):
            shape, checksum = [], None
        shape = tuple(shape)
        if checksum != _checksum(shape) or shape[:2] != (n_tiles, n_views):
            if about.exists():
                warnings.warn(f"{about} is damaged. The tiles are computed again.", UserWarning, stacklevel=2)
            for file in path.glob(f"*{_ENDING}"):
                file.unlink()
            shape = (n_tiles, n_views, *shape_of())
            path.mkdir(parents=True, exist_ok=True)
            write_whole(about, json.dumps([shape, _checksum(shape)]).encode())
        return cls(path, shape, batch_size)

    def pending(self) -> list[int]:
        """Return the batches that have no readable file. Warn about damaged files."""
        done = {name for name in os.listdir(self.path) if name.endswith(_ENDING)}
        numbers = range(-(-self.shape[0] // self.batch_size))
        damaged = {batch for batch in numbers if self._file(batch).name in done and self._values(batch) is None}
        if damaged:
            warnings.warn(
                f"{len(damaged)} batches of tiles in {self.path} are damaged. They are computed again.",
                UserWarning,
                stacklevel=2,
            )
        return [batch for batch in numbers if self._file(batch).name not in done or batch in damaged]

    def write(self, batch: int, values: np.ndarray) -> None:
        """Write the values of a batch, ``float32 (n, n_views, ...)``."""
        n_tiles = min(self.batch_size, self.shape[0] - batch * self.batch_size)
        if len(values) != n_tiles:
            raise ValueError(f"Expected a result for each of the {n_tiles} tiles of a batch, found {len(values)}.")
        if values.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"Expected a result of shape {self.shape[2:]} for each tile, as `shape` says, found {values.shape[2:]}."
            )
        content = values.tobytes()
        try:
            write_whole(self._file(batch), zlib.crc32(content).to_bytes(4) + imagecodecs.zstd_encode(content, level=1))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"A worker does not see the cache folder {self.path}. {_SHARED}") from error

    def batch(self, batch: int) -> np.ndarray:
        """Read the values of a completed batch."""
        values = self._values(batch)
        if values is None:
            raise OSError(
                f"The results of batch {batch} are missing or damaged in {self.path}. {_SHARED} Then run the step "
                "again. The step resumes where it stopped."
            )
        return values

    def _values(self, batch: int) -> np.ndarray | None:
        """Read the values of a batch, or return `None` if its file is missing or damaged."""
        n_tiles = min(self.batch_size, self.shape[0] - batch * self.batch_size)
        try:
            content = self._file(batch).read_bytes()
            values = bytes(imagecodecs.zstd_decode(content[4:]))
        except (FileNotFoundError, RuntimeError, ValueError):  # imagecodecs raises RuntimeError
            return None
        if zlib.crc32(values) != int.from_bytes(content[:4]) or len(values) != 4 * n_tiles * prod(self.shape[1:]):
            return None
        return np.frombuffer(values, dtype=np.float32).reshape(n_tiles, *self.shape[1:])

    def read(self, order: np.ndarray) -> np.ndarray:
        """Read the values of all tiles, and return them in the order of the tiles."""
        values = np.empty(self.shape, dtype=np.float32)
        for batch, start in enumerate(range(0, len(order), self.batch_size)):
            values[order[start : start + self.batch_size]] = self.batch(batch)
        return values

    def remove(self) -> None:
        """Delete the folder, unless another run holds its lock."""
        lock = take(self.path / LOCK)
        if lock is not None:
            # rename first, so that a run that starts meanwhile finds all results or none
            away = self.path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
            self.path.rename(away)
            discard(away, lock)

    def _file(self, batch: int) -> Path:
        return self.path / f"{batch}{_ENDING}"


def _checksum(shape: tuple[int, ...]) -> int:
    return zlib.crc32(json.dumps(shape).encode())


def folder_of_run(parent: Path, name: str, *, used: set[Path], hold: bool) -> tuple[Path, int | None]:
    """Return a folder for a run, new or from an interrupted run, and its lock if `hold` is set.

    Folders that other runs have locked are skipped. So are the folders in `used`, which this run uses without a lock.
    """
    for run in count(1):
        path = parent / (name if run == 1 else f"{name}-{run}")
        if path not in used and (lock := take(path / LOCK)) is not None:
            if not hold:
                release(lock)
            return path, lock if hold else None
    raise AssertionError  # the count does not end


def fingerprint(
    pyramid: Sequence[xr.DataArray], centers: np.ndarray, sides: Sequence[float], target: int, key: str, batch_size: int
) -> str:
    """Return a hash of everything that the results depend on. The coarsest level stands for the image."""
    coarsest = pyramid[-1].data
    step = max(1, max(coarsest.shape[1:]) // 512)
    digest = hashlib.sha256(np.ascontiguousarray(coarsest[:, ::step, ::step].compute(scheduler="threads")).tobytes())
    digest.update(json.dumps([[level.shape for level in pyramid], list(sides), target, key, batch_size]).encode())
    digest.update(np.ascontiguousarray(centers).tobytes())
    return digest.hexdigest()[:32]
