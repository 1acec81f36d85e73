"""Pictures of cells and of their confusion."""

from __future__ import annotations

import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract, pl
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
    assert len(ax.collections[0].get_offsets()) == 170
    del contract.cell_types(typed).obsm["X_cell_features"]
    with pytest.raises(KeyError, match="have no features"):
        pl.latent(typed, "cell_type", use="cells", basis="pca")
