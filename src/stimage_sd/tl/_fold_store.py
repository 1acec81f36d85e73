"""Results of single folds on disk: each with what it was made with, whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import tempfile
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

SCORES, SETTINGS = "scores.parquet", "made_with.json"
#: how deep options that are objects of objects are looked into
_DEEPEST = 6


@dataclass
class FoldResult:
    """What one model made of one fold.

    Attributes
    ----------
    scores
        The table of `stimage_sd.tl.evaluate`, of the held-out sections.
    cost
        ``fit_seconds``, ``predict_seconds`` and ``peak_mb``.
    predictions
        Tables of predictions by held-out section, where they are kept.
    """

    scores: pd.DataFrame
    cost: dict[str, float]
    predictions: dict[str, ad.AnnData]


@dataclass(frozen=True)
class FoldStore:
    """A folder of results, a subfolder a model and fold; without a folder it keeps nothing."""

    root: Path | None

    def load(self, settings: Mapping[str, Any], *, predictions: bool) -> FoldResult | None:
        """Return the finished result of a model and fold; `None` where there is none.

        One that lacks predictions that are now asked for counts as none.

        Raises
        ------
        ValueError
            If it was made with other settings; the error names those that differ.
        """
        folder = self._folder(settings)
        if folder is None or not folder.is_dir():
            return None
        made_with = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        differing = list(_differences(made_with["settings"], json.loads(json.dumps(settings))))
        if differing:
            named = "; ".join(differing[:5]) + (" and others" if len(differing) > 5 else "")
            raise ValueError(
                f"The result of model {settings['model']!r} on fold {settings['fold']!r} in {self.root} was made with "
                f"other settings: {named}. Choose another folder with `out=`, or delete this one to begin anew."
            )
        files = {section: folder / f"{quote(section, safe='')}.h5ad" for section in settings["held_out"]}
        if predictions and not all(path.is_file() for path in files.values()):
            return None
        tables = {section: ad.read_h5ad(path) for section, path in files.items()} if predictions else {}
        return FoldResult(pd.read_parquet(folder / SCORES), made_with["cost"], tables)

    def save(self, settings: Mapping[str, Any], result: FoldResult) -> None:
        """Write a result beside, and move it to its place when it is complete."""
        target = self._folder(settings)
        if self.root is None or target is None:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=self.root))
        try:
            result.scores.to_parquet(made / SCORES)
            for section, table in result.predictions.items():
                table.write_h5ad(made / f"{quote(section, safe='')}.h5ad")
            made_with = {"settings": settings, "cost": result.cost}
            (made / SETTINGS).write_text(json.dumps(made_with, indent=1), encoding="utf-8")
            if target.exists():  # a result without the predictions that are now asked for
                shutil.rmtree(target)
            os.replace(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _folder(self, settings: Mapping[str, Any]) -> Path | None:
        # both are quoted, so that neither can hold the sign between them or leave the folder
        name = "@".join(quote(settings[key], safe="") for key in ("model", "fold"))
        return None if self.root is None else self.root / name


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


def fingerprint(sdata: SpatialData, table_key: str | None) -> dict[str, str]:
    """Hash what models learn from and are scored on: a section's counts, and its tiles with their embeddings."""
    counts, tiles = contract.counts(sdata, table_key), contract.tiles(sdata)
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
    """Say in plain values what a recipe is: whose function, with which options, or which object with which fields.

    Fields whose names begin with an underscore are the object's own business.
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
    """By name; a function from elsewhere by what it does as well, since no version tells its changes."""
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
    """Bytecode, names and constants, without where the function stands in its file."""
    constants = [
        _code(item) if isinstance(item, CodeType) else str(sorted(map(str, item))) if isinstance(item, frozenset)
        else repr(item)
        for item in code.co_consts
    ]  # fmt: skip
    return "|".join([code.co_code.hex(), ",".join(code.co_names), *constants])
