"""Cross-validate models over whole sections or whole patients."""

from __future__ import annotations

import copy
import gc
import hashlib
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import anndata as ad
import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import __version__, contract
from stimage_sd._progress import tqdm
from stimage_sd._settings import logger
from stimage_sd.models._genes import most_variable, shared_genes
from stimage_sd.models._predictor import Predictor, gene_shifts
from stimage_sd.tl._fit.fit_nb import fit_nb
from stimage_sd.tl._fit.seen import check_different
from stimage_sd.tl._fit.training_set import checked_genes
from stimage_sd.tl._predict.predict import predict
from stimage_sd.tl._score.evaluate import METRICS, Transform, depth_scores, evaluate
from stimage_sd.tl._score.fold_store import FoldResult, FoldStore, describe, fingerprint
from stimage_sd.tl._score.graphs import Graph

Strategy = Literal["leave-one-section-out", "leave-one-patient-out"]
#: function that takes a cohort and ``genes=`` and returns a `Predictor` (checked after the call)
Recipe: TypeAlias = Callable[..., Any]
#: recipes available by name
RECIPES: dict[str, Recipe] = {"nb": fit_nb}
_COLUMNS = ["section", "model", "gene", "metric", "value", "fold", "fit_seconds", "predict_seconds", "peak_mb"]


