"""Measured counts of a section beside its predictions, and how well genes are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stimage_sd.app._uploads import plain_words

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


@dataclass(frozen=True)
class Measured:
    """Measured counts of a section's tiles.

    Attributes
    ----------
    rows
        Tiles on measured spots, as rows of the predictions.
    units
        Their counts, in this order.
    depth
        Depth of each spot relative to the predictions, ``float64 (n_rows,)``.
    pearson
        Correlation of predicted means and counts over the tiles, as log(1 + count), one value per measured gene.
    was_trained_on
        Whether the model was trained on this section.
    """

    rows: np.ndarray
    units: AnnData
    depth: np.ndarray
    pearson: pd.Series
    was_trained_on: bool

    def of_gene(self, gene: str, n_tiles: int) -> pd.DataFrame | None:
        """Return the counts of a gene, one row per tile, or `None` if the gene was not measured.

        Returns
        -------
        Columns ``measured``, NaN where nothing was measured, and ``measured_at_depth``, the count divided by the depth
        of its spot, which has the scale of the predicted mean.
        """
        if gene not in self.units.var_names:
            return None
        values = self.units[:, gene].X
        counts = np.full(n_tiles, np.nan)
        counts[self.rows] = np.asarray(values.todense() if hasattr(values, "todense") else values).ravel()
        depth = np.full(n_tiles, np.nan)
        depth[self.rows] = self.depth
        return pd.DataFrame({"measured": counts, "measured_at_depth": counts / depth})

    @property
    def depth_words(self) -> str:
        """Say how measured counts were brought to the scale of the predictions."""
        if np.allclose(self.depth, 1.0):
            return "as measured"
        if np.ptp(self.depth) == 0:
            return f"divided by this section's depth of {self.depth[0]:.2f}"
        return "divided by the depth of each spot"


def find_measured(sdata: SpatialData, model: Any) -> Measured | str:
    """Return the measured counts of a predicted section, or in words why there are none to compare with."""
    import warnings

    from stimage_sd import contract, tl
    from stimage_sd.tl._fit.seen import remembered, seen_sections

    table = contract.predictions(sdata)
    if not contract.has_counts(sdata):
        return "The section has no measured counts."
    if "spot_id" not in table.obs:
        return "Counts were measured, but the tiles do not sit on spots, so they are not shown."
    try:
        rows, units = contract.align(sdata, table)
        with warnings.catch_warnings():
            # the scores that are left out here are not shown
            warnings.simplefilter("ignore", UserWarning)
            scores = tl.evaluate(sdata)
    except (KeyError, ValueError) as error:
        return f"Measured counts are not shown: {plain_words(error, Path('/'))}"
    known = remembered(model)
    seen = seen_sections(known, {contract.sample(sdata): sdata}, contract.Source())
    return Measured(rows, units, _depth(sdata, table, rows, units), scores.set_index("gene")["pearson"], bool(seen))


def _depth(sdata: SpatialData, table: AnnData, rows: np.ndarray, units: AnnData) -> np.ndarray:
    """Return the depth of each measured spot relative to the depth of the predictions."""
    from stimage_sd import contract

    exposure = contract.measured_exposure(table, rows, units)
    if exposure is not None:
        return np.full(len(rows), contract.depth_change(table, exposure))
    if contract.depth_problem(sdata, table) is None:
        return np.ones(len(rows))
    totals = np.asarray(units.X.sum(axis=1), dtype=np.float64).ravel()
    # a spot without counts has no depth
    return np.where(totals > 0, totals, np.nan) / float(table.uns["prediction"]["total"])
