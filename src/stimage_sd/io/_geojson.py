"""Read QuPath objects from GeoJSON, and write shapes as GeoJSON for QuPath."""

from __future__ import annotations

import colorsys
import uuid
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.io._geojson_features import (
    CLASSIFICATION,
    COLOR,
    COLUMNS,
    ID,
    LOCKED,
    MEMBERS,
    NAME,
    OBJECT_TYPE,
    Outline,
    features_of,
    frame_of,
    parts_of,
    read_features,
    repair,
    rows_of,
    write_features,
)
from stimage_sd.io._section import require_file

#: column of predicted nuclei with the cell type
CELL_TYPE = "cell_type"
#: layers of predictions that become measurements, beside the mean
LAYERS = ("lower", "upper", "aleatoric", "epistemic", "total_variance")


def read_geojson(
    data: SpatialData,
    path: str | Path,
    *,
    object_types: Sequence[str] | None = None,
    outline: Outline = "cell",
    explode: bool = False,
    key_added: str = "annotations",
) -> None:
    """Read QuPath's annotations, detections or cells into a section as shapes.

    Parameters
    ----------
    data
        The section.
    path
        The GeoJSON that QuPath exported: a FeatureCollection or a list of features, plain, gzipped or zipped.
        Coordinates are pixels of the H&E at full resolution.
    object_types
        Object types to read: ``"annotation"``, ``"detection"``, ``"cell"``, ``"tile"`` and ``"tmaCore"``. All by
        default.
    outline
        Outline of a cell that becomes its shape. The other outline is kept for `write_geojson`.
    explode
        Whether each part of a MultiPolygon becomes a separate shape. CellViT and HEST write all nuclei of a class as
        one MultiPolygon.
    key_added
        Name of the shapes. Only shapes that were read from GeoJSON before are replaced.

    Returns
    -------
    Nothing. ``shapes[key_added]`` is written with one row per object: ``id``, ``object_type``, ``classification``
    (categorical; derived classes as ``"Tumor: Positive"``), ``color`` of the class (``#rrggbb``), ``name``, ``locked``,
    and one column per measurement (NaN where an object lacks the measurement). ``members`` is JSON of all other content
    of the file, so that `write_geojson` keeps everything except the hierarchy of objects.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    KeyError
        If the section has no H&E.
    ValueError
        If the file is not GeoJSON or holds no area; if all objects lie off the H&E; if a geometry is broken or a
        GeometryCollection; if the section has other shapes of that name.

    Warns
    -----
    UserWarning
        If points or lines are left out, outlines cross themselves, or some objects lie off the H&E.

    Examples
    --------
    >>> import json, tempfile
    >>> import numpy as np
    >>> from stimage_sd.io import from_anndata, write_geojson
    >>> adata = AnnData(np.array([[4, 0], [0, 9]]), obsm={"spatial": np.array([[50.0, 60.0], [150.0, 60.0]])})
    >>> image = np.full((200, 200, 3), 230, np.uint8)
    >>> sdata = from_anndata(adata, image, sample="tiny", spot_diameter_px=55.0)
    >>> ring = [[10, 10], [90, 10], [90, 90], [10, 90], [10, 10]]
    >>> tumor = {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}}
    >>> feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": tumor}
    >>> path = Path(tempfile.mkdtemp()) / "tiny.geojson"
    >>> _ = path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    >>> read_geojson(sdata, path)
    >>> sdata.shapes["annotations"][["classification", "color"]].values.tolist()
    [['Tumor', '#c80000']]
    """
    sdata = contract.section(data)
    if outline not in ("cell", "nucleus"):
        raise ValueError(f'Expected `outline` to be "cell" or "nucleus", found {outline!r}.')
    path = require_file(path, what="a GeoJSON file")
    _check_replaceable(sdata, key_added)
    features = read_features(path)
    rows = rows_of(features, outline=outline)
    if len(rows) < len(features):
        warnings.warn(
            f"{len(features) - len(rows)} of {len(features)} objects in {path.name} are points, lines or without "
            "geometry, and are left out.",
            UserWarning,
            stacklevel=2,
        )
    if object_types is not None:
        wanted = [object_types] if isinstance(object_types, str) else list(object_types)
        counts = Counter(row[OBJECT_TYPE] for row in rows)
        rows = [row for row in rows if row[OBJECT_TYPE] in wanted]
        if not rows:
            raise ValueError(f"Expected objects of type {wanted} in {path}, found {dict(counts)}.")
    if not rows:
        raise ValueError(f"Expected areas in {path}, found {len(features)} objects and none with an area.")
    frame, n_repaired = repair(frame_of(rows))
    if n_repaired:
        warnings.warn(
            f"The outlines of {n_repaired} of {len(rows)} objects in {path.name} cross themselves. They were "
            f"replaced by the enclosed areas; {len(rows) - len(frame)} without area are left out.",
            UserWarning,
            stacklevel=2,
        )
    if explode:
        frame = parts_of(frame)
    _check_on_image(sdata, frame, path)
    contract.write_shapes(sdata, frame, name=key_added)
    contract.record(sdata, "io.read_geojson", path=path, key_added=key_added, outline=outline, n_objects=len(frame))


