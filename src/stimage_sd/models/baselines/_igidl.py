"""IGI-DL: a residual network on each tile's picture and a graph network on its nuclei."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import optax
from flax import nnx

from stimage_sd.models.baselines._micro_batches import Batching, learn, predict
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
from stimage_sd.nn.igidl import IGIDLNetwork
from stimage_sd.nn.nuclei_graph import FEATURES, nuclei_graphs, standardised


@dataclass(frozen=True)
class IGIDL:
    """IGI-DL (Gao et al., Cell Reports Medicine 2024): a ResNet-18 on a tile, a graph network on its nuclei, and both.

    Kept of the published network: ResNet-18 on pictures of 200 px, from random weights; four layers of a graph
    isomorphism network over the nuclei, with the largest and mean of the nodes after each; both outcomes normalised
    and joined, three layers over them; mean squared error of log expression; features standardised section by
    section; Adam with weight decay, steps of 512 tiles, a fifth of the tiles held out to stop by; its authors'
    hyperparameters, which are the defaults.

    Different: nuclei are found by a threshold of haematoxylin and a watershed, where theirs are by HoVer-Net, so
    that a nucleus has no type; 18 features of size, shape, stain and gradient, where theirs are 85 of HistomicsTK's;
    a nucleus is linked with the five nearest, where theirs is with those within 20 µm (some four to six), as a
    recipe does not know what a pixel measures; at most 128 nuclei; tiles of fewer than five nuclei are learnt from
    too, where theirs are left out; a picture is the tile, resized, where theirs is 100 µm across; a step's gradient
    is the mean of micro-batches, of which the statistics of normalisation are. Colours are those of the working
    image (`pp.stain_normalize` comes before, as in theirs).

    Attributes
    ----------
    channels
        Of the stages of the residual network.
    graph_width, fusion
        Width of the graph's layers, and of the layers over both.
    n_nuclei, n_neighbours
        Nuclei of a tile at most, and how many nearest ones each is linked with.
    dropout
        Share of values that training sets to zero.
    epochs, patience
        At most so many, and without a lesser error on held-out tiles.
    learning_rate, weight_decay
        Of Adam; the decay is part of the gradient.
    batch_size, micro_batch_size
        Tiles that make a step, and that go through the network at a time.
    pixels_px
        Side of a tile's picture, px.
    target
        As in `Ridge`; the authors' is ``"lognorm"``.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.baselines.IGIDL(epochs=10).graph_width
    256
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    graph_width: int = 256
    fusion: tuple[int, ...] = (512, 256, 256)
    n_nuclei: int = 128
    n_neighbours: int = 5
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
        check_positive(self, "graph_width", "n_nuclei", "n_neighbours", "epochs", "patience", "pixels_px")
        check_choice(self, "target", ["log1p", "lognorm"])
        if not 2 <= self.micro_batch_size <= self.batch_size:
            raise ValueError(
                "Expected `micro_batch_size` of IGIDL to be 2 or more, as a single tile has no statistics, and at most "
                f"`batch_size`, got {self.micro_batch_size} of {self.batch_size}."
            )
        # JSON has no tuples
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "fusion", tuple(self.fusion))

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Find the nuclei and train the network; see `Recipe`."""
        optimiser = optax.chain(optax.add_decayed_weights(self.weight_decay), optax.adam(self.learning_rate))
        return learn(
            self._make, self._see, sections, target=self.target, batching=self._batching, optimiser=optimiser,
            epochs=self.epochs, patience=self.patience, seed=seed, label=self.name,
        )  # fmt: skip

    def mean(self, learnt: Arrays, section: SectionData) -> np.ndarray:
        """Find the nuclei and run the network; see `Recipe`."""
        logarithms = predict(self._make, learnt, self._see(section), batching=self._batching)
        return as_counts(logarithms, learnt["scale"], learnt["floor_mean"])

    @property
    def _batching(self) -> Batching:
        return Batching(self.batch_size, self.micro_batch_size)

    def _see(self, section: SectionData) -> dict[str, np.ndarray]:
        if section.pixels is None:
            raise ValueError("Expected the tiles' pixels, which this recipe needs, found none.")
        graphs = standardised(nuclei_graphs(section.pixels, n_nuclei=self.n_nuclei, n_neighbours=self.n_neighbours))
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
