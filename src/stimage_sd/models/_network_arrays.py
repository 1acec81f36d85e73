"""Arrays of a network by path: reading and setting them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from numpy.typing import NDArray


def network_arrays(network: nnx.Module) -> dict[str, NDArray[Any]]:
    """Return a network's arrays by path, such as ``stem/kernel``, without states of random generators."""
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in _variables(network)}


def put_arrays(network: nnx.Module, arrays: Mapping[str, NDArray[Any]], *, name: str) -> None:
    """Put arrays into a network, in place."""
    wanted = {"/".join(map(str, path)): variable for path, variable in _variables(network)}
    expected = {key: tuple(variable.shape) for key, variable in wanted.items()}
    shapes = {key: array.shape for key, array in arrays.items()}
    if shapes != expected:
        wrong = sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key))
        raise ValueError(
            f"The model's weights do not fit the network of the extractor {name!r}: {len(wrong)} arrays differ, such "
            f"as {wrong[:3]}. Register the network that the model was trained with."
        )
    for key, variable in wanted.items():
        variable.set_value(arrays[key])


def _variables(network: nnx.Module) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    return [
        (path, node)
        for path, node in nnx.iter_graph(network)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.RngState)
    ]
