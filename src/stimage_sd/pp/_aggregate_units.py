"""Aggregate cells, bins or image pixels into spots, as sums or means."""

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
from stimage_sd.image import aggregation
from stimage_sd.pp._aggregate_common import Measured, in_batches
from stimage_sd.pp._spot_layout import placed_box
from stimage_sd.stream.cutting import coarsest_level

#: least number of pixels across a spot in the pyramid level that is read
PIXELS_ACROSS = 20
_AS_THEY_ARE = np.eye(2, 3)


@dataclass(frozen=True)
class Units:
    """Cells or bins of a section.

    - `table`: measurements of the cells or bins.
    - `positions`: ``(n, 2)`` x and y of the centers, H&E px.
    - `against`: ``"counts"``, which are summed, or ``"proteins"``, which are averaged.
    - `placed`: ``(3, 3)`` matrix from the instrument's coordinates to H&E pixels. `None` if the two are the same.
    """

    table: AnnData
    positions: np.ndarray
    against: contract.Against
    placed: np.ndarray | None

    def field(self, n_jobs: int | None) -> shapely.Polygon:
        """Return the bounding box of all centroids, in the instrument's coordinates if they are known."""
        if self.placed is None:
            return placed_box(self.positions.min(axis=0), self.positions.max(axis=0), _AS_THEY_ARE)
        to_shapes = np.linalg.inv(self.placed)
        positions = contract.apply(to_shapes, self.positions)
        return placed_box(positions.min(axis=0), positions.max(axis=0), self.placed[:2])

    def measure(self, regions: aggregation.Regions, n_jobs: int | None) -> Measured:
        """Sum the counts, or average the proteins, of the cells whose centroids lie in each region."""
        x, y = np.ascontiguousarray(self.positions.T)
        member = aggregation.count(regions, x, y, np.arange(len(x), dtype=np.int32), n_labels=len(x))
        n_units = np.diff(member.indptr).astype(np.int64)
        values = self.table.X
        if self.against == "counts":
            whole = sp.csr_matrix(values)
            # no spot holds more than the total, so the total fixes the integer type
            whole = whole.astype(contract.count_type(whole.sum(dtype=np.float64)))
            summed = sp.csr_matrix(member @ whole)
            summed.eliminate_zeros()
            summed.sort_indices()
            return Measured(values=summed, var=self.table.var.copy(), n_units=n_units)
        dense = values.toarray() if sp.issparse(values) else np.asarray(values)
        sums = member.astype(np.float64) @ dense.astype(np.float64)
        return Measured(values=_means(sums, n_units), var=self.table.var.copy(), n_units=n_units)


def find_units(sdata: SpatialData, *, table_key: str | None, layer: str | None) -> Units:
    """Return the cells or bins of a section, not the spots that were made from them."""
    name = contract.cell_table_name(sdata, table_key)
    is_protein = name in (contract.PROTEINS, contract.info(sdata).get("proteins"))
    table = contract.proteins(sdata, name) if is_protein else contract.counts(sdata, contract.Source(name, layer))
    units = contract.units_of(sdata, name)
    placed = None
    if units.shapes in sdata.shapes:
        matrix = contract.pixel_frame(sdata).matrix(sdata.shapes[units.shapes], units.shapes)
        placed = None if np.array_equal(matrix, np.eye(3)) else matrix
    return Units(
        table=table,
        positions=units.positions(sdata),
        against="proteins" if is_protein else "counts",
        placed=placed,
    )


