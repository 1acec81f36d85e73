"""The whole job, from sections to figures: what `stimage-sd demo` runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract, datasets, io, pl, pp, tl
from stimage_sd._store import move
from stimage_sd.models import NBModel

#: what the job leaves in its folder
PRODUCTS = ("test_section.zarr", "model.stimage", "scores.csv", "figures")
#: genes of breast cancer whose prediction the paper shows
MARKERS = (
    "COX6C", "TTLL12", "PABPC1", "GNAS", "HSP90AB1", "TFF3", "ATP1A1", "B2M", "FASN", "SPARC", "CD74", "CD63",
    "CD24", "CD81",
)  # fmt: skip
HER2ST_TRAINING, HER2ST_TEST = ("C2", "C3", "C4"), "C5"
#: sizes of the synthetic job, such that two cores take about a minute and a half
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
    """Train on three sections, predict a fourth, score it, draw it, and write all of that.

    Parameters
    ----------
    dataset
        ``"synthetic"``: sections made for the occasion, which needs no network; ``"her2st"``: C2, C3 and C4 of a
        breast tumour, C5 to test.
    out
        Folder that `PRODUCTS` are written to, when all of them are complete.
    overwrite
        Whether earlier products there may be replaced.
    say
        Is told which step is run.
    n_spots, n_genes
        Size of a synthetic section.
    n_members, max_epochs
        As in `stimage_sd.tl.fit_nb`.

    Returns
    -------
    The scores, as of `stimage_sd.tl.evaluate`.

    Raises
    ------
    FileExistsError
        If products are there and not to be replaced, or `out` is a file.
    """
    _check_out(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        training, test = _sections(dataset, work, say, n_spots=n_spots, n_genes=n_genes)
        _prepare({**training, contract.sample(test): test}, say)
        include = MARKERS if dataset == "her2st" else ()
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
            move(work / name, out / name, aside=work / f"replaced-{name}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
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
    say(f"making {N_TRAINING + 1} synthetic Visium sections, each of another tissue and staining")
    names = [f"training_{number + 1}" for number in range(N_TRAINING)] + ["test"]
    made = {}
    for seed, name in enumerate(names):
        run = datasets.synthetic_visium(
            work / "runs" / name, n_spots=n_spots, n_genes=n_genes, seed=seed, stain_seed=seed, sample=name
        )
        made[name] = io.visium(run, image=run / "image.tif", sample=name)
    test = made.pop("test")
    return made, test


def _prepare(cohort: dict[str, SpatialData], say: Say) -> None:
    reference: Any = None
    for name, sdata in cohort.items():
        say(f"{name}: stain normalisation, tiling, embedding")
        reference = pp.stain_normalize(sdata, reference)
        pp.tile(sdata)
        pp.embed(sdata)


def _write(work: Path, test: SpatialData, model: NBModel, scores: pd.DataFrame) -> None:
    scores.to_csv(work / "scores.csv", index=False)
    model.save(work / "model.stimage")
    (work / "figures").mkdir()
    mpl.use("agg")  # files, no windows
    for name, draw in _figures(test, model, scores).items():
        _save(draw(), work / "figures" / f"{name}.png")
    test.write(work / "test_section.zarr")


def _figures(test: SpatialData, model: NBModel, scores: pd.DataFrame) -> dict[str, Callable[[], Any]]:
    gene = "ERBB2" if "ERBB2" in model.genes else str(scores["gene"].iloc[int(scores["pearson"].argmax())])
    return {
        "tiles": lambda: pl.tiles(test, n_examples=8),
        "training": lambda: pl.training(model),
        f"prediction_{gene}": lambda: pl.prediction(test, gene),
        f"uncertainty_{gene}": lambda: pl.uncertainty(test, gene),
        "scores": lambda: pl.scores(scores),
        "calibration": lambda: pl.calibration(test),
    }


def _save(axes: Any, path: Path) -> None:
    figure = np.ravel(axes)[0].figure
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
