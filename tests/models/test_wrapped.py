"""Predictors of other packages: read as arrays, frames and tables, linked to counts, saved, refused where wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stimage_sd import contract, models, tl


@pytest.fixture
def cohort(planted: Callable):
    return planted(("a", "b", "c", "new"), n_side=10, n_genes=4, depth=0.1)


@pytest.fixture
def oracle(cohort) -> Callable[[SpatialData], np.ndarray]:
    """The rates that the counts were drawn from."""
    return lambda sdata: cohort.mean[contract.sample(sdata)]


def training(cohort) -> dict[str, SpatialData]:
    return {name: cohort.sections[name] for name in "abc"}


def test_an_oracle_predicts_its_rates_with_intervals_that_cover(cohort, oracle) -> None:
    model = tl.calibrate(training(cohort), models.wrap(oracle, genes=cohort.genes))
    new = cohort.sections["new"]
    tl.predict(new, model)
    table = contract.predictions(new)
    # the fit knows the median depth only, so the rates are compared up to a factor for each gene
    ratio = np.asarray(table.X) / cohort.mean["new"]
    assert np.quantile(np.abs(np.log(ratio / np.median(ratio, axis=0))), 0.98) < 0.25
    scores = tl.evaluate(new)
    assert scores["coverage"].between(0.84, 0.98).all()
    assert (scores["nll"] < scores["nll_floor"]).all()
    assert np.isfinite(table.obs["ood_score"]).all()


def test_arrays_frames_and_tables_are_read_alike(cohort, oracle) -> None:
    new = cohort.sections["new"]
    expected = oracle(new)
    names = contract.tiles(new).obs["spot_id"].astype(str).to_numpy()
    order = np.random.default_rng(0).permutation(len(names))
    frame = pd.DataFrame(expected[order], index=names[order], columns=cohort.genes)
    numbers = contract.tiles(new).obs[contract.INSTANCE_KEY].to_numpy()
    table = AnnData(frame.to_numpy(), obs=pd.DataFrame({"id": numbers[order], "region": "tile_squares"},
                    index=[f"row{number}" for number in order]), var=pd.DataFrame(index=cohort.genes))  # fmt: skip
    table.obs["region"] = table.obs["region"].astype("category")
    new.tables["means"] = TableModel.parse(table, region="tile_squares", region_key="region", instance_key="id")
    backwards = cohort.genes[::-1]
    for predict in (lambda _: frame, "means", lambda _: AnnData(frame)):
        found = models.wrap(predict, genes=backwards).values(new, section="new")
        np.testing.assert_array_equal(found, expected[:, ::-1])


def test_all_tiles_or_the_kept_ones(cohort) -> None:
    new = cohort.sections["new"]
    contract.tiles(new).obs.loc[contract.tiles(new).obs_names[:3], "keep"] = False
    every = np.random.default_rng(0).uniform(size=(100, 4))
    for given in (every, every[3:]):
        wrapped = models.wrap(lambda _, given=given: given, genes=cohort.genes)
        np.testing.assert_array_equal(wrapped.values(new, section="new"), every[3:])


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        (np.zeros((7, 4)), ValueError, r"values of 100 kept tiles.*found an array of shape \(7, 4\)"),
        (np.full((100, 4), np.nan), ValueError, "not finite for 400 of 400"),
        (np.full((100, 4), -1.0), ValueError, 'Pass `scale="logs"`'),
        (pd.DataFrame(np.ones((100, 1)), columns=["G0"]), KeyError, "lack the genes"),
        (pd.DataFrame(np.ones((100, 4)), columns=["G0", "G1", "G2", "G3"], index=[f"x{n}" for n in range(100)]),
         KeyError, "one row of values for every kept tile"),
    ],
)  # fmt: skip
def test_values_that_are_no_predictions_are_refused(cohort, values, error, match) -> None:
    wrapped = models.wrap(lambda _: values, genes=cohort.genes)
    with pytest.raises(error, match=match):
        tl.calibrate(cohort.sections["a"], wrapped)


def test_a_missing_table_names_those_there(cohort) -> None:
    with pytest.raises(KeyError, match=r"no table 'deepspot', but .*'counts'"):
        tl.calibrate(cohort.sections["a"], models.wrap("deepspot", genes=cohort.genes))


def test_predicting_before_the_link_says_what_to_do(cohort, oracle) -> None:
    with pytest.raises(ValueError, match=r"stimage_sd\.tl\.calibrate\(sections, wrapped\)"):
        tl.predict(cohort.sections["new"], models.wrap(oracle, genes=cohort.genes))


def test_a_model_of_a_table_is_saved_and_one_of_a_function_is_not(cohort, oracle, tmp_path: Path) -> None:
    for sdata in cohort.sections.values():
        frame = pd.DataFrame(oracle(sdata), index=contract.tiles(sdata).obs["spot_id"], columns=cohort.genes)
        sdata.tables["theirs"] = TableModel.parse(AnnData(frame))
    model = tl.calibrate(training(cohort), models.wrap("theirs", genes=cohort.genes))
    again = models.load(model.save(tmp_path / "theirs.stimage"))
    assert again.facts()["predictor"] == "theirs"
    assert again.facts()["calibrated on"].startswith(", ".join(model.training["sections"]))
    new = cohort.sections["new"]
    tl.predict(new, model, key_added="first")
    tl.predict(new, again, key_added="second")
    np.testing.assert_array_equal(new.tables["first"].X, new.tables["second"].X)
    np.testing.assert_array_equal(new.tables["first"].layers["upper"], new.tables["second"].layers["upper"])
    function = tl.calibrate(training(cohort), models.wrap(oracle, genes=cohort.genes))
    with pytest.raises(ValueError, match="model files hold no code"):
        function.save(tmp_path / "function.stimage")


def test_a_wrapped_model_is_combined_with_one_of_ours(cohort, oracle) -> None:
    wrapped = tl.calibrate(training(cohort), models.wrap(oracle, genes=cohort.genes))
    ours = tl.fit_nb(training(cohort), genes=cohort.genes, extractor="toy", n_members=2, max_epochs=3)
    both = tl.combine([wrapped, ours], weights="equal")
    new = cohort.sections["new"]
    tl.predict(new, both)
    assert contract.predictions(new).uns["prediction"]["n_members"] == 3


@pytest.mark.parametrize(("genes", "scale"), [([], "means"), (["A", "A"], "means"), (["A"], "z")])
def test_options_are_checked(genes, scale) -> None:
    with pytest.raises(ValueError, match=r"Expected `(genes|scale)`"):
        models.wrap("table", genes=genes, scale=scale)
