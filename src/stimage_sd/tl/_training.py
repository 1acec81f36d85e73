"""Training of an ensemble of heads: one array axis for the members, one pass over the data for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse as sp
from jax import Array
from tqdm.auto import tqdm

from stimage_sd.nn.negative_binomial_head import HEADS, Parameters

#: minibatches that are made dense and handed to the compiled loop at a time
_STEPS_PER_BLOCK = 16


@dataclass(frozen=True)
class TrainingData:
    """What an ensemble is trained on.

    Attributes
    ----------
    features
        What the heads see: ``float32 (n_tiles, n_features)``, or ``(n_members, n_tiles, n_features)`` where each member
        has its own.
    counts
        ``(n_tiles, n_genes)`` sparse rows.
    size_factors
        ``float32 (n_tiles,)``; ones without.
    weight
        ``float32 (n_members, n_tiles)``: how often a member drew a tile; 0 for those it does not see.
    held_out
        ``bool (n_members, n_tiles)``: the tiles a member is validated on.
    """

    features: np.ndarray
    counts: sp.csr_matrix
    size_factors: np.ndarray
    weight: np.ndarray
    held_out: np.ndarray


class Block(NamedTuple):
    """A run of minibatches, each shared by all members."""

    features: Array
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
    """Train every member until its own validation loss has not improved for `patience` epochs.

    Parameters
    ----------
    head
        Name of the head.
    parameters
        Where to start.
    data
        What to train on.
    max_epochs, batch_size, learning_rate, patience, seed
        As in `stimage_sd.tl.fit_nb`.
    weight_decay
        Precision of the Gaussian prior on the weights, against the log-likelihood summed over tiles and genes.

    Returns
    -------
    Each member's parameters at its best epoch, and the losses a member and epoch.
    """
    n_members = len(data.weight)
    optimiser = optax.adam(learning_rate)
    state = optimiser.init(parameters)
    drawn = data.weight.sum(axis=1)
    decay = jnp.asarray(weight_decay / np.maximum(drawn, 1), dtype=jnp.float32)
    best, best_loss, best_epoch = parameters, np.full(n_members, np.inf), np.zeros(n_members, dtype=int)
    history: list[dict[str, Any]] = []
    random = np.random.default_rng(seed)
    seen = np.flatnonzero(data.weight.any(axis=0))
    with tqdm(total=max_epochs, desc=f"fitting {n_members} members", unit="epoch") as bar:
        for epoch in range(1, max_epochs + 1):
            loss = np.zeros(n_members)
            for block in _blocks(data, random.permutation(seen), batch_size, data.weight):
                parameters, state, part = _run_block(parameters, state, block, decay, head, learning_rate)
                loss += np.asarray(part)
            validation = validation_loss(head, parameters, data, batch_size=batch_size)
            history += _rows(epoch, loss / drawn / data.counts.shape[1], validation)
            improved = validation < best_loss
            best = _choose(improved, parameters, best)
            best_loss = np.where(improved, validation, best_loss)
            best_epoch = np.where(improved, epoch, best_epoch)
            bar.update()
            bar.set_postfix(validation_nll=f"{best_loss.mean():.4f}")
            if (epoch - best_epoch >= patience).all():
                break
    return best, history


def validation_loss(head: str, parameters: Parameters, data: TrainingData, *, batch_size: int) -> np.ndarray:
    """Mean negative log-likelihood a gene and held-out tile, ``(n_members,)``."""
    held = data.held_out.astype(np.float32)
    rows = np.flatnonzero(held.any(axis=0))
    total = np.zeros(held.shape[0])
    for block in _blocks(data, rows, batch_size, held):
        total += np.asarray(_block_loss(parameters, block, head))
    return total / held.sum(axis=1) / data.counts.shape[1]


def _blocks(data: TrainingData, order: np.ndarray, batch_size: int, weight: np.ndarray) -> Iterator[Block]:
    """Blocks of minibatches in an order; the last minibatch is filled up with tiles of no weight."""
    batch_size = min(batch_size, len(order))
    for start in range(0, len(order), _STEPS_PER_BLOCK * batch_size):
        rows = order[start : start + _STEPS_PER_BLOCK * batch_size]
        shape = (-(-len(rows) // batch_size), batch_size)
        padded = np.concatenate([rows, np.zeros(shape[0] * batch_size - len(rows), dtype=rows.dtype)])
        member_weight = weight[:, padded].astype(np.float32)
        member_weight[:, len(rows) :] = 0
        yield Block(
            features=jnp.asarray(_minibatches(data.features, padded, shape)),
            counts=jnp.asarray(data.counts[padded].toarray().astype(np.float32).reshape(*shape, -1)),
            size_factors=jnp.asarray(data.size_factors[padded].reshape(shape)),
            weight=jnp.asarray(np.moveaxis(member_weight.reshape(-1, *shape), 0, 1)),
        )


def _minibatches(features: np.ndarray, rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``(n_steps, [n_members,] n_batch, n_features)``."""
    if features.ndim == 2:
        return features[rows].reshape(*shape, -1)
    return np.moveaxis(features[:, rows].reshape(len(features), *shape, -1), 0, 1)


def _nll(parameters: Parameters, batch: Block, head: str) -> Array:
    """Negative log-likelihood, summed over genes and (weighted) tiles, a member."""
    log_prob = HEADS[head].log_prob(parameters, batch.features, batch.counts, batch.size_factors)
    return -(log_prob.sum(axis=-1) * batch.weight).sum(axis=-1)


@partial(jax.jit, static_argnames=("head", "learning_rate"), donate_argnums=(1,))
def _run_block(
    parameters: Parameters, state: Any, block: Block, decay: Array, head: str, learning_rate: float
) -> tuple[Parameters, Any, Array]:
    optimiser = optax.adam(learning_rate)

    def objective(parameters: Parameters, batch: Block) -> tuple[Array, Array]:
        nll = _nll(parameters, batch, head)
        tiles = jnp.maximum(batch.weight.sum(axis=-1), 1.0)
        prior = 0.5 * decay * (parameters["weight"] ** 2).sum(axis=(1, 2))
        # a sum over members whose terms share no parameter: each has its own gradient
        return (nll / tiles + prior).sum(), nll

    def step(carry: tuple[Parameters, Any], batch: Block) -> tuple[tuple[Parameters, Any], Array]:
        (_, nll), gradient = jax.value_and_grad(objective, has_aux=True)(carry[0], batch)
        update, state = optimiser.update(gradient, carry[1])
        after = (optax.apply_updates(carry[0], update), state)
        return after, nll

    (parameters, state), losses = jax.lax.scan(step, (parameters, state), block)
    return parameters, state, losses.sum(axis=0)


@partial(jax.jit, static_argnames=("head",))
def _block_loss(parameters: Parameters, block: Block, head: str) -> Array:
    return jax.lax.map(lambda batch: _nll(parameters, batch, head), block).sum(axis=0)


def _choose(improved: np.ndarray, new: Parameters, old: Parameters) -> Parameters:
    mask = jnp.asarray(improved)
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _rows(epoch: int, training: np.ndarray, validation: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "member": member, "training_nll": float(ours), "validation_nll": float(theirs)}
        for member, (ours, theirs) in enumerate(zip(training, validation, strict=True))
    ]
