"""Store results of single folds with their settings, written completely or not at all."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any
from urllib.parse import quote

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._files import replacing, restored

SCORES, SETTINGS = "scores.parquet", "made_with.json"
#: errors raised for damaged files: ValueError for JSON and Parquet, others for HDF5
_DAMAGE = (ValueError, KeyError, TypeError, OSError)
#: maximum nesting depth of option objects that are described
_DEEPEST = 6


@dataclass
class FoldResult:
    """Result of a model on a fold.

    - `scores`: scores of the held-out sections, as returned by `stimage_sd.tl.evaluate`.
    - `cost`: ``fit_seconds``, ``predict_seconds`` and ``peak_mb``.
    - `predictions`: prediction tables by held-out section, if kept.
    """

    scores: pd.DataFrame
    cost: dict[str, float]
    predictions: dict[str, ad.AnnData]


@dataclass(frozen=True)
class FoldStore:
    """A folder with one subfolder per model and fold. Without a folder, nothing is stored."""

    root: Path | None

    def load(self, settings: Mapping[str, Any], *, predictions: bool) -> FoldResult | None:
        """Return the stored result of a model and fold, or `None` if there is no complete result.

        A result without the requested predictions counts as missing. A damaged result counts as missing and gives a
        warning.
        """
        folder = self._folder(settings)
        if folder is None or not folder.is_dir():
            return None
        try:
            made_with = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            stored, cost, scores = made_with["settings"], made_with["cost"], pd.read_parquet(folder / SCORES)
        except PermissionError:
            raise
        except _DAMAGE as error:
            _warn_of_damage(folder, error)
            return None
        differing = list(_differences(stored, json.loads(json.dumps(settings))))
        if differing:
            named = "; ".join(differing[:5]) + (" and others" if len(differing) > 5 else "")
            raise ValueError(
                f"The result of model {settings['model']!r} on fold {settings['fold']!r} in {self.root} was made with "
                f"other settings: {named}. Choose another folder with `out=`, or delete this one to start over."
            )
        files = {section: folder / f"{quote(section, safe='')}.h5ad" for section in settings["held_out"]}
        if predictions and not all(path.is_file() for path in files.values()):
            return None
        try:
            tables = {section: ad.read_h5ad(path) for section, path in files.items()} if predictions else {}
        except PermissionError:
            raise
        except _DAMAGE as error:
            _warn_of_damage(folder, error)
            return None
        return FoldResult(scores, cost, tables)

    def save(self, settings: Mapping[str, Any], result: FoldResult) -> None:
        """Write a result, replacing any earlier result of the same model and fold."""
        target = self._folder(settings)
        if target is None:
            return
        with replacing(target) as made:
            made.mkdir()
            result.scores.to_parquet(made / SCORES)
            for section, table in result.predictions.items():
                table.write_h5ad(made / f"{quote(section, safe='')}.h5ad")
            made_with = {"settings": settings, "cost": result.cost}
            (made / SETTINGS).write_text(json.dumps(made_with, indent=1), encoding="utf-8")

    def _folder(self, settings: Mapping[str, Any]) -> Path | None:
        # quoted, so that names can neither contain "@" nor leave the folder
        name = "@".join(quote(settings[key], safe="") for key in ("model", "fold"))
        return None if self.root is None else restored(self.root / name)


def _warn_of_damage(folder: Path, error: Exception) -> None:
    warnings.warn(f"The result in {folder} is damaged ({error}) and is made again.", UserWarning, stacklevel=4)


def _differences(found: Any, expected: Any, path: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = list(dict.fromkeys([*found, *expected]))
        return [
            line
            for key in keys
            for line in _differences(found.get(key), expected.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if found == expected else [f"`{path}` was {_short(found)}, is {_short(expected)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def fingerprint(sdata: SpatialData, source: contract.Source) -> dict[str, str]:
    """Hash the counts of a section and its tiles with their embeddings."""
    counts, tiles = contract.counts(sdata, source), contract.tiles(sdata)
    matrix = sp.csr_matrix(counts.X)
    names = [*map(str, counts.var_names), "", *map(str, counts.obs_names)]
    places = tiles.obs[[name for name in ("x", "y", "spot_id", "keep") if name in tiles.obs]]
    obsm = [np.asarray(tiles.obsm[key]) for key in sorted(tiles.obsm)]
    return {
        "counts": _hash(
            matrix.data.astype(np.float64),
            matrix.indices.astype(np.int64),
            matrix.indptr.astype(np.int64),
            "\n".join(names),
        ),
        "tiles": _hash(places.to_csv(), *obsm),
    }


def _hash(*parts: np.ndarray | str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
        digest.update(b"\0")
    return digest.hexdigest()


def describe(value: Any, *, depth: int = 0) -> Any:
    """Describe a recipe in plain values: its function and options, or its class and fields.

    Private fields (names beginning with an underscore) are left out.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth > _DEEPEST:
        return type(value).__qualname__

    def deeper(item: Any) -> Any:
        return describe(item, depth=depth + 1)

    if isinstance(value, np.ndarray):
        return f"array {value.shape} {_hash(value)}"
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): deeper(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [deeper(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, functools.partial):
        return {"call": deeper(value.func), "arguments": deeper(value.args), "options": deeper(value.keywords)}
    if inspect.ismethod(value):
        return {"call": deeper(value.__func__), "of": deeper(value.__self__)}
    if inspect.isfunction(value):
        return _describe_function(value, deeper)
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    fields = {key: deeper(item) for key, item in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    if inspect.isfunction(getattr(kind, "__call__", None)):  # noqa: B004  the function itself, not whether there is one
        fields["call"] = deeper(kind.__call__)
    return {"object": f"{kind.__module__}.{kind.__qualname__}", **fields}


def _describe_function(function: Callable[..., Any], deeper: Callable[[Any], Any]) -> Any:
    """Describe a function by name, and by its code if it is from another package."""
    name = f"{function.__module__}.{function.__qualname__}"
    if function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return name
    closure = inspect.getclosurevars(function).nonlocals
    return {
        "call": name,
        "code": _hash(_code(function.__code__)),
        "defaults": deeper([function.__defaults__, function.__kwdefaults__]),
        "around": deeper(closure),
    }


def _code(code: CodeType) -> str:
    """Return bytecode, names and constants, without positions in the file."""
    constants = [
        _code(item) if isinstance(item, CodeType) else str(sorted(map(str, item))) if isinstance(item, frozenset)
        else repr(item)
        for item in code.co_consts
    ]  # fmt: skip
    return "|".join([code.co_code.hex(), ",".join(code.co_names), *constants])
