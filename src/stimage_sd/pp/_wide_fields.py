"""Wide fields of view of tiles, pooled from maps of the tissue that all tiles share.

The wide fields of neighboring tiles overlap. A map of the tissue at the resolution of the widest field is embedded
once, block by block, and gives the mean features of cells of 32 px. The embedding of a field is the mean of the cells
inside it, weighted by area. Blocks lie on a fixed grid of the image, so embeddings do not depend on the other tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from stimage_sd.models._extractor import Extractor
from stimage_sd.stream.driver import TileJob

#: side of a cell, px of the map: the coarsest stride of the networks
_CELL = 32
#: cells per side of a block, and around it; the network sees the cells around, and they are not counted
_BLOCK, _AROUND = 16, 1
#: a map serves fields of at least this share of its own field
_NARROWEST = 0.5
#: least cells per side of the narrowest field
_LEAST_CELLS = 2.0
#: blocks per batch
_BATCH = 2


@dataclass(frozen=True)
class MeansOfCells:
    """A network that gives the mean features of a block's cells.

    - `network`: the network.
    """

    network: Extractor

    def __call__(self, blocks: np.ndarray) -> np.ndarray:
        """Embed ``uint8 (n, side, side, 3)`` as ``float32 (n, 16, 16, n_features)``."""
        n = _BLOCK + 2 * _AROUND
        means = self.network.cell_means(n * _CELL, n)(blocks)
        return means[:, _AROUND:-_AROUND, _AROUND:-_AROUND]


@dataclass(frozen=True, eq=False)
class WideMap:
    """Map of the tissue around tiles, from which fields of view are pooled.

    - `fields`: places of the fields that the map serves, in the order of the caller.
    - `sides`: sides of these fields, px of the finest level.
    - `centers`: ``(n_tiles, 2)``, x and y of the tiles, px of the finest level.
    - `scale`: pixels of the finest level per pixel of the map.
    """

    fields: tuple[int, ...]
    sides: tuple[float, ...]
    centers: np.ndarray
    scale: float

    @property
    def step(self) -> float:
        """Side of a block, px of the finest level."""
        return _BLOCK * _CELL * self.scale

    @cached_property
    def _touched(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Column and row of the blocks that the fields touch, and for each block the rows of its tiles."""
        reach = max(self.sides) / 2
        first = np.floor((self.centers - reach) / self.step).astype(np.int64)
        last = np.ceil((self.centers + reach) / self.step).astype(np.int64) - 1
        steps = np.indices((last - first).max(axis=0) + 1).reshape(2, -1).T
        touched = first[:, None] + steps
        tiles, place = np.nonzero((touched <= last[:, None]).all(axis=2))
        blocks, number = np.unique(touched[tiles, place], axis=0, return_inverse=True)
        number = number.ravel()  # numpy 2.0 keeps the axis
        order = np.argsort(number, kind="stable")
        return blocks, np.split(tiles[order], np.cumsum(np.bincount(number))[:-1])

    def blocks(self) -> np.ndarray:
        """Return column and row of the blocks that the fields touch, ``int64 (n_blocks, 2)``."""
        return self._touched[0]

    def job(self, pyramid: Sequence[xr.DataArray], network: Extractor) -> TileJob:
        """Return the job that embeds the blocks."""
        target = (_BLOCK + 2 * _AROUND) * _CELL
        return TileJob(
            pyramid=pyramid,
            centers=(self.blocks() + 0.5) * self.step,
            function=MeansOfCells(network),
            sides=[target * self.scale],
            target=target,
            key=f"{network.name}-{network.weights_hash}-cells",
            shape=(_BLOCK, _BLOCK, network.embedding_size),
            batch_size=_BATCH,
        )

    def pool(self, means: np.ndarray) -> np.ndarray:
        """Average the cells inside each field.

        - `means`: ``float32 (n_blocks, 1, 16, 16, n_features)``, in the order of `blocks`.
        - returns: ``float32 (n_tiles, n_fields, n_features)``.
        """
        n_features = means.shape[-1]
        pooled = np.zeros((len(self.centers), len(self.sides), n_features), np.float32)
        for block, tiles, cells in zip(*self._touched, means.reshape(len(means), -1, n_features), strict=True):
            for field, side in enumerate(self.sides):
                columns, rows = (self._shares(self.centers[tiles, axis], block[axis], side) for axis in (0, 1))
                weights = rows[:, :, None] * columns[:, None, :]
                pooled[tiles, field] += weights.reshape(len(tiles), -1) @ cells
        return pooled

    def _shares(self, centers: np.ndarray, block: int, side: float) -> np.ndarray:
        """Return the share of each field's side that lies in the cells of a block, ``float32 (n_tiles, 16)``."""
        edges = block * self.step + np.arange(_BLOCK + 1) * (_CELL * self.scale)
        starts = centers[:, None] - side / 2
        inside = np.clip(edges, starts, starts + side)
        return (np.diff(inside, axis=1) / side).astype(np.float32)


def is_pooled(network: Extractor, fields: Sequence[float], target: int) -> bool:
    """Whether fields wider than a tile can be pooled: the network averages positions, and the tiles have the pixels."""
    return network.pools_cells and max(fields) > 1 and target * _NARROWEST >= _LEAST_CELLS * _CELL


def wide_maps(fields: Sequence[float], centers: np.ndarray, *, side: float, target: int) -> list[WideMap]:
    """Return the maps from which the fields wider than a tile are pooled.

    - `fields`: sides of the fields of view, in sides of a tile.
    - `centers`: ``(n_tiles, 2)``, x and y of the tiles, px of the finest level.
    - `side`: side of a tile, px of the finest level.
    - `target`: side of the network's input for one field, px.
    """
    maps, left = [], sorted({field for field in fields if field > 1})
    while left:
        widest = left[-1]
        served = [field for field in left if field >= _NARROWEST * widest]
        places = tuple(place for place, field in enumerate(fields) if field in served)
        sides = tuple(fields[place] * side for place in places)
        maps.append(WideMap(places, sides, centers, widest * side / target))
        left = left[: -len(served)]
    return maps
