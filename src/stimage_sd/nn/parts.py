"""The parts that a network runs one after another: what fine-tuning freezes, trains and checkpoints by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import nnx


class Part(NamedTuple):
    """One part of a network, such as the blocks that work at one resolution.

    Attributes
    ----------
    modules
        All modules and variables that it uses; no other part uses them.
    run
        From the value of the part before to its own.

    Examples
    --------
    >>> Part((), lambda value: value + 1).run(1)
    2
    """

    modules: tuple[Any, ...]
    run: Callable[[Any], Any]


def parts_of(network: nnx.Module) -> list[Part]:
    """Give a network's parts: those of its method `parts`, or the network as a whole.

    Parameters
    ----------
    network
        Any Flax module; ``network.parts()``, where it has that method, gives a list of `Part`.

    Returns
    -------
    The parts, in the order they run in.

    Examples
    --------
    >>> len(parts_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    1
    """
    if hasattr(network, "parts"):
        return list(network.parts())
    return [Part((network,), network)]


def training_parts_of(network: nnx.Module, key: Any) -> list[Part]:
    """Give a network's parts as training runs them: with dropout, where it has any.

    Parameters
    ----------
    network
        Any Flax module; ``network.training_parts(key)``, where it has that method, gives the parts of its `parts` with
        dropout that the key draws.
    key
        JAX's random key.

    Returns
    -------
    The parts, in the order they run in.

    Examples
    --------
    >>> len(training_parts_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), None))
    1
    """
    if hasattr(network, "training_parts"):
        return list(network.training_parts(key))
    return parts_of(network)


def run_parts(parts: Sequence[Part], value: Any) -> Any:
    """Run parts one after another.

    Parameters
    ----------
    parts
        The parts.
    value
        Input of the first.

    Returns
    -------
    Output of the last.

    Examples
    --------
    >>> run_parts([Part((), lambda value: value + 1)] * 2, 1)
    3
    """
    for part in parts:
        value = part.run(value)
    return value


def variables_of(part: Part) -> list[nnx.Variable]:
    """List the variables that a part uses.

    Parameters
    ----------
    part
        The part.

    Returns
    -------
    Its variables: parameters, statistics and whatever else.

    Examples
    --------
    >>> sorted(variable.shape for variable in variables_of(parts_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[0]))
    [(2, 3), (3,)]
    """
    return [node for module in part.modules for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)]
