"""ST-Net: a convolutional network, trained end to end to the log expression of a tile's spot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stimage_sd.models.baselines._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    as_counts,
    check_choice,
    check_positive,
    check_positive_number,
    count_scale,
    floor,
    targets,
)
from stimage_sd.models.baselines._tile_network import RegisteredNetwork, Training, head_of, learn, mean_features
from stimage_sd.nn.negative_binomial_head import Parameters


@dataclass(frozen=True)
class STnet:
    """ST-Net (He et al., Nature Biomedical Engineering 2020): DenseNet-121 and a linear layer, trained end to end.

    Kept of the published model: the network and its ImageNet weights; a linear layer whose weights begin at zero and
    whose biases at the genes' mean log expression; the squared error, a mean over genes and a sum over a batch; SGD
    with momentum and its authors' hyperparameters, which are the defaults; tiles turned by quarters and mirrored at
    random; predictions averaged over a tile's eight symmetries. Different: the statistics of batch normalisation stay
    those of the pretrained network, and pixels are normalised as for it, where theirs are by the training tiles' own
    mean and deviation; all epochs are run, where theirs choose one by cross-validation; expression is that of `target`,
    where theirs is log((1 + count) / (genes + total)); a tile is what it was cut as, resized to 224 px.

    Attributes
    ----------
    backbone
        Name of a registered extractor whose network is a Flax module (`stimage_sd.models.extractors`). With any but
        DenseNet-121 this is ST-Net's way of training, not its network.
    weights
        A safetensors file of weights to begin with; by default those of ImageNet are found as
        `stimage_sd.models.get_extractor` does, or an error says where they were looked for.
    unfreeze
        ``"all"``: the whole network is trained, as published; ``"last_stage"``: the last of its parts
        (`stimage_sd.nn.parts`). The linear layer always is.
    epochs, batch_size, learning_rate, momentum
        Of SGD. The published rate is for the 30,000 spots of the published data; three sections of her2st have
        some 550, so that the same epochs are a fiftieth of the steps.
    micro_batch_size
        Tiles that are in memory at a time: their gradients are added up.
    pixels_px
        Side that tiles are resized to, px.
    target
        As in `Ridge`.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.baselines.STnet(backbone="efficientnet_lite0").learning_rate
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
        """Train network and linear layer; see `Recipe`."""
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
            "scale": count_scale(sections, self.target),
            "floor_mean": floor(sections, self.target)[0],
        }

    def mean(self, learnt: Arrays, section: SectionData) -> np.ndarray:
        """Run the network on eight symmetries of each tile; see `Recipe`."""
        # the mean of predictions is the prediction of the mean: the layer is linear
        features = jnp.asarray(mean_features(self._network, learnt, section))
        logarithms = np.asarray(_expression(head_of(learnt), features))
        return as_counts(logarithms, learnt["scale"], learnt["floor_mean"])

    @property
    def _network(self) -> RegisteredNetwork:
        return RegisteredNetwork(self.backbone, self.weights)


def _expression(head: Parameters, features: jax.Array) -> jax.Array:
    return features @ head["weight"] + head["bias"]


def _square(head: Parameters, features: jax.Array, measured: dict[str, jax.Array]) -> jax.Array:
    """Squared error of each tile, a mean over genes."""
    return ((_expression(head, features) - measured["expression"]) ** 2).mean(axis=-1)
