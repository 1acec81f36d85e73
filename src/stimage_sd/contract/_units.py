"""Find the measured units of a section (spots, bins or cells), their table rows and their positions."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stimage_sd.contract._affine import apply
from stimage_sd.contract._elements import is_result, keys_of, regions_of
from stimage_sd.contract._frame import centers_in_pixels, mpp, pixel_frame, shapes_in_pixels
from stimage_sd.contract._labels import label_centers
from stimage_sd.contract._names import (
    BINS,
    CELLS,
    COUNTS,
    NOMINAL_SPOT_UM,
    NUCLEI,
    PITCH_UM,
    PROTEINS,
    SPOT_COUNTS,
    SPOT_PROTEINS,
    SPOT_UM,
    SPOTS,
)
from stimage_sd.contract._section import info, sample
from stimage_sd.contract._tables import (
    Against,
    cell_table_name,
    counts_name,
    default_against,
    has_units,
    proteins_name,
)
from stimage_sd.stats.lattice import visium_pitch_px

#: largest difference between a ratio of diameter to pitch and Visium's nominal ratio
_SAME_SPOT = 0.03
#: circles smaller than this diameter are bins or cells, µm
_SMALLEST_SPOT_UM = 25.0
#: columns of ``obs`` with instance ids in tables from other software, beside the instance key
_ID_COLUMNS = ("cell_id",)
_KIND_WORD = re.compile(r"_(labels|boundaries|circles|polygons|shapes|segmentation|masks?)$", re.IGNORECASE)


@dataclass(frozen=True)
class Units:
    """The measured units of a section.

    - `shapes`: name of the element (shapes, labels or points) that holds the units.
    - `table`: name of the table that annotates the units. `None` without such a table.
    - `rows`: rows of the table, ``int64 (n,)``, without rows of other sections and of units that were cropped away.
    - `names`: names of the units: ``obs_names`` of the table, else the index of the shapes.
    - `ids`: ids of the units in the element.
    """

    shapes: str
    table: str | None
    rows: NDArray[np.int64]
    names: pd.Index
    ids: pd.Index

    def positions(self, sdata: SpatialData, image_key: str | None = None) -> NDArray[np.float64]:
        """Return the centers of the units, ``(n, 2)`` x and y, px of the H&E or another image."""
        index, centers = _element_centers(sdata, self.shapes, image_key)
        where = index.get_indexer(self.ids)
        if (where < 0).any():
            raise ValueError(
                f"{int((where < 0).sum())} of {len(where)} units of table {self.table!r} are not in {self.shapes!r}, "
                f"such as {self.ids[int(np.argmax(where < 0))]}. Leave their rows out of the table."
            )
        return centers if np.array_equal(where, np.arange(len(index))) else centers[where]

    def diameter(self, sdata: SpatialData, image_key: str | None = None) -> float:
        """Return the median diameter, px of the H&E. A polygon has the diameter of the circle of its area.

        Visium's scale factors state a diameter of 65 micrometers, and some readers use this for the spots. For circles
        of 0.65 pitches on a Visium array, the diameter of the real spots, 55 micrometers, is returned.
        """
        shapes = shapes_in_pixels(sdata, self.shapes, image_key=image_key)
        if "radius" not in shapes:
            return 2.0 * float(np.sqrt(shapes.geometry.area.median() / np.pi))
        diameter = 2.0 * float(np.median(shapes["radius"]))
        pitch = self.visium_pitch(sdata, image_key)
        is_nominal = pitch is not None and abs(diameter / pitch - NOMINAL_SPOT_UM / PITCH_UM) < _SAME_SPOT
        return float(pitch) * SPOT_UM / PITCH_UM if pitch is not None and is_nominal else diameter

    def visium_pitch(self, sdata: SpatialData, image_key: str | None = None) -> float | None:
        """Return the pitch of the Visium array, px of the H&E, or `None` for units that are not on such an array."""
        table = None if self.table is None else sdata.tables[self.table]
        if table is None or "aggregation" in table.uns or self.shapes not in sdata.shapes:
            return None
        obs = table.obs
        if not {"array_row", "array_col"} <= set(obs.columns):
            return None
        lattice = obs[["array_row", "array_col"]].iloc[self.rows].to_numpy()
        return visium_pitch_px(self.positions(sdata, image_key), lattice)


def has_places(sdata: SpatialData) -> bool:
    """Return whether the section has measured units, or shapes that the user declared as units."""
    return has_units(sdata) or info(sdata).get("unit_shapes") in sdata.shapes


def find_units(
    sdata: SpatialData,
    *,
    shapes_key: str | None = None,
    table_key: str | None = None,
    against: Against | None = None,
) -> Units:
    """Find the measured units: their shapes, and the table rows that annotate them.

    - `sdata`: the section.
    - `shapes_key`, `table_key`: names of the shapes and of the table, if not the section's own.
    - `against`: ``"counts"`` or ``"proteins"``. `None` prefers counts and falls back to proteins.
    """
    if shapes_key is None and table_key is None and info(sdata).get("unit_shapes") in sdata.shapes:
        shapes_key = str(info(sdata)["unit_shapes"])
    if shapes_key is not None and shapes_key not in sdata.shapes:
        raise KeyError(f"No shapes {shapes_key!r}; this section's shapes: {sorted(sdata.shapes)}.")
    if shapes_key is not None and table_key is None:
        table_key = _table_of(sdata, shapes_key, against)
        if table_key is None and has_units(sdata):
            # the same units in other shapes, such as other outlines of the cells
            units = _units_by_id(sdata, cell_table_name(sdata), [shapes_key])
            if units is not None:
                return units
        if table_key is None:
            index = sdata.shapes[shapes_key].index
            return Units(shapes_key, None, np.arange(0), index.astype(str), index)
    if against is None:
        against = default_against(sdata)
    name = counts_name(sdata, table_key) if against == "counts" else proteins_name(sdata, table_key)
    return units_of(sdata, name, shapes_key)


def _table_of(sdata: SpatialData, shapes_key: str, against: Against | None) -> str | None:
    """Return the name of the table that annotates some shapes, with preference for the section's own."""
    annotating = [
        name for name, table in sdata.tables.items() if shapes_key in regions_of(table) and not is_result(name, table)
    ]
    about = info(sdata)
    for name in (about.get(against or "counts"), about.get("proteins"), COUNTS, PROTEINS):
        if name in annotating:
            return str(name)
    if len(annotating) > 1:
        raise KeyError(f"More than one table annotates {shapes_key!r}: {sorted(annotating)}. Choose with `table_key=`.")
    return annotating[0] if annotating else None