def cross_validate(
    data: contract.Cohort,
    models: Mapping[str, Recipe] | Sequence[str],
    *,
    strategy: Strategy = "leave-one-section-out",
    patients: Mapping[str, str] | None = None,
    genes: Sequence[str] | int | Callable[[contract.Cohort], Sequence[str]] = 1000,
    out: str | Path | None = None,
    transform: Transform = "log1p",
    graph: Graph | None = None,
    keep_predictions: bool | str = False,
    key_added: str = contract.PREDICTIONS,
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit each model without the sections of a fold and score it on those sections.

    Tiles of a section are never in both training and test. Sections are not changed, unless `keep_predictions` is set.

    Parameters
    ----------
    data
        Two or more sections with counts, tiled and embedded.
    models
        A dict of recipes by model name. A recipe is a function that takes a cohort and ``genes=`` and returns a fitted
        model, such as ``functools.partial(sti.tl.fit_nb, n_members=5)``. If a recipe has arguments `seed`, `patients`,
        `table_key` or `layer`, it gets the values of this call. Or a list of names: ``"nb"`` is
        `stimage_sd.tl.fit_nb` with defaults.
    strategy
        Unit to hold out: a section, or all sections of a patient. Sections of a patient are similar, so only
        ``"leave-one-patient-out"`` shows how a model does on a new patient.
    patients
        Patient by section, for ``"leave-one-patient-out"``. Default: the patients that sections know.
    genes
        A list of names, used in every fold. Or a number of highly variable genes, chosen as in
        `stimage_sd.pp.select_genes`. Or a function that takes a cohort and returns names. With a number or a function,
        genes are chosen on the training sections of a fold, so they may differ between folds.
    out
        Folder for the results. The result of each model and fold is written when complete. An interrupted call
        resumes from the results in the folder.
    transform, graph
        As in `stimage_sd.tl.evaluate`. Cells and other units on no lattice need a `graph`: weights by section, or a
        function of positions.
    keep_predictions
        Whether to write the held-out predictions of each section to ``tables["predictions"]`` at the end. `True` with
        one model, the name of a model with several.
    key_added
        Name of the tables written by `keep_predictions`.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    seed
        Seed passed to recipes with a `seed` argument.

    Returns
    -------
    A table with one row per section, model, gene and metric, in columns ``section``, ``model``, ``gene``, ``metric``
    and ``value``. These columns are the same for all rows of a fold and model: ``fold``; ``fit_seconds``, including
    compilation, mostly in the first fold; ``predict_seconds``; ``peak_mb``, the peak resident memory of the whole
    process during fit and prediction, in MiB.

    Raises
    ------
    KeyError
        If sections lack tiles, counts or listed genes, `patients` lacks a section, or a recipe name is unknown.
    TypeError
        If a recipe is not callable, or does not return a model.
    ValueError
        If there are fewer than two folds, a section is in the cohort twice under different names, or `out` holds
        results made with other settings.

    Notes
    -----
    A recipe gets the training sections only. Earlier steps such as embedding use images, not counts. Results in `out`
    are valid only for the same counts, tiles, embeddings, recipe options, genes, seed and package version. Pixels are
    not compared.

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
    source = contract.Source(table_key, layer)
    cohort = contract.sections(data)
    recipes = _recipes(models)
    kept = _kept_model(keep_predictions, recipes)
    folds = leave_out(cohort, strategy, patients)
    check_different(cohort, source)
    choose = _gene_choice(cohort, genes, source)
    store = FoldStore(None if out is None else Path(out))
    settings_of = _settings(
        cohort, source=source, strategy=strategy, genes=describe(genes), transform=transform, seed=seed,
        patients=contract.patients(cohort, patients), **({} if graph is None else {"graph": _described(graph)}),
    )  # fmt: skip
    settings = {
        (fold, name): settings_of(fold, held_out, name, recipe)
        for fold, held_out in folds.items()
        for name, recipe in recipes.items()
    }
    # load all results before any fit, so that results with other settings are refused at once
    found = {key: store.load(made, predictions=key[1] == kept) for key, made in settings.items()}
    results = {key: result for key, result in found.items() if result is not None}
    stated = {name: value for name, value in source.as_keys().items() if value is not None}
    options = {"seed": seed, **stated, **({} if patients is None else {"patients": patients})}
    logger.info(
        "Cross-validating %s on %d folds of %d sections: %d fits, %d of them are in the folder of results.",
        ", ".join(recipes), len(folds), len(cohort), len(settings), len(results),
    )  # fmt: skip
    with tqdm(total=len(folds) * len(recipes), initial=len(results), desc="cross-validating", unit="fit") as bar:
        for fold, held_out in folds.items():
            training = {name: shallow_copy(sdata) for name, sdata in cohort.items() if name not in held_out}
            chosen: list[str] | None = None
            for name, recipe in recipes.items():
                if (fold, name) in results:
                    continue
                chosen = choose(training) if chosen is None else chosen
                bar.set_postfix(model=name, fold=fold)
                result = _run(
                    partial(recipe, training, genes=chosen, **accepted_options(recipe, options)),
                    {section: shallow_copy(cohort[section]) for section in held_out},
                    name=name, fold=fold, score=partial(_scores, transform=transform, graph=graph, source=source),
                    keep=name == kept,
                )  # fmt: skip
                store.save(settings[fold, name], result)
                results[fold, name] = result
                bar.update()
    if kept is not None:
        _write_predictions(
            cohort, [results[fold, kept] for fold in folds], model=kept, strategy=strategy, key=key_added
        )
    return _tidy(results, list(cohort), list(recipes))


# --------------------------------------------------------------------------------------------------
# arguments


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


def leave_out(cohort: contract.Cohort, strategy: str, patients: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Return the held-out sections per fold."""
    if strategy not in get_args(Strategy):
        raise ValueError(f"Expected `strategy` to be one of {list(get_args(Strategy))}, found {strategy!r}.")
    if strategy == "leave-one-section-out":
        if patients is not None:
            raise ValueError('`patients` is for patient folds: pass `strategy="leave-one-patient-out"`.')
        folds = {section: [section] for section in cohort}
    else:
        known = contract.patients(cohort, patients)
        missing = [section for section in cohort if section not in known]
        if missing:
            raise KeyError(f"Expected `patients` to name each section's patient, found none for {missing}.")
        folds = {known[section]: [] for section in cohort}
        for section in cohort:
            folds[known[section]].append(section)
    if len(folds) < 2:
        what = "sections" if strategy == "leave-one-section-out" else "patients"
        raise ValueError(f"Expected two {what} or more, to learn from one and test on another, found {list(folds)}.")
    return folds


def _gene_choice(
    cohort: Mapping[str, SpatialData],
    genes: Sequence[str] | int | Callable[[contract.Cohort], Sequence[str]],
    source: contract.Source,
) -> Callable[[Mapping[str, SpatialData]], list[str]]:
    if callable(genes):
        return lambda training: checked_genes(training, genes(training), source)
    if isinstance(genes, int):
        if genes < 1:
            raise ValueError(f"Expected `genes` of at least 1, found {genes}.")
        return lambda training: _variable(training, genes, source)
    fixed = checked_genes(cohort, genes, source)
    return lambda _: fixed


def _variable(training: Mapping[str, SpatialData], n_top: int, source: contract.Source) -> list[str]:
    tables = {name: contract.counts(sdata, source) for name, sdata in training.items()}
    return most_variable(tables, shared_genes(tables), n_top=n_top)


def _settings(
    cohort: Mapping[str, SpatialData], *, source: contract.Source, **common: Any
) -> Callable[..., dict[str, Any]]:
    """Return a function that lists the settings a result depends on, as plain values."""
    data = {name: fingerprint(sdata, source) for name, sdata in cohort.items()}

    def of(fold: str, held_out: list[str], model: str, recipe: Recipe) -> dict[str, Any]:
        return {
            "version": __version__,
            "model": model,
            "recipe": describe(recipe),
            "fold": fold,
            "held_out": held_out,
            "sections": data,
            **source.as_keys(),
            **common,
        }

    return of


# --------------------------------------------------------------------------------------------------
# one model on one fold


def _described(graph: Graph) -> Any:
    """Describe weights by a hash of their values, and functions as other options."""
    if callable(graph):
        return describe(graph)
    each = graph if isinstance(graph, Mapping) else {"": graph}
    digest = hashlib.sha256()
    for name in sorted(each):
        weights = sp.csr_matrix(each[name])
        digest.update(name.encode())
        for array in (weights.indptr, weights.indices, weights.data):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def shallow_copy(sdata: SpatialData) -> SpatialData:
    """Return a new object with the same elements, so that writing does not change the original."""
    kinds = ("images", "labels", "points", "shapes", "tables")
    view = SpatialData(**{kind: dict(getattr(sdata, kind).items()) for kind in kinds})
    view.attrs = copy.deepcopy(dict(sdata.attrs))
    return view


def accepted_options(recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a recipe accepts and the user did not set."""
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
    score: Callable[[dict[str, SpatialData], Predictor], pd.DataFrame],
    keep: bool,
) -> FoldResult:
    gc.collect()
    try:
        with PeakMemory() as memory:
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
        scores = score(held_out, model)
    except Exception as error:
        error.add_note(
            f"while cross-validating model {name!r} on fold {fold!r}; complete folds are kept if `out` is set."
        )
        raise
    cost = {
        "fit_seconds": fitted - started,
        "predict_seconds": predicted - fitted,
        "peak_mb": memory.peak / 2**20,
    }
    tables = {section: contract.predictions(sdata) for section, sdata in held_out.items()} if keep else {}
    return FoldResult(scores, cost, tables)


def _scores(
    held_out: dict[str, SpatialData], model: Predictor, *, transform: Transform, graph: Graph | None,
    source: contract.Source,
) -> pd.DataFrame:  # fmt: skip
    """Score agreement of the predictions, and coverage and likelihood at measured depth."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Coverage and likelihood are left out")
        scores = evaluate(held_out, transform=transform, graph=graph, table_key=source.table, layer=source.layer)
    if model.total is None or gene_shifts(model) is not None:
        return scores
    deep = {name: shallow_copy(sdata) for name, sdata in held_out.items()}
    predict(deep, model, size_factors="total", table_key=source.table, layer=source.layer)
    at_depth = pd.concat([depth_scores(sdata, source) for sdata in deep.values()])
    return scores.assign(**{name: at_depth[name].to_numpy() for name in at_depth.columns})


class PeakMemory:
    """Record the peak resident memory of the process, in bytes, from a thread."""

    def __init__(self, every: float = 0.02) -> None:
        self.peak = 0
        self._every = every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
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
# outputs


def _write_predictions(
    cohort: Mapping[str, SpatialData], results: list[FoldResult], *, model: str, strategy: str, key: str
) -> None:
    tables: dict[str, ad.AnnData] = {}
    for result in results:
        tables.update(result.predictions)
    for section, table in tables.items():
        contract.write_predictions(cohort[section], table, key=key)
        contract.record(cohort[section], "tl.cross_validate", model=model, strategy=strategy)


def _tidy(results: Mapping[tuple[str, str], FoldResult], sections: list[str], models: list[str]) -> pd.DataFrame:
    """Return a long table, with rows in the order of sections, models, metrics, genes."""
    parts = []
    for (fold, model), result in results.items():
        long = result.scores.melt(["section", "gene"], list(METRICS), var_name="metric", value_name="value")
        parts.append(long.astype({"value": float}).assign(model=model, fold=fold, **result.cost))
    table = pd.concat(parts, ignore_index=True)
    by_model = table["model"].map({name: index for index, name in enumerate(models)})
    by_section = table["section"].map({name: index for index, name in enumerate(sections)})
    order = np.lexsort((table.index, by_model, by_section))
    return table.iloc[order].reset_index(drop=True)[_COLUMNS]
