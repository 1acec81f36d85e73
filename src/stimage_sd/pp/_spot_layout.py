"""Lay out pseudo-spots on a lattice within the measured area, or on existing shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stimage_sd import contract
from stimage_sd.image import aggregation

Onto = Literal["hex", "grid", "spots"]
#: rounding tolerance for circles that touch the border from inside, share of the diameter
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Spots:
    """Spots to aggregate onto.

    - `shapes`: circles or polygons in H&E pixels, one row per spot, indexed by instance id.
    - `obs`: one row per spot, indexed by spot id, with ``array_row`` and ``array_col`` for spots of an array.
    - `regions`: the same shapes as search regions.
    - `diameter`: diameter of a spot, px. For polygons, the diameter of a circle of their median area.
    """

    shapes: gpd.GeoDataFrame
    obs: pd.DataFrame
    regions: aggregation.Regions
    diameter: float


def lay_lattice(field: shapely.Polygon, *, onto: Literal["hex", "grid"], pitch: float, diameter: float) -> Spots:
    """Lay a lattice of circles over a field, centered along x and y.

    - `field`: the measured area. Circles that do not lie wholly within it are left out.
    - `onto`: ``"hex"``: six neighbors at one pitch, with rows along x. Rows and columns are numbered like those of
      Visium: neighbors in a row are two columns apart, and odd rows hold odd columns. ``"grid"``: four neighbors.
    - `pitch`, `diameter`: distance between neighbors and diameter of a circle, H&E px.
    - returns: the spots. Ids are built from the centers, so that spots with the same id lie at the same place.

    >>> spots = lay_lattice(shapely.box(0, 0, 100, 100), onto="grid", pitch=50.0, diameter=40.0)
    >>> spots.obs.index.tolist()
    ['x25y25', 'x75y25', 'x25y75', 'x75y75']
    """
    if pitch < 2:
        raise ValueError(f"Expected a pitch of two pixels of the H&E at least, found {pitch:.2f} px.")
    lowest_x, lowest_y, highest_x, highest_y = field.bounds
    step = (pitch / 2, pitch * np.sqrt(3) / 2) if onto == "hex" else (pitch, pitch)
    axes = []
    for low, high, along in zip((lowest_x, lowest_y), (highest_x, highest_y), step, strict=True):
        steps = max(int(np.floor((high - low - diameter) / along + _ROUNDING)), 0)
        axes.append((low + high - steps * along) / 2 + along * np.arange(steps + 1))
    row, column = (index.ravel() for index in np.indices((len(axes[1]), len(axes[0]))))
    if onto == "hex":
        in_array = row % 2 == column % 2
        row, column = row[in_array], column[in_array]
    centers = np.column_stack([axes[0][column], axes[1][row]])
    inside = shapely.contains_xy(field, centers)
    inside &= shapely.distance(field.exterior, shapely.points(centers)) >= diameter * (0.5 - _ROUNDING)
    if not inside.any():
        raise ValueError(
            f"No spot of {diameter:.1f} px fits into the measured area, {highest_x - lowest_x:.1f} x "
            f"{highest_y - lowest_y:.1f} px of the H&E. Is the section's resolution right?"
        )
    centers, row, column = centers[inside], row[inside], column[inside]
    names = [f"x{x:.0f}y{y:.0f}" for x, y in centers]
    return Spots(
        shapes=gpd.GeoDataFrame({"radius": np.full(len(centers), diameter / 2)}, geometry=shapely.points(centers)),
        obs=pd.DataFrame({"array_row": row, "array_col": column}, index=names),
        regions=aggregation.circles(centers, diameter / 2),
        diameter=diameter,
    )


def existing_spots(sdata: SpatialData, name: str) -> Spots:
    """Return existing circles or polygons of a section as spots.

    Spots have the ids of the table that annotates the shapes, so that the result matches tiles laid on them. Without a
    table the ids are the index of the shapes.
    """
    element = sdata.shapes[name]
    if len(element) == 0:
        raise ValueError(f"Expected shapes to aggregate onto, found none in {name!r}.")
    matrix = contract.pixel_frame(sdata).matrix(element, name)
    kinds = set(element.geom_type)
    geometry = shapely.transform(element.geometry.to_numpy(), lambda points: contract.apply(matrix, points))
    shapes = gpd.GeoDataFrame(geometry=geometry, index=element.index)
    if kinds == {"Point"} and "radius" in element:
        scales = np.linalg.svd(matrix[:2, :2], compute_uv=False)
        if scales[0] - scales[1] > 1e-3 * scales[0]:
            raise ValueError(f"The transformation of {name!r} makes its circles ellipses. Pass polygons instead.")
        shapes["radius"] = element["radius"].to_numpy(dtype=np.float64) * np.sqrt(scales.prod())
        regions = aggregation.circles(shapely.get_coordinates(geometry), shapes["radius"])
        diameter = 2 * float(shapes["radius"].median())
    elif kinds <= {"Polygon", "MultiPolygon"}:
        regions = aggregation.polygons([_rings(shape) for shape in geometry])
        diameter = float(np.sqrt(4 / np.pi * np.median(shapely.area(geometry))))
    else:
        raise ValueError(f"Expected circles or polygons in shapes {name!r}, found {sorted(kinds)}.")
    return Spots(shapes=shapes, obs=_annotated(sdata, name), regions=regions, diameter=diameter)


def annotating(sdata: SpatialData, name: str) -> list[str]:
    """Return the names of the tables that annotate an element."""
    tables = []
    for table_name, table in sdata.tables.items():
        if name in contract.regions_of(table):
            tables.append(table_name)
    return tables


def placed_box(low: np.ndarray, high: np.ndarray, matrix: np.ndarray) -> shapely.Polygon:
    """Return the box from `low` to `high` (x, y), transformed by a ``(2, 3)`` matrix."""
    corners = shapely.get_coordinates(shapely.box(*low, *high))
    return shapely.Polygon(corners @ matrix[:, :2].T + matrix[:, 2])


def _rings(shape: shapely.Polygon | shapely.MultiPolygon) -> list[np.ndarray]:
    parts = shapely.get_parts(shape)
    return [shapely.get_coordinates(ring) for part in parts for ring in (part.exterior, *part.interiors)]


def _annotated(sdata: SpatialData, name: str) -> pd.DataFrame:
    """Return one row per shape, with the array positions of the first table that annotates all shapes."""
    index = sdata.shapes[name].index
    for table_name in annotating(sdata, name):
        obs = sdata.tables[table_name].obs
        keys = contract.keys_of(sdata.tables[table_name])
        rows = obs[obs[keys[TableModel.REGION_KEY_KEY]] == name]
        where = pd.Index(rows[keys[TableModel.INSTANCE_KEY]]).get_indexer(index)
        if (where >= 0).all():
            return rows.iloc[where][[key for key in ("array_row", "array_col") if key in rows]].copy()
    return pd.DataFrame(index=index.astype(str))
