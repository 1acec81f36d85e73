"""Extractors, which turn tiles into embeddings, and their registry."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import nnx
from numpy.typing import NDArray

from stimage_sd._cache import keep_compiled
from stimage_sd.image.tissue_statistics import N_STATISTICS, tissue_statistics
from stimage_sd.models._foundation import FOUNDATION_MODELS, load_foundation
from stimage_sd.models._pretrained import load_densenet121, load_vision_transformer
from stimage_sd.models._weights import abstract, load_efficientnet_lite, load_resnet50, sha256_of_arrays
from stimage_sd.nn import onnx_graph
from stimage_sd.nn.densenet import DenseNet121
from stimage_sd.nn.efficientnet import EMBEDDING_SIZE, SCALINGS, EfficientNetLite
from stimage_sd.nn.parts import parts_of, run_parts
from stimage_sd.nn.resnet import ResNet50
from stimage_sd.nn.vision_transformer import SIZES, VisionTransformer

Tiles = NDArray[np.uint8]
Embeddings = NDArray[np.float32]
Network = nnx.Module | Callable[[Any], Any]
Run = Callable[[Tiles], Any]

# Tiles per run of ONNX Runtime. From 8 tiles on, the activations no longer fit the CPU cache, which is slower.
# They take 20 MB per tile of 299 px.
ONNX_BATCH = 2
#: normalization of red, green and blue that torchvision's weights were trained with
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network with weights that turns tiles into embeddings.

    `get_extractor` returns an extractor by name. Several threads can call it at once. Each call runs on one CPU core,
    so callers run batches in parallel. If JAX runs on a GPU or TPU, the extractor runs there too.

    Attributes
    ----------
    name
        Name in the registry.
    input_size
        Height and width in pixels that tiles are resized to. `None` for networks that take any size, such as
        convolutional networks: tiles keep the size they were cut at (`stimage_sd.pp.tile(target_px=)`).
    embedding_size
        Length of an embedding.
    weights_hash
        sha256 of the file of weights or of the arrays. Empty for a plain function registered without a hash.
    license
        Terms of use of the weights.
    mean, std
        Normalization of the input, on the scale 0 to 1. `None` if the network takes uint8 tiles.
    weights
        File of weights given to `get_extractor`, or `None` for the default weights.

    Examples
    --------
    >>> import numpy as np
    >>> extractor = get_extractor("efficientnet_lite0")
    >>> extractor(np.zeros((2, 224, 224, 3), np.uint8)).shape
    (2, 1280)
    """

    name: str
    input_size: int | None
    embedding_size: int
    weights_hash: str
    license: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    weights: Path | None
    _entry: _Entry = field(repr=False)
    _network: Network = field(repr=False)
    _run: Run = field(repr=False)

    def __call__(self, tiles: Tiles) -> Embeddings:
        """Embed tiles.

        Parameters
        ----------
        tiles
            uint8 (n_tiles, height, width, 3), RGB.

        Returns
        -------
        embeddings
            float32 (n_tiles, embedding_size).

        Raises
        ------
        ValueError
            If the tiles or the network's output have another shape or dtype.
        """
        tiles = np.asarray(tiles)
        if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3 or 0 in tiles.shape[1:]:
            raise ValueError(
                f"Expected tiles of dtype uint8 and shape (n_tiles, height, width, 3), found {tiles.dtype} "
                f"and {tiles.shape}."
            )
        if len(tiles) == 0:
            return np.empty((0, self.embedding_size), np.float32)
        embeddings = np.asarray(self._run(tiles), np.float32)
        expected = (len(tiles), self.embedding_size)
        if embeddings.shape != expected:
            raise ValueError(
                f"Expected the extractor {self.name!r} to give embeddings of shape {expected}, as it was "
                f"registered, found {embeddings.shape}."
            )
        return embeddings

    def module(self) -> nnx.Module:
        """Return a new copy of the network with its weights, a Flax module on JAX's default device.

        Returns
        -------
        flax.nnx.Module
            Takes float32 tiles (batch, height, width, 3), normalized by `mean` and `std`.

        Raises
        ------
        TypeError
            If the extractor is a plain function.

        Examples
        --------
        >>> type(get_extractor("efficientnet_lite0").module()).__name__
        'EfficientNetLite'
        """
        if not isinstance(self._network, nnx.Module):
            raise TypeError(
                f"The extractor {self.name!r} is a plain function, not a Flax module: only modules can be "
                "fine-tuned or differentiated. Register the module itself with register_extractor."
            )
        graph, state = nnx.split(self._network)
        return nnx.merge(graph, jax.tree.map(jnp.array, state))

    @property
    def is_recordable(self) -> bool:
        """Whether the network runs in ONNX Runtime on this machine. Recording takes about a second."""
        return self._entry.is_recordable and jax.default_backend() == "cpu"

    def normalize(self, tiles: jax.Array) -> jax.Array:
        """Normalize uint8 tiles in JAX. Without `mean` and `std`, return the tiles unchanged."""
        return _normalized(self._entry, tiles, jnp)

    def first_parts(self, n_parts: int) -> Run:
        """Return a function from uint8 tiles to the output of the network's first parts, channels last.

        It runs like the extractor: on the calling thread alone if the network `is_recordable`.
        """
        if not isinstance(self._network, nnx.Module):
            raise TypeError(f"The extractor {self.name!r} is a plain function, which has no parts.")
        parts = parts_of(self._network)
        if self.is_recordable and n_parts:
            size = self.embedding_size if n_parts == len(parts) else None
            run = _recorded(self._entry, partial(run_parts, parts[:n_parts]), embedding_size=size)
            return lambda tiles: np.moveaxis(run(tiles), 1, -1)
        keep_compiled()
        graph, state = nnx.split(self._network)

        @jax.jit
        def compiled(state: Any, tiles: jax.Array) -> jax.Array:
            return run_parts(parts_of(nnx.merge(graph, state))[:n_parts], self.normalize(tiles))

        return partial(compiled, jax.device_put(state) if n_parts else state)

    def __reduce__(self) -> tuple[Callable[..., Extractor], tuple[Any, ...]]:
        """Pickle the registry entry, so that each process builds the extractor once."""
        return _rebuild, (self._entry, self.weights)


