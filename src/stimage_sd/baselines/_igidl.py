"""IGI-DL: a residual network on each tile and a graph network on its nuclei."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import optax
from flax import nnx

from stimage_sd.baselines._micro_batches import Batching, learn, predict
from stimage_sd.baselines.networks.igidl import IGIDLNetwork
from stimage_sd.image.nuclei_graph import FEATURES, nuclei_graphs, standardized
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
class IGIDL:
    """IGI-DL: a ResNet-18 on a tile, joined to a graph network on its nuclei.

    Source: Gao et al., Cell Reports Medicine 2024.

    Same as published: a ResNet-18 on images of 200 px, trained from random weights. Four layers of a graph isomorphism
    network run over the nuclei, with the maximum and the mean of the nodes after each layer. Both outputs are
    normalized and joined, and three layers follow. The loss is the mean squared error of log expression. Features are
    standardized per section. Adam uses weight decay and steps of 512 tiles. Early stopping uses a held-out fifth of the
    tiles. The authors' hyperparameters are the defaults.

    Different: nuclei come from a hematoxylin threshold and a watershed, so they have no type. The authors use
    HoVer-Net. A nucleus has 18 features of size, shape, stain and gradient. The authors use 85 features of HistomicsTK.
    A nucleus is linked to its five nearest nuclei, because a recipe does not know the pixel size. The authors link
    nuclei within 20 µm (some four to six). A tile has at most 128 nuclei. Tiles with fewer than five nuclei are used
    for training. The authors leave them out. An image is the resized tile. The authors' is 100 µm across. The gradient
    of a step is the mean over micro-batches, and batch statistics are those of a micro-batch. Colors are those of the
    working image. Run `pp.stain_normalize` before, as the authors do.

    Attributes
    ----------
    channels
        Channels of the stages of the residual network.
    graph_width, fusion
        Width of the graph layers, and widths of the layers over the joined outputs.
    n_nuclei, n_neighbors
        Largest number of nuclei per tile, and number of nearest nuclei that a nucleus is linked to.
    dropout
        Share of values that training sets to zero.
    epochs, patience
        Largest number of epochs, and number of epochs without a lower error on held-out tiles before training stops.
    learning_rate, weight_decay
        Learning rate and weight decay of Adam. The decay is part of the gradient.
    batch_size, micro_batch_size
        Tiles per step, and tiles per pass through the network.
    pixels_px
        Side of a tile's image, px.
    target
        As in `Ridge`. The authors use ``"lognorm"``.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.IGIDL(epochs=10).graph_width
    256
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    graph_width: int = 256
    fusion: tuple[int, ...] = (512, 256, 256)
    n_nuclei: int = 128
    n_neighbors: int = 5
    dropout: float = 0.5
    epochs: int = 300
    patience: int = 30
    learning_rate: float = 2e-4
    weight_decay: float = 1e-4
    batch_size: int = 512
    micro_batch_size: int = 32
    pixels_px: int = 200
    target: Target = "lognorm"

    name: ClassVar[str] = "igidl"
    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})

    def __post_init__(self) -> None:
        check_positive(self, "graph_width", "n_nuclei", "n_neighbors", "epochs", "patience", "pixels_px")
        check_choice(self, "target", ["log1p", "lognorm"])
        if not 2 <= self.micro_batch_size <= self.batch_size:
            raise ValueError(
                "Expected `micro_batch_size` of IGIDL to be 2 or more, as a single tile has no statistics, and at most "
                f"`batch_size`, got {self.micro_batch_size} of {self.batch_size}."
            )
        # JSON stores tuples as lists
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "fusion", tuple(self.fusion))

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Find the nuclei and train the network (see `Recipe`)."""
        optimizer = optax.chain(optax.add_decayed_weights(self.weight_decay), optax.adam(self.learning_rate))
        return learn(
            self._make, self._see, sections, target=self.target, batching=self._batching, optimizer=optimizer,
            epochs=self.epochs, patience=self.patience, seed=seed, label=self.name,
        )  # fmt: skip

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Find the nuclei and run the network (see `Recipe`)."""
        logarithms = predict(self._make, learned, self._see(section), batching=self._batching)
        return as_counts(logarithms, learned)

    @property
    def _batching(self) -> Batching:
        return Batching(self.batch_size, self.micro_batch_size)

    def _see(self, section: SectionData) -> dict[str, np.ndarray]:
        if section.pixels is None:
            raise ValueError("Expected the tiles' pixels, which this recipe needs, found none.")
        graphs = standardized(nuclei_graphs(section.pixels, n_nuclei=self.n_nuclei, n_neighbors=self.n_neighbors))
        return {
            "pixels": section.pixels,
            "nodes": graphs.features,
            "present": graphs.present,
            "edges": graphs.edges,
        }

    def _make(self, n_genes: int, rngs: nnx.Rngs) -> IGIDLNetwork:
        return IGIDLNetwork(
            n_genes, len(FEATURES), channels=self.channels, graph_width=self.graph_width, fusion=self.fusion,
            dropout=self.dropout, rngs=rngs,
        )  # fmt: skip
