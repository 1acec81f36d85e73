"""Measured and predicted values of a gene, on one scale where they have one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from anndata import AnnData
from matplotlib.colors import BoundaryNorm, Normalize
from sklearn.metrics import roc_auc_score
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._gene_classifier import is_high
from stimage_sd.pl._canvas import Colors, column
from stimage_sd.stats.spatial import binary_pattern, pattern_iou, pearson

#: layer of tables of gene classes
HIGH = "high"
ONE_SCALE = "measured counts and predicted means on one scale"


class Shown(NamedTuple):
    """Values of one gene in one section.

    Attributes
    ----------
    predicted
        Values of all rows of the table of predictions, ``float64 (n_rows,)``.
    rows, observed
        Rows on a measured spot or cell, and the measured values there. `None` if the gene was not measured.
    labels
        Labels of the color bars of the measured and the predicted values.
    agreement
        Agreement of both, for the title.
    one_scale
        Label of the color bar that both share. `None` if both have units of their own.
    kind
        ``"class"`` or ``"pattern"`` for values that are 1 for High and 0 for Low.
    """

    predicted: np.ndarray
    rows: np.ndarray | None
    observed: np.ndarray | None
    labels: tuple[str, str]
    agreement: str
    one_scale: str | None
    kind: str = ""


def shown(sdata: SpatialData, table: AnnData, genes: Sequence[str], source: contract.Source) -> dict[str, Shown]:
    """Return the values to draw, as log1p, keyed by gene.

    Predicted means are moved to the depth that the section was measured at. Where spots have depths of their own, the
    counts are moved to the depth of the predictions instead.
    """
    measured = _measured_units(sdata, table, source)
    if HIGH in table.layers:
        return {gene: _classes(table, gene, measured) for gene in genes}
    if measured is None:
        return {gene: _predicted_only(table, gene) for gene in genes}
    rows, units, against = measured
    every = np.arange(table.n_obs)
    if against == "proteins":
        exposure, factor, same = None, np.ones(len(rows)), False
    else:
        exposure = contract.measured_exposure(table, rows, units)
        factor, same = _depth_factor(sdata, table, units)
    found = {}
    for gene in genes:
        name = str(table.var["measured"][gene]) if against == "proteins" and "measured" in table.var else gene
        if name not in units.var_names:
            found[gene] = _predicted_only(table, gene)
            continue
        predicted = np.log1p(contract.at_depth_of(table, every, [gene], exposure).mean[:, 0])
        values = column(units, name) * factor
        observed = np.sign(values) * np.log1p(np.abs(values))
        unit = "count" if against == "counts" else f"intensity of {name}"
        depth = (
            ", at the section's depth" if exposure is not None else ", at the model's depth" if _moved(factor) else ""
        )
        r = float(pearson(predicted[rows, None], observed[:, None])[0])
        found[gene] = Shown(
            predicted,
            rows,
            observed,
            (f"log(1 + {unit})", f"log(1 + predicted mean count){depth}"),
            f"r = {r:.2f}" if np.isfinite(r) else "r undefined: constant",
            f"log(1 + count){depth}\n{ONE_SCALE}" if same else None,
        )
    return found


def norms_of(values: Sequence[Shown], colors: Colors, scale: str) -> tuple[Normalize, Normalize]:
    """Return the color ranges of measured and of predicted values of a gene, over all sections."""
    observed = [one.observed for one in values if one.observed is not None]
    predicted = [one.predicted for one in values]
    if scale == "shared" and all(one.one_scale is not None for one in values if one.observed is not None):
        norm = colors.norm(np.concatenate([*observed, *predicted]))
        return norm, norm
    return colors.norm(np.concatenate(observed or predicted)), colors.norm(np.concatenate(predicted))


def as_patterns(values: Shown, positions: np.ndarray) -> Shown:
    """Return where a gene is high, smoothed on the lattice, as the IoU compares (paper, 2.8).

    Parameters
    ----------
    values
        Values of a gene.
    positions
        Centers of all rows, ``(n_rows, 2)``.

    Raises
    ------
    ValueError
        If the gene was not measured, or the tiles are not on a lattice.
    """
    if values.rows is None or values.observed is None or values.kind:
        raise ValueError(
            'Expected predicted means of a measured gene for `scale="pattern"`, found '
            f"{'classes of High and Low' if values.kind else 'no measured values'}. Leave `scale` out."
        )
    rows, where = values.rows, positions[values.rows]
    predicted, observed = values.predicted[rows, None], values.observed[:, None]
    iou = float(pattern_iou(predicted, observed, where)[0])
    # only compared tiles have a pattern
    pattern = np.full(len(positions), np.nan)
    pattern[rows] = binary_pattern(predicted, where)[:, 0]
    agreement = f"IoU = {iou:.2f}" if np.isfinite(iou) else "IoU undefined: constant"
    measured = binary_pattern(observed, where)[:, 0].astype(np.float64)
    return values._replace(predicted=pattern, observed=measured, agreement=agreement, one_scale=None, kind="pattern")


def class_norm() -> BoundaryNorm:
    """Return the norm of classes, 0 for Low and 1 for High."""
    return BoundaryNorm([-0.5, 0.5, 1.5], 2)


def _moved(factor: np.ndarray) -> bool:
    return bool((factor != 1).any())


def _measured_units(
    sdata: SpatialData, table: AnnData, source: contract.Source
) -> tuple[np.ndarray, AnnData, contract.Against] | None:
    """Return rows on measured units, these units and their kind, or `None` without measured units."""
    about = contract.about_instances(table)
    on_spots = about is None and "spot_id" in table.obs
    of_cells = about is not None and contract.has_cells(sdata, source.table)
    if not (on_spots or of_cells) or not (contract.has_units(sdata) or source.table is not None):
        return None
    against = table.uns.get("evaluation", {}).get("against")
    if against is None:
        against = "counts" if contract.has_counts(sdata) else "proteins"
    rows, units = contract.align(sdata, table, source, against=against)
    return rows, units, against


def _depth_factor(sdata: SpatialData, table: AnnData, units: AnnData) -> tuple[np.ndarray, bool]:
    """Return what brings counts to the depth of the predictions, and whether both then have one scale."""
    ones = np.ones(units.n_obs)
    if contract.depth_problem(sdata, table) is None:
        return ones, True
    about = table.uns["prediction"]
    totals = np.asarray(units.X.sum(axis=1), dtype=np.float64).ravel()
    if not contract.totals_compare(units.n_vars, int(about.get("n_counted", 0))):
        return ones, False
    return float(about["total"]) / np.maximum(totals, 1.0), True


def _predicted_only(table: AnnData, gene: str) -> Shown:
    label = "log(1 + predicted mean count)"
    return Shown(np.log1p(column(table, gene)), None, None, (label, label), "", None)


def _classes(table: AnnData, gene: str, measured: tuple[np.ndarray, AnnData, contract.Against] | None) -> Shown:
    """Return the classes of a gene, 1 for High and 0 for Low, by the rule of the classifier."""
    predicted = column(table, gene, HIGH)
    if measured is None or measured[2] != "counts" or gene not in measured[1].var_names:
        return Shown(predicted, None, None, ("", ""), "", None, "class")
    rows, units, _ = measured
    by_cohort = table.uns["prediction"]["standardize"] == "cohort"
    threshold = table.var.loc[[gene], "threshold"].to_numpy(dtype=np.float64) if by_cohort else None
    observed = is_high(column(units, gene)[:, None], threshold)[:, 0].astype(np.float64)
    agreement = "AUC undefined: one class"
    if len(np.unique(observed)) == 2:
        agreement = f"AUC = {roc_auc_score(observed, column(table, gene)[rows]):.2f}"
    return Shown(predicted, rows, observed, ("", ""), agreement, None, "class")
