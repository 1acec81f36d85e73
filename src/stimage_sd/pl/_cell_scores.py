"""Scores of predicted cells: F1 of each type, overall scores, confusion of types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from stimage_sd.pl._canvas import Colors, finish, require_columns
from stimage_sd.pl._figure import AxesLike, Sheet, Title

#: columns of the summary that are drawn, and their labels
_OVERALL = {
    "f1": "detection F1",
    "dice": "Dice",
    "panoptic_quality": "panoptic\nquality",
    "accuracy": "accuracy\nof types",
    "mean_f1": "mean F1\nof types",
    "mean_iou": "mean IoU\nof types",
}


class Scored(Protocol):
    """Attributes of `stimage_sd.tl.CellScores` that are drawn."""

    @property
    def summary(self) -> pd.DataFrame:
        """Return overall scores, one row per section."""
        ...

    @property
    def classes(self) -> pd.DataFrame:
        """Return scores of types, one row per section and type."""
        ...


def cell_scores(
    data: Scored | Mapping[str, Scored],
    *,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw the F1 of each cell type, and overall scores of detection, outlines and types.

    Parameters
    ----------
    data
        Result of `stimage_sd.tl.evaluate_cells`, or several results keyed by the model's name.
    ax
        Two axes to draw on. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above both panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes of the types and of the overall scores, ``(2,)``. Bars are means over sections, and points are sections.

    Raises
    ------
    ValueError
        If a column is missing, there is no result, or `ax` is not two axes.

    Notes
    -----
    Paper, Figures 4a, S14 and S15b.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.cell_scores(sti.tl.evaluate_cells(section))  # doctest: +SKIP
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    results = dict(data) if isinstance(data, Mapping) else {"": data}
    if not results:
        raise ValueError("Expected results of `stimage_sd.tl.evaluate_cells`, keyed by name, found none.")
    for result in results.values():
        require_columns(result.classes, ["section", "cell_type", "f1"], source="`stimage_sd.tl.evaluate_cells`")
        require_columns(result.summary, ["section", *_OVERALL], source="`stimage_sd.tl.evaluate_cells`")
    names = list(dict.fromkeys(name for result in results.values() for name in result.classes["cell_type"].astype(str)))
    width = 1.6 + 0.75 * max(len(names), len(_OVERALL)) * (1 + 0.25 * (len(results) - 1))
    axes = sheet.panels(2, size=(width, 3.8))
    types = {
        model: {name: result.classes.loc[result.classes["cell_type"].astype(str) == name, "f1"] for name in names}
        for model, result in results.items()
    }
    overall = {
        model: {label: result.summary[column] for column, label in _OVERALL.items()}
        for model, result in results.items()
    }
    for panel, groups, heading in zip(axes, (types, overall), ("F1 of each type", "all cells"), strict=True):
        _draw_bars(panel, groups)
        panel.set_title(heading, fontsize=11, pad=16)  # above the number of a bar of height 1
        panel.set(ylim=(0, 1.0), ylabel="score")
        finish(panel)
    axes[0].tick_params(axis="x", rotation=30 if max(map(len, names)) > 9 else 0)
    if len(results) > 1:
        axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return sheet.done(axes)


def _draw_bars(ax: Axes, groups: Mapping[str, Mapping[str, pd.Series]]) -> None:
    """Draw one bar per model and group, with points of sections if there are several."""
    step = 0.8 / len(groups)
    labels: list[str] = []
    for index, (model, scores) in enumerate(groups.items()):
        labels = list(scores)
        across = np.arange(len(scores)) - 0.4 + step * (index + 0.5)
        color = mpl.colormaps["tab10"](index % 10)
        heights = [float(values.mean()) for values in scores.values()]
        ax.bar(across, heights, width=0.9 * step, color=color, alpha=0.75, label=model)
        for place, values in zip(across, scores.values(), strict=True):
            if len(values) > 1:
                ax.scatter(np.full(len(values), place), values, s=10, color="black", alpha=0.6, linewidth=0, zorder=3)
        for place, height in zip(across, heights, strict=True):
            if len(groups) == 1 and np.isfinite(height):
                ax.annotate(f"{height:.2f}", (place, height), xytext=(0, 2), textcoords="offset points", ha="center",
                            fontsize=8)  # fmt: skip
    ax.set_xticks(range(len(labels)), labels)
    ax.tick_params(axis="x", labelsize=8)


def confusion(
    data: pd.DataFrame,
    *,
    normalize: bool = True,
    cmap: str | Colormap = "Blues",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    ax: Axes | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Draw the confusion matrix of measured (rows) and predicted (columns) types.

    Parameters
    ----------
    data
        Table ``confusion`` from `stimage_sd.tl.evaluate_cells`. Sections are summed.
    normalize
        Color and label by the fraction of the measured type. If `False`, color by the number of cells. The numbers of
        cells are always written.
    cmap, vmin, vmax, alpha
        Colormap. Ends of the color range, by default 0 and 1, or 0 and the largest number. Opacity.
    ax
        Axes to draw on. Default: a new figure.
    title, figsize, save, return_fig
        `title`: title of the panel. `figsize`: size of a new figure, inches. `save`: output file. `return_fig`: return
        the figure instead of the axes.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If a column is missing or the table is empty.

    Examples
    --------
    >>> import pandas as pd, stimage_sd as sti
    >>> table = pd.DataFrame({"truth": list("aabb"), "predicted": list("abab"), "n": [8, 2, 1, 9]})
    >>> sti.pl.confusion(table).get_ylabel()
    'measured'
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    require_columns(data, ["truth", "predicted", "n"], source="`confusion` of `stimage_sd.tl.evaluate_cells`")
    names = list(dict.fromkeys(data["truth"]))
    counts = data.pivot_table(index="truth", columns="predicted", values="n", aggfunc="sum").loc[names, names]
    numbers = counts.to_numpy(dtype=float)
    shares = numbers / np.maximum(numbers.sum(axis=1, keepdims=True), 1)
    shown = shares if normalize else numbers
    side = 1.4 + 0.85 * len(names)
    panel = sheet.panel(size=(side + 0.9, side))
    norm = colors.between(0.0, 1.0 if normalize else float(shown.max()))
    panel.imshow(shown, cmap=colors.cmap, norm=norm, alpha=colors.alpha)
    for row, place in np.ndindex(*numbers.shape):
        text = f"{shares[row, place]:.0%}\n" if normalize else ""
        dark = norm(shown[row, place]) > 0.55
        panel.text(
            place, row, f"{text}{numbers[row, place]:,.0f}", ha="center", va="center", fontsize=8,
            color="white" if dark else "black",
        )  # fmt: skip
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.set(xlabel="predicted", ylabel="measured")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return sheet.done(panel)
