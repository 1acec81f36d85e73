"""Find nuclei in blocks of a slide, and merge the blocks without losing or duplicating nuclei.

A block is a window with a core. The cores cover the image once. The windows overlap by the margins, so every nucleus
lies whole in the window whose core holds its center, and belongs to that block. The nuclei of a block pass through the
tile stream as one array of fixed length: first the measurements, then the points of the outlines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import shapely
import xarray as xr
from numpy.typing import NDArray

from stimage_sd.image.label_maps import LabelMap, means_within, measure_objects, trace_objects
from stimage_sd.image.nuclear_contrast import hematoxylin
from stimage_sd.stream.driver import TileJob, iterate_over_tiles

#: returns label maps, or label maps and ``float32 (batch, y, x, n_values)`` to average over every nucleus
LabelFunction = Callable[[NDArray[np.uint8]], NDArray[np.integer] | tuple[NDArray[np.integer], NDArray[np.float32]]]

#: numbers per nucleus before the values: number of outline points, x, y, eccentricity, hematoxylin
_HEADER = 5
#: length of the packed array, as a share of a window's pixels: about 10,000 nuclei of 16 px per megapixel
_ROOM = 0.5
#: outline corners this close to the line without them are left out, px
_TOLERANCE = 0.5
#: nuclei of different blocks are the same if they share more than this share of the smaller one
_SAME = 0.3


class Nuclei(NamedTuple):
    """Nuclei and their measurements.

    - `outlines`: polygons, object array ``(n,)``, px of the full resolution.
    - `centers`: ``float64 (n, 2)``, x and y, px of the full resolution.
    - `eccentricity`, `hematoxylin`: ``float64 (n,)``. Hematoxylin is the natural-log optical density.
    - `values`: ``float64 (n, n_values)``: means of the function's values over the pixels of a nucleus.
    """

    outlines: NDArray[np.object_]
    centers: NDArray[np.float64]
    eccentricity: NDArray[np.float64]
    hematoxylin: NDArray[np.float64]
    values: NDArray[np.float64]

    def chosen(self, which: NDArray[np.generic]) -> Nuclei:
        """Return the nuclei selected by a mask or an order."""
        return Nuclei(*(column[which] for column in self))


@dataclass(frozen=True)
class Blocks:
    """Windows of one size and their cores, px of the full resolution.

    - `downsample`: Full-resolution pixels per pixel of the working resolution.
    - `side`: side of the windows, px of the working resolution.
    - `corners`: ``float64 (n_blocks, 2)``, x and y of the windows' corners.
    - `cores`: ``float64 (n_blocks, 4)``: left, top, right, bottom. The right and bottom edges belong to the next core.
    """

    downsample: float
    side: int
    corners: NDArray[np.float64]
    cores: NDArray[np.float64]

    @property
    def centers(self) -> NDArray[np.float64]:
        """Return the centers of the windows, ``(n_blocks, 2)``."""
        return np.asarray(self.corners + self.side * self.downsample / 2, dtype=np.float64)

    def chosen(self, which: NDArray[np.bool_]) -> Blocks:
        """Return the blocks selected by a mask."""
        return Blocks(self.downsample, self.side, self.corners[which], self.cores[which])


def lay_blocks(width: int, height: int, *, downsample: float, core: int, margin: int) -> Blocks:
    """Cover an image with blocks.

    - `width`, `height`: size of the image, px of the full resolution.
    - `downsample`: Full-resolution pixels per pixel of the working resolution.
    - `core`, `margin`: side of a core and width of the margin around it, px of the working resolution. Both shrink on a
      small image.
    - returns: all blocks, row by row. No window reaches over the image border, so no nucleus is mirrored.

    >>> blocks = lay_blocks(200, 100, downsample=1, core=60, margin=20)
    >>> blocks.corners.tolist(), blocks.cores[:, 0].tolist()
    ([[0.0, 0.0], [60.0, 0.0], [100.0, 0.0]], [0.0, 80.0, 120.0])
    """
    sizes = (max(1, int(width / downsample)), max(1, int(height / downsample)))
    side = min(core + 2 * margin, *sizes)
    margin = min(margin, side // 4)
    (columns, x_edges), (rows, y_edges) = (_along(size, side, margin) for size in sizes)
    for edges, length in ((x_edges, width), (y_edges, height)):
        edges *= downsample
        edges[-1] = length  # no window reaches the rest of the division
    row, column = (index.ravel() for index in np.indices((len(rows), len(columns))))
    return Blocks(
        downsample=downsample,
        side=side,
        corners=np.asarray(np.stack([columns[column], rows[row]], axis=1) * downsample, dtype=np.float64),
        cores=np.stack([x_edges[column], y_edges[row], x_edges[column + 1], y_edges[row + 1]], axis=1),
    )


def _along(size: int, side: int, margin: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the first pixels of ``n`` windows along an axis, and the ``n + 1`` edges of their cores."""
    step = side - 2 * margin
    n_windows = 1 + max(0, -(-(size - side) // step))
    starts = np.minimum(np.arange(n_windows) * step, size - side)
    edges = np.concatenate([[0], starts[1:] + margin, [size]]).astype(np.float64)
    return starts, edges


def find_in_blocks(
    pyramid: list[xr.DataArray],
    blocks: Blocks,
    function: LabelFunction,
    *,
    key: str,
    n_jobs: int | None,
    description: str,
    n_values: int = 0,
) -> Iterator[Nuclei]:
    """Find nuclei block by block, through the tile stream.

    - `pyramid`: levels of the image, finest first.
    - `blocks`: the blocks to search.
    - `function`: ``uint8 (batch, y, x, 3)`` to integer label maps ``(batch, y, x)`` with 0 for background, or to label
      maps and pixel values ``float32 (batch, y, x, n_values)``.
    - `key`: identifier of the function, as in `stimage_sd.stream.driver.TileJob`.
    - `n_jobs`, `description`: as in `stimage_sd.stream.driver.iterate_over_tiles`.
    - `n_values`: number of values per pixel.
    - yields: the nuclei with centers in a block's core, block by block.
    """
    # values need room for at most one nucleus per 60 pixels
    room = int(_ROOM * blocks.side**2) + 1 + n_values * (blocks.side**2 // 60)
    job = TileJob(
        pyramid=pyramid,
        centers=blocks.centers,
        function=PackedNuclei(function, room, n_values),
        sides=[blocks.side * blocks.downsample],
        target=blocks.side,
        key=key,
        shape=(room,),
        batch_size=1,
    )
    for rows, values in iterate_over_tiles(job, n_jobs=n_jobs, description=description):
        for block, packed in zip(rows, values[:, 0], strict=True):
            nuclei = _unpack(packed, blocks.corners[block], blocks.downsample, n_values)
            left, top, right, bottom = blocks.cores[block]
            x, y = nuclei.centers.T
            yield nuclei.chosen((x >= left) & (x < right) & (y >= top) & (y < bottom))


@dataclass(frozen=True)
class PackedNuclei:
    """Find the nuclei of windows, and pack them into arrays of fixed length for the tile stream.

    - `function`: the function that returns label maps.
    - `room`: length of the arrays.
    - `n_values`: number of values per nucleus.
    """

    function: LabelFunction
    room: int
    n_values: int = 0

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the packed nuclei, ``float32 (batch, room)``."""
        result = self.function(images)
        labels, values = result if isinstance(result, tuple) else (np.asarray(result), None)
        if labels.shape != images.shape[:3] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"Expected `method` to give integer labels of shape {images.shape[:3]} for images of shape "
                f"{images.shape}, found {labels.dtype} of shape {labels.shape}."
            )
        if labels.size and labels.min() < 0:
            raise ValueError(f"Expected `method` to give labels of at least 0, found {labels.min()}.")
        n_values = 0 if values is None else values.shape[-1]
        if n_values != self.n_values:
            raise ValueError(f"Expected {self.n_values} values per pixel, found {n_values}.")
        pixels = [None] * len(images) if values is None else list(values)
        return np.stack([self._pack(*parts) for parts in zip(images, labels, pixels, strict=True)])

    def _pack(
        self, image: NDArray[np.uint8], labels: NDArray[np.integer], values: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        label_map = LabelMap.of(labels)
        measured = measure_objects(label_map, hematoxylin(np.moveaxis(image, -1, 0)))
        outlines = trace_objects(label_map, measured.labels, tolerance=_TOLERANCE)
        n_points = [len(outline) for outline in outlines]
        points = np.concatenate([np.empty((0, 2), np.int32), *outlines]).ravel()
        means = np.empty((len(outlines), 0)) if values is None else means_within(label_map, values)
        header = np.column_stack([n_points, measured.centers, measured.eccentricity, measured.mean, means])
        needed = 1 + header.size + points.size
        if needed > self.room:
            raise ValueError(
                f"Found {len(outlines)} nuclei whose outlines have {points.size // 2} points in a block of "
                f"{image.shape[1]} x {image.shape[0]} px, more than there is room for ({needed} numbers of "
                f"{self.room}). Check that `method` gives one label to each nucleus, and not one to each pixel."
            )
        packed = np.zeros(self.room, dtype=np.float32)
        packed[0] = len(outlines)
        packed[1:needed] = np.concatenate([header.ravel(), points])
        return packed


def _unpack(packed: NDArray[np.float32], corner: NDArray[np.float64], downsample: float, n_values: int) -> Nuclei:
    n_nuclei, width = int(packed[0]), _HEADER + n_values
    header = packed[1 : 1 + n_nuclei * width].reshape(n_nuclei, width).astype(np.float64)
    n_points = header[:, 0].astype(np.int64)
    start = 1 + n_nuclei * width
    points = packed[start : start + 2 * n_points.sum()].reshape(-1, 2).astype(np.float64)
    # move from pixel corners to pixel centers
    outlines = _polygons(points + 0.5, n_points)
    return Nuclei(
        outlines=shapely.transform(outlines, lambda places: places * downsample + corner),
        centers=header[:, 1:3] * downsample + corner,
        eccentricity=header[:, 3],
        hematoxylin=header[:, 4],
        values=header[:, _HEADER:],
    )


def _polygons(points: NDArray[np.float64], n_points: NDArray[np.int64]) -> NDArray[np.object_]:
    """Return valid polygons without holes around objects, from the centers of their border pixels."""
    few = np.maximum(3 - n_points, 0)  # a ring needs three points: repeat the last one of shorter outlines
    owner = np.repeat(np.arange(len(n_points)), n_points + few)
    places = np.arange(len(owner)) - np.repeat(np.cumsum(n_points + few) - (n_points + few), n_points + few)
    first = np.cumsum(n_points) - n_points
    index = first[owner] + np.minimum(places, n_points[owner] - 1)
    rings = shapely.polygons(shapely.linearrings(points[index], indices=owner))
    grown = shapely.buffer(shapely.make_valid(rings), 0.5, cap_style="square", join_style="mitre")
    return shapely.polygons(shapely.get_exterior_ring(grown))


def stitch(parts: list[Nuclei]) -> Nuclei:
    """Merge the nuclei of blocks.

    - `parts`: the nuclei with centers in the block's core, per block.
    - returns: all nuclei, sorted by their centers from top to bottom, then from left to right. Of a nucleus that two
      blocks found, the larger outline is kept.

    >>> import numpy as np, shapely
    >>> rest = (np.zeros(1), np.zeros(1), np.zeros((1, 0)))
    >>> one, two = (
    ...     Nuclei(np.array([shapely.box(0, 0, right, 9)]), np.array([[right / 2, 4.5]]), *rest) for right in (8, 10)
    ... )
    >>> stitch([one, two]).centers.tolist()
    [[5.0, 4.5]]
    """
    block = np.repeat(np.arange(len(parts)), [len(part.centers) for part in parts])
    merged = Nuclei(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    area = shapely.area(merged.outlines)
    one, other = shapely.STRtree(merged.outlines).query(merged.outlines, predicate="intersects")
    pairs = (block[one] < block[other]).nonzero()[0]
    one, other = one[pairs], other[pairs]
    shared = shapely.area(shapely.intersection(merged.outlines[one], merged.outlines[other]))
    same = shared > _SAME * np.minimum(area[one], area[other])
    keep = np.ones(len(area), dtype=bool)
    for first, second in zip(one[same], other[same], strict=True):
        if keep[first] and keep[second]:
            keep[second if area[first] >= area[second] else first] = False
    kept = merged.chosen(keep)
    return kept.chosen(np.lexsort((kept.centers[:, 0], kept.centers[:, 1])))
