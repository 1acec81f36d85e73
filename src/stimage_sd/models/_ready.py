"""Ready models: fitted once on public sections, certified, and kept in the cache folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, overload

import pandas as pd

from stimage_sd import __version__
from stimage_sd._cache import cache_dir
from stimage_sd._settings import logger
from stimage_sd.models._load import load


@overload
def pretrained() -> pd.DataFrame: ...
@overload
def pretrained(name: str) -> Any: ...
def pretrained(name: str | None = None) -> Any:
    """Return a ready model, or list the ready models.

    Ready models are not downloaded. On first use the public sections of a model are downloaded and checked, and the
    model is fitted to them with the defaults of this package, certified on a section that was left out
    (`stimage_sd.tl.certify`), and kept in the cache folder with its card. This takes minutes, later calls a second.

    Parameters
    ----------
    name
        Name of a ready model. Default: list them.

    Returns
    -------
    The fitted model. Without a name, a table with one row per ready model: ``name``, ``tissue``, ``platform``,
    ``trained_on``, ``tested_on``, ``minutes`` and ``download_mb`` of the first use, and ``path``, the file of the model
    if it is in the cache.

    Raises
    ------
    ValueError
        If no ready model has this name.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.pretrained()["name"].tolist()
    ['breast_her2st', 'breast_visium', 'prostate_visium']
    >>> model = sti.models.pretrained("breast_her2st")  # doctest: +SKIP
    """
    recipes = _recipes()
    if name is None:
        return pd.DataFrame([{**recipe.about(), "path": _cached(one)} for one, recipe in recipes.items()])
    if name not in recipes:
        raise ValueError(f"Expected the name of a ready model, one of {', '.join(recipes)}, found {name!r}.")
    path = path_of(name)
    if not path.exists():
        about = recipes[name].about()
        logger.warning(
            "Fitting the ready model %r to %s. This takes about %d min and %d MB of downloads, once.",
            name, about["trained_on"], about["minutes"], about["download_mb"],
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        model = recipes[name].fit()
        if model.certificate is not None:
            model.certificate.write(path.with_suffix(".html"))
        model.save(path)
    return load(path)


def is_ready(name: str | Path) -> bool:
    """Return whether a ready model has this name."""
    return str(name) in _recipes()


def _recipes() -> dict[str, Any]:
    # imported by name, because the recipes read datasets and fit models
    recipes: dict[str, Any] = importlib.import_module("stimage_sd._ready").RECIPES
    return recipes


def path_of(name: str) -> Path:
    """Return the file of a ready model of this version of the package."""
    return cache_dir() / "ready" / f"{name}-{__version__}-{_recipes()[name].revision}.stimage"


def _cached(name: str) -> str:
    path = path_of(name)
    return str(path) if path.exists() else ""
