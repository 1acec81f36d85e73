"""Convert QuPath's GeoJSON files to features, features to a frame of shapes, and back."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from shapely.geometry import shape

from stimage_sd._files import replacing

#: outline of a cell that becomes its shape
Outline = Literal["cell", "nucleus"]
#: columns of a frame that are not measurements; `MEMBERS` is JSON of all content without a column
ID, OBJECT_TYPE, CLASSIFICATION, COLOR, NAME, LOCKED, MEMBERS = COLUMNS = (
    "id", "object_type", "classification", "color", "name", "locked", "members",
)  # fmt: skip
#: types that QuPath 0.2 wrote in the id of an object, and other spellings of types
LEGACY_TYPES = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathTileObject": "tile",
    "PathRootObject": "root",
    "TMACoreObject": "tmaCore",
    "tma_core": "tmaCore",
    "unknown": "annotation",
}
#: separator in QuPath's derived classes, such as "Tumor: Positive"
JOINT = ": "
_AREAS = ("Polygon", "MultiPolygon")
_POINTS_AND_LINES = ("Point", "MultiPoint", "LineString", "MultiLineString")
_DAMAGE = (json.JSONDecodeError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError)

Feature = dict[str, Any]
#: values of `COLUMNS`, with "measurements" and "geometry"
Row = dict[str, Any]


def read_features(path: Path) -> list[Feature]:
    """Read the features of a plain, gzipped or zipped file. Children follow their parent."""
    try:
        content = json.loads(_unpacked(path).decode("utf-8-sig"))
    except _DAMAGE as error:
        raise ValueError(f"Expected GeoJSON in {path}, found a file that cannot be read ({error}).") from error
    features = content
    if isinstance(content, dict):
        features = [content] if content.get("type") == "Feature" else content.get("features")
    if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
        kind = content.get("type") if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"Expected a FeatureCollection or a list of features in {path}, found {kind!r}. Export the objects from "
            "QuPath as GeoJSON."
        )
    return list(_with_children(features))


def write_features(path: Path, features: Iterable[Feature]) -> None:
    """Write a FeatureCollection, gzipped for ``.gz``. An existing file is replaced when writing is complete."""
    with (
        replacing(path) as complete,
        gzip.open(complete, "wt", encoding="utf-8")
        if path.suffix == ".gz"
        else complete.open("w", encoding="utf-8") as file,
    ):
        file.write('{"type": "FeatureCollection", "features": [')
        for index, feature in enumerate(features):
            file.write(",\n" if index else "\n")
            file.write(json.dumps(feature, ensure_ascii=False))
        file.write("\n]}\n")


def rows_of(features: list[Feature], *, outline: Outline = "cell") -> list[Row]:
    """Convert features to rows. Points and lines are left out."""
    rows = (_row(feature, index=index, outline=outline) for index, feature in enumerate(features))
    return [row for row in rows if row is not None]


def frame_of(rows: list[Row]) -> gpd.GeoDataFrame:
    """Convert rows to shapes with the columns `COLUMNS` and one column per measurement."""
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in COLUMNS}
    classes = list(dict.fromkeys(value for value in columns[CLASSIFICATION] if value is not None))
    columns[CLASSIFICATION] = pd.Categorical(columns[CLASSIFICATION], categories=classes)
    columns[LOCKED] = np.array(columns[LOCKED], dtype=bool)
    for name in (ID, OBJECT_TYPE, COLOR, NAME, MEMBERS):
        columns[name] = np.array(columns[name], dtype=object)
    for name in dict.fromkeys(name for row in rows for name in row["measurements"]):
        columns[name] = np.array([row["measurements"].get(name, np.nan) for row in rows], dtype=np.float64)
    return gpd.GeoDataFrame(columns, geometry=np.array([row["geometry"] for row in rows], dtype=object))


def parts_of(frame: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Split MultiPolygons into one shape per part, without the id of the whole."""
    parts = frame.explode(ignore_index=True)
    parts[ID] = np.full(len(parts), None, dtype=object)
    return parts


def repair(frame: gpd.GeoDataFrame) -> tuple[gpd.GeoDataFrame, int]:
    """Replace outlines that cross themselves by the area they enclose, and return how many crossed.

    Outlines without area are left out. Programs that trace nuclei write such outlines. Without repair, areas of
    clockwise and counterclockwise loops cancel.
    """
    crossed = ~frame.geometry.is_valid.to_numpy()
    if not crossed.any():
        return frame, 0
    outlines = frame.geometry.to_numpy().copy()
    # "structure" does not make holes of regions enclosed twice
    mended = shapely.make_valid(outlines[crossed], method="structure", keep_collapsed=False)
    outlines[crossed] = [_areas_of(one) for one in mended]
    frame = frame.set_geometry(outlines)
    return frame[frame.geometry.area.to_numpy() > 0].reset_index(drop=True), int(crossed.sum())


