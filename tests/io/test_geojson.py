"""Objects from QuPath's GeoJSON and back."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData

from stimage_sd import contract, pp
from stimage_sd.io import read_geojson, write_geojson
from stimage_sd.io._geojson_features import features_of, frame_of, read_features, rows_of, write_features

PINK = np.full((400, 600, 3), (200, 120, 180), np.uint8)


def square(left: float, top: float, side: float) -> list[list[list[float]]]:
    return [[[left, top], [left + side, top], [left + side, top + side], [left, top + side], [left, top]]]


def feature(coordinates: Any = None, *, kind: str = "Polygon", **properties: Any) -> dict[str, Any]:
    coordinates = square(10, 10, 50) if coordinates is None else coordinates
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


#: what QuPath 0.5 exports: an annotation with a hole, an ellipse, cells with nuclei, a derived class
QUPATH_05 = [
    {
        "type": "Feature",
        "id": "31f2a2a0-60dc-47a3-a9a8-4ae0a9b5a0d7",
        "geometry": {"type": "Polygon", "coordinates": [*square(20.25, 30.5, 200), *square(50, 60, 20)]},
        "properties": {
            "objectType": "annotation",
            "name": "Region 1",
            "color": [255, 255, 0],
            "classification": {"name": "Tumor", "color": [200, 0, 0]},
            "isLocked": True,
            "metadata": {"ANNOTATION_DESCRIPTION": "seen by two"},
        },
    },
    {
        "type": "Feature",
        "id": "d9f30d6b-0ee0-47c5-9a2a-d6b9a1c3e2f0",
        "geometry": {"type": "Polygon", "coordinates": square(300, 40, 60), "isEllipse": True},
        "properties": {"objectType": "annotation"},
    },
    {
        "type": "Feature",
        "id": "0d4a7ea3-4a3d-4a74-a5f5-9a4f1ee6a001",
        "geometry": {
            "type": "MultiPolygon",
            "coordinates": [square(400, 100, 9), square(420, 100, 9)],
            "plane": {"c": -1, "z": 1, "t": 0},
        },
        "nucleusGeometry": {"type": "Polygon", "coordinates": square(402, 102, 4)},
        "properties": {
            "objectType": "cell",
            "classification": {"names": ["Immune", "CD8"], "color": [0, 128, 255, 90]},
            "measurements": {"Nucleus: Area µm^2": 33.123456789, "Nucleus: Solidity": float("nan"), "name": 2.0},
        },
    },
]
#: what QuPath 0.2 and 0.3 exported: types as ids, measurements as a list, packed colors, parent classes
QUPATH_02 = [
    {
        "type": "Feature",
        "id": "PathDetectionObject",
        "geometry": {"type": "Polygon", "coordinates": square(5, 5, 10)},
        "properties": {
            "classification": {
                "name": "Positive",
                "colorRGB": -377282,
                "parentClass": {"name": "Tumor", "colorRGB": 1},
            },
            "isLocked": False,
            "measurements": [{"name": "Nucleus: Area", "value": 12.5}, {"name": "Nucleus: Max", "value": 3}],
        },
    },
    {
        "type": "Feature",
        "id": "PathAnnotationObject",
        "geometry": {"type": "Polygon", "coordinates": square(50, 5, 10)},
        "properties": {"classification": {"name": "Stroma", "colorRGB": 0x96C896}, "measurements": []},
    },
]


@pytest.fixture
def slide(make_slide: Any) -> SpatialData:
    return make_slide(PINK, mpp=0.5)


def put(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def listed(column: pd.Series) -> list:
    """Values of a column, missing ones as `None`, as which pandas has them depends on its version."""
    return column.astype(object).where(column.notna(), None).tolist()


def test_a_file_of_qupath_05(slide: SpatialData, tmp_path: Path) -> None:
    path = put(tmp_path / "objects.geojson", {"type": "FeatureCollection", "features": QUPATH_05})
    read_geojson(slide, path)
    frame = slide.shapes["annotations"]
    assert frame["id"].tolist() == [feature["id"] for feature in QUPATH_05]
    assert frame["object_type"].tolist() == ["annotation", "annotation", "cell"]
    assert listed(frame["classification"]) == ["Tumor", None, "Immune: CD8"]
    assert listed(frame["color"]) == ["#c80000", None, "#0080ff5a"]
    assert listed(frame["name"]) == ["Region 1", None, None]
    assert frame["locked"].tolist() == [True, False, False]
    assert frame["Nucleus: Area µm^2"].iloc[2] == 33.123456789
    assert frame.area.tolist() == [200.0**2 - 20**2, 3600.0, 162.0]
    assert frame.bounds.iloc[0].tolist() == [20.25, 30.5, 220.25, 230.5]
    assert contract.info(slide)["history"][-1]["step"] == "io.read_geojson"
    assert contract.info(slide)["history"][-1]["parameters"]["n_objects"] == 3


def test_what_is_written_is_what_was_read(slide: SpatialData, tmp_path: Path) -> None:
    path = put(tmp_path / "objects.geojson", {"type": "FeatureCollection", "features": QUPATH_05})
    read_geojson(slide, path)
    write_geojson(slide, tmp_path / "back.geojson")
    back = json.loads((tmp_path / "back.geojson").read_text(encoding="utf-8"))["features"]
    np.testing.assert_equal(back, QUPATH_05)  # NaN equals NaN


def test_the_round_trip_is_exact_after_the_section_was_on_disk(slide: SpatialData, tmp_path: Path) -> None:
    read_geojson(slide, put(tmp_path / "objects.geojson", QUPATH_05))
    slide.write(tmp_path / "section.zarr")
    section = spatialdata.read_zarr(tmp_path / "section.zarr")
    write_geojson(section, tmp_path / "back.geojson")
    np.testing.assert_equal(json.loads((tmp_path / "back.geojson").read_text("utf-8"))["features"], QUPATH_05)


def test_a_file_of_qupath_02(slide: SpatialData, tmp_path: Path) -> None:
    read_geojson(slide, put(tmp_path / "old.json", QUPATH_02))
    frame = slide.shapes["annotations"]
    assert frame["object_type"].tolist() == ["detection", "annotation"]
    assert frame["id"].tolist() == [None, None]
    assert frame["classification"].tolist() == ["Tumor: Positive", "Stroma"]
    assert frame["color"].tolist() == ["#fa3e3e", "#96c896"]
    assert frame["Nucleus: Area"].iloc[0] == 12.5
    assert np.isnan(frame["Nucleus: Max"].iloc[1])
    write_geojson(slide, tmp_path / "new.geojson")
    new = json.loads((tmp_path / "new.geojson").read_text())["features"]
    assert new[0]["properties"]["classification"] == {"names": ["Tumor", "Positive"], "color": [250, 62, 62]}
    assert new[0]["properties"]["measurements"] == {"Nucleus: Area": 12.5, "Nucleus: Max": 3.0}


COORDINATE = st.floats(-1e6, 1e6, allow_nan=False, width=64)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


@st.composite
def polygons(draw: st.DrawFn) -> list[list[list[float]]]:
    x, y, side = draw(COORDINATE), draw(COORDINATE), draw(st.floats(0.01, 1e5))
    rings = square(x, y, side)
    return rings + square(x + side / 4, y + side / 4, side / 2) if draw(st.booleans()) else rings


@st.composite
def objects(draw: st.DrawFn) -> dict[str, Any]:
    coordinates, kind = draw(polygons()), "Polygon"
    if draw(st.booleans()):
        coordinates, kind = [coordinates, draw(polygons())], "MultiPolygon"
    properties: dict[str, Any] = {"objectType": draw(st.sampled_from(["annotation", "detection", "cell", "tile"]))}
    color = st.lists(st.integers(0, 255), min_size=3, max_size=4)
    class_ = draw(st.none() | TEXT | st.fixed_dictionaries({"name": TEXT, "color": color}))
    optional = {
        "classification": class_,
        "name": draw(st.none() | TEXT),
        "isLocked": draw(st.just(True) | st.none()),
        "measurements": draw(st.none() | st.dictionaries(TEXT, st.floats(), max_size=4)),
        "metadata": draw(st.none() | st.dictionaries(TEXT, TEXT, min_size=1, max_size=2)),
    }
    properties |= {key: value for key, value in optional.items() if value is not None}
    made = feature(coordinates, kind=kind, **properties)
    return made | ({"id": str(draw(st.uuids()))} if draw(st.booleans()) else {})


@given(st.lists(objects(), min_size=1, max_size=4))
def test_the_round_trip_is_exact(made: list[dict[str, Any]]) -> None:
    frame = frame_of(rows_of(made))
    text = json.dumps(list(features_of(frame)))
    back = frame_of(rows_of(json.loads(text)))
    assert set(back) == set(frame)
    columns = [name for name in frame if name != "geometry"]
    pd.testing.assert_frame_equal(pd.DataFrame(back)[columns], pd.DataFrame(frame)[columns], check_exact=True)
    for before, after, given_ in zip(frame.geometry, back.geometry, made, strict=True):
        assert shapely.equals_identical(before, after)
        assert shapely.geometry.mapping(after)["type"] == given_["geometry"]["type"]
    for given_, written in zip(made, json.loads(text), strict=True):
        np.testing.assert_equal(written.get("id"), given_.get("id"))
        measured = written["properties"].get("measurements", {})
        np.testing.assert_equal(measured, given_["properties"].get("measurements", {}))


@pytest.mark.parametrize("packing", ["list", "gzip", "zip", "bom"])
def test_packings(slide: SpatialData, tmp_path: Path, packing: str) -> None:
    text = json.dumps(QUPATH_05)
    path = tmp_path / "objects.geojson"
    if packing == "gzip":
        path = tmp_path / "objects.geojson.gz"
        path.write_bytes(gzip.compress(text.encode()))
    elif packing == "zip":
        path = tmp_path / "objects.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/._objects.geojson", "none")
            archive.writestr("objects.geojson", text)
    else:
        path.write_text(text, encoding="utf-8-sig" if packing == "bom" else "utf-8")
    read_geojson(slide, path)
    assert len(slide.shapes["annotations"]) == 3


def test_gzipped_out(slide: SpatialData, tmp_path: Path) -> None:
    read_geojson(slide, put(tmp_path / "a.geojson", QUPATH_05))
    write_geojson(slide, tmp_path / "out" / "b.geojson.gz")
    assert len(json.loads(gzip.decompress((tmp_path / "out" / "b.geojson.gz").read_bytes()))["features"]) == 3


def test_the_nucleus_instead_of_the_cell(slide: SpatialData, tmp_path: Path) -> None:
    path = put(tmp_path / "cells.geojson", QUPATH_05)
    read_geojson(slide, path, key_added="nuclei", object_types="cell", outline="nucleus")
    frame = contract.nuclei(slide)
    assert frame.area.tolist() == [16.0]
    assert "Immune: CD8" in frame["classification"].cat.categories
    assert len(frame["classification"].cat.categories) == 1
    write_geojson(slide, tmp_path / "back.geojson", key="nuclei")
    back = json.loads((tmp_path / "back.geojson").read_text(encoding="utf-8"))["features"]
    assert back[0]["geometry"]["coordinates"] == QUPATH_05[2]["geometry"]["coordinates"]
    assert back[0]["nucleusGeometry"] == QUPATH_05[2]["nucleusGeometry"]


def test_parts_of_multipolygons(slide: SpatialData, tmp_path: Path) -> None:
    nuclei = [square(10 * number, 20, 5) for number in range(5)]
    classes = {"Neoplastic": nuclei[:3], "Dead": nuclei[3:]}
    made = [
        feature(parts, kind="MultiPolygon", objectType="annotation", classification={"name": name, "color": [9, 0, 0]})
        for name, parts in classes.items()
    ]
    path = put(tmp_path / "cellvit.geojson", made)
    read_geojson(slide, path, key_added="nuclei", explode=True)
    assert slide.shapes["nuclei"]["classification"].tolist() == ["Neoplastic"] * 3 + ["Dead"] * 2
    assert set(slide.shapes["nuclei"].geom_type) == {"Polygon"}


def test_children_follow_their_parent(slide: SpatialData, tmp_path: Path) -> None:
    child = feature(square(12, 12, 4), objectType="cell")
    grown_up = feature(objectType="annotation", childObjects=[child, child])
    read_geojson(slide, put(tmp_path / "tree.geojson", [grown_up, feature()]))
    assert slide.shapes["annotations"]["object_type"].tolist() == ["annotation", "cell", "cell", "annotation"]


def test_points_and_lines_are_left_out(slide: SpatialData, tmp_path: Path) -> None:
    points = feature([[1, 2], [3, 4]], kind="MultiPoint", objectType="annotation")
    root = {"type": "Feature", "geometry": None, "properties": {"objectType": "root"}}
    path = put(tmp_path / "points.geojson", [points, feature(), root])
    with pytest.warns(UserWarning, match="2 of 3 objects in points.geojson are points, lines or without geometry"):
        read_geojson(slide, path)
    assert len(slide.shapes["annotations"]) == 1
    with (
        pytest.warns(UserWarning, match="1 of 1 objects"),
        pytest.raises(ValueError, match=r"Expected areas in .*, found 1 objects and none with an area"),
    ):
        read_geojson(slide, put(path, [points]))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": []}, "properties": {}},
         "Expected a Polygon or a MultiPolygon as geometry of feature 0, found 'GeometryCollection'"),
        (feature([[[0, 0], [1, 1]]]), "Expected rings of points as geometry of feature 0"),
        (feature([]), "Expected rings of points as geometry of feature 0, found an empty"),
        (feature(classification={"color": [1, 2, 3], "names": 3}), "Expected `classification` of feature 0"),
        (feature(classification={"name": "A", "color": [1, 2, 300]}), r"Expected the color of .* 0 .*\[1, 2, 300\]"),
        (feature(measurements={"Area": "wide"}), "Expected `measurements` of feature 0 as numbers"),
        (feature(measurements=[{"value": 3}]), "Expected `measurements` of feature 0 as numbers"),
    ],
)  # fmt: skip
def test_features_that_are_refused(slide: SpatialData, tmp_path: Path, made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_geojson(slide, put(tmp_path / "bad.geojson", [made]))
    assert not slide.shapes


def test_files_that_are_refused(slide: SpatialData, tmp_path: Path) -> None:
    path = tmp_path / "bad.geojson"
    with pytest.raises(FileNotFoundError, match=r"Expected a GeoJSON file at .*bad.geojson"):
        read_geojson(slide, path)
    path.write_text('{"type": "FeatureCollection", "features": [')
    with pytest.raises(ValueError, match=r"Expected GeoJSON in .*, found a file that cannot be read"):
        read_geojson(slide, path)
    path.write_bytes(gzip.compress(json.dumps(QUPATH_05).encode())[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        read_geojson(slide, path)
    with pytest.raises(ValueError, match=r"Expected a FeatureCollection or a list of features .* found 'Polygon'"):
        read_geojson(slide, put(path, {"type": "Polygon", "coordinates": square(0, 0, 1)}))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "none")
    with pytest.raises(ValueError, match=r"Expected one GeoJSON file in .*, found \['readme.txt'\]"):
        read_geojson(slide, path)
    with pytest.raises(ValueError, match=r"Expected objects of type \['cell'\] in .*, found {'annotation': 1}"):
        read_geojson(slide, put(path, [feature()]), object_types=["cell"])
    with pytest.raises(ValueError, match='Expected `outline` to be "cell" or "nucleus"'):
        read_geojson(slide, path, outline="both")  # type: ignore[arg-type]


def test_objects_of_another_image(slide: SpatialData, tmp_path: Path) -> None:
    far = feature(square(5000, 10, 50))
    with pytest.raises(ValueError, match=r"1 of 1 objects .* lie outside the H&E of 600 x 400 px; .* x 5000 to 5050"):
        read_geojson(slide, put(tmp_path / "far.geojson", [far]))
    with pytest.warns(UserWarning, match="1 of 2 objects in far.geojson lie outside"):
        read_geojson(slide, put(tmp_path / "far.geojson", [far, feature()]))
    assert len(slide.shapes["annotations"]) == 2


def test_only_what_was_read_before_is_replaced(slide: SpatialData, tmp_path: Path) -> None:
    path = put(tmp_path / "a.geojson", QUPATH_05)
    read_geojson(slide, path)
    read_geojson(slide, put(path, [feature()]))
    assert len(slide.shapes["annotations"]) == 1
    pp.tile(slide, size_um=50)
    for name in ("tile_squares", "he", "tiles"):
        with pytest.raises(ValueError, match=f"has an element '{name}' that was not read from GeoJSON"):
            read_geojson(slide, path, key_added=name)


@pytest.fixture
def predicted(slide: SpatialData) -> SpatialData:
    """Tiles with predictions of two genes on all but the first tile."""
    pp.tile(slide, size_um=50)
    tiles = contract.tiles(slide)
    tiles.obs.loc["tile_0", "keep"] = False
    kept = tiles[1:]
    generator = np.random.default_rng(0)
    layers = ("lower", "upper", "aleatoric", "epistemic", "total_variance")
    table = kept.copy()
    values = {name: generator.uniform(0, 9, (len(kept), 2)).astype(np.float32) for name in ("mean", *layers)}
    table = type(kept)(
        X=values.pop("mean"),
        obs=kept.obs.drop(columns="region").assign(ood_score=generator.uniform(0, 2, len(kept))),
        var=pd.DataFrame(index=["ERBB2", "CD74"]),
        layers=values,
        obsm={"spatial": np.asarray(kept.obsm["spatial"])},
    )
    contract.write_predictions(slide, table)
    return slide


def test_tiles_with_predictions(predicted: SpatialData, tmp_path: Path) -> None:
    write_geojson(predicted, tmp_path / "tiles.geojson", key="tile_squares", genes="CD74")
    features = json.loads((tmp_path / "tiles.geojson").read_text())["features"]
    assert len(features) == len(contract.tiles(predicted))
    assert features[0]["properties"]["measurements"] == {"tissue_fraction": 1.0}
    table = contract.predictions(predicted)
    for row, written in enumerate(features[1:]):
        measured = written["properties"]["measurements"]
        assert set(measured) == {
            "tissue_fraction", "ood_score", "CD74: mean", "CD74: lower", "CD74: upper", "CD74: aleatoric",
            "CD74: epistemic", "CD74: total_variance",
        }  # fmt: skip
        assert measured["CD74: mean"] == float(table.X[row, 1])
        assert measured["CD74: upper"] == float(table.layers["upper"][row, 1])
        assert measured["ood_score"] == table.obs["ood_score"].iloc[row]
        assert written["properties"]["objectType"] == "tile"
        assert written["properties"]["name"] == table.obs_names[row]
        left, top, right, bottom = contract.tile_squares(predicted, [table.obs_names[row]])[0]
        assert shapely.geometry.shape(written["geometry"]).bounds == (left, top, right, bottom)
    assert len({written["id"] for written in features}) == len(features)


def test_predictions_larger_than_memory(predicted: SpatialData, tmp_path: Path) -> None:
    import dask.array as da

    table = contract.predictions(predicted)
    expected = float(table.X[0, 0])
    table.X = da.from_array(table.X)
    write_geojson(predicted, tmp_path / "tiles.geojson", key="tile_squares", genes=["ERBB2"])
    features = json.loads((tmp_path / "tiles.geojson").read_text())["features"]
    assert features[1]["properties"]["measurements"]["ERBB2: mean"] == expected


def test_classes_of_tiles(predicted: SpatialData, tmp_path: Path) -> None:
    tiles = contract.tiles(predicted)
    tiles.obs["annotation"] = pd.Categorical(["Tumor", "Stroma", *[None] * (len(tiles) - 2)])
    write_geojson(predicted, tmp_path / "tiles.geojson", key="tile_squares", class_key="annotation")
    features = json.loads((tmp_path / "tiles.geojson").read_text())["features"]
    classes = [written["properties"].get("classification") for written in features]
    assert [class_["name"] for class_ in classes[:2]] == ["Tumor", "Stroma"]
    assert classes[0]["color"] != classes[1]["color"]
    assert set(classes[2:]) == {None}


def test_nuclei_with_types(slide: SpatialData, tmp_path: Path) -> None:
    types = [f"type {number}" for number in range(30)]
    frame = gpd.GeoDataFrame(
        {
            "cell_type": pd.Categorical(types, categories=types),
            "entropy": np.linspace(0, 1, 30).astype(np.float32),
            "flag": [True] * 30,
        },
        geometry=[shapely.box(10 * number, 5, 10 * number + 8, 12) for number in range(30)],
    )
    contract.write_shapes(slide, frame, name="nuclei")
    write_geojson(slide, tmp_path / "nuclei.geojson", key="nuclei")
    features = json.loads((tmp_path / "nuclei.geojson").read_text())["features"]
    assert [written["properties"]["classification"]["name"] for written in features] == types
    assert len({tuple(written["properties"]["classification"]["color"]) for written in features}) == 30
    assert {written["properties"]["objectType"] for written in features} == {"detection"}
    assert features[3]["properties"]["measurements"] == {"entropy": float(np.float32(frame["entropy"].iloc[3]))}
    read_geojson(slide, tmp_path / "nuclei.geojson", key_added="again")
    again = slide.shapes["again"]
    assert again["classification"].tolist() == types
    assert all(shapely.equals_identical(a, b) for a, b in zip(again.geometry, frame.geometry, strict=True))


def test_spots_become_circles(make_spots: Any, tmp_path: Path) -> None:
    section = make_spots(n_side=3, tiled=False)
    write_geojson(section, tmp_path / "spots.geojson", key="spots")
    features = json.loads((tmp_path / "spots.geojson").read_text())["features"]
    assert all(written["geometry"]["isEllipse"] for written in features)
    bounds = [shapely.geometry.shape(written["geometry"]).bounds for written in features]
    centers = contract.counts(section).obsm["spatial"]
    np.testing.assert_allclose(bounds, np.hstack([centers - 10, centers + 10]))


def test_writing_that_is_refused(predicted: SpatialData, tmp_path: Path) -> None:
    path = tmp_path / "out.geojson"
    with pytest.raises(KeyError, match=r"has no shapes 'annotations'; its shapes: \['tile_squares'\]"):
        write_geojson(predicted, path)
    with pytest.raises(KeyError, match=r"No predictions of \['KRT5'\] .* genes such as \['ERBB2', 'CD74'\]"):
        write_geojson(predicted, path, key="tile_squares", genes=["KRT5"])
    with pytest.raises(KeyError, match="No column 'kind' in the shapes 'tile_squares'"):
        write_geojson(predicted, path, key="tile_squares", class_key="kind")
    assert not path.exists()
    read_geojson(predicted, put(tmp_path / "a.geojson", [feature()]))
    with pytest.raises(ValueError, match="Expected `key=\"tile_squares\"` with `genes=`, found 'annotations'"):
        write_geojson(predicted, path, genes=["ERBB2"])
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists. Choose another name, or pass `overwrite=True`"):
        write_geojson(predicted, path)
    write_geojson(predicted, path, overwrite=True)
    assert len(read_features(path)) == 1
    del predicted.tables["predictions"]
    with pytest.raises(KeyError, match="has no predictions"):
        write_geojson(predicted, path, key="tile_squares", genes=["ERBB2"], overwrite=True)
    assert len(read_features(path)) == 1


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = put(tmp_path / "a.geojson", [feature()])
    before = path.read_bytes()

    def broken() -> Any:
        yield feature()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_features(path, broken())
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.geojson"]


def test_outlines_that_cross_themselves_become_the_area_that_they_enclose(slide: SpatialData, tmp_path: Path) -> None:
    bow_tie = [[[100, 100], [140, 140], [140, 100], [100, 140], [100, 100]]]
    line = [[[10, 10], [20, 20], [10, 10], [10, 10]]]
    path = tmp_path / "crossed.geojson"
    path.write_text(json.dumps({"features": [feature(), feature(bow_tie, name="tie"), feature(line)]}))
    with pytest.warns(UserWarning, match="outlines of 2 of 3 objects in crossed.geojson cross themselves.*; 1 without"):
        read_geojson(slide, path)
    found = slide.shapes["annotations"]
    assert found.is_valid.all()
    # two triangles of 40 px by 20 px
    assert found.area.tolist() == [2500.0, 2 * 40 * 20 / 2]
    assert listed(found["name"]) == [None, "tie"]