def write_geojson(
    data: SpatialData,
    path: str | Path,
    *,
    genes: str | Sequence[str] | None = None,
    overwrite: bool = False,
    class_key: str | None = None,
    key: str = "annotations",
    predictions_key: str = contract.PREDICTIONS,
) -> None:
    """Write shapes of a section as GeoJSON for QuPath.

    Shapes from `read_geojson` are written unchanged. Tiles become QuPath tiles, and other shapes become detections.
    Numeric columns become measurements.

    Parameters
    ----------
    data
        The section.
    path
        File to write. Gzipped if the name ends in ``.gz``.
    genes
        Genes whose predictions become measurements of the tiles: ``"<gene>: mean"``, and likewise for ``lower``,
        ``upper``, ``aleatoric``, ``epistemic`` and ``total_variance``. No genes by default.
    overwrite
        Whether to replace an existing file, once the new file is complete.
    class_key
        Column of the shapes, or of ``obs`` of a table that annotates them, that becomes the classification. By default
        ``classification``, or ``cell_type`` of predicted nuclei.
    key
        Name of the shapes: ``"tile_squares"`` for the tiles, ``"nuclei"`` for the nuclei, and so on.
    predictions_key
        Name of the table of predictions of `genes`.

    Returns
    -------
    Nothing. The file is written. Coordinates are pixels of the H&E at full resolution.

    Raises
    ------
    FileExistsError
        If the file exists and `overwrite` is not set.
    KeyError
        If the section lacks the shapes, the column, the genes or predictions.
    ValueError
        If `genes` are given for shapes other than the tiles.

    Examples
    --------
    >>> import json
    >>> import numpy as np, stimage_sd as sti
    >>> adata = AnnData(np.array([[4, 0], [0, 9]]), obsm={"spatial": np.array([[50.0, 60.0], [150.0, 60.0]])})
    >>> pink = np.full((200, 200, 3), (200, 120, 180), np.uint8)
    >>> sdata = sti.io.from_anndata(adata, pink, sample="tiny", spot_diameter_px=55.0)
    >>> sti.pp.tile(sdata)
    >>> write_geojson(sdata, "tiles.geojson", key="tile_squares")
    >>> features = json.loads(Path("tiles.geojson").read_text())["features"]
    >>> features[0]["properties"]
    {'objectType': 'tile', 'name': 'tile_0', 'measurements': {'tissue_fraction': 1.0}}
    """
    sdata = contract.section(data)
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another name, or pass `overwrite=True`.")
    if key not in sdata.shapes:
        raise KeyError(
            f"Section {contract.sample(sdata)!r} has no shapes {key!r}; its shapes: {sorted(sdata.shapes)}. Choose "
            "shapes with `key=`."
        )
    if genes is not None and key != contract.TILE_SQUARES:
        raise ValueError(f'Expected `key="{contract.TILE_SQUARES}"` with `genes=`, found {key!r}.')
    frame = contract.nuclei(sdata, key)
    frame = frame.copy() if OBJECT_TYPE in frame else _as_objects(sdata, frame, key)
    if class_key is None:
        class_key = next((name for name in (CLASSIFICATION, CELL_TYPE) if name in sdata.shapes[key]), None)
    if class_key is not None and class_key != CLASSIFICATION:
        _classify(sdata, frame, key, class_key)
    if key == contract.TILE_SQUARES:
        names = [genes] if isinstance(genes, str) else list(genes or [])
        frame = frame.join(_tile_measurements(sdata, names, predictions_key))
    circles = sdata.shapes[key].geom_type.eq("Point").all()
    write_features(path, features_of(frame, ellipses=bool(circles)))


def _check_replaceable(sdata: SpatialData, key_added: str) -> None:
    if key_added in sdata and not (key_added in sdata.shapes and OBJECT_TYPE in sdata.shapes[key_added]):
        raise ValueError(
            f"Section {contract.sample(sdata)!r} has an element {key_added!r} that was not read from GeoJSON. Choose "
            f"another name with `key_added=`, or remove the element first with `del sdata[{key_added!r}]`."
        )


