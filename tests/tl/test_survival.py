"""Survival and cohorts: screens, risk groups that see no test patient, and their pictures."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import stimage_sd as sti
from stimage_sd.stats.cox import cox_regressions
from stimage_sd.tl._cohort.patients import patients_of

OUTCOME = {"time_key": "months", "event_key": "dead"}


def cohort(n: int = 120, n_genes: int = 30, *, effect: float = 1.0, seed: int = 0, slides: int = 1) -> ad.AnnData:
    """Patients whose survival hangs on the first two genes, with the same values on each of their slides but noise."""
    random = np.random.default_rng(seed)
    own = random.normal(size=(n, n_genes))
    months = random.exponential(20 * np.exp(-effect * (own[:, 0] - own[:, 1])))
    ends = random.exponential(40, n)
    obs = pd.DataFrame(
        {
            "months": np.minimum(months, ends) + 0.1,
            "dead": (months < ends).astype(int),
            "patient": [f"P{i:03d}" for i in range(n)],
            "subtype": np.where(random.random(n) < 0.5, "A", "B"),
        }
    )
    rows = np.repeat(np.arange(n), slides)
    values = own[rows] + 0.01 * random.normal(size=(len(rows), n_genes))
    table = ad.AnnData(values.astype(np.float32), obs.iloc[rows].set_axis([f"S{i}" for i in range(len(rows))]))
    table.var_names = [f"G{i}" for i in range(n_genes)]
    return table


def test_the_screen_finds_what_was_planted_a_deviation_at_a_time() -> None:
    table = cohort(300)
    found = sti.tl.cox_screen(table, **OUTCOME)
    assert set(found["gene"].head(2)) == {"G0", "G1"}
    ratio = found.set_index("gene")["hazard_ratio"]
    assert ratio["G0"] > 1.5 > 0.67 > ratio["G1"]
    assert ((found["lower"] < found["hazard_ratio"]) & (found["hazard_ratio"] < found["upper"])).all()
    assert (found["c_index"] > 0.45).all()
    values = table.X[:, 0] / table.X[:, 0].std(ddof=1)
    other = cox_regressions(values[:, None], table.obs["months"], table.obs["dead"])
    assert found.set_index("gene")["coef"]["G0"] == pytest.approx(other.coef[0], rel=1e-5)


def perfect(n: int = 60, n_events: int = 9) -> ad.AnnData:
    """Few events; one gene rises with the risk, one falls with it, both in order; one is constant but for rounding."""
    table = cohort(n, 12, effect=0.0)
    months = np.random.default_rng(1).permutation(n) + 1.0
    table.obs["months"], table.obs["dead"] = months, (np.argsort(np.argsort(months)) < n_events).astype(int)
    table.X[:, 3], table.X[:, 7] = -np.log(months), months
    table.X[:, 5] = 0.0
    return table


def test_genes_in_perfect_order_come_first_in_a_screen() -> None:
    found = sti.tl.cox_screen(perfect(), **OUTCOME)
    assert set(found["gene"].head(2)) == {"G3", "G7"}
    best = found.set_index("gene")
    assert best["firth"].sum() == 2
    assert best.loc[["G3", "G7"], "c_index"].tolist() == [1.0, 1.0]
    assert best.loc["G3", "lower"] > 1 > best.loc["G7", "upper"]
    assert (best.loc[["G3", "G7"], "q_value"] < 0.05).all()
    assert found["gene"].iloc[-1] == "G5"
    assert np.isnan(best.loc["G5", ["coef", "p_value", "q_value", "c_index"]].astype(float)).all()
    assert best.drop(index="G5").notna().all(axis=None)


def test_genes_in_perfect_order_are_chosen_for_risk_groups() -> None:
    found = sti.tl.risk_groups(perfect(), **OUTCOME, n_genes=2, n_repeats=2)
    assert set(found.genes["gene"]) == {"G3", "G7"}
    assert found.summary["c_index"].iloc[0] == 1.0


def test_a_constant_gene_is_not_chosen_for_its_rounding() -> None:
    """Means of a patient's slides differ in the last digit where all values are 0.1."""
    table = cohort(40, 3, slides=3)
    table = table[np.random.default_rng(0).random(table.n_obs) < 0.8].copy()
    table.X = table.X.astype(np.float64)
    table.X[:, 2] = 0.1
    assert len(np.unique(patients_of(table, ["months"], patient="patient").values[:, 2])) > 1
    with pytest.raises(ValueError, match=r"at least 3 genes that vary in group 'all', .* found 2 of 3"):
        sti.tl.risk_groups(table, **OUTCOME, patient_key="patient", n_genes=3)
    found = sti.tl.cox_screen(table, **OUTCOME, patient_key="patient")
    assert found["coef"].isna().tolist() == [False, False, True]


