"""Cox regressions and concordances against statsmodels, lifelines, and published output of R's survival package."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import chi2
from statsmodels.duration.hazard_regression import PHReg

from stimage_sd.stats.cox import concordances, cox_regressions, directions
from stimage_sd.stats.survival import kaplan_meier, log_rank_p, ridge_cox

_REASON = "lifelines caps pandas, and is installed on the oldest Python"
datasets = pytest.importorskip("lifelines.datasets", reason=_REASON)
concordance_index = pytest.importorskip("lifelines.utils", reason=_REASON).concordance_index


@pytest.mark.parametrize("levels", [3, 20, 10_000])
def test_all_genes_are_fitted_as_one_by_one(levels: int) -> None:
    """With many ties, some, and none; by statsmodels, whose ties are Efron's too, and lifelines' concordance."""
    random = np.random.default_rng(levels)
    values = random.normal(size=(150, 4)) * [0.01, 1.0, 30.0, 1.0] + [0, 5, -100, 0]
    values[:, 3] = np.round(values[:, 3])
    time = 1 + np.floor(levels * random.exponential(np.exp(-0.5 * values[:, 1] + 2.5)) / 10)
    event = random.random(150) < 0.6
    found = cox_regressions(values, time, event)
    c_index = concordances(values, time, event)
    for gene in range(4):
        other = PHReg(time, values[:, [gene]], event.astype(int), ties="efron").fit()
        np.testing.assert_allclose(found.coef[gene], other.params[0], rtol=1e-8)
        np.testing.assert_allclose(found.se[gene], other.bse[0], rtol=1e-8)
        np.testing.assert_allclose(found.p_value[gene], other.pvalues[0], rtol=1e-7)
        np.testing.assert_allclose(found.log_likelihood[gene], other.llf, rtol=1e-10)
        assert c_index[gene] == pytest.approx(1 - concordance_index(time, values[:, gene], event), abs=1e-12)
    assert found.log_likelihood_null == pytest.approx(
        PHReg(time, values[:, :1], event, ties="efron").loglike(np.zeros(1))
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 25), st.integers(1, 6))
def test_concordance_is_counted_over_pairs(seed: int, n: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    risk, time = random.integers(0, levels, size=(n, 1)), random.integers(1, levels + 2, n)
    event = random.random(n) < 0.7
    event[0] = True
    good = pairs = 0.0
    for i in range(n):
        for j in range(n):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                good += (risk[i, 0] > risk[j, 0]) + 0.5 * (risk[i, 0] == risk[j, 0])
    found = concordances(risk, time, event)[0]
    assert np.isnan(found) if pairs == 0 else found == pytest.approx(good / pairs)


def test_lung_is_as_r_gives_it() -> None:
    """``coxph(Surv(time, status) ~ sex, lung)``, survdiff, survfit: Therneau's package as printed in STHDA's "Cox
    proportional-hazards model" and "Survival analysis basics" (coef -0.5310, se 0.1672, z -3.176, p 0.00149,
    likelihood ratio 10.63, concordance 0.579; log-rank 10.3, p 0.00131; medians 270 and 426 days)."""
    lung = datasets.load_lung().dropna(subset=["time", "status", "sex"])
    time, event = lung["time"].to_numpy(), lung["status"].to_numpy() == lung["status"].max()
    sex = lung["sex"].to_numpy(dtype=float)
    found = cox_regressions(sex[:, None], time, event)
    assert found.coef[0] == pytest.approx(-0.5310, abs=1e-4)
    assert found.se[0] == pytest.approx(0.1672, abs=1e-4)
    assert found.coef[0] / found.se[0] == pytest.approx(-3.176, abs=1e-3)
    assert found.p_value[0] == pytest.approx(0.00149, abs=1e-5)
    assert 2 * (found.log_likelihood[0] - found.log_likelihood_null) == pytest.approx(10.63, abs=5e-3)
    assert concordances(-sex[:, None], time, event)[0] == pytest.approx(0.579, abs=1e-3)
    male = sex == sex.min()
    assert log_rank_p(time, event, male) == pytest.approx(0.00131, abs=1e-5)
    curves = [kaplan_meier(time[rows], event[rows]) for rows in (male, ~male)]
    assert [curve.time[np.argmax(curve.share <= 0.5)] for curve in curves] == [270.0, 426.0]


def test_recidivism_is_as_r_gives_it() -> None:
    """``coxph(Surv(week, arrest) ~ fin + age + race + wexp + mar + paro + prio, Rossi)``: Fox and Weisberg, "Cox
    proportional-hazards regression for survival data in R", appendix to "An R companion to applied regression"."""
    rossi = datasets.load_rossi()
    expected = {"fin": -0.37942, "age": -0.05744, "race": 0.31390, "wexp": -0.14980, "mar": -0.43370,
                "paro": -0.08487, "prio": 0.09150}  # fmt: skip
    values = rossi[[*expected]].to_numpy(dtype=float)
    weights = ridge_cox(values, rossi["week"].to_numpy(), rossi["arrest"].to_numpy(), penalty=0.0)
    np.testing.assert_allclose(weights, [*expected.values()], atol=1e-5)
    risk = (values @ weights)[:, None]
    # its linear predictor by itself has the coefficient one
    found = cox_regressions(risk, rossi["week"].to_numpy(), rossi["arrest"].to_numpy())
    assert found.coef[0] == pytest.approx(1.0, abs=1e-4)
    assert concordances(risk, rossi["week"].to_numpy(), rossi["arrest"].to_numpy())[0] == pytest.approx(0.640, abs=1e-3)


