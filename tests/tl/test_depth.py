"""Depth, from the fit to the scores: intervals hold their share of counts at every size factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from spatialdata import SpatialData

from stimage_sd import baselines, contract, pl, tl

TOTAL, FACTORS, N_GENES, N_SIDE = 1e6, np.array([0.1, 0.3, 1.0, 3.0, 10.0]), 12, 30


@dataclass(frozen=True)
class Law:
    """A model that knows the law of the counts: the same r and p on every spot of a size factor of 1."""

    r: np.ndarray
    p: np.ndarray
    genes: tuple[str, ...] = tuple(f"G{number}" for number in range(N_GENES))
    total: float | None = TOTAL
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def member_weights(self) -> np.ndarray:
        return np.ones(1)

    @property
    def floor(self) -> np.ndarray:
        return np.stack([self.r * (1 - self.p) / self.p, self.r])

    @property
    def description(self) -> dict[str, Any]:
        return {"head": "law"}

    def open(self, sdata: SpatialData, *, section: str) -> Any:
        n_tiles = int(contract.tiles(sdata).obs["keep"].sum())
        r, p = (np.tile(values.astype(np.float32), (1, n_tiles, 1)) for values in (self.r, self.p))
        return SimpleNamespace(strangeness=np.zeros(n_tiles, np.float32), r_and_p=lambda rows: (r[:, rows], p[:, rows]))

    def save(self, path: str | Path) -> Path:
        raise NotImplementedError


@pytest.fixture(scope="module")
def drawn(make_spots: Callable) -> tuple[Law, dict[str, SpatialData], np.ndarray]:
    """The law, sections whose spots have all five depths, and which spot has which; other genes fill each total."""
    random = np.random.default_rng(0)
    r, mean = random.uniform(1, 15, N_GENES), np.exp(random.uniform(6, 8, N_GENES))
    factors = np.resize(FACTORS, N_SIDE**2)
    sections = {}
    for name in ("held", "test"):
        expected = factors[:, None] * mean
        counts = random.negative_binomial(r, r / (r + expected))
        rest = (TOTAL * factors).astype(int) - counts.sum(axis=1)
        table = np.column_stack([counts, rest]).astype(np.int32)
        genes = [*(f"G{number}" for number in range(N_GENES)), "REST"]
        sections[name] = make_spots(n_side=N_SIDE, counts=table, genes=genes, sample=name)
    return Law(r, r / (r + mean)), sections, factors


def inside_of(sdata: SpatialData, model: Law, **options: bool) -> np.ndarray:
    tl.predict(sdata, model, size_factors="total", **options)
    predictions = contract.predictions(sdata)
    rows, units = contract.align_to_spots(sdata, predictions)
    counts = units[:, predictions.var_names].X.toarray()
    assert np.array_equal(rows, np.arange(len(counts)))
    return (counts >= predictions.layers["lower"]) & (counts <= predictions.layers["upper"])


def test_intervals_hold_what_the_distribution_at_the_spots_depth_does(drawn: tuple) -> None:
    model, sections, factors = drawn
    inside = inside_of(sections["test"], model, conformal=False)
    predictions = contract.predictions(sections["test"])
    mean = factors[:, None] * model.floor[0]
    np.testing.assert_allclose(predictions.X, mean, rtol=1e-4)
    np.testing.assert_allclose(predictions.layers["total_variance"], mean + mean**2 / model.r, rtol=1e-4)
    law = scipy.stats.nbinom(model.r, model.r / (model.r + mean))
    exact = law.cdf(predictions.layers["upper"]) - law.cdf(predictions.layers["lower"] - 1)
    for factor in FACTORS:
        here = factors == factor
        error = np.sqrt(0.9 * 0.1 / here.sum() / N_GENES)
        assert exact[here].mean() >= 0.9
        assert inside[here].mean() == pytest.approx(exact[here].mean(), abs=4 * error)


def test_calibration_is_of_each_spots_own_distribution(drawn: tuple) -> None:
    model, sections, factors = drawn
    # from a wrong level back to that of the law
    calibrated = tl.calibrate(sections["held"], Law(model.r, model.p, interval_level=0.4))
    assert calibrated.interval_level == pytest.approx(0.9, abs=0.015)
    inside = inside_of(sections["test"], calibrated)
    assert inside.mean() == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / inside.size))
    for factor in FACTORS:
        assert inside[factors == factor].mean() == pytest.approx(0.9, abs=0.03)


def test_distributions_are_scored_at_the_spots_depth_alone(drawn: tuple) -> None:
    model, sections, _ = drawn
    sdata = sections["test"]
    tl.predict(sdata, model, size_factors="total")
    at_depth = tl.evaluate(sdata)
    # the law is its own floor, and the likelihood is scipy's
    np.testing.assert_allclose(at_depth["nll"], at_depth["nll_floor"], rtol=1e-4)
    np.testing.assert_allclose(at_depth["coverage"], 0.9, atol=0.04)
    assert tl.risk_coverage(sdata, coverages=(1.0,))["risk"].notna().all()
    tl.predict(sdata, model)
    with pytest.warns(UserWarning, match=r"median depth, 1,000,000 counts.*predict\(sdata, model, size_factors"):
        table = tl.evaluate(sdata)
    assert table[["coverage", "nll", "nll_floor"]].isna().all(axis=None)
    for call in (tl.risk_coverage, pl.calibration):
        with pytest.raises(ValueError, match=r"median depth, 1,000,000 counts.*predict\(sdata, model, size_factors"):
            call(sdata)


def test_cross_validation_scores_distributions_at_the_spots_depth(planted: Callable) -> None:
    cohort = planted(("a", "b", "c"), n_side=8, n_features=3, depth=0.7)
    recipe = partial(tl.fit_baseline, recipe=baselines.MeanOnly(target="lognorm"), extractor="toy")
    table = tl.cross_validate(cohort.sections, {"mean": recipe}, genes=cohort.genes)
    found = table[table["section"] == "c"].pivot(index="gene", columns="metric", values="value")
    test, model = cohort.sections["c"], recipe({name: cohort.sections[name] for name in "ab"}, genes=cohort.genes)
    tl.predict(test, model, size_factors="total")
    at_depth = tl.evaluate(test).set_index("gene")
    for metric in ("coverage", "nll", "nll_floor"):
        np.testing.assert_allclose(found[metric], at_depth[metric].reindex(found.index), rtol=1e-6)
    # the same mean on every tile: depth alone would make a correlation
    assert found["pearson"].isna().all()
    assert at_depth["pearson"].notna().all()


@pytest.mark.slow
def test_the_level_that_a_fit_finds_holds_at_all_depths(planted: Callable) -> None:
    cohort = planted(("a", "b", "c"), n_side=12, n_features=4, depth=1.0, seed=5)
    options = {"genes": cohort.genes, "extractor": "toy", "n_members": 2, "max_epochs": 40, "head": "dispersion"}
    model = tl.fit_nb({name: cohort.sections[name] for name in "ab"}, size_factors="total", **options)
    test = cohort.sections["c"]
    tl.predict(test, model, size_factors="total")
    predictions = contract.predictions(test)
    counts = contract.align_to_spots(test, predictions)[1].X.toarray()
    inside = (counts >= predictions.layers["lower"]) & (counts <= predictions.layers["upper"])
    for part in np.array_split(np.argsort(predictions.obs["size_factor"].to_numpy()), 3):
        assert inside[part].mean() == pytest.approx(0.9, abs=0.05)
