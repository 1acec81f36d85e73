"""Read and write what lies within spots: nuclei or small squares, their embeddings, and their place among tiles."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely
from anndata import AnnData
from numpy.typing import NDArray
from scipy.spatial import KDTree
from spatialdata import SpatialData

from stimage_sd.contract._counts import Source, align_to_spots, counts
from stimage_sd.contract._elements import INSTANCES, annotate
from stimage_sd.contract._frame import centers_in_pixels, shapes_in_pixels
from stimage_sd.contract._names import INSTANCE_KEY, REGION_KEY, SPOT_COUNTS, SPOT_PROTEINS
from stimage_sd.contract._results import outlines
from stimage_sd.contract._section import sample
from stimage_sd.contract._tables import Against, has_counts
from stimage_sd.contract._tiles import check_free, tile_geometry, tiles, tiling
from stimage_sd.contract._units import find_units, has_places, stands_on_spots, units_of

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

#: what is predicted: whole tiles, nuclei, or squares of a grid finer than the tiles
On = Literal["tiles", "nuclei", "grid"]
#: shapes of the squares of a fine grid
GRID_SQUARES = "grid_squares"
#: distance to the nearest tile, in distances between tiles, beyond which a nucleus has no tile
_REACH = 1.5
#: squares smaller than this share of a bin's width cannot be compared with bins
_SAME_WIDTH = 0.9


def features_key(on: str) -> str:
    """Return the name of the table with the embeddings of nuclei or squares."""
    return f"{on}_features"


def predictions_key(on: str) -> str:
    """Return the default name of the table of predictions."""
    return "predictions" if on == "tiles" else f"{on}_predictions"


def instances(sdata: SpatialData, on: str) -> AnnData:
    """Return the table of the section's nuclei or squares with their embeddings."""
    name = features_key(on)
    if name not in sdata.tables or INSTANCES not in sdata.tables[name].uns:
        raise KeyError(
            f"Section {sample(sdata)!r} has no embeddings of its {'nuclei' if on == 'nuclei' else 'squares'}. "
            f'Run `stimage_sd.pp.embed(sdata, on="{on}")` first.'
        )
    return sdata.tables[name]


def about_instances(table: AnnData) -> dict[str, Any] | None:
    """Return what a table of nuclei or squares says about them, or `None` for a table of tiles."""
    about: Mapping[str, Any] | None = table.uns.get(INSTANCES)
    return None if about is None else dict(about)


def write_instances(
    sdata: SpatialData, on: str, *, shapes: str, ids: pd.Index, centers: NDArray[np.float64], about: Mapping[str, Any]
) -> AnnData:
    """Write a table of nuclei or squares without embeddings, or return the existing one if it is of the same.

    Predictions of earlier nuclei or squares in the same shapes are removed, with a warning.

    - `sdata`: the section.
    - `on`: ``"nuclei"`` or ``"grid"``.
    - `shapes`, `ids`: name of their shapes, and their index.
    - `centers`: ``(n, 2)``, px of the H&E.
    - `about`: how they were laid, stored in ``uns``.
    """
    name = features_key(on)
    check_free(sdata, name, of="tables")
    how = {"on": on, "shapes": shapes, **about}
    if name in sdata.tables:
        old = sdata.tables[name]
        if about_instances(old) == how and np.array_equal(old.obs[INSTANCE_KEY].to_numpy(), ids.to_numpy()):
            return old
    obs = pd.DataFrame({INSTANCE_KEY: ids.to_numpy()}, index=[f"{on}_{row}" for row in range(len(ids))])
    table = ad.AnnData(X=np.zeros((len(ids), 0), dtype=np.float32), obs=obs)
    table.obsm["spatial"] = centers.copy()
    table.uns[INSTANCES] = how
    parsed = annotate(table, region=shapes)
    sdata.tables.pop(name, None)
    _remove_stale(sdata, shapes)
    sdata.tables[name] = parsed
    return parsed


