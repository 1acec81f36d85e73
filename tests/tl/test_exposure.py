"""Exposure and shifts, from the fit to the scores: depth of a section is no part of what the image predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from spatialdata import SpatialData

from stimage_sd import contract, models, pl, tl
from stimage_sd.tl._fit.held_out_level import prior_sd
from stimage_sd.tl._fit.seen import trained_patients
from stimage_sd.tl._score.cross_validate import shallow_copy

QUICK: dict[str, Any] = {"max_epochs": 5}
FIT: dict[str, Any] = {"extractor": "toy", "n_members": 3, "max_epochs": 30, "head": "dispersion"}


def thinned(sdata: SpatialData, share: float | np.ndarray, *, seed: int = 0) -> SpatialData:
    """The section with each count kept by chance, for all genes or by gene."""
    copy = shallow_copy(sdata)
    table = contract.counts(sdata).copy()
    counts = sp.csr_matrix(table.X).toarray().astype(np.int64)
    share = np.broadcast_to(share, counts.shape[1])
    table.X = sp.csr_matrix(np.random.default_rng(seed).binomial(counts, share).astype(np.int32))
    copy.tables[contract.COUNTS] = table
    return copy


def known(sdata: SpatialData, patient: str) -> SpatialData:
    copy = shallow_copy(sdata)
    contract.remember(copy, patient=patient)
    return copy


@pytest.fixture(scope="module")
def cohort(planted: Callable) -> Any:
    """Deep sections: thinned to a tenth, they still have counts."""
    made = planted(("a", "b", "c", "test"), n_side=14, n_features=5, n_genes=20, strength=0.7, seed=3)
    for name, sdata in made.sections.items():
        table = contract.counts(sdata)
        random = np.random.default_rng([7, len(name)])
        mean = 20 * made.mean[name]
        counts = random.negative_binomial(made.dispersion, made.dispersion / (made.dispersion + mean))
        table.X = sp.csr_matrix(counts.astype(np.int32))
        contract.remember(sdata, patient="p")
    return made


@pytest.fixture(scope="module")
def model(cohort: Any) -> models.NBModel:
    return tl.fit_nb({name: cohort.sections[name] for name in "abc"}, genes=cohort.genes, **FIT)


@pytest.fixture(scope="module")
def of_thinned(cohort: Any) -> models.NBModel:
    sections = {name: cohort.sections[name] for name in "abc"} | {"b": thinned(cohort.sections["b"], 0.1)}
    return tl.fit_nb(sections, genes=cohort.genes, **FIT)


def coverage(sdata: SpatialData, **options: Any) -> float:
    return float(tl.evaluate(sdata, **options)["coverage"].mean())


def test_thinned_sections_teach_the_same(cohort: Any, model: models.NBModel, of_thinned: models.NBModel) -> None:
    test = shallow_copy(cohort.sections["test"])
    scores = []
    relative = []
    for one in (model, of_thinned):
        tl.predict(test, one)
        scores.append(tl.evaluate(test)["pearson"])
        mean = contract.predictions(test).X
        relative.append(np.log(mean / mean.mean(axis=0)))
    np.testing.assert_allclose(scores[0], scores[1], atol=0.02)
    assert np.corrcoef(relative[0].ravel(), relative[1].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("share", [1.0, 0.1, 0.03])
def test_the_depth_of_a_section_is_taken_from_its_totals(cohort: Any, model: models.NBModel, share: float) -> None:
    test = thinned(cohort.sections["test"], share)
    tl.predict(test, model)
    scores = tl.evaluate(test)
    table = contract.counts(test)
    expected = np.median(np.asarray(table.X.sum(axis=1))) / model.total
    np.testing.assert_allclose(scores["exposure"], expected)
    assert contract.predictions(test).uns["evaluation"]["exposure"] == pytest.approx(expected)
    assert scores["coverage"].mean() == pytest.approx(0.9, abs=0.035)
    # the same, whether predicted at this depth or moved to it
    tl.predict(test, model, exposure=expected)
    pd.testing.assert_frame_equal(tl.evaluate(test), scores, rtol=1e-3, atol=5e-3)
    if share < 1:
        assert coverage(test, exposure=1.0) < 0.5


def test_layers_add_up_and_move_with_exposure(cohort: Any, model: models.NBModel) -> None:
    test = known(cohort.sections["test"], "another")
    with pytest.warns(UserWarning, match=r"trained on one patient, 'p'.*`stimage_sd.tl.adapt`"):
        tl.predict(test, model)
    one = contract.predictions(test).copy()
    np.testing.assert_array_equal(one.var["shift_sd"], model.shifts[1])
    np.testing.assert_allclose(
        one.layers["total_variance"], one.layers["aleatoric"] + one.layers["epistemic"], rtol=1e-5
    )
    assert (one.layers["shift"] <= one.layers["epistemic"] * (1 + 1e-6)).all()
    with pytest.warns(UserWarning, match="trained on one patient"):
        tl.predict(test, model, exposure=0.25)
    quarter = contract.predictions(test)
    np.testing.assert_allclose(quarter.X, one.X / 4, rtol=1e-5)
    np.testing.assert_allclose(quarter.layers["shift"], one.layers["shift"] / 16, rtol=1e-5)
    np.testing.assert_allclose(
        quarter.layers["aleatoric"] - quarter.X, (one.layers["aleatoric"] - one.X) / 16, rtol=2e-3
    )
    assert quarter.obs["size_factor"].unique().tolist() == [0.25]
    assert quarter.uns["prediction"]["exposure"] == 0.25


def test_shifts_are_those_of_the_patient(cohort: Any, model: models.NBModel) -> None:
    assert model.shifts.shape == (2, 20)
    # simulated sections do not shift, and the cohort shows it; another patient has the published prior
    assert np.median(model.shifts[0]) < 0.15
    assert np.median(model.shifts[1]) == pytest.approx(0.69, abs=0.02)
    widths = {}
    for patient in ("p", "another"):
        test = known(cohort.sections["test"], patient)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            tl.predict(test, model)
        table = contract.predictions(test)
        widths[patient] = (table.layers["upper"] - table.layers["lower"]).mean()
    assert widths["another"] > 1.5 * widths["p"]


def test_without_exposure_the_model_is_the_published_one(cohort: Any) -> None:
    sections = {name: cohort.sections[name] for name in "abc"}
    model = tl.fit_nb(sections, genes=cohort.genes, exposure=None, rank=None, **(FIT | {"max_epochs": 2}))
    assert (model.shifts, model.total) == (None, None)
    test = shallow_copy(cohort.sections["test"])
    tl.predict(test, model)
    table = contract.predictions(test)
    assert "shift" not in table.layers
    assert "shift_sd" not in table.var
    assert tl.evaluate(test)["exposure"].isna().all()
    for call in (lambda: tl.predict(test, model, exposure=0.5), lambda: tl.evaluate(test, exposure=0.5)):
        with pytest.raises(ValueError, match="without exposure, so `exposure` has no meaning"):
            call()
    with pytest.raises(ValueError, match=r'Expected `exposure` to be None or "section", found \'spot\''):
        tl.fit_nb(sections, genes=cohort.genes, exposure="spot", **FIT)


def test_size_factors_hold_the_depth_of_the_section_too(cohort: Any) -> None:
    sections = {"a": cohort.sections["a"], "b": thinned(cohort.sections["b"], 0.1)}
    model = tl.fit_nb(sections, genes=cohort.genes, size_factors="total", **(FIT | {"max_epochs": 2}))
    assert model.shifts is None
    assert model.training["options"]["exposure"] is None


@pytest.mark.parametrize("exposure", [0.0, -1.0, np.nan])
def test_depths_out_of_range_are_refused(cohort: Any, model: models.NBModel, exposure: float) -> None:
    test = shallow_copy(cohort.sections["test"])
    with pytest.raises(ValueError, match="Expected `exposure` to be a positive number"):
        tl.predict(test, model, exposure=exposure)
    tl.predict(test, model)
    with pytest.raises(ValueError, match="Expected `exposure` to be a positive number"):
        tl.evaluate(test, exposure=exposure)


def test_a_panel_has_the_depth_of_the_genes_it_measures(cohort: Any, model: models.NBModel) -> None:
    test = thinned(cohort.sections["test"], 0.2)
    tl.predict(test, model)
    whole = tl.evaluate(test)["exposure"].iloc[0]
    test.tables[contract.COUNTS] = contract.counts(test)[:, cohort.genes[:6]].copy()
    assert tl.evaluate(test)["exposure"].iloc[0] == pytest.approx(whole, rel=0.1)


def test_files_hold_the_shifts(cohort: Any, model: models.NBModel, tmp_path: Path) -> None:
    back = models.load(model.save(tmp_path / "m.stimage"))
    np.testing.assert_array_equal(back.shifts, model.shifts)
    assert back.training["n_counted"] == 20
    lazy, plain = shallow_copy(cohort.sections["test"]), shallow_copy(cohort.sections["test"])
    tl.predict(lazy, back, out=tmp_path / "out")
    tl.predict(plain, model)
    for name, layer in contract.predictions(plain).layers.items():
        np.testing.assert_array_equal(np.asarray(contract.predictions(lazy).layers[name]), layer)


def test_calibration_covers_at_the_depth_of_the_section(cohort: Any, of_thinned: models.NBModel) -> None:
    held = thinned(cohort.sections["test"], 0.05, seed=1)
    for wanted in (0.7, 0.9):
        calibrated = tl.calibrate(held, of_thinned, coverage=wanted)
        assert calibrated.training["calibration"]["covered"]["test"] == pytest.approx(wanted, abs=0.02)
        tl.predict(held, calibrated)
        assert coverage(held) == pytest.approx(wanted, abs=0.02)


def test_models_with_and_without_depth_do_not_mix(cohort: Any, model: models.NBModel) -> None:
    both = tl.combine([model, model], weights=[1, 3])
    np.testing.assert_allclose(both.shifts, model.shifts, rtol=1e-6)
    one, two = shallow_copy(cohort.sections["test"]), shallow_copy(cohort.sections["test"])
    tl.predict(one, model)
    tl.predict(two, both)
    np.testing.assert_allclose(
        contract.predictions(one).layers["upper"], contract.predictions(two).layers["upper"], atol=1
    )
    plain = tl.fit_nb(cohort.sections["a"], genes=cohort.genes, exposure=None, **(FIT | {"max_epochs": 1}))
    with pytest.raises(ValueError, match="`size_factors` and `exposure`"):
        tl.combine([model, plain])


def test_pictures_compare_at_the_measured_depth(cohort: Any, model: models.NBModel) -> None:
    test = thinned(cohort.sections["test"], 0.1)
    tl.predict(test, model)
    scores = tl.evaluate(test)
    axes = pl.calibration(test)
    (star,) = [drawn for drawn in axes[0].lines if drawn.get_marker() == "*"]
    assert star.get_xydata()[0, 1] == pytest.approx(scores["coverage"].mean())
    density = axes[3].patches[0].get_data().values
    np.testing.assert_allclose(density, 1, atol=0.25)
    risk = tl.risk_coverage(test, coverages=(1.0,))
    assert risk["risk"].mean() < 0.6  # of log counts; predictions at the cohort's depth would miss by log 10


# --------------------------------------------------------------------------------------------------
# samples


def test_samples_have_the_mean_and_variance_of_the_layers(cohort: Any, model: models.NBModel) -> None:
    test = known(cohort.sections["test"], "p")
    tl.predict(test, model, exposure=0.1)
    table = contract.predictions(test)
    draws = tl.sample(test, model, 600, exposure=0.1, seed=4)
    assert draws.shape == (600, table.n_obs, table.n_vars)
    values = draws.compute(scheduler="threads")
    error = np.sqrt(table.layers["total_variance"] / 600)
    assert np.abs((values.mean(axis=0) - table.X) / error).mean() == pytest.approx(np.sqrt(2 / np.pi), rel=0.1)
    assert (values.var(axis=0) / table.layers["total_variance"]).mean() == pytest.approx(1, abs=0.05)
    # draws share members and shifts between tiles, so that sums vary by more than single counts tell
    sums = values.sum(axis=1)
    assert (sums.var(axis=0) > 1.5 * table.layers["aleatoric"].sum(axis=0)).mean() > 0.9
    np.testing.assert_array_equal(draws[17].compute(scheduler="synchronous"), values[17])
    with pytest.raises(ValueError, match="Expected `n` of at least 1"):
        tl.sample(test, model, 0)


def test_intervals_of_a_signature_follow_from_samples(cohort: Any, model: models.NBModel) -> None:
    inside = []
    for seed in range(3):
        test = known(thinned(cohort.sections["test"], 0.1, seed=seed), "p")
        exposure = float(np.median(np.asarray(contract.counts(test).X.sum(axis=1))) / model.total)
        draws = tl.sample(test, model, 200, exposure=exposure).compute()
        for genes in (slice(0, 5), slice(5, 10), slice(10, 20)):
            signature = np.log1p(draws[:, :, genes]).mean(axis=2)
            measured = np.log1p(contract.counts(test).X.toarray()[:, genes]).mean(axis=1)
            low, high = np.quantile(signature, [0.05, 0.95], axis=0)
            inside.append(((measured >= low) & (measured <= high)).mean())
    assert np.mean(inside) == pytest.approx(0.9, abs=0.05)


# --------------------------------------------------------------------------------------------------
# adapting


@pytest.fixture(scope="module")
def moved(cohort: Any) -> SpatialData:
    """A section of another patient: its genes are shifted, and it is shallow."""
    random = np.random.default_rng(11)
    share = np.minimum(0.1 * np.exp(0.6 * random.normal(size=20) - 0.18), 1)
    return known(thinned(cohort.sections["test"], share, seed=5), "another")


def test_twenty_spots_tell_depth_and_shifts(
    moved: SpatialData, model: models.NBModel, recwarn: pytest.WarningsRecorder
) -> None:
    spots = list(contract.counts(moved).obs_names[:20])
    adapted = tl.adapt(model, moved, spots=spots)
    rest = shallow_copy(moved)
    table = contract.counts(moved)
    rest.tables[contract.COUNTS] = table[~table.obs_names.isin(spots)].copy()
    found = {}
    for name, one in (("before", model), ("after", adapted)):
        tl.predict(rest, one)
        scores, predictions = tl.evaluate(rest), contract.predictions(rest)
        found[name] = scores["coverage"].mean(), scores["nll"].mean(), predictions.var["shift_sd"].median()
    assert found["after"][0] == pytest.approx(0.9, abs=0.05)
    assert found["after"][1] < found["before"][1] - 0.05
    assert found["after"][2] < 0.5 * found["before"][2]
    # it warns of the other patient before, not after
    assert sum("trained on one patient" in str(warning.message) for warning in recwarn) == 1
    how = adapted.training["adaptation"]
    assert (how["section"], how["measured"], how["patients"]) == ("test", "20 spots", ["another"])
    assert adapted.facts()["adapted to"] == "'test' by 20 spots"
    with pytest.raises(ValueError, match="cannot show how it does"):
        tl.calibrate(moved, adapted)


def test_more_spots_leave_less_to_learn(moved: SpatialData, model: models.NBModel) -> None:
    names = list(contract.counts(moved).obs_names)
    left = [np.median(tl.adapt(model, moved, spots=names[:n]).shifts) for n in (5, 20, 80, 196)]
    assert (np.diff(left) < 0).all()
    assert left[0] < 0.69


def test_bulk_counts_tell_shifts_but_not_depth(moved: SpatialData, model: models.NBModel) -> None:
    bulk = contract.counts(moved).to_df().sum()
    of_spots, of_bulk = tl.adapt(model, moved), tl.adapt(model, moved, bulk=bulk)
    assert of_bulk.total == model.total
    ratio = np.log(of_spots.factors / of_bulk.factors)
    assert ratio.std() < 0.15
    assert np.exp(ratio.mean()) == pytest.approx(of_spots.total / model.total, rel=0.1)
    assert (of_bulk.shifts > of_spots.shifts).all()
    unsure = tl.adapt(model, moved, bulk=bulk, bulk_sd=2.0)
    assert np.abs(np.log(unsure.factors)).max() < np.abs(np.log(of_bulk.factors)).max()


def test_adapted_models_survive_files(moved: SpatialData, model: models.NBModel, tmp_path: Path) -> None:
    adapted = tl.adapt(model, moved)
    back = models.load(adapted.save(tmp_path / "a.stimage"))
    assert back.facts() == adapted.facts()
    assert back.facts()["base"] == "NBModel"
    one, two = shallow_copy(moved), shallow_copy(moved)
    tl.predict(one, adapted)
    tl.predict(two, back)
    for name, layer in contract.predictions(one).layers.items():
        np.testing.assert_array_equal(layer, contract.predictions(two).layers[name])
    assert back.training == adapted.training
    assert contract.predictions(one).uns["prediction"]["adapted_to"] == "test"


def test_what_cannot_be_adapted_is_refused(moved: SpatialData, cohort: Any, model: models.NBModel) -> None:
    plain = tl.fit_nb(cohort.sections["a"], genes=cohort.genes, exposure=None, **(FIT | {"max_epochs": 1}))
    with pytest.raises(ValueError, match="Expected a model fitted with exposure"):
        tl.adapt(plain, moved)
    with pytest.raises(KeyError, match="None of the 1 `spots` has a kept tile"):
        tl.adapt(model, moved, spots=["nowhere"])
    bulk = contract.counts(moved).to_df().sum()
    with pytest.raises(ValueError, match="Expected either `spots` or `bulk`"):
        tl.adapt(model, moved, bulk=bulk, spots=["s"])
    with pytest.raises(KeyError, match=r"`bulk` lacks 1 of 20 genes of the model: \['G3'\]"):
        tl.adapt(model, moved, bulk=bulk.drop("G3"))
    with pytest.raises(ValueError, match="Pass counts, not logs or z-scores"):
        tl.adapt(model, moved, bulk=bulk - bulk.mean())
    with pytest.raises(ValueError, match="hold no counts of the model's genes"):
        tl.adapt(model, thinned(moved, 0.0))


# --------------------------------------------------------------------------------------------------
# scales


def test_sums_over_regions_are_scored_as_by_hand(cohort: Any, model: models.NBModel) -> None:
    test = thinned(cohort.sections["test"], 0.1)
    table = contract.counts(test)
    table.obs["region_name"] = np.resize(["left", "middle", "right", None], table.n_obs)
    tl.predict(test, model)
    scores = tl.evaluate(test, scale="region_name")
    predictions = contract.predictions(test)
    rows, units = contract.align_to_spots(test, predictions)
    made = contract.at_depth_of(predictions, rows, predictions.var_names, scores["exposure"].iloc[0])
    names = units.obs["region_name"].to_numpy()
    mean, counts = (
        np.stack([values[names == name].mean(axis=0) for name in ("left", "middle", "right")])
        for values in (made.mean, units[:, predictions.var_names].X.toarray())
    )
    for gene in range(20):
        expected = np.corrcoef(np.log1p(mean[:, gene]), np.log1p(counts[:, gene]))[0, 1]
        assert scores["pearson"][gene] == pytest.approx(expected)
    assert scores["morans_i_observed"].isna().all()
    assert predictions.uns["evaluation"]["scale"] == "region_name"


def test_neighborhoods_agree_better_than_tiles_and_are_covered(cohort: Any, model: models.NBModel) -> None:
    test = thinned(cohort.sections["test"], 0.02)
    tl.predict(test, model)
    tiles, near, far = (tl.evaluate(test, scale=scale) for scale in (None, 1, 3))
    assert tiles["pearson"].mean() + 0.05 < near["pearson"].mean()
    for scores in (near, far):
        assert scores["coverage"].mean() > 0.85
    with pytest.raises(ValueError, match="Expected `scale` as a whole number of steps, at least 1"):
        tl.evaluate(test, scale=0)
    with pytest.raises(KeyError, match="No column 'nowhere' among those of the spots, predictions and tiles"):
        tl.evaluate(test, scale="nowhere")


def test_what_all_genes_of_a_spot_share_is_in_the_samples(planted: Callable) -> None:
    made = planted(("a", "b", "c", "test"), n_side=14, n_features=5, n_genes=20, strength=0.5, seed=5, depth=0.6)
    for sdata in made.sections.values():
        contract.remember(sdata, patient="p")
    model = tl.fit_nb({name: made.sections[name] for name in "abc"}, genes=made.genes, **FIT)
    assert model.spot_sd == pytest.approx(0.6, abs=0.12)
    assert 0.5 < model.r_scale < 2
    test = made.sections["test"]
    tl.predict(test, model)
    exposure = float(np.median(np.asarray(contract.counts(test).X.sum(axis=1))) / model.total)
    measured = np.log1p(contract.counts(test).X.toarray()).mean(axis=1)
    covered = {}
    for name, one in (("shared", model), ("independent", replace(model, spot_sd=0.0))):
        draws = tl.sample(test, one, 300, exposure=exposure).compute()
        signature = np.log1p(draws).mean(axis=2)
        low, high = np.quantile(signature, [0.05, 0.95], axis=0)
        covered[name] = ((measured >= low) & (measured <= high)).mean()
        variance = contract.predictions(test).layers["total_variance"] * exposure**2
        assert np.median(draws.var(axis=0) / variance) == pytest.approx(1, abs=0.2)
    assert covered["shared"] == pytest.approx(0.9, abs=0.06)
    assert covered["independent"] < 0.7


# --------------------------------------------------------------------------------------------------
# panels, parts and guards


def beside_others(sdata: SpatialData, n: int) -> SpatialData:
    """The section among many more genes, which hold nine tenths of the counts."""
    copy, table = shallow_copy(sdata), contract.counts(sdata)
    counts = table.X.toarray()
    others = np.repeat((counts.sum(axis=1, keepdims=True) * 9 / n).astype(np.int32), n, axis=1)
    names = [*table.var_names, *(f"OTHER{index}" for index in range(n))]
    wide = AnnData(sp.csr_matrix(np.hstack([counts, others])), obs=table.obs, var=pd.DataFrame(index=names))
    wide.uns, wide.obsm = table.uns, table.obsm
    copy.tables[contract.COUNTS] = wide
    return copy


def test_a_panel_beside_whole_transcriptomes_has_the_depth_of_shared_genes(cohort: Any) -> None:
    sections = {name: beside_others(cohort.sections[name], 200) for name in "ab"} | {"c": cohort.sections["c"]}
    mixed = tl.fit_nb(sections, genes=cohort.genes, **FIT)
    assert mixed.training["n_counted"] == 20
    alike = tl.fit_nb({name: cohort.sections[name] for name in "abc"}, genes=cohort.genes, **FIT)
    assert mixed.total == pytest.approx(alike.total)
    for name in mixed.parameters:
        np.testing.assert_array_equal(mixed.parameters[name], alike.parameters[name])
    # a whole transcriptome is compared by the genes that were counted
    panel, whole = shallow_copy(cohort.sections["test"]), beside_others(cohort.sections["test"], 200)
    exposures = []
    for test in (panel, whole):
        tl.predict(test, mixed)
        exposures.append(tl.evaluate(test)["exposure"].iloc[0])
    assert exposures[1] == pytest.approx(exposures[0], rel=0.1)


def test_a_panel_calibrates_at_the_depth_that_it_is_scored_at(cohort: Any) -> None:
    wide = tl.fit_nb({name: beside_others(cohort.sections[name], 200) for name in "abc"}, genes=cohort.genes, **FIT)
    held = shallow_copy(cohort.sections["test"])
    calibrated = tl.calibrate(held, wide)
    assert calibrated.training["calibration"]["covered"]["test"] == pytest.approx(0.9, abs=0.02)
    tl.predict(held, calibrated)
    assert tl.evaluate(held)["coverage"].mean() == pytest.approx(0.9, abs=0.02)


def test_an_adapted_combination_remembers_what_its_parts_saw(cohort: Any, moved: SpatialData) -> None:
    parts = [
        tl.fit_nb({name: cohort.sections[name] for name in "ab"}, genes=cohort.genes, seed=seed, **(FIT | QUICK))
        for seed in (0, 1)
    ]
    adapted = tl.adapt(tl.combine(parts), moved)
    with pytest.raises(ValueError, match="cannot show how it does"):
        tl.calibrate({"renamed": cohort.sections["a"]}, adapted)
    assert trained_patients(adapted) == {"p"}


def test_sections_of_partly_known_patients_are_calibrated_as_sections(cohort: Any) -> None:
    sections = {name: shallow_copy(cohort.sections[name]) for name in "abc"}
    contract.remember(sections["a"], patient=None)
    contract.remember(sections["b"], patient="q")
    model = tl.fit_nb(sections, genes=cohort.genes, **(FIT | QUICK))
    np.testing.assert_allclose(model.shifts[1], prior_sd(1, 3)[1], rtol=1e-6)
    # with the shifts of another patient, far lower levels would cover these sections
    assert model.interval_level > 0.8


def test_intensities_of_proteins_have_no_depth(cohort: Any, model: models.NBModel) -> None:
    test = shallow_copy(cohort.sections["test"])
    tl.predict(test, model)
    with pytest.raises(ValueError, match="have no depth, so `exposure` has no meaning"):
        tl.evaluate(test, against="proteins", exposure=0.5)


def test_stand_ins_of_an_adapted_model_predict_as_it_does(moved: SpatialData, model: models.NBModel) -> None:
    adapted = tl.adapt(model, moved)
    own = [contract.embeddings(moved, "toy")[[3, 7]].astype(np.float32)]
    before, after = (one.stand_ins(moved, section="test").r_and_p(3, own) for one in (model, adapted))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-6)
    odds = [(1 - np.asarray(p, np.float64)) / np.asarray(p, np.float64) for p in (before[1], after[1])]
    np.testing.assert_allclose(odds[1], odds[0] * adapted.factors, rtol=1e-3)
