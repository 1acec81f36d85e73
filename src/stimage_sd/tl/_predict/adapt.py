"""Adapt a model to a patient by a few measured spots or by bulk counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood.shifts import SECTION, posterior
from stimage_sd.models._adapted import AdaptedModel
from stimage_sd.models._certificate import without_certificate
from stimage_sd.models._predictor import Predictor
from stimage_sd.models._resolve import as_model
from stimage_sd.tl._fit.seen import fingerprints, shift_sd
from stimage_sd.tl._fit.training_set import checked_genes
from stimage_sd.tl._predict.held_out import expected_sums


class _Sums(NamedTuple):
    """Counts of each gene, and mean and excess variance that the model predicts for them at an exposure of 1."""

    counts: np.ndarray
    expected: np.ndarray
    excess: np.ndarray


def adapt(
    model: Predictor | str | Path,
    data: SpatialData,
    *,
    spots: Sequence[str] | None = None,
    bulk: pd.Series | None = None,
    bulk_sd: float = SECTION.sd,
    table_key: str | None = None,
    layer: str | None = None,
) -> AdaptedModel:
    """Update the depth and the gene shifts of a model by measurements of one patient.

    A model does not know how much of each gene a new patient makes, which is most of what it does not know there. Some
    twenty measured spots tell it.

    Parameters
    ----------
    model
        A model fitted with exposure, or the path of a saved model.
    data
        The section to predict, tiled and embedded as the model expects, with counts on some of its spots.
    spots
        Names of the spots to learn from. Default: all spots with counts.
    bulk
        Total counts per gene of the patient, by gene name, instead of the section's spots. For example the sum of
        another section's counts.
    bulk_sd
        Standard deviation of the log of a gene's share between the bulk counts and the section, beyond counting. The
        default is that between two sections of a patient. Bulk counts of another technology differ by more.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    The adapted model, for this section. Its exposure of 1 is the depth of the spots, or with `bulk` that of the model.
    ``training["adaptation"]`` records ``section``, ``measured``, ``exposure`` and ``n_counts``. The section counts as
    seen: `stimage_sd.tl.calibrate` refuses it.

    Raises
    ------
    KeyError
        If the section was not tiled or embedded, lacks some of the genes, or has no such spots.
    ValueError
        If the model was fitted without exposure, or nothing was measured.

    Notes
    -----
    Per gene, the log of the shift has a normal prior with the model's standard deviation. The log ratio of observed and
    expected sums has the variance that counting and the predicted dispersion give it. The posterior is normal, in
    closed form. The exposure is the ratio of the sums over all genes.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sections = {}
    >>> for seed, name in enumerate(("train", "new")):
    ...     path = sti.datasets.synthetic_visium(f"bundle_adapt_{name}", n_spots=60, n_genes=20, seed=seed)
    ...     sections[name] = sti.io.visium(path, image=path / "image.tif", sample=name)
    >>> sti.pp.tile(sections)
    >>> sti.pp.embed(sections, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(sections["train"], n_top=5)
    >>> model = sti.tl.fit_nb(sections["train"], genes=genes, n_members=2, max_epochs=2)
    >>> corner = sections["new"].tables["counts"].obs_names[:20]
    >>> adapted = sti.tl.adapt(model, sections["new"], spots=corner)
    >>> bool((adapted.shifts < model.shifts[1]).all())
    True
    """
    fitted = as_model(model)
    sdata = contract.section(data)
    source = contract.Source(table_key, layer)
    sd = shift_sd(fitted, sdata)
    if sd is None or fitted.total is None:
        raise ValueError(
            "Expected a model fitted with exposure, which knows how far genes shift. Fit it again with "
            '`stimage_sd.tl.fit_nb(cohort, genes=genes, exposure="section")`.'
        )
    if bulk is not None and spots is not None:
        raise ValueError("Expected either `spots` or `bulk`, found both.")
    if bulk is None:
        sums, measured = _of_spots(fitted, sdata, spots, source)
    else:
        sums, measured = _of_bulk(fitted, sdata, bulk)
    scale = float(sums.counts.sum() / sums.expected.sum())
    if not scale > 0:
        raise ValueError(f"The {measured} hold no counts of the model's genes, so there is nothing to learn from.")
    # bulk counts have a depth of their own, which says nothing about the section's
    exposure, extra = (scale, 0.0) if bulk is None else (1.0, float(bulk_sd))
    expected = scale * sums.expected
    noise = (expected + scale**2 * sums.excess) / (expected + 0.5) ** 2 + extra**2
    mean, left = posterior(np.log((sums.counts + 0.5) / (expected + 0.5)), noise, sd)
    how: dict[str, Any] = {
        "section": contract.sample(sdata),
        "measured": measured,
        "exposure": exposure,
        "n_counts": int(sums.counts.sum()),
        "patients": list(contract.patients({"": sdata}).values()),
    }
    seen = fingerprints({how["section"]: sdata}, fitted.genes, source) if bulk is None else []
    return AdaptedModel(
        base=fitted,
        factors=(exposure * mean).astype(np.float32),
        shifts=np.stack([left, left]).astype(np.float32),
        total=fitted.total * exposure,
        interval_level=fitted.interval_level,
        training={
            **without_certificate(fitted.training),
            "fingerprints": [*fitted.training.get("fingerprints", []), *seen],
            "adaptation": how,
        },
    )


def _of_spots(
    model: Predictor, sdata: SpatialData, spots: Sequence[str] | None, source: contract.Source
) -> tuple[_Sums, str]:
    """Add up the counts of spots, and what the model expects on their tiles."""
    genes = checked_genes({contract.sample(sdata): sdata}, model.genes, source)
    table = contract.tiles(sdata)
    kept = table[table.obs["keep"].to_numpy()]
    rows, units = contract.align_to_spots(sdata, kept, source)
    if spots is not None:
        chosen = np.isin(units.obs_names, [str(spot) for spot in spots])
        if not chosen.any():
            raise KeyError(
                f"None of the {len(spots)} `spots` has a kept tile in section {contract.sample(sdata)!r}; its spots "
                f"are {list(units.obs_names[:3])} and others."
            )
        rows, units = rows[chosen], units[chosen]
    moments = expected_sums(model, sdata, rows, n_tiles=kept.n_obs)
    counts = np.asarray(units[:, genes].X.sum(axis=0), dtype=np.float64).ravel()
    return _Sums(counts, *moments), f"{len(rows)} spots"


def _of_bulk(model: Predictor, sdata: SpatialData, bulk: pd.Series) -> tuple[_Sums, str]:
    """Return bulk counts, and what the model expects on all tiles of the section."""
    names = contract.without_versions(pd.Index(bulk.index.astype(str)))
    values = pd.Series(np.asarray(bulk, np.float64), index=names).groupby(level=0).sum()
    missing = [gene for gene in model.genes if gene not in values.index]
    if missing:
        raise KeyError(f"`bulk` lacks {len(missing)} of {len(model.genes)} genes of the model: {missing[:10]}.")
    counts = values[list(model.genes)].to_numpy()
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("Expected `bulk` as counts of zero or more per gene. Pass counts, not logs or z-scores.")
    n_tiles = int(contract.tiles(sdata).obs["keep"].sum())
    expected, _ = expected_sums(model, sdata, np.arange(n_tiles), n_tiles=n_tiles)
    return _Sums(counts, expected, np.zeros_like(expected)), "bulk counts"
