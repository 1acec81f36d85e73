"""A model is taken as an object or as the path of its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stimage_sd import contract, pl, tl
from stimage_sd.models import NBModel
from stimage_sd.models._resolve import as_model


@pytest.fixture(scope="module")
def fitted(planted: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A cohort, a model of two of its sections, and the model's file."""
    cohort = planted(("a", "b", "test", "held"), n_side=8, n_genes=6)
    training = {name: cohort.sections[name] for name in "ab"}
    model = tl.fit_nb(training, genes=cohort.genes, extractor="toy", n_members=2, max_epochs=2)
    return cohort.sections, model, model.save(tmp_path_factory.mktemp("models") / "model.stimage")


def test_a_model_stays_what_it_is_and_a_path_is_loaded(fitted: tuple, tmp_path: Path) -> None:
    _, model, path = fitted
    assert as_model(model) is model
    for given in (path, str(path)):
        loaded = as_model(given)
        assert isinstance(loaded, NBModel)
        assert loaded.genes == model.genes
    with pytest.raises(FileNotFoundError, match=r"No model at .*none\.stimage"):
        as_model(tmp_path / "none.stimage")


def test_predictions_by_a_path_are_those_of_the_model(fitted: tuple) -> None:
    sections, model, path = fitted
    tl.predict(sections["test"], model)
    expected = contract.predictions(sections["test"]).X.copy()
    tl.predict(sections["test"], path)
    np.testing.assert_array_equal(contract.predictions(sections["test"]).X, expected)


def test_calibrate_combine_and_pictures_take_paths(fitted: tuple) -> None:
    sections, model, path = fitted
    assert tl.calibrate(sections["held"], path).interval_level == tl.calibrate(sections["held"], model).interval_level
    assert tl.combine([path, model]).member_weights.tolist() == [0.25] * 4
    assert pl.training(str(path)).get_title() == pl.training(model).get_title()


@pytest.mark.parametrize("call", [tl.explain, tl.saliency])
def test_what_explains_looks_for_the_file_first(fitted: tuple, call: Callable) -> None:
    sections, _, path = fitted
    with pytest.raises(FileNotFoundError, match=r"No model at no-such\.stimage"):
        call(sections["test"], "no-such.stimage", "G0", tiles=[0])
    with pytest.raises(KeyError, match=r"segment_nuclei"):
        call(sections["test"], path, "G0", tiles=[0])


def test_cells_and_cohorts_look_for_the_file_first(fitted: tuple, tmp_path: Path) -> None:
    sections, _, _ = fitted
    with pytest.raises(FileNotFoundError, match=r"No model at no-such\.stimage"):
        tl.predict_cells(sections["test"], "no-such.stimage")
    with pytest.raises(FileNotFoundError, match=r"No model at no-such\.stimage"):
        tl.predict_cohort([tmp_path / "a.svs"], "no-such.stimage", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
