"""HisToGene: a transformer over the spots of a section, from their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from flax import nnx

from stimage_sd.models.baselines._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    as_counts,
    check_choice,
    check_positive,
)
from stimage_sd.models.baselines._section_network import learn, mean_square, predict
from stimage_sd.nn.histogene import HisToGeneNetwork


@dataclass(frozen=True)
class HisToGene:
    """HisToGene (Pang et al., bioRxiv 2021): spots' pixels, linearly embedded, and attention among all of a section.

    Kept of the published network: its layers, the embeddings of rows and columns, mean squared error of log
    expression, Adam, and its authors' hyperparameters, which are the defaults. Different: a spot's picture is its tile,
    resized to 112 px, where theirs is 112 px of the image; the section is recoloured and turned as a whole by
    quarters, where theirs turns freely.

    Attributes
    ----------
    width, depth, heads
        Length of a token, blocks, heads of attention.
    dropout
        Share of values that training sets to zero.
    epochs, learning_rate
        Of Adam; a step a section.
    pixels_px
        Side of a spot's picture, px.
    target
        As in `Ridge`; the authors' is ``"lognorm"``.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.baselines.HisToGene(epochs=10).depth
    8
    """

    width: int = 1024
    depth: int = 8
    heads: int = 16
    dropout: float = 0.1
    epochs: int = 100
    learning_rate: float = 1e-5
    pixels_px: int = 112
    target: Target = "lognorm"

    name: ClassVar[str] = "histogene"
    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})

    def __post_init__(self) -> None:
        check_positive(self, "width", "depth", "heads", "epochs", "pixels_px")
        check_choice(self, "target", ["log1p", "lognorm"])

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Train the network; see `Recipe`."""
        return learn(
            self._make, sections, mean_square, target=self.target, epochs=self.epochs, schedule=self.learning_rate,
            augment=True, seed=seed, label=self.name,
        )  # fmt: skip

    def mean(self, learnt: Arrays, section: SectionData) -> np.ndarray:
        """Run the network; see `Recipe`."""
        logarithms = np.asarray(predict(self._make, learnt, section))
        return as_counts(logarithms, learnt["scale"], learnt["floor_mean"])

    def _make(self, n_genes: int, rngs: nnx.Rngs) -> HisToGeneNetwork:
        return HisToGeneNetwork(
            n_genes, patch_px=self.pixels_px, width=self.width, depth=self.depth, heads=self.heads,
            dropout=self.dropout, rngs=rngs,
        )  # fmt: skip