def test_folds_where_fewer_genes_vary_take_those() -> None:
    """A gene of one patient is constant in the folds that are trained without that patient."""
    table = cohort(45, 3)
    table.X[:, 1:] = 0.0
    table.X[4, 1] = 1.0
    with pytest.warns(UserWarning, match="In 2 of 6 folds of group 'all' fewer than 2 genes vary"):
        found = sti.tl.risk_groups(table, **OUTCOME, n_genes=2, n_repeats=2)
    assert sorted(found.folds["genes"].str.count(",")) == [0, 0, 1, 1, 1, 1]
    table.X[:, 0] = 0.0
    with pytest.warns(UserWarning, match="In 2 of 6 folds of group 'all' fewer than 1 genes vary"):
        found = sti.tl.risk_groups(table, **OUTCOME, n_genes=1, n_repeats=2)
    assert np.isfinite(found.patients["risk"]).all()


def test_groups_and_slides_of_a_patient() -> None:
    table = cohort(100, slides=3)
    found = sti.tl.cox_screen(table, **OUTCOME, patient_key="patient", by="subtype")
    assert set(found["group"]) == {"A", "B"}
    assert found.groupby("group")["n_patients"].first().sum() == 100
    alone = sti.tl.cox_screen(table[table.obs["subtype"] == "A"], **OUTCOME, patient_key="patient")
    mine = found[found["group"] == "A"].drop(columns="group").reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone.drop(columns="group"))
    patients = patients_of(table, ["months"], patient="patient")
    np.testing.assert_allclose(patients.values[0], table.X[:3].mean(axis=0), rtol=1e-5)


@pytest.mark.slow
def test_random_genes_predict_nothing() -> None:
    """670 patients, 1,522 genes: whoever scores genes on the patients they were chosen on finds more."""
    table = cohort(670, 1522, effect=0.0)
    found = sti.tl.risk_groups(table, **OUTCOME, n_repeats=4)
    assert abs(found.summary["c_index"].iloc[0] - 0.5) < 0.05
    screened = sti.tl.cox_screen(table, **OUTCOME)
    assert screened["c_index"].nlargest(5).min() > 0.54  # in sample
    # without effect p is uniform, and a cohort in twenty has a q under 0.05 somewhere: this one's least is 0.028
    assert stats.kstest(screened["p_value"], "uniform").pvalue > 0.01
    assert (screened["q_value"] > 0.01).all()


def test_slides_of_a_patient_are_never_on_both_sides() -> None:
    """Every patient's slides are all but the same, and outcomes random: a split of slides would predict them."""
    table = cohort(60, 400, effect=0.0, slides=5)
    found = sti.tl.risk_groups(table, **OUTCOME, patient_key="patient", n_repeats=6)
    assert abs(found.summary["c_index"].iloc[0] - 0.5) < 0.15
    assert (found.folds.groupby("repeat")["n_test"].sum() == 60).all()
    assert found.patients["patient"].is_unique


def test_risk_groups_find_what_was_planted_and_repeat() -> None:
    table = cohort(150)
    found = sti.tl.risk_groups(table, **OUTCOME, n_genes=2, n_repeats=3, seed=5)
    assert found.summary["c_index"].iloc[0] > 0.7
    assert found.summary["log_rank_p"].iloc[0] < 1e-3
    assert found.summary["hazard_ratio"].iloc[0] > 1.5
    assert set(found.genes["gene"].head(2)) == {"G0", "G1"}
    assert found.patients["risk_group"].value_counts().tolist() == [75, 75]
    (group,) = (value for name, value in found.facts().items() if name.startswith("group"))
    assert group.startswith(f"150 patients, {int(table.obs['dead'].sum())} events; c-index ")
    again = sti.tl.risk_groups(table, **OUTCOME, n_genes=2, n_repeats=3, seed=5)
    for one, other in zip(found, again, strict=True):
        pd.testing.assert_frame_equal(one, other)
    # whoever is left out does not change how others are scored in the same fold: scales and genes are the training's
    moved = table.copy()
    moved.X = moved.X * 100 + 7
    other = sti.tl.risk_groups(moved, **OUTCOME, n_genes=2, n_repeats=3, seed=5)
    np.testing.assert_allclose(found.patients["risk"], other.patients["risk"], rtol=1e-3, atol=1e-3)


