"""Measured counts beside predictions: their places, their scale, and genes by how well they are predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from scipy.stats import pearsonr

from stimage_sd import contract, tl
from stimage_sd.app._about_model import about_model, certificate_tables, outside_words
from stimage_sd.app._genes import doubt_about, gene_orders
from stimage_sd.app._measured import Measured, find_measured
from stimage_sd.app._sections import Prediction
from stimage_sd.app._viewer import N_COLORS, Map, color_range


@pytest.fixture(scope="module")
def cohort(planted: Callable[..., Any]) -> Any:
    return planted(("a", "b", "c"), n_side=8, n_genes=6)


def fitted(cohort: Any, **options: Any) -> Any:
    sections = {name: cohort.sections[name] for name in "ab"}
    return tl.fit_nb(sections, extractor="toy", genes=cohort.genes, n_members=2, max_epochs=10, **options)


@pytest.fixture(scope="module")
def model(cohort: Any) -> Any:
    return fitted(cohort)


def prediction_of(section: Any, model: Any) -> Prediction:
    tl.predict(section, model)
    table = contract.predictions(section)
    tiles = pd.DataFrame({"tile": table.obs["instance_id"].to_numpy(), "ood_score": table.obs["ood_score"].to_numpy()})
    x, y = contract.tile_geometry(section, table).centers.T
    opened = model.open(section, section="c")
    return Prediction(section, model, opened, tiles.assign(x=x, y=y), 20.0, find_measured(section, model))


def test_counts_stand_at_their_tiles_and_at_the_depth_of_the_predictions(cohort: Any, model: Any) -> None:
    section = cohort.sections["c"]
    prediction = prediction_of(section, model)
    assert isinstance(prediction.measured, Measured)
    assert not prediction.measured.was_trained_on
    frame = prediction.of_gene("G2")
    table, counts = contract.predictions(section), section.tables["counts"]
    by_spot = pd.Series(np.asarray(counts[:, "G2"].X.todense()).ravel(), counts.obs_names)
    assert frame["measured"].to_numpy() == pytest.approx(by_spot[table.obs["spot_id"].astype(str)].to_numpy())
    scores = tl.evaluate(section).set_index("gene")
    assert np.allclose(frame["measured_at_depth"], frame["measured"] / scores["exposure"].iloc[0])
    # an independent correlation, which does not depend on the depth of all spots together
    expected = pearsonr(np.log1p(frame["mean"] * scores["exposure"].iloc[0]), np.log1p(frame["measured"])).statistic
    assert prediction.measured.pearson["G2"] == pytest.approx(expected, abs=1e-4)
    order = gene_orders(prediction)
    assert list(order) == ["section", "mean", "name"]
    assert list(order["section"].index) == list(scores["pearson"].sort_values(ascending=False).index)
    assert order["section"]["G2"] == f"r = {expected:.2f}"
    assert order["mean"].index[0] == table.var_names[np.asarray(table.X).mean(axis=0).argmax()]


def test_every_spot_has_its_depth_for_a_model_with_size_factors(cohort: Any) -> None:
    section = cohort.sections["c"]
    model = fitted(cohort, size_factors="total")
    prediction = prediction_of(section, model)
    frame = prediction.of_gene("G1")
    totals = np.asarray(section.tables["counts"].X.sum(axis=1)).ravel()
    by_spot = pd.Series(totals, section.tables["counts"].obs_names)
    depth = by_spot[contract.predictions(section).obs["spot_id"].astype(str)].to_numpy() / model.total
    assert frame["measured_at_depth"].to_numpy() == pytest.approx(frame["measured"].to_numpy() / depth)
    assert prediction.measured.depth_words == "divided by the depth of each spot"


def test_genes_of_a_certified_model_come_predictable_first(cohort: Any, model: Any) -> None:
    certified = tl.certify(cohort.sections["c"], model, n_permutations=100)
    genes = certified.certificate.genes.copy()
    genes["predictable"] = [True, False, True, False, False, False]
    genes.loc[3, "pearson"] = np.nan
    certified.training["certificate"]["genes"] |= {
        "predictable": genes["predictable"].tolist(), "pearson": [None if np.isnan(r) else r for r in genes["pearson"]]
    }  # fmt: skip
    prediction = prediction_of(cohort.sections["c"], certified)
    order = gene_orders(prediction)["certificate"]
    first = genes[genes["predictable"]].sort_values("pearson", ascending=False)
    assert list(order.index[:2]) == first["gene"].tolist()
    assert order.iloc[0] == f"r = {first['pearson'].iloc[0]:.2f} in new sections"
    assert set(order[2:]) == {"not predictable"}
    assert order.index[-1] == "G3"
    assert doubt_about(str(order.index[0]), prediction) == ""
    assert f"correlation with the counts was {genes['pearson'][1]:.2f}" in doubt_about("G1", prediction)
    assert "does not cover this gene" in doubt_about("G3", prediction)
    shown, sections = certificate_tables(certified.certificate)
    assert list(shown["gene"][:2]) == first["gene"].tolist()
    assert list(sections["section"]) == ["c"]


def test_what_was_not_measured_is_said(cohort: Any, model: Any, make_slide: Callable[..., Any]) -> None:
    section = cohort.sections["b"]
    assert prediction_of(section, model).measured.was_trained_on
    table = section.tables.pop("counts")
    try:
        prediction = prediction_of(section, model)
    finally:
        section.tables["counts"] = table
    assert prediction.measured == "The section has no measured counts."
    assert "measured" not in prediction.of_gene("G1")
    assert list(gene_orders(prediction)) == ["mean", "name"]


def test_predictions_and_counts_have_the_same_color_at_the_same_value() -> None:
    random = np.random.default_rng(0)
    mean, counts = random.gamma(4.0, 2.0, 300), random.poisson(8.0, 300).astype(float)
    counts[5] = np.nan
    low, high = color_range(mean, counts)
    assert (low, high) == pytest.approx(np.nanpercentile(np.concatenate([mean, counts]), [1, 99]))
    data = Map("a", "counts", counts, low, high, of_counts=True, cmap="magma").as_data()
    assert data["values"][5] == -1
    share = (np.log1p(counts) - np.log1p(low)) / (np.log1p(high) - np.log1p(low))
    for row in (0, 17, 90):
        expected = colormaps["magma"](round(np.clip(share[row], 0, 1) * (N_COLORS - 1)) / (N_COLORS - 1))
        assert data["colors"][data["values"][row]] == to_hex(expected)
    shares = [place for place, _ in data["ticks"]]
    assert shares == sorted(shares)
    assert np.diff(shares).min() > 1 / 7
    for place, label in data["ticks"]:
        assert place == pytest.approx(
            (np.log1p(float(label)) - np.log1p(low)) / (np.log1p(high) - np.log1p(low)), abs=1e-3
        )


def test_a_model_says_what_it_learned_from(model: Any) -> None:
    about = about_model(model).set_index("what")["value"]
    assert about["Trained on"] == f"a, b ({model.training['n_tiles']} tiles)"
    assert about["Seed"] == "0"
    assert "Patients" not in about


@pytest.mark.parametrize(
    ("n_outside", "n_tiles", "words", "is_warning"),
    [
        (0, 90, "All 90 tiles are like the training tiles", False),
        (1, 90, "1 of 90 tiles (1%) is unlike", False),
        (18, 90, "18 of 90 tiles (20%) are unlike", False),
        (19, 90, "19 of 90 tiles (21%) are unlike", True),
        (1, 1, "The tile is unlike", True),
        (0, 1, "The tile is like", False),
    ],
)
def test_tiles_unlike_the_training_tiles_are_counted(
    n_outside: int, n_tiles: int, words: str, is_warning: bool
) -> None:
    said = outside_words(np.arange(n_tiles) < n_outside)
    assert said[0].startswith(words)
    assert said[1] is is_warning
