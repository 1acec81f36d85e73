"""THItoGene: dynamic convolution, capsules, a transformer and graph attention over the spots of a section."""

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
from stimage_sd.nn.thitogene import THItoGeneNetwork

#: sides of pictures below which the convolutions leave nothing, px
_LEAST_PX = 44


@dataclass(frozen=True)
class THItoGene:
    """THItoGene (Jia et al., Briefings in Bioinformatics 2024): capsules, attention between spots, and a graph.

    Kept of the published network: an omni-dimensional dynamic convolution (four kernels of 4 px, 16 channels); the
    Efficient-CapsNet's convolutions, its 16 primary capsules of 8 values and their routing by self-attention;
    embeddings of a spot's column and row beside its capsules; the transformer; graph attention over the four
    nearest spots, the spot itself not among them; a layer of 1024 before the genes; initial weights; mean squared
    error of log expression, a section a step, Adam without a schedule, no augmentation, and its authors'
    hyperparameters, which are the defaults. Different: a spot's picture is its tile, resized to 112 px, where theirs
    is 112 px of the image, and its pixels are 0 to 1, where theirs are 0 to 255; where spots stand on a hexagonal
    lattice, columns are Visium's. What the published text leaves open was taken from the authors' README (heads,
    blocks, capsules and their width, learning rate, 200 epochs).

    Attributes
    ----------
    capsules, capsule_width
        Capsules of a spot, and the values of each (the authors' `caps` and `route_dim`).
    depth, heads
        Blocks of attention between spots; heads there, and along the graph.
    hidden
        Width of the layers, as in `stimage_sd.nn.thitogene.THItoGeneNetwork`.
    dropout
        Share of values that training sets to zero.
    epochs, learning_rate
        Of Adam; a step a section.
    pixels_px
        Side of a spot's picture, px; 44 or more.
    target
        As in `Ridge`; the authors' is ``"lognorm"``.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.baselines.THItoGene(epochs=10).heads
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

    name: ClassVar[str] = "thitogene"
    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})

    def __post_init__(self) -> None:
        check_positive(self, "capsules", "capsule_width", "depth", "hidden", "epochs", "pixels_px")
        check_choice(self, "target", ["log1p", "lognorm"])
        if self.pixels_px < _LEAST_PX:
            raise ValueError(
                f"Expected `pixels_px` of THItoGene to be {_LEAST_PX} or more, below which its convolutions leave "
                f"nothing of a picture, got {self.pixels_px}."
            )
        # JSON has no tuples
        object.__setattr__(self, "heads", tuple(self.heads))

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Train the network; see `Recipe`."""
        return learn(
            self._make, sections, mean_square, target=self.target, epochs=self.epochs, schedule=self.learning_rate,
            augment=False, seed=seed, label=self.name,
        )  # fmt: skip

    def mean(self, learnt: Arrays, section: SectionData) -> np.ndarray:
        """Run the network; see `Recipe`."""
        logarithms = np.asarray(predict(self._make, learnt, section))
        return as_counts(logarithms, learnt["scale"], learnt["floor_mean"])

    def _make(self, n_genes: int, rngs: nnx.Rngs) -> THItoGeneNetwork:
        return THItoGeneNetwork(
            n_genes, patch_px=self.pixels_px, capsules=self.capsules, capsule_width=self.capsule_width,
            depth=self.depth, heads=self.heads, hidden=self.hidden, dropout=self.dropout, rngs=rngs,
        )  # fmt: skip
