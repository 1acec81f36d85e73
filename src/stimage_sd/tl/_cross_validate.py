"""Fit and score models on folds of whole sections, or of all sections of a patient."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import anndata as ad
import numpy as np
import pandas as pd
import psutil
from spatialdata import SpatialData
from tqdm.auto import tqdm

from stimage_sd import __version__, contract
from stimage_sd.models._genes import most_variable, shared_genes
from stimage_sd.models._predictor import Predictor
from stimage_sd.tl._evaluate import METRICS, Transform, evaluate
from stimage_sd.tl._fit_nb import _checked_genes, fit_nb
from stimage_sd.tl._fold_store import FoldResult, FoldStore, describe, fingerprint
from stimage_sd.tl._predict import predict

Strategy = Literal["leave-one-section-out", "leave-one-patient-out"]
#: takes a cohort and ``genes=`` and returns a fitted model, a `Predictor`, as is checked where it is called
Recipe: TypeAlias = Callable[..., Any]
#: models that go by a name alone
RECIPES: dict[str, Recipe] = {"nb": fit_nb}
_COLUMNS = ["section", "model", "gene", "metric", "value", "fold", "fit_seconds", "predict_seconds", "peak_mb"]


def cross_validate(
    cohort: contract.Cohort,
    models: Mapping[str, Recipe] | Sequence[str],
    *,
    strategy: Strategy = "leave-one-section-out",
    patients: Mapping[str, str] | None = None,
    genes: Sequence[str] | int | Callable[[contract.Cohort], Sequence[str]] = 1000,
    out: str | Path | None = None,
    transform: Transform = "log1p",
    keep_predictions: bool | str = False,
    table_key: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit every model on all sections but those of a fold, and score it on those, fold by fold.

    Tiles of one section are never on both sides. Sections are left as they were.

    Parameters
    ----------
    cohort
        Two sections or more, tiled and embedded, with counts.
    models
        By name, a recipe each: what takes a cohort and ``genes=`` and returns a fitted model, such as
        ``functools.partial(sti.tl.fit_nb, n_members=5)``. One that has arguments `seed` and `table_key` is given
        those of this call. Or a list of names: ``"nb"`` is `stimage_sd.tl.fit_nb` as it is.
    strategy
        What is held out together: a section, or all sections of a patient. Sections of one patient are alike: only
        the second tells how a model does on a new patient.
    patients
        Of each section its patient, for ``"leave-one-patient-out"``.
    genes
        A list of names, the same in every fold; a number: so many highly variable genes, as
        `stimage_sd.pp.select_genes` chooses them; or what takes a cohort and returns names. The last two see only
        the training sections of a fold, so that genes may differ between folds.
    out
        A folder for the results. Each model and fold is written when it is complete, and a call that was
        interrupted goes on from there.
    transform
        As in `stimage_sd.tl.evaluate`.
    keep_predictions
        Whether to write each section's predictions, by the model that did not see it, to
        ``tables["predictions"]`` at the end: `True` where there is one model, the name of one where there are
        several.
    table_key
        Name of the table of counts.
    seed
        Seed for the recipes that take one.

    Returns
    -------
    A row a section, model, gene and metric: ``section``, ``model``, ``gene``, ``metric``, ``value``; and, the same
    for all rows of a fold and model, ``fold``; ``fit_seconds``, with what compiling takes, mostly in a first fold;
    ``predict_seconds``; and ``peak_mb``: the largest resident memory of the process meanwhile, with all that it
    held before.

    Raises
    ------
    KeyError
        If sections lack tiles, counts or some of the listed genes, or `patients` or a name leads nowhere.
    TypeError
        If a recipe cannot be called, or returns no model.
    ValueError
        If there are fewer than two folds, or `out` holds results that were made with other settings.

    Notes
    -----
    A recipe is handed the training sections alone. What was done to the sections before, such as embedding, saw
    images and no counts. Results in `out` are tied to the counts, tiles and embeddings, the recipe with its
    options, genes, seed and the package's version; pixels are not looked at.

    Examples
    --------
    >>> from functools import partial
    >>> import stimage_sd as sti
    >>> cohort = {}
    >>> for name in "ab":
    ...     path = sti.datasets.synthetic_visium(f"bundle_{name}", n_spots=60, n_genes=20, seed=ord(name))
    ...     cohort[name] = sti.io.visium(path, image=path / "image.tif", sample=name)
    >>> sti.pp.tile(cohort)
    >>> sti.pp.embed(cohort, fields_of_view=(1.0,))
    >>> recipes = {"small": partial(sti.tl.fit_nb, n_members=2, max_epochs=2)}
    >>> table = sti.tl.cross_validate(cohort, recipes, genes=5)
    >>> table.groupby("section")["gene"].nunique().to_dict()
    {'a': 5, 'b': 5}
    """
    cohort = contract.sections(cohort)
    recipes = _recipes(models)
    kept = _kept_model(keep_predictions, recipes)
    folds = _folds(list(cohort), strategy, patients)
    choose = _gene_choice(cohort, genes, table_key)
    store = FoldStore(None if out is None else Path(out))
    settings_of = _settings(
        cohort, table_key=table_key, strategy=strategy, genes=describe(genes), transform=transform, seed=seed
    )
    settings = {
        (fold, name): settings_of(fold, held_out, name, recipe)
        for fold, held_out in folds.items()
        for name, recipe in recipes.items()
    }
    # all are looked up before any is fitted, so that other settings are refused at once
    found = {key: store.load(made, predictions=key[1] == kept) for key, made in settings.items()}
    results = {key: result for key, result in found.items() if result is not None}
    options = {"seed": seed} if table_key is None else {"seed": seed, "table_key": table_key}
    with tqdm(total=len(folds) * len(recipes), initial=len(results), desc="cross-validating", unit="fit") as bar:
        for fold, held_out in folds.items():
            training = {name: _view(sdata) for name, sdata in cohort.items() if name not in held_out}
            chosen: list[str] | None = None
            for name, recipe in recipes.items():
                if (fold, name) in results:
                    continue
                chosen = choose(training) if chosen is None else chosen
                bar.set_postfix(model=name, fold=fold)
                result = _run(
                    partial(recipe, training, genes=chosen, **_accepted(recipe, options)),
                    {section: _view(cohort[section]) for section in held_out},
                    name=name, fold=fold, transform=transform, table_key=table_key, keep=name == kept,
                )  # fmt: skip
                store.save(settings[fold, name], result)
                results[fold, name] = result
                bar.update()
    if kept is not None:
        _write_predictions(cohort, [results[fold, kept] for fold in folds], model=kept, strategy=strategy)
    return _tidy(results, list(cohort), list(recipes))