def test_breast_cancer_and_glioma_are_as_r_gives_them() -> None:
    """Everitt and Hothorn, "A handbook of statistical analyses using R", chapter "Survival analysis": coxph of GBSG2
    (horTh -0.346278, age -0.009459, pnodes 0.048789, progrec -0.002217) and the log-rank test of grade III glioma
    (chi-square 6.1, p 0.0138)."""
    gbsg = datasets.load_gbsg2()
    gbsg = gbsg.assign(horTh=(gbsg["horTh"] == "yes").astype(int), menostat=(gbsg["menostat"] == "Post").astype(int))
    grade = gbsg.pop("tgrade").map({"I": 0, "II": 1, "III": 2})
    # R's orthogonal polynomials of an ordered factor
    gbsg = gbsg.assign(linear=np.array([-1, 0, 1])[grade] / np.sqrt(2), square=np.array([1, -2, 1])[grade] / np.sqrt(6))
    names = [name for name in gbsg if name not in ("time", "cens")]
    values = gbsg[names].to_numpy(dtype=float)
    spread = values.std(axis=0)
    weights = ridge_cox(values / spread, gbsg["time"].to_numpy(), gbsg["cens"].to_numpy(), penalty=0.0) / spread
    found = dict(zip(names, weights, strict=True))
    for name, value in {"horTh": -0.346278, "age": -0.009459, "linear": 0.551299, "square": -0.201091,
                        "pnodes": 0.048789, "progrec": -0.002217}.items():  # fmt: skip
        assert found[name] == pytest.approx(value, abs=1e-5)
    glioma = datasets.load_g3()
    treated = (glioma["group"] == "RIT").to_numpy()
    time, event = glioma["time"].to_numpy(), glioma["event"].to_numpy()
    assert log_rank_p(time, event, treated) == pytest.approx(0.0138, abs=1e-4)
    # the score test of a Cox regression without ties is the log-rank test; Wald's is near it
    assert cox_regressions(treated[:, None].astype(float), time, event).p_value[0] == pytest.approx(0.03, abs=0.02)


