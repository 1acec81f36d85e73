"""Fit a baseline to the embeddings and counts of a cohort, as a model for `tl.predict`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from spatialdata import SpatialData

from stimage_sd import __version__, contract
from stimage_sd._cache import keep_compiled
from stimage_sd.likelihood.depth import size_factors
from stimage_sd.likelihood.dispersion import fit_dispersion, interval_level
from stimage_sd.models._baseline_model import BaselineModel, section_data
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._recipe import Recipe, TrainingSection, floor, folds, median_total
from stimage_sd.models._specification import common_specification, extractor_names
from stimage_sd.tl._fit.held_out_level import COVERAGE
from stimage_sd.tl._fit.seen import check_different, fingerprints
from stimage_sd.tl._fit.training_set import check_measured, checked_genes, measured_counts

#: pseudo-counts that shrink the scale of a gene toward 1, and bounds of the scale
_PRIOR_COUNTS = 20.0
_SCALES = (0.25, 4.0)


def fit_baseline(
    data: SpatialData | contract.Cohort,
    recipe: Recipe,
    *,
    genes: Sequence[str],
    extractor: str | Sequence[str] = "efficientnet_lite0_stages",
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> BaselineModel:
    """Fit a baseline and its predictive distribution to the embeddings and counts of a cohort.

    The recipe predicts means. To add a distribution, the recipe is also fitted with each training section left out in
    turn. A single section is split into five strips, and many sections into five groups. Predictions on the left-out
    tiles give one scale of the mean per gene, one dispersion per gene, and the level of the intervals.

    Parameters
    ----------
    data
        A section or a cohort of sections with counts. All sections must be tiled and embedded in the same way.
    recipe
        A recipe from `stimage_sd.baselines`.
    genes
        Genes to learn. Every section must have measured all of them (`stimage_sd.pp.select_genes`).
    extractor
        Extractor whose embeddings are used. The embeddings of several extractors get equal weight. Neighbor
        embeddings (`pp.spatial_context`) are used where they were computed.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    seed
        Random seed.

    Returns
    -------
    The fitted model.

    Raises
    ------
    KeyError
        If a section was not embedded or lacks some of the genes.
    TypeError
        If `recipe` is not a recipe.
    ValueError
        If sections were prepared differently.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_baseline", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(section, n_top=5)
    >>> model = sti.tl.fit_baseline(section, sti.baselines.Ridge(n_components=16), genes=genes)
    >>> sti.tl.predict(section, model)
    >>> section.tables["predictions"].n_vars
    5
    """
    source = contract.Source(table_key, layer)
    if isinstance(recipe, type) or not isinstance(recipe, Recipe):
        raise TypeError(
            f"Expected `recipe` to be one of `stimage_sd.baselines`, such as `baselines.Ridge()`, found {recipe!r}."
        )
    keep_compiled()
    cohort = contract.sections(data)
    tiles = tuple(common_specification(cohort, name) for name in extractor_names(extractor))
    genes = checked_genes(cohort, genes, source)
    check_different(cohort, source)
    sections = []
    for name, sdata in cohort.items():
        seen = section_data(sdata, tiles, recipe)
        rows, counts, totals = measured_counts(sdata, genes, source)
        sections.append(
            TrainingSection(seen.embeddings, seen.positions, rows, counts, totals, pixels=seen.pixels, name=name)
        )
    check_measured({section.name: section.counts for section in sections})
    median = median_total(sections) if recipe.target == "lognorm" else None
    counts, means = _left_out(recipe, sections, median, seed=seed)
    scale = np.clip((counts.sum(axis=0) + _PRIOR_COUNTS) / (means.sum(axis=0) + _PRIOR_COUNTS), *_SCALES)
    dispersion = fit_dispersion(counts, means * scale)
    joined = {name: np.concatenate(section.embeddings, axis=1) for name, section in zip(cohort, sections, strict=True)}
    return BaselineModel(
        genes=tuple(genes),
        recipe=recipe,
        tiles=tiles,
        learned=recipe.fit(sections, seed=seed),
        scale=scale.astype(np.float32),
        dispersion=dispersion,
        familiarity=FeatureSpace.fit(joined, n_components=1, standardize="cohort", seed=seed),
        floor=floor(sections, recipe.target),
        total=median,
        interval_level=interval_level(counts, means * scale, dispersion, coverage=COVERAGE),
        training={
            "sections": list(cohort),
            "patients": contract.patients(cohort),
            "fingerprints": fingerprints(cohort, genes, source),
            "n_tiles": int(sum(len(section.rows) for section in sections)),
            "seed": seed,
            "versions": {"stimage-sd": __version__},
        },
    )


def _left_out(
    recipe: Recipe, sections: list[TrainingSection], median: float | None, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return counts of all measured tiles, and means from the recipe fitted without their fold."""
    counts, means = [], []
    for fold in folds(sections):
        learned = recipe.fit(fold.train, seed=seed)
        for section in fold.test:
            predicted = recipe.mean(learned, section)[section.rows].astype(np.float64)
            if median is not None:
                # the recipe predicts relative to the median total of its training sections
                predicted *= size_factors(section.totals, median_total(fold.train))[:, None]
            counts.append(section.counts.toarray().astype(np.float64))
            means.append(predicted)
    return np.concatenate(counts), np.concatenate(means)
