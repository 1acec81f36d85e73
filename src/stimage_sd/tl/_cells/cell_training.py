"""Training of a HoVer-Net, with validation and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from stimage_sd._progress import tqdm
from stimage_sd._settings import logger
from stimage_sd.nn.accelerator import one_behind
from stimage_sd.nn.hovernet import HoVerNet, HoVerNetSize, as_trained
from stimage_sd.nn.hovernet_loss import CellTargets, cell_losses
from stimage_sd.tl._cells.cell_tiles import CellTiles
from stimage_sd.tl._fit.checkpoint import read_named, read_tree, write_state

#: gradients are clipped to this norm
_LONGEST = 5.0


@dataclass(frozen=True)
class CellSettings:
    """Training settings, as in `stimage_sd.tl.fit_cell_classifier`."""

    size: HoVerNetSize
    n_epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    augment: bool
    seed: int


class CellRun:
    """Training run that can resume from a checkpoint.

    - `network`: the initial network.
    - `tiles`: tiles for training and validation.
    - `held_out`: tiles for validation, ``bool (n_tiles,)``. Without validation tiles, the last epoch's network is kept.
    - `class_weights`: weights of background and classes in the loss, ``float32 (n_classes + 1,)``.
    - `settings`: training settings.
    - `checkpoint`: folder of the state.
    """

    def __init__(
        self, network: HoVerNet, tiles: CellTiles, held_out: np.ndarray, class_weights: np.ndarray,
        settings: CellSettings, checkpoint: Path | None,
    ) -> None:  # fmt: skip
        self._tiles, self._settings, self._checkpoint = tiles, settings, checkpoint
        self._training, self._validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        split: Any = nnx.split(network, nnx.Param, ...)
        self._graph, parameters, statistics = split
        n_steps = settings.n_epochs * -(-len(self._training) // settings.batch_size)
        rates = Rates(*map(jnp.float32, (settings.learning_rate, n_steps, settings.weight_decay)))
        self._state = (parameters, statistics, _optimizer(rates).init(parameters))
        self._best = (parameters, statistics)
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        weights = jnp.asarray(class_weights)
        self._step = partial(_stepped, self._graph, weights, rates)
        self._losses = partial(_validated, self._graph, weights)

    def start(self, fingerprint: Mapping[str, Any]) -> None:
        """Resume from the checkpoint, if there is one of the same run."""
        self._fingerprint = dict(fingerprint)
        kept = None if self._checkpoint is None else read_named(self._checkpoint, run=self._fingerprint)
        if kept is None or self._checkpoint is None:
            return
        self._state, self._best = read_tree(self._checkpoint, (self._state, self._best))
        self.history, self.best_epoch = kept[1]["history"], kept[1]["best_epoch"]

    def train(self) -> None:
        """Run the remaining epochs."""
        settings, n_training = self._settings, len(self._training)
        total, done = settings.n_epochs * n_training, len(self.history)
        logger.info("Learning cells on %d tiles, in %d epochs; %d are done.", n_training, settings.n_epochs, done)
        with tqdm(total=total, initial=done * n_training, desc="learning cells", unit="tile") as bar:
            for epoch in range(done + 1, settings.n_epochs + 1):
                losses = self._epoch(epoch, bar)
                row = {"epoch": epoch, **{f"training_{name}": value for name, value in losses.items()}}
                if len(self._validation):
                    row |= {f"validation_{name}": value for name, value in self._validated().items()}
                self.history.append(row)
                judged = "validation_loss" if len(self._validation) else "training_loss"
                if not len(self._validation) or row[judged] <= min(past[judged] for past in self.history):
                    self._best, self.best_epoch = self._state[:2], epoch
                bar.set_postfix({judged: f"{row[judged]:.3f}"})
                self._write()

    def network(self) -> nnx.Module:
        """Return the best epoch's network with NumPy arrays."""
        return nnx.merge(self._graph, *jax.tree.map(np.asarray, self._best))

    def _epoch(self, epoch: int, bar: Any) -> dict[str, float]:
        settings = self._settings
        order = np.random.default_rng([settings.seed, epoch]).permutation(self._training)
        sums = np.zeros(3)

        def steps() -> Iterator[tuple[int, Array]]:
            for index, start in enumerate(range(0, len(order), settings.batch_size)):
                rows = order[start : start + settings.batch_size]
                key = np.random.SeedSequence([settings.seed, epoch, index]).generate_state(1)[0]
                batch = self._tiles.batch(rows, settings.batch_size, seed=int(key) if settings.augment else None)
                self._state, losses = self._step(self._state, *batch)
                bar.update(len(rows))
                yield len(rows), losses

        for n_rows, losses in one_behind(steps()):
            sums += n_rows * np.asarray(losses, dtype=float)
        return _named(sums / len(order))

    def _validated(self) -> dict[str, float]:
        size = self._settings.batch_size
        sums = np.zeros(3)
        for start in range(0, len(self._validation), size):
            rows = self._validation[start : start + size]
            losses = self._losses(self._state[:2], *self._tiles.batch(rows, size, seed=None))
            sums += len(rows) * np.asarray(losses, dtype=float)
        return _named(sums / len(self._validation))

    def _write(self) -> None:
        if self._checkpoint is not None:
            about = {"history": self.history, "best_epoch": self.best_epoch}
            tree = (self._state, self._best)
            write_state(self._checkpoint, tree, named={}, about=about, run=self._fingerprint)


def _named(losses: np.ndarray) -> dict[str, float]:
    parts = dict(zip(("nuclear", "distances", "types"), losses.tolist(), strict=True))
    return {"loss": float(losses.sum()), **parts}


class Rates(NamedTuple):
    """Numbers of the optimizer. They are arguments of the compiled step, so one compilation serves every setting."""

    learning_rate: Array
    n_steps: Array
    weight_decay: Array


def _optimizer(rates: Rates) -> optax.GradientTransformation:
    """Return AdamW on clipped gradients, with a learning rate that falls to zero along half a cosine."""

    def rate(step: Array) -> Array:
        done = jnp.minimum(step / rates.n_steps, 1.0)
        return rates.learning_rate * (1 + jnp.cos(jnp.pi * done)) / 2

    decay: Any = rates.weight_decay
    return optax.chain(optax.clip_by_global_norm(_LONGEST), optax.adamw(rate, weight_decay=decay))


@partial(jax.jit, static_argnums=0)
def _stepped(
    graph: Any,
    weights: Array,
    rates: Rates,
    state: tuple[Any, Any, Any],
    pictures: Array,
    targets: CellTargets,
) -> tuple[tuple[Any, Any, Any], Array]:
    """Run a training step, and return the new state and the loss terms before the step."""
    parameters, statistics, memory = state

    def loss(trained: Any) -> tuple[Array, tuple[Any, Array]]:
        network = nnx.merge(graph, trained, statistics, copy=True)
        nuclear, hv, types, _ = network(pictures, as_trained)
        parts = jnp.stack(cell_losses((nuclear, hv, types), targets, weights))
        return parts.sum(), (nnx.state(network, nnx.Not(nnx.Param)), parts)

    (_, (followed, parts)), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
    change, memory = _optimizer(rates).update(gradient, memory, parameters)
    return (optax.apply_updates(parameters, change), followed, memory), parts


@partial(jax.jit, static_argnums=0)
def _validated(graph: Any, weights: Array, state: tuple[Any, Any], pictures: Array, targets: CellTargets) -> Array:
    nuclear, hv, types, _ = nnx.merge(graph, *state)(pictures)
    return jnp.stack(cell_losses((nuclear, hv, types), targets, weights))
