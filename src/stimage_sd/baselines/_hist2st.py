"""Hist2ST: convolutions, a transformer and a graph over the spots of a section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from stimage_sd.baselines._section_network import learn, predict
from stimage_sd.baselines._windows import check_window
from stimage_sd.baselines.networks.hist2st import Hist2STNetwork, zinb_loss
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
class Hist2ST:
    """Hist2ST: a ConvMixer per spot, then a transformer and a graph over the spots.

    Source: Zeng et al., Briefings in Bioinformatics 2022.

    Same as published: the layers and the authors' hyperparameters. The loss is the mean squared error of log
    expression, plus a quarter of the loss of a zero-inflated negative binomial (ZINB) and self-distillation from
    augmented copies. The optimizer is Adam with a learning rate that falls by a tenth every 50 epochs.

    Different: a spot's image is its tile, resized to 112 px. Copies are rotated by quarter turns. The graph links the
    four nearest tiles.

    Attributes
    ----------
    channels, depths, heads
        Channels of the convolutions, numbers of convolution, attention and graph blocks, and attention heads.
    dropout
        Share of values that training sets to zero.
    zinb, copies, distillation
        Weight of the ZINB loss, augmented copies of a section per step, and weight of agreement with the copies.
    epochs, learning_rate
        Epochs and learning rate of Adam, with one step per section or window.
    pixels_px
        Side of a spot's image, px; a multiple of 7.
    target
        As in `Ridge`. The authors use ``"lognorm"``.
    window
        Largest side of a window, in spots. Sections are trained and predicted by such windows, each as a section of its
        own. `None`: whole sections, whose memory grows with the square of the number of spots. The paper trains on
        Visium with ``window=25`` (section 2.7).

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.Hist2ST(epochs=10).depths
    (2, 8, 4)
    """

    channels: int = 32
    depths: tuple[int, int, int] = (2, 8, 4)
    heads: int = 16
    dropout: float = 0.2
    zinb: float = 0.25
    copies: int = 5
    distillation: float = 0.5
    epochs: int = 350
    learning_rate: float = 1e-5
    pixels_px: int = 112
    target: Target = "lognorm"
    window: int | None = None

    name: ClassVar[str] = "hist2st"
    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})

    def __post_init__(self) -> None:
        check_positive(self, "channels", "heads", "epochs", "pixels_px")
        check_choice(self, "target", ["log1p", "lognorm"])
        check_window(self)
        # JSON stores tuples as lists
        object.__setattr__(self, "depths", tuple(self.depths))

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Train the network (see `Recipe`)."""

        def schedule(steps: int) -> optax.Schedule:
            return optax.exponential_decay(self.learning_rate, 50 * steps, 0.9, staircase=True)

        return learn(
            self._make, sections, self._loss, target=self.target, epochs=self.epochs, schedule=schedule,
            augment=False, seed=seed, label=self.name, window=self.window,
        )  # fmt: skip

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Run the network (see `Recipe`)."""
        logarithms = np.asarray(predict(self._make, learned, section, window=self.window).expression)
        return as_counts(logarithms, learned)

    def _make(self, n_genes: int, rngs: nnx.Rngs) -> Hist2STNetwork:
        return Hist2STNetwork(
            n_genes, patch_px=self.pixels_px, channels=self.channels, depths=self.depths, heads=self.heads,
            dropout=self.dropout, rngs=rngs,
        )  # fmt: skip

    def _loss(self, network: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        rows = batch["rows"]
        output = network(batch["pixels"], batch["places"], batch["graph"])
        loss = jnp.mean((output.expression[rows] - batch["target"]) ** 2)
        measured = jax.tree.map(lambda values: values[rows], output)
        loss += self.zinb * zinb_loss(batch["counts"], measured, batch["size_factors"])
        if self.copies == 0:
            return loss
        outputs = [
            network(_altered(batch["pixels"], copy_key), batch["places"], batch["graph"])
            for copy_key in jax.random.split(key, self.copies)
        ]
        weights = jax.nn.softmax(jnp.stack([copy.confidence for copy in outputs]), axis=0)
        together = (jnp.stack([copy.expression for copy in outputs]) * weights).sum(axis=0)
        return loss + self.distillation * jnp.mean((together - output.expression)[rows] ** 2)


def _altered(pixels: jax.Array, key: jax.Array) -> jax.Array:
    """Rotate, mirror or gray all images of a section alike."""
    turn, mirror, gray = jax.random.split(key, 3)
    quarters = [partial(jnp.rot90, k=turns, axes=(1, 2)) for turns in (0, 1, 3)]
    pixels = jax.lax.switch(jax.random.randint(turn, (), 0, 3), quarters, pixels)
    pixels = jnp.where(jax.random.uniform(mirror) < 0.2, pixels[:, :, ::-1], pixels)
    return jnp.where(
        jax.random.uniform(gray) < 0.1, jnp.broadcast_to(pixels.mean(-1, keepdims=True), pixels.shape), pixels
    )
