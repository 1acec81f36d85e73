"""Training of networks that see one tile at a time: batches of tiles of all sections, in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from stimage_sd.models.baselines._recipe import Arrays, SectionData, Target, TrainingSection, targets
from stimage_sd.models.baselines._training import Batch, arrays_of, kept, restored, train

#: share of the measured tiles that are held out to stop by
HELD_OUT = 0.2
#: a network's inputs by name, each ``(n_tiles, ...)``; ``pixels`` as bytes
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Batching:
    """How many tiles make a step, and go through the network at a time.

    Attributes
    ----------
    step
        Tiles whose mean gradient makes a step.
    micro
        Tiles at a time: what memory and the statistics of normalisation are of.
    """

    step: int
    micro: int

    def per_step(self, n_tiles: int) -> int:
        """Micro-batches that make a step."""
        return -(-n_tiles // (self.steps(n_tiles) * self.micro))

    def steps(self, n_tiles: int) -> int:
        """Steps of an epoch."""
        return -(-n_tiles // self.step)


def learn(
    make: Callable[[int, nnx.Rngs], nnx.Module],
    see: Callable[[SectionData], Inputs],
    sections: Sequence[TrainingSection],
    *,
    target: Target,
    batching: Batching,
    optimiser: optax.GradientTransformation,
    patience: int,
    seed: int,
    **training: Any,
) -> dict[str, np.ndarray]:
    """Train a network on the measured tiles of sections; return what a recipe keeps of it.

    A fifth of the tiles, by chance, is held out. The network that is kept is that of the epoch with the least
    squared error there.

    Parameters
    ----------
    make
        Builds the network for a number of genes.
    see
        What the network sees of a section's tiles.
    sections
        To learn from.
    target
        As in `Recipe`.
    batching
        Sizes of batches.
    optimiser
        What makes a step.
    patience
        Epochs without a lesser error after which training stops.
    seed
        Seed of everything random.
    training
        As in `train`: epochs, label.
    """
    seen = [{name: values[section.rows] for name, values in see(section).items()} for section in sections]
    inputs = {name: np.concatenate([part[name] for part in seen]) for name in seen[0]}
    truth = targets(sections, target)
    if len(truth) < 2:
        raise ValueError(f"Expected two measured tiles or more to learn from, found {len(truth)}.")
    order = np.random.default_rng([seed, 11]).permutation(len(truth))
    n_held = max(1, int(HELD_OUT * len(truth)))
    held, rest = order[:n_held], order[n_held:]
    accumulated = optax.MultiSteps(optimiser, batching.per_step(len(rest))).gradient_transformation()
    best: dict[str, np.ndarray] = {}
    least, since = np.inf, 0
    for network in train(
        partial(make, truth.shape[1]), partial(_epoch, inputs, truth, rest, batching), mean_square,
        optimiser=accumulated, seed=seed, **training,
    ):  # fmt: skip
        predicted = run(network, {name: values[held] for name, values in inputs.items()}, batching.micro)
        error = float(np.mean((predicted - truth[held]) ** 2))
        since += 1
        if error < least or not best:
            best, least, since = arrays_of(network), error, 0
        if since >= patience:
            break
    return kept(best, sections, target)


def predict(
    make: Callable[[int, nnx.Rngs], nnx.Module], learnt: Arrays, inputs: Inputs, *, batching: Batching
) -> np.ndarray:
    """Run a network that `learn` trained on tiles."""
    return run(restored(make, learnt), inputs, batching.micro)


def run(network: Any, inputs: Inputs, micro: int) -> np.ndarray:
    """Run a network on tiles as it predicts, some at a time; ``float32 (n_tiles, n_genes)``."""
    network.eval()
    forward = nnx.jit(lambda net, batch: net(**batch))
    n_tiles = len(inputs["pixels"])
    parts = []
    for start in range(0, n_tiles, micro):
        # the last rows again, so that all are of one length and compiled once
        rows = np.minimum(np.arange(start, start + micro), n_tiles - 1)
        parts.append(np.asarray(forward(network, _as_batch(inputs, rows)))[: n_tiles - start])
    return np.concatenate(parts)


def mean_square(network: Any, batch: Batch, key: jax.Array) -> jax.Array:
    """Mean squared error of log expression."""
    inputs = {name: values for name, values in batch.items() if name != "target"}
    return jnp.mean((network(**inputs) - batch["target"]) ** 2)


def _epoch(
    inputs: Inputs, truth: np.ndarray, chosen: np.ndarray, batching: Batching, random: np.random.Generator
) -> Iterator[Batch]:
    """Micro-batches of some tiles in a new order, as equal in size as can be: of two sizes at most."""
    n_parts = batching.steps(len(chosen)) * batching.per_step(len(chosen))
    for rows in np.array_split(random.permutation(chosen), n_parts):
        yield {**_as_batch(inputs, rows), "target": jnp.asarray(truth[rows])}


def _as_batch(inputs: Inputs, rows: np.ndarray) -> Batch:
    batch = {name: jnp.asarray(values[rows]) for name, values in inputs.items()}
    return {**batch, "pixels": batch["pixels"].astype(jnp.float32) / 255.0}