def _check_on_image(sdata: SpatialData, frame: gpd.GeoDataFrame, path: Path) -> None:
    width, height = contract.image_size(sdata)
    bounds = frame.bounds
    outside = (bounds.maxx <= 0) | (bounds.maxy <= 0) | (bounds.minx >= width) | (bounds.miny >= height)
    if not outside.any():
        return
    message = (
        f"{int(outside.sum())} of {len(frame)} objects in {path.name} lie outside the H&E of {width} x {height} px; "
        f"they span x {bounds.minx.min():.0f} to {bounds.maxx.max():.0f}, y {bounds.miny.min():.0f} to "
        f"{bounds.maxy.max():.0f}."
    )
    if outside.all():
        raise ValueError(f"{message} Pass the file of this image, with coordinates in full-resolution pixels.")
    warnings.warn(message, UserWarning, stacklevel=3)


def _as_objects(sdata: SpatialData, frame: gpd.GeoDataFrame, key: str) -> gpd.GeoDataFrame:
    """Add the columns of QuPath objects to shapes that were not read from GeoJSON."""
    is_tiles = key == contract.TILE_SQUARES
    ids = [uuid.uuid5(uuid.NAMESPACE_URL, f"{contract.sample(sdata)}/{key}/{index}") for index in frame.index]
    columns: dict[str, Any] = {
        ID: [str(id_) for id_ in ids],
        OBJECT_TYPE: "tile" if is_tiles else "detection",
        CLASSIFICATION: None,
        COLOR: None,
        NAME: None,
        LOCKED: False,
        MEMBERS: None,
    }
    frame = frame.drop(columns=[name for name in COLUMNS if name in frame]).assign(**columns)
    if is_tiles:
        frame[NAME] = _of_shapes(contract.tiles(sdata), contract.tiles(sdata).obs_names, frame.index)
    return frame


def _of_shapes(table: AnnData, values: Any, index: pd.Index) -> pd.Series:
    """Return the values of table rows in the order of the annotated shapes."""
    instances = table.obs[contract.keys_of(table)["instance_key"]].to_numpy()
    return pd.Series(np.asarray(values), index=instances).reindex(index)


def _classify(sdata: SpatialData, frame: gpd.GeoDataFrame, key: str, class_key: str) -> None:
    """Write a column of the shapes, or of an annotating table, as classification with one color per class."""
    if class_key in sdata.shapes[key]:
        column = sdata.shapes[key][class_key]
    else:
        annotating = [
            table for table in sdata.tables.values() if key in contract.regions_of(table) and class_key in table.obs
        ]
        if not annotating:
            raise KeyError(
                f"No column {class_key!r} in the shapes {key!r} (found {list(sdata.shapes[key].columns)}), nor in "
                "`obs` of a table that annotates them. Choose a column with `class_key=`."
            )
        column = _of_shapes(annotating[0], annotating[0].obs[class_key].astype(object), frame.index)
        column = column.astype(annotating[0].obs[class_key].dtype)
    classes = (
        column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else sorted(column.dropna().unique())
    )
    colors = dict(zip(map(str, classes), _distinct_colors(len(classes)), strict=True))
    names = [None if pd.isna(value) else str(value) for value in column]
    frame[CLASSIFICATION] = pd.Series(names, index=frame.index, dtype=object)
    frame[COLOR] = pd.Series([colors.get(name) if name is not None else None for name in names], frame.index, object)


def _distinct_colors(n_colors: int) -> list[str]:
    """Return colors around the color wheel, with different brightness for neighbors."""
    colors = (
        colorsys.hsv_to_rgb(place / max(n_colors, 1), 0.85, (1.0, 0.8, 0.6)[place % 3]) for place in range(n_colors)
    )
    return ["#" + "".join(f"{round(255 * level):02x}" for level in color) for color in colors]


def _tile_measurements(sdata: SpatialData, genes: list[str], key: str) -> pd.DataFrame:
    """Return the measurements of tiles, one row per tile, indexed by ``instance_id``."""
    tiles = contract.tiles(sdata)
    columns = [name for name in ("tissue_fraction",) if name in tiles.obs and tiles.obs[name].notna().any()]
    frame = tiles.obs.set_index(contract.INSTANCE_KEY)[columns]
    if not genes and key not in sdata.tables:
        return frame
    table = contract.predictions(sdata, key)
    unknown = [gene for gene in genes if gene not in table.var_names]
    if unknown:
        raise KeyError(
            f"No predictions of {unknown[:5]} in section {contract.sample(sdata)!r}; genes such as "
            f"{list(table.var_names[:5])} were predicted."
        )
    measured = {} if "ood_score" not in table.obs else {"ood_score": table.obs["ood_score"].to_numpy()}
    for gene in genes:
        column = table.var_names.get_loc(gene)
        for name, values in [
            ("mean", table.X),
            *((name, table.layers[name]) for name in LAYERS if name in table.layers),
        ]:
            measured[f"{gene}: {name}"] = np.asarray(values[:, column], dtype=np.float64).ravel()
    return frame.join(pd.DataFrame(measured, index=table.obs[contract.INSTANCE_KEY].to_numpy()))
