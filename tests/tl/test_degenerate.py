"""Sections with next to nothing in them: an error that names section, element and mend, or an answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import baselines, contract, models, pp, tl
from stimage_sd.likelihood.mean_only import fit_mean_only

OPTIONS = {"genes": [f"G{number}" for number in range(6)], "extractor": "toy"}
QUICK = {**OPTIONS, "n_members": 2, "max_epochs": 2, "n_components": 3}


@pytest.fixture(scope="module")
def cohort(make_spots: Callable) -> dict[str, SpatialData]:
    """Sections of 36 spots whose gene G2 is 0 everywhere; "zero" has no counts at all, "one" a single spot."""
    random, sections = np.random.default_rng(0), {}
    for name, n_side in {"a": 6, "b": 6, "new": 6, "zero": 6, "one": 1}.items():
        counts = random.poisson(4.0, (n_side**2, 6)) * (name != "zero")
        counts[:, 2] = 0
        features = random.normal(size=(len(counts), 5))
        sections[name] = make_spots(n_side=n_side, counts=counts, features=features, sample=name)
    return sections


@pytest.fixture(scope="module")
def model(cohort: dict[str, SpatialData]) -> models.NBModel:
    return tl.fit_nb({name: cohort[name] for name in "ab"}, standardize="cohort", **QUICK)


def recipes() -> list[Callable]:
    return [
        partial(tl.fit_nb, **QUICK),
        partial(tl.fit_baseline, recipe=baselines.Ridge(n_components=3), **OPTIONS),
        partial(tl.fit_gene_classifier, **OPTIONS),
    ]


def with_nan(section: SpatialData) -> SpatialData:
    """The section with one embedding that is NaN."""
    broken = SpatialData(**{kind: dict(getattr(section, kind)) for kind in ("images", "shapes", "tables")})
    broken.attrs = copy.deepcopy(dict(section.attrs))
    broken.tables["tiles"] = contract.tiles(section).copy()
    contract.tiles(broken).obsm["X_toy"][7, 2] = np.nan
    return broken


def test_embeddings_that_are_not_finite_are_named(cohort: dict[str, SpatialData], model: models.NBModel) -> None:
    broken = with_nan(cohort["new"])
    match = r"1 of 36 kept tiles of section 'new' have embeddings by 'toy' that are not finite, such as tile .*keep"
    calls = [partial(recipe, {"a": cohort["a"], "new": broken}) for recipe in recipes()]
    calls += [
        partial(tl.predict, broken, model),
        partial(tl.calibrate, broken, model),
        partial(tl.combine, [model, model], weights="validation", validation=broken),
        partial(pp.spatial_context, broken, "toy"),
        partial(model.stand_ins, broken, section="new"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call()
    # the mend
    contract.tiles(broken).obs["keep"] = np.arange(36) != 7
    pp.spatial_context(broken, "toy")
    assert np.isfinite(contract.tiles(broken).obsm["X_toy_context"]).all()
    tl.predict(broken, tl.calibrate(broken, tl.combine([model])))
    assert np.isfinite(contract.predictions(broken).X).all()


def test_a_single_spot_is_predicted_and_not_learned_from(cohort: dict[str, SpatialData], model: models.NBModel) -> None:
    one = cohort["one"]
    tl.predict(one, model)
    table = tl.evaluate(one)
    assert table["nll"].notna().all()
    assert table["pearson"].isna().all()
    for recipe in recipes():
        with pytest.raises(ValueError, match=r"found 1 in (the sections \['one'\]|section 'one')\. "):
            recipe(one)
    with pytest.raises(
        ValueError, match=r"Expected two tiles or more to learn from, found 1 in the sections \['one'\]"
    ):
        tl.fit_nb(one, standardize="cohort", **QUICK)
    strict = tl.fit_nb({name: cohort[name] for name in "ab"}, **QUICK)
    with pytest.raises(ValueError, match=r"takes at least 20 tiles, found 1 in section 'one'.*standardize=\"cohort\""):
        tl.predict(one, strict)
    with pytest.raises(ValueError, match="6 held-out counts are too few"):
        tl.calibrate(one, model)


def test_genes_without_counts_are_learned_as_such(cohort: dict[str, SpatialData], model: models.NBModel) -> None:
    """Half a count in all training tiles together is what is known of a gene that was never seen."""
    assert model.floor[0][2] == pytest.approx(0.5 / 72)
    tl.predict(cohort["new"], model)
    scores = tl.evaluate(cohort["new"]).set_index("gene").loc["G2"]
    assert np.isnan(scores["pearson"])
    assert scores["coverage"] == 1.0
    assert 0 < scores["nll"] < 0.05
    assert contract.predictions(cohort["new"]).to_df()["G2"].between(0, 0.1).all()


def test_sections_without_counts(cohort: dict[str, SpatialData]) -> None:
    for recipe in recipes():
        with pytest.raises(ValueError, match=r"zeros only in the sections \['zero'\].*select_genes"):
            recipe(cohort["zero"])
    # beside others it is what it is: a section of no counts
    deep = tl.fit_nb({name: cohort[name] for name in ("a", "zero")}, size_factors="total", **QUICK)
    tl.predict(cohort["zero"], deep, size_factors="total")
    predictions = contract.predictions(cohort["zero"])
    np.testing.assert_allclose(predictions.obs["size_factor"], 1e-3)
    assert np.isfinite(predictions.X).all()
    assert tl.evaluate(cohort["zero"])["nll"].between(0, 0.1).all()
    lognorm = baselines.MeanOnly(target="lognorm")
    baseline = tl.fit_baseline({name: cohort[name] for name in ("a", "zero")}, recipe=lognorm, **OPTIONS)
    assert np.isfinite(baseline.dispersion).all()


def test_a_matrix_without_counts_has_a_mean_of_nothing() -> None:
    for size_factors in (None, np.array([0.5, 1.0, 2.0])):
        fit = fit_mean_only(sp.csr_matrix((3, 2)), size_factors)
        np.testing.assert_array_equal(fit.mean, 0)
        assert np.isfinite(fit.r).all()
