"""Predictions against bulk: which names match, and the correlations of scipy."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import stimage_sd as sti


def tables(n: int = 12, n_genes: int = 6, slides: int = 2) -> tuple[ad.AnnData, ad.AnnData]:
    random = np.random.default_rng(0)
    bulk = ad.AnnData(random.normal(size=(n, n_genes)))
    bulk.obs_names, bulk.var_names = [f"P{i}" for i in range(n)], [f"G{i}" for i in range(n_genes)]
    bulk.obs["subtype"] = np.resize(["HER2", "LumA"], n)
    rows = np.repeat(np.arange(n), slides)
    predicted = ad.AnnData(np.exp(bulk.X[rows] + 0.7 * random.normal(size=(len(rows), n_genes))))
    predicted.obs_names = [f"P{i}-{k}" for i in range(n) for k in range(slides)]
    predicted.obs["patient"] = bulk.obs_names[rows].to_numpy()
    predicted.var_names = bulk.var_names
    return predicted, bulk


def test_correlations_are_scipys() -> None:
    predicted, bulk = tables(slides=1)
    predicted.obs_names = bulk.obs_names
    found = sti.tl.bulk_correlation(predicted, bulk)
    values = np.log1p(predicted.X)
    for gene, row in enumerate(found.genes.itertuples()):
        for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            expected = function(values[:, gene], bulk.X[:, gene])
            assert getattr(row, name) == pytest.approx(expected.statistic)
            assert getattr(row, f"{name}_p") == pytest.approx(expected.pvalue)
    np.testing.assert_allclose(found.genes["pearson_q"], stats.false_discovery_control(found.genes["pearson_p"]))
    sample = found.samples.iloc[3]
    assert sample["pearson"] == pytest.approx(stats.pearsonr(values[3], bulk.X[3]).statistic)
    assert len(found.unmatched) == 0


def test_slides_are_averaged_or_kept() -> None:
    predicted, bulk = tables()
    averaged = sti.tl.bulk_correlation(predicted, bulk, patient="patient")
    assert set(averaged.genes["n"]) == {12}
    values = np.log1p(predicted.X).reshape(12, 2, -1).mean(axis=1)
    assert averaged.genes["pearson"][0] == pytest.approx(stats.pearsonr(values[:, 0], bulk.X[:, 0]).statistic)
    kept = sti.tl.bulk_correlation(predicted, bulk, patient="patient", average=False)
    assert set(kept.genes["n"]) == {24}
    assert kept.samples["sample"].tolist() == predicted.obs_names.tolist()
    by = sti.tl.bulk_correlation(predicted, bulk, patient="patient", by="subtype")
    assert set(by.genes["group"]) == {"HER2", "LumA"}
    assert set(by.genes["n"]) == {6}
    panels = sti.pl.scores(by.genes, metrics=["pearson", "spearman"])
    assert [label.get_text().split("\n")[0] for label in panels[0].get_xticklabels()] == ["HER2", "LumA"]


def test_names_are_harmonised_and_what_is_left_is_said() -> None:
    predicted, bulk = tables(slides=1)
    predicted.obs_names = [*bulk.obs_names[:10], "X1", "X2"]
    predicted.var_names = ["g0", "G1", "ENSG00000141736.13", "G3", "OTHER", "G5"]
    bulk.var_names = ["G0", "G1", "ENSG00000141736", "G3", "G4", "G5"]
    found = sti.tl.bulk_correlation(predicted, bulk)
    assert found.genes["gene"].tolist() == ["g0", "G1", "ENSG00000141736.13", "G3", "G5"]
    assert str(found) == (
        "5 genes and 10 samples matched; without a partner: 1 genes of predicted, 1 genes of bulk, 2 samples of "
        "predicted, 2 samples of bulk"
    )
    assert set(found.unmatched["name"]) == {"OTHER", "G4", "X1", "X2", "P10", "P11"}


def test_tables_that_do_not_fit_say_so() -> None:
    predicted, bulk = tables()
    with pytest.raises(ValueError, match=r"found 6 genes .* and 0 samples \(predicted \['P0-0'"):
        sti.tl.bulk_correlation(predicted, bulk)
    with pytest.raises(KeyError, match="No column 'case'"):
        sti.tl.bulk_correlation(predicted, bulk, patient="case")
    with pytest.raises(KeyError, match="No layer 'q90'"):
        sti.tl.bulk_correlation(predicted, bulk, patient="patient", layer="q90")
    bulk.var_names = ["G0", "g0", "G2", "G3", "G4", "G5"]
    with pytest.raises(ValueError, match=r"unique genes, found \['G0', 'g0'\] in bulk"):
        sti.tl.bulk_correlation(predicted, bulk, patient="patient")


def test_enrichment_is_the_hypergeometric_test(tmp_path: object) -> None:
    tested = [f"G{i}" for i in range(200)]
    sets = {"early": tested[:20], "late": tested[150:190], "small": tested[:2], "elsewhere": ["X1", "X2", "X3"]}
    genes = [*tested[:12], *tested[150:153]]
    found = sti.tl.enrichment(genes, sets, background=tested).set_index("gene_set")
    assert list(found.index) == ["early", "late"]
    assert found.loc["early", "p_value"] == pytest.approx(stats.hypergeom.sf(11, 200, 20, 15), rel=1e-6)
    assert found.loc["late", "p_value"] == pytest.approx(stats.hypergeom.sf(2, 200, 40, 15), rel=1e-6)
    np.testing.assert_allclose(found["q_value"], stats.false_discovery_control(found["p_value"]))
    assert found.loc["early", "n_overlap"] == 12
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("".join("\t".join([name, "about", *members]) + "\n" for name, members in sets.items()))
    pd.testing.assert_frame_equal(sti.tl.enrichment(genes, gmt, background=tested).set_index("gene_set"), found)
    with pytest.raises(FileNotFoundError, match="No GMT file"):
        sti.tl.enrichment(genes, tmp_path / "none.gmt", background=tested)
    with pytest.raises(ValueError, match="genes of the background, found 1 others"):
        sti.tl.enrichment(["X"], sets, background=tested)
    with pytest.raises(ValueError, match="No set has 3 genes"):
        sti.tl.enrichment(genes, {"elsewhere": ["X1", "X2", "X3"]}, background=tested)
