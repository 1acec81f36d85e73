"""Cellpose, versions 3 and 4, on the haematoxylin channel; nothing of it is imported before it is asked for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stimage_sd.nn.nuclear_contrast import haematoxylin

#: the model of version 3 that was trained on nuclei; version 4 has one for all, which it names itself
_NUCLEI_OF_VERSION_3 = "nuclei"
#: versions whose calls are known
_VERSIONS = (3, 4)


class CellposeNuclei:
    """Finds nuclei of H&E by Cellpose, as the paper does: on haematoxylin after colour deconvolution.

    It is picklable; each process loads the weights once.

    Parameters
    ----------
    model
        Name of one of Cellpose's models, or path of a file of weights; by default ``"nuclei"`` of version 3, and of
        version 4 its own default. A name's weights are downloaded by Cellpose where it does not have them.
    nucleus_px
        Diameter of a nucleus, about, px.
    low, high
        Haematoxylin that becomes 0 and 1. They are a section's, not a picture's, so that what is found in a place does
        not depend on what else is in the picture.

    Raises
    ------
    ModuleNotFoundError
        If Cellpose is not installed.
    ImportError
        If its version is neither 3 nor 4.
    FileNotFoundError
        If `model` is a path, and no file is there.
    ValueError
        If `model` is none of Cellpose's names.
    """

    def __init__(self, model: str | Path | None, *, nucleus_px: float, low: float, high: float) -> None:
        self.version = cellpose_version()
        self.model = _known_model(model, self.version)
        self.nucleus_px = float(nucleus_px)
        self.low, self.high = float(low), float(max(high, low + 1e-3))
        self._network: Any = None
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """What tells it from others: version, weights, diameter, scale."""
        weights = self.model
        if os.path.isfile(weights):
            with open(weights, "rb") as file:
                weights = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return f"cellpose{self.version}-{weights}-{self.nucleus_px:g}-{self.low:.4f}-{self.high:.4f}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_network", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._network, self._lock = None, threading.Lock()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Return label maps, ``int32 (batch, y, x)``, of pictures, ``uint8 (batch, y, x, 3)``."""
        return np.stack([self._labels(image) for image in images])

    def _labels(self, image: NDArray[np.uint8]) -> NDArray[np.int32]:
        stain = haematoxylin(np.moveaxis(image, -1, 0))
        scaled = np.clip((stain - self.low) / (self.high - self.low), 0, 1).astype(np.float32)
        options: dict[str, Any] = {"diameter": self.nucleus_px, "normalize": False}
        if self.version == 3:
            options["channels"] = [0, 0]  # one channel, and no second one of nuclei
        with self._lock:  # the network takes all cores by itself
            if self._network is None:
                self._network = _load(self.model)
            masks = self._network.eval(scaled, **options)[0]
        return np.asarray(masks).reshape(scaled.shape).astype(np.int32)


def cellpose_version() -> int:
    """Return the major version of Cellpose.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    ImportError
        If it is of a version whose calls are not known.
    """
    try:
        version = importlib.metadata.version("cellpose")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            'Found no Cellpose. Install it with `pip install "stimage-sd[nuclei]"`, or find nuclei without it: '
            '`stimage_sd.pp.segment_nuclei(sdata, method="watershed")`.'
        ) from error
    major = int(version.split(".")[0])
    if major not in _VERSIONS:
        raise ImportError(f'Expected Cellpose 3 or 4, found {version}. Run `pip install "cellpose>=4,<5"`.')
    return major


def _known_model(model: str | Path | None, version: int) -> str:
    """Path or name of a model; Cellpose itself would take another one in silence where it finds none."""
    from cellpose import models

    if model is None:
        default = inspect.signature(models.CellposeModel).parameters["pretrained_model"].default
        return _NUCLEI_OF_VERSION_3 if version == 3 else str(default)
    if Path(model).expanduser().is_file():
        return str(Path(model).expanduser().resolve())
    names = sorted({*models.MODEL_NAMES, *models.get_user_models()})
    if str(model) in names:
        return str(model)
    if isinstance(model, Path) or len(Path(model).parts) > 1 or Path(model).suffix:
        raise FileNotFoundError(f"Found no file of Cellpose's weights at {str(model)!r}.")
    raise ValueError(
        f"Expected `model` as the path of a file, or one of Cellpose {version}'s names {names}; found {str(model)!r}."
    )


def _load(model: str) -> Any:
    from cellpose import core, models

    return models.CellposeModel(gpu=bool(core.use_gpu()), pretrained_model=model)
