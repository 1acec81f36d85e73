"""Compare predicted distributions with counts at the depth at which the counts were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from spatialdata import SpatialData

from stimage_sd.contract._elements import INSTANCES
from stimage_sd.contract._section import sample
from stimage_sd.likelihood.predictive import nearest_interval

if TYPE_CHECKING:
    from anndata import AnnData

#: totals over more than so many times as many genes, or so many times fewer, do not compare
_MOST_GENES = 2.0


class Compared(NamedTuple):
    """Predicted distributions of some tiles and genes, at the depth of their spots.

    - `mean`, `aleatoric`, `epistemic`, `lower`, `upper`: ``float64 (n_tiles, n_genes)``.
    - `shift_sd`: standard deviation of the log of each gene's shift, ``(n_genes,)``. `None` for models without shifts.
    - `size_factor`: depth of each tile, ``float64 (n_tiles,)``.
    """

    mean: np.ndarray
    aleatoric: np.ndarray
    epistemic: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    shift_sd: np.ndarray | None
    size_factor: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Total variance."""
        return np.asarray(self.aleatoric + self.epistemic)


def depth_problem(sdata: SpatialData, table: AnnData) -> str | None:
    """Return why predictions cannot be compared with counts, or `None` if they can.

    Predictions of a model with size factors for tiles of median depth cannot be compared with counts.
    """
    about = table.uns.get("prediction", {})
    if "total" not in about or "exposure" in about or about["at_measured_depth"]:
        return None
    return (
        f"The predictions of section {sample(sdata)!r} are for tiles of the model's median depth, "
        f"{about['total']:,.0f} counts, while every spot has its own depth. Predict at these depths with "
        '`stimage_sd.tl.predict(sdata, model, size_factors="total")`.'
    )


def measured_exposure(table: AnnData, rows: np.ndarray, units: AnnData) -> float | None:
    """Return the depth of a section relative to the training sections, `None` for models without exposure.

    - `table`: predictions.
    - `rows`: rows of `table` on measured spots.
    - `units`: counts on these spots, of all measured genes.
    - returns: median total count of the spots over the total of the model's median spot. If the section measured twice
      as many genes as the totals of the model are of, or half as many, such as a panel, or if nuclei or squares are
      compared with cells or bins, it is the sum of the counts of predicted genes over the sum of their predicted means.
    """
    about = table.uns.get("prediction", {})
    if "exposure" not in about:
        return None
    if INSTANCES not in table.uns and totals_compare(units.n_vars, about["n_counted"]):
        return exposure_of(np.median(np.asarray(units.X.sum(axis=1))), about["total"])
    shared = [gene for gene in table.var_names if gene in units.var_names]
    expected = float(np.asarray(table[rows, shared].X).sum()) / float(about["exposure"])
    return exposure_of(units[:, shared].X.sum(), expected)


def totals_compare(n_genes: int, n_counted: int) -> bool:
    """Return whether totals over so many genes have the meaning of the model's totals; 0 if the model does not say."""
    return n_counted == 0 or 1 / _MOST_GENES <= n_genes / n_counted <= _MOST_GENES


def exposure_of(counts: float, expected: float) -> float:
    """Return the ratio of counts to expected counts, at least 0.001 as for size factors."""
    return max(float(counts) / float(expected), 1e-3)


def at_depth_of(table: AnnData, rows: np.ndarray, genes: Sequence[str], exposure: float | None = None) -> Compared:
    """Return predictions of some tiles and genes, moved to an exposure.

    - `table`: predictions.
    - `rows`, `genes`: rows and predicted genes.
    - `exposure`: depth of the section. `None`: as predicted.
    """
    columns = table.var_names.get_indexer(list(genes))
    mean, aleatoric, epistemic, lower, upper = (
        np.asarray(values[rows][:, columns], dtype=np.float64)
        for values in (table.X, *(table.layers[name] for name in ("aleatoric", "epistemic", "lower", "upper")))
    )
    factor = table.obs["size_factor"].to_numpy(dtype=np.float64)[rows]
    sd = table.var["shift_sd"].to_numpy(dtype=np.float64)[columns] if "shift_sd" in table.var else None
    if exposure is not None and sd is not None and (change := depth_change(table, exposure)) != 1:
        # depth multiplies means and keeps r, so every variance beyond the mean grows with the square
        aleatoric = change * mean + change**2 * (aleatoric - mean)
        mean, epistemic, factor = change * mean, change**2 * epistemic, np.full(len(rows), exposure)
        level = float(table.uns["prediction"]["interval_level"])
        lower, upper = nearest_interval(mean, aleatoric + epistemic, sd, coverage=level)
    return Compared(mean, aleatoric, epistemic, lower, upper, sd, factor)


def depth_change(table: AnnData, exposure: float | None) -> float:
    """Return the factor on predicted means from the exposure they were predicted at to another, 1 for `None`."""
    return 1.0 if exposure is None else exposure / float(table.uns["prediction"]["exposure"])
