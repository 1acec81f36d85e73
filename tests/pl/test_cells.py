"""Pictures of cells and of their confusion."""

from __future__ import annotations

import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import shapely
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stimage_sd import contract, pl, tl
from stimage_sd.io._raster import raster_from_array


@pytest.fixture
def typed() -> SpatialData:
    """A blank slide with a lattice of predicted cells, two types, one of them wrong."""
    sdata = SpatialData(images={"he": contract.build_image(raster_from_array(np.full((400, 600, 3), 230, np.uint8)))})
    contract.register(sdata, sample="slide", platform="slide", image="he", mpp=0.5)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(20, 600, 40), np.arange(20, 400, 40)))
    kinds = pd.Categorical(np.where(x < 300, "immune", "stromal"))
    sure = np.linspace(0.5, 1, len(x), dtype=np.float32)
    frame = gpd.GeoDataFrame(
        {"cell_type": kinds, "entropy": 1 - sure}, geometry=shapely.buffer(shapely.points(x, y), 8)
    )
    table = AnnData(np.column_stack([sure, 1 - sure]), pd.DataFrame({"cell_type": kinds, "entropy": 1 - sure}))
    table.obs_names = [f"nucleus_{n}" for n in range(len(x))]
    table.var_names = ["immune", "stromal"]
    table.obsm["X_cell_features"] = np.random.default_rng(0).normal(size=(len(x), 6)) + 4 * (x < 300)[:, None]
    table.uns["background_features"] = np.random.default_rng(1).normal(size=(20, 6)) - 4
    contract.write_cells(sdata, frame, table, name="nuclei")
    return sdata


def test_types_are_drawn_and_named_with_their_numbers(typed: SpatialData) -> None:
    ax = pl.cells(typed)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["immune (70)", "stromal (80)"]
    assert sum(len(drawn.get_paths()) for drawn in ax.collections) == 150
    assert ax.get_title() == "slide: cell_type"


