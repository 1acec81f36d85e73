"""Distributions of gene scores, per section or per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stimage_sd.pl._canvas import WARNING, finish, require_columns
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._model_scores import By, Panel, draw_group, draw_models, group_label
from stimage_sd.pl._score_tables import Scores, table_of, with_gain

PANELS = {
    "pearson": Panel("Pearson correlation", "r, predicted and observed", 0.0, named=True),
    "spearman": Panel("Spearman correlation", "rank correlation, predicted and observed", 0.0, named=True),
    "bivariate_morans_i": Panel("bivariate Moran's I", "I, predicted and neighbors", 0.0, named=True),
    "c_index": Panel("concordance", "c-index", 0.5, named=True),
    "auc": Panel("High or Low", "AUC of the probability of High", 0.5, named=True),
    "balanced_accuracy": Panel("High or Low", "balanced accuracy", 0.5, named=True),
    "iou": Panel("pattern overlap", "IoU of the smoothed patterns", None, named=True),
    "coverage": Panel("interval coverage", "share of counts in the 90% interval", 0.9, named=False),
    "nll_gain": Panel("gain over the floor", "log-likelihood per count over mean-only", 0.0, named=True),
}
DEFAULT = ("pearson", "bivariate_morans_i", "iou", "coverage", "nll_gain")
#: source columns of derived metrics
SOURCES = {"nll_gain": ("nll", "nll_floor")}
#: font size of gene names, points
NAME_SIZE = 7.0


def scores(
    data: Scores | Mapping[str, Scores],
    *,
    metrics: Sequence[str] | None = None,
    by: By = "model",
    reference: str | None = None,
    n_named: int = 5,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw distributions of scores over genes, per section or per model.

    Parameters
    ----------
    data
        Table from `stimage_sd.tl.evaluate` or `stimage_sd.tl.evaluate_genes_high` (one row per section and gene), or
        from `stimage_sd.tl.cross_validate` (one row per section, model, gene and metric). For a cohort, the table from
        `stimage_sd.tl.cox_screen`, ``genes`` or ``samples`` from `stimage_sd.tl.bulk_correlation`, or the result of
        `stimage_sd.tl.risk_groups`, with one violin per group. Several models: such tables, keyed by the model's name,
        or one table with a column ``model``. The table from ``stimage_sd.tl.pool_members`` is drawn as boxes over
        single members and over pools.
    metrics
        Panels to draw: ``"pearson"``, ``"spearman"``, ``"bivariate_morans_i"``, ``"iou"``, ``"coverage"`` (of the 90 %
        interval), ``"nll_gain"`` (gain in log-likelihood per count over the mean-only model), ``"c_index"``,
        ``"auc"``, ``"balanced_accuracy"``. Default: the first six without ``"spearman"`` for tables with
        ``"pearson"`` of sections, else all metrics in the table.
    by
        Grouping for several models. ``"model"`` draws one violin per model over each gene's mean over sections, with
        paired tests. ``"section"`` draws one box per section (or group) and model, as in the paper.
    reference
        Model to test all others against. Default: the model with the best mean.
    n_named
        Number of best genes per section to name in each panel, for tables from `evaluate`.
    ax
        Axes to draw on, one per metric. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    One axes per metric. The label of a section or model gives the median and the number of genes without a score. The
    label of a model also gives the p-value against the reference. A model has the same color in every figure of the
    same models.

    Raises
    ------
    ValueError
        If the table is not a table of scores, or has several rows of one section and gene. Also if the number of axes
        in `ax` differs from the number of metrics, or an option is out of range.

    Notes
    -----
    The test is Wilcoxon's two-sided signed-rank test over genes. It compares a gene's mean over the sections with a
    score of both models. For coverage it compares the distance from 90 %. Holm's correction covers the tests of a
    panel, which are all pairs of models, or the pairs with `reference` if given. Genes of the same sections are not
    independent, so a small p-value holds for these sections and not for new patients. Paper, Figures 2c, 2e, 5a
    and 5c.

    Examples
    --------
    >>> import numpy as np, pandas as pd, stimage_sd as sti
    >>> values = np.linspace(0.1, 0.9, 20)
    >>> names = ["pearson", "bivariate_morans_i", "iou", "coverage", "nll", "nll_floor"]
    >>> table = pd.DataFrame({"section": "a", "gene": [f"G{i}" for i in range(20)], **dict.fromkeys(names, values)})
    >>> len(sti.pl.scores(table))
    5
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    if by not in get_args(By):
        raise ValueError(f"Expected `by` to be one of {list(get_args(By))}, found {by!r}.")
    frame = table_of(data)
    chosen = list(_default(frame) if metrics is None else metrics)
    unknown = [name for name in chosen if name not in PANELS]
    if unknown or not chosen:
        raise ValueError(f"Expected `metrics` to be of {list(PANELS)}, found {unknown or 'none'}.")
    _require(frame, chosen)
    frame = with_gain(frame)
    if "model" in frame:
        looks = {name: PANELS[name] for name in chosen}
        if isinstance(data, pd.DataFrame) and {"kind", "number"} <= set(data.columns):
            # members are not paired as genes are, so that they are drawn by section
            by = "section"
            looks = {
                name: look._replace(line=None, label=f"mean over genes of {look.label}") for name, look in looks.items()
            }
        return sheet.done(draw_models(frame, looks, by=by, reference=reference, sheet=sheet))
    return sheet.done(_draw_sections(frame, chosen, n_named=n_named, sheet=sheet))


def _default(frame: pd.DataFrame) -> Sequence[str]:
    """Return the metrics to draw if none are named."""
    of_sections = "pearson" in frame and bool({"n_tiles", "nll"} & set(frame.columns))
    found = [name for name in PANELS if name in frame]
    return DEFAULT if of_sections or not found else found


def _require(frame: pd.DataFrame, metrics: Sequence[str]) -> None:
    require_columns(frame, ["section", "gene", *(column for name in metrics for column in SOURCES.get(name, (name,)))])


def _draw_sections(table: pd.DataFrame, metrics: list[str], *, n_named: int, sheet: Sheet) -> np.ndarray:
    """Draw one violin per section and name the best genes."""
    sections = list(dict.fromkeys(table["section"]))
    # use one row if the row fits on a page
    columns = len(metrics) if len(sections) <= 2 else 3 if len(sections) <= 6 else 1
    axes = sheet.panels(len(metrics), size=(1.7 + 1.1 * len(sections), 4.2), columns=columns)
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
    """Write gene names right of their points without overlap."""
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
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "gray", "shrinkA": 0, "shrinkB": 0},
        )