@dataclass(frozen=True, eq=False)
class _Entry:
    """Registry entry of an extractor, known before its weights are read."""

    name: str
    load: Callable[[Path | None], tuple[Network, str]]
    input_size: int | None
    embedding_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    license: str
    token: str  # distinguishes registrations under one name, also in other processes
    is_recordable: bool = False  # whether nn.onnx_graph can record the network
    architecture: Callable[..., nnx.Module] | None = (
        None  # called with rngs=, returns a built-in network without weights
    )


_EFFICIENTNETS = tuple(
    _Entry(
        name=f"efficientnet_{scaling}",
        load=partial(load_efficientnet_lite, scaling=scaling),
        input_size=None,
        embedding_size=EMBEDDING_SIZE,
        # The TensorFlow models' normalization: (byte - 127) / 128.
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        license="Apache-2.0",
        token="built-in",
        is_recordable=True,
        architecture=partial(EfficientNetLite, SCALINGS[scaling]),
    )
    for scaling in SCALINGS
)
_BUILT_IN = (
    *_EFFICIENTNETS,
    _Entry(
        name="resnet50",
        load=load_resnet50,
        input_size=None,
        embedding_size=2048,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        license="BSD-3-Clause",
        token="built-in",
        is_recordable=True,
        architecture=ResNet50,
    ),
    _Entry(
        name="densenet121",
        load=load_densenet121,
        input_size=None,
        embedding_size=1024,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        license="BSD-3-Clause",
        token="built-in",
        is_recordable=True,
        architecture=DenseNet121,
    ),
    # one network with two released sets of weights, trained with different normalizations
    _Entry(
        name="vit_base_patch16_224",
        load=partial(load_vision_transformer, name="vit_base_patch16_224"),
        input_size=224,
        embedding_size=768,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        license="Apache-2.0",
        token="built-in",
        architecture=partial(VisionTransformer, SIZES["base"]),
    ),
    _Entry(
        name="vit_b_16",
        load=partial(load_vision_transformer, name="vit_b_16"),
        input_size=224,
        embedding_size=768,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        license="BSD-3-Clause",
        token="built-in",
        architecture=partial(VisionTransformer, SIZES["base"]),
    ),
)
_FOUNDATION = tuple(
    _Entry(
        name=name,
        load=partial(load_foundation, name),
        input_size=model.input_size,
        embedding_size=model.embedding_size,
        mean=model.normalization[0],
        std=model.normalization[1],
        license=model.license,
        token="built-in",
    )
    for name, model in FOUNDATION_MODELS.items()
)


def _load_tissue_statistics(weights: Path | None) -> tuple[Network, str]:
    return _registered(weights, name="tissue_statistics", network=tissue_statistics, weights_hash="tissue-statistics-2")


#: extractors that are measured, not learned; raise the number in the hash when the definition changes
_CLASSICAL = (
    _Entry(
        name="tissue_statistics",
        load=_load_tissue_statistics,
        input_size=None,
        embedding_size=N_STATISTICS,
        mean=None,
        std=None,
        license="",
        token="built-in",
    ),
)
_entries: dict[str, _Entry] = {entry.name: entry for entry in (*_BUILT_IN, *_FOUNDATION, *_CLASSICAL)}
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
        others are searched at `$STIMAGE_SD_WEIGHTS/<name>.safetensors`, then on the Hugging Face hub.

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
            _built[name, path] = _build(_entries[name], path)
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
    if name in {entry.name for entry in (*_BUILT_IN, *_FOUNDATION, *_CLASSICAL)}:
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
    entry = _Entry(
        name=name,
        load=partial(_registered, name=name, network=network, weights_hash=weights_hash),
        input_size=input_size,
        embedding_size=embedding_size,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        license=license,
        token=uuid.uuid4().hex,
    )
    _enter(entry)


