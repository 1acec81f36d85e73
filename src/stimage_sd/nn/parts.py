"""Sequential parts of a network, the units that fine-tuning freezes, trains and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from flax import nnx


class Part(NamedTuple):
    """One part of a network, such as the blocks of one resolution.

    - `modules`: all modules and variables of the part. Parts do not share modules.
    - `run`: function from the output of the previous part to the output of this part.

    >>> Part((), lambda value: value + 1).run(1)
    2
    """

    modules: tuple[Any, ...]
    run: Callable[[Any], Any]


def parts_of(network: nnx.Module) -> list[Part]:
    """Return the parts of a network in order, from its method `parts` or as one whole part.

    >>> len(parts_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    1
    """
    if hasattr(network, "parts"):
        return list(network.parts())
    return [Part((network,), network)]


def training_parts_of(network: nnx.Module, key: Any) -> list[Part]:
    """Return the parts of a network for training, from its method `training_parts` or as `parts_of`.

    - `network`: any Flax module. The method ``network.training_parts(key)`` returns the parts with dropout.
    - `key`: JAX random key of the dropout.

    >>> len(training_parts_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), None))
    1
    """
    if hasattr(network, "training_parts"):
        return list(network.training_parts(key))
    return parts_of(network)


def run_parts(parts: Sequence[Part], value: Any) -> Any:
    """Run parts in sequence, from the input of the first part to the output of the last part.

    >>> run_parts([Part((), lambda value: value + 1)] * 2, 1)
    3
    """
    for part in parts:
        value = part.run(value)
    return value


def run_blocks(blocks: Iterable[Callable[[Any], Any]], value: Any) -> Any:
    """Run the blocks of a part in sequence.

    >>> run_blocks([lambda value: value + 1] * 2, 1)
    3
    """
    for block in blocks:
        value = block(value)
    return value


def variables_of(part: Part) -> list[nnx.Variable]:
    """List all variables of a part, such as parameters and statistics.

    >>> sorted(variable.shape for variable in variables_of(parts_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[0]))
    [(2, 3), (3,)]
    """
    return [node for module in part.modules for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable)]
