"""Fitted networks that find nuclei and their cell types, and their files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import scipy.special
from flax import nnx
from numpy.typing import NDArray

from stimage_sd._cache import keep_compiled
from stimage_sd._shown import Facts, counted, shown
from stimage_sd.image.hv_maps import hv_watershed
from stimage_sd.models._facts import training_facts
from stimage_sd.models._files import SavedModel
from stimage_sd.models._network_arrays import network_arrays, put_arrays
from stimage_sd.models._weights import sha256_of_arrays
from stimage_sd.nn import onnx_graph
from stimage_sd.nn.accelerator import Queue, on_accelerator
from stimage_sd.nn.hovernet import HoVerNet, HoVerNetSize

#: diameter of a nucleus, µm
NUCLEUS_UM = 8.0
#: a slide may have at most this multiple of the training images' micrometers per pixel
MOST_COARSE = 1.25
#: the network takes images whose sides are divisible by this
_STEP = 8
#: An image keeps its memory for the next one if its values times the network's width are at most this. On windows of
#: 640 px this saves a sixth of the small network's time, and keeps 0.8 GB. Larger networks gain little.
_KEPT = 20_000_000


@runtime_checkable
class CellFinder(Protocol):
    """A network that finds nuclei and their types, such as a fitted `CellClassifier`.

    - `classes`: names of the types.
    - `mpp`: micrometers per pixel of the images that the network takes.
    - `n_values`: number of values per pixel: one probability per class, then any features.
    - `key`: identifier of the network, such as a hash of its weights.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the types."""
        ...

    @property
    def mpp(self) -> float:
        """Micrometers per pixel of the images that the network takes."""
        ...

    @property
    def n_values(self) -> int:
        """Number of values per pixel."""
        ...

    @property
    def key(self) -> str:
        """Identifier of the network."""
        ...

    def __call__(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Find the nuclei in images.

        - `images`: ``uint8 (batch, y, x, 3)``.
        - returns: labels ``int32 (batch, y, x)``, 0 for no nucleus, and values ``float32 (batch, y, x, n_values)``.
        """
        ...


class CellMaps(NamedTuple):
    """Output of the network for every pixel, all ``float32``.

    - `nuclear`: ``(batch, y, x)``, probability that the pixel belongs to a nucleus.
    - `hv`: ``(batch, 2, y, x)``, horizontal and vertical distance.
    - `types`: ``(batch, n_classes + 1, y, x)``, probabilities of background and types.
    - `features`: ``(batch, n_features, y, x)``, features from which the types are computed.
    """

    nuclear: NDArray[np.float32]
    hv: NDArray[np.float32]
    types: NDArray[np.float32]
    features: NDArray[np.float32]


def compiled(network: HoVerNet) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Compile a network for JAX's default device, as a function from images to stacked maps, channels first."""
    keep_compiled()
    graph, state = nnx.split(network)
    state = jax.device_put(state)

    @jax.jit
    def maps(state: Any, images: jax.Array) -> jax.Array:
        scaled = images.astype(jnp.float32) / 255
        return jnp.moveaxis(nnx.merge(graph, state).stacked(scaled), -1, 1)

    return Queue(partial(maps, state))


