"""Training of networks that see one tile at a time: a network's features, and linear layers on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from stimage_sd.models._extractors import Extractor, blank_module, derived_extractor, get_extractor, settings
from stimage_sd.models._network_arrays import network_arrays, put_arrays
from stimage_sd.models._split_network import (
    Read,
    SplitNetwork,
    Trained,
    Unfreeze,
    Unfrozen,
    features_by,
    gradient_sum,
    micro_batches,
    no_gradient,
)
from stimage_sd.models.baselines._recipe import Arrays, SectionData, TrainingSection
from stimage_sd.nn.augmentation import augment
from stimage_sd.nn.negative_binomial_head import Parameters
from stimage_sd.nn.parts import training_parts_of

#: what the names of the network's and the head's arrays begin with among those that a recipe keeps
NETWORK, HEAD = "network.", "head."
#: what training minimises: from the head, a micro-batch's features and the rows of what `learn` was given as measured,
#: by name, to ``float32 (n_tiles,)``; a function of a module, so that what is compiled for it is found again
TileLoss = Callable[[Parameters, jax.Array, dict[str, jax.Array]], jax.Array]
#: mirror images and quarter turns of a tile
N_SYMMETRIES = 8


class TileNetwork(Protocol):
    """Where a recipe's network comes from."""

    def initial(self, *, seed: int, side_px: int) -> Extractor:
        """Give the network as training begins with it, for tiles of a size."""
        ...

    def with_arrays(self, arrays: Arrays, *, normalisation: np.ndarray) -> Extractor:
        """Give the network with arrays that were trained; nothing else of it is read."""
        ...