def settings(name: str) -> dict[str, Any]:
    """Return an extractor's input size, embedding size and normalization, without reading its weights.

    Raises
    ------
    ValueError
        If no extractor has this name.
    """
    entry = _entry_of(name)
    return {key: getattr(entry, key) for key in ("input_size", "embedding_size", "mean", "std")}


def blank_module(name: str) -> nnx.Module:
    """Return a new network of a registered extractor, with arrays still to be set.

    Raises
    ------
    ValueError
        If no extractor has this name.
    TypeError
        If the extractor is a plain function.
    """
    entry = _entry_of(name)
    if entry.architecture is not None:
        return abstract(entry.architecture)
    return get_extractor(name).module()


def derived_extractor(name: str, network: nnx.Module, *, weights_hash: str) -> Extractor:
    """Return a copy of a registered extractor with other weights, without registering the copy."""
    entry = _entry_of(name)
    named = f"{name}-{weights_hash[:8]}"
    load = partial(_registered, name=named, network=network, weights_hash=weights_hash)
    return _build(replace(entry, name=named, load=load, token=weights_hash, architecture=None), None)


def unregistered_extractor(
    name: str, network: nnx.Module, *, input_size: int, embedding_size: int, mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Extractor:  # fmt: skip
    """Return an extractor of a network without registering it."""
    token = uuid.uuid4().hex
    load = partial(_registered, name=name, network=network, weights_hash=token)
    return _build(_Entry(name, load, input_size, embedding_size, mean, std, license="", token=token), None)


def _entry_of(name: str) -> _Entry:
    if name not in _entries:
        raise ValueError(
            f"The model's network is that of the extractor {name!r}, which is not registered here; there are "
            f"{', '.join(extractors())}. Add it with stimage_sd.models.register_extractor, then load the model again."
        )
    return _entries[name]


def _enter(entry: _Entry) -> None:
    with _lock:
        _entries[entry.name] = entry
        for key in [key for key in _built if key[0] == entry.name]:
            del _built[key]


def _registered(weights: Path | None, *, name: str, network: Network, weights_hash: str) -> tuple[Network, str]:
    if weights is not None:
        raise ValueError(f"The extractor {name!r} was registered with its weights; it takes no weights=.")
    if not weights_hash and isinstance(network, nnx.Module):
        state = nnx.to_flat_state(nnx.state(network, nnx.Not(nnx.RngState)))
        arrays = {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}
        weights_hash = sha256_of_arrays(arrays)
    return network, weights_hash


def _rebuild(entry: _Entry, weights: Path | None) -> Extractor:
    """Return a pickled extractor, and register it in this process if it is new."""
    with _lock:
        known = _entries.get(entry.name)
        if known is None or known.token != entry.token:
            _enter(entry)
        return get_extractor(entry.name, weights=weights)


def _build(entry: _Entry, weights: Path | None) -> Extractor:
    network, weights_hash = entry.load(weights)
    if entry.is_recordable and isinstance(network, nnx.Module) and jax.default_backend() == "cpu":
        run = _onnx(entry, network)
    elif isinstance(network, nnx.Module):
        run = _compiled(entry, network)
    else:
        run = _plain(entry, network)
    return Extractor(
        name=entry.name,
        input_size=entry.input_size,
        embedding_size=entry.embedding_size,
        weights_hash=weights_hash,
        license=entry.license,
        mean=entry.mean,
        std=entry.std,
        weights=weights,
        _entry=entry,
        _network=network,
        _run=run,
    )


def _onnx(entry: _Entry, network: nnx.Module) -> Run:
    """Run a network in ONNX Runtime on the calling thread."""
    return _recorded(entry, network, embedding_size=entry.embedding_size)


def _recorded(entry: _Entry, network: Callable[[Any], Any], *, embedding_size: int | None) -> Run:
    mean, std = entry.mean or (0.0, 0.0, 0.0), entry.std or (1.0, 1.0, 1.0)
    model = onnx_graph.record(network, mean=mean, std=std, embedding_size=embedding_size)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(tiles: Tiles) -> NDArray[np.float32]:
        parts = [tiles[start : start + ONNX_BATCH] for start in range(0, len(tiles), ONNX_BATCH)]
        return np.concatenate([session.run(["embedding"], {"tiles": part})[0] for part in parts])

    return run


def _compiled(entry: _Entry, network: nnx.Module) -> Run:
    """Compile a Flax module for JAX's default device."""
    keep_compiled()
    graph, state = nnx.split(network)
    state = jax.device_put(state)

    @jax.jit
    def embed(state: Any, tiles: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(_normalized(entry, tiles, jnp))

    return partial(embed, state)


def _plain(entry: _Entry, function: Callable[[Any], Any]) -> Run:
    return lambda tiles: function(_normalized(entry, tiles, np))


def _normalized(entry: _Entry, tiles: Any, numpy: Any) -> Any:
    """Normalize tiles in numpy or JAX. Without a normalization, return the bytes unchanged."""
    if entry.mean is None:
        return tiles
    levels = (255 * np.asarray(entry.mean)).astype(np.float32)
    scale = (1 / (255 * np.asarray(entry.std))).astype(np.float32)
    return (numpy.asarray(tiles, np.float32) - levels) * scale
