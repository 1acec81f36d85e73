"""Cellpose 4 on the hematoxylin channel. Cellpose is imported on first use."""

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

from stimage_sd.image.nuclear_contrast import hematoxylin

#: supported major version
_VERSION = 4


class CellposeNuclei:
    """Find nuclei in H&E with Cellpose on hematoxylin after color deconvolution, as in the paper.

    Instances can be pickled. Each process loads the weights once.

    - `model`: name of a Cellpose model, or path of a file of weights. Default: Cellpose's own. Cellpose downloads the
      weights of a named model if they are missing.
    - `nucleus_px`: approximate diameter of a nucleus, px.
    - `low`, `high`: hematoxylin values that are scaled to 0 and 1. They belong to the section, so that nuclei in one
      place do not depend on the rest of the image.
    """

    def __init__(self, model: str | Path | None, *, nucleus_px: float, low: float, high: float) -> None:
        check_cellpose()
        self.model = _known_model(model)
        self.nucleus_px = float(nucleus_px)
        self.low, self.high = float(low), float(max(high, low + 1e-3))
        self._network: Any = None
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """Identifier of the method: version of Cellpose, weights, diameter and scale."""
        weights = self.model
        if os.path.isfile(weights):
            with open(weights, "rb") as file:
                weights = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return f"cellpose{_VERSION}-{weights}-{self.nucleus_px:g}-{self.low:.4f}-{self.high:.4f}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_network", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._network, self._lock = None, threading.Lock()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Return label maps ``int32 (batch, y, x)`` of images ``uint8 (batch, y, x, 3)``."""
        return np.stack([self._labels(image) for image in images])

    def _labels(self, image: NDArray[np.uint8]) -> NDArray[np.int32]:
        stain = hematoxylin(np.moveaxis(image, -1, 0))
        scaled = np.clip((stain - self.low) / (self.high - self.low), 0, 1).astype(np.float32)
        with self._lock:  # the network uses all cores
            if self._network is None:
                self._network = _load(self.model)
            masks = self._network.eval(scaled, diameter=self.nucleus_px, normalize=False)[0]
        return np.asarray(masks).reshape(scaled.shape).astype(np.int32)


def check_cellpose() -> None:
    """Check that a supported version of Cellpose is installed."""
    try:
        version = importlib.metadata.version("cellpose")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            'Found no Cellpose. Install it with `pip install "stimage-sd[nuclei]"`, or find nuclei without it: '
            '`stimage_sd.pp.segment_nuclei(sdata, method="watershed")`.'
        ) from error
    if int(version.split(".")[0]) != _VERSION:
        raise ImportError(f'Expected Cellpose {_VERSION}, found {version}. Run `pip install "cellpose>=4,<5"`.')


def _known_model(model: str | Path | None) -> str:
    """Return the path or name of a model. Without this check, Cellpose silently uses another model."""
    from cellpose import models

    if model is None:
        return str(inspect.signature(models.CellposeModel).parameters["pretrained_model"].default)
    if Path(model).expanduser().is_file():
        return str(Path(model).expanduser().resolve())
    names = sorted({*models.MODEL_NAMES, *models.get_user_models()})
    if str(model) in names:
        return str(model)
    if isinstance(model, Path) or len(Path(model).parts) > 1 or Path(model).suffix:
        raise FileNotFoundError(f"Found no file of Cellpose's weights at {str(model)!r}.")
    raise ValueError(
        f"Expected `model` as the path of a file, or one of Cellpose {_VERSION}'s names {names}; found {str(model)!r}."
    )


def _load(model: str) -> Any:
    from cellpose import core, models

    return models.CellposeModel(gpu=bool(core.use_gpu()), pretrained_model=model)
