"""Segments of a tile for explanations: nuclei, superpixels or labels, in every field of view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from skimage.draw import polygon as draw_polygon
from skimage.segmentation import slic
from spatialdata import SpatialData

from stimage_sd import contract

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

#: takes a tile, ``uint8 (y, x, 3)``, and returns segments, ``int (y, x)``, 0 for background
SegmentTile = Callable[[np.ndarray], np.ndarray]
#: superpixels per tile, about the number of nuclei on a tile
N_SUPERPIXELS = 60
SURROUNDINGS = -1
#: x of the columns and y of the rows of a field of view, H&E px
Positions = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Area:
    """Explained square.

    Attributes
    ----------
    center
        x and y, H&E px.
    side
        Side of the square, H&E px.
    pixels
        Pixels of the field of view that covers exactly this square, ``uint8 (y, x, 3)``.
    positions
        Positions of the pixels on the H&E image.
    """

    center: np.ndarray
    side: float
    pixels: np.ndarray
    positions: Positions

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom, H&E px."""
        (x, y), half = self.center, self.side / 2
        return float(x - half), float(y - half), float(x + half), float(y + half)


@dataclass(frozen=True)
class Raster:
    """Labels of a part of the section, ``int (y, x)``, 0 for background."""

    labels: np.ndarray
    left: float
    top: float
    pixel: tuple[float, float]

    def at(self, positions: Positions) -> np.ndarray:
        """Return the labels at a grid of positions, ``int (n_rows, n_columns)``, 0 outside."""
        (columns, in_x), (rows, in_y) = (
            _index(values, start, step, size)
            for values, start, step, size in zip(
                positions, (self.left, self.top), self.pixel, self.labels.shape[::-1], strict=True
            )
        )
        return np.where(in_y[:, None] & in_x, self.labels[rows[:, None], columns], 0)


@dataclass(frozen=True)
class Segments:
    """Segments of a tile.

    Attributes
    ----------
    raster
        Label image of the segments.
    numbers
        Labels in the explained square, ``int (n_segments,)``. Background (0), if present, comes first.
    names
        Names of the segments without the background, such as the nuclei's index.
    geometries
        Polygons of the segments without the background, H&E px.
    area
        The explained square.
    """

    raster: Raster
    numbers: np.ndarray
    names: list[Any]
    geometries: list[shapely.Geometry]
    area: Area

    @property
    def has_background(self) -> bool:
        """Return whether the first segment is the background."""
        return bool(self.numbers[0] == 0)

    def seen_at(self, positions: Positions) -> np.ndarray:
        """Return the segment of each pixel of a field of view, ``int (y, x)``, `SURROUNDINGS` if there is none."""
        labels = self.raster.at(positions)
        place = np.searchsorted(self.numbers, labels).clip(max=len(self.numbers) - 1)
        seen = np.where(self.numbers[place] == labels, place, SURROUNDINGS)
        # background counts as a segment only inside the tile
        return np.where((labels > 0) | self._covers(positions), seen, SURROUNDINGS)

    def background_at(self, positions: Positions) -> np.ndarray:
        """Return whether each pixel of a field of view is background of the tile, ``bool (y, x)``."""
        return (self.raster.at(positions) == 0) & self._covers(positions)

    def without_background(self) -> Segments:
        """Return the segments without the background, which is then never hidden."""
        return replace(self, numbers=self.numbers[self.numbers > 0])

    def _covers(self, positions: Positions) -> np.ndarray:
        x, y = (
            (values >= shown.min()) & (values <= shown.max())
            for values, shown in zip(positions, self.area.positions, strict=True)
        )
        return np.asarray(y[:, None] & x)


