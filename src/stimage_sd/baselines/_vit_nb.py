"""ViT_NB: a vision transformer over the patches of a tile, with negative-binomial layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from stimage_sd.baselines._tile_network import (
    RegisteredNetwork,
    TileNetwork,
    Training,
    features,
    head_of,
    learn,
)
from stimage_sd.baselines.networks.patch_transformer import PatchTransformer
from stimage_sd.likelihood import negative_binomial
from stimage_sd.likelihood.depth import size_factors
from stimage_sd.likelihood.heads import HEADS, Parameters
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._extractors import unregistered_extractor
from stimage_sd.models._network_arrays import put_arrays
from stimage_sd.models._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    check_choice,
    check_positive,
    check_positive_number,
    floor,
    median_total,
)

#: mean and deviation that scale a tile's pixels to -1 to 1
_CENTER = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ViTNB:
    """ViT_NB: a vision transformer per tile with negative-binomial layers.

    Source: the comparison model of the STImage paper.

    Same as published: the network (patches of 13 px of a tile of 299 px, eight blocks of four heads, dense layers of
    256 and 128 on all tokens together, dropout), from random weights. One linear layer predicts r and another predicts
    p of every gene. The loss is the negative-binomial likelihood. Adam, its learning rate, batches and epochs are as
    published.

    Different: the layers of r and p start at each gene's mean and dispersion. The authors start at random. Pixels are
    scaled to -1 to 1. Tiles are rotated by quarter turns and mirrored at random. All epochs are run on all spots. The
    authors stop by the loss on a random 30 % of the spots.

    A recipe predicts means. The mean of a tile is r (1 - p) / p. The predicted distribution does not use this network's
    r. It uses one dispersion per gene, which `stimage_sd.tl.fit_baseline` fits on left-out sections. For a vision
    transformer that predicts r and p, see `stimage_sd.tl.finetune_nb`.

    Attributes
    ----------
    backbone
        `None` trains the published network from random weights. The name of a registered extractor with a Flax module,
        such as ``"vit_b_16"`` with ``pixels_px=224``, uses its pretrained weights and fits r and p on its features.
    weights
        A safetensors file for `backbone`, if the weights are not found automatically.
    unfreeze
        As in `STnet`. A network from random weights is always trained as a whole.
    patch_px, width, depth, heads, hidden, dropout
        Sizes of the published network: side of a patch, length of a token, number of blocks, attention heads, widths of
        the dense layers, and share of values that training sets to zero.
    epochs, batch_size, learning_rate
        Settings of Adam.
    micro_batch_size
        Tiles in memory at a time. Their gradients are summed.
    pixels_px
        Side to which tiles are resized, px; a multiple of `patch_px`.
    target
        ``"log1p"`` fits the counts. ``"lognorm"`` fits the counts given the spot's total, so that the prediction does
        not depend on depth.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.ViTNB(epochs=10).hidden
    (256, 128)
    """

    backbone: str | None = None
    weights: str | None = None
    unfreeze: Literal["all", "last_stage"] = "all"
    patch_px: int = 13
    width: int = 64
    depth: int = 8
    heads: int = 4
    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.1
    epochs: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-5
    micro_batch_size: int = 8
    pixels_px: int = 299
    target: Target = "log1p"

    name: ClassVar[str] = "vit_nb"
    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size", "micro_batch_size", "pixels_px")
        check_positive(self, "patch_px", "width", "depth", "heads")
        check_positive_number(self, "learning_rate")
        check_choice(self, "unfreeze", ["all", "last_stage"])
        check_choice(self, "target", ["log1p", "lognorm"])
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Expected `dropout` of ViTNB to be at least 0 and under 1, got {self.dropout!r}.")
        if self.backbone is None:
            self._check_random()
        # JSON stores tuples as lists and has no paths
        object.__setattr__(self, "hidden", tuple(self.hidden))
        object.__setattr__(self, "weights", None if self.weights is None else os.fspath(self.weights))

    def _check_random(self) -> None:
        if self.weights is not None or self.unfreeze != "all":
            raise ValueError(
                "Without a `backbone` ViTNB is a network from random weights, all of which are trained, got "
                f"`weights` {self.weights!r} and `unfreeze` {self.unfreeze!r}. Name a network that is pretrained too, "
                'such as `backbone="vit_b_16"`.'
            )
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"Expected `hidden` of ViTNB as one positive width or more, got {self.hidden!r}.")
        if self.pixels_px % self.patch_px:
            raise ValueError(
                f"Expected `pixels_px` of ViTNB to be a multiple of `patch_px`, got {self.pixels_px} and "
                f"{self.patch_px}. Give it `pixels_px={max(self.pixels_px // self.patch_px, 1) * self.patch_px}`."
            )

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Train the network and the layers of r and p (see `Recipe`)."""
        extractor = self._network.initial(seed=seed, side_px=self.pixels_px)
        at_start = floor(sections, self.target)
        head = HEADS["paper"].initial(jax.random.key(seed), at_start[0], at_start[1], 1, extractor.embedding_size)
        counts = np.concatenate([section.counts.toarray() for section in sections]).astype(np.float32)
        totals = np.concatenate([section.totals for section in sections])
        factors = np.ones_like(totals) if self.target == "log1p" else size_factors(totals, median_total(sections))
        measured = {"counts": counts, "size_factors": factors.astype(np.float32)}
        training = Training(
            self.unfreeze, optax.adam(self.learning_rate), self.epochs, self.batch_size,
            min(self.micro_batch_size, self.batch_size), seed, self.name,
        )  # fmt: skip
        return {**learn(extractor, head, sections, measured, _nll, training), "floor_mean": at_start[0]}

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Run the network (see `Recipe`)."""
        r, p = HEADS["paper"].r_and_p(head_of(learned), jnp.asarray(features(self._network, learned, section)))
        means = np.asarray(negative_binomial.mean(r=r, p=p))[0]
        return np.maximum(means, 1e-3 * learned["floor_mean"]).astype(np.float32)

    @property
    def _network(self) -> TileNetwork:
        return _RandomNetwork(self) if self.backbone is None else RegisteredNetwork(self.backbone, self.weights)


def _nll(head: Parameters, features: jax.Array, measured: dict[str, jax.Array]) -> jax.Array:
    """Compute the negative log-likelihood per tile, averaged over genes."""
    return -HEADS["paper"].log_prob(head, features, measured["counts"], measured["size_factors"])[0].mean(axis=-1)


@dataclass(frozen=True)
class _RandomNetwork:
    """Published network with the sizes of a recipe."""

    recipe: ViTNB

    def initial(self, *, seed: int, side_px: int) -> Extractor:
        """Draw the weights (see `TileNetwork`)."""
        return self._extractor(self._make(nnx.Rngs(seed)))

    def with_arrays(self, arrays: Arrays, *, normalization: np.ndarray) -> Extractor:
        """Fill a new network (see `TileNetwork`)."""
        network = nnx.eval_shape(lambda: self._make(nnx.Rngs(0)))
        put_arrays(network, arrays, name=self.recipe.name)
        return self._extractor(network)

    def _make(self, rngs: nnx.Rngs) -> PatchTransformer:
        recipe = self.recipe
        return PatchTransformer(
            image_px=recipe.pixels_px, patch_px=recipe.patch_px, width=recipe.width, depth=recipe.depth,
            heads=recipe.heads, hidden=recipe.hidden, dropout=recipe.dropout, rngs=rngs,
        )  # fmt: skip

    def _extractor(self, network: PatchTransformer) -> Extractor:
        return unregistered_extractor(
            self.recipe.name, network, input_size=self.recipe.pixels_px, embedding_size=self.recipe.hidden[-1],
            mean=_CENTER, std=_CENTER,
        )  # fmt: skip
