"""A network split into what is trained and what is not, and how its gradient is added up by micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm.auto import tqdm

from stimage_sd.models._extractors import Extractor, derived_extractor
from stimage_sd.nn.negative_binomial_head import Parameters
from stimage_sd.nn.parts import Part, parts_of, run_parts, variables_of

Unfreeze = Literal["last_stage", "all"] | None
#: gives tiles by their rows, ``uint8 (n_rows, side, side, 3)``
Read = Callable[[np.ndarray], np.ndarray]
#: tiles that an extractor is given at a time
_EXTRACTOR_BATCH = 16


class Trained(NamedTuple):
    """What the gradient changes: the network's unfrozen parameters, and the head's."""

    network: Any
    head: Parameters


@dataclass(frozen=True)
class Unfrozen:
    """How the trained parts of a network run; two of networks built alike are equal, so that one compiled step serves.

    Attributes
    ----------
    graph
        The network without its arrays.
    first
        Number of the first part that is trained.
    """

    graph: Any
    first: int

    def features(self, trained: Any, rest: Any, inputs: Array) -> Array:
        """Features, ``float32 (n_tiles, n_features)``, of what the frozen parts gave."""
        return run_parts(self._parts(trained, rest, parts_of), inputs)

    def checkpointed_features(
        self, trained: Any, rest: Any, inputs: Array, *, parts: Callable[[nnx.Module], list[Part]] = parts_of
    ) -> Array:
        """The same for the gradient: a part's activations are computed again for it.

        Parameters
        ----------
        trained, rest
            The network's state.
        inputs
            What the frozen parts gave.
        parts
            Takes the network apart; with dropout, where training has that.
        """
        each = self._parts(trained, rest, parts)
        return run_parts([part._replace(run=jax.checkpoint(part.run)) for part in each], inputs)

    def _parts(self, trained: Any, rest: Any, parts: Callable[[nnx.Module], list[Part]]) -> list[Part]:
        return parts(nnx.merge(self.graph, trained, rest))[self.first :]


class SplitNetwork:
    """An extractor's network, split into frozen parts, which run as the extractor does, and those that are trained.

    Parameters
    ----------
    extractor
        Gives the network and its normalisation.
    unfreeze
        Which parts are trained.

    Attributes
    ----------
    unfrozen
        How the trained parts run.
    initial
        The trained parameters, as they are at the start.
    rest
        All else of the network's state.
    """

    def __init__(self, extractor: Extractor, unfreeze: Unfreeze) -> None:
        self._extractor = extractor
        module = extractor.module()
        parts = parts_of(module)
        first = _first_trained(extractor.name, len(parts), unfreeze)
        unfrozen = {id(variable) for part in parts[first:] for variable in variables_of(part)}
        paths = {path for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Param) and id(node) in unfrozen}
        split: Any = nnx.split(module, lambda path, _: path in paths, ...)
        graph, self.initial, self.rest = split
        self.unfrozen = Unfrozen(graph, first)
        # constants for ever: they run as the extractor does, on a CPU several times as fast as what XLA compiles
        self._frozen = extractor.first_parts(first)
        self._pool = ThreadPoolExecutor(cpu_count())
        self._embed = jax.jit(self.unfrozen.features)

    def module(self, trained: Any) -> nnx.Module:
        """Put the network together again, its arrays in numpy."""
        return nnx.merge(self.unfrozen.graph, *jax.tree.map(np.asarray, (trained, self.rest)))

    def frozen_parts(self, tiles: np.ndarray) -> Array:
        """What the frozen parts make of a micro-batch, a part of it on each core."""
        n_pieces = min(len(tiles), cpu_count() or 1) if self._extractor.is_recordable and self.unfrozen.first else 1
        pieces = self._pool.map(self._frozen, np.array_split(tiles, n_pieces))
        return jnp.concatenate([jnp.asarray(piece) for piece in pieces])

    def features(self, trained: Any, read: Read, rows: np.ndarray, *, batch_size: int, label: str) -> np.ndarray:
        """Features of some tiles as they are, ``float32 (n_rows, n_features)``."""
        if self._extractor.is_recordable:
            # recorded anew for these weights: several times as fast as what XLA compiles for a CPU
            now = derived_extractor(self._extractor.name, self.module(trained), weights_hash="now")
            return features_by(now, read, rows, label=label)
        blocks = []
        for start in tqdm(range(0, len(rows), batch_size), desc=label, leave=False):
            chosen = rows[start : start + batch_size]
            inputs = self.frozen_parts(read(np.resize(chosen, batch_size)))
            blocks.append(np.asarray(self._embed(trained, self.rest, inputs))[: len(chosen)])
        return np.concatenate(blocks)


def _first_trained(name: str, n_parts: int, unfreeze: Unfreeze) -> int:
    if unfreeze is None:
        return n_parts
    if unfreeze == "all":
        return 0
    if n_parts < 2:
        raise ValueError(
            f'The network of the extractor {name!r} does not say what its stages are, so `unfreeze="last_stage"` has '
            'no meaning for it. Give it a method `parts` (stimage_sd.nn.parts), or pass `unfreeze="all"`.'
        )
    return n_parts - 1


def features_by(extractor: Extractor, read: Read, rows: np.ndarray, *, label: str) -> np.ndarray:
    """Features of some tiles by an extractor, ``float32 (n_rows, n_features)``, on all cores."""
    batches = [rows[start : start + _EXTRACTOR_BATCH] for start in range(0, len(rows), _EXTRACTOR_BATCH)]
    with ThreadPoolExecutor(cpu_count()) as pool:
        found = pool.map(lambda batch: extractor(read(batch)), batches)
        return np.concatenate(list(tqdm(found, total=len(batches), desc=label, leave=False)))


# --------------------------------------------------------------------------------------------------
# micro-batches


class MicroBatch(NamedTuple):
    """Rows of one micro-batch; `weight` is 0 for those that only fill it up."""

    number: int
    rows: np.ndarray
    weight: np.ndarray


def micro_batches(rows: np.ndarray, size: int) -> Iterator[MicroBatch]:
    """Cut a batch into micro-batches of one size, so that one compiled step serves for all."""
    for number, start in enumerate(range(0, len(rows), size)):
        chosen = rows[start : start + size]
        yield MicroBatch(number, np.resize(chosen, size), (np.arange(size) < len(chosen)).astype(np.float32))


def gradient_sum(loss: Callable[..., Array]) -> Callable[..., tuple[Trained, Array]]:
    """Compile what adds a micro-batch's gradient and loss to those before it.

    Parameters
    ----------
    loss
        From what is trained and further arrays to a number, summed over the micro-batch.

    Returns
    -------
    ``(total, trained, *arrays) -> total``; `total` is a gradient and a loss, at first `no_gradient`.
    """

    def added(total: tuple[Trained, Array], trained: Trained, *arrays: Any) -> tuple[Trained, Array]:
        value, gradient = jax.value_and_grad(loss)(trained, *arrays)
        return jax.tree.map(jnp.add, total[0], gradient), total[1] + value

    return jax.jit(added, donate_argnums=(0,))


def no_gradient(trained: Trained) -> tuple[Trained, Array]:
    """What `gradient_sum` begins with."""
    return jax.tree.map(jnp.zeros_like, trained), jnp.zeros(())
