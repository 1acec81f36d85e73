"""Conformal calibration: the level is the split-conformal quantile, new sections are covered, seen ones refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from stimage_sd import contract, io, models, pp, tl
from stimage_sd.likelihood.intervals import mixture_interval
from stimage_sd.tl._predict.calibrate import conformal_level, level_scores
from stimage_sd.tl._predict.held_out import HeldOut


@pytest.fixture(scope="module")
def fitted(planted: Callable) -> tuple:
    """A cohort whose test sections hold what the model does not, and the model."""
    cohort = planted(("a", "b", "held", "test", "more"), n_side=14, n_features=6, n_genes=12)
    train = {name: cohort.sections[name] for name in "ab"}
    return cohort, tl.fit_nb(train, genes=cohort.genes, extractor="toy", n_members=3, max_epochs=12, exposure=None)


def covered(section: object, model: models.NBModel) -> float:
    tl.predict(section, model)
    predictions = contract.predictions(section)
    rows, units = contract.align_to_spots(section, predictions)
    counts = units[:, predictions.var_names].X.toarray()
    return float(((counts >= predictions.layers["lower"][rows]) & (counts <= predictions.layers["upper"][rows])).mean())


def test_a_score_is_the_level_from_which_the_interval_holds_the_count() -> None:
    random = np.random.default_rng(0)
    r, p = random.uniform(0.5, 8, (3, 40, 5)), random.uniform(0.1, 0.9, (3, 40, 5))
    counts, weights = random.poisson(4.0, (40, 5)).astype(float), np.array([0.5, 0.3, 0.2])
    scores = level_scores(HeldOut(counts, weights, r, p)).reshape(40, 5)
    cdf = np.tensordot(weights, scipy.stats.nbinom.cdf(counts, r, p), axes=1)
    below = np.tensordot(weights, scipy.stats.nbinom.cdf(counts - 1, r, p), axes=1)
    np.testing.assert_allclose(scores, np.maximum(1 - 2 * cdf, 2 * below - 1), atol=1e-12)
    for level in (0.2, 0.5, 0.9, 0.99):
        lower, upper = mixture_interval(r, p, coverage=level, weights=weights)
        inside = (counts >= lower) & (counts <= upper)
        clear = np.abs(scores - level) > 1e-6
        np.testing.assert_array_equal(inside[clear], (scores <= level)[clear])


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
def test_the_level_is_the_split_conformal_quantile(coverage: float) -> None:
    for n in (20, 99, 100, 1000):
        scores = np.random.default_rng(n).uniform(0, 1, n)
        rank = int(np.ceil((n + 1) * coverage))
        if rank <= n:
            assert conformal_level([scores], coverage) == pytest.approx(np.sort(scores)[rank - 1], abs=1e-8)
        else:
            with pytest.raises(ValueError, match=rf"{n} held-out counts are too few for intervals that hold"):
                conformal_level([scores], coverage)


def test_new_scores_are_covered_as_promised_on_average() -> None:
    """Of draws of 30 scores and one more, the last is inside in at least the promised share, and hardly more."""
    random = np.random.default_rng(0)
    inside = [random.uniform() <= conformal_level([random.uniform(size=30)], 0.8) for _ in range(4000)]
    assert np.mean(inside) == pytest.approx(25 / 31, abs=0.02)  # ⌈31 · 0.8⌉ / 31


def test_sections_count_alike_whatever_their_size() -> None:
    small, large = np.linspace(0.5, 0.6, 100), np.linspace(0.0, 0.1, 10_000)
    # 80 % of both together, each counting half: all of one and 60 % of the other
    assert conformal_level([small, large], 0.8) == pytest.approx(0.56, abs=2e-3)


@pytest.mark.parametrize("coverage", [0.7, 0.9])
@pytest.mark.parametrize("level", [0.3, 0.9])
def test_a_new_section_is_covered_whatever_the_level_was(fitted: tuple, coverage: float, level: float) -> None:
    cohort, model = fitted
    calibrated = tl.calibrate(cohort.sections["held"], replace(model, interval_level=level), coverage=coverage)
    # 2,352 counts, in whole numbers: the calibration section itself is just covered
    assert coverage <= covered(cohort.sections["held"], calibrated) <= coverage + 0.02
    assert covered(cohort.sections["test"], calibrated) == pytest.approx(coverage, abs=0.04)  # three standard errors


def test_what_was_done_is_in_the_model_and_its_file(fitted: tuple, tmp_path: Path) -> None:
    cohort, model = fitted
    before = model.interval_level
    calibrated = tl.calibrate({name: cohort.sections[name] for name in ("held", "more")}, model)
    assert model.interval_level == before
    assert "calibration" not in model.training
    how = calibrated.training["calibration"]
    assert how["sections"] == ["held", "more"]
    assert how["n_counts"] == 2 * 196 * 12
    assert np.mean(list(how["covered"].values())) == pytest.approx(0.9, abs=0.005)
    assert how["level"] == calibrated.interval_level
    back = models.load(calibrated.save(tmp_path / "m.stimage"))
    assert (back.interval_level, back.training) == (calibrated.interval_level, calibrated.training)
    np.testing.assert_array_equal(back.parameters["weight"], model.parameters["weight"])


def test_a_combination_is_calibrated_as_any_model(fitted: tuple) -> None:
    cohort, model = fitted
    wild = replace(model, parameters={**model.parameters, "bias": model.parameters["bias"] + 0.5})
    both = tl.calibrate(cohort.sections["held"], tl.combine([model, wild]))
    assert isinstance(both, models.CombinedModel)
    assert covered(cohort.sections["test"], both) == pytest.approx(0.9, abs=0.025)


def test_size_factors_are_those_of_the_spots(planted: Callable) -> None:
    cohort = planted(("a", "b", "held", "test"), n_side=12, n_features=6, n_genes=12, depth=0.6)
    train = {name: cohort.sections[name] for name in "ab"}
    model = tl.fit_nb(train, genes=cohort.genes, extractor="toy", n_members=2, max_epochs=10, size_factors="total")
    calibrated = tl.calibrate(cohort.sections["held"], replace(model, interval_level=0.5))
    test = cohort.sections["test"]
    tl.predict(test, calibrated, size_factors="total")
    assert tl.evaluate(test)["coverage"].mean() == pytest.approx(0.9, abs=0.03)


def test_large_sections_are_sampled(fitted: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort, model = fitted
    whole = tl.calibrate(cohort.sections["held"], model)
    monkeypatch.setattr("stimage_sd.tl._predict.held_out._BLOCK", 500)
    assert tl.calibrate(cohort.sections["held"], model).interval_level == whole.interval_level
    monkeypatch.setattr("stimage_sd.tl._predict.held_out._MOST_COUNTS", 600)
    some = tl.calibrate(cohort.sections["held"], model)
    assert some.training["calibration"]["n_counts"] == 600
    assert some.interval_level == pytest.approx(whole.interval_level, abs=0.06)
    assert some.interval_level != whole.interval_level


def test_mistakes_are_named(fitted: tuple, make_spots: Callable) -> None:
    cohort, model = fitted
    with pytest.raises(ValueError, match=r"trained on \['a', 'b'\], so \['b'\] cannot.*Leave a section out of the fit"):
        tl.calibrate({name: cohort.sections[name] for name in ("held", "b")}, model)
    with pytest.raises(ValueError, match=r"so \['renamed'\] cannot"):
        tl.calibrate({"renamed": cohort.sections["a"]}, model)
    for coverage in (0.0, 1.0, 90):
        with pytest.raises(ValueError, match="Expected `coverage` as a share between 0 and 1"):
            tl.calibrate(cohort.sections["held"], model, coverage=coverage)
    with pytest.raises(KeyError, match="12 of 12 genes are absent from section 'bare'"):
        tl.calibrate({"bare": make_spots(n_side=6, genes=["X", "Y", "Z", "W"])}, model)
    with pytest.raises(TypeError, match="found a dict"):
        tl.calibrate(cohort.sections["held"], {})


@pytest.mark.slow
def test_intervals_cover_ninety_percent_of_a_fourth_section_of_real_tissue(data_dir: Path) -> None:
    folder = data_dir / "her2st"
    cohort = {
        name: io.legacy_st(*(folder / name / file for file in ("counts.tsv.gz", "image.jpg", "spots.tsv")), sample=name)
        for name in ("C2", "C3", "C4", "C5")
    }
    pp.stain_normalize(cohort, method="macenko")
    pp.tile(cohort)
    pp.embed(cohort, fields_of_view=(2.0,))
    train = {name: cohort[name] for name in ("C2", "C3")}
    genes = pp.select_genes(train, n_top=100)
    fitted = tl.fit_nb(train, genes=genes, n_members=4)
    inside = []
    for held, test in (("C5", "C4"), ("C4", "C5")):
        tl.predict(cohort[test], tl.calibrate(cohort[held], fitted))
        inside.append(tl.evaluate(cohort[test])["coverage"].mean())
    # sections differ, so one on the other is off by a few percent, and the other on the first by as many the other way
    assert np.mean(inside) == pytest.approx(0.9, abs=0.01), inside
    assert np.abs(np.subtract(inside, 0.9)).max() < 0.04
    # the uncertainty is where the errors are
    table = tl.risk_coverage(cohort["C5"], coverages=(0.8,))
    n_tiles = contract.predictions(cohort["C5"]).n_obs
    n_kept = int(np.ceil(0.8 * n_tiles))
    uncertain = (table["random"] * n_tiles - table["risk"] * n_kept) / (n_tiles - n_kept)
    assert scipy.stats.wilcoxon(uncertain, table["risk"], alternative="greater").pvalue < 0.01
