"""Predictions against bulk: which names match, and the correlations of scipy."""

from __future__ import annotations

import anndata as ad
import numpy as np
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
    assert f"{np.median(found.genes['pearson']):.3f} over samples" in found.facts()["of genes"]
    assert found._repr_html_().startswith("<div><strong>BulkCorrelation")
    np.testing.assert_allclose(found.genes["pearson_q"], stats.false_discovery_control(found.genes["pearson_p"]))
    sample = found.samples.iloc[3]
    assert sample["pearson"] == pytest.approx(stats.pearsonr(values[3], bulk.X[3]).statistic)
    assert len(found.unmatched) == 0


def test_slides_are_averaged_or_kept() -> None:
    predicted, bulk = tables()
    averaged = sti.tl.bulk_correlation(predicted, bulk, patient_key="patient")
    assert set(averaged.genes["n"]) == {12}
    values = np.log1p(predicted.X).reshape(12, 2, -1).mean(axis=1)
    assert averaged.genes["pearson"][0] == pytest.approx(stats.pearsonr(values[:, 0], bulk.X[:, 0]).statistic)
    kept = sti.tl.bulk_correlation(predicted, bulk, patient_key="patient", average=False)
    assert set(kept.genes["n"]) == {24}
    assert kept.samples["sample"].tolist() == predicted.obs_names.tolist()
    by = sti.tl.bulk_correlation(predicted, bulk, patient_key="patient", by="subtype")
    assert set(by.genes["group"]) == {"HER2", "LumA"}
    assert set(by.genes["n"]) == {6}
    panels = sti.pl.scores(by.genes, metrics=["pearson", "spearman"])
    assert [label.get_text().split("\n")[0] for label in panels[0].get_xticklabels()] == ["HER2", "LumA"]


def test_names_are_harmonized_and_what_is_left_is_said() -> None:
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
        sti.tl.bulk_correlation(predicted, bulk, patient_key="case")
    with pytest.raises(KeyError, match="No layer 'q90'"):
        sti.tl.bulk_correlation(predicted, bulk, patient_key="patient", layer="q90")
    bulk.var_names = ["G0", "g0", "G2", "G3", "G4", "G5"]
    with pytest.raises(ValueError, match=r"unique genes, found \['G0', 'g0'\] in bulk"):
        sti.tl.bulk_correlation(predicted, bulk, patient_key="patient")


def test_missing_values_stay_where_they_are() -> None:
    predicted, bulk = tables(n=14, n_genes=8, slides=1)
    predicted.obs_names = bulk.obs_names
    whole = sti.tl.bulk_correlation(predicted, bulk)
    assert len(whole.missing) == 0
    assert "missing" not in str(whole)
    bulk.X[:, 2], bulk.X[3], bulk.X[5, 6], bulk.X[6, 6] = np.nan, np.nan, np.nan, np.inf
    predicted.X[7, 1] = np.nan
    found = sti.tl.bulk_correlation(predicted, bulk)
    assert found.genes["n"].tolist() == [13, 12, 0, 13, 13, 13, 11, 13]
    assert found.genes["pearson"].isna().tolist() == [gene == 2 for gene in range(8)]
    assert found.samples["n"].tolist() == [7, 7, 7, 0, 7, 6, 6, 6, *[7] * 6]
    assert found.samples["spearman"].isna().tolist() == [sample == 3 for sample in range(14)]
    values, measured = np.log1p(predicted.X), np.where(np.isfinite(bulk.X), bulk.X, np.nan)
    for table, one, other in ((found.genes, values, measured), (found.samples, values.T, measured.T)):
        for column, row in enumerate(table.itertuples()):
            both = np.isfinite(one[:, column]) & np.isfinite(other[:, column])
            for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
                if both.any():
                    expected = function(one[both, column], other[both, column])
                    assert getattr(row, name) == pytest.approx(expected.statistic)
                    assert getattr(row, f"{name}_p") == pytest.approx(expected.pvalue)
    missing = found.missing.set_index(["kind", "side", "name"])["n_missing"].to_dict()
    of_genes = {name: n for (kind, side, name), n in missing.items() if (kind, side) == ("gene", "bulk")}
    assert of_genes == {"G0": 1, "G1": 1, "G2": 14, "G3": 1, "G4": 1, "G5": 1, "G6": 3, "G7": 1}
    assert missing["sample", "bulk", "P3"] == 8
    assert missing["sample", "predicted", "P7"] == missing["gene", "predicted", "G1"] == 1
    assert str(found).endswith("missing values left out: 23 of bulk, 1 of predicted")


def test_a_patient_without_a_value_on_one_slide_has_the_others() -> None:
    predicted, bulk = tables()
    predicted.X[4, 3] = np.nan
    found = sti.tl.bulk_correlation(predicted, bulk, patient_key="patient")
    mean = np.nanmean(np.log1p(predicted.X).reshape(12, 2, -1), axis=1)
    assert found.genes["pearson"][3] == pytest.approx(stats.pearsonr(mean[:, 3], bulk.X[:, 3]).statistic)
    assert set(found.genes["n"]) == {12}


def test_groups_and_signs_that_cannot_be_right_are_refused() -> None:
    predicted, bulk = tables()
    predicted.obs["scanner"] = ["A"] * 3 + ["B"] * 21
    with pytest.raises(ValueError, match="Slides of patient 'P1' differ in 'scanner'"):
        sti.tl.bulk_correlation(predicted, bulk, patient_key="patient", by="scanner")
    predicted.X[0, 0] = -0.5
    with pytest.raises(ValueError, match=r"predictions of 0 or more, found -0\.5"):
        sti.tl.bulk_correlation(predicted, bulk, patient_key="patient")