# --------------------------------------------------------------------------------------------------
# what is asked for


def _recipes(models: Mapping[str, Recipe] | Sequence[str]) -> dict[str, Recipe]:
    if not isinstance(models, Mapping):
        names = [models] if isinstance(models, str) else list(models)
        unknown = [name for name in names if name not in RECIPES]
        if unknown:
            raise KeyError(
                f"No recipe goes by the name {unknown[0]!r}; known: {sorted(RECIPES)}. Pass others as a dict, such as "
                '`{"ridge": recipe}`.'
            )
        models = {name: RECIPES[name] for name in names}
    if not models:
        raise ValueError("Expected at least one model, found none.")
    for name, recipe in models.items():
        if not callable(recipe):
            raise TypeError(
                f"Expected model {name!r} as a recipe, a callable that takes a cohort and `genes=`, found "
                f"{type(recipe).__name__}. A fitted model cannot be cross-validated."
            )
    return {str(name): recipe for name, recipe in models.items()}


def _kept_model(keep_predictions: bool | str, recipes: Mapping[str, Recipe]) -> str | None:
    if keep_predictions is False:
        return None
    if keep_predictions is True and len(recipes) == 1:
        return next(iter(recipes))
    if keep_predictions is True or keep_predictions not in recipes:
        raise ValueError(
            f"Expected `keep_predictions` to name the one model whose predictions to keep, of {list(recipes)}, found "
            f"{keep_predictions!r}."
        )
    return keep_predictions


