"""Pictures of explained nuclei."""

from __future__ import annotations

import geopandas
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract, pl, tl


@pytest.fixture
def explained(make_spots) -> SpatialData:
    """A section with scores of two genes on 30 nuclei of each of three tiles."""
    sdata = make_spots(n_side=5)
    random = np.random.default_rng(0)
    tiles = np.repeat([3, 7, 11], 30)
    centers = np.asarray(sdata.tables["tiles"].obsm["spatial"])[tiles]
    points = centers + random.uniform(-8, 8, (90, 2))
    frame = geopandas.GeoDataFrame(
        {"tile": tiles, "nucleus": np.arange(90), "kind": random.choice(["tumor", "immune"], 90)},
        geometry=shapely.buffer(shapely.points(points), random.uniform(0.5, 2, 90)),
    )
    frame["area_px"] = frame.area
    frame["area_um2"] = frame.area * 6.25
    frame["lime_A"], frame["lime_B"] = frame["area_px"] - 5, random.normal(size=90)
    contract.write_explained(sdata, frame)
    table = AnnData(
        X=np.zeros((3, 1), np.float32),
        obs=pd.DataFrame({"instance_id": [3, 7, 11]}, index=list("abc")),
        var=pd.DataFrame(index=["A"]),
        layers={"r2": np.float32([[0.25], [0.5], [0.1]]), "stability": np.float32([[0.95], [0.4], [0.97]])},
    )
    table.obs["n_segments"] = 30
    contract.write_explanations(sdata, table)
    return sdata


def test_nuclei_have_the_colors_of_their_scores(explained: SpatialData) -> None:
    axes = pl.explanation(explained, ["A", "B"], min_stability=0, min_r2=0)
    assert axes.shape == (2, 3)
    frame = explained.shapes["nuclei_explained"]
    for ax, gene, tile in zip(axes.ravel(), "AAABBB", [3, 7, 11] * 2, strict=True):
        drawn = ax.collections[0]
        np.testing.assert_array_equal(drawn.get_array(), frame.query(f"tile == {tile}")[f"lime_{gene}"])
        assert drawn.norm.vmin == -drawn.norm.vmax
        outline = drawn.get_paths()[0].vertices
        np.testing.assert_allclose(
            outline[:-1], np.asarray(frame[frame["tile"] == tile].geometry.iloc[0].exterior.coords)
        )
    assert axes[0, 1].get_title() == "A, tile 7\nstability 0.40, R² 0.50"
    assert axes[1, 1].get_title() == "B, tile 7"
    x, y = explained.tables["tiles"].obsm["spatial"][7]
    assert axes[0, 1].get_xlim() == pytest.approx((x - 10, x + 10))
    assert axes[0, 1].get_ylim() == pytest.approx((y + 10, y - 10))


def test_nuclei_whose_scores_cannot_be_read_are_gray_and_say_why(explained: SpatialData) -> None:
    first, second, third = pl.explanation(explained, "A")
    assert first.get_title() == "A, tile 3\nstability 0.95, R² 0.25"
    assert second.get_title() == "A, tile 7\nnot readable: stability 0.40 < 0.9"
    assert third.get_title() == "A, tile 11\nnot readable: R² 0.10 < 0.2"
    frame = explained.shapes["nuclei_explained"].query("tile == 3")
    np.testing.assert_array_equal(first.collections[0].get_array(), frame["lime_A"])
    # colors span the scores that can be read, here those of the first tile alone
    assert first.collections[0].norm.vmax == pytest.approx(np.percentile(np.abs(frame["lime_A"]), 99))
    for ax in (second, third):
        assert ax.collections[0].get_array() is None
        np.testing.assert_allclose(ax.collections[0].get_facecolor()[:, :3], 0.6)
    table = contract.explanations(explained)
    table.layers["stability"][2] = np.nan
    assert pl.explanation(explained, "A", tiles=[11])[0].get_title().endswith("hidden segments change nothing")
    assert pl.explanation(explained, "A", tiles=[7])[0].get_title().endswith("stability 0.40 < 0.9")


def test_summaries_leave_out_what_cannot_be_read(explained: SpatialData) -> None:
    nuclei = tl.explained_nuclei(explained, ["A", "B"])
    readable = nuclei.groupby(["gene", "tile"])["readable"].first()
    assert readable.loc["A"].tolist() == [True, False, False]
    assert readable.loc["B"].all()  # nothing is known of it
    compared = tl.compare_explanations(explained, "A", "B")
    assert compared["n_nuclei"].tolist() == [30]
    axes = pl.explanation_scores(nuclei[nuclei["gene"] == "A"])
    assert [len(drawn.get_offsets()) for drawn in axes[0].collections] == [30, 60]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["not readable", "median"]
    every = tl.explained_nuclei(explained, "A", min_stability=None, min_r2=None)
    assert every["readable"].all()
    with pytest.raises(ValueError, match="lower `min_stability`"):
        tl.compare_explanations(explained, "A", "B", min_stability=0.99)


def test_scores_by_area_and_class(explained: SpatialData) -> None:
    axes = pl.explanation_scores(tl.explained_nuclei(explained, ["A", "B"], by="kind", min_stability=0, min_r2=0))
    assert len(axes) == 4
    points = np.asarray(axes[0].collections[0].get_offsets())
    frame = explained.shapes["nuclei_explained"]
    np.testing.assert_allclose(points, frame[["area_um2", "lime_A"]])
    assert axes[0].get_xlabel() == "area of the nucleus (µm²)"
    counts = frame["kind"].value_counts()
    labels = [label.get_text() for label in axes[1].get_xticklabels()]
    assert labels == [f"immune\n({counts['immune']})", f"tumor\n({counts['tumor']})"]
    _, own = plt.subplots()
    assert pl.explanation_scores(tl.explained_nuclei(explained, "A"), ax=own)[0] is own


def test_what_is_refused(explained: SpatialData) -> None:
    with pytest.raises(KeyError, match="lime_C"):
        pl.explanation(explained, "C")
    with pytest.raises(KeyError, match="found \\[5\\]"):
        pl.explanation(explained, "A", tiles=[5])
    with pytest.raises(KeyError, match="saliency_A"):
        pl.explanation(explained, "A", method="saliency")
    with pytest.raises(ValueError, match="explained_nuclei"):
        pl.explanation_scores(pd.DataFrame({"gene": ["A"]}))
    del explained.shapes["nuclei_explained"]
    with pytest.raises(KeyError, match=r"tl\.explain"):
        pl.explanation(explained, "A")
