"""The main job on real tissue, reduced: two sections to learn from, a third to predict."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import spatialdata
import spatialdata_plot  # noqa: F401  registers the accessor `.pl`
import squidpy as sq
from spatialdata import SpatialData

from stimage_sd import contract, io, models, pp, tl

mpl.use("Agg")
import matplotlib.pyplot as plt

pytestmark = pytest.mark.slow
MARKERS = ("ERBB2", "GNAS", "FASN", "DDX5", "XBP1", "ACTG1", "FN1", "COL1A1", "CD74", "KRT19")


def read(data_dir: Path, name: str) -> SpatialData:
    folder = data_dir / "her2st" / name
    return io.legacy_st(folder / "counts.tsv.gz", folder / "image.jpg", folder / "spots.tsv", sample=name)


@pytest.fixture(scope="module")
def job(
    data_dir: Path, _session_cache: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SpatialData, pd.DataFrame, models.NBModel]:
    train = {name: read(data_dir, name) for name in ("C2", "C3")}
    test = read(data_dir, "C5")
    reference = pp.stain_normalize(train)
    pp.stain_normalize(test, reference)
    cohort = {**train, "C5": test}
    pp.tile(cohort)
    # one field of view: a third of the work
    pp.embed(cohort, fields_of_view=(2.0,))
    genes = pp.select_genes(train, n_top=50, include=MARKERS)
    model = tl.fit_nb(train, genes=genes, head="dispersion", n_members=3, seed=0)
    model = models.load(model.save(tmp_path_factory.mktemp("model") / "breast.stimage"))
    tl.predict(test, model)
    return test, tl.evaluate(test), model


def test_tiles_are_spots_on_tissue(job: tuple) -> None:
    test = job[0]
    tiles = contract.tiles(test)
    assert tiles.n_obs == contract.counts(test).n_obs
    assert tiles.obs["keep"].mean() > 0.9
    assert contract.tiling(test)["size_um"] == pytest.approx(100, abs=0.1)
    assert contract.predictions(test).n_obs == tiles.obs["keep"].sum()


def test_accuracy_and_coverage(job: tuple) -> None:
    scores = job[1].set_index("gene")
    assert len(scores) >= 55
    assert scores["pearson"].nlargest(20).mean() > 0.4
    assert scores.loc["ERBB2", "pearson"] > 0.3
    assert 0.85 <= scores["coverage"].mean() <= 0.95
    assert scores["nll"].mean() < scores["nll_floor"].mean()
    assert scores["bivariate_morans_i"].mean() > 0.05
    assert scores["iou"].mean() > 0.3


def test_what_was_done_is_on_record(job: tuple) -> None:
    steps = [entry["step"] for entry in contract.info(job[0])["history"]]
    for step in ("io.legacy_st", "pp.stain_normalize", "pp.tile", "pp.embed", "tl.predict", "tl.evaluate"):
        assert step in steps


def test_squidpy_and_scanpy_take_the_result(job: tuple) -> None:
    predictions = job[0].tables["predictions"].copy()
    for color in ("ERBB2", "ood_score", None):
        sq.pl.spatial_scatter(predictions, color=color)
        (axes,) = plt.gcf().axes[:1]
        assert axes.images or axes.collections
        plt.close("all")
    sq.pl.spatial_scatter(predictions, color="ERBB2", layer="epistemic")
    plt.close("all")
    sq.gr.spatial_neighbors(predictions)
    sq.gr.spatial_autocorr(predictions, mode="moran", genes=["ERBB2", "GNAS"])
    assert predictions.uns["moranI"].loc["ERBB2", "I"] > 0.2


def test_spatialdata_plot_renders_it(job: tuple) -> None:
    test = job[0]
    height, width = contract.levels(test, "he")[0].shape[1:]
    for system, unit in (("global", 1.0), ("microns", contract.info(test)["mpp"])):
        figure, axes = plt.subplots()
        (
            test.pl.render_images("he")
            .pl.render_shapes("tile_squares", color="ERBB2", table_name="predictions")
            .pl.show(ax=axes, coordinate_systems=system)
        )
        assert axes.images
        assert axes.collections
        # picture and tiles lie in the section's own pixels or micrometers
        assert np.ptp(axes.get_xlim()) == pytest.approx(width * unit, rel=0.01)
        assert np.ptp(axes.get_ylim()) == pytest.approx(height * unit, rel=0.01)
        plt.close(figure)


def test_the_disk_changes_nothing(job: tuple, tmp_path: Path) -> None:
    test, scores, model = job
    test.write(tmp_path / "C5.zarr")
    back = spatialdata.read_zarr(tmp_path / "C5.zarr")
    pd.testing.assert_frame_equal(tl.evaluate(back), scores)
    before = contract.predictions(back).X.copy()
    tl.predict(back, model)
    np.testing.assert_array_equal(contract.predictions(back).X, before)


def test_a_tile_set_of_another_size_is_refused(job: tuple) -> None:
    test, _, model = job
    tiles = test.tables["tiles"].copy()
    squares, predictions = test.shapes["tile_squares"], test.tables["predictions"]
    try:
        with pytest.warns(UserWarning, match="has new tiles. .* are removed: .*predictions"):
            pp.tile(test, size_um=55.0)
        with pytest.raises(KeyError, match="no embeddings by 'efficientnet_lite0_stages'"):
            tl.predict(test, model)
        test.tables["tiles"].obsm["X_efficientnet_lite0_stages"] = tiles.obsm["X_efficientnet_lite0_stages"]
        test.tables["tiles"].obsm["X_efficientnet_lite0_stages_context"] = tiles.obsm[
            "X_efficientnet_lite0_stages_context"
        ]
        test.tables["tiles"].uns["embeddings"] = tiles.uns["embeddings"]
        with pytest.raises(ValueError, match=r"tiles of 55.0 µm, expected 100.0 µm: run .*size_um=100"):
            tl.predict(test, model)
    finally:
        del test.tables["tiles"], test.shapes["tile_squares"]
        test.shapes["tile_squares"], test.tables["tiles"], test.tables["predictions"] = squares, tiles, predictions
