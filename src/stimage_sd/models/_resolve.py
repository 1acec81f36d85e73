"""Resolve `model` arguments: a model, the path of a model, or the name of a ready model."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar, cast

from stimage_sd._files import restored
from stimage_sd.models._load import load
from stimage_sd.models._ready import is_ready, pretrained
from stimage_sd.models._wrapped import Wrapped

Model = TypeVar("Model")


def as_model(model: Model | str | Path) -> Model:
    """Return a model unchanged, or load it if a path or the name of a ready model is given.

    >>> as_model("no-such.stimage")
    Traceback (most recent call last):
    FileNotFoundError: No model at no-such.stimage. Ready models are breast_her2st, breast_visium, prostate_visium.
    """
    if isinstance(model, Wrapped):
        raise ValueError(
            "The values of a wrapped predictor are no counts yet. Link them to counts on sections that have some: "
            "`model = stimage_sd.tl.calibrate(sections, wrapped)`."
        )
    if not isinstance(model, str | Path):
        return model
    if restored(Path(model)).exists():
        return cast(Model, load(model))
    if is_ready(model):
        return cast(Model, pretrained(str(model)))
    raise FileNotFoundError(f"No model at {model}. Ready models are {', '.join(pretrained()['name'])}.")
