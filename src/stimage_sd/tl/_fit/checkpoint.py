"""Save and restore the state of a training run."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stimage_sd._files import replacing

_NAME = "state.safetensors"
_NAMED = "named."


def write_state(
    folder: Path, tree: Any, *, named: Mapping[str, np.ndarray], about: Mapping[str, Any], run: Mapping[str, Any]
) -> None:
    """Write the state of a run, replacing the last state once the new file is complete.

    - `folder`: folder to write to, created if absent.
    - `tree`: tree of arrays.
    - `named`: arrays whose shapes are known only from the file.
    - `about`: values that JSON can hold, such as the history.
    - `run`: settings of the run. A resumed run must have the same settings.
    """
    arrays = {f"{index:06d}": np.ascontiguousarray(leaf) for index, leaf in enumerate(jax.tree.leaves(tree))}
    arrays |= {_NAMED + name: np.ascontiguousarray(array) for name, array in named.items()}
    with replacing(folder / _NAME) as path:
        metadata = {"about": json.dumps(about), "run": json.dumps(run), "checksum": _checksum(arrays)}
        save_file(arrays, path, metadata=metadata)


def read_named(folder: Path, *, run: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Read the named arrays and `about` of a state.

    Return None if the folder has no state. A damaged state also gives None, with a warning.
    """
    path = folder / _NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            stored, about = json.loads(metadata["run"]), json.loads(metadata["about"])
            value, named = 0, {}
            for name in sorted(file.keys()):
                array = file.get_tensor(name)
                value = _crc(name, array, value)
                if name.startswith(_NAMED):
                    named[name.removeprefix(_NAMED)] = array
            if metadata.get("checksum", f"{value:08x}") != f"{value:08x}":
                raise ValueError("its checksum differs")
    except (SafetensorError, KeyError, ValueError) as error:
        warnings.warn(f"The checkpoint {path} is damaged ({error}); training starts over.", UserWarning, stacklevel=4)
        return None
    wanted = json.loads(json.dumps(run))
    other = sorted(key for key in wanted.keys() | stored.keys() if wanted.get(key) != stored.get(key))
    if other:
        raise ValueError(
            f"The checkpoint {path} is of a run that differs in {', '.join(other)}. Use the settings of that run, or "
            "pass another folder as `checkpoint=`."
        )
    return named, about


def read_tree(folder: Path, like: Any) -> Any:
    """Read the tree of a state, with the structure, shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    with safe_open(folder / _NAME, framework="numpy") as file:
        arrays = [file.get_tensor(f"{index:06d}") for index in range(len(leaves))]
    shaped = [array.reshape(leaf.shape).astype(leaf.dtype) for array, leaf in zip(arrays, leaves, strict=True)]
    return jax.tree.unflatten(structure, [jnp.asarray(array) for array in shaped])


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    value = 0
    for name in sorted(arrays):
        value = _crc(name, arrays[name], value)
    return f"{value:08x}"


def _crc(name: str, array: np.ndarray, value: int) -> int:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return zlib.crc32(content, zlib.crc32(name.encode(), value))
