"""Sums and means in spots of what was measured in cells or bins, and of the pixels of an image."""

from __future__ import annotations

from dataclasses import dataclass

import dask.array as da
import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely
import xarray as xr
from anndata import AnnData
from dask.delayed import delayed
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.nn import aggregation
from stimage_sd.pp._aggregate_common import Measured, in_batches
from stimage_sd.pp._spot_layout import global_matrix, placed_box

#: a spot spans so many pixels of the pyramid level that is read, at least
PIXELS_ACROSS = 20
_AS_THEY_ARE = np.eye(2, 3)


@dataclass(frozen=True)
class Units:
    """Cells or bins of a section.

    Attributes
    ----------
    table
        What was measured in them, with ``obsm["spatial"]``.
    against
        Whether that is counts, which add up, or proteins, whose mean is taken.
    placed
        ``(2, 3)``, from ``obsm["spatial_um"]`` to pixels of the H&E; `None` where there are no such positions.
    """

    table: AnnData
    against: contract.Against
    placed: np.ndarray | None

    def field(self, n_workers: int | None) -> shapely.Polygon:
        """The smallest box around all centroids, in the instrument's coordinates where they are known."""
        key, matrix = ("spatial", _AS_THEY_ARE) if self.placed is None else (contract.SPATIAL_UM, self.placed)
        positions = np.asarray(self.table.obsm[key], dtype=np.float64)
        return placed_box(positions.min(axis=0), positions.max(axis=0), matrix)

    def measure(self, regions: aggregation.Regions, n_workers: int | None) -> Measured:
        """Add up the counts, or take the mean of the proteins, of the cells whose centroids lie in each region."""
        x, y = np.asarray(self.table.obsm["spatial"], dtype=np.float64).T
        member = aggregation.count(regions, x, y, np.arange(len(x), dtype=np.int32), n_labels=len(x))
        n_units = np.diff(member.indptr).astype(np.int64)
        values = self.table.X
        if self.against == "counts":
            whole = (
                values.astype(np.int32) if sp.issparse(values) else sp.csr_matrix(np.asarray(values), dtype=np.int32)
            )
            summed = sp.csr_matrix(member @ whole)
            summed.eliminate_zeros()
            summed.sort_indices()
            return Measured(values=summed, var=self.table.var.copy(), n_units=n_units)
        dense = values.toarray() if sp.issparse(values) else np.asarray(values)
        sums = member.astype(np.float64) @ dense.astype(np.float64)
        return Measured(values=_means(sums, n_units), var=self.table.var.copy(), n_units=n_units)


def unit_tables(sdata: SpatialData) -> list[str]:
    """Return the names of a section's tables that may be of cells or bins."""
    others = (contract.SPOT_COUNTS, contract.SPOT_PROTEINS, contract.TILES, contract.PREDICTIONS, contract.GENE_CLASSES)
    return sorted(set(sdata.tables) - set(others))


def find_units(sdata: SpatialData, *, table_key: str | None) -> Units:
    """Look up the table of a section's own units: not of spots that were made of them.

    Raises
    ------
    KeyError
        If there is no such table.
    ValueError
        If its units are not placed on the H&E, or counts are no counts.
    """
    if table_key is None:
        own = [name for name in (contract.COUNTS, contract.PROTEINS) if name in sdata.tables]
        table_key = own[0] if own else contract.counts_name(sdata)
        if table_key == contract.SPOT_COUNTS:
            raise KeyError(f"Which table is that of the cells? Choose with `table_key=` from {unit_tables(sdata)}.")
    elif table_key not in sdata.tables:
        raise KeyError(f"No table {table_key!r}; this section's tables: {sorted(sdata.tables)}.")
    is_protein = table_key in (contract.PROTEINS, contract.info(sdata).get("proteins"))
    table = contract.proteins(sdata, table_key) if is_protein else contract.counts(sdata, table_key)
    matrix = contract.instrument_matrix(sdata) if contract.SPATIAL_UM in table.obsm else None
    placed = None if matrix is None else np.ascontiguousarray(matrix[:2])
    return Units(table=table, against="proteins" if is_protein else "counts", placed=placed)