def _areas_of(geometry: shapely.Geometry) -> shapely.Geometry:
    """Return the polygons of a geometry, without its points and lines."""
    parts = [part for part in shapely.get_parts(geometry) if part.geom_type in _AREAS]
    return shapely.union_all(parts) if parts else shapely.Polygon()


def features_of(frame: gpd.GeoDataFrame, *, ellipses: bool = False) -> Iterator[Feature]:
    """Convert shapes with the columns `COLUMNS` to features. Other numeric columns become measurements.

    - `frame`: shapes in pixels of the image.
    - `ellipses`: whether QuPath should read the polygons as circles.
    """
    names, values = _measurements(frame)
    columns = [frame[name].astype(object).to_list() for name in COLUMNS]
    for row, (geometry, *fields) in enumerate(zip(frame.geometry, *columns, strict=True)):
        id_, object_type, classification, color, name, locked, members = (_or_none(value) for value in fields)
        rest = json.loads(members) if members else {}
        properties: dict[str, Any] = {"objectType": object_type}
        if name is not None:
            properties["name"] = name
        if classification is not None:
            properties["classification"] = _written_class(classification, color)
        if locked:
            properties["isLocked"] = True
        measurements = {names[column]: float(values[row, column]) for column in np.flatnonzero(~np.isnan(values[row]))}
        measurements = rest.get("measurements", {}) | measurements
        if measurements:
            properties["measurements"] = measurements
        properties |= rest.get("properties", {})
        feature: Feature = {"type": "Feature"} | ({} if id_ is None else {"id": id_})
        outer = _coordinates_of(geometry) | rest.get("geometry", {}) | ({"isEllipse": True} if ellipses else {})
        if "cell_geometry" in rest:
            feature |= {"geometry": rest["cell_geometry"], "nucleusGeometry": outer}
        else:
            feature |= {"geometry": outer}
        yield feature | rest.get("feature", {}) | {"properties": properties}


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    if data[:4] != b"PK\x03\x04":
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [name for name in archive.namelist() if name.lower().endswith((".geojson", ".json"))]
        entries = [name for name in entries if not name.startswith("__MACOSX/")]
        if len(entries) != 1:
            raise ValueError(f"Expected one GeoJSON file in {path}, found {entries or archive.namelist()[:5]}.")
        return archive.read(entries[0])


def _with_children(features: list[Feature]) -> Iterator[Feature]:
    for feature in features:
        properties = dict(feature.get("properties") or {})
        children = [child for name in ("childObjects", "children") for child in properties.pop(name, None) or []]
        yield {**feature, "properties": properties}
        yield from _with_children(children)


def _row(feature: Feature, *, index: int, outline: Outline) -> Row | None:
    """Convert one feature to a row; `None` without an area."""
    rest = {key: value for key, value in feature.items() if key not in ("type", "id", "geometry", "properties")}
    properties = dict(feature["properties"])
    geometry = feature.get("geometry")
    members: dict[str, Any] = {}
    if outline == "nucleus" and rest.get("nucleusGeometry"):
        members["cell_geometry"], geometry = geometry, rest.pop("nucleusGeometry")
    polygon = polygon_of(geometry, index=index)
    if geometry is None or polygon is None:
        return None
    given = feature.get("id")
    object_type = LEGACY_TYPES.get(given) if isinstance(given, str) else None
    id_ = None if given is None or object_type is not None else str(given)
    for name in ("type", "object_type", "objectType"):  # the last one counts
        if name in properties:
            stated = str(properties.pop(name))
            object_type = LEGACY_TYPES.get(stated, stated)
    classification, color = _read_class(properties.pop("classification", None), index=index)
    name = properties.pop("name", None)
    locked = properties.pop("isLocked", False)
    measurements = _read_measurements(properties.pop("measurements", None), index=index)
    members |= {
        "feature": rest,
        "geometry": {key: value for key, value in geometry.items() if key not in ("type", "coordinates")},
        "properties": properties,
        # NaN (in a column, NaN means missing), and measurements named as one of `COLUMNS`
        "measurements": {
            key: value for key, value in measurements.items() if np.isnan(value) or key in (*COLUMNS, "geometry")
        },
    }
    members = {key: value for key, value in members.items() if value}
    return {
        ID: id_,
        OBJECT_TYPE: object_type or "annotation",
        CLASSIFICATION: classification,
        COLOR: color,
        NAME: None if name is None else str(name),
        LOCKED: bool(locked),
        MEMBERS: json.dumps(members, ensure_ascii=False) if members else None,
        "measurements": {key: value for key, value in measurements.items() if key not in (*COLUMNS, "geometry")},
        "geometry": polygon,
    }


