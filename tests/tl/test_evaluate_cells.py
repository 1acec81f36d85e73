"""Scores of predicted cells: the rim of the truth, nuclei of unknown type, outlines that overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel

import stimage_sd as sti
from stimage_sd.image.polygons import covered_areas

CLASSES = ["immune", "stromal"]
Outlines = Sequence[shapely.Polygon]
Make = Callable[..., SpatialData]


@pytest.fixture(scope="module")
def make(make_slide: Callable[..., SpatialData]) -> Make:
    """A section of 200 px at 0.5 µm with measured nuclei and predicted cells."""

    def section(
        truth: Outlines,
        found: Outlines,
        *,
        types: Sequence[str | None] | None = None,
        said: Sequence[str] | None = None,
    ) -> SpatialData:
        sdata = make_slide(np.full((200, 200, 3), 200, np.uint8), mpp=0.5)
        measured = gpd.GeoDataFrame({"cell_type": types or ["immune"] * len(truth)}, geometry=list(truth))
        predicted = gpd.GeoDataFrame({}, geometry=list(found), index=np.arange(len(found)))
        said = said or ["immune"] * len(found)
        obs = pd.DataFrame(
            {"region": pd.Categorical(["found"] * len(found)), "instance_id": np.arange(len(found)),
             "cell_type": pd.Categorical(said, categories=CLASSES), "entropy": 0.1},
            index=[f"c{n}" for n in range(len(found))],
        )  # fmt: skip
        values = np.array([[0.9, 0.1] if name == "immune" else [0.1, 0.9] for name in said], dtype=np.float32)
        table = AnnData(values, obs, pd.DataFrame(index=CLASSES))
        sdata["nuclei"] = ShapesModel.parse(measured)
        sdata["found"] = ShapesModel.parse(predicted)
        sdata["cell_types"] = TableModel.parse(
            table, region="found", region_key="region", instance_key="instance_id"
        )  # fmt: skip
        return sdata

    return section


def discs(places: Sequence[tuple[float, float]] | np.ndarray, radius: float = 5.0) -> list[shapely.Polygon]:
    return [shapely.Point(x, y).buffer(radius) for x, y in places]


def test_predicted_cells_are_no_measure_of_themselves(make: Make) -> None:
    sdata = make(discs([(60, 60)]), discs([(60, 60)]))
    with pytest.raises(ValueError, match=r"found the predicted nuclei.*`truth_key=`: \['nuclei'\]"):
        sti.tl.evaluate_cells(sdata, truth_key="found")


@pytest.mark.parametrize("match", ["iou", "centers"])
@pytest.mark.parametrize("side", [2, 5])
def test_nuclei_at_the_rim_are_found(make: Make, match: str, side: int) -> None:
    """All nuclei are found within 0.3 px. One more is made up far outside of the measured ones and does not count."""
    places = 40 + 24.0 * np.stack(np.divmod(np.arange(side**2), side), axis=1)
    moved = places + np.random.default_rng(side).uniform(-0.3, 0.3, places.shape)
    sdata = make(discs(places), [*discs(moved), *discs([(190, 190)])])
    summary = sti.tl.evaluate_cells(sdata, match=match).summary.iloc[0]
    assert (summary["n_truth"], summary["n_found"], summary["n_matched"]) == (side**2,) * 3
    assert summary["precision"] == summary["recall"] == summary["f1"] == summary["mean_f1"] == 1.0
    assert summary["dice"] > 0.95
    assert sdata["cell_types"].obs["true_type"].notna().tolist() == [True] * side**2 + [False]


@pytest.mark.parametrize("match", ["iou", "centers"])
def test_cells_made_up_within_and_missed_nuclei_count(make: Make, match: str) -> None:
    places = [(30, 30), (60, 30), (30, 60), (60, 60)]
    sdata = make(discs(places), discs([*places[:3], (45, 45), (61, 90)]))
    summary = sti.tl.evaluate_cells(sdata, match=match).summary.iloc[0]
    assert (summary["n_truth"], summary["n_found"], summary["n_matched"]) == (4, 4, 3)
    assert summary["f1"] == summary["mean_f1"] == 0.75


@pytest.mark.parametrize("match", ["iou", "centers"])
def test_cells_on_nuclei_of_unknown_type_are_not_made_up(make: Make, match: str) -> None:
    """The outlines of two of them share less than half, so that their centers alone match."""
    places = [(30.0, 30.0), (60.0, 30.0), (30.0, 60.0), (60.0, 60.0)]
    radius = 5.0 if match == "iou" else 2.0
    sdata = make(discs(places), discs(places, radius), types=["immune", None, None, "stromal"],
                 said=["immune", "immune", "stromal", "stromal"])  # fmt: skip
    scores = sti.tl.evaluate_cells(sdata, match=match)
    classes = scores.classes.set_index("cell_type")
    assert classes["n_truth"].tolist() == classes["n_found"].tolist() == [1, 1]
    assert (classes[["precision", "recall", "f1", "f1_hovernet"]] == 1).all(axis=None)
    assert scores.summary["n_matched"].iloc[0] == 4
    assert scores.summary["f1"].iloc[0] == 1.0
    assert scores.confusion["n"].sum() == 2


@pytest.mark.parametrize("match", ["iou", "centers"])
def test_scores_of_overlapping_outlines_stay_within_one(make: Make, match: str) -> None:
    """Each nucleus measured two or three times; what is found is perfect but single."""
    places = [(30.0, 30.0), (60.0, 30.0), (30.0, 60.0), (60.0, 60.0)]
    twice = [place for n, place in enumerate(places) for place in [place, (place[0] + 0.5, place[1])][: 1 + n % 2]]
    for truth, found in ((discs(twice), discs(places)), (discs(places), discs(twice)), (discs(twice), discs(twice))):
        scores = sti.tl.evaluate_cells(make(truth, found), match=match)
        summary = scores.summary.iloc[0]
        for name in ("dice", "panoptic_quality", "aggregated_jaccard", "segmentation_quality", "f1", "mean_iou"):
            assert 0 < summary[name] <= 1 + 1e-9, name
        n_truth, n_found = len(truth), len(found)
        assert summary["n_matched"] == min(n_truth, n_found)
        assert summary["f1"] == pytest.approx(2 * min(n_truth, n_found) / (n_truth + n_found))
        one, other = shapely.union_all(truth), shapely.union_all(found)
        shared = shapely.intersection(one, other).area
        assert summary["dice"] == pytest.approx(2 * shared / (one.area + other.area))
        assert summary["mean_iou"] == pytest.approx(shared / shapely.union(one, other).area)
    assert [summary["dice"], summary["panoptic_quality"]] == pytest.approx([1, 1])


def test_areas_are_those_of_the_unions() -> None:
    random = np.random.default_rng(0)
    truth, found = (np.array(discs(random.random((40, 2)) * 40, 4)) for _ in range(2))
    one, other = shapely.union_all(truth), shapely.union_all(found)
    expected = one.area, other.area, shapely.intersection(one, other).area
    np.testing.assert_allclose(covered_areas(truth, found), expected)


def test_nothing_found(make: Make) -> None:
    places = [(30.0, 30.0), (60.0, 30.0)]
    summary = sti.tl.evaluate_cells(make(discs(places), discs([(150, 150)]))).summary.iloc[0]
    assert (summary["n_found"], summary["recall"], summary["f1"], summary["dice"]) == (0, 0, 0, 0)
