"""HisToGene: a transformer over the spots of a section, from their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from flax import nnx

from stimage_sd.baselines._section_network import learn, mean_square, predict
from stimage_sd.baselines._windows import check_window
from stimage_sd.baselines.networks.histogene import HisToGeneNetwork
from stimage_sd.models._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    as_counts,
    check_choice,
    check_positive,
)


@dataclass(frozen=True)
class HisToGene:
    """HisToGene: linear embeddings of spot pixels and attention over a section's spots.

    Source: Pang et al., bioRxiv 2021.

    Same as published: the layers, the embeddings of rows and columns, the mean squared error of log expression, Adam,
    and the authors' hyperparameters, which are the defaults.

    Different: a spot's image is its tile, resized to 112 px. The authors cut 112 px of the slide. The whole section is
    recolored and rotated by quarter turns. The authors rotate by any angle.

    Attributes
    ----------
    width, depth, heads
        Length of a token, number of blocks, and number of attention heads.
    dropout
        Share of values that training sets to zero.
    epochs, learning_rate
        Epochs and learning rate of Adam, with one step per section or window.
    pixels_px
        Side of a spot's image, px.
    target
        As in `Ridge`. The authors use ``"lognorm"``.
    window
        Largest side of a window, in spots. Sections are trained and predicted by such windows, each as a section of its
        own. `None`: whole sections, whose memory grows with the square of the number of spots. The paper trains on
        Visium with ``window=25`` (section 2.7).

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.HisToGene(epochs=10).depth
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
    window: int | None = None

    name: ClassVar[str] = "histogene"
    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})

    def __post_init__(self) -> None:
        check_positive(self, "width", "depth", "heads", "epochs", "pixels_px")
        check_choice(self, "target", ["log1p", "lognorm"])
        check_window(self)

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Train the network (see `Recipe`)."""
        return learn(
            self._make, sections, mean_square, target=self.target, epochs=self.epochs,
            schedule=lambda _: self.learning_rate, augment=True, seed=seed, label=self.name, window=self.window,
        )  # fmt: skip

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Run the network (see `Recipe`)."""
        logarithms = np.asarray(predict(self._make, learned, section, window=self.window))
        return as_counts(logarithms, learned)

    def _make(self, n_genes: int, rngs: nnx.Rngs) -> HisToGeneNetwork:
        return HisToGeneNetwork(
            n_genes, patch_px=self.pixels_px, width=self.width, depth=self.depth, heads=self.heads,
            dropout=self.dropout, rngs=rngs,
        )  # fmt: skip
