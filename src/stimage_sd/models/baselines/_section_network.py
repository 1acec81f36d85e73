"""Training of networks that see all spots of a section at once: a section is a batch."""

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

from stimage_sd.models.baselines._recipe import Arrays, SectionData, Target, TrainingSection, median_total, targets
from stimage_sd.models.baselines._training import Batch, Loss, arrays_of, kept, restored, train
from stimage_sd.nn.lattice import find_lattice, neighbour_graph

#: spots that are a spot's neighbours in the graph
NEIGHBOURS = 4
#: shares of brightness, contrast and saturation that a picture's colours are changed by in training
JITTER = 0.5


@dataclass(frozen=True)
class SectionBatch:
    """All that a network sees of a section, and what it is to say.

    Attributes
    ----------
    pixels
        ``uint8 (n_tiles, side, side, 3)``.
    places
        ``int32 (n_tiles, 2)``: column and row on the lattice.
    graph
        ``float32 (n_tiles, n_tiles)``: rows are the neighbours' weights, their sum 1.
    rows
        ``int (n_measured,)``: tiles that were measured.
    target
        ``float32 (n_measured, n_genes)``: log expression.
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
    """Train a network on sections, a section a step; return what a recipe keeps of it.

    Parameters
    ----------
    make
        Builds the network for a number of genes.
    sections
        To learn from.
    loss
        What is minimised; a batch has the arrays of `SectionBatch`, with ``pixels`` float32, 0 to 1.
    target
        As in `Recipe`.
    schedule
        Learning rate of Adam, by step.
    augment
        Whether pictures are turned, mirrored and changed in colour.
    training
        As in `train`: epochs, seed, label.
    """
    total = median_total(sections)
    batches = [batch_of(part, targets([part], target), part.totals / total) for part in sections]
    *_, network = train(
        partial(make, batches[0].target.shape[1]), partial(_epoch, batches, augment=augment), loss,
        optimiser=optax.adam(schedule), **training,
    )  # fmt: skip
    return kept(arrays_of(network), sections, target)


def _epoch(batches: Sequence[SectionBatch], random: np.random.Generator, *, augment: bool) -> Iterator[Batch]:
    for number in random.permutation(len(batches)):
        yield _as_batch(batches[number], random, augment)


def see(section: SectionData) -> dict[str, np.ndarray]:
    """What a network sees of a section: pixels, places and graph."""
    if section.pixels is None:
        raise ValueError("Expected the tiles' pixels, which this recipe needs, found none.")
    try:
        lattice = find_lattice(section.positions)
        places = np.stack([lattice.column, lattice.row], axis=1)
    except ValueError:  # tiles that stand on no lattice have places by the usual distance of neighbours
        nearest = neighbour_graph(section.positions, n_neighbours=1)
        pitch = np.median([np.linalg.norm(section.positions[a] - section.positions[b]) for a, b in _pairs(nearest)])
        places = np.round((section.positions - section.positions.min(axis=0)) / max(pitch, 1e-6)).astype(int)
    weights = neighbour_graph(section.positions, n_neighbours=min(NEIGHBOURS, len(section.positions) - 1)).toarray()
    graph = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return {"pixels": section.pixels, "places": places.astype(np.int32), "graph": graph.astype(np.float32)}


def _pairs(graph: Any) -> list[tuple[int, int]]:
    rows, columns = graph.nonzero()
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def predict(make: Callable[[int, nnx.Rngs], nnx.Module], learnt: Arrays, section: SectionData) -> Any:
    """Run a network that `learn` trained on all tiles of a section."""
    seen = see(section)
    pixels = jnp.asarray(seen["pixels"], jnp.float32) / 255.0
    run = nnx.jit(lambda net, *arguments: net(*arguments))
    return run(restored(make, learnt), pixels, jnp.asarray(seen["places"]), jnp.asarray(seen["graph"]))


def batch_of(section: TrainingSection, target: np.ndarray, size_factors: np.ndarray) -> SectionBatch:
    """Put together what a network is trained on."""
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
    """Turn, mirror and recolour all pictures of a section alike, as the section itself would be."""
    if random.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    pixels = np.rot90(pixels, int(random.integers(4)), axes=(1, 2))
    brightness, contrast, saturation = random.uniform(1 - JITTER, 1 + JITTER, 3)
    pixels = pixels * brightness
    pixels = (pixels - pixels.mean()) * contrast + pixels.mean()
    grey = pixels.mean(axis=-1, keepdims=True)
    return np.clip((pixels - grey) * saturation + grey, 0.0, 1.0).astype(np.float32)


def mean_square(network: Any, batch: Batch, key: jax.Array) -> jax.Array:
    """Mean squared error of log expression on the measured tiles."""
    predicted = network(batch["pixels"], batch["places"], batch["graph"])[batch["rows"]]
    return jnp.mean((predicted - batch["target"]) ** 2)