def segment_tile(
    sdata: SpatialData, area: Area, segments: str | SegmentTile, nuclei: GeoDataFrame | None
) -> Segments | None:
    """Find the segments of a tile.

    Parameters
    ----------
    sdata
        The section.
    area
        The explained square.
    segments
        ``"nuclei"``, ``"slic"``, the name of labels, or a function.
    nuclei
        The section's nuclei in H&E pixels, if nuclei are the segments.

    Returns
    -------
    The segments, or `None` if the tile has only background.

    Raises
    ------
    ValueError
        If the function's segments are not non-negative integers of the tile's shape.
    """
    if nuclei is not None:
        return _of_nuclei(nuclei, area)
    if segments == "slic":
        labels = slic(area.pixels, n_segments=N_SUPERPIXELS, start_label=1)
    elif isinstance(segments, str):
        margin = area.side / 4  # read labels that cross the tile's border in full
        left, top, right, bottom = area.box
        window = contract.label_window(sdata, segments, (left - margin, top - margin, right + margin, bottom + margin))
        return _of_labels(Raster(window.labels.astype(np.int64), window.left, window.top, window.pixel), area)
    else:
        labels = np.asarray(segments(area.pixels))
    if labels.shape != area.pixels.shape[:2] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(
            f"Expected segments of a tile as whole numbers from 0 (background) of shape {area.pixels.shape[:2]}, found "
            f"{labels.dtype} of shape {labels.shape}."
        )
    pixel = area.side / len(labels)
    return _of_labels(Raster(labels.astype(np.int64), area.box[0], area.box[1], (pixel, pixel)), area)


def _of_nuclei(nuclei: GeoDataFrame, area: Area) -> Segments | None:
    near = np.sort(nuclei.sindex.query(shapely.box(*area.box), predicate="intersects"))
    if near.size == 0:
        return None
    shapes = list(nuclei.geometry.iloc[near])
    bounds = np.array([*(shape.bounds for shape in shapes), area.box])
    left, top = np.floor(bounds[:, :2].min(axis=0))
    width, height = (np.ceil(bounds[:, 2:].max(axis=0)) - (left, top)).astype(int)
    labels = np.zeros((height, width), np.int64)
    for label, shape in enumerate(shapes, start=1):
        for part in shapely.get_parts(shape):
            # draw the pixels whose center is inside
            x, y = np.asarray(part.exterior.coords)[:, :2].T - np.array([[left], [top]]) - 0.5
            labels[draw_polygon(y, x, labels.shape)] = label
    raster = Raster(labels, float(left), float(top), (1.0, 1.0))
    numbers = np.unique(raster.at(area.positions))
    shown = numbers[numbers > 0] - 1
    if shown.size == 0:
        return None
    return Segments(raster, numbers, list(nuclei.index[near[shown]]), [shapes[label] for label in shown], area)


def _of_labels(raster: Raster, area: Area) -> Segments | None:
    numbers = np.unique(raster.at(area.positions))
    shown = numbers[numbers > 0]
    if shown.size == 0:
        return None
    return Segments(raster, numbers, shown.tolist(), [_outline(raster, label) for label in shown], area)


def _outline(raster: Raster, label: int) -> shapely.Geometry:
    """Return the outline of a label's pixels, H&E px."""
    inside = np.pad(raster.labels == label, ((0, 0), (1, 1))).astype(np.int8)
    rows, starts = np.nonzero(np.diff(inside, axis=1) == 1)
    _, stops = np.nonzero(np.diff(inside, axis=1) == -1)
    (width, height), left, top = raster.pixel, raster.left, raster.top
    runs = shapely.box(left + starts * width, top + rows * height, left + stops * width, top + (rows + 1) * height)
    return shapely.union_all(runs)


def _index(values: np.ndarray, start: float, step: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    index = np.floor((values - start) / step).astype(np.int64)
    return index.clip(0, size - 1), (index >= 0) & (index < size)


def check_segments(sdata: SpatialData, segments: str | SegmentTile, shapes_key: str | None) -> GeoDataFrame | None:
    """Return the nuclei if they are the segments, and raise if the named labels do not exist."""
    if segments == "nuclei":
        return contract.nuclei(sdata, shapes_key)
    if isinstance(segments, str) and segments != "slic" and segments not in sdata.labels:
        raise ValueError(
            f'Expected `segments` to be "nuclei", "slic", a function, or one of the labels {sorted(sdata.labels)}, '
            f"found {segments!r}."
        )
    return None


def present(segments: np.ndarray) -> np.ndarray:
    """Return the sorted numbers of the segments in a field of view."""
    numbers = np.unique(segments)
    return numbers[numbers >= 0]


def background_color(pixels: np.ndarray, background: np.ndarray) -> tuple[int, int, int]:
    """Return the mean color of the background, or of all pixels if there is none."""
    mean = pixels[background].mean(axis=0) if background.any() else pixels.reshape(-1, 3).mean(axis=0)
    red, green, blue = (int(value) for value in mean)
    return red, green, blue
