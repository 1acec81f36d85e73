"""What all pictures have in common: several genes, ranges of color, titles, sizes, files, figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stimage_sd import contract, pl, tl

CONFUSION = pd.DataFrame({"truth": list("aabb"), "predicted": list("abab"), "n": [8, 2, 1, 9]})
SURVIVAL = pd.DataFrame({"time": [5, 8, 9, 2, 3, 4], "event": 1, "risk_group": ["low"] * 3 + ["high"] * 3})
NUCLEI = pd.DataFrame({"gene": "A", "score": np.linspace(-1, 1, 30), "area_px": np.arange(30.0)})
SETS = pd.DataFrame({"gene_set": ["a", "b"], "n_overlap": [3, 2], "n_set": [4, 9], "p_value": [1e-4, 0.1],
                     "q_value": [2e-4, 0.1]})  # fmt: skip
CELLS = tl.CellScores(
    pd.DataFrame({"section": "x", "f1": 0.6, "dice": 0.7, "panoptic_quality": 0.5, "accuracy": 0.8, "mean_f1": 0.4,
                  "mean_iou": 0.3}, index=[0]),
    pd.DataFrame({"section": list("xxyy"), "cell_type": ["immune", "stromal"] * 2, "f1": [0.9, 0.5, 0.7, 0.3]}),
    CONFUSION,
)  # fmt: skip


PICTURES = [
    "tiles", "prediction", "uncertainty", "calibration", "latent", "scores", "training", "confusion", "survival",
    "explanation_scores", "enrichment", "cell_scores",
]  # fmt: skip


@pytest.fixture(params=PICTURES)
def draw(request: pytest.FixtureRequest, result: Any) -> Callable[..., Any]:
    """Each picture of the session's result, or of a small table."""
    return {
        "tiles": lambda **options: pl.tiles(result.section, **options),
        "prediction": lambda **options: pl.prediction(result.section, "G0", **options),
        "uncertainty": lambda **options: pl.uncertainty(result.section, "G0", **options),
        "calibration": lambda **options: pl.calibration(result.section, **options),
        "latent": lambda **options: pl.latent(result.section, "G0", basis="pca", **options),
        "scores": lambda **options: pl.scores(result.scores, **options),
        "training": lambda **options: pl.training(result.model, **options),
        "confusion": lambda **options: pl.confusion(CONFUSION, **options),
        "survival": lambda **options: pl.survival(SURVIVAL, **options),
        "enrichment": lambda **options: pl.enrichment(SETS, **options),
        "cell_scores": lambda **options: pl.cell_scores(CELLS, **options),
        "explanation_scores": lambda **options: pl.explanation_scores(NUCLEI, **options),
    }[request.param]


# --------------------------------------------------------------------------------------------------
# the figure


def test_a_picture_is_written_and_its_figure_returned(draw: Callable[..., Any], tmp_path: Path) -> None:
    figure = draw(save=tmp_path / "picture.png", return_fig=True, figsize=(7, 5), title="a title")
    assert isinstance(figure, Figure)
    assert tuple(figure.get_size_inches()) == (7, 5)
    picture = plt.imread(tmp_path / "picture.png")
    assert picture.shape[0] > 300
    assert picture[..., :3].min() < 0.5 < picture[..., :3].max()
    panels = [ax for ax in figure.axes if ax.get_title() == "a title"]
    assert panels or figure.get_suptitle() == "a title"


def test_axes_are_returned_by_default(draw: Callable[..., Any]) -> None:
    drawn = draw()
    assert all(isinstance(ax, Axes) for ax in np.ravel(np.array(drawn, dtype=object)))


