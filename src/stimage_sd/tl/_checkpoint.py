"""A training run's state on disk, for it to go on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_NAME = "state.safetensors"
_NAMED = "named."


def write_state(
    folder: Path, tree: Any, *, named: Mapping[str, np.ndarray], about: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Write a run's state, in place of the last one when it is complete.

    Parameters
    ----------
    folder
        Where to; made where it is absent.
    tree
        Any tree of arrays.
    named
        Arrays whose shapes are only known from the file.
    about
        Whatever JSON holds, such as the history.
    run
        What the run was started with, which one that goes on must share.
    """
    arrays = {f"{number:06d}": np.ascontiguousarray(leaf) for number, leaf in enumerate(jax.tree.leaves(tree))}
    arrays |= {_NAMED + name: np.ascontiguousarray(array) for name, array in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{_NAME}.part"
    save_file(arrays, part, metadata={"about": json.dumps(about), "run": json.dumps(run)})
    os.replace(part, folder / _NAME)


def read_named(folder: Path, *, run: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Read the named arrays and `about` of a state; None where the folder has none.

    Raises
    ------
    ValueError
        If the file is damaged, or of a run that was started with something else.
    """
    path = folder / _NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found, about = json.loads(metadata["run"]), json.loads(metadata["about"])
            names = file.keys()
            named = {name.removeprefix(_NAMED): file.get_tensor(name) for name in names if name.startswith(_NAMED)}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"The checkpoint {path} cannot be read ({error}). Delete it to start anew.") from error
    wanted = json.loads(json.dumps(run))
    other = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if other:
        raise ValueError(
            f"The checkpoint {path} is of a run that differs in {', '.join(other)}. Call with what it was started "
            "with, or with `checkpoint=` another folder."
        )
    return named, about


def read_tree(folder: Path, like: Any) -> Any:
    """Read the tree of a state, of the structure, shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    with safe_open(folder / _NAME, framework="numpy") as file:
        arrays = [file.get_tensor(f"{number:06d}") for number in range(len(leaves))]
    shaped = [array.reshape(leaf.shape).astype(leaf.dtype) for array, leaf in zip(arrays, leaves, strict=True)]
    return jax.tree.unflatten(structure, [jnp.asarray(array) for array in shaped])
