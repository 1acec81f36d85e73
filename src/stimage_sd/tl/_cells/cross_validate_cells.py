"""Cross-validation of cell finders, with folds of whole sections or patients."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import shapely
from spatialdata import SpatialData

from stimage_sd import __version__, contract
from stimage_sd._progress import tqdm
from stimage_sd._settings import logger
from stimage_sd.models._cell_classifier import CellFinder
from stimage_sd.tl._cells.cell_tiles import CELL_TYPE
from stimage_sd.tl._cells.evaluate_cells import Match, evaluate_cells
from stimage_sd.tl._cells.predict_cells import predict_cells
from stimage_sd.tl._score.cross_validate import PeakMemory, Strategy, accepted_options, leave_out, shallow_copy
from stimage_sd.tl._score.fold_store import FoldResult, FoldStore, describe

#: takes a cohort and returns a fitted cell finder
CellRecipe: TypeAlias = Callable[..., Any]
#: name of the predicted nuclei's shapes, beside the measured nuclei
_PREDICTED = "nuclei_predicted"
#: cell type in rows with scores of all cells
ALL = "all"
_COLUMNS = ["section", "model", "cell_type", "metric", "value", "fold", "fit_seconds", "predict_seconds", "peak_mb"]


def cross_validate_cells(
    data: contract.Cohort,
    models: Mapping[str, CellRecipe],
    *,
    strategy: Strategy = "leave-one-section-out",
    patients: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    match: Match = "iou",
    radius_um: float = 3.0,
    truth_key: str = contract.NUCLEI,
    label_key: str = CELL_TYPE,
    seed: int = 0,
) -> pd.DataFrame:
    """Cross-validate cell finders with folds of whole sections or patients.

    Tiles of one section are never in both training and test set. The input sections are not changed.

    Parameters
    ----------
    data
        At least two sections, with tissue or tiles, measured nuclei and their types.
    models
        Recipes, keyed by model name. A recipe takes a cohort and returns a fitted model, such as
        ``functools.partial(sti.tl.fit_cell_classifier, n_epochs=20)``. A recipe with an argument `seed` gets the `seed`
        of this call.
    strategy, patients
        Sections that are held out together, as in `stimage_sd.tl.cross_validate`.
    out
        Folder for the results. An interrupted call resumes from this folder.
    match, radius_um, truth_key, label_key
        As in `stimage_sd.tl.evaluate_cells`.
    seed
        Seed for the recipes that take one.

    Returns
    -------
    One row per section, model, class and metric: ``section``, ``model``, ``cell_type`` (``"all"`` for scores of all
    cells), ``metric``, ``value``. Columns ``fold``, ``fit_seconds``, ``predict_seconds`` and ``peak_mb`` are as in
    `stimage_sd.tl.cross_validate`.

    Raises
    ------
    KeyError
        If sections lack nuclei or their types, or `patients` lacks a section.
    TypeError
        If a recipe cannot be called, or does not return a cell finder.
    ValueError
        If there are fewer than two folds, two sections have the same nuclei, or `out` holds results of other settings.

    Examples
    --------
    >>> from functools import partial
    >>> import stimage_sd as sti
    >>> recipes = {"hovernet": partial(sti.tl.fit_cell_classifier, n_epochs=20)}
    >>> sti.tl.cross_validate_cells(cohort, recipes)  # doctest: +SKIP
    """
    cohort = contract.sections(data)
    for name, recipe in models.items():
        if not callable(recipe):
            raise TypeError(
                f"Expected model {name!r} to take a cohort, as a recipe does, found {type(recipe).__name__}."
            )
    folds = leave_out(cohort, strategy, patients)
    fingerprints = {name: _fingerprint(sdata, truth_key, label_key) for name, sdata in cohort.items()}
    _check_different(fingerprints)
    store = FoldStore(None if out is None else Path(out))
    scored = {"match": match, "radius_um": radius_um, "truth_key": truth_key, "label_key": label_key}
    settings = {
        (fold, name): {
            "version": __version__, "model": name, "recipe": describe(recipe), "fold": fold, "held_out": held_out,
            "sections": fingerprints, "strategy": strategy, "seed": seed, **scored,
        }
        for fold, held_out in folds.items()
        for name, recipe in models.items()
    }  # fmt: skip
    stored = {key: store.load(made, predictions=False) for key, made in settings.items()}
    results = {key: result for key, result in stored.items() if result is not None}
    logger.info(
        "Cross-validating %s on %d folds of %d sections: %d fits, %d of them are in the folder of results.",
        ", ".join(models), len(folds), len(cohort), len(settings), len(results),
    )  # fmt: skip
    with tqdm(total=len(settings), initial=len(results), desc="cross-validating", unit="fit") as bar:
        for (fold, name), made in settings.items():
            if (fold, name) in results:
                continue
            bar.set_postfix(model=name, fold=fold)
            training = {section: shallow_copy(sdata) for section, sdata in cohort.items() if section not in folds[fold]}
            fit = partial(models[name], training, **accepted_options(models[name], {"seed": seed}))
            held_out = {section: shallow_copy(cohort[section]) for section in folds[fold]}
            results[fold, name] = _run(fit, held_out, name=name, fold=fold, scored=scored)
            store.save(made, results[fold, name])
            bar.update()
    parts = [
        result.scores.assign(model=name, fold=fold, **result.cost)[_COLUMNS] for (fold, name), result in results.items()
    ]
    order = {section: position for position, section in enumerate(cohort)}
    table = pd.concat(parts, ignore_index=True)
    return table.sort_values("section", key=lambda of: of.map(order), kind="stable", ignore_index=True)


def _check_different(fingerprints: Mapping[str, str]) -> None:
    """Raise `ValueError` if two sections have the same nuclei."""
    first: dict[str, str] = {}
    for name, content in fingerprints.items():
        if first.setdefault(content, name) != name:
            raise ValueError(
                f"Sections {first[content]!r} and {name!r} have the same nuclei, so training data would be in the "
                "test set. Leave one of them out of the cohort."
            )


def _fingerprint(sdata: SpatialData, truth_key: str, label_key: str) -> str:
    """Return a hash of the nuclei's outlines and types, without the pixels."""
    frame = contract.nuclei(sdata, truth_key)
    whole = hashlib.blake2b(digest_size=16)
    whole.update(b"".join(shapely.to_wkb(np.asarray(frame.geometry.array))))
    types = frame[label_key].astype("string").fillna("") if label_key in frame.columns else []
    whole.update("\n".join(types).encode())
    return whole.hexdigest()


def _run(
    fit: Callable[[], Any], held_out: dict[str, SpatialData], *, name: str, fold: str, scored: Mapping[str, Any]
) -> FoldResult:
    gc.collect()
    try:
        with PeakMemory() as memory:
            started = time.perf_counter()
            model = fit()
            fitted = time.perf_counter()
            if not isinstance(model, CellFinder):
                raise TypeError(f"Expected the recipe to return a cell finder, found {type(model).__name__}.")
            predict_cells(held_out, model, key_added=_PREDICTED)
            predicted = time.perf_counter()
        scores = evaluate_cells(held_out, **scored)
    except Exception as error:
        error.add_note(f"while cross-validating model {name!r} on fold {fold!r}; complete folds are kept in `out`.")
        raise
    cost = {
        "fit_seconds": fitted - started,
        "predict_seconds": predicted - fitted,
        "peak_mb": memory.peak / 2**20,
    }
    whole = scores.summary.melt("section", var_name="metric").assign(cell_type=ALL)
    by_class = scores.classes.melt(["section", "cell_type"], var_name="metric")
    return FoldResult(pd.concat([whole, by_class], ignore_index=True).astype({"value": float}), cost, {})
