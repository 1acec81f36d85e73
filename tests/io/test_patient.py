"""The patient of a section, as readers are told it."""

from __future__ import annotations

from pathlib import Path

import pytest
import spatialdata

from stimage_sd import contract, datasets, io


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.synthetic_visium(tmp_path_factory.mktemp("patient") / "run", n_spots=20, n_genes=9)


def patient_of(sdata: spatialdata.SpatialData) -> str | None:
    return contract.patients({"": sdata}).get("")


def test_readers_remember_the_patient(run: Path, tmp_path: Path) -> None:
    sections = [
        io.visium(run, image=run / "image.tif", patient="A"),
        io.slide(run / "image.tif", mpp=0.5, patient="A"),
        io.read("visium", run, image=run / "image.tif", patient="A"),
    ]
    assert [patient_of(section) for section in sections] == ["A", "A", "A"]
    assert patient_of(io.visium(run, image=run / "image.tif")) is None
    sections[0].write(tmp_path / "a.zarr")
    back = io.from_spatialdata(spatialdata.read_zarr(tmp_path / "a.zarr"))
    assert patient_of(back) == "A"
    assert patient_of(io.from_spatialdata(back, patient="B")) == "B"


def test_one_patient_is_not_that_of_several_samples(run: Path) -> None:
    sections = {name: io.visium(run, image=run / "image.tif", sample=name) for name in ("one", "two")}
    both = spatialdata.concatenate(sections)
    with pytest.raises(ValueError, match=r"Found 2 samples.*Leave `patient=` out, or name one with `image=`"):
        io.from_spatialdata(both, patient="A")
