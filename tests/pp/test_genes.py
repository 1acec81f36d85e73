"""Choice of genes: scanpy's own, over a cohort, with what is missing named."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract, pp


@pytest.fixture
def cohort(make_spots: Callable[..., SpatialData]) -> dict[str, SpatialData]:
    """Two sections of 64 spots; R... are in fewer than a tenth of them; b lacks G3 and has its own order."""
    sections = {}
    for number, name in enumerate("ab"):
        random = np.random.default_rng(number)
        mean = random.uniform(0.5, 12, 40)
        spread = np.linspace(0.3, 12, 40)
        counts = random.negative_binomial(spread, spread / (spread + mean), (64, 40))
        rare = (random.random((64, 5)) < 0.04).astype(int)
        genes = [f"G{gene}" for gene in range(40)] + [f"R{gene}" for gene in range(5)]
        counts = np.hstack([counts, rare])
        if name == "b":
            order = [gene for gene in random.permutation(45) if gene != 3]
            counts, genes = counts[:, order], [genes[gene] for gene in order]
        sections[name] = make_spots(n_side=8, counts=counts, genes=genes, sample=name, tiled=False)
    return sections


def test_variable_genes_are_scanpys(cohort: dict[str, SpatialData]) -> None:
    chosen = pp.select_genes(cohort, n_top=12)
    shared = [f"G{gene}" for gene in range(40) if gene != 3] + [f"R{gene}" for gene in range(5)]
    joint = ad.concat(
        [ad.AnnData(sp.csr_matrix(contract.counts(sdata)[:, shared].X, dtype=np.float32)) for sdata in cohort.values()],
        label="batch",
        index_unique="-",
    )
    joint.var_names = shared
    joint = joint[:, (joint.X > 0).mean(axis=0).A1 >= 0.1].copy()
    sc.experimental.pp.highly_variable_genes(joint, flavor="pearson_residuals", n_top_genes=12, batch_key="batch")
    ranked = joint.var[joint.var["highly_variable"]].sort_values("highly_variable_rank")
    assert set(chosen) == set(ranked.index)
    assert ranked.loc[chosen, "highly_variable_rank"].is_monotonic_increasing
    # the most overdispersed were planted first
    assert np.mean([int(gene[1:]) for gene in chosen]) < 15


def test_rare_genes_are_left_out_unless_asked_for(cohort: dict[str, SpatialData]) -> None:
    everything = pp.select_genes(cohort, n_top=1000)
    assert set(everything) == {f"G{gene}" for gene in range(40) if gene != 3}
    assert any(gene.startswith("R") for gene in pp.select_genes(cohort, n_top=1000, min_spots=0.0))
    with pytest.raises(ValueError, match=r"genes in at least 101% of the spots, found none. Lower `min_spots=`"):
        pp.select_genes(cohort, min_spots=1.01)


def test_genes_may_be_filtered_after_they_are_ranked(cohort: dict[str, SpatialData]) -> None:
    """The published order: the top of all genes, of which those in too few spots are left out."""
    shared = [f"G{gene}" for gene in range(40) if gene != 3] + [f"R{gene}" for gene in range(5)]
    joint = ad.concat(
        [ad.AnnData(sp.csr_matrix(contract.counts(sdata)[:, shared].X, dtype=np.float32)) for sdata in cohort.values()],
        label="batch", index_unique="-",
    )  # fmt: skip
    joint.var_names = shared
    sc.experimental.pp.highly_variable_genes(joint, flavor="pearson_residuals", n_top_genes=25, batch_key="batch")
    share = dict(zip(shared, (joint.X > 0).mean(axis=0).A1, strict=True))
    expected = [gene for gene in shared if joint.var.loc[gene, "highly_variable"] and share[gene] >= 0.9]
    chosen = pp.select_genes(cohort, n_top=25, min_spots=0.9, filtering="after")
    assert sorted(chosen) == sorted(expected)
    assert 0 < len(chosen) < 25 == len(pp.select_genes(cohort, n_top=25, min_spots=0.1))
    with pytest.raises(ValueError, match='`filtering` to be "before" or "after", found \'never\''):
        pp.select_genes(cohort, filtering="never")  # type: ignore[arg-type]


def test_included_genes_come_once_and_last(cohort: dict[str, SpatialData]) -> None:
    top = pp.select_genes(cohort, n_top=5)
    assert pp.select_genes(cohort, n_top=5, include=["R0", top[2], "R1"]) == [*top, "R0", "R1"]


def test_a_list_keeps_its_order_and_names_what_is_missing(cohort: dict[str, SpatialData]) -> None:
    with pytest.warns(UserWarning, match=r"3 of 6 genes are not in every section: \['G3', 'ERBB2', 'CD4'\]"):
        assert pp.select_genes(cohort, ["G7", "G3", "ERBB2", "G1", "CD4", "R0"]) == ["G7", "G1", "R0"]
    with pytest.warns(UserWarning, match=r"1 of 1|not in every section: \['G3'\]"):
        pp.select_genes(cohort, n_top=5, include=["G3", "G4"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pp.select_genes(cohort["a"], ["G3", "G3", "G1"]) == ["G3", "G1"]


def test_genes_that_no_section_has(cohort: dict[str, SpatialData], make_spots: Callable) -> None:
    with pytest.raises(ValueError, match=r"None of the 2 genes is measured in every section, such as \['A', 'B'\]"):
        pp.select_genes(cohort, ["A", "B"])
    with pytest.raises(ValueError, match=r"`genes` as a list of names, found none"):
        pp.select_genes(cohort, [])
    with pytest.raises(ValueError, match="`n_top` of at least 1, found 0"):
        pp.select_genes(cohort, n_top=0)
    mouse = make_spots(n_side=4, genes=["Actb", "Gapdh", "Cd4", "Krt5"], tiled=False)
    with pytest.raises(ValueError, match=r"share no gene; their names begin .*'Actb'.* one naming scheme"):
        pp.select_genes({**cohort, "mouse": mouse})


def test_counts_are_left_as_they_are(cohort: dict[str, SpatialData]) -> None:
    before = contract.counts(cohort["a"]).copy()
    pp.select_genes(cohort, n_top=5)
    after = contract.counts(cohort["a"])
    assert (before.X != after.X).nnz == 0
    assert list(after.var.columns) == list(before.var.columns)


def test_normalized_values_are_refused(cohort: dict[str, SpatialData]) -> None:
    sc.pp.normalize_total(cohort["a"].tables["counts"])
    with pytest.raises(ValueError, match="raw counts in table 'counts' of section 'a'"):
        pp.select_genes(cohort)
