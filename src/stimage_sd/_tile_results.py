"""The zarr store on disk that batches of tiles write their results to, and that a run is resumed from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
import zarr


@dataclass(frozen=True)
class Results:
    """Where batches are written: a chunk of values a batch, and which batches are done.

    It is pickled as paths, so every worker of a cluster opens the same files.

    Attributes
    ----------
    path
        The store's folder.
    values
        ``float32 (n_tiles, n_views, ...)``, in the order of visit; a chunk a batch.
    done
        ``bool (n_batches,)``; a chunk a batch, so that no two workers write the same file.
    """

    path: Path
    values: zarr.Array
    done: zarr.Array

    @classmethod
    def open(
        cls, path: Path, shape_of: Callable[[], tuple[int, ...]], *, n_tiles: int, n_views: int, batch_size: int
    ) -> Results:
        """Open the store of a run, as far as it came; a new one, for results of the shape told, where there is none."""
        if (path / "ready").exists():
            group = zarr.open_group(path, mode="r+")
            return cls(path, group["values"], group["done"])
        shutil.rmtree(path, ignore_errors=True)
        shape = shape_of()
        group = zarr.open_group(path, mode="w")
        values = group.create_array(
            "values", shape=(n_tiles, n_views, *shape), chunks=(batch_size, n_views, *shape), dtype="float32"
        )
        done = group.create_array("done", shape=(-(-n_tiles // batch_size),), chunks=(1,), dtype="bool")
        (path / "ready").touch()
        return cls(path, values, done)

    def write(self, number: int, values: np.ndarray) -> None:
        """Write the values of a batch, then that it is done."""
        if values.shape[1:] != self.values.shape[1:]:  # zarr would repeat a single value
            raise ValueError(
                f"Expected a result of shape {self.values.shape[2:]} for each tile, as `shape` says, "
                f"found {values.shape[2:]}."
            )
        start = number * self.values.chunks[0]
        self.values[start : start + len(values)] = values
        self.done[number] = True

    def read(self, order: np.ndarray) -> np.ndarray:
        """Read the values of all tiles, from the order of visit into the tiles' own."""
        values = np.empty(self.values.shape, dtype=np.float32)
        values[order] = self.values[:]
        return values

    def remove(self) -> None:
        """Delete the store."""
        shutil.rmtree(self.path, ignore_errors=True)


def fingerprint(
    pyramid: Sequence[xr.DataArray], centers: np.ndarray, sides: Sequence[float], target: int, key: str, batch_size: int
) -> str:
    """Hash what the results depend on; the coarsest level stands for the image."""
    coarsest = pyramid[-1].data
    step = max(1, max(coarsest.shape[1:]) // 512)
    digest = hashlib.sha256(np.ascontiguousarray(coarsest[:, ::step, ::step].compute()).tobytes())
    digest.update(json.dumps([[level.shape for level in pyramid], list(sides), target, key, batch_size]).encode())
    digest.update(np.ascontiguousarray(centers).tobytes())
    return digest.hexdigest()[:32]
