"""Select the region of a slide to search for nuclei: its tissue, or some of its tiles."""

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
    """The region to search for nuclei: the tissue, or the tissue inside some tiles, in full-resolution px.

    - `mask`: ``uint8 (y, x)``, 1 inside the region.
    - `scale`: Full-resolution pixels per mask pixel, along y and x.
    - `squares`: ``float64 (n, 4)``: left, top, right, bottom of the tiles that must hold a nucleus' center. `None` for
      no limit.
    """

    mask: NDArray[np.uint8]
    scale: tuple[float, float]
    squares: NDArray[np.float64] | None

    @classmethod
    def of(cls, sdata: SpatialData, name: str, tiles: Sequence[str | int] | None) -> Region:
        """Return the region of a section. Without a tissue mask, the tiles count as tissue.

        - `sdata`: the section.
        - `name`: name of the H&E image.
        - `tiles`: names or numbers of the tiles to search. `None` for all of the tissue.
        """
        squares = None if tiles is None else contract.tile_squares(sdata, tiles, name)
        height, width = contract.levels(sdata, name)[0].shape[1:]
        if not contract.has_tissue(sdata) and contract.TILES in sdata.tables:
            within = contract.tile_squares(sdata, image_key=name) if squares is None else squares
            return cls(np.ones((1, 1), np.uint8), (float(height), float(width)), within)
        mask, scale = contract.tissue(sdata, name)
        # at the tissue edge, a nucleus may have its center on a mask pixel that is less than half covered
        return cls(cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)), scale, squares)

    def holds(self, centers: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which points ``(n, 2)``, x and y, lie in the region."""
        rows, columns = (
            np.clip((centers[:, 1 - axis] // self.scale[axis]).astype(int), 0, self.mask.shape[axis] - 1)
            for axis in (0, 1)
        )
        wanted = self.mask[rows, columns] > 0
        if self.squares is None or len(centers) == 0:
            return wanted
        return wanted & _met(np.asarray(shapely.points(centers)), self.squares)

    def meets(self, cores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which cores of blocks ``(n, 4)``, left, top, right, bottom, overlap the region."""
        wanted = np.zeros(len(cores), dtype=bool)
        for core, (left, top, right, bottom) in enumerate(cores):
            rows = slice(int(top // self.scale[0]), int(np.ceil(bottom / self.scale[0])))
            columns = slice(int(left // self.scale[1]), int(np.ceil(right / self.scale[1])))
            wanted[core] = self.mask[rows, columns].any()
        if self.squares is not None:
            wanted &= _met(np.asarray(shapely.box(*cores.T)), self.squares)
        return wanted

    def sample(self, n_places: int, *, side: float) -> NDArray[np.float64]:
        """Return random places ``(n, 2)``, x and y, in the mask.

        There are at most `n_places`, and at most as many as squares of `side` px fit into the mask area.
        """
        rows, columns = np.nonzero(self.mask)
        area = len(rows) * self.scale[0] * self.scale[1]
        wanted = int(np.clip(np.ceil(area / side**2), 1, min(n_places, len(rows))))
        chosen = np.random.default_rng(0).choice(len(rows), wanted, replace=False)
        return np.stack([columns[chosen] + 0.5, rows[chosen] + 0.5], axis=1) * self.scale[::-1]


def _met(shapes: NDArray[np.object_], squares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which shapes intersect any of the squares ``(n, 4)``."""
    tree = shapely.STRtree(np.asarray(shapely.box(*squares.T)))
    return np.isin(np.arange(len(shapes)), tree.query(shapes, predicate="intersects")[0])