@dataclass(frozen=True)
class RegisteredNetwork:
    """The network of a registered extractor.

    Attributes
    ----------
    name
        The extractor's name.
    weights
        A safetensors file; None where they are found by themselves.
    """

    name: str
    weights: str | None

    def initial(self, *, seed: int, side_px: int) -> Extractor:
        """Read the weights; see `TileNetwork`."""
        extractor = get_extractor(self.name, weights=self.weights)
        if extractor.input_size not in (None, side_px):
            raise ValueError(
                f"The network {self.name!r} takes tiles of {extractor.input_size} px, found `pixels_px` of {side_px}. "
                f"Give the recipe `pixels_px={extractor.input_size}`."
            )
        return extractor

    def with_arrays(self, arrays: Arrays, *, normalisation: np.ndarray) -> Extractor:
        """Fill a new network; see `TileNetwork`."""
        found = settings(self.name)
        here = normalisation_of(found["mean"], found["std"])
        if not np.array_equal(here, normalisation, equal_nan=True):
            raise ValueError(
                f"The model's network saw tiles normalised by mean and deviation {normalisation.tolist()}, but the "
                f"extractor {self.name!r} that is registered here has {here.tolist()}. Register the one that the model "
                "was trained with."
            )
        module = blank_module(self.name)
        put_arrays(module, arrays, name=self.name)
        return derived_extractor(self.name, module, weights_hash="trained")


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes
    ----------
    unfreeze
        Which parts of the network are.
    optimiser
        Of network and head; it sees the gradient of the sum over a batch.
    epochs, batch_size, micro_batch_size
        Passes over all tiles, tiles a step, tiles in memory at a time.
    seed
        Seed of order, variants and dropout.
    label
        What the progress bar says.
    """

    unfreeze: Unfreeze
    optimiser: optax.GradientTransformation
    epochs: int
    batch_size: int
    micro_batch_size: int
    seed: int
    label: str


def learn(
    extractor: Extractor,
    head: Parameters,
    sections: Sequence[TrainingSection],
    measured: Mapping[str, np.ndarray],
    loss: TileLoss,
    training: Training,
) -> dict[str, np.ndarray]:
    """Train a network and the head on its features; return what a recipe keeps of both.

    Every tile is turned by quarters and mirrored anew in each epoch.

    Parameters
    ----------
    extractor
        Gives the network.
    head
        The head's arrays at the start.
    sections
        To learn from, with pixels.
    measured
        What the loss needs of the measured tiles of all sections, in their order, by name.
    loss
        What is minimised.
    training
        How.

    Returns
    -------
    Arrays of network and head, for `features`; ``loss``, ``float32 (epochs,)``: mean over the tiles of each epoch.
    """
    split, read = SplitNetwork(extractor, training.unfreeze), _reader(sections)
    trained = Trained(split.initial, head)
    state = training.optimiser.init(trained)
    add = _compiled_sum(split.unfrozen, loss)
    update = jax.jit(partial(_updated, training.optimiser))
    n_tiles, losses = sum(len(section.rows) for section in sections), []
    with tqdm(total=training.epochs * n_tiles, desc=training.label, unit="tile") as bar:
        for epoch in range(training.epochs):
            order, summed = np.random.default_rng([training.seed, 3, epoch]).permutation(n_tiles), 0.0
            for number, start in enumerate(range(0, n_tiles, training.batch_size)):
                chosen = order[start : start + training.batch_size]
                total = no_gradient(trained)
                for part, rows, weight in micro_batches(chosen, training.micro_batch_size):
                    draw = np.random.SeedSequence([training.seed, epoch, number, part]).generate_state(2)
                    inputs = split.frozen_parts(augment(read(rows), seed=int(draw[0]), stain_jitter=0.0))
                    here = {name: jnp.asarray(array[rows]) for name, array in measured.items()}
                    key = jax.random.key(int(draw[1]))
                    total = add(total, trained, split.rest, inputs, here, jnp.asarray(weight), key)
                trained, state = update(trained, state, total[0])
                summed += float(total[1])
                bar.update(len(chosen))
            losses.append(summed / n_tiles)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return {
        **{f"{NETWORK}{name}": array for name, array in network_arrays(split.module(trained.network)).items()},
        **{f"{HEAD}{name}": np.asarray(array) for name, array in trained.head.items()},
        "normalisation": normalisation_of(extractor.mean, extractor.std),
        "loss": np.array(losses, dtype=np.float32),
    }


def features(network: TileNetwork, learnt: Arrays, section: SectionData) -> np.ndarray:
    """Features of all tiles of a section by a network that `learn` trained, ``float32 (n_tiles, n_features)``."""
    pixels = _pixels(section)
    return features_by(_trained(network, learnt), lambda rows: pixels[rows], np.arange(len(pixels)), label="features")


def mean_features(network: TileNetwork, learnt: Arrays, section: SectionData) -> np.ndarray:
    """The same, each the mean over the tile's eight symmetries."""
    pixels = _pixels(section)

    def read(rows: np.ndarray) -> np.ndarray:
        return np.stack([_symmetric(pixels[row // N_SYMMETRIES], row % N_SYMMETRIES) for row in rows])

    every = np.arange(N_SYMMETRIES * len(pixels))
    values = features_by(_trained(network, learnt), read, every, label="features of eight symmetries")
    return values.reshape(len(pixels), N_SYMMETRIES, -1).mean(axis=1)


def head_of(learnt: Arrays) -> Parameters:
    """The head that `learn` trained."""
    return {name.removeprefix(HEAD): jnp.asarray(array) for name, array in learnt.items() if name.startswith(HEAD)}


def normalisation_of(mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """Mean and deviation that tiles are normalised by, ``float32 (2, 3)``; NaN where there are none."""
    return np.array([mean or [np.nan] * 3, std or [np.nan] * 3], dtype=np.float32)


def _trained(network: TileNetwork, learnt: Arrays) -> Extractor:
    arrays = {name.removeprefix(NETWORK): array for name, array in learnt.items() if name.startswith(NETWORK)}
    return network.with_arrays(arrays, normalisation=learnt["normalisation"])


def _symmetric(tile: np.ndarray, number: int) -> np.ndarray:
    return np.rot90(tile[:, ::-1] if number >= N_SYMMETRIES // 2 else tile, number % 4)


def _pixels(section: SectionData) -> np.ndarray:
    if section.pixels is None:
        raise ValueError("Expected the tiles' pixels, which this recipe needs, found none.")
    return section.pixels


def _reader(sections: Sequence[TrainingSection]) -> Read:
    """What gives the measured tiles of all sections, numbered in their order, without a copy of them all."""
    pixels = [_pixels(section) for section in sections]
    of = np.repeat(np.arange(len(sections)), [len(section.rows) for section in sections])
    within = np.concatenate([section.rows for section in sections])
    return lambda rows: np.stack([pixels[of[row]][within[row]] for row in rows])


@lru_cache(maxsize=4)
def _compiled_sum(unfrozen: Unfrozen, loss: TileLoss) -> Callable[..., tuple[Trained, jax.Array]]:
    """Compile the sum of gradients once for all fits of one network: a recipe is fitted once a fold."""
    return gradient_sum(partial(_summed, unfrozen, loss))


def _summed(
    unfrozen: Unfrozen, loss: TileLoss, trained: Trained, rest: Any, inputs: jax.Array,
    measured: dict[str, jax.Array], weight: jax.Array, key: jax.Array,
) -> jax.Array:  # fmt: skip
    """Loss of a micro-batch."""
    parts = partial(training_parts_of, key=key)
    values = unfrozen.checkpointed_features(trained.network, rest, inputs, parts=parts)
    return (loss(trained.head, values, measured) * weight).sum()


def _updated(
    optimiser: optax.GradientTransformation, trained: Trained, state: Any, gradient: Trained
) -> tuple[Trained, Any]:
    """One step on a batch's gradient."""
    change, state = optimiser.update(gradient, state, trained)
    return optax.apply_updates(trained, change), state
