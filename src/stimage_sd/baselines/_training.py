"""Train the network of a baseline, on batches of sections or of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from stimage_sd._progress import tqdm
from stimage_sd.models._recipe import Arrays
from stimage_sd.nn.accelerator import one_behind

#: prefix of a network's arrays in the arrays that a recipe keeps
NETWORK = "network."

Batch = dict[str, jax.Array]
#: draws the batches of an epoch
Draw = Callable[[np.random.Generator], Iterable[Batch]]


class Loss(Protocol):
    """Loss of the training, a scalar from the network and a batch."""

    def __call__(self, network: Any, batch: Batch, key: jax.Array) -> jax.Array:
        """Compute the loss. Each step has its own random `key`."""
        ...


def train(
    make: Callable[[nnx.Rngs], nnx.Module],
    draw: Draw,
    loss: Loss,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int,
    seed: int,
    label: str,
) -> Iterator[nnx.Module]:
    """Train a network and yield it after each epoch, so that the caller can evaluate it and stop.

    Parameters
    ----------
    make
        Builds the network.
    draw
        Draws the batches of an epoch.
    loss
        The loss.
    optimizer
        The optimizer.
    epochs
        Largest number of epochs.
    seed
        Seed of weights, batches and dropout.
    label
        Text of the progress bar.

    Returns
    -------
    The same network object after each epoch.
    """
    network = make(nnx.Rngs(seed))
    state = nnx.Optimizer(network, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(network: Any, state: Any, batch: Batch, key: jax.Array) -> jax.Array:
        value, gradient = nnx.value_and_grad(lambda net: loss(net, batch, key))(network)
        state.update(network, gradient)
        return value

    random = np.random.default_rng([seed, 7])
    key = jax.random.key(seed)

    def steps() -> Iterator[jax.Array]:
        nonlocal key
        for batch in draw(random):
            key, batch_key = jax.random.split(key)
            yield step(network, state, batch, batch_key)

    with tqdm(total=epochs, desc=label, unit="epoch") as bar:
        for _ in range(epochs):
            network.train()
            losses = [float(loss) for loss in one_behind(steps())]
            bar.set_postfix(loss=f"{np.mean(losses):.4f}", refresh=False)
            bar.update()
            yield network


def arrays_of(network: nnx.Module) -> dict[str, np.ndarray]:
    """Return a network's weights and running statistics by name, for `restored`."""
    state = nnx.to_flat_state(nnx.state(network, (nnx.Param, nnx.BatchStat)))
    return {f"{NETWORK}{'/'.join(map(str, path))}": np.asarray(variable[...]) for path, variable in state}


def restored(make: Callable[[int, nnx.Rngs], nnx.Module], learned: Arrays) -> Any:
    """Rebuild a network from the arrays that its recipe keeps, in evaluation mode."""
    network = make(len(learned["floor_mean"]), nnx.Rngs(0))
    state = nnx.state(network, (nnx.Param, nnx.BatchStat))
    for path, variable in nnx.to_flat_state(state):
        variable[...] = jnp.asarray(learned[f"{NETWORK}{'/'.join(map(str, path))}"])
    nnx.update(network, state)
    network.eval()
    return network
