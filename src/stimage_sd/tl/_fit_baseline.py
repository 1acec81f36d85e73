"""Fit a baseline on the embeddings and counts of a cohort, as a model that `tl.predict` takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from spatialdata import SpatialData

from stimage_sd import __version__, contract
from stimage_sd._cache import keep_compiled
from stimage_sd.models._baseline_model import BaselineModel, section_data
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._specification import common_specification, extractor_names
from stimage_sd.models.baselines._dispersion import fit_dispersion, interval_level
from stimage_sd.models.baselines._recipe import Recipe, TrainingSection, floor, folds, median_total
from stimage_sd.tl._fit_nb import COVERAGE, _checked_genes, _measured

#: counts that a gene's scale is drawn towards 1 by, and its bounds
_PRIOR_COUNTS = 20.0
_SCALES = (0.25, 4.0)


def fit_baseline(
    data: SpatialData | contract.Cohort,
    recipe: Recipe,
    *,
    genes: Sequence[str],
    extractor: str | Sequence[str] = "efficientnet_lite0",
    seed: int = 0,
    table_key: str | None = None,
) -> BaselineModel:
    """Fit a baseline, and how far counts lie from its predictions where it was not fitted.

    The recipe predicts means. It is fitted once more without each training section in turn (of a single section,
    without each of five strips; of many sections, without each of five groups), and what it then predicts tells by
    how much means are to be scaled, one dispersion a gene, and how wide intervals are to be.

    Parameters
    ----------
    data
        A cohort of sections with counts, tiled and embedded alike; a single section does too.
    recipe
        One of `stimage_sd.models.baselines`.
    genes
        Genes to learn; every section must have measured them (`stimage_sd.pp.select_genes`).
    extractor
        Whose embeddings, or several extractors', each with the same weight. Those of the neighbours
        (`pp.spatial_context`) are used where they were computed.
    seed
        Seed of everything random.
    table_key
        Name of the table of counts.

    Returns
    -------
    The model.

    Raises
    ------
    KeyError
        If a section was not embedded, or lacks some of the genes.
    TypeError
        If `recipe` is none.
    ValueError
        If sections were prepared unlike each other.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_baseline", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(section, n_top=5)
    >>> model = sti.tl.fit_baseline(section, sti.models.baselines.Ridge(n_components=16), genes=genes)
    >>> sti.tl.predict(section, model)
    >>> section.tables["predictions"].n_vars
    5
    """
    if isinstance(recipe, type) or not isinstance(recipe, Recipe):
        raise TypeError(
            "Expected `recipe` to be one of `stimage_sd.models.baselines`, such as `baselines.Ridge()`, got "
            f"{recipe!r}."
        )
    keep_compiled()
    cohort = contract.sections(data)
    tiles = tuple(common_specification(cohort, name) for name in extractor_names(extractor))
    genes = _checked_genes(cohort, genes, table_key)
    sections = []
    for sdata in cohort.values():
        seen = section_data(sdata, tiles, recipe)
        rows, counts, totals = _measured(sdata, genes, table_key)
        sections.append(TrainingSection(seen.embeddings, seen.positions, rows, counts, totals, pixels=seen.pixels))
    median = median_total(sections) if recipe.target == "lognorm" else None
    counts, means = _left_out(recipe, sections, median, seed=seed)
    scale = np.clip((counts.sum(axis=0) + _PRIOR_COUNTS) / (means.sum(axis=0) + _PRIOR_COUNTS), *_SCALES)
    dispersion = fit_dispersion(counts, means * scale)
    joined = {name: np.concatenate(section.embeddings, axis=1) for name, section in zip(cohort, sections, strict=True)}
    return BaselineModel(
        genes=tuple(genes),
        recipe=recipe,
        tiles=tiles,
        learnt=recipe.fit(sections, seed=seed),
        scale=scale.astype(np.float32),
        dispersion=dispersion,
        familiarity=FeatureSpace.fit(joined, n_components=1, standardize="cohort", seed=seed),
        floor=floor(sections, recipe.target),
        total=median,
        interval_level=interval_level(counts, means * scale, dispersion, coverage=COVERAGE),
        training={
            "sections": list(cohort),
            "n_tiles": int(sum(len(section.rows) for section in sections)),
            "seed": seed,
            "versions": {"stimage-sd": __version__},
        },
    )


def _left_out(
    recipe: Recipe, sections: list[TrainingSection], median: float | None, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of all measured tiles, and their means by the recipe fitted without their section."""
    counts, means = [], []
    for fold in folds(sections):
        learnt = recipe.fit(fold.train, seed=seed)
        for section in fold.test:
            predicted = recipe.mean(learnt, section)[section.rows].astype(np.float64)
            if median is not None:
                # the recipe's own median total is that of the sections it saw
                predicted *= (section.totals / median_total(fold.train))[:, None]
            counts.append(section.counts.toarray().astype(np.float64))
            means.append(predicted)
    return np.concatenate(counts), np.concatenate(means)
