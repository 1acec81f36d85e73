"""Networks split into frozen and trained parts, and gradients summed over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from stimage_sd._progress import tqdm
from stimage_sd._settings import n_threads
from stimage_sd.likelihood.heads import Parameters
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._extractors import derived_extractor
from stimage_sd.nn.accelerator import one_behind
from stimage_sd.nn.parts import Part, parts_of, run_parts, variables_of

Unfreeze = Literal["last_stage", "all"] | None
#: function from rows to tiles, ``uint8 (n_rows, side, side, 3)``
Read = Callable[[np.ndarray], np.ndarray]
#: tiles per call of an extractor
_EXTRACTOR_BATCH = 16


class Trained(NamedTuple):
    """Trained parameters: those of the network's unfrozen parts, and those of the head."""

    network: Any
    head: Parameters


@dataclass(frozen=True)
class Unfrozen:
    """Structure of the trained parts of a network. Equal structures share one compiled training step.

    - `graph`: the network without its arrays.
    - `first`: index of the first trained part.
    """

    graph: Any
    first: int

    def features(self, trained: Any, rest: Any, inputs: Array) -> Array:
        """Compute features ``float32 (n_tiles, n_features)`` from the output of the frozen parts."""
        return run_parts(self._parts(trained, rest, parts_of), inputs)

    def checkpointed_features(
        self, trained: Any, rest: Any, inputs: Array, *, parts: Callable[[nnx.Module], list[Part]] = parts_of
    ) -> Array:
        """Compute features for a gradient. Activations are computed again in the backward pass to save memory.

        - `trained`, `rest`: the network's state.
        - `inputs`: output of the frozen parts.
        - `parts`: function that splits the network into parts, with dropout if training uses it.
        """
        whole = self._parts(trained, rest, parts)
        return run_parts([part._replace(run=jax.checkpoint(part.run)) for part in whole], inputs)

    def _parts(self, trained: Any, rest: Any, parts: Callable[[nnx.Module], list[Part]]) -> list[Part]:
        return parts(nnx.merge(self.graph, trained, rest))[self.first :]


class SplitNetwork:
    """An extractor's network, split into frozen parts and trained parts. Frozen parts run like the extractor.

    - `extractor`: extractor with the network and its normalization.
    - `unfreeze`: ``"last_stage"``, ``"all"`` or `None`: parts to train.
    - `unfrozen`: structure of the trained parts.
    - `initial`: trained parameters before training.
    - `rest`: all other state of the network.
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
        # frozen parts never change, so they run like the extractor, on a CPU several times as fast as XLA's code
        self._frozen = extractor.first_parts(first)
        self._pool = ThreadPoolExecutor(n_threads())
        self._embed = jax.jit(self.unfrozen.features)

    def module(self, trained: Any) -> nnx.Module:
        """Return the whole network with numpy arrays."""
        return nnx.merge(self.unfrozen.graph, *jax.tree.map(np.asarray, (trained, self.rest)))

    def frozen_parts(self, tiles: np.ndarray) -> Array:
        """Run the frozen parts on a micro-batch, split over the cores."""
        n_pieces = min(len(tiles), n_threads()) if self._extractor.is_recordable and self.unfrozen.first else 1
        pieces = self._pool.map(self._frozen, np.array_split(tiles, n_pieces))
        return jnp.concatenate([jnp.asarray(piece) for piece in pieces])

    def features(self, trained: Any, read: Read, rows: np.ndarray, *, batch_size: int, label: str) -> np.ndarray:
        """Compute features of some tiles without augmentation, ``float32 (n_rows, n_features)``."""
        if self._extractor.is_recordable:
            # a new recording with these weights is several times as fast on a CPU as XLA's code
            now = derived_extractor(self._extractor.name, self.module(trained), weights_hash="now")
            return features_by(now, read, rows, label=label)

        def blocks() -> Iterator[Array]:
            for start in tqdm(range(0, len(rows), batch_size), desc=label, leave=False):
                inputs = self.frozen_parts(read(np.resize(rows[start : start + batch_size], batch_size)))
                yield self._embed(trained, self.rest, inputs)

        return np.concatenate([np.asarray(block) for block in one_behind(blocks())])[: len(rows)]


def _first_trained(name: str, n_parts: int, unfreeze: Unfreeze) -> int:
    if unfreeze is None:
        return n_parts
    if unfreeze == "all":
        return 0
    if n_parts < 2:
        raise ValueError(
            f'The network of the extractor {name!r} defines no stages, so `unfreeze="last_stage"` is not possible. '
            'Add a method `parts` to the network (stimage_sd.nn.parts), or pass `unfreeze="all"`.'
        )
    return n_parts - 1


def features_by(extractor: Extractor, read: Read, rows: np.ndarray, *, label: str) -> np.ndarray:
    """Compute features of some tiles with an extractor on all cores, ``float32 (n_rows, n_features)``."""
    batches = [rows[start : start + _EXTRACTOR_BATCH] for start in range(0, len(rows), _EXTRACTOR_BATCH)]
    with ThreadPoolExecutor(n_threads()) as pool:
        parts = pool.map(lambda batch: extractor(read(batch)), batches)
        return np.concatenate(list(tqdm(parts, total=len(batches), desc=label, leave=False)))


# --------------------------------------------------------------------------------------------------
# micro-batches


class MicroBatch(NamedTuple):
    """Rows of one micro-batch. `weight` is 0 for rows that only fill the micro-batch."""

    number: int
    rows: np.ndarray
    weight: np.ndarray


def micro_batches(rows: np.ndarray, size: int) -> Iterator[MicroBatch]:
    """Cut a batch into micro-batches of equal size, so that all use one compiled step."""
    for index, start in enumerate(range(0, len(rows), size)):
        chosen = rows[start : start + size]
        yield MicroBatch(index, np.resize(chosen, size), (np.arange(size) < len(chosen)).astype(np.float32))


def gradient_sum(loss: Callable[..., Array]) -> Callable[..., tuple[Trained, Array]]:
    """Compile a function that adds the gradient and loss of a micro-batch to a running total.

    - `loss`: function from trained parameters and further arrays to a loss, summed over the micro-batch.
    - returns: ``(total, trained, *arrays) -> total``. `total` is a gradient and a loss. It starts as `no_gradient`.
    """

    def added(total: tuple[Trained, Array], trained: Trained, *arrays: Any) -> tuple[Trained, Array]:
        value, gradient = jax.value_and_grad(loss)(trained, *arrays)
        return jax.tree.map(jnp.add, total[0], gradient), total[1] + value

    return jax.jit(added, donate_argnums=(0,))


def no_gradient(trained: Trained) -> tuple[Trained, Array]:
    """Return a zero gradient and a zero loss, the start of `gradient_sum`."""
    return jax.tree.map(jnp.zeros_like, trained), jnp.zeros(())