def _remove_stale(sdata: SpatialData, shapes: str) -> None:
    """Remove predictions of nuclei or squares that are about to be replaced, and warn."""
    stale = [
        name
        for name, table in sdata.tables.items()
        if "prediction" in table.uns and (about_instances(table) or {}).get("shapes") == shapes
    ]
    for name in stale:
        del sdata.tables[name]
    if stale:
        warnings.warn(
            f"Section {sample(sdata)!r} has other nuclei or squares in {shapes!r} now. Predictions of the earlier ones "
            f"are removed: {', '.join(stale)}.",
            UserWarning,
            stacklevel=5,
        )


def write_instance_predictions(sdata: SpatialData, table: AnnData, *, key: str) -> None:
    """Write a table of predictions of nuclei or squares, and replace an earlier one of that name."""
    check_instance_key(sdata, key)
    parsed = annotate(table, region=str(table.uns[INSTANCES]["shapes"]))
    sdata.tables.pop(key, None)
    sdata.tables[key] = parsed


def check_instance_key(sdata: SpatialData, key: str) -> None:
    """Raise `ValueError` if predictions of nuclei or squares cannot be written under a name."""
    check_free(sdata, key, of="tables")
    if key in sdata.tables and (INSTANCES not in sdata.tables[key].uns or "prediction" not in sdata.tables[key].uns):
        raise ValueError(
            f"Section {sample(sdata)!r} has a table {key!r} already, and it holds no predictions of nuclei or squares. "
            "Choose another name with `key_added=`."
        )


def instance_shapes(sdata: SpatialData, table: AnnData, image_key: str | None = None) -> GeoDataFrame:
    """Return the shapes of a table's nuclei or squares, in its order, in px of an image."""
    name = str(table.uns[INSTANCES]["shapes"])
    frame = shapes_in_pixels(sdata, name, image_key=image_key)
    return frame.iloc[_rows_of(sdata, table, name)]


def places(sdata: SpatialData, table: AnnData, image_key: str | None = None) -> NDArray[np.float64]:
    """Return the centers of the tiles, nuclei or squares of a table, ``(n, 2)``, px of an image, by default the H&E."""
    about = about_instances(table)
    if about is None:
        return tile_geometry(sdata, table, image_key).centers
    name = str(about["shapes"])
    return centers_in_pixels(sdata, name, image_key=image_key)[_rows_of(sdata, table, name)]


def _rows_of(sdata: SpatialData, table: AnnData, name: str) -> NDArray[np.int64]:
    if name not in sdata.shapes:
        raise ValueError(
            f"Section {sample(sdata)!r} has a table of {table.uns[INSTANCES]['on']}, but no longer their shapes "
            f"{name!r}. Embed again."
        )
    rows = sdata.shapes[name].index.get_indexer(table.obs[INSTANCE_KEY])
    if (rows < 0).any():
        raise ValueError(
            f"{int((rows < 0).sum())} of {len(rows)} rows of a table of section {sample(sdata)!r} have no shape in "
            f"{name!r}, as after a new segmentation. Run `stimage_sd.pp.embed(sdata, "
            f'on="{table.uns[INSTANCES]["on"]}")` again.'
        )
    return rows


class Within(NamedTuple):
    """Place of nuclei or squares among the kept tiles.

    - `tile`: row of the nearest kept tile, ``int64 (n,)``. -1 for those far from all tiles.
    - `inside`: whether the center lies within the spot of that tile, or within the tile where tiles are not on spots.
    - `uncovered`: share of each tile's spot, or of the tile, that none of them covers, ``float64 (n_tiles,)``. 0 for
      squares.
    - `per_tile`: how many there would be in the square of each tile, if they lay as densely as in its spot, ``float64
      (n_tiles,)``.
    """

    tile: NDArray[np.int64]
    inside: NDArray[np.bool_]
    uncovered: NDArray[np.float64]
    per_tile: NDArray[np.floating[Any]]