def test_what_cannot_be_written_is_said_before_anything_is_drawn(draw: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No folder .*none to save a\.png to"):
        draw(save=tmp_path / "none" / "a.png")
    with pytest.raises(ValueError, match=r"`save` to end in one of .*'pdf'.* found 'a\.txt'"):
        draw(save=tmp_path / "a.txt")
    assert plt.get_fignums() == []


def test_titles_are_one_per_panel_or_one_above_all(result: Any) -> None:
    axes = pl.prediction(result.section, "G0", title=["left", "right"])
    assert [ax.get_title() for ax in axes] == ["left", "right"]
    above = pl.prediction(result.section, "G0", title="both", return_fig=True)
    assert above.get_suptitle() == "both"
    assert pl.training(result.model, title="one").get_title() == "one"
    with pytest.raises(ValueError, match="Expected `title` to be 2 titles, one per panel, found 3"):
        pl.prediction(result.section, "G0", title=["a", "b", "c"])
    with pytest.raises(ValueError, match="2 titles, one per panel of `ax`, found one"):
        pl.prediction(result.section, "G0", title="both", ax=plt.subplots(1, 2)[1])


def test_the_size_of_a_given_figure_is_not_changed(result: Any) -> None:
    with pytest.raises(ValueError, match="`figsize` is the size of a new figure"):
        pl.training(result.model, ax=plt.subplots()[1], figsize=(3, 3))


# --------------------------------------------------------------------------------------------------
# several genes


def test_several_genes_have_one_row_of_maps_each(result: Any) -> None:
    genes = ["G3", "G0", "G7"]
    axes = pl.prediction(result.section, genes)
    assert axes.shape == (3, 2)
    for row, gene in zip(axes, genes, strict=True):
        alone = pl.prediction(result.section, gene)
        assert alone.shape == (2,)
        for panel, expected in zip(row, alone, strict=True):
            assert panel.get_title() == expected.get_title()
            np.testing.assert_array_equal(panel.collections[0].get_array(), expected.collections[0].get_array())
    assert len({round(panel.get_position().y0, 3) for panel in axes[0]}) == 1
    assert pl.prediction(result.section, ["G3"]).shape == (1, 2)
    with pytest.raises(KeyError, match="No gene 'G99'"):
        pl.prediction(result.section, ["G0", "G99"])
    with pytest.raises(ValueError, match="at least one name"):
        pl.prediction(result.section, [])


def test_genes_of_which_some_were_not_measured(result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = contract.counts(result.section)
    some = counts[:, [name != "G1" for name in counts.var_names]].copy()
    monkeypatch.setattr("stimage_sd.contract.align", lambda *_, **__: (np.arange(some.n_obs), some))
    axes = pl.prediction(result.section, ["G0", "G1"])
    assert axes[1, 0].texts[0].get_text() == "G1 was not measured"
    assert not axes[1, 0].collections
    assert axes[1, 1].get_title() == "G1, predicted"


def test_uncertainty_of_several_genes(result: Any) -> None:
    axes = pl.uncertainty(result.section, ["G1", "G2"])
    assert axes.shape == (2, 4)
    assert [row[0].get_title() for row in axes] == ["G1, predicted mean", "G2, predicted mean"]
    with pytest.raises(ValueError, match="Expected `ax` to be 8 axes, one per panel, found 4"):
        pl.uncertainty(result.section, ["G1", "G2"], ax=plt.subplots(1, 4)[1])


def test_tiles_by_several_columns(result: Any) -> None:
    axes = pl.tiles(result.section, ["tissue_fraction", "keep"])
    assert len(axes) == 2
    assert axes[1].get_legend() is not None


# --------------------------------------------------------------------------------------------------
# color


def test_range_colormap_and_opacity_are_the_users(result: Any) -> None:
    options = {"cmap": "cividis", "vmin": 0.5, "vmax": 2.5, "alpha": 0.4}
    drawn = [
        *(panel.collections[0] for panel in pl.prediction(result.section, "G0", **options)),
        *(panel.collections[0] for panel in pl.uncertainty(result.section, "G0", **options)[1:]),
        pl.tiles(result.section, **options).collections[0],
        pl.latent(result.section, "G0", basis="pca", **options).collections[-1],
        pl.confusion(CONFUSION, **options).images[0],
    ]
    for one in drawn:
        assert (one.norm.vmin, one.norm.vmax) == (0.5, 2.5)
        assert (one.get_cmap().name, one.get_alpha()) == ("cividis", 0.4)


def test_one_end_of_the_range_leaves_the_other(result: Any) -> None:
    whole = pl.prediction(result.section, "G0")[1].collections[0].norm
    lower = pl.prediction(result.section, "G0", vmin=0)[1].collections[0].norm
    assert (lower.vmin, lower.vmax) == (0, whole.vmax)
    above = pl.prediction(result.section, "G0", vmin=whole.vmax + 5)[1].collections[0].norm
    assert above.vmin < above.vmax
    with pytest.raises(ValueError, match="Expected `vmin` below `vmax`, found 2 and 1"):
        pl.prediction(result.section, "G0", vmin=2, vmax=1)
    with pytest.raises(ValueError, match="Expected `alpha` from 0 to 1, found 2"):
        pl.tiles(result.section, alpha=2)


# --------------------------------------------------------------------------------------------------
# the part that is shown


def test_zoom_shows_a_part(result: Any) -> None:
    zoom = (60, 80, 260, 180)
    for axes in (
        pl.prediction(result.section, "G0", zoom=zoom),
        pl.uncertainty(result.section, "G0", zoom=zoom),
        [pl.tiles(result.section, zoom=zoom, n_examples=3)],
    ):
        for panel in axes:
            assert panel.get_xlim() == (60, 260)
            assert panel.get_ylim() == (180, 80)
    with pytest.raises(ValueError, match="Expected `zoom` as left, top, right, bottom"):
        pl.prediction(result.section, "G0", zoom=(9000, 0, 9100, 100))


def test_several_regions_are_windows_beside_the_whole_map(result: Any) -> None:
    boxes = {"left": (60, 80, 160, 180), "right": (260, 80, 360, 180)}
    prediction = pl.prediction(result.section, "G0", zoom=boxes)
    whole = pl.prediction(result.section, "G0")
    assert prediction.shape == (2, 3)
    assert pl.prediction(result.section, ["G0", "G1"], zoom=boxes).shape == (2, 2, 3)
    assert pl.uncertainty(result.section, "G0", zoom=boxes).shape == (4, 3)
    for axes in (*prediction, pl.tiles(result.section, zoom=boxes)):
        overview, *windows = axes
        assert overview.get_xlim() == whole[0].get_xlim()
        outlines = [patch.get_bbox().extents.tolist() for patch in overview.patches]
        assert outlines == [list(box) for box in boxes.values()]
        for window, (name, (left, top, right, bottom)) in zip(windows, boxes.items(), strict=True):
            assert (window.get_xlim(), window.get_ylim()) == ((left, right), (bottom, top))
            assert window.get_title() == name
            # a value has one color in the map and in its windows
            assert window.collections[0].norm.vmax == overview.collections[0].norm.vmax
    assert [panel.get_title() for panel in pl.tiles(result.section, zoom=[(60, 80, 160, 180)])][1:] == ["1"]
    with pytest.raises(ValueError, match="at least one region, found none"):
        pl.tiles(result.section, zoom=[])
    with pytest.raises(ValueError, match=r"Expected `zoom` as left, top, right, bottom .* found \(1, 2, 3\)"):
        pl.tiles(result.section, zoom=[(1, 2, 3)])


def test_maps_of_a_cohort_have_one_entry_per_section(result: Any) -> None:
    cohort = {"a": result.section, "b": result.section}
    axes = pl.prediction(cohort, "G0")
    assert axes.shape == (2, 2)
    assert [panel.get_title().split(" (")[0] for panel in axes[1]] == ["b: G0, observed", "b: G0, predicted"]
    assert pl.prediction(cohort, ["G0", "G1"]).shape == (2, 2, 2)
    assert pl.prediction({"only": result.section}, "G0").shape == (1, 2)
    assert pl.uncertainty(cohort, ["G0"]).shape == (2, 1, 4)
    assert pl.tiles(cohort).shape == (2,)
    assert pl.tiles(cohort, ["keep", "tissue_fraction"]).shape == (2, 2)
    for draw in (lambda: pl.prediction(cohort, "G0", zoom=(0, 0, 90, 90)), lambda: pl.tiles(cohort, zoom=(0, 0, 9, 9))):
        with pytest.raises(ValueError, match=r"regions of one section, found a cohort of 2: \['a', 'b'\]"):
            draw()
    with pytest.raises(ValueError, match="`n_examples` shows tiles of one map"):
        pl.tiles(cohort, n_examples=2)
    with pytest.raises(TypeError, match="Expected a SpatialData section"):
        pl.tiles(result.scores)
    with pytest.raises(ValueError, match=r"Expected one section, found a cohort of 2: \['a', 'b'\]. Pass one of them"):
        pl.calibration(cohort)
