"""Choices of options of the command line, and options that commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output once the new one is complete.")]
Model = Annotated[
    Path, typer.Option(metavar="MODEL", help="A saved model, or the name of a ready model (see `stimage-sd ready`).")
]
Weights = Annotated[Path | None, typer.Option(help="Weights file of the extractor, if it is not found automatically.")]


class On(StrEnum):
    """What is predicted."""

    tiles = "tiles"
    nuclei = "nuclei"
    grid = "grid"


class Dataset(StrEnum):
    """Dataset of the demo."""

    synthetic = "synthetic"
    her2st = "her2st"


class Stain(StrEnum):
    """Method of stain normalization."""

    vahadane = "vahadane"
    macenko = "macenko"
    reinhard = "reinhard"
    none = "none"


class Head(StrEnum):
    """Head of the model."""

    paper = "paper"
    dispersion = "dispersion"


class Against(StrEnum):
    """Measurements to compare predictions with."""

    counts = "counts"
    proteins = "proteins"


class Of(StrEnum):
    """Part of a prediction to explain."""

    mean = "mean"
    epistemic = "epistemic"
    aleatoric = "aleatoric"
    total_variance = "total_variance"


class Standardize(StrEnum):
    """Scope of the standardization of embeddings."""

    section = "section"
    cohort = "cohort"
