"""Run compiled functions on a GPU or TPU without idle time, with few shapes and bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")
#: batches on the device at a time: one is computed while the next is copied
_ON_DEVICE = 2


def on_accelerator() -> bool:
    """Return whether JAX runs on a GPU or TPU."""
    return jax.default_backend() != "cpu"


@dataclass(frozen=True)
class Queue:
    """A compiled function of a batch that many threads call.

    Batches are padded to powers of two, because a GPU takes many seconds to compile a function for a new shape. Two
    batches are on the device at a time, so that one is copied while the other is computed. More would only take memory.

    - `function`: compiled function, from ``(batch, ...)`` to an array whose first axis is the batch.

    >>> Queue(lambda batch: batch.sum(axis=1))(np.ones((3, 2))).tolist()
    [2.0, 2.0, 2.0]
    """

    function: Callable[[Any], Any]
    _turns: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(_ON_DEVICE), repr=False
    )

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Run the function on a batch and return the result on the host."""
        n_padded = 1 << (len(batch) - 1).bit_length()
        padded = np.concatenate([batch, np.zeros((n_padded - len(batch), *batch.shape[1:]), batch.dtype)])
        with self._turns:
            return np.asarray(self.function(jax.device_put(padded)))[: len(batch)]


def one_behind(values: Iterable[T]) -> Iterator[T]:
    """Yield values one step late, so that the host prepares a batch while the device computes the last one.

    - `values`: results of steps. JAX returns them before they are computed.
    - yields: the same values, each after the next step has been started.

    >>> list(one_behind([1, 2, 3]))
    [1, 2, 3]
    """
    last: list[T] = []
    for value in values:
        yield from last
        last = [value]
    yield from last
