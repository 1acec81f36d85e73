"""Types of a reference, whatever the shares of the types in the section, its depth, and the platform's genes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from geopandas import GeoDataFrame
from scipy.sparse import csr_matrix
from shapely import points
from sklearn.metrics import roc_auc_score
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel

import stimage_sd as sti
from stimage_sd.stats.platform_effects import gene_efficiencies

TYPES = np.array(["immune", "stromal", "cancer", "endothelial"])
N_GENES, N_CELLS = 60, 400


def profiles(fold: float) -> np.ndarray:
    """Shares of genes by type: six genes of each are `fold` times what they are in the others."""
    random = np.random.default_rng(1)
    means = np.tile(random.gamma(1.0, size=N_GENES) + 0.05, (len(TYPES), 1))
    for row in means:
        row[random.choice(N_GENES, 6, replace=False)] *= fold
    return means / means.sum(axis=1, keepdims=True)


def counts_of(types: np.ndarray, *, fold: float, depth: float, gain: np.ndarray | float = 1.0) -> np.ndarray:
    random = np.random.default_rng(2)
    means = profiles(fold)[types] * random.lognormal(0, 0.3, (len(types), N_GENES)) * gain
    means *= depth * random.lognormal(0, 0.4, (len(types), 1)) / means.sum(axis=1, keepdims=True)
    return random.poisson(means)


def reference_of(fold: float) -> AnnData:
    types = np.arange(800) % len(TYPES)
    obs = pd.DataFrame({"cell_type": TYPES[types]}, index=[f"r{n}" for n in range(800)])
    var = pd.DataFrame(index=[f"G{n}" for n in range(N_GENES)])
    return AnnData(csr_matrix(counts_of(types, fold=fold, depth=100), dtype=np.float32), obs, var)


def section_of(counts: np.ndarray) -> SpatialData:
    names = [f"c{n}" for n in range(len(counts))]
    places = points(np.random.default_rng(0).random((len(counts), 2)) * 500)
    cells = GeoDataFrame({"radius": np.full(len(counts), 3.0)}, geometry=places)
    obs = pd.DataFrame({"region": pd.Categorical(["cells"] * len(counts)), "cell_id": names}, index=names)
    table = AnnData(csr_matrix(counts, dtype=np.float32), obs, pd.DataFrame(index=[f"G{n}" for n in range(N_GENES)]))
    return SpatialData(
        shapes={"cells": ShapesModel.parse(cells.set_index(pd.Index(names)))},
        tables={"counts": TableModel.parse(table, region="cells", region_key="region", instance_key="cell_id")},
    )


def annotated(counts: np.ndarray, fold: float) -> pd.DataFrame:
    section = section_of(counts)
    sti.pp.annotate_cells(section, reference_of(fold))
    return section.tables["counts"].obs


@pytest.mark.parametrize("depth", [100, 50, 200])
@pytest.mark.parametrize("share", [0.25, 0.7, 0.9, 0.97, 1.0])
def test_shares_of_the_types_do_not_matter(share: float, depth: float) -> None:
    types = np.random.default_rng(3).choice(4, N_CELLS, p=[share, *[(1 - share) / 3] * 3])
    obs = annotated(counts_of(types, fold=6, depth=depth), 6)
    assert (obs["cell_type"] == TYPES[types]).mean() > 0.96


@pytest.mark.parametrize("share", [0.7, 0.9, 0.97, 1.0])
def test_confidence_tells_wrong_from_right(share: float) -> None:
    """Types that are hard to tell apart: some are wrong."""
    types = np.random.default_rng(3).choice(4, N_CELLS, p=[share, *[(1 - share) / 3] * 3])
    obs = annotated(counts_of(types, fold=3, depth=50), 3)
    right, confidence = (obs["cell_type"] == TYPES[types]).to_numpy(), obs["cell_type_confidence"]
    assert 0.7 < right.mean() < 1
    assert roc_auc_score(right, confidence) > 0.75
    assert confidence[~right].mean() < confidence[right].mean() - 0.1


@pytest.mark.parametrize("share", [0.25, 0.97, 1.0])
def test_efficiencies_of_genes_are_told_from_shares_of_types(share: float) -> None:
    types = np.random.default_rng(3).choice(4, N_CELLS, p=[share, *[(1 - share) / 3] * 3])
    gain = np.random.default_rng(4).lognormal(0, 0.7, N_GENES)
    counts = counts_of(types, fold=6, depth=100, gain=gain)
    assert (annotated(counts, 6)["cell_type"] == TYPES[types]).mean() > 0.93
    found = np.log(gene_efficiencies(csr_matrix(counts), profiles(6)))
    assert np.corrcoef(found, np.log(gain))[0, 1] > 0.95


def test_efficiencies_of_one_type_are_the_ratios_of_shares() -> None:
    counts, profile = np.array([[900.0, 60, 40], [2100, 140, 60]]), np.array([[0.5, 0.3, 0.2]])
    observed, expected = counts.sum(axis=0), counts.sum() * profile[0]
    ratio = observed / expected
    np.testing.assert_allclose(
        gene_efficiencies(csr_matrix(counts), profile), ratio / np.prod(ratio) ** (1 / 3), rtol=0.01
    )


def test_cells_without_counts_get_no_type() -> None:
    types = np.arange(40) % 4
    counts = counts_of(types, fold=6, depth=100)
    counts[:3] = 0
    obs = annotated(counts, 6)
    assert obs["cell_type"].isna().tolist() == [True] * 3 + [False] * 37
    assert (obs["cell_type_confidence"][:3] == 0).all()
    with pytest.raises(ValueError, match="counts of the 60 shared genes, found none in the cells of the section"):
        annotated(counts * 0, 6)


def test_names_of_a_reference_are_unique() -> None:
    reference = reference_of(6)
    reference.var_names = ["G0", *reference.var_names[:-1]]
    with pytest.raises(ValueError, match=r"unique gene names in the reference, found \['G0'\]"):
        sti.pp.annotate_cells(section_of(counts_of(np.arange(8) % 4, fold=6, depth=100)), reference)


def test_ensembl_ids_of_another_release_are_the_same_genes() -> None:
    types = np.arange(N_CELLS) % len(TYPES)
    counts = counts_of(types, fold=6.0, depth=200)
    ids = [f"ENSG{n:011d}" for n in range(N_GENES)]
    found = []
    for own, theirs in (("", ""), (".3", ".12")):
        section, reference = section_of(counts), reference_of(6.0)
        section.tables["counts"].var_names = [name + own for name in ids]
        reference.var_names = [name + theirs for name in ids]
        sti.pp.annotate_cells(section, reference)
        found.append(section.tables["counts"].obs["cell_type"].astype(str).to_numpy())
    np.testing.assert_array_equal(*found)
    assert (found[0] == TYPES[types]).mean() > 0.9