def test_zoom_draws_what_is_in_it(typed: SpatialData) -> None:
    ax = pl.cells(typed, "entropy", zoom=(0, 0, 100, 100), outline=True)
    assert ax.get_xlim() == (0, 100)
    assert ax.get_ylim() == (100, 0)
    (drawn,) = ax.collections
    assert len(drawn.get_paths()) == 9  # the third ones' rims reach in
    np.testing.assert_allclose(sorted(drawn.get_array())[-1], typed.shapes["nuclei"]["entropy"].max(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"within 600 x 400 px, found \(700"):
        pl.cells(typed, zoom=(700, 0, 800, 100))


def test_wrong_cells_have_a_rim(typed: SpatialData) -> None:
    with pytest.raises(KeyError, match=r"Run `stimage_sd.tl.evaluate_cells"):
        pl.cells(typed, mark_wrong=True)
    obs = contract.cell_types(typed).obs
    true = obs["cell_type"].astype(object)
    true.iloc[[0, 5]] = "stromal"
    true.iloc[7] = None  # nothing was measured there
    obs["true_type"] = pd.Categorical(true)
    ax = pl.cells(typed, "entropy", mark_wrong=True)
    assert len(ax.collections[-1].get_paths()) == 2
    with pytest.raises(KeyError, match="have no column 'kind'"):
        pl.cells(typed, "kind")
    named = [text.get_text() for text in pl.cells(typed, mark_wrong=True).get_legend().get_texts()]
    assert named == ["immune (70)", "stromal (80)", "rim: wrong type (2)"]


def test_cells_without_types_name_the_calls_that_give_types(typed: SpatialData) -> None:
    contract.write_shapes(typed, gpd.GeoDataFrame(geometry=list(typed.shapes["nuclei"].geometry)), name="masks")
    with pytest.raises(KeyError, match=r"no column 'cell_type'.*annotate_cells.*predict_cells.*`color=`"):
        pl.cells(typed, shapes_key="masks")
    typed.shapes["nuclei"]["p_immune"] = 0.5
    assert pl.cells(typed, "p_immune").figure.axes[-1].get_ylabel() == "probability of immune"


def test_types_of_two_sections_in_two_regions(typed: SpatialData) -> None:
    """Paper, Figures 4d, 4e and S14."""
    obs = contract.cell_types(typed).obs
    obs["true_type"] = pd.Categorical(np.where(np.arange(150) < 10, "stromal", obs["cell_type"].astype(str)))
    axes = pl.cells({"a": typed, "b": typed}, ["true_type", "cell_type"])
    assert axes.shape == (2, 2)
    assert axes[1, 0].get_title() == "b: true_type"
    true = [text.get_text() for text in axes[0, 0].get_legend().get_texts()]
    counts = obs["true_type"].value_counts()
    assert true == [f"immune ({counts['immune']})", f"stromal ({counts['stromal']})"]
    windows = pl.cells(typed, ["cell_type", "entropy"], zoom=[(0, 0, 100, 100), (300, 0, 400, 100)])
    assert windows.shape == (2, 3)
    assert windows[1, 1].collections[0].norm.vmin == windows[1, 0].collections[0].norm.vmin
    assert windows[1, 0].figure.axes[-1].get_ylabel() == "entropy of the type (0 certain, 1 uniform)"
    assert [text.get_text() for text in windows[0, 2].get_legend().get_texts()] == ["immune (70)", "stromal (80)"]
    with pytest.raises(ValueError, match="found a cohort of 2"):
        pl.cells({"a": typed, "b": typed}, zoom=(0, 0, 100, 100))


def test_genes_of_measured_cells(typed: SpatialData) -> None:
    """Paper, Figure 3c."""
    counts = np.random.default_rng(0).poisson(2.0, (150, 2))
    frame = contract.nuclei(typed)[["geometry"]]
    table = AnnData(sp.csr_matrix(counts[::-1]), obs=pd.DataFrame(index=[f"cell-{n}" for n in range(150)]))
    table.var_names = ["ERBB2", "KRT5"]
    typed.shapes["measured"] = frame.reset_index(drop=True)
    table.obs["instance_id"], table.obs["region"] = np.arange(150)[::-1], "measured"
    typed.tables["counts"] = TableModel.parse(table, region="measured", region_key="region", instance_key="instance_id")
    ax = pl.cells(typed, "KRT5", shapes_key="measured")
    np.testing.assert_allclose(ax.collections[0].get_array(), np.log1p(counts[:, 1]))
    assert ax.figure.axes[-1].get_ylabel() == "log(1 + count of KRT5)"
    # outlines that the table does not annotate, but that have its ids
    typed.shapes["rims"] = typed.shapes["measured"].iloc[::2].rename_axis("instance_id")
    outlined = pl.cells(typed, "KRT5", shapes_key="rims")
    np.testing.assert_allclose(outlined.collections[0].get_array(), np.log1p(counts[::2, 1]))
    with pytest.raises(KeyError, match=r"no column 'ESR1'.*Nor is it one of the 2 genes that were measured"):
        pl.cells(typed, "ESR1", shapes_key="measured")


def test_confusion_names_shares_of_the_measured_type() -> None:
    table = pd.DataFrame(
        {"section": "a", "truth": ["x", "x", "y", "y"], "predicted": ["x", "y", "x", "y"], "n": [9, 1, 2, 2]}
    )
    _, ax = plt.subplots()
    assert pl.confusion(pd.concat([table, table]), ax=ax) is ax
    assert [text.get_text() for text in ax.texts] == ["90%\n18", "10%\n2", "50%\n4", "50%\n4"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "measured")
    plain = pl.confusion(table, normalize=False)
    assert [text.get_text() for text in plain.texts] == ["9", "1", "2", "2"]
    with pytest.raises(ValueError, match="evaluate_cells"):
        pl.confusion(table.drop(columns="n"))


def test_latent_space_of_cells_and_background(typed: SpatialData) -> None:
    ax = pl.latent(typed, "cell_type", use="cells", basis="pca")
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert set(names) == {"immune", "stromal", "background"}

    def colors(panel: plt.Axes) -> dict[str, str]:
        texts = [text.get_text().split(" (")[0] for text in panel.get_legend().get_texts()]
        return dict(zip(texts, (handle.get_color() for handle in panel.get_legend().legend_handles), strict=True))

    # a type has the color that it has on the map, even where a type of lower name does not occur
    assert colors(pl.cells(typed)).items() <= colors(ax).items()
    for annotated in (typed.shapes["nuclei"], contract.cell_types(typed).obs):
        annotated["cell_type"] = annotated["cell_type"].cat.set_categories(["endothelial", "immune", "stromal"])
    later = pl.latent(typed, "cell_type", use="cells", basis="pca")
    assert colors(later)["stromal"] == colors(pl.cells(typed))["stromal"] != colors(ax)["stromal"]
    assert len(ax.collections[0].get_offsets()) == 170
    del contract.cell_types(typed).obsm["X_cell_features"]
    with pytest.raises(KeyError, match="have no features"):
        pl.latent(typed, "cell_type", use="cells", basis="pca")


def test_scores_of_types_are_means_over_sections() -> None:
    """Paper, Figures 4a, S14 and S15b."""
    names = ["f1", "dice", "panoptic_quality", "accuracy", "mean_f1", "mean_iou"]
    summary = pd.DataFrame({"section": ["x", "y"], **{name: [0.6, 0.8] for name in names}})
    kinds = pd.DataFrame(
        {"section": list("xxyy"), "cell_type": ["immune", "stromal"] * 2, "f1": [0.9, 0.5, 0.7, np.nan]}
    )
    scores = tl.CellScores(summary, kinds, pd.DataFrame())
    types, overall_panel = pl.cell_scores(scores)
    assert [label.get_text() for label in types.get_xticklabels()] == ["immune", "stromal"]
    np.testing.assert_allclose([bar.get_height() for bar in types.patches], [0.8, 0.5])
    np.testing.assert_allclose([bar.get_height() for bar in overall_panel.patches], [0.7] * 6)
    both = pl.cell_scores({"one": scores, "two": scores})
    assert len(both[0].patches) == 4
    assert [text.get_text() for text in both[1].get_legend().get_texts()] == ["one", "two"]
    with pytest.raises(ValueError, match="keyed by name, found none"):
        pl.cell_scores({})
    with pytest.raises(ValueError, match=r"`stimage_sd\.tl\.evaluate_cells`, found a table lacking"):
        pl.cell_scores(scores._replace(classes=kinds.drop(columns="f1")))