def test_bad_outcomes_say_what_to_do() -> None:
    table = cohort(30)
    with pytest.raises(KeyError, match="No column 'days' in the table's obs"):
        sti.tl.cox_screen(table, time_key="days", event_key="dead")
    missing = table.copy()
    missing.obs.loc["S3", "months"] = np.nan
    with pytest.raises(ValueError, match=r"1 of 30 rows lack a value .* such as 'S3'. Leave them out: `table\[table"):
        sti.tl.cox_screen(missing, **OUTCOME)
    odd = table.copy()
    odd.obs["dead"] = odd.obs["dead"] + 1
    with pytest.raises(ValueError, match=r"Expected 1 \(seen\) and 0 \(censored\)"):
        sti.tl.cox_screen(odd, **OUTCOME)
    negative = table.copy()
    negative.obs["months"] -= 1000
    with pytest.raises(ValueError, match="positive times"):
        sti.tl.risk_groups(negative, **OUTCOME)
    contradicting = cohort(10, slides=2)
    contradicting.obs.loc["S1", "months"] += 1
    with pytest.raises(ValueError, match="Slides of patient 'P000' differ"):
        sti.tl.cox_screen(contradicting, **OUTCOME, patient_key="patient")
    alive = table.copy()
    alive.obs.loc[alive.obs["subtype"] == "B", "dead"] = 0
    with pytest.raises(ValueError, match="Group 'B'"):
        sti.tl.cox_screen(alive, **OUTCOME, by="subtype")
    with pytest.raises(ValueError, match="Group 'B' has 0 events, fewer than the 3 folds"):
        sti.tl.risk_groups(alive, **OUTCOME, by="subtype", n_repeats=1)
    with pytest.raises(ValueError, match=r"at least 31 genes that vary in group 'all', .* found 30 of 30. Pass"):
        sti.tl.risk_groups(table, **OUTCOME, n_genes=31)
    with pytest.raises(ValueError, match="`penalizer` above 0, found 0"):
        sti.tl.risk_groups(table, **OUTCOME, penalizer=0)
    twice = table.copy()
    twice.var_names = ["G1", *twice.var_names[1:]]
    with pytest.raises(ValueError, match=r"unique gene names, found \['G1'\] twice"):
        sti.tl.cox_screen(twice, **OUTCOME)
    with pytest.raises(ValueError, match="found 30 rows and 0 genes"):
        sti.tl.cox_screen(table, **OUTCOME, genes=[])
    broken = table.copy()
    broken.X[0, 4] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity, for instance of 'G4'"):
        sti.tl.cox_screen(broken, **OUTCOME)


def test_curves_show_groups_and_numbers_at_risk() -> None:
    found = sti.tl.risk_groups(cohort(90), **OUTCOME, by="subtype", n_genes=2, n_repeats=2)
    axes = sti.pl.survival(found.patients)
    assert [ax.get_title().split(":")[0] for ax in axes] == list(dict.fromkeys(found.patients["group"]))
    part = found.patients[found.patients["group"] == found.patients["group"].iloc[0]]
    texts = [text.get_text() for text in axes[0].texts]
    for name in ("low", "high"):
        assert str(int((part["risk_group"] == name).sum())) in texts
    (panel,) = sti.pl.scores({"measured": found})
    assert f"median {found.folds.groupby(['repeat', 'fold'])['c_index'].mean().median():.2f}" in (
        panel.get_xticklabels()[0].get_text()
    )
    whole = sti.pl.survival(found)
    assert [ax.get_title() for ax in whole] == [ax.get_title() for ax in axes]
    with pytest.raises(ValueError, match="found one in 'all'"):
        sti.pl.survival(found.patients.assign(group="all", risk_group="low"))
    with pytest.raises(ValueError, match="risk_groups"):
        sti.pl.survival(found.patients.drop(columns="time"))
    plt.close("all")
