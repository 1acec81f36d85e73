"""ST-Net: a convolutional network, trained end to end on the log expression of a tile's spot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stimage_sd.baselines._tile_network import RegisteredNetwork, Training, head_of, learn, mean_features
from stimage_sd.likelihood.heads import Parameters
from stimage_sd.models._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    as_counts,
    check_choice,
    check_positive,
    check_positive_number,
    count_arrays,
    targets,
)


@dataclass(frozen=True)
class STnet:
    """ST-Net: DenseNet-121 and a linear layer, trained end to end.

    Source: He et al., Nature Biomedical Engineering 2020.

    Same as published: the network and its ImageNet weights. The weights of the linear layer start at zero and its
    biases at the genes' mean log expression. The loss is the squared error, averaged over genes and summed over a
    batch. The optimizer is SGD with momentum, with the authors' hyperparameters as defaults. Tiles are rotated by
    quarter turns and mirrored at random. Predictions are averaged over a tile's eight symmetries.

    Different: batch normalization keeps the statistics of the pretrained network, and pixels are normalized for that
    network. The authors normalize pixels by the mean and deviation of the training tiles. All epochs are run. The
    authors choose an epoch by cross-validation. Expression follows `target`. The authors use
    log((1 + count) / (genes + total)). A tile covers the area with which it was cut, resized to 224 px.

    Attributes
    ----------
    backbone
        Name of a registered extractor whose network is a Flax module (`stimage_sd.models.extractors`). Extractors other
        than DenseNet-121 use ST-Net's training, but not its network.
    weights
        A safetensors file with initial weights. By default the ImageNet weights, found as in
        `stimage_sd.models.get_extractor`. If they are missing, the error names the places that were searched.
    unfreeze
        ``"all"`` trains the whole network, as published. ``"last_stage"`` trains the last part (`stimage_sd.nn.parts`).
        The linear layer is always trained.
    epochs, batch_size, learning_rate, momentum
        Settings of SGD. The published learning rate is for 30,000 spots. Three sections of her2st have some 550 spots,
        so the same epochs give a fiftieth of the steps.
    micro_batch_size
        Tiles in memory at a time. Their gradients are summed.
    pixels_px
        Side to which tiles are resized, px.
    target
        As in `Ridge`.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.STnet(backbone="efficientnet_lite0").learning_rate
    1e-06
    """

    backbone: str = "densenet121"
    weights: str | None = None
    unfreeze: Literal["all", "last_stage"] = "all"
    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 1e-6
    momentum: float = 0.9
    micro_batch_size: int = 8
    pixels_px: int = 224
    target: Target = "lognorm"

    name: ClassVar[str] = "stnet"
    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size", "micro_batch_size", "pixels_px")
        check_positive_number(self, "learning_rate")
        check_choice(self, "unfreeze", ["all", "last_stage"])
        check_choice(self, "target", ["log1p", "lognorm"])
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Expected `momentum` of STnet to be at least 0 and under 1, got {self.momentum!r}.")
        # JSON has no paths
        object.__setattr__(self, "weights", None if self.weights is None else os.fspath(self.weights))

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Train the network and the linear layer (see `Recipe`)."""
        extractor = self._network.initial(seed=seed, side_px=self.pixels_px)
        expression = targets(sections, self.target)
        head = {
            "weight": jnp.zeros((extractor.embedding_size, expression.shape[1])),
            "bias": jnp.asarray(expression.mean(axis=0)),
        }
        training = Training(
            self.unfreeze, optax.sgd(self.learning_rate, momentum=self.momentum), self.epochs, self.batch_size,
            min(self.micro_batch_size, self.batch_size), seed, self.name,
        )  # fmt: skip
        return {
            **learn(extractor, head, sections, {"expression": expression}, _square, training),
            **count_arrays(sections, self.target),
        }

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Run the network on the eight symmetries of each tile (see `Recipe`)."""
        # the layer is linear, so the mean of predictions is the prediction of the mean features
        features = jnp.asarray(mean_features(self._network, learned, section))
        logarithms = np.asarray(_expression(head_of(learned), features))
        return as_counts(logarithms, learned)

    @property
    def _network(self) -> RegisteredNetwork:
        return RegisteredNetwork(self.backbone, self.weights)


def _expression(head: Parameters, features: jax.Array) -> jax.Array:
    return features @ head["weight"] + head["bias"]


def _square(head: Parameters, features: jax.Array, measured: dict[str, jax.Array]) -> jax.Array:
    """Compute the squared error per tile, averaged over genes."""
    return ((_expression(head, features) - measured["expression"]) ** 2).mean(axis=-1)
