"""Train networks on whole sections, with one section per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from stimage_sd.baselines._training import Batch, Loss, arrays_of, restored, train
from stimage_sd.likelihood.depth import size_factors
from stimage_sd.models._recipe import Arrays, SectionData, Target, TrainingSection, count_arrays, median_total, targets
from stimage_sd.stats.lattice import find_lattice, neighbor_graph

#: number of neighbors per spot in the graph
NEIGHBORS = 4
#: largest relative change of brightness, contrast and saturation in training
JITTER = 0.5


@dataclass(frozen=True)
class SectionBatch:
    """Inputs and targets of a network for one section.

    Attributes
    ----------
    pixels
        ``uint8 (n_tiles, side, side, 3)``.
    places
        Column and row on the lattice, ``int32 (n_tiles, 2)``.
    graph
        Weights of the neighbors, ``float32 (n_tiles, n_tiles)``. Each row sums to 1.
    rows
        Measured tiles, ``int (n_measured,)``.
    target
        Log expression, ``float32 (n_measured, n_genes)``.
    counts
        ``float32 (n_measured, n_genes)``.
    size_factors
        ``float32 (n_measured,)``.
    """

    pixels: np.ndarray
    places: np.ndarray
    graph: np.ndarray
    rows: np.ndarray
    target: np.ndarray
    counts: np.ndarray
    size_factors: np.ndarray


def learn(
    make: Callable[[int, nnx.Rngs], nnx.Module],
    sections: Sequence[TrainingSection],
    loss: Loss,
    *,
    target: Target,
    schedule: optax.Schedule | float,
    augment: bool,
    **training: Any,
) -> dict[str, np.ndarray]:
    """Train a network with one section per step and return the arrays that a recipe keeps.

    Parameters
    ----------
    make
        Builds the network for a number of genes.
    sections
        The training sections.
    loss
        The loss. A batch has the arrays of `SectionBatch`, with ``pixels`` as float32, 0 to 1.
    target
        As in `Recipe`.
    schedule
        Learning rate of Adam per step.
    augment
        Whether to rotate, mirror and recolor images.
    training
        Further arguments of `train`: epochs, seed, label.
    """
    total = median_total(sections)
    batches = [batch_of(part, targets([part], target), size_factors(part.totals, total)) for part in sections]
    *_, network = train(
        partial(make, batches[0].target.shape[1]), partial(_epoch, batches, augment=augment), loss,
        optimizer=optax.adam(schedule), **training,
    )  # fmt: skip
    return {**arrays_of(network), **count_arrays(sections, target)}


def _epoch(batches: Sequence[SectionBatch], random: np.random.Generator, *, augment: bool) -> Iterator[Batch]:
    for index in random.permutation(len(batches)):
        yield _as_batch(batches[index], random, augment)


def see(section: SectionData) -> dict[str, np.ndarray]:
    """Return the network inputs of a section: pixels, places and graph."""
    if section.pixels is None:
        raise ValueError("Expected the tiles' pixels, which this recipe needs, found none.")
    try:
        lattice = find_lattice(section.positions)
        places = np.stack([lattice.column, lattice.row], axis=1)
    except ValueError:  # tiles off a lattice get places in units of the median distance between neighbors
        nearest = neighbor_graph(section.positions, n_neighbors=1)
        pitch = np.median([np.linalg.norm(section.positions[a] - section.positions[b]) for a, b in _pairs(nearest)])
        places = np.round((section.positions - section.positions.min(axis=0)) / max(pitch, 1e-6)).astype(int)
    weights = neighbor_graph(section.positions, n_neighbors=min(NEIGHBORS, len(section.positions) - 1)).toarray()
    graph = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return {"pixels": section.pixels, "places": places.astype(np.int32), "graph": graph.astype(np.float32)}


def _pairs(graph: Any) -> list[tuple[int, int]]:
    rows, columns = graph.nonzero()
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def predict(make: Callable[[int, nnx.Rngs], nnx.Module], learned: Arrays, section: SectionData) -> Any:
    """Run a network trained by `learn` on all tiles of a section."""
    seen = see(section)
    pixels = jnp.asarray(seen["pixels"], jnp.float32) / 255.0
    run = nnx.jit(lambda net, *arguments: net(*arguments))
    return run(restored(make, learned), pixels, jnp.asarray(seen["places"]), jnp.asarray(seen["graph"]))


def batch_of(section: TrainingSection, target: np.ndarray, size_factors: np.ndarray) -> SectionBatch:
    """Return the training batch of a section."""
    counts = section.counts.toarray().astype(np.float32)
    return SectionBatch(
        **see(section), rows=section.rows, target=target, counts=counts, size_factors=size_factors.astype(np.float32)
    )


def _as_batch(batch: SectionBatch, random: np.random.Generator, augment: bool) -> Batch:
    pixels = batch.pixels.astype(np.float32) / 255.0
    if augment:
        pixels = _augmented(pixels, random)
    arrays = {name: getattr(batch, name) for name in ("places", "graph", "rows", "target", "counts", "size_factors")}
    return {"pixels": jnp.asarray(pixels), **{name: jnp.asarray(array) for name, array in arrays.items()}}


def _augmented(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rotate, mirror and recolor all images of a section alike."""
    if random.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    pixels = np.rot90(pixels, int(random.integers(4)), axes=(1, 2))
    brightness, contrast, saturation = random.uniform(1 - JITTER, 1 + JITTER, 3)
    pixels = pixels * brightness
    pixels = (pixels - pixels.mean()) * contrast + pixels.mean()
    gray = pixels.mean(axis=-1, keepdims=True)
    return np.clip((pixels - gray) * saturation + gray, 0.0, 1.0).astype(np.float32)


def mean_square(network: Any, batch: Batch, key: jax.Array) -> jax.Array:
    """Compute the mean squared error of log expression on the measured tiles."""
    predicted = network(batch["pixels"], batch["places"], batch["graph"])[batch["rows"]]
    return jnp.mean((predicted - batch["target"]) ** 2)
