"""THItoGene: dynamic convolution, capsules, a transformer and graph attention over a section's spots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from flax import nnx

from stimage_sd.baselines._section_network import learn, mean_square, predict
from stimage_sd.baselines._windows import check_window
from stimage_sd.baselines.networks.thitogene import THItoGeneNetwork
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

#: least side of an image for the convolutions, px
_LEAST_PX = 44


@dataclass(frozen=True)
class THItoGene:
    """THItoGene: capsules, attention between spots, and a graph.

    Source: Jia et al., Briefings in Bioinformatics 2024.

    Same as published: an omni-dimensional dynamic convolution (four kernels of 4 px, 16 channels), and the convolutions
    of the Efficient-CapsNet with its 16 primary capsules of 8 values and their routing by self-attention. Embeddings of
    a spot's column and row join its capsules. The transformer and graph attention over the four nearest spots follow.
    The graph does not link a spot to itself. A layer of width 1024 precedes the genes. Initial weights, the mean
    squared error of log expression, one section per step, Adam without a schedule and no augmentation are as published.
    The authors' hyperparameters are the defaults.

    Different: a spot's image is its tile, resized to 112 px, with pixels from 0 to 1. The authors cut 112 px of the
    slide, with pixels from 0 to 255. On a hexagonal lattice, columns are numbered like those of Visium. Values missing
    in the paper come from the authors' README (heads, blocks, capsules and their width, learning rate, 200 epochs).

    Attributes
    ----------
    capsules, capsule_width
        Capsules per spot, and values per capsule (the authors' `caps` and `route_dim`).
    depth, heads
        Number of attention blocks between spots, and numbers of heads between spots and along the graph.
    hidden
        Width of the layers, as in `stimage_sd.baselines.networks.thitogene.THItoGeneNetwork`.
    dropout
        Share of values that training sets to zero.
    epochs, learning_rate
        Epochs and learning rate of Adam, with one step per section or window.
    pixels_px
        Side of a spot's image, px; 44 or more.
    target
        As in `Ridge`. The authors use ``"lognorm"``.
    window
        Largest side of a window, in spots. Sections are trained and predicted by such windows, each as a section of its
        own. `None`: whole sections, whose memory grows with the square of the number of spots. The paper trains on
        Visium with ``window=25`` (section 2.7).

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.THItoGene(epochs=10).heads
    (16, 8)
    """

    capsules: int = 20
    capsule_width: int = 64
    depth: int = 4
    heads: tuple[int, int] = (16, 8)
    hidden: int = 1024
    dropout: float = 0.2
    epochs: int = 200
    learning_rate: float = 1e-5
    pixels_px: int = 112
    target: Target = "lognorm"
    window: int | None = None

    name: ClassVar[str] = "thitogene"
    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})

    def __post_init__(self) -> None:
        check_positive(self, "capsules", "capsule_width", "depth", "hidden", "epochs", "pixels_px")
        check_choice(self, "target", ["log1p", "lognorm"])
        check_window(self)
        if self.pixels_px < _LEAST_PX:
            raise ValueError(
                f"Expected `pixels_px` of THItoGene to be {_LEAST_PX} or more, below which its convolutions leave "
                f"nothing of a picture, got {self.pixels_px}."
            )
        # JSON stores tuples as lists
        object.__setattr__(self, "heads", tuple(self.heads))

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Train the network (see `Recipe`)."""
        return learn(
            self._make, sections, mean_square, target=self.target, epochs=self.epochs,
            schedule=lambda _: self.learning_rate, augment=False, seed=seed, label=self.name, window=self.window,
        )  # fmt: skip

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Run the network (see `Recipe`)."""
        logarithms = np.asarray(predict(self._make, learned, section, window=self.window))
        return as_counts(logarithms, learned)

    def _make(self, n_genes: int, rngs: nnx.Rngs) -> THItoGeneNetwork:
        return THItoGeneNetwork(
            n_genes, patch_px=self.pixels_px, capsules=self.capsules, capsule_width=self.capsule_width,
            depth=self.depth, heads=self.heads, hidden=self.hidden, dropout=self.dropout, rngs=rngs,
        )  # fmt: skip
