"""Certificates: believable for our model, refused for a constant, passed by an oracle where there is signal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
from scipy.stats import false_discovery_control

from stimage_sd import contract, models, tl

N_SIDE, N_SIGNAL, N_FLAT = 16, 12, 6
GENES = [f"G{number}" for number in range(N_SIGNAL + N_FLAT)]


@pytest.fixture(scope="module")
def cohort(make_spots: Callable) -> tuple[dict, dict]:
    """Sections with smooth rates of twelve genes and constant rates of six, and the rates."""
    sections, rates = {}, {}
    for seed, name in enumerate(("a", "b", "new", "newer")):
        random = np.random.default_rng(seed)
        noise = random.normal(size=(N_SIDE + 16, N_SIDE + 16, N_SIGNAL))
        smooth = scipy.ndimage.gaussian_filter(noise, (1.2, 1.2, 0))[8:-8, 8:-8].reshape(N_SIDE**2, -1)
        flat = np.zeros((N_SIDE**2, N_FLAT))
        rates[name] = np.exp(np.linspace(0.5, 2.5, len(GENES)) + np.hstack([0.8 * smooth / smooth.std(), flat]))
        counts = random.negative_binomial(5, 5 / (5 + rates[name]))
        sections[name] = make_spots(n_side=N_SIDE, counts=counts, features=smooth, genes=GENES, sample=name)
        contract.remember(sections[name], patient="P")
    return sections, rates


def wrapped(cohort, predict: Callable) -> models.WrappedModel:
    sections, _ = cohort
    return tl.calibrate({name: sections[name] for name in "ab"}, models.wrap(predict, genes=GENES))


def unseen(cohort) -> dict:
    return {name: cohort[0][name] for name in ("new", "newer")}


@pytest.fixture(scope="module")
def of_oracle(cohort) -> models.WrappedModel:
    return tl.certify(unseen(cohort), wrapped(cohort, lambda sdata: cohort[1][contract.sample(sdata)]))


def test_an_oracle_passes_on_every_gene_with_signal(of_oracle) -> None:
    genes = of_oracle.certificate.genes.set_index("gene")
    assert genes.loc[GENES[:N_SIGNAL], "predictable"].all()
    assert not genes.loc[GENES[N_SIGNAL:], "predictable"].any()
    assert genes["coverage"].between(0.85, 0.97).all()
    assert (genes.loc[GENES[:N_SIGNAL], "nll"] < genes.loc[GENES[:N_SIGNAL], "nll_floor"]).all()
    assert genes["calibration"].max() < 0.15
    assert np.abs(of_oracle.certificate.pit - 1).max() < 0.2


def test_a_constant_is_refused_on_every_gene(cohort) -> None:
    certificate = tl.certify(unseen(cohort), wrapped(cohort, lambda sdata: np.ones((N_SIDE**2, len(GENES)))))
    assert certificate.certificate.predictable == []
    assert certificate.certificate.genes["steps"].isna().all()
    assert "0 of 18 genes are predictable" in certificate.certificate.card()


def test_noise_is_refused_on_nearly_every_gene(cohort) -> None:
    def noise(sdata):
        random = np.random.default_rng([9, len(contract.sample(sdata))])
        return np.exp(random.normal(size=(N_SIDE**2, len(GENES))))

    assert len(tl.certify(unseen(cohort), wrapped(cohort, noise)).certificate.predictable) <= 1


def test_the_numbers_are_those_of_the_tools(cohort, of_oracle) -> None:
    new = unseen(cohort)
    tl.predict(new, of_oracle)
    scores, chance = tl.evaluate(new), tl.predictable_genes(new).set_index("gene")
    genes = of_oracle.certificate.genes.set_index("gene")
    for column in ("coverage", "nll", "nll_floor"):
        np.testing.assert_allclose(genes[column], scores.groupby("gene")[column].mean()[genes.index], rtol=1e-5)
    np.testing.assert_allclose(genes["pearson"], chance["pearson"][genes.index], rtol=1e-5)
    known = genes["p_value"].dropna()
    np.testing.assert_allclose(genes["q_value"].dropna(), false_discovery_control(known), rtol=1e-5)
    observed = sum(np.asarray(contract.counts(sdata).X.sum(axis=0)).ravel() for sdata in [new["new"]])
    table = contract.predictions(new["new"])
    expected = scores.loc[scores["section"] == "new", "exposure"].iloc[0] * np.asarray(table.X).sum(axis=0)
    only = tl.certify(new["new"], of_oracle).certificate.genes
    np.testing.assert_allclose(only["shift"], np.log2((observed + 0.5) / (expected + 0.5)), atol=1e-4)


def test_wider_neighborhoods_are_tried_where_single_spots_do_not_do(cohort, of_oracle) -> None:
    strict = tl.certify(unseen(cohort), of_oracle, reliable=0.8, scales=(1, 3)).certificate
    genes = strict.genes.set_index("gene")
    assert set(genes["steps"].dropna()) <= {0.0, 1.0, 3.0}
    new = unseen(cohort)
    tl.predict(new, of_oracle)
    at = pd.DataFrame({step: tl.evaluate(new, scale=step or None).groupby("gene")["pearson"].mean() for step in (0, 1)})
    first = genes.index[(genes["steps"] == 1)]
    assert len(first)
    assert (at.loc[first, 0] < 0.8).all()
    assert (at.loc[first, 1] >= 0.8).all()


def test_predict_marks_the_genes_and_changed_models_lose_the_certificate(cohort, of_oracle) -> None:
    new = cohort[0]["new"]
    tl.predict(new, of_oracle)
    marked = contract.predictions(new).var["predictable"]
    assert marked[marked].index.tolist() == GENES[:N_SIGNAL]
    assert tl.calibrate(cohort[0]["newer"], of_oracle).certificate is None
    assert tl.adapt(of_oracle, new, spots=contract.counts(new).obs_names[:20]).certificate is None
    tl.predict(new, tl.adapt(of_oracle, new, spots=contract.counts(new).obs_names[:20]))
    assert "predictable" not in contract.predictions(new).var


def test_the_certificate_is_saved_with_the_model(cohort, tmp_path: Path) -> None:
    sections, _ = cohort
    model = tl.fit_nb({name: sections[name] for name in "ab"}, genes=GENES, extractor="toy", n_members=2, max_epochs=5)
    assert model.certificate is None
    certified = tl.certify(sections["new"], model)
    again = models.load(certified.save(tmp_path / "model.stimage")).certificate
    pd.testing.assert_frame_equal(again.genes, certified.certificate.genes)
    pd.testing.assert_frame_equal(again.sections, certified.certificate.sections)
    assert again.card() == certified.certificate.card()
    assert certified.facts()["certificate"].startswith("on new: ")
    assert model.facts()["certificate"].startswith("none")


def test_sections_are_not_changed(cohort, of_oracle) -> None:
    section = cohort[0]["newer"]
    before, attrs = set(section.tables), str(section.attrs)
    tl.certify(section, of_oracle)
    assert set(section.tables) == before
    assert str(section.attrs) == attrs


def test_training_sections_are_refused(cohort, of_oracle) -> None:
    with pytest.raises(ValueError, match=r"was trained on \['a', 'b'\], so \['again'\] cannot show"):
        tl.certify({"again": cohort[0]["a"]}, of_oracle)
    stated = models.wrap(lambda sdata: cohort[1][contract.sample(sdata)], genes=GENES, trained_on=["new"])
    model = tl.calibrate({name: cohort[0][name] for name in "ab"}, stated)
    with pytest.raises(ValueError, match=r"\['new'\] cannot show"):
        tl.certify(cohort[0]["new"], model)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"q": 0.0}, "`q` and `reliable`"), ({"reliable": 1.0}, "`q` and `reliable`"), ({"scales": (0,)}, "`scales`")],
)
def test_options_are_checked(cohort, of_oracle, options, match) -> None:
    with pytest.raises(ValueError, match=match):
        tl.certify(cohort[0]["new"], of_oracle, **options)


def test_the_card_is_one_page_with_its_figure(of_oracle, tmp_path: Path) -> None:
    certificate = of_oracle.certificate
    page = certificate.write(tmp_path / "card.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "12 of 18 genes are predictable" in page
    text = certificate.write(tmp_path / "card.md").read_text()
    assert [path.stat().st_size > 10_000 for path in tmp_path.glob("card_*.png")] == [True]
    assert "](card_" in text
    assert "patient" in text
    with pytest.raises(ValueError, match=r"ending in .html or .md"):
        certificate.write(tmp_path / "card.pdf")
