"""Tiles in two dimensions, colored."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.decomposition import PCA

from stimage_sd import contract, pl, tl


def points(ax: plt.Axes) -> np.ndarray:
    return np.concatenate([np.asarray(drawn.get_offsets()) for drawn in ax.collections])


def test_components_are_those_of_the_scaled_log_means(result) -> None:
    ax = pl.latent(result.section, "G1", basis="pca")
    predictions = contract.predictions(result.section)
    logged = np.log1p(predictions.X.astype(np.float64))
    expected = PCA(2, svd_solver="full").fit_transform((logged - logged.mean(axis=0)) / logged.std(axis=0))
    found = points(ax)
    drawn = ax.collections[-1]
    for axis in range(2):  # a component's sign is free
        np.testing.assert_allclose(np.sort(np.abs(found[:, axis])), np.sort(np.abs(expected[:, axis])), atol=1e-4)
    # the colors belong to their points
    mine = np.argsort(np.abs(expected[:, 0]))
    theirs = np.argsort(np.abs(found[:, 0]))
    np.testing.assert_allclose(np.asarray(drawn.get_array())[theirs], predictions[:, "G1"].X[mine, 0], rtol=1e-5)
    assert len(found) == predictions.n_obs
    assert ax.get_xlabel() == "component 1"
    assert ax.figure.axes[-1].get_ylabel() == "predicted mean"


@pytest.mark.parametrize("basis", ["umap", "tsne"])
def test_layouts_keep_neighbors_together_and_are_the_same_again(result, basis: str) -> None:
    first = points(pl.latent(result.section, "section", basis=basis, n_neighbors=10))
    again = points(pl.latent(result.section, "section", basis=basis, n_neighbors=10))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (100, 2)
    assert np.isfinite(first).all()


def test_observed_counts_clusters_and_sections(result, planted: Callable) -> None:
    tl.cluster(result.section, key_added="group")
    other = planted(("other",), n_side=10, n_genes=12).sections["other"]
    tl.predict(other, result.model)
    contract.predictions(other).obs["group"] = None
    axes = pl.latent({"test": result.section, "other": other}, ["G0", "group", "section"], basis="pca", observed=True)
    assert len(axes) == 3
    values = np.sort(np.asarray(axes[0].collections[-1].get_array()))
    measured = [contract.counts(sdata)[:, "G0"].X.toarray().ravel() for sdata in (result.section, other)]
    np.testing.assert_array_equal(values, np.sort(np.concatenate(measured)))
    entries = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert entries == list(contract.predictions(result.section).obs["group"].cat.categories)
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["other", "test"]


def test_embeddings_are_drawn_and_colored_by_predictions(result) -> None:
    _, ax = plt.subplots()
    assert pl.latent(result.section, "ood_score", basis="pca", use="embeddings", extractor="toy", ax=ax) is ax
    values = np.asarray(ax.collections[-1].get_array())
    np.testing.assert_allclose(np.sort(values), np.sort(contract.predictions(result.section).obs["ood_score"]))
    assert ax.figure.axes[-1].get_ylabel() == "ood_score"


def test_latent_refuses(result, make_spots: Callable) -> None:
    with pytest.raises(ValueError, match=r"`basis` to be one of .*found 'phate'"):
        pl.latent(result.section, basis="phate")
    with pytest.raises(KeyError, match="No gene 'G99' among the 12 predicted genes; closest"):
        pl.latent(result.section, "G99", basis="pca")
    with pytest.raises(KeyError, match="No gene 'G99' among the 12 measured genes"):
        pl.latent(result.section, "G99", basis="pca", observed=True)
    with pytest.raises(ValueError, match="`n_neighbors` from 2 to below the number of tiles, 100, found 100"):
        pl.latent(result.section, n_neighbors=100)
    with pytest.raises(KeyError, match="has no predictions"):
        pl.latent(make_spots(n_side=4))
    with pytest.raises(ValueError, match="Expected `ax` to be 2 axes"):
        pl.latent(result.section, ["G0", "G1"], basis="pca", ax=[plt.subplots()[1]])
