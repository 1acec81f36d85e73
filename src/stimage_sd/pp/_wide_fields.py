"""Wide fields of view of tiles, pooled from maps of the tissue that all tiles share.

The wide fields of neighboring tiles overlap. For each wide field, a map of the tissue is embedded once, block by block,
and gives the mean features of cells of 32 px. The embedding of a tile's field is the mean of the cells inside it,
weighted by area. The map's resolution lies halfway between that of the field and that of the widest field, on a log
scale. Blocks lie on a fixed grid of the image, so embeddings do not depend on the other tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
import xarray as xr

from stimage_sd.models._extractor import Extractor
from stimage_sd.stream.driver import TileJob

#: side of a cell, px of the map: the coarsest stride of the networks
_CELL = 32
#: cells per side of a block, and around it; the network sees the cells around, and they are not counted
_BLOCK, _AROUND = 8, 1
#: least cells per side of a field
_LEAST_CELLS = 2.0
#: blocks per batch
_BATCH = 8


@dataclass(frozen=True)
class MeansOfCells:
    """A network that gives the mean features of a block's cells.

    - `network`: the network.
    """

    network: Extractor

    def __call__(self, blocks: np.ndarray) -> np.ndarray:
        """Embed ``uint8 (n, side, side, 3)`` as ``float32 (n, 8, 8, n_features)``."""
        n = _BLOCK + 2 * _AROUND
        means = self.network.cell_means(n * _CELL, n)(blocks)
        return means[:, _AROUND:-_AROUND, _AROUND:-_AROUND]


@dataclass(frozen=True, eq=False)
class WideMap:
    """Map of the tissue around tiles, from which one field of view is pooled.

    - `side`: side of the field, px of the finest level.
    - `centers`: ``(n_tiles, 2)``, x and y of the tiles, px of the finest level.
    - `scale`: pixels of the finest level per pixel of the map.
    """

    side: float
    centers: np.ndarray
    scale: float

    @property
    def step(self) -> float:
        """Side of a block, px of the finest level."""
        return _BLOCK * _CELL * self.scale

    @cached_property
    def _touched(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Column and row of the blocks that the field touches, and for each block the rows of its tiles."""
        reach = self.side / 2
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
        """Return column and row of the blocks that the field touches, ``int64 (n_blocks, 2)``."""
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
        """Average the cells inside each tile's field.

        - `means`: ``float32 (n_blocks, 1, 8, 8, n_features)``, in the order of `blocks`.
        - returns: ``float32 (n_tiles, n_features)``.
        """
        n_features = means.shape[-1]
        pooled = np.zeros((len(self.centers), n_features), np.float32)
        for block, tiles, cells in zip(*self._touched, means.reshape(len(means), -1, n_features), strict=True):
            columns, rows = (self._shares(self.centers[tiles, axis], block[axis]) for axis in (0, 1))
            weights = rows[:, :, None] * columns[:, None, :]
            pooled[tiles] += weights.reshape(len(tiles), -1) @ cells
        return pooled

    def _shares(self, centers: np.ndarray, block: int) -> np.ndarray:
        """Return the share of each field's side that lies in the cells of a block, ``float32 (n_tiles, 8)``."""
        edges = block * self.step + np.arange(_BLOCK + 1) * (_CELL * self.scale)
        starts = centers[:, None] - self.side / 2
        inside = np.clip(edges, starts, starts + self.side)
        return (np.diff(inside, axis=1) / self.side).astype(np.float32)


def is_pooled(network: Extractor, fields: Sequence[float], target: int) -> bool:
    """Whether fields wider than a tile can be pooled: the network averages positions, and maps have enough pixels."""
    wide = [field for field in fields if field > 1]
    return network.pools_cells and bool(wide) and target * sqrt(min(wide) / max(wide)) >= _LEAST_CELLS * _CELL


def wide_maps(fields: Sequence[float], centers: np.ndarray, *, side: float, target: int) -> dict[int, WideMap]:
    """Return the maps from which the fields wider than a tile are pooled, by the field's place in `fields`.

    - `fields`: sides of the fields of view, in sides of a tile.
    - `centers`: ``(n_tiles, 2)``, x and y of the tiles, px of the finest level.
    - `side`: side of a tile, px of the finest level.
    - `target`: side of the network's input for one field, px.
    """
    scales = {field: sqrt(field * max(fields)) * side / target for field in fields if field > 1}
    return {
        place: WideMap(field * side, centers, scales[field]) for place, field in enumerate(fields) if field in scales
    }
