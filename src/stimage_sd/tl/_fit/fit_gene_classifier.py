"""Fit an elastic-net logistic regression per gene that classifies tiles as High or Low."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal, get_args

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.parallel import Parallel, delayed
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._cache import keep_compiled
from stimage_sd._progress import tqdm
from stimage_sd._settings import n_threads
from stimage_sd.models._features import FeatureSpace, Standardize
from stimage_sd.models._gene_classifier import GeneClassifier, brought, is_high
from stimage_sd.models._specification import common_specification, features
from stimage_sd.stats import elastic_net
from stimage_sd.tl._fit.training_set import check_measured, checked_genes, measured_counts, versions

Solver = Literal["proximal", "saga"]


def fit_gene_classifier(
    data: SpatialData | contract.Cohort,
    *,
    genes: Sequence[str],
    extractor: str = "efficientnet_lite0_stages",
    solver: Solver = "proximal",
    C: float = 0.1,
    l1_ratio: float = 0.5,
    max_iter: int = 10_000,
    n_components: int | None = None,
    standardize: Standardize = "section",
    table_key: str | None = None,
    layer: str | None = None,
    n_jobs: int | None = None,
    seed: int = 0,
) -> GeneClassifier:
    """Fit a classifier per gene that predicts on which tiles the gene is High.

    A gene is High on a tile if the z-score of its log1p count is above zero, and Low otherwise. One elastic-net
    logistic regression per gene gives the probability of High, from the embeddings of tiles on spots.

    Parameters
    ----------
    data
        A section or a cohort of sections with counts. All sections must be tiled and embedded in the same way.
    genes
        Genes to learn. Every section must have measured all of them (`stimage_sd.pp.select_genes`).
    extractor
        Extractor whose embeddings are used. Neighbor embeddings (`pp.spatial_context`) are used where they were
        computed.
    solver
        ``"proximal"``: all genes at once, in JAX (`stimage_sd.stats.elastic_net.fit`). ``"saga"``: the scikit-learn
        solver, as published, with one gene per thread. Both reach the same minimum. ``"proximal"`` is far faster.
    C
        Inverse regularization strength, as in scikit-learn. The loss is summed over tiles, so the same `C`
        regularizes a large cohort less than a small one.
    l1_ratio
        Share of the penalty on absolute values of coefficients. The L1 part sets many coefficients to zero.
    max_iter
        Maximum number of steps (``"proximal"``) or passes over the tiles (``"saga"``). A warning gives the number of
        genes that did not converge.
    n_components
        Number of principal components that embeddings are reduced to. `None`: no reduction, as published.
    standardize
        ``"section"``: standardize embeddings and log1p counts by the mean and standard deviation of each section, so
        High is relative to the section. ``"cohort"``: by the mean and standard deviation of all training tiles.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    n_jobs
        Number of threads for ``solver="saga"``. Default: the number of cores.
    seed
        Random seed. On one machine, the same seed gives the same model.

    Returns
    -------
    The fitted model, for `stimage_sd.tl.predict`.

    Raises
    ------
    KeyError
        If a section was not embedded or lacks some of the genes.
    ValueError
        If sections were prepared differently, or an option is out of range.

    Notes
    -----
    Paper, section 2.6, Eq. 10 to 13. The regularization strength is scikit-learn's `C`, as in the published code.
    Genes that are constant in training are never High, and their probability is their base rate, 0.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_classes", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> classifier = sti.tl.fit_gene_classifier(section, genes=sti.pp.select_genes(section, n_top=5))
    >>> sti.tl.predict(section, classifier)
    >>> section.tables["gene_classes"].n_vars
    5
    """
    source = contract.Source(table_key, layer)
    keep_compiled()
    cohort = contract.sections(data)
    _check_options(solver, C, l1_ratio, max_iter, n_components, standardize, n_jobs)
    tiles = common_specification(cohort, extractor)
    genes = checked_genes(cohort, genes, source)
    embedded = {name: features(sdata, tiles) for name, sdata in cohort.items()}
    # without a reduction, the space only standardizes
    space = FeatureSpace.fit(embedded, n_components=n_components or 1, standardize=standardize, seed=seed)
    if n_components is None:
        space = replace(space, components=np.zeros((0, 0), np.float32))
    measured = {name: measured_counts(sdata, genes, source)[:2] for name, sdata in cohort.items()}
    check_measured({name: block for name, (_, block) in measured.items()})
    inputs = np.concatenate([brought(space, embedded[name])[rows] for name, (rows, _) in measured.items()])
    del embedded
    counts = [block.toarray() for _, block in measured.values()]
    together = np.concatenate(counts)
    high = is_high(together) if standardize == "cohort" else np.concatenate([is_high(block) for block in counts])
    coefficients, intercepts, converged = _solve(
        solver, inputs, high, C=C, l1_ratio=l1_ratio, max_iter=max_iter, seed=seed, n_jobs=n_jobs
    )
    return GeneClassifier(
        genes=tuple(genes),
        tiles=tiles,
        features=space,
        coefficients=coefficients,
        intercepts=intercepts,
        thresholds=np.log1p(together.astype(np.float64)).mean(axis=0),
        base_rates=high.mean(axis=0).astype(np.float32),
        training={
            "sections": list(measured),
            "n_tiles": len(inputs),
            "solver": solver,
            "seed": seed,
            "options": {"C": C, "l1_ratio": l1_ratio, "max_iter": max_iter, "n_components": n_components},
            "converged": converged.tolist(),
            "n_nonzero": (coefficients != 0).sum(axis=1).tolist(),
            "versions": {**versions(), "scikit-learn": version("scikit-learn")},
        },
    )


def _check_options(
    solver: str,
    C: float,
    l1_ratio: float,
    max_iter: int,
    n_components: int | None,
    standardize: str,
    n_jobs: int | None,
) -> None:
    if solver not in get_args(Solver):
        raise ValueError(f'Expected `solver` to be "proximal" or "saga", found {solver!r}.')
    if standardize not in get_args(Standardize):
        raise ValueError(f'Expected `standardize` to be "section" or "cohort", found {standardize!r}.')
    if not (np.isfinite(C) and C > 0) or not 0 <= l1_ratio <= 1:
        raise ValueError(f"Expected `C` to be positive and `l1_ratio` between 0 and 1, found {C} and {l1_ratio}.")
    for name, value in {"max_iter": max_iter, "n_components": n_components, "n_jobs": n_jobs}.items():
        if value is not None and value < 1:
            raise ValueError(f"Expected `{name}` of at least 1, found {value}.")


def _solve(
    solver: Solver,
    inputs: np.ndarray,
    high: np.ndarray,
    *,
    C: float,
    l1_ratio: float,
    max_iter: int,
    seed: int,
    n_jobs: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return coefficients, intercepts, and which genes converged."""
    with tqdm(total=high.shape[1], desc="gene classifier", unit="gene") as bar:
        if solver == "proximal":
            fit = elastic_net.fit(
                inputs, high, C=C, l1_ratio=l1_ratio, max_iterations=max_iter, seed=seed, progress=bar.update
            )
            coefficients, intercepts, converged = fit.coefficients, fit.intercepts, fit.converged
        else:
            jobs = (
                delayed(_saga)(inputs, labels, C=C, l1_ratio=l1_ratio, max_iter=max_iter, seed=seed)
                for labels in high.T
            )
            # the scikit-learn solver releases the GIL, so threads can share the embeddings
            workers = Parallel(n_jobs=n_threads(n_jobs), prefer="threads", return_as="generator")
            fits = []
            with warnings.catch_warnings():
                # one warning for all genes follows below, and filters apply to all threads of the process
                warnings.simplefilter("ignore", ConvergenceWarning)
                for result in workers(jobs):
                    fits.append(result)
                    bar.update()
            coefficients, intercepts, converged = (np.stack(part) for part in zip(*fits, strict=True))
    if not converged.all():
        warnings.warn(
            f"{int((~converged).sum())} of {len(converged)} genes did not converge in {max_iter} iterations. Raise "
            "`max_iter`, or lower `C` for more regularization.",
            stacklevel=3,
        )
    return coefficients, intercepts, converged


def _saga(
    inputs: np.ndarray, labels: np.ndarray, *, C: float, l1_ratio: float, max_iter: int, seed: int
) -> tuple[np.ndarray, np.float32, bool]:
    """Fit one gene by scikit-learn, or return its base rate if there is one class only."""
    if labels.all() or not labels.any():
        return np.zeros(inputs.shape[1], np.float32), np.float32(np.inf if labels.all() else -np.inf), True
    # since scikit-learn 1.8, the penalty follows from `l1_ratio`
    older: dict[str, Any] = (
        {"penalty": "elasticnet"} if tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8) else {}
    )
    model = LogisticRegression(solver="saga", C=C, l1_ratio=l1_ratio, max_iter=max_iter, random_state=seed, **older)
    model.fit(inputs, labels)
    coefficients = model.coef_[0].astype(np.float32)
    return coefficients, np.float32(model.intercept_[0]), bool(model.n_iter_[0] < max_iter)
