"""The Python blocks of the README run as they stand, in their order, on small files of the names that they use."""

from __future__ import annotations

import re
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata_io
import squidpy as sq
import tifffile
from anndata import AnnData

import stimage_sd as sti
from stimage_sd import contract
from stimage_sd.models._ready import path_of
from stimage_sd.nn.hovernet import HoVerNetSize

README = Path(__file__).resolve().parents[1] / "README.md"
#: the gene that the README draws, by the name that it has in synthetic sections
DRAWN = {"SIGNAL001": "ERBB2"}
#: what two calls of the README take minutes for, by their defaults, is made smaller; all else is as the README has it
SMALLER: dict[str, dict[str, Any]] = {
    "explain": {"n_samples": 50},
    "fit_cell_classifier": {
        "size": HoVerNetSize(8, (1, 1, 1, 1), (1, 1), 3), "n_epochs": 3, "tile_px": 128, "batch_size": 4,
        "learning_rate": 3e-3,
    },
}  # fmt: skip
N_GENES, N_SPOTS, N_SLIDES = 60, 40, 4


def blocks() -> list[tuple[int, str]]:
    """Python blocks of the README, each with the number of its first line."""
    text = README.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)) + 1, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    ]


# --------------------------------------------------------------------------------------------------
# the files that the README reads


def write_her2st(folder: Path, *, seed: int) -> None:
    """Write a section in the form of her2st: a picture, counts and places of spots."""
    run = sti.datasets.synthetic_visium(folder / "run", n_spots=N_SPOTS, n_genes=N_GENES, seed=seed, stain_seed=seed)
    counts = contract.counts(sti.io.visium(run, image=run / "image.tif"))
    picture = tifffile.imread(run / "image.tif")
    cv2.imwrite(str(folder / "image.jpg"), picture[..., ::-1])
    spots = pd.DataFrame(counts.obsm["spatial"], columns=["pixel_x", "pixel_y"])
    # every second column of a hexagonal array is the next of a square one
    spots.insert(0, "x", counts.obs["array_col"].to_numpy() // 2)
    spots.insert(1, "y", counts.obs["array_row"].to_numpy())
    spots.assign(selected=1).to_csv(folder / "spots.tsv", sep="\t", index=False)
    names = spots["x"].astype(str) + "x" + spots["y"].astype(str)
    table = pd.DataFrame(counts.X.toarray(), index=names, columns=[DRAWN.get(name, name) for name in counts.var_names])
    table.to_csv(folder / "counts.tsv.gz", sep="\t")
    shutil.rmtree(folder / "run")


def write_objects() -> None:
    """Write a Visium run as squidpy and as spatialdata-io hold it, and its H&E."""
    run = sti.datasets.synthetic_visium("visium_run", n_spots=N_SPOTS, n_genes=9)
    sq.read.visium(run, counts_file="filtered_feature_bc_matrix.h5").write_h5ad("visium.h5ad")
    spatialdata_io.visium(run, dataset_id="visium", fullres_image_file="image.tif").write("visium.zarr")
    (run / "image.tif").rename("he.tif")


def write_xenium() -> None:
    """Write a bundle and its H&E, without the vendor's alignment, and a reference of the bundle's types of cells."""
    run = sti.datasets.synthetic_xenium(
        "outs", size_um=600, n_genes=9, seed=1, pixel_um=0.425, n_markers=4, align=False
    )
    (run / "he_image.ome.tif").rename("he.ome.tif")
    reference = sti.datasets.synthetic_reference(n_markers=4)
    reference.obs["cell_type"] = reference.obs["cell_type"].map(reference.uns["merge"]).astype("category")
    reference.write_h5ad("reference.h5ad")


def write_slides() -> None:
    """Write a slide, a cohort of slides, and bulk expression and outcomes of their patients."""
    slides = [Path("slides") / f"slide{number:02d}.svs" for number in range(N_SLIDES)]
    slides[0].parent.mkdir()
    for number, path in enumerate([Path("slide.svs"), *slides]):
        made = sti.datasets.synthetic_slide(f"made{number}", size=1536, n_genes=9, seed=number, stain_seed=number)
        (made / "slide.svs").rename(path)
        shutil.rmtree(made)
    random = np.random.default_rng(0)
    names = [path.stem for path in slides]
    genes = ["ERBB2", *(f"SIGNAL{number:03d}" for number in range(2, 20))]
    bulk = AnnData(random.normal(size=(len(names), len(genes))), pd.DataFrame(index=names), pd.DataFrame(index=genes))
    bulk.write_h5ad("bulk.h5ad")
    outcome = {"months": random.exponential(20.0, len(names)) + 1, "died": 1, "patient": [f"P{n}" for n in names]}
    pd.DataFrame(outcome, index=pd.Index(names, name="slide")).to_csv("clinical.csv")


@pytest.mark.slow
def test_the_readmes_python_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STIMAGE_SD_DATA", str(tmp_path / "data"))
    for seed, section in enumerate(("C2", "C3", "C4", "C5")):
        (tmp_path / "data" / "her2st" / section).mkdir(parents=True)
        write_her2st(tmp_path / "data" / "her2st" / section, seed=seed)
    write_objects()
    write_xenium()
    write_slides()
    for name, options in SMALLER.items():
        monkeypatch.setattr(sti.tl, name, partial(getattr(sti.tl, name), **options))
    names: dict[str, Any] = {"__name__": "readme"}
    found = blocks()
    assert found
    for line, source in found:
        began = time.perf_counter()
        # the numbers of lines in a traceback are those of the README
        exec(compile("\n" * (line - 1) + source, str(README), "exec"), names)
        if "certificate" in source:
            # the ready model of the README takes two minutes to make; here it is the model that the README just made
            path_of("breast_her2st").parent.mkdir(parents=True)
            names["model"].save(path_of("breast_her2st"))
        print(f"README.md, line {line}: {time.perf_counter() - began:.1f} s")  # noqa: T201
        plt.close("all")
