"""Test whether uncertain predictions have large errors (selective prediction)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.stats import selective
from stimage_sd.tl._score.evaluate import dense, measured_names

Uncertainty = Literal["total", "aleatoric", "epistemic"]
ATTRIBUTES = {"total": "variance", "aleatoric": "aleatoric", "epistemic": "epistemic"}
COVERAGES = tuple(float(share) for share in np.round(np.arange(0.1, 1.01, 0.1), 2))


def risk_coverage(
    data: SpatialData | contract.Cohort,
    *,
    uncertainty: Uncertainty = "total",
    scale: Literal["log1p", "raw"] = "log1p",
    coverages: Sequence[float] = COVERAGES,
    key: str = contract.PREDICTIONS,
    table_key: str | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Compute the error per gene as the most uncertain tiles are left out.

    Parameters
    ----------
    data
        A section or a cohort of sections with predictions and counts. Predictions of models fitted with exposure are
        moved to the measured depth of the section.
    uncertainty
        Predicted variance used to rank tiles.
    scale
        ``"log1p"``: error and uncertainty of log(1 + count). ``"raw"``: error and uncertainty of counts. Both grow with
        the mean, so high predictions count as uncertain.
    coverages
        Shares of the tiles to keep, above 0 and at most 1.
    key
        Name of the prediction table.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    A table with one row per section, gene and coverage. Columns are ``section``, ``gene``, ``uncertainty``,
    ``coverage`` and:

    - ``risk``: mean absolute error of the kept tiles, which are the least uncertain tiles;
    - ``random``: mean absolute error of tiles kept at random, which equals the error of all tiles;
    - ``oracle``: mean absolute error of the tiles with the smallest errors;
    - ``aurc``, ``aurc_random``, ``aurc_oracle``: areas under these curves (the same in all rows of a gene).

    Raises
    ------
    KeyError
        If a section has no predictions, counts, or tiles on spots.
    ValueError
        If no predicted gene was measured, a model with size factors did not predict at measured depth, or an option is
        out of range.

    Notes
    -----
    Geifman and El-Yaniv 2017, "Selective classification for deep neural networks". On the log scale, the variance is
    approximated to first order, variance / (1 + mean)².

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_risk", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> len(sti.tl.risk_coverage(section, coverages=(0.8, 1.0)))
    10
    """
    source = contract.Source(table_key, layer)
    if uncertainty not in ATTRIBUTES:
        raise ValueError(f"Expected `uncertainty` to be one of {sorted(ATTRIBUTES)}, found {uncertainty!r}.")
    if scale not in ("log1p", "raw"):
        raise ValueError(f'Expected `scale` to be "log1p" or "raw", found {scale!r}.')
    shares = np.asarray(coverages, dtype=np.float64)
    if shares.ndim != 1 or not shares.size or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"Expected `coverages` as shares above 0 and at most 1, found {coverages}.")
    tables = []
    for name, sdata in contract.sections(data).items():
        predictions = contract.predictions(sdata, key)
        if problem := contract.depth_problem(sdata, predictions):
            raise ValueError(problem)
        rows, units = contract.align(sdata, predictions, source)
        genes = list(measured_names(predictions, units, {}, section=name, against="counts"))
        exposure = contract.measured_exposure(predictions, rows, units)
        counts, compared = dense(units[:, genes]), contract.at_depth_of(predictions, rows, genes, exposure)
        mean, variance = compared.mean, getattr(compared, ATTRIBUTES[uncertainty])
        if scale == "log1p":
            error, spread = selective.log_scale(counts, mean, variance)
        else:
            error, spread = np.abs(counts - mean), np.asarray(variance)
        for gene, own_error, own_spread in zip(genes, error.T, spread.T, strict=True):
            tables.append(_of_gene(own_error, own_spread, shares).assign(section=name, gene=gene))
    table = pd.concat(tables, ignore_index=True).assign(uncertainty=uncertainty)
    leading = ["section", "gene", "uncertainty", "coverage"]
    return table[[*leading, *(column for column in table.columns if column not in leading)]]


def _of_gene(error: np.ndarray, uncertainty: np.ndarray, shares: np.ndarray) -> pd.DataFrame:
    curve = selective.risk_coverage(error, uncertainty)
    return pd.DataFrame(
        {
            "coverage": shares,
            "risk": selective.kept(curve.risk, shares),
            "random": curve.random,
            "oracle": selective.kept(curve.oracle, shares),
            "aurc": curve.aurc,
            "aurc_random": curve.random,
            "aurc_oracle": curve.oracle.mean(),
        }
    )