@shown
@dataclass(frozen=True, eq=False)
class CellClassifier(SavedModel, kind="cell_classifier"):
    """A HoVer-Net that finds the nuclei in H&E images and their types.

    Made by `stimage_sd.tl.fit_cell_classifier`, loaded by `stimage_sd.models.load`.

    Attributes
    ----------
    classes
        Names of the types, in the order of the probabilities.
    size
        Size of the network.
    mpp
        Micrometers per pixel of the training images.
    tile_px
        Side of the training tiles, px.
    arrays
        The network's arrays by their path in the network.
    training
        Record of the fit: sections, cells per class, options, package versions, history.
    """

    classes: tuple[str, ...]
    size: HoVerNetSize
    mpp: float
    tile_px: int
    arrays: dict[str, NDArray[Any]]
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def n_features(self) -> int:
        """Number of features per nucleus: channels of the last layer of the type branch."""
        return self.size.width

    @property
    def n_values(self) -> int:
        """Number of values per pixel: one probability per class, then the features."""
        return len(self.classes) + self.n_features

    @cached_property
    def key(self) -> str:
        """Identifier of the network: a hash of its arrays, and `mpp`."""
        return f"hovernet-{sha256_of_arrays(self.arrays)[:16]}-{self.mpp:g}"

    @cached_property
    def module(self) -> HoVerNet:
        """The network."""
        network: HoVerNet = nnx.eval_shape(lambda: HoVerNet(len(self.classes), size=self.size, rngs=nnx.Rngs(0)))
        put_arrays(network, self.arrays, name="hovernet")
        return network

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    @cached_property
    def _run(self) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
        """Function from ``uint8 (1, y, x, 3)`` to the stacked maps, ``float32 (1, n_maps, y, x)``."""
        if on_accelerator():
            return compiled(self.module)
        session, releasing = self._session, onnxruntime.RunOptions()
        releasing.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

        def run(image: NDArray[np.uint8]) -> NDArray[np.float32]:
            large = image.size * self.size.width > _KEPT
            result: NDArray[np.float32] = session.run(["embedding"], {"tiles": image}, releasing if large else None)[0]
            return result

        return run

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        model = onnx_graph.record(self.module.stacked, mean=[0.0] * 3, std=[1.0] * 3, embedding_size=None)
        options = onnxruntime.SessionOptions()
        # one thread per image, because the tile stream runs as many images at once as there are cores
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __getstate__(self) -> dict[str, Any]:
        made = ("module", "_run", "_session", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def maps(self, images: NDArray[np.uint8]) -> CellMaps:
        """Compute the network's maps for images of any size.

        Parameters
        ----------
        images
            ``uint8 (batch, y, x, 3)``, at `mpp`.

        Returns
        -------
        The maps, as large as the images. If a side is not divisible by 8, the image is padded by mirroring at its
        lower and right border.
        """
        nuclear, hv, types, features = np.split(self._stacked(images), [1, 3, 4 + len(self.classes)], axis=1)
        return CellMaps(nuclear=nuclear[:, 0], hv=hv, types=types, features=features)

    def _stacked(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return nuclear probability, distances, probabilities of types and features, ``(batch, n_maps, y, x)``."""
        height, width = images.shape[1:3]
        padding = [(0, 0), (0, -height % _STEP), (0, -width % _STEP), (0, 0)]
        padded = np.pad(images, padding, mode="symmetric") if height % _STEP or width % _STEP else images
        with self._lock:
            run = self._run
        outputs = [run(padded[n : n + 1]) for n in range(len(images))]
        # an accelerator's arrays cannot be written
        maps = np.require(outputs[0] if len(outputs) == 1 else np.concatenate(outputs), requirements="W")
        outside, stacked = maps[:, 0, :height, :width], maps[:, 1:, :height, :width]
        stacked[:, 0] = scipy.special.expit(stacked[:, 0] - outside)
        types = stacked[:, 3 : 4 + len(self.classes)]
        types -= types.max(axis=1, keepdims=True)
        np.exp(types, out=types)
        types /= types.sum(axis=1, keepdims=True)
        return stacked

    def __call__(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Find the nuclei in images.

        Parameters
        ----------
        images
            ``uint8 (batch, y, x, 3)``, at `mpp`.

        Returns
        -------
        Labels ``int32 (batch, y, x)``, 0 for no nucleus, and values ``float32 (batch, y, x, n_values)``: the
        probabilities of the classes without the background, then the features.
        """
        stacked = self._stacked(images)
        labels = np.stack([hv_watershed(one[0], one[1:3], nucleus_px=NUCLEUS_UM / self.mpp) for one in stacked])
        return labels, np.moveaxis(stacked[:, 4:], 1, -1)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays that the model is saved as."""
        config = {
            "classes": list(self.classes),
            "size": asdict(self.size),
            "mpp": self.mpp,
            "tile_px": self.tile_px,
            "training": self.training,
        }
        return config, dict(self.arrays)

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> CellClassifier:
        """Build a model from what `to_parts` returned."""
        size = dict(config["size"])
        size |= {name: tuple(size[name]) for name in ("depths", "dense")}
        model = cls(
            classes=tuple(config["classes"]),
            size=HoVerNetSize(**size),
            mpp=float(config["mpp"]),
            tile_px=int(config["tile_px"]),
            arrays=dict(arrays),
            training=dict(config["training"]),
        )
        try:
            _ = model.module
        except ValueError as error:
            raise KeyError(str(error)) from error
        return model

    @classmethod
    def of(cls, network: nnx.Module, **parts: Any) -> CellClassifier:
        """Build a model from a network and the other attributes."""
        return cls(arrays=network_arrays(network), **parts)

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        n_numbers = sum(array.size for array in self.arrays.values())
        return {
            "types": counted(self.classes),
            "network": f"HoVer-Net of {n_numbers:,} numbers",
            "images": f"{self.mpp:g} µm per pixel, in tiles of {self.tile_px} px",
            **training_facts(self.training),
        }
