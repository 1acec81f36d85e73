"""A model trained on Visium, applied to every other platform and scored against what each measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata
import squidpy as sq
from spatialdata import SpatialData

from stimage_sd import contract, datasets, io, pl, pp, tl
from stimage_sd.datasets._tissue_painter import Tissue
from stimage_sd.datasets._truth import log_mean
from stimage_sd.models import NBModel

N_GENES = 30
#: a Visium section of this many spots is as large as the others
N_SPOTS = 90
SIDE_UM = 1200.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(synthetic: Callable[..., SpatialData]) -> tuple[NBModel, object]:
    """A model of two synthetic Visium sections, and the staining they share."""
    train = {f"s{seed}": synthetic(n_spots=150, n_genes=N_GENES, seed=seed) for seed in (1, 2)}
    reference = pp.stain_normalize(train, method="macenko")
    pp.tile(train)
    pp.embed(train)
    genes = pp.select_genes(train, n_top=N_GENES)
    return tl.fit_nb(train, genes=genes, n_members=4), reference


def predict(sdata: SpatialData, trained: tuple[NBModel, object]) -> None:
    model, reference = trained
    pp.stain_normalize(sdata, reference, method="macenko")
    pp.tile(sdata, size_um=model.tiles.size_um)
    pp.embed(sdata)
    tl.predict(sdata, model)


def assert_signal_and_no_noise(scores: pd.DataFrame, *, signal: float) -> None:
    """Genes that follow the tissue are predicted, all but a few; those that do not, are not."""
    by_kind = scores.groupby(scores["gene"].str.startswith("SIGNAL"))["pearson"]
    assert by_kind.mean()[True] > signal
    assert abs(by_kind.mean()[False]) < 0.15
    assert (by_kind.get_group(True) > 0.2).mean() > 0.8


def test_xenium_pseudo_spots(trained: tuple[NBModel, object], tmp_path: Path) -> None:
    run = datasets.synthetic_xenium(
        tmp_path / "x", size_um=SIDE_UM, n_genes=N_GENES, seed=5, stain_seed=1, pixel_um=0.85
    )
    xenium = io.xenium(run, he_image=run / "he_image.ome.tif")
    pp.aggregate(xenium)
    predict(xenium, trained)
    scores = tl.evaluate(xenium)
    assert set(contract.tiles(xenium).obs["spot_id"]) <= set(contract.counts(xenium).obs_names)
    assert_signal_and_no_noise(scores, signal=0.45)
    # the cells' own counts are still there, and the disk keeps all of it
    assert contract.units_name(xenium, table_key=contract.COUNTS) == contract.CELLS
    xenium.write(tmp_path / "x.zarr")
    again = spatialdata.read_zarr(tmp_path / "x.zarr")
    pd.testing.assert_frame_equal(tl.evaluate(again), scores)
    sq.pl.spatial_scatter(contract.predictions(again), color="SIGNAL001")


def test_codex_proteins(trained: tuple[NBModel, object], tmp_path: Path) -> None:
    run = datasets.synthetic_codex(tmp_path / "c", n_spots=N_SPOTS, n_genes=N_GENES, seed=6, stain_seed=2)
    names = pd.read_csv(run / "truth_names.csv").set_index("gene")["channel"].to_dict()
    for source in ("cells", "image"):
        codex = io.codex(
            run / "cells.csv", run / "multiplex.ome.tif", he_image=run / "he.tif", alignment=run / "he_alignment.csv"
        )
        pp.aggregate(codex, source)
        predict(codex, trained)
        with pytest.raises(KeyError, match="no table of counts"):
            tl.evaluate(codex)
        scores = tl.evaluate(codex, against="proteins", names=names)
        assert set(scores["gene"]) == set(names)
        if source == "cells":
            assert_signal_and_no_noise(scores, signal=0.45)
        else:
            # between cells there is no protein: each channel's mean over pixels follows how many cells there are
            assert scores["pearson"][scores["gene"].str.startswith("SIGNAL")].mean() > 0.45
        assert len(pl.prediction(codex, "SIGNAL001")) == 2


def test_visium_hd_bins(trained: tuple[NBModel, object], tmp_path: Path) -> None:
    run = datasets.synthetic_visium_hd(tmp_path / "h", size_um=SIDE_UM, n_genes=N_GENES, seed=7, stain_seed=3)
    hd = io.visium_hd(run, image=run / "image.tif")
    pp.aggregate(hd, "cells", onto="grid")
    predict(hd, trained)
    assert_signal_and_no_noise(tl.evaluate(hd), signal=0.45)


def test_a_grid_on_a_slide_follows_the_truth(trained: tuple[NBModel, object], tmp_path: Path) -> None:
    run = datasets.synthetic_slide(tmp_path / "slide", size=2560, n_genes=N_GENES, seed=8, stain_seed=4)
    slide = io.slide(run / "slide.svs")
    predict(slide, trained)
    assert contract.tiling(slide)["layout"] == "grid"
    table = contract.predictions(slide)
    truth = pd.DataFrame(
        log_mean(Tissue(2560, 0.5, 8), np.asarray(table.obsm["spatial"]), datasets._truth.draw_genes(N_GENES, 0)),
        columns=datasets._truth.draw_genes(N_GENES, 0).index,
    )
    signal = [gene for gene in table.var_names if gene.startswith("SIGNAL")]
    r = [np.corrcoef(np.log(table[:, gene].X[:, 0]), truth[gene])[0, 1] for gene in signal]
    assert np.median(r) > 0.6
