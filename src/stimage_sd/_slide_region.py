"""Where on a slide nuclei are looked for: on its tissue, or in some of its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract


@dataclass(frozen=True)
class Region:
    """Where nuclei are wanted: on tissue and, where some are given, in tiles; full-resolution px.

    Attributes
    ----------
    mask
        ``uint8 (y, x)``, 1 where nuclei are wanted, and the full-resolution px one of its pixels spans (y, x).
    squares
        ``float64 (n, 4)``: left, top, right, bottom of the tiles that a nucleus' centre has to lie in; `None`: all.
    """

    mask: NDArray[np.uint8]
    scale: tuple[float, float]
    squares: NDArray[np.float64] | None

    @classmethod
    def of(cls, sdata: SpatialData, name: str, tiles: Sequence[str | int] | None) -> Region:
        """Read where tissue is; where no one has found that, all of the section's tiles are.

        Parameters
        ----------
        sdata
            The section.
        name
            Its H&E image.
        tiles
            Names or numbers of the tiles that nuclei are wanted in; `None`: all of the tissue.

        Raises
        ------
        KeyError
            If the section has neither tissue nor tiles, or lacks a tile.
        """
        squares = None if tiles is None else contract.tile_squares(sdata, tiles)
        height, width = contract.levels(sdata, name)[0].shape[1:]
        if contract.TISSUE not in sdata.labels and contract.TILES in sdata.tables:
            within = contract.tile_squares(sdata) if squares is None else squares
            return cls(np.ones((1, 1), np.uint8), (float(height), float(width)), within)
        mask, scale = contract.tissue(sdata)
        # a nucleus at the tissue's edge may have its centre on a pixel that is not half covered
        return cls(cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)), scale, squares)

    def holds(self, centres: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of ``(n, 2)`` points, x and y, are wanted."""
        rows, columns = (
            np.clip((centres[:, 1 - axis] // self.scale[axis]).astype(int), 0, self.mask.shape[axis] - 1)
            for axis in (0, 1)
        )
        wanted = self.mask[rows, columns] > 0
        if self.squares is None or len(centres) == 0:
            return wanted
        return wanted & _met(np.asarray(shapely.points(centres)), self.squares)

    def meets(self, cores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which cores of blocks, ``(n, 4)``: left, top, right, bottom, have anything to look at."""
        wanted = np.zeros(len(cores), dtype=bool)
        for number, (left, top, right, bottom) in enumerate(cores):
            rows = slice(int(top // self.scale[0]), int(np.ceil(bottom / self.scale[0])))
            columns = slice(int(left // self.scale[1]), int(np.ceil(right / self.scale[1])))
            wanted[number] = self.mask[rows, columns].any()
        if self.squares is not None:
            wanted &= _met(np.asarray(shapely.box(*cores.T)), self.squares)
        return wanted

    def sample(self, n_places: int, *, side: float) -> NDArray[np.float64]:
        """Places ``(n, 2)``, x and y, spread over the mask; as many as squares of `side` px fit in, at most."""
        rows, columns = np.nonzero(self.mask)
        area = len(rows) * self.scale[0] * self.scale[1]
        wanted = int(np.clip(np.ceil(area / side**2), 1, min(n_places, len(rows))))
        chosen = np.random.default_rng(0).choice(len(rows), wanted, replace=False)
        return np.stack([columns[chosen] + 0.5, rows[chosen] + 0.5], axis=1) * self.scale[::-1]


def _met(shapes: NDArray[np.object_], squares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which shapes meet any of ``(n, 4)`` squares."""
    tree = shapely.STRtree(np.asarray(shapely.box(*squares.T)))
    return np.isin(np.arange(len(shapes)), tree.query(shapes, predicate="intersects")[0])
