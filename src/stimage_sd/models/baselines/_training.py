"""Training of a baseline's network, whatever a step sees: a section, or some tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm.auto import tqdm

from stimage_sd.models.baselines._recipe import Arrays, Target, TrainingSection, count_scale, floor

#: what the names of a network's arrays begin with among those that a recipe keeps
NETWORK = "network."

Batch = dict[str, jax.Array]
#: the batches of an epoch, drawn anew for each
Draw = Callable[[np.random.Generator], Iterable[Batch]]


class Loss(Protocol):
    """What training minimises: a number, from the network and a batch."""

    def __call__(self, network: Any, batch: Batch, key: jax.Array) -> jax.Array:
        """Compute the loss; `key` is of this step alone."""
        ...


def train(
    make: Callable[[nnx.Rngs], nnx.Module],
    draw: Draw,
    loss: Loss,
    *,
    optimiser: optax.GradientTransformation,
    epochs: int,
    seed: int,
    label: str,
) -> Iterator[nnx.Module]:
    """Train a network; give it after each epoch, so that the caller may judge it, and stop.

    Parameters
    ----------
    make
        Builds the network.
    draw
        The batches of an epoch.
    loss
        What is minimised.
    optimiser
        What a gradient is made a step by.
    epochs
        At most so many.
    seed
        Seed of weights, batches and dropout.
    label
        What the progress bar says.

    Returns
    -------
    The one network, as it is after each epoch.
    """
    network = make(nnx.Rngs(seed))
    state = nnx.Optimizer(network, optimiser, wrt=nnx.Param)

    @nnx.jit
    def step(network: Any, state: Any, batch: Batch, key: jax.Array) -> jax.Array:
        value, gradient = nnx.value_and_grad(lambda net: loss(net, batch, key))(network)
        state.update(network, gradient)
        return value

    random = np.random.default_rng([seed, 7])
    key = jax.random.key(seed)
    with tqdm(total=epochs, desc=label, unit="epoch") as bar:
        for _ in range(epochs):
            network.train()
            losses = []
            for batch in draw(random):
                key, own = jax.random.split(key)
                losses.append(float(step(network, state, batch, own)))
            bar.set_postfix(loss=f"{np.mean(losses):.4f}", refresh=False)
            bar.update()
            yield network


def arrays_of(network: nnx.Module) -> dict[str, np.ndarray]:
    """A network's weights and running statistics by name, for `restored`."""
    state = nnx.to_flat_state(nnx.state(network, (nnx.Param, nnx.BatchStat)))
    return {f"{NETWORK}{'/'.join(map(str, path))}": np.asarray(variable[...]) for path, variable in state}


def kept(arrays: Arrays, sections: Sequence[TrainingSection], target: Target) -> dict[str, np.ndarray]:
    """What a recipe keeps: the network's arrays, and what brings logarithms to counts."""
    return {**arrays, "scale": count_scale(sections, target), "floor_mean": floor(sections, target)[0]}


def restored(make: Callable[[int, nnx.Rngs], nnx.Module], learnt: Arrays) -> Any:
    """Build a network for the genes of what was `kept`, with those weights, to predict with."""
    network = make(len(learnt["floor_mean"]), nnx.Rngs(0))
    state = nnx.state(network, (nnx.Param, nnx.BatchStat))
    for path, variable in nnx.to_flat_state(state):
        variable[...] = jnp.asarray(learnt[f"{NETWORK}{'/'.join(map(str, path))}"])
    nnx.update(network, state)
    network.eval()
    return network
