"""Conformal calibration: the interval level at which counts of sections that no model saw are covered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._predictor import Predictor
from stimage_sd.nn import negative_binomial
from stimage_sd.tl._held_out import HeldOut, check_unseen, held_out_blocks

#: levels that `nn.intervals.mixture_interval` takes: open at both ends
_LEAST, _MOST = 1e-3, 1.0 - 1e-9

Model = TypeVar("Model", bound=Predictor)


def calibrate(
    model: Model, data: SpatialData | contract.Cohort, *, coverage: float = 0.9, table_key: str | None = None
) -> Model:
    """Set the level of a model's intervals so that they cover held-out counts.

    The model's own level comes from sections that its members were stopped early on, and that of
    `stimage_sd.tl.combine` is only a mean. Sections that the model never saw show what the intervals really hold.

    Parameters
    ----------
    model
        A fitted model of any kind, or a combination.
    data
        A section with counts, or a cohort of them, tiled and embedded as the model expects; none of those that the
        model was trained or validated on.
    coverage
        Share of the counts that the intervals are to hold.
    table_key
        Name of the table of counts.

    Returns
    -------
    A copy of the model that differs in ``interval_level``, and in ``training["calibration"]``, which says how it
    was found: ``sections``, ``coverage``, ``n_counts``, ``level`` and, a section, ``covered``.

    Raises
    ------
    KeyError
        If a section was not tiled or embedded, lacks some of the genes, or its tiles do not sit on spots.
    ValueError
        If the model saw a section, `coverage` is out of range, or there are too few counts for it.

    Notes
    -----
    Split conformal prediction (Vovk, Gammerman and Shafer 2005; Romano, Patterson and Candès 2019) with the
    distribution's own central intervals as the nested sets. The score of a count y under a mixture with distribution
    function F is the nominal level from which on its interval holds y, max(1 − 2F(y), 2F(y−1) − 1); the level is the
    ⌈(n+1)·coverage⌉-th smallest of the n scores. For counts that can be exchanged the intervals then hold at least
    `coverage` of new ones. Counts of one section share its staining and depth, so the coverage of a single new
    section still varies about that: calibrate on several sections where you have them; each counts alike, a count
    by one over its section's number of counts.

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
    >>> model = sti.tl.calibrate(model, sections["held_out"])
    >>> model.training["calibration"]["sections"]
    ['held_out']
    """
    if not 0 < coverage < 1:
        raise ValueError(f"Expected `coverage` as a share between 0 and 1, found {coverage}.")
    if not hasattr(model, "__dataclass_fields__"):
        raise TypeError(
            f"Expected a model of stimage_sd, found a {type(model).__name__}, of which no calibrated copy can be made. "
            "Make it a dataclass with `interval_level` and `training`."
        )
    cohort = contract.sections(data)
    check_unseen(model, cohort, purpose="calibrate on")
    scores = {
        name: np.concatenate([level_scores(block) for block in blocks])
        for name, blocks in held_out_blocks(model, cohort, table_key)
    }
    level = conformal_level(list(scores.values()), coverage)
    how = {
        "sections": list(scores),
        "coverage": float(coverage),
        "n_counts": int(sum(map(len, scores.values()))),
        "level": level,
        "covered": {name: float((each <= level).mean()) for name, each in scores.items()},
    }
    changes = {"interval_level": level, "training": {**model.training, "calibration": how}}
    calibrated: Model = replace(cast(Any, model), **changes)
    return calibrated


def level_scores(block: HeldOut) -> np.ndarray:
    """The nominal level from which on a count's central interval holds it.

    Parameters
    ----------
    block
        Counts ``(n_tiles, n_genes)`` and their mixtures.

    Returns
    -------
    ``float64 (n_tiles * n_genes,)``, from −1 (inside every interval) to 1.
    """
    upto, below = (
        np.tensordot(block.weights, negative_binomial.cdf(counts[None], r=block.r, p=block.p), axes=1)
        for counts in (block.counts, block.counts - 1)
    )
    return np.maximum(1 - 2 * upto, 2 * below - 1).ravel()


def conformal_level(scores: list[np.ndarray], coverage: float) -> float:
    """The ⌈(n+1)·coverage⌉-th smallest score; of several sections, each counting alike.

    Parameters
    ----------
    scores
        Of each section, ``(n_counts,)``.
    coverage
        Share that is to be inside.

    Returns
    -------
    The level, within what intervals can be asked for.

    Raises
    ------
    ValueError
        If there are too few counts for the coverage.
    """
    values = np.concatenate(scores)
    n = len(values)
    if np.ceil((n + 1) * coverage) > n:
        raise ValueError(
            f"{n} held-out counts are too few for intervals that hold {coverage:.0%}: that takes at least "
            f"{int(np.ceil(coverage / (1 - coverage)))}. Calibrate on more tiles or genes."
        )
    share = np.concatenate([np.full(len(each), 1 / (len(scores) * len(each))) for each in scores])
    order = np.argsort(values, kind="stable")
    # with one section this is the (n + 1) * coverage-th smallest: the sum of i shares of 1 / n reaches it at i
    reached = np.cumsum(share[order]) >= np.ceil((n + 1) * coverage) / n - 1e-12
    # the count itself is to be inside: F(y − 1) has to lie strictly below the upper tail, and rounding may not
    level = float(values[order][np.argmax(reached)]) + 1e-9
    return float(np.clip(level, _LEAST, _MOST))