def units_of(sdata: SpatialData, table_name: str, shapes_key: str | None = None) -> Units:
    """Find the measured units of a table."""
    table = sdata.tables[table_name]
    regions = regions_of(table)
    shapes_key = shapes_key if shapes_key is not None else info(sdata).get("shapes", {}).get(table_name)
    there = [region for region in regions if _has(sdata, region)]
    if not regions:
        raise ValueError(
            f"The table {table_name!r} of section {sample(sdata)!r} does not say which shapes its rows belong to, so "
            "their place on the H&E is unknown. Set the shapes with `sdata.set_table_annotates_spatialelement`, or "
            "read the analysis with `stimage_sd.io.from_anndata`."
        )
    if shapes_key is not None and shapes_key not in regions:
        return _required(sdata, table_name, _units_by_id(sdata, table_name, [shapes_key]))
    if shapes_key is not None:
        there = [shapes_key]
    if len(there) > 1:
        raise KeyError(
            f"The table {table_name!r} annotates several elements: {there}. Choose one with `shapes_key=`, or split "
            "the object with `stimage_sd.io.from_spatialdata(sdata)`, which gives one section per sample."
        )
    if not there or there[0] in sdata.labels:
        # instead of labels or a missing element, use shapes of the same cells: faster to read, and with an area
        alike = [name for name in sdata.shapes if _stem(name) == _stem(regions[0])]
        by_id = _units_by_id(sdata, table_name, alike)
        if by_id is not None or not there:
            return _required(sdata, table_name, by_id)
    keys = keys_of(table)
    of_region = np.ones(table.n_obs, bool)
    if keys[TableModel.REGION_KEY_KEY] in table.obs:
        of_region = np.asarray(table.obs[keys[TableModel.REGION_KEY_KEY]] == there[0])
    return _units(sdata, table_name, there[0], pd.Index(table.obs[keys[TableModel.INSTANCE_KEY]]), of_region)


def units_on(sdata: SpatialData, table_name: str, shapes_key: str) -> Units | None:
    """Find the measured units of a table among some shapes, which it annotates or which have its ids, else `None`."""
    if shapes_key in regions_of(sdata.tables[table_name]):
        return units_of(sdata, table_name, shapes_key)
    return _units_by_id(sdata, table_name, [shapes_key]) if shapes_key in sdata.shapes else None


def _units_by_id(sdata: SpatialData, table_name: str, candidates: list[str]) -> Units | None:
    """Match a table with shapes that it does not annotate, by ids. Return `None` without a match."""
    table = sdata.tables[table_name]
    for name in sorted(candidates, key=lambda name: "nucle" in name):
        index = sdata.shapes[name].index
        columns = [index.name, keys_of(table)[TableModel.INSTANCE_KEY], *_ID_COLUMNS]
        ids = {column: pd.Index(table.obs[column]) for column in columns if column in table.obs}
        for column, values in {**ids, "obs_names": table.obs_names}.items():
            # integer ids match by chance, so the column must have the name of the shapes' index
            may_match = _kind(index) == _kind(values) and (_kind(index) != "number" or column == index.name)
            if may_match and _present(sdata, name, values).any():
                return _units(sdata, table_name, name, values, np.ones(table.n_obs, bool))
    return None


