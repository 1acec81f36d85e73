"""Response to a drug: nested folds that see no test patient, and what is written of them."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import stimage_sd as sti


def cohort(n: int, n_genes: int, *, effect: float, seed: int = 0) -> ad.AnnData:
    random = np.random.default_rng(seed)
    values = random.gamma(2.0, size=(n, n_genes))
    responded = effect * (values[:, 0] - 2) + random.normal(size=n) > 0
    obs = pd.DataFrame({"response": np.where(responded, "pCR", "RD")}, index=[f"P{i}" for i in range(n)])
    return ad.AnnData(values, obs, pd.DataFrame(index=[f"G{i}" for i in range(n_genes)]))


def test_responders_are_told_and_chance_is_measured() -> None:
    table = cohort(80, 3, effect=2.0)
    found = sti.tl.drug_response(table, response_key="response", positive="pCR", n_permutations=4, n_folds=3)
    assert found.auc > 0.8
    assert found.interval[0] < found.auc < found.interval[1]
    assert found.p_value == pytest.approx(0.2)
    assert found.positive == "pCR"
    assert repr(found).startswith(f"DrugResponse\n  AUC          {found.auc:.3f}, ")
    assert sorted(found.patients["patient"]) == sorted(table.obs_names)
    for fold, part in found.patients.groupby("fold"):
        expected = roc_auc_score(part["response"], part["score"])
        assert found.folds.set_index("fold")["auc"][fold] == pytest.approx(expected)
    again = sti.tl.drug_response(table, response_key="response", positive="pCR", n_permutations=4, n_folds=3, n_jobs=2)
    pd.testing.assert_frame_equal(found.patients, again.patients)
    assert again.p_value == found.p_value
    ax = sti.pl.roc(found)
    assert ax.get_title() == f"AUC {found.auc:.2f} ({found.interval[0]:.2f} to {found.interval[1]:.2f}), p = 0.2"
    of_frame = sti.pl.roc(found.patients)
    assert of_frame.get_title() == f"AUC {found.auc:.2f}"
    np.testing.assert_array_equal(of_frame.lines[-2].get_xydata(), ax.lines[-2].get_xydata())
    with pytest.raises(ValueError, match="both responses in every fold, found one response in fold 1"):
        sti.pl.roc(found.patients.assign(response=lambda frame: frame["response"].where(frame["fold"] != 1, 1)))
    with pytest.raises(ValueError, match=r"`patients` of `stimage_sd\.tl\.drug_response`, found a table lacking"):
        sti.pl.roc(found.folds)
    plt.close("all")


@pytest.mark.slow
def test_random_genes_tell_nothing() -> None:
    """670 patients, 1,522 genes; choosing or scaling on all of them would tell something."""
    found = sti.tl.drug_response(cohort(670, 1522, effect=0.0), response_key="response", n_permutations=0, n_folds=3)
    assert abs(found.auc - 0.5) < 0.05


def test_the_scale_of_raw_counts_does_not_depend_on_their_depth() -> None:
    table = cohort(60, 5, effect=2.0)
    deeper = table.copy()
    deeper.X = table.X * np.random.default_rng(1).uniform(1, 50, (60, 1))
    options = {"response_key": "response", "scale": "cpm", "n_folds": 3, "n_permutations": 0}
    one, other = (sti.tl.drug_response(each, **options) for each in (table, deeper))
    np.testing.assert_allclose(one.patients["score"], other.patients["score"], rtol=1e-6, atol=1e-8)


def test_bad_responses_say_what_to_do() -> None:
    table = cohort(30, 3, effect=1.0)
    three, few, logs = table.copy(), table.copy(), table.copy()
    three.obs["response"] = np.resize(["a", "b", "c"], 30)
    few.obs["response"] = ["pCR"] * 2 + ["RD"] * 28
    logs.X = np.log(table.X)
    with pytest.raises(ValueError, match="Expected two responses in 'response', found 3"):
        sti.tl.drug_response(three, response_key="response")
    with pytest.raises(ValueError, match="No response 'PR'"):
        sti.tl.drug_response(table, response_key="response", positive="PR")
    with pytest.raises(ValueError, match="patients of either response, one per fold, found 2"):
        sti.tl.drug_response(few, response_key="response")
    with pytest.raises(ValueError, match='take `scale="none"`'):
        sti.tl.drug_response(logs, response_key="response")
    with pytest.raises(ValueError, match="Expected `scale`"):
        sti.tl.drug_response(table, response_key="response", scale="zscore")