@dataclass(frozen=True)
class Image:
    """An image of any number of channels.

    Attributes
    ----------
    levels
        Its pyramid, finest first, each ``(c, y, x)``, lazy.
    matrix
        ``(2, 3)``, from ``(x, y, 1)`` of the finest level to pixels of the H&E.
    """

    levels: list[xr.DataArray]
    matrix: np.ndarray

    def field(self, n_workers: int | None) -> shapely.Polygon:
        """The image's own outline."""
        height, width = self.levels[0].shape[1:]
        return placed_box(np.zeros(2), np.array([width, height], dtype=np.float64), self.matrix)

    def measure(self, regions: aggregation.Regions, n_workers: int | None) -> Measured:
        """Take each channel's mean over the pixels whose centres lie in each region."""
        sizes = regions.bounds[:, 2:] - regions.bounds[:, :2]
        number, matrix = self._level(float(np.median(sizes)))
        level = self.levels[number]
        where = delayed(regions, traverse=False)
        tasks = [
            delayed(_sum_block, pure=False)(list(blocks), where, to_global)
            for blocks, to_global in _blocks(level.data, regions, matrix)
        ]
        sums, pixels = np.zeros((len(sizes), level.shape[0])), np.zeros(len(sizes), dtype=np.int64)
        for touched, added, counted in in_batches(tasks, description="image", n_workers=n_workers):
            sums[touched] += added
            pixels[touched] += counted
        var = pd.DataFrame(index=[str(channel) for channel in level.coords["c"].values])
        return Measured(values=_means(sums, pixels), var=var, n_units=pixels, notes={"level": number})

    def _level(self, diameter: float) -> tuple[int, np.ndarray]:
        """The coarsest level that is fine enough for spots of a diameter, and its matrix."""
        finest = self.levels[0].shape
        for number in reversed(range(len(self.levels))):
            shape = self.levels[number].shape
            scale = np.diag([finest[2] / shape[2], finest[1] / shape[1], 1.0])
            matrix = self.matrix @ scale
            if number == 0 or np.sqrt(abs(np.linalg.det(matrix[:, :2]))) * PIXELS_ACROSS <= diameter:
                break
        return number, matrix


def find_image(sdata: SpatialData, *, image_key: str | None) -> Image:
    """Look up a section's multiplex image.

    Raises
    ------
    KeyError
        If there is no such image.
    ValueError
        If it is not placed on the H&E.
    """
    name = contract.MULTIPLEX if image_key is None else image_key
    if name not in sdata.images:
        raise KeyError(f"No image {name!r}; this section's images: {sorted(sdata.images)}. Choose with `image_key=`.")
    return Image(levels=contract.levels(sdata, name), matrix=global_matrix(sdata, name, sdata.images[name]))


def _blocks(array: da.Array, regions: aggregation.Regions, matrix: np.ndarray) -> list[tuple[list, np.ndarray]]:
    """Chunks of an image that regions may touch, those of all channels together, and the matrix of each."""
    chunks = array.to_delayed()
    tops, lefts = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in array.chunks[1:])
    low, high = regions.bounds[:, :2], regions.bounds[:, 2:]
    found = []
    for row, column in np.ndindex(chunks.shape[1:]):
        corner = np.array([lefts[column], tops[row]], dtype=np.float64)
        opposite = np.array([lefts[column + 1], tops[row + 1]], dtype=np.float64)
        bounds = placed_box(corner, opposite, matrix).bounds
        if ((low <= bounds[2:]) & (high >= bounds[:2])).all(axis=1).any():
            shifted = matrix.copy()
            shifted[:, 2] += matrix[:, :2] @ corner
            found.append((chunks[:, row, column].tolist(), shifted))
    return found


def _sum_block(
    blocks: list[np.ndarray], regions: aggregation.Regions, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which regions one place of the image touches, their sums by channel, and how many pixels."""
    parts = [aggregation.sum_pixels(regions, block, matrix=matrix) for block in blocks]
    pixels = parts[0][1]
    touched = np.flatnonzero(pixels)
    return touched, np.hstack([sums for sums, _ in parts])[touched], pixels[touched]


def _means(sums: np.ndarray, n_units: np.ndarray) -> np.ndarray:
    """Means, ``float32``; those of nothing are 0."""
    return (sums / np.maximum(n_units, 1)[:, None]).astype(np.float32)
