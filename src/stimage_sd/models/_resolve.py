"""Resolve `model` arguments, which are a model or the path of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

from stimage_sd.models._load import load

Model = TypeVar("Model")


def as_model(model: Model | str | Path) -> Model:
    """Return a model unchanged, or load it if a path is given.

    >>> as_model("no-such.stimage")
    Traceback (most recent call last):
    FileNotFoundError: No model at no-such.stimage.
    """
    return cast(Model, load(model) if isinstance(model, str | Path) else cast(Any, model))
