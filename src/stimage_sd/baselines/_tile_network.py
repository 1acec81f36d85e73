"""Train a pretrained network and a head of linear layers on single tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stimage_sd._progress import tqdm
from stimage_sd.image.augmentation import augment
from stimage_sd.likelihood.heads import Parameters
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._extractors import blank_module, derived_extractor, get_extractor, settings
from stimage_sd.models._network_arrays import network_arrays, put_arrays
from stimage_sd.models._recipe import Arrays, SectionData, TrainingSection
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
from stimage_sd.nn.accelerator import one_behind
from stimage_sd.nn.parts import training_parts_of

#: prefixes of the network's and the head's arrays in the arrays that a recipe keeps
NETWORK, HEAD = "network.", "head."
#: loss per tile, ``float32 (n_tiles,)``, from the head, a micro-batch's features and its rows of `learn`'s `measured`;
#: use a module-level function, so that the compiled code is found again
TileLoss = Callable[[Parameters, jax.Array, dict[str, jax.Array]], jax.Array]
#: number of symmetries of a tile: mirror images and quarter turns
N_SYMMETRIES = 8


class TileNetwork(Protocol):
    """Source of a recipe's network."""

    def initial(self, *, seed: int, side_px: int) -> Extractor:
        """Return the network at the start of training, for tiles of `side_px`."""
        ...

    def with_arrays(self, arrays: Arrays, *, normalization: np.ndarray) -> Extractor:
        """Return the network with trained arrays. No other weights are read."""
        ...


@dataclass(frozen=True)
class RegisteredNetwork:
    """Network of a registered extractor.

    Attributes
    ----------
    name
        Name of the extractor.
    weights
        A safetensors file. `None` finds the weights automatically.
    """

    name: str
    weights: str | None

    def initial(self, *, seed: int, side_px: int) -> Extractor:
        """Read the weights (see `TileNetwork`)."""
        extractor = get_extractor(self.name, weights=self.weights)
        if extractor.input_size not in (None, side_px):
            raise ValueError(
                f"The network {self.name!r} takes tiles of {extractor.input_size} px, found `pixels_px` of {side_px}. "
                f"Give the recipe `pixels_px={extractor.input_size}`."
            )
        return extractor

    def with_arrays(self, arrays: Arrays, *, normalization: np.ndarray) -> Extractor:
        """Fill a new network (see `TileNetwork`)."""
        entry = settings(self.name)
        here = normalization_of(entry["mean"], entry["std"])
        if not np.array_equal(here, normalization, equal_nan=True):
            raise ValueError(
                f"The model's network saw tiles normalized by mean and deviation {normalization.tolist()}, but the "
                f"extractor {self.name!r} that is registered here has {here.tolist()}. Register the one that the model "
                "was trained with."
            )
        module = blank_module(self.name)
        put_arrays(module, arrays, name=self.name)
        return derived_extractor(self.name, module, weights_hash="trained")


@dataclass(frozen=True)
class Training:
    """Settings of the training of a network.

    Attributes
    ----------
    unfreeze
        Parts of the network to train.
    optimizer
        Optimizer of the network and the head. It gets the gradient of the sum over a batch.
    epochs, batch_size, micro_batch_size
        Passes over all tiles, tiles per step, and tiles in memory at a time.
    seed
        Seed of the order, the augmentation and dropout.
    label
        Text of the progress bar.
    """

    unfreeze: Unfreeze
    optimizer: optax.GradientTransformation
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
    """Train a network and a head on its features, and return the arrays that a recipe keeps.

    In every epoch each tile is randomly rotated by quarter turns and mirrored.

    Parameters
    ----------
    extractor
        Extractor with the network.
    head
        Initial arrays of the head.
    sections
        The training sections, with pixels.
    measured
        Arrays for the loss by name, one row per measured tile of all sections, in their order.
    loss
        The loss.
    training
        Settings of the training.

    Returns
    -------
    Arrays of the network and the head, for `features`. ``loss`` is the mean over tiles per epoch,
    ``float32 (epochs,)``.
    """
    split, read = SplitNetwork(extractor, training.unfreeze), _reader(sections)
    trained = Trained(split.initial, head)
    state = training.optimizer.init(trained)
    add = _compiled_sum(split.unfrozen, loss)
    update = jax.jit(partial(_updated, training.optimizer))
    n_tiles, losses = sum(len(section.rows) for section in sections), []

    def steps(epoch: int) -> Iterator[jax.Array]:
        nonlocal trained, state
        order = np.random.default_rng([training.seed, 3, epoch]).permutation(n_tiles)
        for batch, start in enumerate(range(0, n_tiles, training.batch_size)):
            chosen = order[start : start + training.batch_size]
            total = no_gradient(trained)
            for part, rows, weight in micro_batches(chosen, training.micro_batch_size):
                draw = np.random.SeedSequence([training.seed, epoch, batch, part]).generate_state(2)
                inputs = split.frozen_parts(augment(read(rows), seed=int(draw[0]), stain_jitter=0.0))
                here = {name: jnp.asarray(array[rows]) for name, array in measured.items()}
                key = jax.random.key(int(draw[1]))
                total = add(total, trained, split.rest, inputs, here, jnp.asarray(weight), key)
            trained, state = update(trained, state, total[0])
            bar.update(len(chosen))
            yield total[1]

    with tqdm(total=training.epochs * n_tiles, desc=training.label, unit="tile") as bar:
        for epoch in range(training.epochs):
            summed = 0.0
            for value in one_behind(steps(epoch)):
                summed += float(value)
            losses.append(summed / n_tiles)
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return {
        **{f"{NETWORK}{name}": array for name, array in network_arrays(split.module(trained.network)).items()},
        **{f"{HEAD}{name}": np.asarray(array) for name, array in trained.head.items()},
        "normalization": normalization_of(extractor.mean, extractor.std),
        "loss": np.array(losses, dtype=np.float32),
    }


