"""Where pseudo-spots lie: on a lattice within what was measured, or on shapes that are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from spatialdata import SpatialData
from spatialdata.models import TableModel
from spatialdata.transformations import get_transformation

from stimage_sd import contract
from stimage_sd.nn import aggregation

Onto = Literal["hex", "grid", "spots"]
#: a disc that reaches over a border by so much of its diameter touches it from inside: rounding
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Spots:
    """Spots to aggregate onto.

    Attributes
    ----------
    shapes
        Circles or polygons in pixels of the H&E, a row a spot; its index holds the instance ids.
    obs
        A row a spot under its id, with ``array_row`` and ``array_col`` where spots stand in an array.
    regions
        The same shapes, to be searched.
    diameter
        Diameter of a spot, px; of polygons that of a circle of their median area.
    """

    shapes: gpd.GeoDataFrame
    obs: pd.DataFrame
    regions: aggregation.Regions
    diameter: float


def lay_lattice(field: shapely.Polygon, *, onto: Literal["hex", "grid"], pitch: float, diameter: float) -> Spots:
    """Lay circles over a field: a lattice along x and y, its remainder shared by both borders.

    Parameters
    ----------
    field
        What was measured; circles that do not lie wholly within are left out.
    onto
        ``"hex"``: six neighbours at one pitch, rows along x, numbered as Visium's: neighbours in a row are two columns
        apart, odd rows hold odd columns. ``"grid"``: four neighbours.
    pitch, diameter
        Distance of neighbours and size of a circle, in the field's unit, px.

    Returns
    -------
    The spots. Their ids are made of their centres, so that spots of one id lie at one place.

    Raises
    ------
    ValueError
        If no circle fits, or the pitch is below two pixels.

    Examples
    --------
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
    centres = np.column_stack([axes[0][column], axes[1][row]])
    inside = shapely.contains_xy(field, centres)
    inside &= shapely.distance(field.exterior, shapely.points(centres)) >= diameter * (0.5 - _ROUNDING)
    if not inside.any():
        raise ValueError(
            f"No spot of {diameter:.1f} px fits into what was measured, {highest_x - lowest_x:.1f} x "
            f"{highest_y - lowest_y:.1f} px of the H&E. Is the section's resolution right?"
        )
    centres, row, column = centres[inside], row[inside], column[inside]
    names = [f"x{x:.0f}y{y:.0f}" for x, y in centres]
    return Spots(
        shapes=gpd.GeoDataFrame({"radius": np.full(len(centres), diameter / 2)}, geometry=shapely.points(centres)),
        obs=pd.DataFrame({"array_row": row, "array_col": column}, index=names),
        regions=aggregation.circles(centres, diameter / 2),
        diameter=diameter,
    )


def existing_spots(sdata: SpatialData, name: str) -> Spots:
    """Take the shapes of a section, circles or polygons, as they are.

    Spots have the ids of the table that annotates them, so that what is aggregated matches tiles that were laid
    on them; shapes without a table have their index.

    Raises
    ------
    ValueError
        If they are neither circles nor polygons, or circles that their transformation makes ellipses.
    """
    element = sdata.shapes[name]
    if len(element) == 0:
        raise ValueError(f"Expected shapes to aggregate onto, found none in {name!r}.")
    matrix = global_matrix(sdata, name, element)
    kinds = set(element.geom_type)
    geometry = shapely.transform(element.geometry.to_numpy(), lambda xy: xy @ matrix[:, :2].T + matrix[:, 2])
    shapes = gpd.GeoDataFrame(geometry=geometry, index=element.index)
    if kinds == {"Point"} and "radius" in element:
        scales = np.linalg.svd(matrix[:, :2], compute_uv=False)
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
    found = []
    for table_name, table in sdata.tables.items():
        region = table.uns.get(TableModel.ATTRS_KEY, {}).get(TableModel.REGION_KEY)
        if name == region or (isinstance(region, list) and name in region):
            found.append(table_name)
    return found


def global_matrix(sdata: SpatialData, name: str, element: Any) -> np.ndarray:
    """Return the ``(2, 3)`` matrix from an element's own ``(x, y, 1)`` to pixels of the H&E.

    Raises
    ------
    ValueError
        If the element is not placed on the H&E.
    """
    if "global" not in get_transformation(element, get_all=True):
        raise ValueError(
            f"{name!r} of section {contract.sample(sdata)!r} is not placed on its H&E yet. Run "
            "`stimage_sd.pp.register(sdata)`, or pass the reader the alignment."
        )
    matrix = get_transformation(element, to_coordinate_system="global").to_affine_matrix(("x", "y"), ("x", "y"))
    return np.ascontiguousarray(matrix[:2], dtype=np.float64)


def placed_box(low: np.ndarray, high: np.ndarray, matrix: np.ndarray) -> shapely.Polygon:
    """Return a box, from its lowest to its highest x and y, where a ``(2, 3)`` matrix puts it."""
    corners = shapely.get_coordinates(shapely.box(*low, *high))
    return shapely.Polygon(corners @ matrix[:, :2].T + matrix[:, 2])


def _rings(shape: shapely.Polygon | shapely.MultiPolygon) -> list[np.ndarray]:
    parts = shapely.get_parts(shape)
    return [shapely.get_coordinates(ring) for part in parts for ring in (part.exterior, *part.interiors)]


def _annotated(sdata: SpatialData, name: str) -> pd.DataFrame:
    """A row for each of some shapes: what the first table that annotates all of them knows of the array."""
    index = sdata.shapes[name].index
    for table_name in annotating(sdata, name):
        obs = sdata.tables[table_name].obs
        keys = sdata.tables[table_name].uns[TableModel.ATTRS_KEY]
        own = obs[obs[keys[TableModel.REGION_KEY_KEY]] == name]
        where = pd.Index(own[keys[TableModel.INSTANCE_KEY]]).get_indexer(index)
        if (where >= 0).all():
            return own.iloc[where][[key for key in ("array_row", "array_col") if key in own]].copy()
    return pd.DataFrame(index=index.astype(str))
