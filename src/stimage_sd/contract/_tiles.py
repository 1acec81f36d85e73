"""Read and write tiles: their table, their places on an image, and their embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd.contract._affine import apply, apply_rounded, scale_of
from stimage_sd.contract._elements import annotate, regions_of
from stimage_sd.contract._frame import pixel_frame
from stimage_sd.contract._names import (
    INSTANCE_KEY,
    NUCLEI_EXPLAINED,
    SEGMENTS_EXPLAINED,
    TILE_SQUARES,
    TILES,
)
from stimage_sd.contract._section import sample
from stimage_sd.contract._tile_maps import tile_map_names

#: largest angle of the tiles on an image, radians
_STRAIGHT = 1e-3
#: largest relative difference between the width and height of a tile on an image
_MOST_STRETCH = 0.02
#: centers in the table and centers of the squares are the same up to this distance, px
_SAME = 1e-3
#: number of adjacent features that are all zero in a lost chunk
_ZEROS = 128


def tiles(sdata: SpatialData) -> AnnData:
    """Return the table of tiles."""
    if TILES not in sdata.tables or TILE_SQUARES not in sdata.shapes:
        raise KeyError(f"Section {sample(sdata)!r} has no tiles. Run `stimage_sd.pp.tile(sdata)` first.")
    table = sdata.tables[TILES]
    if "tiling" not in table.uns:
        raise KeyError(
            f"The tiles of section {sample(sdata)!r} no longer say how they were laid (`uns['tiling']`), as after "
            "`spatialdata.concatenate(..., concatenate_tables=True)`. Run `stimage_sd.pp.tile(sdata)` again."
        )
    return table


def tiling(sdata: SpatialData) -> dict[str, Any]:
    """Return the tiling: ``side_px`` of the H&E as it is now, ``size_um``, ``target_px`` and ``layout``."""
    about = dict(tiles(sdata).uns["tiling"])
    about["side_px"] = _placed_squares(sdata, None).side
    return about


class TileGeometry(NamedTuple):
    """Centers and side of the tiles on an image.

    - `centers`: ``float64 (n, 2)``, x and y, px of the image.
    - `side`: side of a tile, px of the image.
    """

    centers: NDArray[np.float64]
    side: float


def tile_geometry(sdata: SpatialData, table: AnnData | None = None, image_key: str | None = None) -> TileGeometry:
    """Return the centers and side of tiles on an image, through the transformations of both.

    - `sdata`: the section.
    - `table`: a table with one row per tile, or some of its rows. The table of all tiles by default.
    - `image_key`: the image. The section's H&E by default.
    """
    every = tiles(sdata)
    table = every if table is None else table
    squares = sdata.shapes[TILE_SQUARES]
    rows = squares.index.get_indexer(table.obs[INSTANCE_KEY])
    if (rows < 0).any():
        raise ValueError(
            f"{int((rows < 0).sum())} tiles of a table of section {sample(sdata)!r} have no square in "
            f"`shapes[{TILE_SQUARES!r}]`. Run `stimage_sd.pp.tile(sdata)` again."
        )
    placed = _placed_squares(sdata, image_key)
    centers = placed.centers[rows]
    stated = np.asarray(table.obsm["spatial"], dtype=np.float64)
    # centers from pp.tile are exact, centers of the squares are rounded
    if np.abs(stated - centers).max(initial=0.0) < _SAME:
        centers = stated
    return TileGeometry(apply_rounded(placed.matrix, centers), placed.side)


class _Placed(NamedTuple):
    """Intrinsic centers of the squares, the matrix to pixels of an image, and the side in these pixels."""

    centers: NDArray[np.float64]
    matrix: NDArray[np.float64]
    side: float


def _placed_squares(sdata: SpatialData, image_key: str | None) -> _Placed:
    """Place the squares on an image, also after `spatialdata.transform` moved them."""
    frame = pixel_frame(sdata, image_key)
    matrix = frame.matrix(sdata.shapes[TILE_SQUARES], TILE_SQUARES)
    squares = sdata.shapes[TILE_SQUARES].geometry.to_numpy()
    bounds = shapely.bounds(squares)
    centers = (bounds[:, :2] + bounds[:, 2:]) / 2
    stated = float(tiles(sdata).uns["tiling"]["side_px"])
    if len(squares) == 0:
        return _Placed(centers, matrix, stated * scale_of(matrix))
    corners = apply(matrix, shapely.get_coordinates(shapely.get_exterior_ring(squares[0])))
    width, height = np.ptp(corners, axis=0)
    side = float(np.sqrt(shapely.area(squares[0])) * scale_of(matrix))
    # the bounds of a rotated square are larger than the square
    if abs(width * height / side**2 - 1) > 2 * _STRAIGHT or abs(width / height - 1) > _MOST_STRETCH:
        raise ValueError(
            f"The tiles of section {sample(sdata)!r} are rotated or stretched on the pixels of {frame.image!r}, so "
            "they cannot be cut from this image. Run `stimage_sd.pp.tile(sdata)` again, on this image."
        )
    exact = stated * scale_of(matrix)
    return _Placed(centers, matrix, exact if abs(exact - side) < _SAME else side)


def tile_squares(
    sdata: SpatialData, names: Iterable[str | int] | None = None, image_key: str | None = None
) -> NDArray[np.float64]:
    """Return the extents of tiles on an image.

    - `sdata`: the section.
    - `names`: ``obs_names`` or ``instance_id`` of the wanted tiles, from the table of tiles. All tiles by default.
    - `image_key`: the image. The section's H&E by default.
    - returns: ``float64 (n, 4)``: left, top, right, bottom, px of the image.
    """
    table = tiles(sdata)
    rows = np.arange(table.n_obs)
    if names is not None:
        wanted = list(names)
        by_name = table.obs_names.get_indexer([str(name) for name in wanted])
        by_number = pd.Index(table.obs[INSTANCE_KEY]).get_indexer(
            [name if isinstance(name, int | np.integer) else -1 for name in wanted]
        )
        rows = np.where(by_name >= 0, by_name, by_number)
        if len(rows) == 0 or (rows < 0).any():
            unknown = [name for name, row in zip(wanted, rows, strict=True) if row < 0]
            raise KeyError(
                f"Expected names of tiles of section {sample(sdata)!r}, such as {table.obs_names[0]!r}; found "
                f"{unknown[:5] if unknown else 'none'}. `sdata.tables[{TILES!r}].obs_names` lists them."
            )
    centers, side = tile_geometry(sdata, image_key=image_key)
    return np.concatenate([centers[rows] - side / 2, centers[rows] + side / 2], axis=1)


def write_tiles(sdata: SpatialData, obs: pd.DataFrame, tiling: dict[str, Any], image_key: str | None = None) -> None:
    """Write the table and squares of tiles, and remove the results of earlier tiles.

    - `sdata`: the section.
    - `obs`: one row per tile, with ``x`` and ``y``, the center in pixels of the image.
    - `tiling`: the layout of the tiles: ``layout``, ``side_px``, ``target_px`` and, if the resolution is known,
      ``size_um``.
    - `image_key`: the image that was tiled, if not the section's H&E.
    """
    frame = pixel_frame(sdata, image_key)
    centers, half = obs[["x", "y"]].to_numpy(dtype=np.float64), tiling["side_px"] / 2
    squares = frame.shapes(gpd.GeoDataFrame(geometry=shapely.box(*(centers - half).T, *(centers + half).T)))
    obs = obs.copy()
    obs.insert(0, INSTANCE_KEY, np.arange(len(obs)))
    obs.index = [f"tile_{row}" for row in range(len(obs))]
    table = ad.AnnData(X=np.zeros((len(obs), 0), dtype=np.float32), obs=obs)
    table.obsm["spatial"] = centers.copy()
    table.uns["tiling"] = tiling
    table = annotate(table, region=TILE_SQUARES)
    if TILES in sdata.tables and TILE_SQUARES not in regions_of(sdata.tables[TILES]):
        raise ValueError(
            f"Section {sample(sdata)!r} has a table {TILES!r} already, from other software. Rename it first: "
            f"`sdata[{TILES + '_other'!r}] = sdata.tables.pop({TILES!r})`."
        )
    for name in (TILES, TILE_SQUARES):
        check_free(sdata, name, of={TILES: "tables", TILE_SQUARES: "shapes"}[name])
    _remove_stale(sdata)
    sdata.tables.pop(TILES, None)
    sdata.shapes.pop(TILE_SQUARES, None)
    sdata.shapes[TILE_SQUARES] = squares
    sdata.tables[TILES] = table


def check_free(sdata: SpatialData, name: str, *, of: str) -> None:
    """Raise `ValueError` if an element of another kind has the name, as SpatialData names must be unique."""
    for kind in ("images", "labels", "points", "shapes", "tables"):
        if kind != of and name in getattr(sdata, kind):
            raise ValueError(
                f"Section {sample(sdata)!r} has {kind} named {name!r} already, so the {of} {name!r} cannot be written. "
                f"Names in SpatialData must be unique. Rename the existing one first: `sdata[{name + '_other'!r}] = "
                f"sdata.{kind}.pop({name!r})`."
            )


def _remove_stale(sdata: SpatialData) -> None:
    """Remove the results of the tiles that are about to be replaced, and warn."""
    stale = [name for name, table in sdata.tables.items() if name != TILES and TILE_SQUARES in regions_of(table)]
    explained = [name for name in (NUCLEI_EXPLAINED, SEGMENTS_EXPLAINED) if name in sdata.shapes]
    maps = tile_map_names(sdata)
    if not stale and not explained and not maps:
        return
    for name in stale:
        del sdata.tables[name]
    for name in explained:
        del sdata.shapes[name]
    for name in maps:
        del sdata.images[name]
    warnings.warn(
        f"Section {sample(sdata)!r} has new tiles. Results of the earlier tiles are removed: "
        f"{', '.join([*stale, *explained, *maps])}.",
        UserWarning,
        stacklevel=4,
    )


def feature_key(extractor: str) -> str:
    """Return the ``obsm`` key of an extractor's embeddings."""
    return f"X_{extractor}"


