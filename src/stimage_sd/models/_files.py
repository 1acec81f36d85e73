"""Model files: arrays in safetensors, everything else in JSON. Loading a model never runs code from the file."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from stimage_sd._files import replacing, restored

#: classes by kind of model
_KINDS: dict[str, Any] = {}
#: files have a checksum from version 2 on
FORMAT_VERSION = 2
_ARRAYS = "model.safetensors"
_CONFIG = "config.json"
#: the only array that may hold infinities
_LOG_ODDS = "intercepts"
#: limits on the unpacked size of a part: always allowed up to the first, in bytes; above it, the largest ratio of
#: unpacked to packed size
_ALWAYS_READ, _MOST_PACKED = 64 << 20, 100
#: errors of damaged files: from zip (RuntimeError if a flipped bit marks the part as encrypted or as compressed in an
#: unknown way), from JSON and its encoding (both ValueError), from safetensors
_DAMAGE = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, KeyError, ValueError, SafetensorError)


def write_model(path: str | Path, *, kind: str, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write a model to one zip if the path ends in ``.stimage`` or ``.zip``, otherwise to a directory.

    - `path`: file or directory to write. An existing model is replaced as a whole.
    - `kind`: kind of model, such as ``"nb"``. It decides which class reads the file.
    - `config`: values that JSON can hold.
    - `arrays`: arrays by name.
    - returns: the path.
    """
    path = Path(path)
    if restored(path).exists() and not _is_model(path):
        raise FileExistsError(
            f"{path} exists and is not a stimage-sd model, so it is not replaced. Choose another name."
        )
    if problem := _not_finite(arrays):
        raise ValueError(f"The model cannot be saved: {problem}. Check the training data for such values.")
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data = save_safetensors(contiguous)
    # through JSON and back, because the checksum covers the config as it will be read
    content = json.loads(json.dumps({"format_version": FORMAT_VERSION, "kind": kind, **config}))
    text = json.dumps({**content, "checksum": _checksum(content, data)}, indent=1)
    with replacing(path) as complete:
        if path.suffix in (".stimage", ".zip"):
            with zipfile.ZipFile(complete, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(_CONFIG, text)
                archive.writestr(_ARRAYS, data)
        else:
            complete.mkdir()
            (complete / _CONFIG).write_text(text)
            (complete / _ARRAYS).write_bytes(data)
    return path


class SavedModel(ABC):
    """A fitted model, written as a config and arrays and built from these again; a subclass states its ``kind``."""

    kind: ClassVar[str]

    def __init_subclass__(cls, *, kind: str) -> None:
        cls.kind = kind
        _KINDS[kind] = cls

    def save(self, path: str | Path) -> Path:
        """Write the model to one file if the path ends in ``.stimage``, otherwise to a directory.

        - `path`: file or directory to write. An existing model is replaced as a whole.
        - returns: the path.
        """
        config, arrays = self.to_parts()
        return write_model(path, kind=self.kind, config=config, arrays=arrays)

    @abstractmethod
    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the model's config and arrays, from which `from_parts` builds it again."""

    @classmethod
    @abstractmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
        """Build a model from what `to_parts` returned."""


def parts_of(model: Any, prefix: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the parts of a model inside another one, with its kind and its arrays under a prefix."""
    config, arrays = model.to_parts()
    return {"kind": model.kind, **config}, {prefix + name: array for name, array in arrays.items()}


def under(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays under a prefix, by their names without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def model_from(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """Build a model of any registered kind from what `read_model` returned."""
    content = dict(config)
    name = content.pop("kind", None)
    if name not in _KINDS:
        raise NotImplementedError(f"a model of kind {name!r}; this version knows {sorted(_KINDS)}")
    return _KINDS[name].from_parts(content, arrays)


def read_model(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the config and arrays of a model file, and check version and checksum."""
    path = restored(Path(path))
    if not path.exists():
        raise FileNotFoundError(f"No model at {path}.")
    try:
        text, data = _parts(path)
        config = json.loads(text)
    except _DAMAGE as error:
        raise ValueError(_unreadable(path, error)) from error
    _check_version(config, path)
    try:
        arrays = load_safetensors(data)
    except _DAMAGE as error:
        raise ValueError(_unreadable(path, error)) from error
    stated = config.pop("checksum", None)
    if (stated is not None or config["format_version"] > 1) and stated != _checksum(config, data):
        raise ValueError(
            f"The model at {path} is damaged: its content does not match its checksum. Copy it again, or save the "
            "model again."
        )
    del config["format_version"]
    if problem := _not_finite(arrays):
        raise ValueError(f"The model at {path} is damaged: {problem}. Save it again.")
    return config, arrays


def _checksum(config: Mapping[str, Any], data: bytes) -> str:
    """Hash the content of a file, independent of the layout of its JSON."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def _not_finite(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Describe the first array with values that are not finite."""
    for name, array in arrays.items():
        values = np.asarray(array)
        # log odds are infinite for a gene that is always or never High
        wrong = np.isnan(values) if name == _LOG_ODDS else ~np.isfinite(values)
        if wrong.any():
            return f"{int(wrong.sum())} of {values.size} values of its array {name!r} are not finite"
    return None


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"Expected a stimage-sd model at {path}, but it cannot be read ({error}). "
        "It is truncated or not a model. Save the model again."
    )


def _parts(path: Path) -> tuple[str, bytes]:
    if path.is_dir():
        return (path / _CONFIG).read_text(), (path / _ARRAYS).read_bytes()
    with zipfile.ZipFile(path) as archive:
        for name in (_CONFIG, _ARRAYS):
            part = archive.getinfo(name)
            if part.file_size > max(_ALWAYS_READ, _MOST_PACKED * part.compress_size):
                raise ValueError(
                    f"its {name} unpacks from {part.compress_size:,} to {part.file_size:,} bytes, which no model does"
                )
        return archive.read(_CONFIG).decode(), archive.read(_ARRAYS)


def _check_version(config: Any, path: Path) -> None:
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"Expected a stimage-sd model at {path}, found a config without a format version.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The model at {path} has format version {version}; this package reads up to {FORMAT_VERSION}. "
            "Update it: `pip install --upgrade stimage-sd`."
        )


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / _CONFIG).is_file() or not any(path.iterdir())
    return path.suffix in (".stimage", ".zip")