def within_tiles(sdata: SpatialData, table: AnnData) -> Within:
    """Find the kept tile of each nucleus or square of a table, and those that lie within the tile's spot."""
    where = places(sdata, table)
    centers, side, away, nearest, reach = _nearest_tiles(sdata, where)
    if tiling(sdata)["layout"] == "spots":
        diameter = _spot_diameter(sdata, side)
        inside, area = np.asarray(away <= diameter / 2), np.pi * diameter**2 / 4
    else:
        offset = where - centers[nearest]
        # half-open, so that a center on a shared edge is in one tile
        inside, area = np.asarray(((offset >= -side / 2) & (offset < side / 2)).all(axis=1)), side**2
    tile = np.where(away <= reach, nearest, -1)
    inside &= tile >= 0
    per_tile = np.bincount(tile[inside], minlength=len(centers)) * side**2 / area
    if table.uns[INSTANCES]["on"] == "grid":
        return Within(tile, inside, np.zeros(len(centers)), per_tile)
    covered = np.bincount(tile[inside], weights=instance_areas(sdata, table)[inside], minlength=len(centers))
    return Within(tile, inside, np.clip(1 - covered / area, 0.0, 1.0), per_tile)


def _spot_diameter(sdata: SpatialData, side: float) -> float:
    """Return the diameter of the spots that tiles sit on, px; the side of a tile if these spots are gone.

    The section's own counts may be of cells by now, so units are recognized by the names that the tiles have.
    """
    spots = set(tiles(sdata).obs["spot_id"].astype(str)) if "spot_id" in tiles(sdata).obs else set()
    own = [None] if has_places(sdata) else []
    for table in (*own, *(name for name in (SPOT_COUNTS, SPOT_PROTEINS) if name in sdata.tables)):
        units = find_units(sdata) if table is None else units_of(sdata, table)
        if spots & set(units.names.astype(str)):
            return units.diameter(sdata)
    return side


