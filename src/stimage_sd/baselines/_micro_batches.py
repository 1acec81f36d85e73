"""Train networks on single tiles, in micro-batches of tiles from all sections."""

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

from stimage_sd.baselines._training import Batch, arrays_of, restored, train
from stimage_sd.models._recipe import Arrays, SectionData, Target, TrainingSection, count_arrays, targets

#: share of the measured tiles that are held out for early stopping
HELD_OUT = 0.2
#: inputs of a network by name, ``(n_tiles, ...)`` arrays; ``pixels`` as bytes
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Batching:
    """Numbers of tiles per step and per micro-batch.

    Attributes
    ----------
    step
        Tiles per step, whose mean gradient is used.
    micro
        Tiles per micro-batch. It sets the memory use and the batch of normalization statistics.
    """

    step: int
    micro: int

    def per_step(self, n_tiles: int) -> int:
        """Return the number of micro-batches per step."""
        return -(-n_tiles // (self.steps(n_tiles) * self.micro))

    def steps(self, n_tiles: int) -> int:
        """Return the number of steps per epoch."""
        return -(-n_tiles // self.step)


def learn(
    make: Callable[[int, nnx.Rngs], nnx.Module],
    see: Callable[[SectionData], Inputs],
    sections: Sequence[TrainingSection],
    *,
    target: Target,
    batching: Batching,
    optimizer: optax.GradientTransformation,
    patience: int,
    seed: int,
    **training: Any,
) -> dict[str, np.ndarray]:
    """Train a network on the measured tiles of sections and return the arrays that a recipe keeps.

    A random fifth of the tiles is held out. The network of the epoch with the least squared error on them is kept.

    Parameters
    ----------
    make
        Builds the network for a number of genes.
    see
        Computes the network's inputs for the tiles of a section.
    sections
        The training sections.
    target
        As in `Recipe`.
    batching
        Batch sizes.
    optimizer
        The optimizer.
    patience
        Number of epochs without a lower error after which training stops.
    seed
        Seed of all random numbers.
    training
        Further arguments of `train`: epochs, label.
    """
    seen = [{name: values[section.rows] for name, values in see(section).items()} for section in sections]
    inputs = {name: np.concatenate([part[name] for part in seen]) for name in seen[0]}
    truth = targets(sections, target)
    if len(truth) < 2:
        raise ValueError(f"Expected two measured tiles or more to learn from, found {len(truth)}.")
    order = np.random.default_rng([seed, 11]).permutation(len(truth))
    n_held = max(1, int(HELD_OUT * len(truth)))
    held, rest = order[:n_held], order[n_held:]
    accumulated = optax.MultiSteps(optimizer, batching.per_step(len(rest))).gradient_transformation()
    best: dict[str, np.ndarray] = {}
    least, since = np.inf, 0
    for network in train(
        partial(make, truth.shape[1]), partial(_epoch, inputs, truth, rest, batching), mean_square,
        optimizer=accumulated, seed=seed, **training,
    ):  # fmt: skip
        predicted = run(network, {name: values[held] for name, values in inputs.items()}, batching.micro)
        error = float(np.mean((predicted - truth[held]) ** 2))
        since += 1
        if error < least or not best:
            best, least, since = arrays_of(network), error, 0
        if since >= patience:
            break
    return {**best, **count_arrays(sections, target)}


def predict(
    make: Callable[[int, nnx.Rngs], nnx.Module], learned: Arrays, inputs: Inputs, *, batching: Batching
) -> np.ndarray:
    """Run a network trained by `learn` on tiles."""
    return run(restored(make, learned), inputs, batching.micro)


def run(network: Any, inputs: Inputs, micro: int) -> np.ndarray:
    """Run a network in evaluation mode on tiles and return ``float32 (n_tiles, n_genes)``."""
    network.eval()
    forward = nnx.jit(lambda net, batch: net(**batch))
    n_tiles = len(inputs["pixels"])
    parts = []
    for start in range(0, n_tiles, micro):
        # pad with the last row, so that all micro-batches have one length and compile once
        rows = np.minimum(np.arange(start, start + micro), n_tiles - 1)
        parts.append(np.asarray(forward(network, _as_batch(inputs, rows)))[: n_tiles - start])
    return np.concatenate(parts)


def mean_square(network: Any, batch: Batch, key: jax.Array) -> jax.Array:
    """Compute the mean squared error of log expression."""
    inputs = {name: values for name, values in batch.items() if name != "target"}
    return jnp.mean((network(**inputs) - batch["target"]) ** 2)


def _epoch(
    inputs: Inputs, truth: np.ndarray, chosen: np.ndarray, batching: Batching, random: np.random.Generator
) -> Iterator[Batch]:
    """Yield micro-batches of the chosen tiles in random order, in at most two sizes."""
    n_parts = batching.steps(len(chosen)) * batching.per_step(len(chosen))
    for rows in np.array_split(random.permutation(chosen), n_parts):
        yield {**_as_batch(inputs, rows), "target": jnp.asarray(truth[rows])}


def _as_batch(inputs: Inputs, rows: np.ndarray) -> Batch:
    batch = {name: jnp.asarray(values[rows]) for name, values in inputs.items()}
    return {**batch, "pixels": batch["pixels"].astype(jnp.float32) / 255.0}
