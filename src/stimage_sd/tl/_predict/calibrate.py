"""Conformal calibration of interval levels on sections that the model did not see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood import negative_binomial
from stimage_sd.likelihood.predictive import mixture_moments, nearest_interval, predictive
from stimage_sd.models._certificate import without_certificate
from stimage_sd.models._predictor import Predictor, gene_shifts
from stimage_sd.models._resolve import as_model
from stimage_sd.models._wrapped import Wrapped
from stimage_sd.tl._fit.held_out_level import COVERAGE
from stimage_sd.tl._fit.link_to_counts import link_to_counts
from stimage_sd.tl._fit.seen import check_unseen
from stimage_sd.tl._predict.held_out import HeldOut, held_out_blocks

#: range of levels accepted by `likelihood.intervals.mixture_interval` (both ends are open)
_LEAST, _MOST = 1e-3, 1.0 - 1e-9

Model = TypeVar("Model", bound=Predictor)


def calibrate(
    data: SpatialData | contract.Cohort,
    model: Model | Wrapped | str | Path,
    *,
    coverage: float = 0.9,
    table_key: str | None = None,
    layer: str | None = None,
) -> Model:
    """Set the interval level of a model so that intervals cover held-out counts, or link a wrapped predictor to counts.

    The level of a fitted model comes from the sections used for early stopping. The level set by
    `stimage_sd.tl.combine` is only a mean. Sections that the model never saw give the actual coverage.

    Parameters
    ----------
    data
        A section or a cohort of sections with counts, tiled and embedded as the model expects. Sections used to train
        or validate the model are refused. They are recognized by their spots and counts.
    model
        A fitted model of any kind, a combination of models, or the path of a saved model. Or a predictor of another
        package (`stimage_sd.models.wrap`): its values are then linked to the counts of the sections, with a regression
        and a dispersion per gene, and gene shifts and interval level as `stimage_sd.tl.fit_nb` learns them.
    coverage
        Share of the counts that intervals should contain; 0.9 for wrapped predictors.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    A copy of the model with a new ``interval_level``. ``training["calibration"]`` records ``sections``, their known
    ``patients``, ``coverage``, ``n_counts``, ``level`` and, per section, ``covered``. For a wrapped predictor, a
    `stimage_sd.models.WrappedModel`, to which these sections are training sections.

    Raises
    ------
    KeyError
        If a section was not tiled or embedded, lacks some of the genes, or has no tiles on spots.
    ValueError
        If the model saw a section, `coverage` is out of range, or there are too few counts.

    Notes
    -----
    Split conformal prediction (Vovk, Gammerman and Shafer 2005; Romano, Patterson and Candès 2019) with the
    distribution's central intervals as the nested sets. The score of a count y under a mixture with distribution
    function F is the smallest nominal level whose interval contains y, max(1 − 2F(y), 2F(y−1) − 1). The level is the
    ⌈(n+1)·coverage⌉-th smallest of the n scores. For exchangeable counts, intervals then contain at least `coverage`
    of new counts. Counts of one section share staining and depth, so coverage still varies between new sections.
    Calibrate on several sections where possible. Sections have equal weight, so a count is weighted by one over the
    number of counts of its section.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sections = {}
    >>> for seed, name in enumerate(("train", "held_out")):
    ...     path = sti.datasets.synthetic_visium(f"bundle_calibrate_{name}", n_spots=60, n_genes=20, seed=seed)
    ...     sections[name] = sti.io.visium(path, image=path / "image.tif", sample=name)
    >>> sti.pp.tile(sections)
    >>> sti.pp.embed(sections, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(sections["train"], n_top=5)
    >>> model = sti.tl.fit_nb(sections["train"], genes=genes, n_members=2, max_epochs=2)
    >>> model = sti.tl.calibrate(sections["held_out"], model)
    >>> model.training["calibration"]["sections"]
    ['held_out']
    """
    source = contract.Source(table_key, layer)
    if not 0 < coverage < 1:
        raise ValueError(f"Expected `coverage` as a share between 0 and 1, found {coverage}.")
    if isinstance(model, Wrapped):
        if coverage != COVERAGE:
            raise ValueError(f"Wrapped predictors are calibrated to a coverage of {COVERAGE}, found {coverage}.")
        return cast(Model, link_to_counts(contract.sections(data), model, source))
    model = as_model(model)
    if not hasattr(model, "__dataclass_fields__"):
        raise TypeError(
            f"Expected a model of stimage_sd, found a {type(model).__name__}, which cannot be copied. Make it a "
            "dataclass with `interval_level` and `training`."
        )
    cohort = contract.sections(data)
    check_unseen(model, cohort, source, purpose="calibrate on")
    blocks = held_out_blocks(model, cohort, source)
    if gene_shifts(model) is None:
        scores = {name: np.concatenate([level_scores(block) for block in section]) for name, section in blocks}
        level = conformal_level(list(scores.values()), coverage)
        covered = {name: float((of_section <= level).mean()) for name, of_section in scores.items()}
        n_counts = sum(map(len, scores.values()))
    else:
        sections = {name: _Shifted.of(section) for name, section in blocks}
        level = nearest_level(list(sections.values()), coverage)
        covered = {name: section.covered(level) for name, section in sections.items()}
        n_counts = sum(section.counts.size for section in sections.values())
    how = {
        "sections": list(covered),
        "patients": sorted(set(contract.patients(cohort).values())),
        "coverage": float(coverage),
        "n_counts": int(n_counts),
        "level": level,
        "covered": covered,
    }
    changes = {"interval_level": level, "training": {**without_certificate(model.training), "calibration": how}}
    calibrated: Model = replace(cast(Any, model), **changes)
    return calibrated


def level_scores(block: HeldOut) -> np.ndarray:
    """Compute the smallest nominal level whose central interval contains a count.

    - `block`: counts ``(n_tiles, n_genes)`` and their predicted mixtures.
    - returns: ``float64 (n_tiles * n_genes,)``, from −1 (inside every interval) to 1.
    """
    upto, below = (
        np.tensordot(block.weights, negative_binomial.cdf(counts[None], r=block.r, p=block.p), axes=1)
        for counts in (block.counts, block.counts - 1)
    )
    return np.maximum(1 - 2 * upto, 2 * below - 1).ravel()


class _Shifted(NamedTuple):
    """Counts of a section, and their predictive distributions with a shift per gene."""

    counts: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    sd: np.ndarray

    @classmethod
    def of(cls, blocks: Iterable[HeldOut]) -> _Shifted:
        parts = []
        for block in blocks:
            assert block.shift_sd is not None
            sd = block.shift_sd
            made = predictive(mixture_moments(block.r, block.p, weights=block.weights), sd)
            parts.append((block.counts, made.mean, made.variance))
        counts, mean, variance = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return cls(counts, mean, variance, sd)

    def covered(self, level: float) -> float:
        lower, upper = nearest_interval(self.mean, self.variance, self.sd, coverage=level)
        return float(((self.counts >= lower) & (self.counts <= upper)).mean())


def nearest_level(sections: Sequence[_Shifted], coverage: float) -> float:
    """Return the lowest level, to 0.0001, at which nearest intervals contain a share of the counts of sections.

    Sections have equal weight. The share is ⌈(n+1)·coverage⌉ / n, as in `conformal_level`.
    """
    n = sum(section.counts.size for section in sections)
    _check_number(n, coverage)
    wanted = np.ceil((n + 1) * coverage) / n
    low, high = _LEAST, 1 - _LEAST
    while high - low > 1e-4:
        middle = (low + high) / 2
        enough = np.mean([section.covered(middle) for section in sections]) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return float(high)


def _check_number(n: int, coverage: float) -> None:
    """Raise `ValueError` if there are too few counts for a coverage."""
    if np.ceil((n + 1) * coverage) > n:
        raise ValueError(
            f"{n} held-out counts are too few for intervals that hold {coverage:.0%}. At least "
            f"{int(np.ceil(coverage / (1 - coverage)))} counts are needed. Calibrate on more tiles or genes."
        )


def conformal_level(scores: list[np.ndarray], coverage: float) -> float:
    """Return the ⌈(n+1)·coverage⌉-th smallest score, with equal weight per section.

    - `scores`: scores per section, ``(n_counts,)``.
    - `coverage`: share of the counts that intervals should contain.
    - returns: the level, clipped to the range that intervals accept.
    """
    values = np.concatenate(scores)
    n = len(values)
    if not np.isfinite(values).all():
        raise ValueError(
            f"The model's distributions are not finite for {int((~np.isfinite(values)).sum())} of {n} held-out counts, "
            "so the level cannot be computed. Fit the model again."
        )
    _check_number(n, coverage)
    share = np.concatenate([np.full(len(of_section), 1 / (len(scores) * len(of_section))) for of_section in scores])
    order = np.argsort(values, kind="stable")
    # with one section, shares are 1 / n and this picks the ceil((n + 1) * coverage)-th smallest score
    reached = np.cumsum(share[order]) >= np.ceil((n + 1) * coverage) / n - 1e-12
    # add a margin against rounding: the count is inside only if F(y − 1) lies strictly below the upper tail
    level = float(values[order][np.argmax(reached)]) + 1e-9
    return float(np.clip(level, _LEAST, _MOST))