@dataclass(frozen=True)
class Image:
    """Image with any number of channels.

    - `levels`: pyramid levels, finest first, lazy ``(c, y, x)`` arrays.
    - `matrix`: ``(2, 3)`` matrix from ``(x, y, 1)`` of the finest level to H&E pixels.
    """

    levels: list[xr.DataArray]
    matrix: np.ndarray

    def field(self, n_jobs: int | None) -> shapely.Polygon:
        """Return the outline of the image on the H&E."""
        height, width = self.levels[0].shape[1:]
        return placed_box(np.zeros(2), np.array([width, height], dtype=np.float64), self.matrix)

    def measure(self, regions: aggregation.Regions, n_jobs: int | None) -> Measured:
        """Compute the mean of each channel over the pixels whose centers lie in each region."""
        sizes = regions.bounds[:, 2:] - regions.bounds[:, :2]
        index, matrix = self._level(float(np.median(sizes)))
        level = self.levels[index]
        where = delayed(regions, traverse=False)
        tasks = [
            delayed(_sum_block, pure=False)(list(blocks), where, to_global)
            for blocks, to_global in _blocks(level.data, regions, matrix)
        ]
        sums, pixels = np.zeros((len(sizes), level.shape[0])), np.zeros(len(sizes), dtype=np.int64)
        for touched, added, counted in in_batches(tasks, description="image", n_jobs=n_jobs):
            sums[touched] += added
            pixels[touched] += counted
        var = pd.DataFrame(index=[str(channel) for channel in level.coords["c"].values])
        return Measured(values=_means(sums, pixels), var=var, n_units=pixels, notes={"level": index})

    def _level(self, diameter: float) -> tuple[int, np.ndarray]:
        """Return the coarsest level that is fine enough for the spot diameter, and its matrix."""
        height, width = self.levels[0].shape[1:]
        scales = [(width / level.shape[2], height / level.shape[1], 1.0) for level in self.levels]
        matrices = [self.matrix @ np.diag(scale) for scale in scales]
        index = coarsest_level([*map(contract.scale_of, matrices)], diameter / PIXELS_ACROSS, tolerance=0.0)
        return index, matrices[index]


def find_image(sdata: SpatialData, *, image_key: str | None) -> Image:
    """Return a section's multiplex image."""
    name = contract.MULTIPLEX if image_key is None else image_key
    if name not in sdata.images:
        raise KeyError(f"No image {name!r}; this section's images: {sorted(sdata.images)}. Choose with `image_key=`.")
    return Image(
        levels=contract.levels(sdata, name), matrix=contract.pixel_frame(sdata).matrix(sdata.images[name], name)[:2]
    )


def _blocks(array: da.Array, regions: aggregation.Regions, matrix: np.ndarray) -> list[tuple[list, np.ndarray]]:
    """Return the chunks that regions may touch, grouped over channels, and the matrix of each group."""
    chunks = array.to_delayed()
    tops, lefts = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in array.chunks[1:])
    low, high = regions.bounds[:, :2], regions.bounds[:, 2:]
    pieces = []
    for row, column in np.ndindex(chunks.shape[1:]):
        corner = np.array([lefts[column], tops[row]], dtype=np.float64)
        opposite = np.array([lefts[column + 1], tops[row + 1]], dtype=np.float64)
        bounds = placed_box(corner, opposite, matrix).bounds
        if ((low <= bounds[2:]) & (high >= bounds[:2])).all(axis=1).any():
            shifted = matrix.copy()
            shifted[:, 2] += matrix[:, :2] @ corner
            pieces.append((chunks[:, row, column].tolist(), shifted))
    return pieces


def _sum_block(
    blocks: list[np.ndarray], regions: aggregation.Regions, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the regions that a chunk touches, their sums per channel and their numbers of pixels."""
    parts = [aggregation.sum_pixels(regions, block, matrix=matrix) for block in blocks]
    pixels = parts[0][1]
    touched = np.flatnonzero(pixels)
    return touched, np.hstack([sums for sums, _ in parts])[touched], pixels[touched]


def _means(sums: np.ndarray, n_units: np.ndarray) -> np.ndarray:
    """Return means as ``float32``, 0 where there are no units."""
    return (sums / np.maximum(n_units, 1)[:, None]).astype(np.float32)
