"""Extractors: networks with weights that turn tiles into embeddings."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from flax import nnx
from numpy.typing import NDArray

from stimage_sd._cache import keep_compiled
from stimage_sd.models._weights import sha256_of_arrays
from stimage_sd.nn import layers, onnx_cells, onnx_graph
from stimage_sd.nn.accelerator import Queue, on_accelerator
from stimage_sd.nn.onnx_changes import Box, changed_part, with_outputs
from stimage_sd.nn.parts import parts_of, run_parts

Tiles = NDArray[np.uint8]
Embeddings = NDArray[np.float32]
Network = nnx.Module | Callable[[Any], Any]
Run = Callable[[Tiles], Any]

# Tiles per run of ONNX Runtime. From 8 tiles on, the activations no longer fit the CPU cache, which is slower.
# They take 20 MB per tile of 299 px.
ONNX_BATCH = 2
# Pixels per run for smaller tiles, such as nuclei
_ONNX_PX = ONNX_BATCH * 128 * 128
# Share of changed pixels up to which the unchanged rest is shared between copies.
_MOST_CHANGED = 0.7
_recording = threading.Lock()


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
        convolutional networks: tiles keep the size they were cut at (``stimage_sd.pp.tile(target_px=)``).
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
    entry
        Entry of the registry, from which another process builds the extractor.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.models import get_extractor
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
    entry: Entry = field(repr=False)
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
        >>> from stimage_sd.models import get_extractor
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
        return self.entry.is_recordable and not on_accelerator()

    @property
    def is_on_accelerator(self) -> bool:
        """Whether the network runs on a GPU or TPU that JAX found."""
        return isinstance(self._network, nnx.Module) and on_accelerator()

    @property
    def pools_cells(self) -> bool:
        """Whether embeddings are means over the positions of the tile, so that `cell_means` exists."""
        return self.entry.is_recordable

    def cell_means(self, side: int, n: int) -> Run:
        """Return the function from uint8 images to the embeddings of each of their n × n equal cells.

        It runs like the extractor. A cell's embedding is the mean over the positions of the network in the cell. These
        positions also see pixels around the cell.

        Parameters
        ----------
        side
            Height and width of the images in pixels.
        n
            Cells per side. Cells are at least as wide as the network's coarsest stride, 32 pixels.

        Returns
        -------
        run
            From uint8 (n_images, side, side, 3) to float32 (n_images, n, n, embedding_size).
        """
        with _recording:  # threads that begin together would each record the network
            return _cell_means(self, side, n)

    def normalize(self, tiles: jax.Array) -> jax.Array:
        """Normalize uint8 tiles in JAX. Without `mean` and `std`, return the tiles unchanged."""
        return _normalized(self.entry, tiles, jnp)

    def first_parts(self, n_parts: int) -> Run:
        """Return a function from uint8 tiles to the output of the network's first parts, channels last.

        It runs like the extractor: on the calling thread alone if the network `is_recordable`.
        """
        if not isinstance(self._network, nnx.Module):
            raise TypeError(f"The extractor {self.name!r} is a plain function, which has no parts.")
        parts = parts_of(self._network)
        if self.is_recordable and n_parts:
            size = self.embedding_size if n_parts == len(parts) else None
            run = _recorded(self.entry, partial(run_parts, parts[:n_parts]), embedding_size=size)
            return lambda tiles: np.moveaxis(run(tiles), 1, -1)
        keep_compiled()
        graph, state = nnx.split(self._network)

        @jax.jit
        def compiled(state: Any, tiles: jax.Array) -> jax.Array:
            return run_parts(parts_of(nnx.merge(graph, state))[:n_parts], self.normalize(tiles))

        return partial(compiled, jax.device_put(state) if n_parts else state)

    def for_copies(self, image: Tiles, box: Box) -> tuple[Box, Run]:
        """Return the network for copies of an image that differ in one box.

        Parameters
        ----------
        image
            uint8 (height, width, 3).
        box
            Pixels that differ between copies.

        Returns
        -------
        crop, run
            The box to cut from the copies, and the function from these crops, uint8 (n_copies, y, x, 3), to the
            embeddings of the whole copies. A network in ONNX Runtime computes only what the box can change. Any other
            network gets whole copies.
        """
        height, width = image.shape[:2]
        whole = Box(0, 0, height, width)
        if not self.is_recordable or box.area > _MOST_CHANGED * whole.area:
            return whole, self
        recorded = _record(self.entry, self._network, embedding_size=self.embedding_size)
        part = changed_part(recorded, height, width, box)
        if part is None:
            return whole, self
        names = list(dict.fromkeys(shared.value for shared in part.shared.values()))
        outputs = _session(with_outputs(recorded, names)).run(names, {"tiles": image[None]})
        values = dict(zip(names, outputs, strict=True))
        shared = {name: one.of(values[one.value]) for name, one in part.shared.items()}
        return part.crop, partial(_run_in_batches, _session(part.model), shared)


@dataclass(frozen=True, eq=False)
class Entry:
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


def registered(weights: Path | None, *, name: str, network: Network, weights_hash: str) -> tuple[Network, str]:
    if weights is not None:
        raise ValueError(f"The extractor {name!r} was registered with its weights; it takes no weights=.")
    if not weights_hash and isinstance(network, nnx.Module):
        state = nnx.to_flat_state(nnx.state(network, nnx.Not(nnx.RngState)))
        arrays = {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in state}
        weights_hash = sha256_of_arrays(arrays)
    return network, weights_hash


def build(entry: Entry, weights: Path | None) -> Extractor:
    network, weights_hash = entry.load(weights)
    if entry.is_recordable and isinstance(network, nnx.Module) and not on_accelerator():
        run = _recorded(entry, network, embedding_size=entry.embedding_size)
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
        entry=entry,
        _network=network,
        _run=run,
    )


def _recorded(entry: Entry, network: Callable[[Any], Any], *, embedding_size: int | None) -> Run:
    """Run a network in ONNX Runtime on the calling thread."""
    session = _session(_record(entry, network, embedding_size=embedding_size))
    return partial(_run_in_batches, session, {})


def _record(entry: Entry, network: Callable[[Any], Any], *, embedding_size: int | None) -> onnx.ModelProto:
    mean, std = entry.mean or (0.0, 0.0, 0.0), entry.std or (1.0, 1.0, 1.0)
    return onnx_graph.record(network, mean=mean, std=std, embedding_size=embedding_size)


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run_in_batches(
    session: onnxruntime.InferenceSession, shared: dict[str, NDArray[np.float32]], tiles: Tiles
) -> NDArray[np.float32]:
    step = max(ONNX_BATCH, _ONNX_PX // (tiles.shape[1] * tiles.shape[2]))
    parts = [tiles[start : start + step] for start in range(0, len(tiles), step)]
    return np.concatenate([session.run(["embedding"], {"tiles": part, **shared})[0] for part in parts])


def _compiled(entry: Entry, network: nnx.Module) -> Run:
    """Compile a Flax module for JAX's default device."""
    keep_compiled()
    graph, state = nnx.split(network)
    state = jax.device_put(state)

    @jax.jit
    def embed(state: Any, tiles: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(_normalized(entry, tiles, jnp))

    run = partial(embed, state)
    return Queue(run) if on_accelerator() else run


@lru_cache(maxsize=8)
def _cell_means(extractor: Extractor, side: int, n: int) -> Run:
    entry, network = extractor.entry, extractor._network
    if extractor.is_recordable:
        recorded = _record(entry, network, embedding_size=extractor.embedding_size)
        session = _session(onnx_cells.means_of_cells(recorded, side, n))
        # images one by one: their activations do not fit the CPU cache
        return lambda images: np.moveaxis(
            np.concatenate([session.run(["embedding"], {"tiles": image[None]})[0] for image in images]), 1, -1
        )
    keep_compiled()
    graph, state = nnx.split(network)

    @jax.jit
    def compiled(state: Any, images: jax.Array) -> jax.Array:
        with layers.means_of_cells(n):
            return nnx.merge(graph, state)(_normalized(entry, images, jnp))

    run = partial(compiled, jax.device_put(state))
    return Queue(run) if on_accelerator() else lambda images: np.asarray(run(images))


def _plain(entry: Entry, function: Callable[[Any], Any]) -> Run:
    return lambda tiles: function(_normalized(entry, tiles, np))


def _normalized(entry: Entry, tiles: Any, numpy: Any) -> Any:
    """Normalize tiles in numpy or JAX. Without a normalization, return the bytes unchanged."""
    if entry.mean is None:
        return tiles
    levels = (255 * np.asarray(entry.mean)).astype(np.float32)
    scale = (1 / (255 * np.asarray(entry.std))).astype(np.float32)
    return (numpy.asarray(tiles, np.float32) - levels) * scale
