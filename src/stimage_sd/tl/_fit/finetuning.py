"""Train the network and the head together, with micro-batches and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse as sp
from flax import nnx
from jax import Array

from stimage_sd.image.augmentation import augment
from stimage_sd.likelihood.heads import HEADS
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._split_network import (
    SplitNetwork,
    Trained,
    Unfreeze,
    gradient_sum,
    micro_batches,
    no_gradient,
)
from stimage_sd.nn.accelerator import one_behind
from stimage_sd.tl._fit.tile_store import TileStore

#: maximum number of tiles per section used to compute the mean and standard deviation
_SAMPLE = 512


@dataclass(frozen=True)
class PixelData:
    """Training data of a fine-tuned network.

    - `tiles`: store of the tiles.
    - `section`: ``int (n_tiles,)``: section number of each tile.
    - `counts`: ``(n_tiles, n_genes)`` sparse rows.
    - `size_factors`: ``float32 (n_tiles,)``, ones if size factors are not used.
    - `held_out`: ``bool (n_tiles,)``: tiles to validate on.
    """

    tiles: TileStore
    section: np.ndarray
    counts: sp.csr_matrix
    size_factors: np.ndarray
    held_out: np.ndarray

    @cached_property
    def sample(self) -> np.ndarray:
        """Rows used for section means and standard deviations, at most 512 evenly spaced rows per section."""
        chosen = []
        for number in np.unique(self.section):
            rows = np.flatnonzero(self.section == number)
            chosen.append(rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(int))])
        return np.concatenate(chosen)


class Scales(NamedTuple):
    """Mean and inverse standard deviation per section, ``float32 (n_sections, n_features)``."""

    mean: Array
    inverse: Array


class Batch(NamedTuple):
    """A micro-batch of outputs of the frozen parts, with `weight` 0 for padding tiles."""

    inputs: Array
    section: Array
    counts: Array
    size_factors: Array
    weight: Array


@dataclass(frozen=True)
class Settings:
    """Training settings, as in `stimage_sd.tl.finetune_nb`."""

    head: str
    unfreeze: Unfreeze
    augment: bool
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    seed: int


class Finetuning:
    """A network split into trained and frozen parts, with compiled training steps.

    - `extractor`: extractor with the network and its normalization.
    - `space`: fixed linear map between the network and the head.
    - `data`: training data.
    - `settings`: training settings.
    """

    def __init__(self, extractor: Extractor, space: FeatureSpace, data: PixelData, settings: Settings) -> None:
        self._space, self._data, self._settings = space, data, settings
        self._split = SplitNetwork(extractor, settings.unfreeze)
        self.initial_network = self._split.initial
        self._components = jnp.asarray(space.components)
        self._optimizers = optax.adam(settings.learning_rate), optax.adam(settings.head_learning_rate)
        self._add_gradient = gradient_sum(self._loss)
        self._update = jax.jit(self._updated)

    def optimizer_states(self, trained: Trained) -> tuple[Any, Any]:
        """Return the initial optimizer states."""
        network, head = self._optimizers
        return network.init(trained.network), head.init(trained.head)

    def module(self, network: Any) -> nnx.Module:
        """Reassemble the network, with arrays in NumPy."""
        return self._split.module(network)

    # ----------------------------------------------------------------------------------------------
    # forward

    def features(self, network: Any, rows: np.ndarray, *, label: str) -> np.ndarray:
        """Compute features of tiles without augmentation, ``float32 (n_rows, n_features)``."""
        return self._split.features(
            network, self._data.tiles.read, rows, batch_size=self._settings.micro_batch_size, label=label
        )

    def scales(self, rows: np.ndarray, values: np.ndarray) -> Scales:
        """Compute mean and standard deviation over the sample, per section or for the cohort.

        - `rows`, `values`: sorted tile rows, which include the sample, and their features.
        """
        groups = self.sample(rows, values)
        n_groups = len(groups)
        if self._space.standardize == "cohort":
            groups = [np.concatenate(groups)]
        means = np.stack([group.mean(axis=0, dtype=np.float64) for group in groups])
        deviations = np.stack([group.std(axis=0, dtype=np.float64) for group in groups])
        inverse = np.where(deviations > 1e-6, 1 / np.maximum(deviations, 1e-6), 0)
        shape = (n_groups, values.shape[1])
        both = np.broadcast_to(means, shape), np.broadcast_to(inverse, shape)
        return Scales(*(jnp.asarray(array, dtype=jnp.float32) for array in both))

    def sample(self, rows: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
        """Return the features of the sample of each section."""
        sample = np.sort(self._data.sample)
        drawn, section = values[np.searchsorted(rows, sample)], self._data.section[sample]
        return [drawn[section == index] for index in range(int(self._data.section.max()) + 1)]

    def reduced(self, scales: Scales, section: Any, values: Any) -> Array:
        """Compute the inputs of the head, ``float32 (n_tiles, n_components)``."""
        return ((values - scales.mean[section]) * scales.inverse[section]) @ self._components

    # ----------------------------------------------------------------------------------------------
    # backward

    def _loss(self, trained: Trained, rest: Any, scales: Scales, batch: Batch) -> Array:
        """Return the negative log-likelihood of a micro-batch."""
        values = self._split.unfrozen.checkpointed_features(trained.network, rest, batch.inputs)
        reduced = self.reduced(scales, batch.section, values)
        log_prob = HEADS[self._settings.head].log_prob(trained.head, reduced, batch.counts, batch.size_factors)
        return -(log_prob[0].sum(axis=-1) * batch.weight).sum()

    def _updated(
        self, trained: Trained, states: tuple[Any, Any], gradient: Trained, n_tiles: Array
    ) -> tuple[Trained, tuple[Any, Any]]:
        """Take an Adam step on the mean gradient per tile plus the gradient of the weight prior."""
        gradient = jax.tree.map(lambda array: array / n_tiles, gradient)
        n_training = int((~self._data.held_out).sum())
        prior = self._settings.weight_decay / n_training * trained.head["weight"]
        gradient = Trained(gradient.network, {**gradient.head, "weight": gradient.head["weight"] + prior})
        stepped, after = [], []
        for adam, part, slope, state in zip(self._optimizers, trained, gradient, states, strict=True):
            update, state = adam.update(slope, state)
            stepped.append(optax.apply_updates(part, update))
            after.append(state)
        return Trained(*stepped), (after[0], after[1])

    def run_epoch(
        self, trained: Trained, states: tuple[Any, Any], scales: Scales, *, epoch: int, bar: Any
    ) -> tuple[Trained, tuple[Any, Any], float]:
        """Train for one epoch, with tile order and augmentation set by the seed and the epoch."""
        rows = np.flatnonzero(~self._data.held_out)
        rows = np.random.default_rng([self._settings.seed, 3, epoch]).permutation(rows)

        def steps() -> Iterator[Array]:
            nonlocal trained, states
            for index, start in enumerate(range(0, len(rows), self._settings.batch_size)):
                chosen = rows[start : start + self._settings.batch_size]
                total = no_gradient(trained)
                for batch in self._micro_batches(chosen, epoch=epoch, number=index):
                    total = self._add_gradient(total, trained, self._split.rest, scales, batch)
                trained, states = self._update(trained, states, total[0], jnp.float32(len(chosen)))
                bar.update(len(chosen))
                yield total[1]

        loss = 0.0
        for value in one_behind(steps()):
            loss += float(value)
        return trained, states, loss / len(rows) / self._data.counts.shape[1]

    def _micro_batches(self, rows: np.ndarray, *, epoch: int, number: int) -> Iterator[Batch]:
        for part, padded, weight in micro_batches(rows, self._settings.micro_batch_size):
            tiles = self._data.tiles.read(padded)
            if self._settings.augment:
                key = np.random.SeedSequence([self._settings.seed, epoch, number, part])
                tiles = augment(tiles, seed=int(key.generate_state(1)[0]))
            yield Batch(
                inputs=self._split.frozen_parts(tiles),
                section=jnp.asarray(self._data.section[padded]),
                counts=jnp.asarray(self._data.counts[padded].toarray(), dtype=jnp.float32),
                size_factors=jnp.asarray(self._data.size_factors[padded]),
                weight=jnp.asarray(weight),
            )
