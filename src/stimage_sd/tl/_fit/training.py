"""Train an ensemble of heads in one pass over the data, with one array axis for the members.

Members are independent. On CPUs, groups of a few members are trained, one group per thread. The compiled loop over
minibatches runs on one thread, and the arrays of a few members fit into its cache. The grouping depends only on the
held-out tiles, so results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse as sp
from jax import Array

from stimage_sd._progress import tqdm
from stimage_sd._settings import logger, n_threads
from stimage_sd.likelihood import instances
from stimage_sd.likelihood.heads import HEADS, Parameters
from stimage_sd.nn.accelerator import on_accelerator, one_behind
from stimage_sd.tl._fit.bags import BagFeatures

#: number of minibatches per dense block passed to the compiled loop
_STEPS_PER_BLOCK = 16
#: number of members trained together on a thread
_MEMBERS_PER_GROUP = 2
#: precision of the prior on weights relative to others; single nuclei vary more than the spots that are learned from
_PRECISION = {"weight_nuclei": 3.0, "weight_hidden": 3.0}
#: name of the heads that add up nuclei
INSTANCES = "instances"
#: log-probabilities summed over genes, by name of the heads
_LOG_PROB: dict[str, Any] = {
    **{name: head.summed_log_prob for name, head in HEADS.items()},
    INSTANCES: instances.summed_log_prob,
}


@dataclass(frozen=True)
class TrainingData:
    """Training data of an ensemble.

    - `features`: inputs of the heads, ``float32 (n_tiles, n_features)``. Or ``(n_members, n_tiles, n_features)`` if
      features differ between members. Or `BagFeatures` for heads of nuclei.
    - `counts`: ``(n_tiles, n_genes)`` sparse rows.
    - `size_factors`: ``float32 (n_tiles,)``, ones if size factors are not used.
    - `weight`: ``float32 (n_members, n_tiles)``: number of times a member drew a tile, 0 for tiles not used.
    - `held_out`: ``bool (n_members, n_tiles)``: tiles that a member is validated on.
    """

    features: np.ndarray | BagFeatures
    counts: sp.csr_matrix
    size_factors: np.ndarray
    weight: np.ndarray
    held_out: np.ndarray


class Block(NamedTuple):
    """A sequence of minibatches shared by all members, of which the first `n_steps` count."""

    n_steps: Array
    features: Any
    counts: Array
    size_factors: Array
    weight: Array


class Minibatch(NamedTuple):
    """One minibatch of a block."""

    features: Any
    counts: Array
    size_factors: Array
    weight: Array


def train(
    head: str,
    parameters: Parameters,
    data: TrainingData,
    *,
    max_epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    patience: int,
    seed: int,
) -> tuple[Parameters, list[dict[str, Any]]]:
    """Train each member until its validation loss has not improved for `patience` epochs.

    - `head`: name of the head.
    - `parameters`: initial parameters.
    - `data`: training data.
    - `max_epochs`, `batch_size`, `learning_rate`, `patience`, `seed`: as in `stimage_sd.tl.fit_nb`.
    - `weight_decay`: precision of the Gaussian prior on the weights, relative to the log-likelihood summed over tiles
      and genes.
    - returns: the parameters of each member at its best epoch, and the losses per member and epoch.
    """
    n_members = len(data.weight)
    drawn = data.weight.sum(axis=1)
    decay = (weight_decay / np.maximum(drawn, 1)).astype(np.float32)
    groups = [_Group(members, parameters, decay, learning_rate) for members in _grouped(data.held_out)]
    best_loss, best_epoch = np.full(n_members, np.inf), np.zeros(n_members, dtype=int)
    stopped = np.zeros(n_members, dtype=bool)
    history: list[dict[str, Any]] = []
    random = np.random.default_rng(seed)
    used = np.flatnonzero(data.weight.any(axis=0))
    logger.info(
        "Fitting %d members to %d genes on %d tiles, in at most %d epochs.",
        n_members, data.counts.shape[1], data.counts.shape[0], max_epochs,
    )  # fmt: skip
    with (
        ThreadPoolExecutor(n_threads()) as pool,
        tqdm(total=max_epochs, desc=f"fitting {n_members} members", unit="epoch") as bar,
    ):
        for epoch in range(1, max_epochs + 1):
            learning = [group for group in groups if not stopped[group.members].all()]
            loss, validation = np.zeros(n_members), np.zeros(n_members)
            blocks = _blocks(random.permutation(used), batch_size)
            for parts in one_behind(_learned(learning, pool, head, data, rows) for rows in blocks):
                for group, part in zip(learning, parts, strict=True):
                    loss[group.members] += np.asarray(part)
            judge = partial(_Group.judge, head=head, data=data, batch_size=batch_size)
            for group, part in zip(learning, pool.map(judge, learning), strict=True):
                validation[group.members] = part
            history += _rows(epoch, loss / drawn / data.counts.shape[1], validation, np.flatnonzero(~stopped))
            improved = (validation < best_loss) & ~stopped
            for group in learning:
                group.keep(improved[group.members])
            best_loss = np.where(improved, validation, best_loss)
            best_epoch = np.where(improved, epoch, best_epoch)
            stopped |= epoch - best_epoch >= patience
            bar.update()
            bar.set_postfix(validation_nll=f"{best_loss.mean():.4f}", members=int((~stopped).sum()))
            if stopped.all():
                break
    return _together(groups), history


def _learned(
    groups: list[_Group], pool: ThreadPoolExecutor, head: str, data: TrainingData, rows: _Rows
) -> list[np.ndarray | Array]:
    """Train all groups on a block, and return the loss per member of each."""
    learn = partial(_Group.learn, head=head, data=data, rows=rows, counts=_dense(data.counts, rows))
    return list(pool.map(learn, groups))


def validation_loss(head: str, parameters: Parameters, data: TrainingData, *, batch_size: int) -> np.ndarray:
    """Compute the mean negative log-likelihood per gene and held-out tile, ``(n_members,)``."""
    held = data.held_out.astype(np.float32)
    total = np.zeros(held.shape[0])
    for rows in _blocks(np.flatnonzero(held.any(axis=0)), batch_size):
        block = _block(data, rows, held, slice(None), _dense(data.counts, rows))
        total += np.asarray(_block_loss(parameters, block, head))
    return total / held.sum(axis=1) / data.counts.shape[1]


def _grouped(held_out: np.ndarray) -> list[np.ndarray]:
    """Group members to train together; on CPUs, a few members with the same held-out tiles."""
    if on_accelerator():
        return [np.arange(len(held_out))]
    _, split_of = np.unique(held_out, axis=0, return_inverse=True)
    alike = [np.flatnonzero(split_of.ravel() == split) for split in range(split_of.max() + 1)]
    return [part for members in alike for part in np.array_split(members, -(-len(members) // _MEMBERS_PER_GROUP))]


class _Group:
    """A group of members with their current parameters, best parameters and optimizer state."""

    def __init__(self, members: np.ndarray, parameters: Parameters, decay: np.ndarray, learning_rate: float) -> None:
        self.members = members
        self.best = self._parameters = {name: array[members] for name, array in parameters.items()}
        self._state = optax.adam(learning_rate).init(self._parameters)
        self._decay, self._learning_rate = jnp.asarray(decay[members]), learning_rate

    def learn(self, *, head: str, data: TrainingData, rows: _Rows, counts: Array) -> np.ndarray | Array:
        """Train on a block and return the loss per member. A GPU may not have computed it yet."""
        block = _block(data, rows, data.weight, self.members, counts)
        self._parameters, self._state, loss = _run_block(
            self._parameters, self._state, block, self._decay, head, self._learning_rate
        )
        # on CPUs, a thread of the pool computes one group at a time
        return loss if on_accelerator() else np.asarray(loss)

    def judge(self, *, head: str, data: TrainingData, batch_size: int) -> np.ndarray:
        """Return the validation loss per member."""
        data = replace(data, features=_of_members(data.features, self.members), held_out=data.held_out[self.members])
        return validation_loss(head, self._parameters, data, batch_size=batch_size)

    def keep(self, improved: np.ndarray) -> None:
        """Store the current parameters as best for members that improved."""
        self.best = _choose(improved, self._parameters, self.best)


def _together(groups: list[_Group]) -> Parameters:
    """Return the best parameters of all members in member order."""
    order = np.argsort(np.concatenate([group.members for group in groups]))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *(group.best for group in groups))


class _Rows(NamedTuple):
    """Tiles of the minibatches of a block, with padding marked as not counting."""

    tiles: np.ndarray
    counting: np.ndarray

    @property
    def n_steps(self) -> int:
        """Number of minibatches with tiles that count."""
        return int(self.counting.any(axis=1).sum())


def _blocks(order: np.ndarray, batch_size: int) -> Iterator[_Rows]:
    """Yield blocks of minibatches in the given order, all of one shape, so one loop is compiled."""
    batch_size = min(batch_size, len(order))
    shape = (min(_STEPS_PER_BLOCK, -(-len(order) // batch_size)), batch_size)
    for start in range(0, len(order), shape[0] * shape[1]):
        tiles = np.zeros(shape, dtype=np.int64)
        counting = np.arange(start, start + tiles.size).reshape(shape) < len(order)
        tiles[counting] = order[start : start + tiles.size]
        yield _Rows(tiles, counting)


def _dense(counts: sp.csr_matrix, rows: _Rows) -> Array:
    """``float32 (n_steps, n_batch, n_genes)``."""
    return jnp.asarray(counts[rows.tiles.ravel()].toarray().astype(np.float32).reshape(*rows.tiles.shape, -1))


def _block(data: TrainingData, rows: _Rows, weight: np.ndarray, members: np.ndarray | slice, counts: Array) -> Block:
    """Assemble the arrays of a block for some members."""
    drawn = weight[members][:, rows.tiles] * rows.counting
    return Block(
        n_steps=jnp.asarray(rows.n_steps),
        features=jax.tree.map(jnp.asarray, _minibatches(data.features, rows, members)),
        counts=counts,
        size_factors=jnp.asarray(data.size_factors[rows.tiles]),
        weight=jnp.asarray(np.moveaxis(drawn, 0, 1).astype(np.float32)),
    )


def _minibatches(features: np.ndarray | BagFeatures, rows: _Rows, members: np.ndarray | slice) -> Any:
    """``(n_steps, [n_members,] n_batch, n_features)``, or bags with the steps as leading axis."""
    if isinstance(features, BagFeatures):
        return features.minibatches(rows.tiles, rows.counting, members)
    if features.ndim == 2:
        return features[rows.tiles]
    return np.moveaxis(features[members][:, rows.tiles], 0, 1)


def _of_members(features: np.ndarray | BagFeatures, members: np.ndarray) -> np.ndarray | BagFeatures:
    if isinstance(features, BagFeatures):
        return features.of_members(members)
    return features if features.ndim == 2 else features[members]


def _nll(parameters: Parameters, batch: Minibatch, head: str) -> Array:
    """Return the negative log-likelihood per member, summed over genes and weighted tiles."""
    log_prob = _LOG_PROB[head](parameters, batch.features, batch.counts, batch.size_factors)
    return -(log_prob * batch.weight).sum(axis=-1)


def _at(block: Block, step: Array) -> Minibatch:
    return Minibatch(*jax.tree.map(lambda array: array[step], tuple(block[1:])))


@partial(jax.jit, static_argnames=("head", "learning_rate"), donate_argnums=(1,))
def _run_block(
    parameters: Parameters, state: Any, block: Block, decay: Array, head: str, learning_rate: float
) -> tuple[Parameters, Any, Array]:
    optimizer = optax.adam(learning_rate)

    def objective(parameters: Parameters, batch: Minibatch) -> tuple[Array, Array]:
        nll = _nll(parameters, batch, head)
        tiles = jnp.maximum(batch.weight.sum(axis=-1), 1.0)
        squares = {name: (array**2).sum(axis=(1, 2)) for name, array in parameters.items() if name.startswith("weight")}
        prior = 0.5 * decay * sum(_PRECISION.get(name, 1.0) * square for name, square in squares.items())
        # members share no parameters, so the gradient of the sum is the gradient of each member
        return (nll / tiles + prior).sum(), nll

    def step(index: Array, carry: tuple[Parameters, Any, Array]) -> tuple[Parameters, Any, Array]:
        parameters, state, loss = carry
        (_, nll), gradient = jax.value_and_grad(objective, has_aux=True)(parameters, _at(block, index))
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, update), state, loss + nll

    result: tuple[Parameters, Any, Array] = jax.lax.fori_loop(
        0, block.n_steps, step, (parameters, state, jnp.zeros(len(decay)))
    )
    return result


@partial(jax.jit, static_argnames=("head",))
def _block_loss(parameters: Parameters, block: Block, head: str) -> Array:
    def step(index: Array, loss: Array) -> Array:
        return loss + _nll(parameters, _at(block, index), head)

    result: Array = jax.lax.fori_loop(0, block.n_steps, step, jnp.zeros(block.weight.shape[1]))
    return result


def _choose(improved: np.ndarray, new: Parameters, old: Parameters) -> Parameters:
    mask = jnp.asarray(improved)
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _rows(epoch: int, training: np.ndarray, validation: np.ndarray, members: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "member": member,
            "training_nll": float(training[member]),
            "validation_nll": float(validation[member]),
        }
        for member in members.tolist()
    ]
