"""Plots of scores of several models, with paired tests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Patch
from scipy.stats import wilcoxon

from stimage_sd.pl._canvas import MEASURED, WARNING, finish
from stimage_sd.pl._figure import Sheet

By = Literal["model", "section"]
#: largest number of values of a box that are drawn as points too
_FEW = 12


class Panel(NamedTuple):
    """Settings of a score's panel: title, axis label, reference line, and whether to name the best genes."""

    title: str
    label: str
    line: float | None
    named: bool


def draw_models(
    table: pd.DataFrame,
    looks: Mapping[str, Panel],
    *,
    by: By,
    reference: str | None,
    sheet: Sheet,
) -> np.ndarray:
    """Draw one panel per metric, best model first."""
    models = list(dict.fromkeys(table["model"]))
    if reference is not None and reference not in models:
        raise ValueError(f"Expected `reference` to be one of the models {models}, found {reference!r}.")
    by_quality = {
        name: _quality(name, table[name]).groupby(table["model"]).mean().sort_values(ascending=False, kind="stable")
        for name in looks
    }
    # colors follow the order of the table, so that they do not depend on the metrics
    colors = {str(model): to_hex(mpl.colormaps["tab10"](index % 10)) for index, model in enumerate(models)}
    # all panels share the order of models, by the first metric
    models = [str(model) for model in by_quality[next(iter(looks))].index]
    n_sections = table["section"].nunique()
    width = 1.2 + 1.15 * len(models) if by == "model" else max(3.8, 2.2 + n_sections * (0.3 + 0.22 * len(models)))
    columns = max(1, min(len(looks), int(18 // width)))
    axes = sheet.panels(len(looks), size=(width, 4.4), columns=columns)
    for index, (panel, (name, look)) in enumerate(zip(axes, looks.items(), strict=True)):
        if look.line is not None:
            panel.axhline(look.line, color=WARNING, linestyle="--", linewidth=1.0, zorder=0)
        if by == "section":
            _draw_boxes(panel, table, name, models, colors)
            if index == 0:
                handles = [Patch(facecolor=colors[model], alpha=0.6, label=model) for model in models]
                # room for the legend above the boxes
                low, high = panel.get_ylim()
                panel.set_ylim(low, high + 0.07 * (high - low) * -(-len(handles) // 2))
                panel.legend(handles=handles, fontsize=8, frameon=False, ncols=2, loc="upper left")
        else:
            best = str(by_quality[name].index[0]) if reference is None else reference
            _draw_violins(panel, table, name, models, colors, best, chosen=reference is None)
        panel.set_title(look.title, fontsize=11)
        panel.set_ylabel(look.label, fontsize=9)
        finish(panel)
    return axes


def _quality(metric: str, values: pd.Series) -> pd.Series:
    """Return values where larger is better."""
    return -(values - 0.9).abs() if metric == "coverage" else values


def _draw_violins(
    ax: Axes, table: pd.DataFrame, metric: str, models: list[str], colors: dict[str, str], best: str, *, chosen: bool
) -> None:
    p_values = paired_tests(table, metric, reference=None if chosen else best)
    labels = []
    for position, model in enumerate(models):
        values = table[table["model"] == model].groupby("gene")[metric].mean()
        draw_group(ax, position, values, color=colors[model])
        pair = frozenset((model, best))
        test = "reference" if model == best else _p_label(p_values.get(pair, np.nan))
        labels.append(f"{group_label(model, values)}\n{test}")
    ax.set_xticks(range(len(models)), labels)
    for text, model in zip(ax.get_xticklabels(), models, strict=True):
        text.set_fontweight("bold" if model == best else "normal")
    ax.set_xlim(-0.6, len(models) - 0.4)


def _p_label(p_value: float) -> str:
    if np.isnan(p_value):
        return "no test"
    return f"p = {p_value:.2g}" if p_value >= 1e-3 else f"p = {p_value:.0e}"


def _draw_boxes(ax: Axes, table: pd.DataFrame, metric: str, models: list[str], colors: dict[str, str]) -> None:
    """Draw one box per section and model, over genes."""
    sections = list(dict.fromkeys(table["section"]))
    step = 0.8 / len(models)
    for index, model in enumerate(models):
        scores = table[table["model"] == model]
        groups = [scores.loc[scores["section"] == section, metric].dropna().to_numpy() for section in sections]
        parts = ax.boxplot(
            groups, positions=[place - 0.4 + step * (index + 0.5) for place in range(len(sections))],
            widths=0.85 * step, patch_artist=True, manage_ticks=False,
            flierprops={"marker": ".", "markersize": 2, "markeredgecolor": "none", "markerfacecolor": colors[model]},
            medianprops={"color": "black", "linewidth": 1.2},
        )  # fmt: skip
        for box in parts["boxes"]:
            box.set(facecolor=colors[model], alpha=0.6, linewidth=0.6)
        for line in (*parts["whiskers"], *parts["caps"]):
            line.set(color="gray", linewidth=0.8)
        for place, values in enumerate(groups):
            if len(values) <= _FEW:
                across = np.full(len(values), place - 0.4 + step * (index + 0.5))
                ax.scatter(across, values, s=9, color="black", alpha=0.5, linewidth=0, zorder=3)
    ax.set_xticks(range(len(sections)), sections)
    ax.set_xlim(-0.6, len(sections) - 0.4)


# --------------------------------------------------------------------------------------------------
# tests


def paired_tests(table: pd.DataFrame, metric: str, *, reference: str | None = None) -> dict[frozenset[str], float]:
    """Test pairs of models with Wilcoxon's signed-rank test over genes, with Holm's correction.

    Parameters
    ----------
    table
        Table from `stimage_sd.pl._score_tables.table_of`.
    metric
        Column of the table.
    reference
        Model to test all others against. Default: test all pairs.

    Returns
    -------
    Corrected p-values, keyed by pair. NaN if two models share no gene, and 1 if two models agree in every gene.
    """
    scored = _quality(metric, table.set_index(["section", "gene", "model"])[metric]).unstack("model")
    pairs = [
        pair for pair in itertools.combinations(map(str, scored.columns), 2) if reference is None or reference in pair
    ]
    return dict(zip(map(frozenset, pairs), _holm([_signed_rank(scored[a], scored[b]) for a, b in pairs]), strict=True))


def _signed_rank(one: pd.Series, other: pd.Series) -> float:
    difference = (one - other).dropna().groupby("gene").mean().to_numpy()
    if not len(difference):
        return np.nan
    return 1.0 if not difference.any() else float(wilcoxon(difference).pvalue)


def _holm(p_values: list[float]) -> list[float]:
    """Correct p-values by Holm's step-down method, ignoring NaN."""
    values = np.array(p_values, dtype=float)
    order = [index for index in np.argsort(values, kind="stable") if not np.isnan(values[index])]
    least = 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, values[index] * (len(order) - rank)))
        values[index] = least
    return values.tolist()


# --------------------------------------------------------------------------------------------------
# groups of genes


def draw_group(ax: Axes, position: int, values: pd.Series, *, color: str = MEASURED) -> np.ndarray:
    """Draw a violin with points and quartiles, and return the horizontal position of each point."""
    across = position + np.random.default_rng(0).uniform(-0.14, 0.14, len(values))
    defined = values.notna().to_numpy()
    numbers = values.to_numpy(dtype=float)[defined]
    if len(numbers) > 1 and np.ptp(numbers) > 0:
        parts: dict[str, Any] = ax.violinplot(numbers, positions=[position], widths=0.7, showextrema=False)
        parts["bodies"][0].set(facecolor=color, alpha=0.25, edgecolor="none")
    ax.scatter(across[defined], numbers, s=5, color=color, alpha=0.5, linewidth=0, rasterized=True)
    if len(numbers):
        low, middle, high = np.percentile(numbers, [25, 50, 75])
        ax.vlines(position, low, high, color="black", linewidth=3.5, zorder=3)
        ax.plot(position, middle, "o", color="white", markeredgecolor="black", markersize=5, zorder=4)
    return across


def group_label(name: str, values: pd.Series) -> str:
    """Return the label of a group: name, median, and number of genes without a score."""
    undefined = int(values.isna().sum())
    if undefined == len(values):
        return f"{name}\nno scores"
    label = f"{name}\nmedian {round(float(values.median()), 2) + 0.0:.2f}"
    return f"{label}\n{undefined} undefined" if undefined else label
