"""Ready models: made once, certified, kept with their card, and used by name on a slide."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import spatialdata
from typer.testing import CliRunner

from stimage_sd import _ready, contract, datasets, io, models, pp, tl
from stimage_sd._cache import cache_dir
from stimage_sd.cli import app
from stimage_sd.datasets._visium import read_downloaded
from stimage_sd.models._ready import is_ready


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a ready model of synthetic sections."""
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path / "cache"))

    def read(name: str):
        run = datasets.synthetic_visium(tmp_path / name, n_spots=60, n_genes=8, seed=len(name), sample=name)
        return io.visium(run, image=run / "image.tif", sample=name, patient=name)

    recipe = _ready.ReadyModel(
        "small", "synthetic tissue", "Visium", read, ("a", "bb"), ("ccc",), (), minutes=1, download_mb=0,
        options={"n_members": 2, "max_epochs": 20},
    )  # fmt: skip
    monkeypatch.setitem(_ready.RECIPES, "small", recipe)
    return "small"


@pytest.mark.slow
def test_a_ready_model_is_made_once_and_predicts_a_slide_by_name(small: str, tmp_path: Path) -> None:
    listed = models.pretrained().set_index("name")
    assert listed.loc["small", "path"] == ""
    model = models.pretrained(small)
    assert model.training["sections"] == ["a", "bb"]
    assert model.certificate.sections["section"].tolist() == ["ccc"]
    path = Path(models.pretrained().set_index("name").loc["small", "path"])
    assert path.is_relative_to(cache_dir())
    assert "genes are predictable" in path.with_suffix(".html").read_text()
    before = path.stat().st_mtime_ns
    assert models.pretrained(small).genes == model.genes
    assert path.stat().st_mtime_ns == before

    picture = np.moveaxis(np.asarray(io.visium(tmp_path / "ccc", image=tmp_path / "ccc" / "image.tif").images["he"][
        "scale0"]["image"]), 0, -1)[:900, :900, ::-1]  # fmt: skip
    cv2.imwrite(str(tmp_path / "slide.png"), picture)
    arguments = ["predict", str(tmp_path / "slide.png"), "--model", small, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--mpp", "0.5"])
    assert result.exit_code == 0, result.output
    said = re.search(r"(\d+) of (\d+) tiles are unlike those of the training sections", result.output)
    section = spatialdata.read_zarr(tmp_path / "out" / "section.zarr")
    scores = section.tables["predictions"].obs["ood_score"]
    assert (int(said[1]), int(said[2])) == (int((scores > 1).sum()), len(scores))
    assert set(section.images) == {"he"}
    assert "predictable" in section.tables["predictions"].var
    report = (tmp_path / "out" / "report.html").read_text()
    assert said[0] in report
    assert report.count("data:image/png;base64,") == 2
    again = CliRunner().invoke(app, [*arguments, "--mpp", "0.5"])
    assert again.exit_code == 2
    assert "exists" in again.output

    # the same in Python
    unknown = io.slide(tmp_path / "slide.png")
    with pytest.raises(ValueError, match=r"no known resolution, which `size_um=` needs"):
        pp.prepare(unknown, small)
    assert list(unknown.images) == ["he"]
    slide = io.slide(tmp_path / "slide.png", mpp=0.5)
    pp.prepare(slide, small)
    tl.predict(slide, small)
    expected = section.tables["predictions"]
    np.testing.assert_allclose(contract.predictions(slide).X, expected.X, rtol=1e-5)
    described = CliRunner().invoke(app, ["info", small])
    assert "certificate  on ccc" in described.output


def test_names_are_listed_and_others_refused() -> None:
    listed = CliRunner().invoke(app, ["ready"])
    assert "breast_her2st" in listed.output
    assert is_ready("breast_her2st")
    with pytest.raises(ValueError, match=r"one of breast_her2st, .*, found 'lung'"):
        models.pretrained("lung")
    with pytest.raises(FileNotFoundError, match=r"No model at lung\. Ready models are breast_her2st, "):
        tl.predict({}, "lung")


def test_every_recipe_tests_on_sections_that_it_does_not_train_on() -> None:
    for recipe in _ready.RECIPES.values():
        assert recipe.test
        assert not set(recipe.training) & set(recipe.test)


def test_a_downloaded_section_is_read_with_its_block_as_patient(tmp_path: Path) -> None:
    name = "V1_Breast_Cancer_Block_A_Section_1"
    datasets.synthetic_visium(tmp_path / name, n_spots=30, n_genes=5)
    section = read_downloaded(tmp_path / name, name)
    assert contract.patients({"one": section}) == {"one": "V1_Breast_Cancer_Block_A"}
    (tmp_path / name / "image.tif").unlink()
    with pytest.raises(FileNotFoundError, match="was not downloaded"):
        read_downloaded(tmp_path / name, name)


def test_immunofluorescence_is_refused() -> None:
    with pytest.raises(ValueError, match="immunofluorescence"):
        datasets.visium("Visium_FFPE_Human_Prostate_IF")
    with pytest.raises(ValueError, match="Unknown Visium sample"):
        datasets.visium("nothing")
