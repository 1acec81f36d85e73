"""The Python blocks of the README run as they stand, in their order, on small files of the names that they use."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import spatialdata_io

import stimage_sd as sti
from stimage_sd import contract
from stimage_sd.models._ready import path_of

README = Path(__file__).resolve().parents[1] / "README.md"
#: the gene that the README draws, by the name that it has in synthetic sections
DRAWN = {"SIGNAL001": "ERBB2"}


def blocks() -> list[tuple[int, str]]:
    """Python blocks of the README, each with the number of its first line."""
    text = README.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)) + 1, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    ]


def write_section(name: str, *, seed: int) -> None:
    """Write a Visium section as spatialdata-io reads and writes it."""
    run = sti.datasets.synthetic_visium(f"run_{name}", n_spots=40, n_genes=60, seed=seed, stain_seed=seed)
    section = spatialdata_io.visium(run, dataset_id=name, fullres_image_file="image.tif")
    table = section.tables["table"]
    table.var_names = [DRAWN.get(gene, gene) for gene in table.var_names]
    section.write(f"{name}.zarr")
    shutil.rmtree(run)


def write_slide() -> None:
    made = sti.datasets.synthetic_slide("made", size=1536, n_genes=9)
    (made / "slide.svs").rename("slide.svs")


@pytest.mark.slow
def test_the_readmes_python_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ABC"):
        write_section(name, seed=seed)
    write_slide()
    names: dict[str, Any] = {"__name__": "readme"}
    found = blocks()
    assert found
    for line, source in found:
        if "pretrained" in source:
            # the ready model of the README takes two minutes to make; here it is the model that the README just made
            path_of("breast_her2st").parent.mkdir(parents=True)
            names["model"].save(path_of("breast_her2st"))
        began = time.perf_counter()
        # the numbers of lines in a traceback are those of the README
        exec(compile("\n" * (line - 1) + source, str(README), "exec"), names)
        print(f"README.md, line {line}: {time.perf_counter() - began:.1f} s")  # noqa: T201
        plt.close("all")
    for key in ("test", "slide"):
        predictions = contract.predictions(names[key])
        assert "ERBB2" in predictions.var_names
        assert predictions.n_obs > 0
