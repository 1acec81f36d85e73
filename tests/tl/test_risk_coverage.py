"""Selective prediction on predicted sections: planted uncertainty is found, tables add up, mistakes are named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stimage_sd import contract, tl


@pytest.fixture(scope="module")
def cohort(planted: Callable) -> object:
    made = planted(("a", "b", "c"), n_side=14, n_features=6, n_genes=30, strength=1.2)
    model = tl.fit_nb(
        {name: made.sections[name] for name in "ab"}, genes=made.genes, extractor="toy", n_members=3, exposure=None
    )
    tl.predict(made.sections["c"], model)
    return made


@pytest.mark.parametrize(("kind", "layer"), [("total", "total_variance"), ("epistemic", "epistemic")])
@pytest.mark.parametrize("scale", ["log1p", "raw"])
def test_rows_are_means_over_the_least_uncertain_tiles(cohort: object, kind: str, layer: str, scale: str) -> None:
    section = cohort.sections["c"]
    table = tl.risk_coverage(section, uncertainty=kind, scale=scale, coverages=(0.25, 1.0))
    predictions = contract.predictions(section)
    counts = contract.counts(section)[:, predictions.var_names].X.toarray()
    assert len(table) == 2 * len(cohort.genes)
    for number, gene in enumerate(cohort.genes):
        mean, variance = predictions.X[:, number].astype(float), predictions.layers[layer][:, number].astype(float)
        if scale == "log1p":
            error, spread = np.abs(np.log1p(counts[:, number]) - np.log1p(mean)), variance / (1 + mean) ** 2
        else:
            error, spread = np.abs(counts[:, number] - mean), variance
        own = table[table["gene"] == gene]
        least = np.argsort(spread)[: len(error) // 4]
        np.testing.assert_allclose(own["risk"], [error[least].mean(), error.mean()], rtol=1e-5)
        np.testing.assert_allclose(own["random"], error.mean())
        np.testing.assert_allclose(own["oracle"], [np.sort(error)[: len(least)].mean(), error.mean()])
    assert (table["aurc"] >= table["aurc_oracle"]).all()
    assert (table["section"] == "c").all()


def test_the_most_uncertain_fifth_errs_more(cohort: object) -> None:
    table = tl.risk_coverage(cohort.sections["c"], coverages=(0.8,))
    n_tiles = contract.predictions(cohort.sections["c"]).n_obs
    n_kept = int(np.ceil(0.8 * n_tiles))
    uncertain = (table["random"] * n_tiles - table["risk"] * n_kept) / (n_tiles - n_kept)
    assert stats.wilcoxon(uncertain, table["risk"], alternative="greater").pvalue < 0.01
    assert (table["aurc"] < table["aurc_random"]).mean() > 0.8


def test_a_cohort_gives_a_table_a_section(cohort: object) -> None:
    section = cohort.sections["c"]
    both = tl.risk_coverage({"one": section, "two": section})
    assert both["section"].value_counts().to_dict() == {"one": 300, "two": 300}
    one = both[both["section"] == "one"].drop(columns="section").reset_index(drop=True)
    pd.testing.assert_frame_equal(one, tl.risk_coverage(section).drop(columns="section"))


def test_mistakes_are_named(cohort: object, make_spots: Callable) -> None:
    section = cohort.sections["c"]
    with pytest.raises(ValueError, match=r"one of \['aleatoric', 'epistemic', 'total'\], found 'ood'"):
        tl.risk_coverage(section, uncertainty="ood")
    with pytest.raises(ValueError, match='`scale` to be "log1p" or "raw"'):
        tl.risk_coverage(section, scale="sqrt")
    for coverages in ((), (0.0,), (1.1,), 0.5):
        with pytest.raises(ValueError, match="Expected `coverages` as shares above 0"):
            tl.risk_coverage(section, coverages=coverages)
    with pytest.raises(KeyError, match="no predictions"):
        tl.risk_coverage(make_spots(n_side=4))
