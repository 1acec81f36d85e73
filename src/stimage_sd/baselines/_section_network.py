"""Train networks on whole sections or windows of them, with one section or window per batch."""

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
from stimage_sd.baselines._windows import Places
from stimage_sd.likelihood.depth import size_factors
from stimage_sd.models._recipe import Arrays, SectionData, Target, TrainingSection, count_arrays, median_total, targets
from stimage_sd.stats.lattice import neighbor_graph

#: number of neighbors per spot in the graph
NEIGHBORS = 4
#: largest relative change of brightness, contrast and saturation in training
JITTER = 0.5


@dataclass(frozen=True)
class SectionBatch:
    """Inputs and targets of a network for one section or window.

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
    schedule: Callable[[int], optax.Schedule | float],
    augment: bool,
    window: int | None = None,
    **training: Any,
) -> dict[str, np.ndarray]:
    """Train a network with one section or window per step and return the arrays that a recipe keeps.

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
        Learning rate of Adam per step, given the number of steps per epoch.
    augment
        Whether to rotate, mirror and recolor images.
    window
        Largest side of a window, in spots. `None`: whole sections. Windows without a measured tile are left out.
    training
        Further arguments of `train`: epochs, seed, label.
    """
    total = median_total(sections)
    batches = [
        batch
        for part in sections
        for batch in batches_of(part, targets([part], target), size_factors(part.totals, total), window=window)
    ]
    *_, network = train(
        partial(make, batches[0].target.shape[1]), partial(_epoch, batches, augment=augment), loss,
        optimizer=optax.adam(schedule(len(batches))), **training,
    )  # fmt: skip
    return {**arrays_of(network), **count_arrays(sections, target)}


def _epoch(batches: Sequence[SectionBatch], random: np.random.Generator, *, augment: bool) -> Iterator[Batch]:
    for index in random.permutation(len(batches)):
        yield _as_batch(batches[index], random, augment)


def see(section: SectionData, *, window: int | None = None) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Return the tiles of each window and the network inputs: pixels, places within the window, and graph."""
    if section.pixels is None:
        raise ValueError("Expected the tiles' pixels, which this recipe needs, found none.")
    places = Places.of(section)
    seen = []
    for tiles in places.windows(window):
        within = places.column_row[tiles]
        inputs = {"pixels": section.pixels[tiles], "places": (within - within.min(axis=0)).astype(np.int32)}
        seen.append((tiles, {**inputs, "graph": _graph(section.positions[tiles])}))
    return seen


def _graph(positions: np.ndarray) -> np.ndarray:
    """Return the weights of the nearest neighbors, whose rows sum to 1, ``float32 (n_tiles, n_tiles)``."""
    if len(positions) == 1:
        return np.zeros((1, 1), np.float32)
    weights = neighbor_graph(positions, n_neighbors=min(NEIGHBORS, len(positions) - 1)).toarray()
    graph = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return np.asarray(graph, dtype=np.float32)


def predict(
    make: Callable[[int, nnx.Rngs], nnx.Module], learned: Arrays, section: SectionData, *, window: int | None = None
) -> Any:
    """Run a network trained by `learn` on all tiles of a section, window by window."""
    network, run = restored(make, learned), nnx.jit(lambda net, *arguments: net(*arguments))
    tiles, outputs = [], []
    for rows, seen in see(section, window=window):
        pixels = jnp.asarray(seen["pixels"], jnp.float32) / 255.0
        made = run(network, pixels, jnp.asarray(seen["places"]), jnp.asarray(seen["graph"]))
        tiles.append(rows)
        outputs.append(jax.tree.map(np.asarray, made))
    order = np.argsort(np.concatenate(tiles))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[order], *outputs)


def batches_of(
    section: TrainingSection, target: np.ndarray, size_factors: np.ndarray, *, window: int | None
) -> list[SectionBatch]:
    """Return the training batches of a section, one per window with a measured tile."""
    counts, batches = section.counts.toarray().astype(np.float32), []
    for tiles, seen in see(section, window=window):
        measured = np.flatnonzero(np.isin(section.rows, tiles))
        if len(measured):
            rows = np.searchsorted(tiles, section.rows[measured])
            made = {"target": target, "counts": counts, "size_factors": size_factors.astype(np.float32)}
            batches.append(SectionBatch(**seen, rows=rows, **{name: array[measured] for name, array in made.items()}))
    return batches


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