def polygon_of(geometry: Any, *, index: int) -> shapely.Geometry | None:
    """Return the polygons of a geometry, or `None` for points and lines."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if geometry is None or kind in _POINTS_AND_LINES:
        return None
    if kind not in _AREAS:
        raise ValueError(
            f"Expected a Polygon or a MultiPolygon as geometry of feature {index}, found {kind!r}. Export each area "
            "from QuPath as a separate object."
        )
    try:
        polygon = shapely.force_2d(shape(geometry))
    except (ValueError, TypeError, IndexError, KeyError, shapely.errors.ShapelyError) as error:
        raise ValueError(f"Expected rings of points as geometry of feature {index}: {error}") from error
    if polygon.is_empty or not np.isfinite(polygon.bounds).all():
        raise ValueError(f"Expected rings of points as geometry of feature {index}, found an empty or infinite one.")
    return polygon


def _coordinates_of(geometry: shapely.Polygon | shapely.MultiPolygon) -> dict[str, Any]:
    if isinstance(geometry, shapely.MultiPolygon):
        return {"type": "MultiPolygon", "coordinates": [_rings(part) for part in geometry.geoms]}
    return {"type": "Polygon", "coordinates": _rings(geometry)}


def _rings(polygon: shapely.Polygon) -> list[list[list[float]]]:
    return [shapely.get_coordinates(ring).tolist() for ring in (polygon.exterior, *polygon.interiors)]


def _read_class(value: Any, *, index: int) -> tuple[str | None, str | None]:
    """Return the name and color of a class, from any form that QuPath has used."""
    if not value:
        return None, None
    if isinstance(value, str):
        return value, None
    if isinstance(value, Mapping):
        name = value.get("name")
        if isinstance(value.get("names"), list) and name is None:
            name = JOINT.join(map(str, value["names"]))
        parent, _ = _read_class(value.get("parentClass"), index=index)
        if isinstance(name, str) and name:
            color = value["color"] if "color" in value else value.get("colorRGB")
            return JOINT.join(filter(None, (parent, name))), _read_color(color, index=index)
        if not name and not value.get("names"):
            return None, None  # QuPath's class without a name
    raise ValueError(
        f"Expected `classification` of feature {index} as a name, or as `name` (or `names`) and `color`, found "
        f"{value!r}."
    )


def _written_class(name: str, color: str | None) -> str | dict[str, Any]:
    if color is None:
        return name
    levels = [int(color[start : start + 2], 16) for start in range(1, len(color), 2)]
    return ({"names": name.split(JOINT)} if JOINT in name else {"name": name}) | {"color": levels}


def _read_color(value: Any, *, index: int) -> str | None:
    """Return ``#rrggbb``, or ``#rrggbbaa`` for a translucent color, from QuPath's list or packed integer."""
    levels = value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == []:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        alpha, *levels = (value >> shift & 255 for shift in (24, 16, 8, 0))
        levels += [] if alpha in (0, 255) else [alpha]
    if not (
        isinstance(levels, list)
        and len(levels) in (3, 4)
        and all(isinstance(level, int | float) and 0 <= level <= 255 and int(level) == level for level in levels)
    ):
        raise ValueError(f"Expected the color of feature {index} as [red, green, blue] of 0 to 255, found {value!r}.")
    return "#" + "".join(f"{int(level):02x}" for level in levels)


def _read_measurements(value: Any, *, index: int) -> dict[str, float]:
    """Read measurements: a dict since QuPath 0.4, a list of names and values before."""
    if not value:
        return {}
    try:
        if isinstance(value, list):
            return {str(entry["name"]): float(entry["value"]) for entry in value}
        return {str(name): np.nan if entry is None else float(entry) for name, entry in value.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `measurements` of feature {index} as numbers by name, found one that is not a number ({error})."
        ) from error


def _measurements(frame: gpd.GeoDataFrame) -> tuple[list[str], np.ndarray]:
    """Return the names and the values, ``(n_rows, n_names)``, of the measurement columns."""
    names = [
        name
        for name in frame.columns
        if name not in (*COLUMNS, frame.geometry.name)
        and pd.api.types.is_numeric_dtype(frame[name])
        and not pd.api.types.is_bool_dtype(frame[name])
    ]
    values = np.empty((len(frame), len(names)))
    for column, name in enumerate(names):
        values[:, column] = frame[name].to_numpy(dtype=np.float64, na_value=np.nan)
    return [str(name) for name in names], values


def _or_none(value: Any) -> Any:
    return None if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)) else value