def _stem(name: str) -> str:
    """Remove the word for the kind of element: ``"cell_labels"`` and ``"cell_boundaries"`` are both ``"cell"``."""
    return _KIND_WORD.sub("", name)


def _required(sdata: SpatialData, table_name: str, units: Units | None) -> Units:
    if units is not None:
        return units
    regions = regions_of(sdata.tables[table_name])
    raise KeyError(
        f"Found no shapes with the units of table {table_name!r} of section {sample(sdata)!r}: it annotates {regions}; "
        f"the object has the shapes {sorted(sdata.shapes)} and the labels {sorted(sdata.labels)}. Name the shapes with "
        "`shapes_key=`; their index must hold the table's instance ids or names."
    )


def _units(sdata: SpatialData, table_name: str, region: str, ids: pd.Index, of_region: NDArray[np.bool_]) -> Units:
    if region in sdata.shapes and sdata.shapes[region].index.has_duplicates:
        index = sdata.shapes[region].index
        raise ValueError(
            f"Expected each id once in the index of shapes {region!r} of section {sample(sdata)!r}, found "
            f"{index[index.duplicated()][0]} more than once. Keep one shape per id."
        )
    rows = np.flatnonzero(of_region & _present(sdata, region, ids))
    if rows.size == 0 and of_region.any():
        index = sdata.shapes[region].index
        raise ValueError(
            f"None of the {int(of_region.sum())} rows of table {table_name!r} has an id of the shapes {region!r}: ids "
            f"are {ids.dtype}, such as {ids[0]}, the shapes' index is {index.dtype}, such as {index[0]}."
            if len(index)
            else f"The shapes {region!r} are empty."
        )
    names = sdata.tables[table_name].obs_names[rows]
    if names.has_duplicates:
        raise ValueError(
            f"Expected every unit of {region!r} once in table {table_name!r} of section {sample(sdata)!r}, found "
            f"{names[names.duplicated()][0]!r} more than once. Run "
            f"`sdata.tables[{table_name!r}].obs_names_make_unique()`."
        )
    return Units(region, table_name, rows, names, ids[rows])


def _kind(index: pd.Index) -> str:
    return "number" if index.dtype.kind in "iu" else index.dtype.kind


def _has(sdata: SpatialData, name: str) -> bool:
    return name in sdata.shapes or name in sdata.labels or name in sdata.points


def _present(sdata: SpatialData, region: str, ids: pd.Index) -> NDArray[np.bool_]:
    """Return which ids an element still has. All ids of labels and points count as present."""
    if region not in sdata.shapes:
        return np.ones(len(ids), bool)
    index = sdata.shapes[region].index
    if len(index) == len(ids) and index.equals(ids):
        return np.ones(len(ids), bool)
    return np.asarray(index.get_indexer(ids) >= 0)


def _element_centers(sdata: SpatialData, name: str, image_key: str | None) -> tuple[pd.Index, NDArray[np.float64]]:
    """Return the ids and centers of an element's instances, px of the H&E or another image."""
    if name in sdata.shapes:
        return sdata.shapes[name].index, centers_in_pixels(sdata, name, image_key=image_key)
    if name in sdata.labels:
        placed = label_centers(sdata, name, image_key)
        return placed.index, placed.to_numpy()
    points = sdata.points[name][["x", "y"]].compute()
    matrix = pixel_frame(sdata, image_key).matrix(sdata.points[name], name)
    return points.index, apply(matrix, points.to_numpy(dtype=np.float64))


def units_name(sdata: SpatialData, shapes_key: str | None = None, table_key: str | None = None) -> str:
    """Return the name of the shapes that the counts, or else the proteins, annotate."""
    return find_units(sdata, shapes_key=shapes_key, table_key=table_key).shapes


def stands_on_spots(sdata: SpatialData, shapes_key: str | None = None, table_key: str | None = None) -> bool:
    """Return whether the section's units are spots, and not cells or bins.

    Shapes without a standard name are spots if they are circles of one size and at least 25 micrometers wide.
    """
    if shapes_key is None and not has_places(sdata):
        return False
    units = find_units(sdata, shapes_key=shapes_key, table_key=table_key)
    if units.shapes == SPOTS or units.table in (SPOT_COUNTS, SPOT_PROTEINS):
        return True
    if units.shapes in (CELLS, NUCLEI, BINS) or units.shapes not in sdata.shapes:
        return False
    radius = sdata.shapes[units.shapes].get("radius")
    if radius is None or radius.std() > 0.05 * radius.mean():
        return False
    resolution = mpp(sdata)
    return resolution is None or units.diameter(sdata) * resolution >= _SMALLEST_SPOT_UM