def context_key(extractor: str) -> str:
    """Return the ``obsm`` key of the embeddings of neighboring tiles."""
    return f"X_{extractor}_context"


def write_embeddings(
    sdata: SpatialData,
    extractor: str,
    values: NDArray[np.float32],
    *,
    image: str,
    input_px: int,
    weights_hash: str = "",
    fields_of_view: Sequence[float] = (1.0,),
    wide_fields: str = "separate",
    stain: str = "",
    source: str = "",
) -> None:
    """Write the embeddings of all tiles and their settings, and remove outdated embeddings of neighbors.

    - `sdata`: the section, tiled.
    - `extractor`: name of the network.
    - `values`: ``float32 (n_tiles, n_fields * n_features)``.
    - `image`: the image that the tiles were cut from.
    - `input_px`: side that the tiles were resampled to, px.
    - `weights_hash`: hash of the network's weights. Empty if unknown.
    - `fields_of_view`: sides of the squares around a tile, in tile sides.
    - `wide_fields`: how squares wider than a tile were embedded, ``"pooled"`` or ``"separate"``.
    - `stain`: settings of the stain normalization, as JSON. Empty without normalization.
    - `source`: the other software that computed the embeddings, if any.
    """
    table = tiles(sdata)
    table.obsm[feature_key(extractor)] = values
    table.obsm.pop(context_key(extractor), None)
    how: dict[str, Any] = {
        "image": image,
        "weights_hash": weights_hash,
        "fields_of_view": [float(field) for field in fields_of_view],
        "wide_fields": wide_fields,
        "input_px": int(input_px),
        "context_rings": 0,
        "stain": stain,
    }
    if source:
        how["source"] = source
    table.uns.setdefault("embeddings", {})[extractor] = how


