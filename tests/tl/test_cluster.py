"""Clusters of tiles: those that were planted, the same for a seed, and near the published ones on real tissue."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from spatialdata import SpatialData

from stimage_sd import contract, datasets, pp, tl

N_SIDE = 10


@pytest.fixture
def cohort(planted: Callable) -> dict[str, SpatialData]:
    """Two predicted sections whose tiles are of three kinds, the first half of them, a third, and the rest."""
    made = planted(("a", "b"), n_side=N_SIDE, n_genes=12, n_features=6)
    model = tl.fit_nb(made.sections, genes=made.genes, extractor="toy", n_members=1, max_epochs=1)
    tl.predict(made.sections, model)
    random = np.random.default_rng(0)
    profiles = random.normal(0, 1.0, (3, 12))
    for number, sdata in enumerate(made.sections.values()):
        noise = random.normal(0, 0.15, (N_SIDE**2, 12))
        predictions = contract.predictions(sdata)
        predictions.X = np.exp(2 + 0.5 * number + profiles[kinds()] + noise).astype(np.float32)
        contract.tiles(sdata).obsm["X_toy"] = (profiles[kinds()][:, :6] + noise[:, :6]).astype(np.float32)
    return made.sections


def kinds() -> np.ndarray:
    return np.repeat([0, 1, 2], [50, 33, 17])


def test_clusters_beside_annotations(cohort: dict[str, SpatialData]) -> None:
    expected: list[pd.DataFrame] = []
    for number, sdata in enumerate(cohort.values()):
        tiles, predictions = contract.tiles(sdata), contract.predictions(sdata)
        predictions.obs["leiden"] = pd.Categorical(kinds().astype(str))
        seen = np.where(np.arange(N_SIDE**2) % 7 < 2, "Fat", "Tumor").astype(object)
        seen[number * 10 : 20] = None
        tiles.obs["annotation"] = pd.Categorical(seen)
        expected.append(pd.DataFrame({"leiden": kinds().astype(str), "annotation": seen}).dropna())
    table, scores = tl.compare_labels(cohort, "leiden", "annotation")
    every = pd.concat(expected)
    counted = every.value_counts().unstack(fill_value=0).sort_index(axis=1)
    pd.testing.assert_frame_equal(table, counted, check_dtype=False)
    assert scores["section"].tolist() == ["a", "b", "all"]
    assert scores["n_tiles"].tolist() == [80, 90, 170]
    for row, part in zip(scores.itertuples(), [*expected, every], strict=True):
        assert row.adjusted_rand_index == pytest.approx(adjusted_rand_score(part["leiden"], part["annotation"]))
    assert repr(tl.compare_labels(cohort, "leiden", "annotation")).startswith(
        "LabelAgreement\n  a            80 tiles; "
    )
    alone = tl.compare_labels(cohort["a"], "annotation", "leiden")
    assert alone.scores["section"].tolist() == ["a"]
    assert alone.table.shape == (2, 3)
    contract.tiles(cohort["b"]).obs["annotation"] = None
    with pytest.raises(ValueError, match="No tile of section 'b' has both 'leiden' and 'annotation'"):
        tl.compare_labels(cohort, "leiden", "annotation")
    with pytest.raises(KeyError, match="No column 'region_of' among"):
        tl.compare_labels(cohort, "leiden", "region_of")


@pytest.mark.parametrize("use", ["predictions", "embeddings"])
def test_planted_kinds_are_found_the_largest_first(cohort: dict[str, SpatialData], use: str) -> None:
    tl.cluster(cohort, resolution=0.2, use=use, extractor="toy")
    for sdata in cohort.values():
        table = contract.predictions(sdata) if use == "predictions" else contract.tiles(sdata)
        found = table.obs["leiden"]
        assert isinstance(found.dtype, pd.CategoricalDtype)
        assert list(found.cat.categories) == ["0", "1", "2"]
        np.testing.assert_array_equal(found.astype(int), kinds())


def test_what_sets_sections_apart_is_taken_out_or_left_in(cohort: dict[str, SpatialData]) -> None:
    predictions = contract.predictions(cohort["b"])
    predictions.X = predictions.X * 9  # as a deeper model of another fold would predict
    tl.cluster(cohort, resolution=0.2, key_added="together")
    tl.cluster(cohort, resolution=0.2, standardize="cohort", key_added="apart")
    one, other = (contract.predictions(sdata).obs for sdata in cohort.values())
    assert set(one["together"]) == set(other["together"]) == {"0", "1", "2"}
    assert not set(one["apart"]) & set(other["apart"])


def test_clusters_are_scanpys(cohort: dict[str, SpatialData]) -> None:
    tl.cluster(cohort["a"], resolution=1.5, n_components=5, n_neighbors=8, seed=4)
    predictions = contract.predictions(cohort["a"])
    table = ad.AnnData(np.log1p(predictions.X.astype(np.float64)))
    sc.pp.scale(table, zero_center=True)
    table.obsm["X_pca"] = PCA(5, random_state=4).fit_transform(table.X)
    sc.pp.neighbors(table, n_neighbors=8, use_rep="X_pca", random_state=4)
    sc.tl.leiden(table, resolution=1.5, flavor="igraph", directed=False, n_iterations=-1, random_state=4)
    assert adjusted_rand_score(table.obs["leiden"], predictions.obs["leiden"]) > 0.9
    sizes = predictions.obs["leiden"].value_counts(sort=False)
    assert list(sizes) == sorted(sizes, reverse=True)
    before = predictions.obs["leiden"].copy()
    tl.cluster(cohort["a"], resolution=1.5, n_components=5, n_neighbors=8, seed=4)
    pd.testing.assert_series_equal(predictions.obs["leiden"], before)


def test_clusters_survive_the_disk_and_dropped_tiles_have_none(cohort: dict[str, SpatialData], tmp_path: Path) -> None:
    sdata = cohort["a"]
    tiles = contract.tiles(sdata)
    keep = tiles.obs["keep"].to_numpy().copy()
    keep[:5] = False
    tiles.obs["keep"] = keep
    tl.cluster(sdata, use="embeddings", extractor="toy", resolution=0.2, key_added="look")
    sdata.write(tmp_path / "a.zarr")
    back = contract.tiles(spatialdata.read_zarr(tmp_path / "a.zarr"))
    assert back.obs["look"].isna().to_numpy().nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    assert back.uns["look"]["use"] == "embeddings"
    assert contract.info(sdata)["history"][-1]["step"] == "tl.cluster"


def test_refusals(cohort: dict[str, SpatialData], make_spots: Callable) -> None:
    with pytest.raises(ValueError, match='"predictions" or "embeddings", found \'counts\''):
        tl.cluster(cohort, use="counts")
    with pytest.raises(ValueError, match='"section" or "cohort", found None'):
        tl.cluster(cohort, standardize=None)
    with pytest.raises(ValueError, match=r"`resolution` to be positive .* found 0 and 15"):
        tl.cluster(cohort, resolution=0)
    with pytest.raises(ValueError, match="more tiles than `n_neighbors`, found 100 and 100"):
        tl.cluster(cohort["a"], n_neighbors=100)
    with pytest.raises(ValueError, match="`n_components` of at least 1, found 0"):
        tl.cluster(cohort, n_components=0)
    with pytest.raises(KeyError, match="has no predictions"):
        tl.cluster(make_spots(n_side=4))
    with pytest.raises(KeyError, match="no embeddings by 'efficientnet_lite0_stages'"):
        tl.cluster(cohort, use="embeddings")


def test_a_missing_package_says_which_extra(cohort: dict[str, SpatialData], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "stimage-sd\[cluster\]"'):
        tl.cluster(cohort)
    assert all("leiden" not in contract.predictions(sdata).obs for sdata in cohort.values())


@pytest.mark.slow
def test_real_predictions_are_near_the_published_clusters(data_dir: Path) -> None:
    cohort = {name: datasets.her2st(name) for name in ("C3", "C4")}
    pp.tile(cohort)
    pp.embed(cohort, fields_of_view=(2.0,))
    genes = pp.select_genes(cohort["C3"], n_top=300)
    tl.predict(cohort["C4"], tl.fit_nb(cohort["C3"], genes=genes, n_members=2, head="dispersion"))
    tl.cluster(cohort["C4"], resolution=1.0)
    predictions = contract.predictions(cohort["C4"])
    published = contract.counts(cohort["C4"]).obs["cluster"].astype(str)
    ari = adjusted_rand_score(published.reindex(predictions.obs["spot_id"].astype(str)), predictions.obs["leiden"])
    assert ari > 0.1, ari