def features(network: TileNetwork, learned: Arrays, section: SectionData) -> np.ndarray:
    """Return the trained network's features of all tiles of a section, ``float32 (n_tiles, n_features)``."""
    pixels = _pixels(section)
    return features_by(_trained(network, learned), lambda rows: pixels[rows], np.arange(len(pixels)), label="features")


def mean_features(network: TileNetwork, learned: Arrays, section: SectionData) -> np.ndarray:
    """Return the features as in `features`, averaged over the eight symmetries of each tile."""
    pixels = _pixels(section)

    def read(rows: np.ndarray) -> np.ndarray:
        return np.stack([_symmetric(pixels[row // N_SYMMETRIES], row % N_SYMMETRIES) for row in rows])

    every = np.arange(N_SYMMETRIES * len(pixels))
    values = features_by(_trained(network, learned), read, every, label="features of eight symmetries")
    return values.reshape(len(pixels), N_SYMMETRIES, -1).mean(axis=1)


def head_of(learned: Arrays) -> Parameters:
    """Return the head that `learn` trained."""
    return {name.removeprefix(HEAD): jnp.asarray(array) for name, array in learned.items() if name.startswith(HEAD)}


def normalization_of(mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """Return mean and deviation of the tile normalization, ``float32 (2, 3)``, NaN without normalization."""
    return np.array([mean or [np.nan] * 3, std or [np.nan] * 3], dtype=np.float32)


def _trained(network: TileNetwork, learned: Arrays) -> Extractor:
    arrays = {name.removeprefix(NETWORK): array for name, array in learned.items() if name.startswith(NETWORK)}
    return network.with_arrays(arrays, normalization=learned["normalization"])


def _symmetric(tile: np.ndarray, symmetry: int) -> np.ndarray:
    return np.rot90(tile[:, ::-1] if symmetry >= N_SYMMETRIES // 2 else tile, symmetry % 4)


def _pixels(section: SectionData) -> np.ndarray:
    if section.pixels is None:
        raise ValueError("Expected the tiles' pixels, which this recipe needs, found none.")
    return section.pixels


def _reader(sections: Sequence[TrainingSection]) -> Read:
    """Return a function that reads measured tiles by their number over all sections, without copying all tiles."""
    pixels = [_pixels(section) for section in sections]
    of = np.repeat(np.arange(len(sections)), [len(section.rows) for section in sections])
    within = np.concatenate([section.rows for section in sections])
    return lambda rows: np.stack([pixels[of[row]][within[row]] for row in rows])


@lru_cache(maxsize=4)
def _compiled_sum(unfrozen: Unfrozen, loss: TileLoss) -> Callable[..., tuple[Trained, jax.Array]]:
    """Compile the sum of gradients once per network, because a recipe is fitted once per fold."""
    return gradient_sum(partial(_summed, unfrozen, loss))


def _summed(
    unfrozen: Unfrozen, loss: TileLoss, trained: Trained, rest: Any, inputs: jax.Array,
    measured: dict[str, jax.Array], weight: jax.Array, key: jax.Array,
) -> jax.Array:  # fmt: skip
    """Compute the weighted loss of a micro-batch."""
    parts = partial(training_parts_of, key=key)
    values = unfrozen.checkpointed_features(trained.network, rest, inputs, parts=parts)
    return (loss(trained.head, values, measured) * weight).sum()


def _updated(
    optimizer: optax.GradientTransformation, trained: Trained, state: Any, gradient: Trained
) -> tuple[Trained, Any]:
    """Apply one optimizer step to a batch's gradient."""
    change, state = optimizer.update(gradient, state, trained)
    return optax.apply_updates(trained, change), state
