"""Patients: held out whole, remembered by models, and told apart where a model meets another one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spatialdata import SpatialData

from stimage_sd import baselines, contract, models, tl
from stimage_sd.models import NBModel
from stimage_sd.tl._fit.training_set import held_out_tiles

OF = {"a": "P1", "b": "P1", "c": "P2", "d": "P2"}


@given(
    of=st.lists(st.integers(0, 4), min_size=2, max_size=8).filter(lambda of: len(set(of)) > 1),
    validation=st.floats(0.01, 0.99),
    n_members=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_no_patient_stands_on_both_sides(of: list[int], validation: float, n_members: int, seed: int) -> None:
    sections = np.repeat([f"s{number}" for number in range(len(of))], 3)
    patients = {f"s{number}": f"P{patient}" for number, patient in enumerate(of)}
    patient = np.array([patients[name] for name in sections.tolist()])
    held = held_out_tiles(
        sections, np.zeros((len(sections), 2)), validation, n_members=n_members, seed=seed, patients=patients
    )
    by_patient = np.array([[member[patient == name].mean() for name in np.unique(patient)] for member in held])
    assert set(np.unique(by_patient)) <= {0.0, 1.0}
    assert (by_patient.mean(axis=1) > 0).all()
    assert (by_patient.mean(axis=1) < 1).all()
    times = by_patient.sum(axis=0)
    assert times.max() - times.min() <= 1


def test_sections_of_one_patient_or_of_unknown_ones_go_round_as_before() -> None:
    sections, places = np.repeat(["a", "b", "c"], 4), np.zeros((12, 2))
    expected = held_out_tiles(sections, places, 0.3, n_members=3, seed=0)
    for patients in (None, {}, dict.fromkeys("abc", "P"), {"a": "P1"}):
        found = held_out_tiles(sections, places, 0.3, n_members=3, seed=0, patients=patients)
        assert (found.sum(axis=1) == expected.sum(axis=1)).all()
    named = held_out_tiles(sections, places, ["b"], n_members=1, seed=0, patients=dict.fromkeys("abc", "P"))
    np.testing.assert_array_equal(named[0], sections == "b")


def test_a_named_section_brings_all_of_its_patient() -> None:
    sections, places = np.repeat([*OF], 2), np.zeros((8, 2))
    held = held_out_tiles(sections, places, ["a", "b"], n_members=1, seed=0, patients=OF)
    np.testing.assert_array_equal(held[0], np.isin(sections, ["a", "b"]))
    with pytest.raises(ValueError, match=r"holds out \['a'\] but not \['b'\], which are of the same patients"):
        held_out_tiles(sections, places, ["a"], n_members=1, seed=0, patients=OF)


@pytest.fixture(scope="module")
def sections(planted: Callable) -> dict[str, SpatialData]:
    return planted(tuple("abcde"), n_side=8, n_genes=4).sections


@pytest.fixture
def cohort(sections: dict[str, SpatialData]) -> Iterator[dict[str, SpatialData]]:
    """Five sections that do not know their patients."""
    yield sections
    for sdata in sections.values():
        contract.remember(sdata, patient=None)


def fit(cohort: dict[str, SpatialData], names: str, **options: object) -> NBModel:
    train = {name: cohort[name] for name in names}
    return tl.fit_nb(train, genes=["G0", "G1"], extractor="toy", n_members=2, max_epochs=3, **options)


def predicted(section: SpatialData, model: object) -> list[str]:
    """Texts of the warnings of a prediction."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tl.predict(section, model)
    return [str(warning.message) for warning in found if "one patient" in str(warning.message)]


def test_a_fit_holds_patients_out_and_remembers_them(cohort: dict[str, SpatialData], tmp_path: Path) -> None:
    model = fit(cohort, "abcd", patients=OF)
    assert sorted(model.training["validation"]) == [["a", "b"], ["c", "d"]]
    assert model.training["patients"] == OF
    assert models.load(model.save(tmp_path / "model.stimage")).training["patients"] == OF
    assert model.facts()["patients"] == "P1, P2"


def test_a_model_of_one_patient_says_so_on_another(cohort: dict[str, SpatialData]) -> None:
    model = fit(cohort, "ab", patients=OF)
    assert model.facts()["trained on"] == f"a, b (one patient, P1; {model.training['n_tiles']} tiles)"
    section = cohort["e"]
    assert predicted(section, model) == []  # nobody knows its patient
    contract.remember(section, patient="P1")
    assert predicted(section, model) == []
    contract.remember(section, patient="P9")
    (text,) = predicted(section, model)
    assert "trained on one patient, 'P1', and ['e'] are of ['P9']" in text
    calibrated = tl.calibrate(section, model)
    assert calibrated.training["calibration"]["patients"] == ["P9"]
    assert predicted(section, calibrated) == []
    assert predicted(section, fit(cohort, "abcd", patients=OF)) == []
    assert predicted(section, fit(cohort, "ab")) == []
    (text,) = predicted(section, tl.combine([model, fit(cohort, "ab", patients=OF, seed=1)]))
    assert "'P1'" in text
    floor = tl.fit_baseline({name: cohort[name] for name in "ab"}, baselines.MeanOnly(), genes=["G0"], extractor="toy")
    assert floor.training["patients"] == {}


def test_levels_of_a_training_patient_are_said_to_be_its_own(cohort: dict[str, SpatialData]) -> None:
    model = fit(cohort, "abc", patients=OF)
    contract.remember(cohort["d"], patient="P2")
    with pytest.warns(UserWarning, match=r"of the patients of \['d'\].* fit to calibrate on"):
        tl.calibrate(cohort["d"], model)
    contract.remember(cohort["d"], patient="P7")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tl.calibrate(cohort["d"], model)


def test_folds_of_patients_are_those_that_sections_know(cohort: dict[str, SpatialData]) -> None:
    for name, patient in OF.items():
        contract.remember(cohort[name], patient=patient)
    seen = []

    def recipe(data: dict[str, SpatialData], *, genes: list[str]) -> NBModel:
        seen.append(sorted(data))
        return fit(data, "".join(data))

    four = {name: cohort[name] for name in OF}
    tl.cross_validate(four, {"nb": recipe}, strategy="leave-one-patient-out", genes=["G0", "G1"])
    assert seen == [["c", "d"], ["a", "b"]]


def test_folds_on_disk_know_the_patients(cohort: dict[str, SpatialData], tmp_path: Path) -> None:
    """Folds of sections are the same, but what a fit holds out within them is not."""
    recipe = partial(tl.fit_nb, extractor="toy", n_members=2, max_epochs=3)
    four = {name: cohort[name] for name in OF}

    def validate(patients: dict[str, str]) -> pd.DataFrame:
        for name, patient in patients.items():
            contract.remember(four[name], patient=patient)
        return tl.cross_validate(four, {"nb": recipe}, genes=["G0", "G1"], out=tmp_path)

    pd.testing.assert_frame_equal(validate(OF), validate(OF))
    with pytest.raises(ValueError, match=r"other settings: `patients"):
        validate({**OF, "d": "P3"})
