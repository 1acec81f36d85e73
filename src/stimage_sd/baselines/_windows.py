"""Square windows of a section, for networks whose memory grows with the square of the number of spots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stimage_sd.models._recipe import SectionData
from stimage_sd.stats.lattice import find_lattice, neighbor_graph


@dataclass(frozen=True)
class Places:
    """Places of a section's tiles.

    Attributes
    ----------
    column_row
        Column and row of each tile, ``int64 (n_tiles, 2)``, from zero.
    step
        Columns between neighbors in a row: 2 on a hexagonal lattice.
    """

    column_row: np.ndarray
    step: int

    @classmethod
    def of(cls, section: SectionData) -> Places:
        """Return the places on the lattice. Off a lattice, they are in units of the distance between neighbors."""
        positions = section.positions
        try:
            lattice = find_lattice(positions)
        except ValueError:
            nearest = neighbor_graph(positions, n_neighbors=1)
            distances = np.linalg.norm(np.subtract(*(positions[ends] for ends in nearest.nonzero())), axis=1)
            pitch = max(float(np.median(distances)), 1e-6)
            return cls(np.round((positions - positions.min(axis=0)) / pitch).astype(int), 1)
        step = 2 if lattice.kind == "hexagonal" else 1
        return cls(np.stack([lattice.column, lattice.row], axis=1), step)

    def windows(self, size: int | None) -> list[np.ndarray]:
        """Return the tiles of each window, row by row. No window is wider or higher than `size` tiles.

        Windows do not overlap and are of equal width and height, so that none is a narrow rest at the border.

        Examples
        --------
        >>> line = Places(np.stack([np.arange(7), np.zeros(7, int)], axis=1), 1)
        >>> [window.tolist() for window in line.windows(3)]
        [[0, 1, 2], [3, 4], [5, 6]]
        """
        if size is None:
            return [np.arange(len(self.column_row))]
        number = np.zeros(len(self.column_row), dtype=int)
        for axis, step in ((1, 1), (0, self.step)):
            place = self.column_row[:, axis] // step
            extent = int(place.max()) + 1
            count = -(-extent // size)
            starts = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(extent), count))])[:-1]
            number = number * count + np.searchsorted(starts, place, side="right") - 1
        return [np.flatnonzero(number == window) for window in np.unique(number)]


def check_window(recipe: Any) -> None:
    """Raise `ValueError` if `window` is neither `None` nor an integer of at least 2."""
    size = recipe.window
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
        raise ValueError(
            f"Expected `window` of {type(recipe).__name__} to be None or an integer of 2 or more, found {size!r}."
        )