def test_genes_that_tell_nothing_are_nan() -> None:
    time = np.arange(1.0, 21.0)
    rounding = np.where(time % 2, 0.1 + 0.2, 0.3)
    values = np.column_stack([np.ones(20), rounding, np.sin(time)])
    found = cox_regressions(values, time, np.ones(20, bool))
    assert np.isnan(found.coef[:2]).all()
    assert np.isfinite(found.coef[2])
    assert not found.firth.any()
    alone = cox_regressions(time[:, None], time, time == 20)  # the only death is of the only patient at risk
    assert np.isnan([alone.coef[0], alone.p_value[0], concordances(time[:, None], time, time == 20)[0]]).all()


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("n_events", [2, 8, 30])
def test_genes_that_order_the_patients_have_firths_estimate(width: int, n_events: int) -> None:
    """Against the penalized likelihood of statsmodels, maximized and inverted by scipy; with ties and without."""
    random = np.random.default_rng(n_events)
    time = 1.0 + np.arange(30) // width
    event = random.permutation(30) < n_events
    values = np.column_stack([-time, 40 * np.sqrt(time) - 3, random.normal(size=30)])
    found = cox_regressions(values, time, event)
    assert found.firth.tolist() == [True, True, False]
    for gene in range(2):
        model = PHReg(time, values[:, [gene]] / values[:, gene].std(), event.astype(int), ties="efron")

        def penalized(beta: float, model: PHReg = model) -> float:
            information = -float(np.squeeze(model.hessian(np.array([beta]))))
            return float(model.loglike(np.array([beta]))) + 0.5 * np.log(information)

        best = minimize_scalar(lambda beta: -penalized(beta), bracket=(-1, 1), tol=1e-10)
        scale = values[:, gene].std()
        assert found.coef[gene] * scale == pytest.approx(best.x, rel=1e-5)
        ratio = 2 * (penalized(best.x) - penalized(0.0))
        assert found.p_value[gene] == pytest.approx(chi2.sf(ratio, 1), rel=1e-5)
        assert found.z[gene] == pytest.approx(np.sign(best.x) * np.sqrt(ratio), rel=1e-5)
        for limit in (found.lower[gene], found.upper[gene]):
            assert 2 * (penalized(best.x) - penalized(limit * scale)) == pytest.approx(chi2.ppf(0.95, 1), rel=1e-5)
        assert found.lower[gene] < found.coef[gene] < found.upper[gene]


@pytest.mark.parametrize("width", [1, 5])
def test_directions_are_the_signs_of_the_coefficients(width: int) -> None:
    """Of genes with few high values too, whose concordance may be of the other direction; and in perfect order."""
    random = np.random.default_rng(0)
    values = np.exp(2 * random.normal(size=(60, 200)))
    time, event = 1.0 + random.permutation(60) // width, random.random(60) < 0.4
    values[:, 0], values[:, 1] = time, -time
    found = cox_regressions(values, time, event)
    signs = directions(values, time, event)
    np.testing.assert_array_equal(signs, np.sign(found.coef))
    assert signs[:2].tolist() == [-1, 1]
    assert (concordances(values * signs, time, event) < 0.5).any()


def test_genes_that_all_but_order_the_patients_have_a_finite_optimum() -> None:
    """One pair out of order: the optimum is far away, and it is there."""
    time = np.arange(1.0, 31.0)
    values = -time
    values[[10, 11]] = values[[11, 10]]
    found = cox_regressions(values[:, None], time, np.ones(30, bool))
    assert not found.firth[0]
    other = PHReg(time, values[:, None], np.ones(30), ties="efron").fit()
    assert found.coef[0] == pytest.approx(other.params[0], rel=1e-6)


def test_the_order_of_patients_and_the_unit_do_not_matter() -> None:
    random = np.random.default_rng(0)
    values, time, event = random.normal(size=(60, 3)), random.integers(1, 20, 60), random.random(60) < 0.5
    found = cox_regressions(values, time, event)
    order = random.permutation(60)
    again = cox_regressions(1000 * values[order] + 7, time[order] / 30, event[order])
    np.testing.assert_allclose(found.coef, 1000 * again.coef, rtol=1e-6)
    np.testing.assert_allclose(found.p_value, again.p_value, rtol=1e-6)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected at least one event, found none"):
        cox_regressions(np.ones((3, 1)), np.ones(3), np.zeros(3))
    with pytest.raises(ValueError, match="finite values and times"):
        cox_regressions(np.array([[np.nan], [1.0]]), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match=r"found shapes \(3, 1\), \(2,\)"):
        concordances(np.ones((3, 1)), np.ones(2), np.ones(3))
