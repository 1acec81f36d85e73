"""Models on disk: arrays in safetensors, the rest in JSON; loading can never run code."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

FORMAT_VERSION = 1
_ARRAYS = "model.safetensors"
_CONFIG = "config.json"
#: what reading a damaged file ends in: of a zip (RuntimeError where a flipped bit says that it is encrypted, or
#: compressed in an unknown way), of JSON and its encoding (both ValueError), of safetensors
_DAMAGE = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, KeyError, ValueError, SafetensorError)


def write_model(path: str | Path, *, kind: str, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write a model: one zip where the path ends in ``.stimage`` or ``.zip``, a directory otherwise.

    Parameters
    ----------
    path
        Where to; replaced as a whole where it exists and is a model.
    kind
        Which class reads it, such as ``"nb"``.
    config
        Whatever JSON holds.
    arrays
        The numbers.

    Returns
    -------
    The path.

    Raises
    ------
    FileExistsError
        If something that is no model lies at the path.
    """
    path = Path(path)
    if path.exists() and not _is_model(path):
        raise FileExistsError(f"{path} exists and is no stimage-sd model, so it is not replaced. Choose another name.")
    text = json.dumps({"format_version": FORMAT_VERSION, "kind": kind, **config}, indent=1)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    data = save_safetensors(contiguous)
    path.parent.mkdir(parents=True, exist_ok=True)
    # written beside and moved there when complete: an interrupted save leaves what was
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        if path.suffix in (".stimage", ".zip"):
            complete = temporary / path.name
            with zipfile.ZipFile(complete, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(_CONFIG, text)
                archive.writestr(_ARRAYS, data)
        else:
            complete = temporary / "model"
            complete.mkdir()
            (complete / _CONFIG).write_text(text)
            (complete / _ARRAYS).write_bytes(data)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(complete, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def load(path: str | Path) -> Any:
    """Load a fitted model.

    Parameters
    ----------
    path
        What `save` wrote, a file or a directory.

    Returns
    -------
    The model, of the class that was saved.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it is no model, is damaged, or was written by a newer version of the package.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.load("no-such.stimage")
    Traceback (most recent call last):
    FileNotFoundError: No model at no-such.stimage.
    """
    config, arrays = read_model(path)
    try:
        return model_from(config, arrays)
    except NotImplementedError as error:
        raise ValueError(f"{path} holds {error}. Update stimage-sd.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The model at {path} is damaged: {error}. Save it again.") from error


def model_from(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """Put a model of any kind together from what `read_model` read.

    Raises
    ------
    NotImplementedError
        If it is of a kind that this version does not know.
    KeyError, TypeError, AttributeError
        If something is missing or of another form.
    """
    from stimage_sd.models._baseline_model import BaselineModel
    from stimage_sd.models._cell_classifier import CellClassifier
    from stimage_sd.models._combined import CombinedModel
    from stimage_sd.models._finetuned import FinetunedModel
    from stimage_sd.models._gene_classifier import GeneClassifier
    from stimage_sd.models._nb import NBModel

    readers: dict[str, Any] = {
        "baseline": BaselineModel.from_parts,
        "cell_classifier": CellClassifier.from_parts,
        "combined": CombinedModel.from_parts,
        "finetuned": FinetunedModel.from_parts,
        "gene_classifier": GeneClassifier.from_parts,
        "nb": NBModel.from_parts,
    }
    content = dict(config)
    kind = content.pop("kind", None)
    if kind not in readers:
        raise NotImplementedError(f"a model of kind {kind!r}; this version knows {sorted(readers)}")
    return readers[kind](content, arrays)


def read_model(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read config and arrays of a model file, checked for version and damage."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No model at {path}.")
    try:
        text, data = _parts(path)
        config = json.loads(text)
    except _DAMAGE as error:
        raise ValueError(_unreadable(path, error)) from error
    _check_version(config, path)
    try:
        return config, load_safetensors(data)
    except _DAMAGE as error:
        raise ValueError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"Expected a stimage-sd model at {path}, but it cannot be read ({error}). "
        "It is truncated or something else; save the model again."
    )


def _parts(path: Path) -> tuple[str, bytes]:
    if path.is_dir():
        return (path / _CONFIG).read_text(), (path / _ARRAYS).read_bytes()
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        return archive.read(_CONFIG).decode(), archive.read(_ARRAYS)


def _check_version(config: Any, path: Path) -> None:
    version = config.pop("format_version", None) if isinstance(config, dict) else None
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
