"""Baselines as models: fitted on sections, predicted, evaluated, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from stimage_sd import contract, models, pp, tl
from stimage_sd.baselines import MeanOnly, NearestTiles, Retrieval, Ridge
from stimage_sd.models import SectionData
from stimage_sd.models._baseline_model import section_data
from stimage_sd.models._files import read_model
from stimage_sd.models._predictor import Predictor

RECIPES = [
    MeanOnly(),
    Ridge(n_components=8, rank=4),
    Ridge(n_components=8, target="lognorm"),
    NearestTiles(k=10),
    Retrieval(k=20, n_shared=32, n_epochs=40, batch_size=64),
]


@pytest.fixture(scope="module")
def cohort(planted: Callable) -> object:
    return planted()


def train_of(cohort: object) -> dict:
    return {name: sdata for name, sdata in cohort.sections.items() if name != "d"}


def fitted(cohort: object, recipe: object) -> models.BaselineModel:
    return tl.fit_baseline(train_of(cohort), recipe, genes=cohort.genes, extractor="toy")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_each_recipe_predicts_is_scored_and_survives_the_disk(cohort, recipe, tmp_path):
    model = fitted(cohort, recipe)
    assert isinstance(model, Predictor)
    section = cohort.sections["d"]
    # counts compare with distributions at their own depth
    depth = None if model.total is None else "total"
    tl.predict(section, model, size_factors=depth)
    before = contract.predictions(section).copy()
    scores = tl.evaluate(section)
    assert 0.8 <= scores["coverage"].mean() <= 0.97
    if recipe.name != "mean_only":
        assert scores["pearson"].mean() > 0.25
    if recipe.target == "log1p":
        assert scores["nll"].mean() < scores["nll_floor"].mean() + (0.02 if recipe.name == "mean_only" else 0)
    loaded = models.load(model.save(tmp_path / "model.stimage"))
    assert loaded.recipe == recipe
    tl.predict(section, loaded, size_factors=depth)
    after = contract.predictions(section)
    np.testing.assert_array_equal(after.X, before.X)
    np.testing.assert_array_equal(after.layers["upper"], before.layers["upper"])
    np.testing.assert_array_equal(after.obs["ood_score"], before.obs["ood_score"])
    assert after.uns["prediction"]["head"] == recipe.name
    assert repr(loaded) == repr(model)


def test_files_with_names_in_british_english_are_read(cohort, tmp_path):
    model = fitted(cohort, Ridge(n_components=8))
    config, arrays = read_model(model.save(tmp_path / "model.stimage"))
    old = {key.replace("learned.", "learnt.").replace("center", "centre"): array for key, array in arrays.items()}
    assert "learnt.space.centre" in old
    loaded = models.BaselineModel.from_parts(config, old)
    assert set(loaded.learned) == set(model.learned)
    for key, array in model.learned.items():
        np.testing.assert_array_equal(loaded.learned[key], array)


def test_ridge_follows_the_planted_means(cohort):
    section = cohort.sections["d"]
    tl.predict(section, fitted(cohort, Ridge()))
    predicted, truth = np.log(contract.predictions(section).X), np.log(cohort.mean["d"])
    agreement = [np.corrcoef(predicted[:, gene], truth[:, gene])[0, 1] for gene in range(len(cohort.genes))]
    assert min(agreement) > 0.85
    # log means are brought back to counts: a level within a tenth
    assert abs(contract.predictions(section).X.sum() / cohort.mean["d"].sum() - 1) < 0.1


def test_a_single_section_is_fitted_by_its_strips(cohort):
    model = tl.fit_baseline(cohort.sections["a"], Ridge(n_components=8), genes=cohort.genes, extractor="toy")
    tl.predict(cohort.sections["d"], model)
    assert tl.evaluate(cohort.sections["d"])["pearson"].mean() > 0.5


def test_a_recipe_is_cross_validated_like_any_model(planted):
    sections = planted(names=("a", "b", "c")).sections
    recipes = {
        "ridge": partial(tl.fit_baseline, recipe=Ridge(n_components=8), extractor="toy"),
        "mean": partial(tl.fit_baseline, recipe=MeanOnly(), extractor="toy"),
    }
    table = tl.cross_validate(sections, recipes, genes=["G0", "G1", "G2"])
    nll = table[table["metric"] == "nll"].groupby("model")["value"].mean()
    assert nll["ridge"] < nll["mean"]


def test_what_is_no_recipe_is_refused(cohort):
    with pytest.raises(TypeError, match=r"Expected `recipe` to be one of .*baselines"):
        tl.fit_baseline(train_of(cohort), Ridge, genes=cohort.genes, extractor="toy")
    with pytest.raises(ValueError, match="`extractor` to be a name or different names"):
        tl.fit_baseline(train_of(cohort), Ridge(), genes=cohort.genes, extractor=["toy", "toy"])


@dataclass(frozen=True)
class Brightness:
    """A recipe of one's own: log counts follow the mean brightness of a tile."""

    pixels_px: int = 16
    target: str = "log1p"

    name = "brightness"
    needs = frozenset({"pixels"})

    def fit(self, sections: list, *, seed: int) -> dict[str, np.ndarray]:
        brightness = np.concatenate([self._see(section)[section.rows] for section in sections])
        logs = np.log1p(np.concatenate([section.counts.toarray() for section in sections]))
        return {"line": np.linalg.lstsq(brightness, logs, rcond=None)[0]}

    def mean(self, learned: dict[str, np.ndarray], section: SectionData) -> np.ndarray:
        return np.maximum(np.expm1(self._see(section) @ learned["line"]), 1e-3).astype(np.float32)

    def _see(self, section: SectionData) -> np.ndarray:
        assert section.pixels.shape[1:] == (16, 16, 3)
        assert section.pixels.dtype == np.uint8
        return np.c_[section.pixels.mean(axis=(1, 2, 3)) / 255, np.ones(len(section.pixels))]


@pytest.mark.slow
def test_a_recipe_that_needs_pixels_sees_the_tiles(synthetic):
    section = synthetic(n_spots=60, n_genes=20)
    pp.tile(section)
    pp.embed(section, "tissue_statistics", fields_of_view=(1.0,))
    genes = pp.select_genes(section, n_top=5)
    model = tl.fit_baseline(section, Brightness(), genes=genes, extractor="tissue_statistics")
    seen = section_data(section, model.tiles, model.recipe)
    # the first statistic of a tile is its mean optical density of red
    density = -np.log((seen.pixels[..., 0].astype(float) + 1) / 256).mean(axis=(1, 2))
    assert np.corrcoef(density, seen.embeddings[0][:, 0])[0, 1] > 0.98
    tl.predict(section, model)
    assert np.isfinite(tl.evaluate(section)["nll"]).all()
