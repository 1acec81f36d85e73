"""The bundled model: the file in the package is what its script makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from stimage_sd import contract, models, tl
from stimage_sd.app import _example

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_bundled_model_is_what_its_script_makes(tmp_path: Path) -> None:
    file = REPOSITORY / "tools" / "app_example.py"
    specification = importlib.util.spec_from_file_location("app_example", file)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    bundled, anew = models.load(_example.MODEL), script.train(tmp_path)
    assert _example.MODEL.stat().st_size < 200_000
    assert (bundled.genes, bundled.tiles, bundled.head) == (anew.genes, anew.tiles, anew.head)
    for name in ("sections", "seed", "options", "n_tiles"):
        assert bundled.training[name] == anew.training[name]
    section = _example.embedded_section(tmp_path, seed=_example.SEED, n_spots=30, sample="example", say=print)
    means = []
    for model in (bundled, anew):
        tl.predict(section, model)
        means.append(np.log1p(np.asarray(contract.predictions(section).X)))
    # other processors round embeddings and losses differently
    assert np.abs(means[0] - means[1]).mean() < 0.02
    for one, other in zip(means[0].T, means[1].T, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.98
