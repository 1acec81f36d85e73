"""Scores of several models: drawn side by side, compared gene by gene."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from stimage_sd import pl
from stimage_sd.pl._model_scores import paired_tests
from stimage_sd.pl._score_tables import wide


def cross_validated(n_genes: int = 40, sections: str = "xyz") -> pd.DataFrame:
    """Scores of three models: one better than the second in every gene, the third like the second."""
    random = np.random.default_rng(0)
    base = random.normal(0.3, 0.1, (len(sections), n_genes))
    models = {
        "second": base,
        "best": base + random.uniform(0.02, 0.08, base.shape),
        "third": base + random.normal(0, 0.03, base.shape),
    }
    parts = [
        pd.DataFrame(
            {
                "section": np.repeat(list(sections), n_genes),
                "model": model,
                "gene": [f"G{number}" for number in range(n_genes)] * len(sections),
                "metric": metric,
                "value": values.ravel() + shift,
            }
        )
        for model, values in models.items()
        for metric, shift in (("pearson", 0.0), ("iou", 0.1), ("coverage", 0.5), ("nll", 1.0), ("nll_floor", 1.0))
    ]
    return pd.concat(parts, ignore_index=True)


def test_scores_of_models_stand_side_by_side_the_best_first() -> None:
    table = cross_validated()
    axes = pl.scores(table, metrics=["pearson", "iou", "nll_gain"])
    assert len(axes) == 3
    labels = [label.get_text().splitlines() for label in axes[0].get_xticklabels()]
    assert labels[0][0] == "best"
    assert labels[0][-1] == "reference"
    means = table[(table["model"] == "best") & (table["metric"] == "pearson")].groupby("gene")["value"].mean()
    np.testing.assert_allclose(np.sort(axes[0].collections[1].get_offsets()[:, 1]), np.sort(means))
    assert labels[0][1] == f"median {means.median():.2f}"


def test_models_are_compared_by_wilcoxon_on_genes_and_holm() -> None:
    table = cross_validated()
    means = table[table["metric"] == "pearson"].groupby(["gene", "model"])["value"].mean().unstack()
    raw = {
        pair: stats.wilcoxon(means[pair[0]] - means[pair[1]]).pvalue
        for pair in itertools.combinations(["best", "second", "third"], 2)
    }
    for reference, pairs in ((None, list(raw)), ("second", [("best", "second"), ("second", "third")])):
        chosen = {frozenset(pair): raw[pair] for pair in pairs}
        corrected = dict(zip(chosen, multipletests(list(chosen.values()), method="holm")[1], strict=True))
        found = paired_tests(wide(table), "pearson", reference=reference)
        assert set(found) == set(corrected)
        for pair, p_value in corrected.items():
            assert found[pair] == pytest.approx(p_value, rel=1e-9)
    axis = pl.scores(table, metrics=["pearson"], reference="second")[0]
    labels = {text.get_text().split("\n")[0]: text.get_text().split("\n")[-1] for text in axis.get_xticklabels()}
    assert labels["second"] == "reference"
    assert labels["best"] == f"p = {found[frozenset(('best', 'second'))]:.0e}"
    assert labels["third"] == f"p = {found[frozenset(('second', 'third'))]:.2g}"


def test_only_what_both_models_scored_is_compared() -> None:
    table = cross_validated()
    lost = (table["model"] == "best") & (table["section"] == "x")
    table.loc[lost, "value"] = np.nan
    scored = table[(table["metric"] == "pearson") & (table["section"] != "x")]
    means = scored.groupby(["gene", "model"])["value"].mean().unstack()
    found = paired_tests(wide(table), "pearson")[frozenset(("best", "third"))]
    assert stats.wilcoxon(means["best"] - means["third"]).pvalue <= found
    same = table.assign(value=0.5)
    assert set(paired_tests(wide(same), "iou").values()) == {1.0}
    nearer = table[~lost & (table["metric"] == "coverage")].assign(value=lambda frame: frame["value"] * 0 + 0.9)
    nearer.loc[nearer["model"] == "third", "value"] = 0.99
    axis = pl.scores(nearer, metrics=["coverage"])[0]
    assert axis.get_xticklabels()[-1].get_text().startswith("third")


def test_scores_by_section_are_boxes_a_model() -> None:
    table = cross_validated()
    axis = pl.scores(table, metrics=["pearson"], by="section")[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "z"]
    assert len(axis.patches) == 9
    assert axis.get_legend().get_texts()[0].get_text() == "best"
    own = table[(table["model"] == "best") & (table["metric"] == "pearson")].groupby("section")["value"]
    medians = [drawn.get_ydata()[0] for drawn in axis.lines if drawn.get_linewidth() == 1.2][:3]
    np.testing.assert_allclose(medians, own.median())


def test_scores_of_models_refuses() -> None:
    table = cross_validated()
    with pytest.raises(ValueError, match=r"`reference` to be one of the models .* found 'ridge'"):
        pl.scores(table, metrics=["pearson"], reference="ridge")
    with pytest.raises(ValueError, match=r"`by` to be one of .* found 'gene'"):
        pl.scores(table, by="gene", metrics=["pearson"])
    with pytest.raises(ValueError, match=r"`metrics` to be of .* found \['accuracy'\]"):
        pl.scores(table, metrics=["accuracy"])
    with pytest.raises(ValueError, match=r"found a table lacking \['spearman'\]"):
        pl.scores(table, metrics=["spearman"])
    with pytest.raises(ValueError, match="found several of"):
        pl.scores(pd.concat([table, table]), metrics=["pearson"])
    with pytest.raises(ValueError, match="one model under each name, found several models under 'all'"):
        pl.scores({"all": table}, metrics=["pearson"])
    with pytest.raises(ValueError, match="keyed by the model's name, found none"):
        pl.scores({})


def of_one_model(shift: float, sections: str = "xy") -> pd.DataFrame:
    """Scores as of `tl.evaluate`."""
    values = np.random.default_rng(1).normal(0.3, 0.1, (len(sections), 20)) + shift
    genes = [f"G{number}" for number in range(20)] * len(sections)
    return pd.DataFrame(
        {
            "section": np.repeat(list(sections), 20),
            "gene": genes,
            "pearson": values.ravel(),
            "iou": 0.5 - values.ravel(),
        }
    )


def test_tables_of_several_models_are_not_pooled() -> None:
    first, second = of_one_model(0.0), of_one_model(0.2)
    (by_name,) = pl.scores({"first": first, "second": second}, metrics=["pearson"])
    labels = [label.get_text().split("\n")[:2] for label in by_name.get_xticklabels()]
    medians = [scores.groupby("gene")["pearson"].mean().median() for scores in (second, first)]
    assert labels == [["second", f"median {medians[0]:.2f}"], ["first", f"median {medians[1]:.2f}"]]
    together = pd.concat([first.assign(model="first"), second.assign(model="second")])
    (of_column,) = pl.scores(together, metrics=["pearson"])
    assert [label.get_text() for label in of_column.get_xticklabels()] == [
        label.get_text() for label in by_name.get_xticklabels()
    ]
    with pytest.raises(
        ValueError, match=r"several of \{'section': 'x', 'gene': 'G0'\}\. Pass tables of several models"
    ):
        pl.scores(pd.concat([first, second]), metrics=["pearson"])


def test_a_model_keeps_its_color_whatever_the_metric() -> None:
    models = {"first": of_one_model(0.0), "second": of_one_model(0.2)}

    def colors(metric: str, by: str) -> dict[str, tuple[float, ...]]:
        (panel,) = pl.scores(models, metrics=[metric], by=by)
        if by == "section":
            patches = panel.get_legend().get_patches()
            return {
                text.get_text(): patch.get_facecolor()[:3]
                for text, patch in zip(panel.get_legend().get_texts(), patches, strict=True)
            }
        names = [label.get_text().split("\n")[0] for label in panel.get_xticklabels()]
        bodies = [drawn for drawn in panel.collections if len(drawn.get_offsets()) == 20]
        return {name: tuple(body.get_facecolor()[0][:3]) for name, body in zip(names, bodies, strict=True)}

    # the second model is best by the correlation, the first by the IoU
    expected = colors("pearson", "model")
    assert list(expected) == ["second", "first"]
    assert list(colors("iou", "model")) == ["first", "second"]
    for metric, by in (("iou", "model"), ("pearson", "section"), ("iou", "section")):
        assert colors(metric, by) == expected


def test_concordance_of_measured_beside_predicted_genes() -> None:
    """Paper, Figure 5c: single genes, and models of several genes."""
    random = np.random.default_rng(2)
    screen = pd.DataFrame({"group": np.repeat(["HER2", "TNBC"], 15), "gene": [f"G{n}" for n in range(15)] * 2})
    screens = {name: screen.assign(c_index=random.uniform(0.5, 0.7, 30)) for name in ("measured", "predicted")}
    (panel,) = pl.scores(screens, by="section")
    assert [label.get_text() for label in panel.get_xticklabels()] == ["HER2", "TNBC"]
    assert panel.get_ylabel() == "c-index"
    medians = [drawn.get_ydata()[0] for drawn in panel.lines if drawn.get_linewidth() == 1.2]
    assert sorted(medians) == pytest.approx(
        sorted(part["c_index"].median() for table in screens.values() for _, part in table.groupby("group"))
    )


def test_scores_of_gene_classes_are_drawn_as_they_are() -> None:
    table = of_one_model(0.0).drop(columns="pearson").assign(auc=0.7, balanced_accuracy=0.6)
    titles = [panel.get_title() for panel in pl.scores(table)]
    assert titles == ["High or Low", "High or Low", "pattern overlap"]


def test_members_and_pools_stand_side_by_side() -> None:
    """Paper, section 2.4 and Figure 2c."""
    random = np.random.default_rng(3)
    frames = [
        pd.DataFrame(
            {"section": section, "gene": ["A", "B"], "kind": kind, "number": number, "members": members,
             "pearson": random.uniform(0, 0.5, 2)}
        )
        for section in "xy"
        for kind, count, members in (("member", 6, "0"), ("pool", 4, "0 1 2"))
        for number in range(count)
    ]  # fmt: skip
    table = pd.concat(frames, ignore_index=True)
    (panel,) = pl.scores(table)
    assert {text.get_text() for text in panel.get_legend().get_texts()} == {"single members", "pools of 3 members"}
    points = [len(drawn.get_offsets()) for drawn in panel.collections]
    assert sorted(points) == [4, 4, 6, 6]
    medians = [drawn.get_ydata()[0] for drawn in panel.lines if drawn.get_linewidth() == 1.2]
    means = table.groupby(["section", "kind", "number"])["pearson"].mean().groupby(["section", "kind"]).median()
    assert sorted(medians) == pytest.approx(sorted(means))