def _folds(sections: list[str], strategy: str, patients: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Held-out sections by name of the fold."""
    if strategy not in get_args(Strategy):
        raise ValueError(f"Expected `strategy` to be one of {list(get_args(Strategy))}, found {strategy!r}.")
    if strategy == "leave-one-section-out":
        if patients is not None:
            raise ValueError('`patients` says what to hold out together: pass `strategy="leave-one-patient-out"`.')
        folds = {section: [section] for section in sections}
    else:
        missing = [section for section in sections if section not in (patients or {})]
        if patients is None or missing:
            raise KeyError(f"Expected `patients` to name each section's patient, found none for {missing}.")
        folds = {str(patients[section]): [] for section in sections}
        for section in sections:
            folds[str(patients[section])].append(section)
    if len(folds) < 2:
        what = "sections" if strategy == "leave-one-section-out" else "patients"
        raise ValueError(f"Expected two {what} or more, to learn from one and test on another, found {list(folds)}.")
    return folds


def _gene_choice(
    cohort: Mapping[str, SpatialData],
    genes: Sequence[str] | int | Callable[[contract.Cohort], Sequence[str]],
    table_key: str | None,
) -> Callable[[Mapping[str, SpatialData]], list[str]]:
    if callable(genes):
        return lambda training: _checked_genes(training, genes(training), table_key)
    if isinstance(genes, int):
        if genes < 1:
            raise ValueError(f"Expected `genes` of at least 1, found {genes}.")
        return lambda training: _variable(training, genes, table_key)
    fixed = _checked_genes(cohort, genes, table_key)
    return lambda _: fixed


def _variable(training: Mapping[str, SpatialData], n_top: int, table_key: str | None) -> list[str]:
    tables = {name: contract.counts(sdata, table_key) for name, sdata in training.items()}
    return most_variable(tables, shared_genes(tables), n_top=n_top)


def _settings(
    cohort: Mapping[str, SpatialData], *, table_key: str | None, **common: Any
) -> Callable[..., dict[str, Any]]:
    """What a result depends on, as plain values."""
    data = {name: fingerprint(sdata, table_key) for name, sdata in cohort.items()}

    def of(fold: str, held_out: list[str], model: str, recipe: Recipe) -> dict[str, Any]:
        return {
            "version": __version__,
            "model": model,
            "recipe": describe(recipe),
            "fold": fold,
            "held_out": held_out,
            "sections": data,
            "table_key": table_key,
            **common,
        }

    return of


# --------------------------------------------------------------------------------------------------
# one model on one fold


def _view(sdata: SpatialData) -> SpatialData:
    """The same elements in an object of its own, so that what is written to it stays there."""
    kinds = ("images", "labels", "points", "shapes", "tables")
    view = SpatialData(**{kind: dict(getattr(sdata, kind).items()) for kind in kinds})
    view.attrs = copy.deepcopy(dict(sdata.attrs))
    return view


def _accepted(recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that a recipe names and that the user did not set."""
    preset = recipe.keywords if isinstance(recipe, partial) else {}
    try:
        parameters = inspect.signature(recipe).parameters
    except (TypeError, ValueError):  # callables without a signature
        return {}
    return {name: value for name, value in options.items() if name in parameters and name not in preset}


def _run(
    fit: Callable[[], Any],
    held_out: dict[str, SpatialData],
    *,
    name: str,
    fold: str,
    transform: Transform,
    table_key: str | None,
    keep: bool,
) -> FoldResult:
    gc.collect()
    try:
        with _Memory() as memory:
            started = time.perf_counter()
            model = fit()
            fitted = time.perf_counter()
            if not isinstance(model, Predictor):
                raise TypeError(
                    f"Expected the recipe to return a fitted model that `stimage_sd.tl.predict` takes, found "
                    f"{type(model).__name__}."
                )
            predict(held_out, model)
            predicted = time.perf_counter()
        scores = evaluate(held_out, transform=transform, table_key=table_key)
    except Exception as error:
        error.add_note(f"while cross-validating model {name!r} on fold {fold!r}; complete folds are kept in `out`.")
        raise
    cost = {
        "fit_seconds": fitted - started,
        "predict_seconds": predicted - fitted,
        "peak_mb": memory.peak / 2**20,
    }
    tables = {section: contract.predictions(sdata) for section, sdata in held_out.items()} if keep else {}
    return FoldResult(scores, cost, tables)


class _Memory:
    """Watch the process's resident memory, in bytes, from a thread."""

    def __init__(self, every: float = 0.02) -> None:
        self.peak = 0
        self._every = every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._done.wait(self._every):
                return


# --------------------------------------------------------------------------------------------------
# what comes out


def _write_predictions(
    cohort: Mapping[str, SpatialData], results: list[FoldResult], *, model: str, strategy: str
) -> None:
    tables: dict[str, ad.AnnData] = {}
    for result in results:
        tables.update(result.predictions)
    for section, table in tables.items():
        contract.write_predictions(cohort[section], table)
        contract.record(cohort[section], "tl.cross_validate", model=model, strategy=strategy)


def _tidy(results: Mapping[tuple[str, str], FoldResult], sections: list[str], models: list[str]) -> pd.DataFrame:
    """Rows in the order of sections, models, metrics, genes."""
    parts = []
    for (fold, model), result in results.items():
        long = result.scores.melt(["section", "gene"], list(METRICS), var_name="metric", value_name="value")
        parts.append(long.astype({"value": float}).assign(model=model, fold=fold, **result.cost))
    table = pd.concat(parts, ignore_index=True)
    by_model = table["model"].map({name: number for number, name in enumerate(models)})
    by_section = table["section"].map({name: number for number, name in enumerate(sections)})
    order = np.lexsort((table.index, by_model, by_section))
    return table.iloc[order].reset_index(drop=True)[_COLUMNS]