def embeddings(sdata: SpatialData, extractor: str) -> np.ndarray:
    """Return an extractor's embeddings, ``float32 (n_tiles, n_features)``."""
    table = tiles(sdata)
    key = feature_key(extractor)
    if key not in table.obsm:
        known = sorted(name.removeprefix("X_") for name in table.obsm if name.startswith("X_"))
        raise KeyError(
            f"Section {sample(sdata)!r} has no embeddings by {extractor!r} (found {known}). "
            f"Run `stimage_sd.pp.embed(sdata, {extractor!r})` first."
        )
    keep = table.obs["keep"].to_numpy()
    for name in (key, context_key(extractor)):
        n_lost = int((_lost_rows(np.asarray(table.obsm[name])) & keep).sum()) if name in table.obsm else 0
        if n_lost:
            raise ValueError(
                f"Expected embeddings in `obsm[{name!r}]` of section {sample(sdata)!r}, found zeros for {n_lost} "
                f"tiles: a part of the store that they were read from is missing. Run `stimage_sd.pp.embed(sdata, "
                f"{extractor!r})` again."
            )
    return np.asarray(table.obsm[key])


def check_finite(sdata: SpatialData, values: NDArray[Any], extractor: str) -> None:
    """Raise `ValueError` if embeddings of kept tiles are not finite.

    - `sdata`: the section.
    - `values`: ``(n_tiles, n_features)``, of all tiles or of the kept tiles.
    - `extractor`: name of the extractor, for the error message.
    """
    keep, names = tiles(sdata).obs["keep"].to_numpy(), tiles(sdata).obs_names
    # finite float32 values have a finite float64 sum, so no boolean copy of all values is needed
    wrong = ~np.isfinite(values.sum(axis=1, dtype=np.float64))
    if len(values) == len(keep):
        wrong = wrong & keep
    else:
        names = names[keep]
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {int(keep.sum())} kept tiles of section {sample(sdata)!r} have embeddings by "
            f"{extractor!r} that are not finite, such as tile {names[wrong][0]!r}. Embed the section again, or leave "
            'these tiles out: set `sdata.tables["tiles"].obs["keep"]` to False for them, and run '
            f"`stimage_sd.pp.spatial_context(sdata, {extractor!r})` again where neighbors are features too."
        )


def _lost_rows(values: np.ndarray) -> np.ndarray:
    """Return the rows in missing zarr chunks, which zarr reads as zeros."""
    # zeros are normal in tables of few features, such as shares of cell types
    n_columns = values.shape[1]
    if n_columns < _ZEROS:
        return np.zeros(len(values), dtype=bool)
    width = _ZEROS if n_columns >= 2 * _ZEROS else n_columns
    empty = ~np.logical_or.reduceat(values != 0, np.arange(0, n_columns // width * width, width), axis=1)
    # features that are zero for all tiles may be unused; a chunk holds several adjacent tiles
    lost = empty & ~empty.all(axis=0)
    together = np.zeros_like(lost)
    together[1:] |= lost[1:] & lost[:-1]
    together[:-1] |= lost[1:] & lost[:-1]
    return np.asarray(together.any(axis=1) | empty.all(axis=1))
