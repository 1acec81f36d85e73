"""Interface of fitted gene models, which open a section and predict mixtures of negative binomials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from spatialdata import SpatialData


def known_patients(training: Mapping[str, Any]) -> set[str] | None:
    """Return the patients in the record of a fit, or `None` if the patient of a section is unknown."""
    patients = training.get("patients", {})
    return set(patients.values()) if set(patients) == set(training.get("sections", [])) else None


def gene_shifts(model: Predictor) -> np.ndarray | None:
    """Return the standard deviations of a model's gene shifts, ``(2, n_genes)``; `None` for models without exposure."""
    shifts: np.ndarray | None = getattr(model, "shifts", None)
    return shifts


def spot_sd(model: Predictor) -> float:
    """Return the standard deviation of the log of the factor that all genes of a spot share; 0 if none was learned."""
    return float(getattr(model, "spot_sd", 0.0))


def predicts_on(model: Predictor) -> str:
    """Return what a model predicts beside tiles, ``"nuclei"`` or ``"grid"``, or ``"tiles"`` for tiles only."""
    made: Any = model
    return str(getattr(getattr(made, "base", made), "on", "tiles"))


def n_per_unit(model: Predictor) -> float:
    """Return the mean number of nuclei or squares of a training spot."""
    made: Any = model
    return float(getattr(made, "base", made).n_per_unit)


class OpenedSection(Protocol):
    """A section that a model has checked and read.

    - `strangeness`: ``float32 (n_tiles,)``. Above 1, a tile is farther from the training tiles than 95 % of them.
    """

    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the negative binomial parameters of some kept tiles, in their order.

        - returns: r and p, each ``float32 (n_members, n_rows, n_genes)``, with as many members as the model's
          `member_weights`.
        """
        ...


@runtime_checkable
class OpenedBags(Protocol):
    """A section opened by a model whose tiles are sums over nuclei or squares."""

    def background(self) -> np.ndarray:
        """Return the mean counts of the tiles' backgrounds, ``float32 (n_tiles, n_genes)``."""
        ...

    def of_instances(self) -> tuple[OpenedSection, np.ndarray]:
        """Return the nuclei or squares as an opened section, and their rows in the table of embeddings."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """A fitted model that `stimage_sd.tl.predict` takes.

    - `genes`: names of the genes, in the order of every array's last axis.
    - `member_weights`: weight of each member in the mixture, ``float64 (n_members,)``. The weights sum to 1.
    - `floor`: ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit to the training counts.
    - `total`: total count with size factor 1; `None` if the model was fitted without size factors.
    - `interval_level`: nominal level at which the mixture's central intervals covered 90 % of held-out counts.
    - `training`: record of the fit. ``training["sections"]`` has the names of the sections.
      ``training["fingerprints"]`` identifies them by their spots and counts (`stimage_sd.contract.fingerprint`).
    """

    genes: tuple[str, ...]
    floor: np.ndarray
    total: float | None
    interval_level: float
    training: dict[str, Any]

    @property
    def member_weights(self) -> np.ndarray:
        """Weight of each member in the mixture, ``float64 (n_members,)``."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions: plain values such as extractor and head."""
        ...

    def open(self, sdata: SpatialData, *, section: str) -> OpenedSection:
        """Check that a section matches the model, and read the model's inputs from it."""
        ...

    def save(self, path: str | Path) -> Path:
        """Write the model to a file or directory that `stimage_sd.models.load` reads."""
        ...
