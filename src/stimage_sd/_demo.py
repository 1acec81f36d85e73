"""Run the demo of `stimage-sd demo`, from sections to figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract, datasets, io, pl, pp, tl
from stimage_sd._files import replacing, scratch
from stimage_sd._ready import BREAST_MARKERS, DEFAULT_EXTRACTOR
from stimage_sd.models import NBModel
from stimage_sd.pp._prepare import prepare_cohort

#: files and folders that the demo writes
PRODUCTS = ("test_section.zarr", "model.stimage", "scores.csv", "figures")
HER2ST_TRAINING, HER2ST_TEST = ("C2", "C3", "C4"), "C5"
#: sizes of the synthetic demo, which takes about 90 s on two cores
N_SPOTS, N_GENES, N_TRAINING = 180, 100, 3

Say = Callable[[str], None]


def run_demo(
    dataset: Literal["synthetic", "her2st"],
    out: Path,
    *,
    overwrite: bool,
    say: Say,
    n_spots: int = N_SPOTS,
    n_genes: int = N_GENES,
    n_members: int = 10,
    max_epochs: int = 100,
) -> pd.DataFrame:
    """Train on three sections, predict and score a fourth, and write the results and figures.

    - `dataset`: ``"synthetic"``: generated sections, which need no network. ``"her2st"``: sections C2, C3 and C4 of a
      breast tumor for training, and C5 for testing.
    - `out`: folder for `PRODUCTS`. They are moved there when all are complete.
    - `overwrite`: whether existing products may be replaced.
    - `say`: function that prints the current step.
    - `n_spots`, `n_genes`: size of a synthetic section.
    - `n_members`, `max_epochs`: as in `stimage_sd.tl.fit_nb`.
    - returns: the scores, as from `stimage_sd.tl.evaluate`.
    """
    _check_out(out, overwrite=overwrite)
    with scratch(out.parent, prefix=f".{out.name}") as work:
        training, test = _sections(dataset, work, say, n_spots=n_spots, n_genes=n_genes)
        prepare_cohort(
            {**training, contract.sample(test): test},
            extractor=DEFAULT_EXTRACTOR,
            stain="vahadane",
            weights=None,
            say=say,
        )
        include = BREAST_MARKERS if dataset == "her2st" else ()
        genes = pp.select_genes(training, n_top=1000, include=include)
        say(f"training on {', '.join(training)}: {len(genes)} genes, {n_members} members")
        model = tl.fit_nb(training, genes=genes, n_members=n_members, max_epochs=max_epochs)
        say("predicting and scoring the test section")
        tl.predict(test, model)
        scores = tl.evaluate(test)
        say("drawing figures, writing results")
        _write(work, test, model, scores)
        out.mkdir(exist_ok=True)
        for name in PRODUCTS:
            with replacing(out / name) as path:
                (work / name).rename(path)
    return scores


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file. Choose another folder with --out.")
    there = [name for name in PRODUCTS if (out / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{out} holds {', '.join(there)} already. Choose another folder with --out, or pass --overwrite to replace "
            "them."
        )


def _sections(
    dataset: str, work: Path, say: Say, *, n_spots: int, n_genes: int
) -> tuple[dict[str, SpatialData], SpatialData]:
    if dataset == "her2st":
        say(f"reading sections {', '.join(HER2ST_TRAINING)} and {HER2ST_TEST} of her2st")
        return {name: datasets.her2st(name) for name in HER2ST_TRAINING}, datasets.her2st(HER2ST_TEST)
    say(f"making {N_TRAINING + 1} synthetic Visium sections with different tissues and stains")
    names = [f"training_{index + 1}" for index in range(N_TRAINING)] + ["test"]
    made = {}
    for seed, name in enumerate(names):
        run = datasets.synthetic_visium(
            work / "runs" / name, n_spots=n_spots, n_genes=n_genes, seed=seed, stain_seed=seed, sample=name
        )
        # one patient, since the law that makes the counts is the same in all sections
        made[name] = io.visium(run, image=run / "image.tif", sample=name, patient="synthetic")
    test = made.pop("test")
    return made, test


def _write(work: Path, test: SpatialData, model: NBModel, scores: pd.DataFrame) -> None:
    scores.to_csv(work / "scores.csv", index=False)
    model.save(work / "model.stimage")
    (work / "figures").mkdir()
    mpl.use("agg")  # write files without opening windows
    for name, draw in _figures(test, model, scores).items():
        plt.close(draw(save=work / "figures" / f"{name}.png", return_fig=True))
    test.write(work / "test_section.zarr")


def _figures(test: SpatialData, model: NBModel, scores: pd.DataFrame) -> dict[str, Callable[..., Any]]:
    gene = "ERBB2" if "ERBB2" in model.genes else str(scores["gene"].iloc[int(scores["pearson"].argmax())])
    return {
        "tiles": partial(pl.tiles, test, n_examples=8),
        "training": partial(pl.training, model),
        f"prediction_{gene}": partial(pl.prediction, test, gene),
        f"uncertainty_{gene}": partial(pl.uncertainty, test, gene),
        "scores": partial(pl.scores, scores),
        "calibration": partial(pl.calibration, test),
    }
