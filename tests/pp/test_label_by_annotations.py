"""Classes of annotations on tiles, spots and nuclei."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData

from stimage_sd import contract, io
from stimage_sd.pp import label_by_annotations
from stimage_sd.pp._label_by_annotations import smallest_around


@pytest.fixture
def section(make_spots: Any) -> SpatialData:
    """8 x 8 spots, 40 px apart from 40 px on, with an annotation of the left half and a smaller one within."""
    section = make_spots(n_side=8)
    annotate(section, {"Stroma": shapely.box(0, 0, 180, 400), "Tumor": shapely.box(30, 30, 90, 90)})
    return section


def annotate(section: SpatialData, areas: dict[str, shapely.Geometry], **columns: Any) -> None:
    classes = pd.Categorical(list(areas), categories=list(areas))
    frame = gpd.GeoDataFrame({"classification": classes, **columns}, geometry=list(areas.values()))
    contract.write_shapes(section, frame, name="annotations")


def expected(centers: np.ndarray) -> list[str | None]:
    """By the two boxes, point by point."""
    return [
        "Tumor" if 30 <= x <= 90 and 30 <= y <= 90 else "Stroma" if x <= 180 and y <= 400 else None for x, y in centers
    ]


def listed(column: pd.Series) -> list[str | None]:
    return [None if pd.isna(value) else value for value in column]


@pytest.mark.parametrize("onto", ["tiles", "spots"])
def test_the_smallest_annotation_wins(section: SpatialData, onto: str) -> None:
    label_by_annotations(section, onto=onto)  # type: ignore[arg-type]
    table = contract.tiles(section) if onto == "tiles" else contract.counts(section)
    column = table.obs["annotation"]
    assert listed(column) == expected(np.asarray(table.obsm["spatial"]))
    assert column.cat.categories.tolist() == ["Stroma", "Tumor"]
    assert column.isna().sum() == 32
    assert contract.info(section)["history"][-1]["parameters"]["n_labeled"] == 32


def test_nuclei_and_the_table_that_annotates_them(section: SpatialData) -> None:
    centers = np.array([[50.0, 50.0], [120.0, 60.0], [300.0, 300.0]])
    frame = gpd.GeoDataFrame({"cell_type": list("aab")}, geometry=shapely.buffer(shapely.points(centers), 4))
    table = AnnData(np.zeros((3, 2), np.float32), obs=pd.DataFrame({"instance_id": [2, 0, 1]}, index=list("xyz")))
    contract.write_cells(section, frame, table, name="nuclei")
    label_by_annotations(section, onto="nuclei", key_added="compartment")
    assert listed(section.shapes["nuclei"]["compartment"]) == ["Tumor", "Stroma", None]
    assert listed(contract.cell_types(section).obs["compartment"]) == [None, "Tumor", "Stroma"]


def test_labels_survive_the_disk(section: SpatialData, tmp_path: Path) -> None:
    import spatialdata

    label_by_annotations(section)
    section.write(tmp_path / "section.zarr")
    back = contract.tiles(spatialdata.read_zarr(tmp_path / "section.zarr")).obs["annotation"]
    assert listed(back) == listed(contract.tiles(section).obs["annotation"])


def test_detections_and_unclassified_annotations_do_not_count(make_spots: Any, tmp_path: Path) -> None:
    section = make_spots(n_side=4)
    ring = [[[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]]
    small = [[[0, 0], [60, 0], [60, 60], [0, 60], [0, 0]]]
    polygons = [
        (ring, {"objectType": "annotation", "classification": {"name": "Tumor", "color": [1, 2, 3]}}),
        (small, {"objectType": "annotation"}),
        (small, {"objectType": "cell", "classification": {"name": "Immune", "color": [1, 2, 3]}}),
    ]
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": coordinates}, "properties": properties}
        for coordinates, properties in polygons
    ]
    path = tmp_path / "objects.geojson"
    path.write_text(json.dumps(features))
    io.read_geojson(section, path)
    label_by_annotations(section)
    column = contract.tiles(section).obs["annotation"]
    assert column.cat.categories.tolist() == ["Tumor"]
    assert column.notna().sum() == 4


def test_holes_are_outside(make_spots: Any) -> None:
    section = make_spots(n_side=3)
    annotate(section, {"Ring": shapely.box(0, 0, 400, 400).difference(shapely.box(60, 60, 100, 100))})
    label_by_annotations(section, onto="spots")
    assert contract.counts(section).obs["annotation"].isna().to_numpy().nonzero()[0].tolist() == [4]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 6), st.integers(1, 6)), max_size=6),
    st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=8),
)
def test_smallest_around_is_a_plain_loop(boxes: list[tuple[int, ...]], points: list[tuple[int, int]]) -> None:
    found = smallest_around(
        np.array(points, dtype=float),
        np.array([shapely.box(x, y, x + width, y + height) for x, y, width, height in boxes], dtype=object),
    )
    for (x, y), number in zip(points, found, strict=True):
        around = [
            (width * height, index)
            for index, (left, top, width, height) in enumerate(boxes)
            if left <= x <= left + width and top <= y <= top + height
        ]
        assert number == (min(around)[1] if around else -1)


def test_what_is_refused(section: SpatialData, make_spots: Any) -> None:
    other = make_spots(n_side=3, sample="other")
    with pytest.raises(KeyError, match=r"Section 'other' has no annotations 'annotations'; its shapes: \['spots'"):
        label_by_annotations({"a": section, "b": other})
    assert "annotation" not in contract.tiles(section).obs
    with pytest.raises(KeyError, match="No column 'kind' in the annotations 'annotations'"):
        label_by_annotations(section, class_key="kind")
    with pytest.raises(KeyError, match="has no shapes 'nuclei'"):
        label_by_annotations(section, onto="nuclei")
    with pytest.raises(ValueError, match='Expected `onto` to be "tiles", "spots" or "nuclei", found \'cells\''):
        label_by_annotations(section, onto="cells")  # type: ignore[arg-type]
    annotate(section, {"Far": shapely.box(9000, 0, 9100, 100)})
    with pytest.raises(ValueError, match=r"None of 64 tiles .* lies in an annotation. .* x 9000 to 9100"):
        label_by_annotations(section)
    annotate(section, {"Cell": shapely.box(0, 0, 100, 100)}, object_type="cell")
    with pytest.raises(ValueError, match="No annotation of 'annotations' in section 'made' has a class"):
        label_by_annotations(section)
