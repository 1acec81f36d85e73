"""How well each gene is predicted, section by section, or model by model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from stimage_sd.pl._canvas import WARNING, finish, panels, require_columns
from stimage_sd.pl._model_scores import By, Panel, draw_group, draw_models, group_label, wide, with_gain

PANELS = {
    "pearson": Panel("Pearson correlation", "r, predicted and observed", 0.0, named=True),
    "spearman": Panel("Spearman correlation", "rank correlation, predicted and observed", 0.0, named=True),
    "bivariate_morans_i": Panel("bivariate Moran's I", "I, predicted and neighbours", 0.0, named=True),
    "c_index": Panel("concordance", "c-index", 0.5, named=True),
    "iou": Panel("pattern overlap", "IoU of the smoothed patterns", None, named=True),
    "coverage": Panel("interval coverage", "share of counts in the 90% interval", 0.9, named=False),
    "nll_gain": Panel("gain over the floor", "log-likelihood a count over mean-only", 0.0, named=True),
}
DEFAULT = ("pearson", "bivariate_morans_i", "iou", "coverage", "nll_gain")
#: columns that a metric is made of, where it is not one itself
SOURCES = {"nll_gain": ("nll", "nll_floor")}
#: size of a gene's name, points
NAME_SIZE = 7.0


def scores(
    frame: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    by: By = "model",
    reference: str | None = None,
    n_named: int = 5,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Draw how scores are distributed over genes: a violin a section, or the models of a cross-validation.

    Parameters
    ----------
    frame
        What `stimage_sd.tl.evaluate` returned, a row a section and gene; `stimage_sd.tl.cross_validate`, a row a
        section, model, gene and metric; or, of a cohort, `stimage_sd.tl.cox_screen` and the genes or samples of
        `stimage_sd.tl.bulk_correlation`, a violin a group.
    metrics
        Which panels: ``"pearson"``, ``"spearman"``, ``"bivariate_morans_i"``, ``"iou"``, ``"coverage"`` of the 90 %
        interval, ``"nll_gain"``, the gain in log-likelihood a count over the mean-only model, and ``"c_index"``. All
        but Spearman and the last by default; of a cohort, those that the table has.
    by
        Of a cross-validation. ``"model"``: a violin a model, of each gene's mean over sections, with paired tests.
        ``"section"``: for each section a box a model, as in the paper's figure.
    reference
        The model that others are tested against; the one with the best mean by default.
    n_named
        How many of a section's best genes to name in each panel, for the scores of `evaluate`.
    ax
        Axes to draw on, one a metric; a new figure by default.

    Returns
    -------
    The axes, one a metric. Under each section or model stands its median, and how many genes have no score,
    where there are any; under a model also the p-value against the reference.

    Raises
    ------
    ValueError
        If the table is not one of scores, `ax` are fewer or more axes than metrics, or an option is out of range.

    Notes
    -----
    Tests are Wilcoxon's signed-rank, two-sided, on genes: a gene's mean over those sections where both models have
    a score; of coverage, its distance from 90 %. Holm's correction is over the tests of a panel: all pairs of
    models where the reference is chosen by the scores, those with it where the user names it. Genes of the same
    sections are not independent, so that a small p-value is about these sections, not about the next patient.
    Paper, Figure 2e.

    Examples
    --------
    >>> import numpy as np, pandas as pd, stimage_sd as sti
    >>> values = np.linspace(0.1, 0.9, 20)
    >>> names = ["pearson", "bivariate_morans_i", "iou", "coverage", "nll", "nll_floor"]
    >>> table = pd.DataFrame({"section": "a", "gene": [f"G{i}" for i in range(20)], **dict.fromkeys(names, values)})
    >>> len(sti.pl.scores(table))
    5
    """
    if "group" in frame.columns:
        frame = frame.rename(columns={"group": "section", "sample": "gene"})
        metrics = [name for name in PANELS if name in frame.columns] if metrics is None else metrics
    if by not in get_args(By):
        raise ValueError(f"Expected `by` to be one of {list(get_args(By))}, found {by!r}.")
    chosen = list(DEFAULT if metrics is None else metrics)
    unknown = [name for name in chosen if name not in PANELS]
    if unknown or not chosen:
        raise ValueError(f"Expected `metrics` to be of {list(PANELS)}, found {unknown or 'none'}.")
    if {"model", "metric", "value"} <= set(frame.columns):
        table = wide(frame)
        _require(table, chosen)
        looks = {name: PANELS[name] for name in chosen}
        return draw_models(with_gain(table), looks, by=by, reference=reference, ax=ax)
    _require(frame, chosen)
    return _draw_sections(with_gain(frame), chosen, n_named=n_named, ax=ax)


def _require(frame: pd.DataFrame, metrics: Sequence[str]) -> None:
    require_columns(frame, ["section", "gene", *(column for name in metrics for column in SOURCES.get(name, (name,)))])


def _draw_sections(
    table: pd.DataFrame, metrics: list[str], *, n_named: int, ax: Axes | Sequence[Axes] | np.ndarray | None
) -> np.ndarray:
    """A violin a section, its best genes named."""
    sections = list(dict.fromkeys(table["section"]))
    # in one row while a row is no wider than a page
    columns = len(metrics) if len(sections) <= 2 else 3 if len(sections) <= 6 else 1
    axes = panels(ax, len(metrics), size=(1.7 + 1.1 * len(sections), 4.2), columns=columns)
    for panel, name in zip(axes, metrics, strict=True):
        look = PANELS[name]
        groups = [table.loc[table["section"] == section].set_index("gene")[name] for section in sections]
        if look.line is not None:
            panel.axhline(look.line, color=WARNING, linestyle="--", linewidth=1.0, zorder=0)
        across = [draw_group(panel, position, values) for position, values in enumerate(groups)]
        panel.set_title(look.title, fontsize=11)
        panel.set_ylabel(look.label, fontsize=9)
        panel.set_xticks(range(len(sections)), [group_label(*pair) for pair in zip(sections, groups, strict=True)])
        panel.set_xlim(-0.6, len(sections) - 0.2 if look.named else len(sections) - 0.4)
        finish(panel)
        if look.named:
            for position, (values, x) in enumerate(zip(groups, across, strict=True)):
                best = np.argsort(-values.to_numpy(dtype=float), kind="stable")[: min(n_named, values.count())]
                _name_best(panel, position, values.iloc[best], x[best])
    return axes


def _name_best(ax: Axes, position: int, best: pd.Series, across: np.ndarray) -> None:
    """Name genes right of their points, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    points = ax.get_window_extent().height * 72.0 / ax.figure.dpi
    step = 1.25 * NAME_SIZE * (high - low) / max(points, 1.0)
    place = np.inf
    for (gene, value), x in zip(best.items(), across, strict=True):
        place = min(float(value), place - step)
        ax.annotate(
            str(gene),
            xy=(x, float(value)),
            xytext=(position + 0.32, place),
            fontsize=NAME_SIZE,
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkA": 0, "shrinkB": 0},
        )