def near_tiles(sdata: SpatialData, points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether points ``(n, 2)``, px of the H&E, are near enough to a kept tile to share its context."""
    _, _, away, _, reach = _nearest_tiles(sdata, points)
    return np.asarray(away <= reach)


def _nearest_tiles(
    sdata: SpatialData, points: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float, NDArray[np.float64], NDArray[np.int64], float]:
    """Return centers and side of the kept tiles, distance and row of the one nearest to each point, and the reach."""
    every = tiles(sdata)
    centers, side = tile_geometry(sdata, every[every.obs["keep"].to_numpy()])
    tree = KDTree(centers)
    away, nearest = tree.query(points)
    apart = float(np.median(tree.query(centers, k=2)[0][:, 1])) if len(centers) > 1 else side
    return centers, side, away, nearest, _REACH * max(apart, side)


def instance_areas(sdata: SpatialData, table: AnnData) -> NDArray[np.float64]:
    """Return the areas of shapes, px²; circles are stored as points with a radius."""
    frame = instance_shapes(sdata, table)
    if "radius" in frame and len(frame) and frame.geometry.iloc[0].geom_type == "Point":
        return np.pi * frame["radius"].to_numpy(dtype=np.float64) ** 2
    return np.asarray(frame.geometry.area, dtype=np.float64)


def align_to_instances(
    sdata: SpatialData, table: AnnData, source: Source | None = None
) -> tuple[NDArray[np.int64], AnnData]:
    """Match the nuclei or squares of a table with measured cells or bins, and add up the counts of each.

    A cell or bin belongs to the nucleus or square that its center lies in, else to the nucleus whose center lies in
    the cell. Of several nuclei in a cell, the one nearest to the center of the cell is taken.

    - `sdata`: the section.
    - `table`: nuclei or squares.
    - `source`: table and layer of the counts.
    - returns: row numbers of `table` that have measured units, and their counts in the same order.
    """
    measured = counts(sdata, source)
    units = find_units(sdata, table_key=(source or Source()).table, against="counts")
    on = table.uns[INSTANCES]["on"]
    inside = _polygons(instance_shapes(sdata, table))
    if on == "grid":
        side, width = float(np.sqrt(np.median(shapely.area(inside)))), units.diameter(sdata) * np.sqrt(np.pi) / 2
        if side < _SAME_WIDTH * width:
            raise ValueError(
                f"The squares of section {sample(sdata)!r} are {side:.0f} px wide, its measured units {width:.0f} px, "
                'so their counts cannot be told apart. Embed larger squares: `stimage_sd.pp.embed(sdata, on="grid", '
                "square_um=...)`."
            )
    where = units.positions(sdata)
    known = np.flatnonzero(np.isfinite(where).all(axis=1))
    # a center on the edge of two squares belongs to the first, and is not lost
    unit, row = shapely.STRtree(inside).query(shapely.points(where[known]), predicate="intersects")
    order = np.lexsort((row, unit))
    first = order[np.unique(unit[order], return_index=True)[1]]
    owner = np.full(len(where), -1)
    owner[known[unit[first]]] = row[first]
    if on == "nuclei" and units.shapes in sdata.shapes:
        _own_by_cells(sdata, table, units, where, owner)
    mine = np.flatnonzero(owner >= 0)
    if not len(mine):
        raise KeyError(
            f"None of the {len(owner)} measured units of section {sample(sdata)!r} lies on one of its {table.n_obs} "
            f"{'nuclei' if on == 'nuclei' else 'squares'}. Do they lie on the H&E? See `stimage_sd.pl.cells(sdata)`."
        )
    rows = np.unique(owner[mine])
    belongs = sp.csr_matrix(
        (np.ones(len(mine)), (np.searchsorted(rows, owner[mine]), mine)), shape=(len(rows), len(owner))
    )
    summed = sp.csr_matrix(belongs @ sp.csr_matrix(measured.X))
    return rows, ad.AnnData(X=summed, obs=table.obs.iloc[rows].drop(columns=REGION_KEY), var=measured.var)


def align(
    sdata: SpatialData, table: AnnData, source: Source | None = None, *, against: Against | None = "counts"
) -> tuple[NDArray[np.int64], AnnData]:
    """Match the rows of a table of tiles with spots, or of nuclei or squares with cells or bins."""
    if about_instances(table) is None:
        return align_to_spots(sdata, table, source, against=against)
    if against == "proteins":
        raise ValueError("Predictions of nuclei or squares can be compared with counts, not with proteins.")
    return align_to_instances(sdata, table, source)


def _own_by_cells(
    sdata: SpatialData, table: AnnData, units: Any, where: NDArray[np.float64], owner: NDArray[np.int64]
) -> None:
    """Give cells that lie on no nucleus to the nucleus within their outline, where there is one."""
    left = np.flatnonzero(owner < 0)
    frame = shapes_in_pixels(sdata, units.shapes)
    cells = _polygons(frame)[frame.index.get_indexer(units.ids)][left]
    centers = places(sdata, table)
    nucleus, cell = shapely.STRtree(cells).query(shapely.points(centers), predicate="within")
    away = np.hypot(*(centers[nucleus] - where[left[cell]]).T)
    order = np.lexsort((away, cell))
    first = order[np.unique(cell[order], return_index=True)[1]]
    owner[left[cell[first]]] = nucleus[first]


def instance_outlines(sdata: SpatialData, table: AnnData, image_key: str | None = None) -> NDArray[np.object_]:
    """Return the shapes of a table's nuclei or squares as polygons, in px of an image."""
    frame = instance_shapes(sdata, table, image_key)
    return outlines(frame.set_geometry(_polygons(frame)))


def has_cells(sdata: SpatialData, table_key: str | None = None) -> bool:
    """Return whether counts are of cells or bins, which nuclei or squares can be compared with."""
    return has_counts(sdata) and not stands_on_spots(sdata, table_key=table_key)


def _polygons(frame: GeoDataFrame) -> NDArray[np.object_]:
    """Return shapes as polygons; circles are stored as points with a radius."""
    if "radius" in frame and len(frame) and frame.geometry.iloc[0].geom_type == "Point":
        return np.asarray(frame.geometry.buffer(frame["radius"]).to_numpy(), dtype=object)
    return np.asarray(frame.geometry.to_numpy(), dtype=object)
