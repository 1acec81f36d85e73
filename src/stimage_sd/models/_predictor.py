"""What every fitted model of genes is: something that opens a section and gives mixtures of negative binomials."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from spatialdata import SpatialData


class OpenedSection(Protocol):
    """A section as a model sees it, checked and read.

    Attributes
    ----------
    strangeness
        ``float32 (n_tiles,)``: above 1, farther from the training tiles than 95 % of those.
    """

    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Parameters of the negative binomials of some of the kept tiles, in their order.

        Returns
        -------
        r and p, each ``float32 (n_members, n_rows, n_genes)``; the number of members is always that of the
        model's `member_weights`.
        """
        ...


@runtime_checkable
class Predictor(Protocol):
    """A fitted model that `stimage_sd.tl.predict` takes.

    Attributes
    ----------
    genes
        Names of the genes, in the order of every array's last axis.
    member_weights
        ``float64 (n_members,)``, their sum 1: weight of each member in the mixture.
    floor
        ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit to the training counts.
    total
        The size factor 1, where the model was fitted with size factors; `None` without.
    interval_level
        Nominal level at which the mixture's central intervals covered 90 % of held-out counts.
    training
        What was fitted, for the reader; ``training["sections"]`` names the sections.
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
        """What predictions say about their model: plain values, such as extractor and head."""
        ...

    def open(self, sdata: SpatialData, *, section: str) -> OpenedSection:
        """Check that a section is as the model expects, and read what it needs of it.

        Raises
        ------
        KeyError
            If the section was not tiled or embedded.
        ValueError
            If tiles, embeddings or staining are not those of the model; the error names the step to run again.
        """
        ...

    def save(self, path: str | Path) -> Path:
        """Write the model to a file or directory, for `stimage_sd.models.load`."""
        ...
