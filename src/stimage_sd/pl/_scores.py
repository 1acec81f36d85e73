"""How well each gene is predicted, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from stimage_sd.pl._canvas import MEASURED, WARNING, finish, panels, require_columns


class _Panel(NamedTuple):
    """A score: its title, what its axis says, a line to compare with, whether its best genes are named."""

    title: str
    label: str
    line: float | None
    named: bool


PANELS = {
    "pearson": _Panel("Pearson correlation", "r, predicted and observed", 0.0, named=True),
    "bivariate_morans_i": _Panel("bivariate Moran's I", "I, predicted and neighbours", 0.0, named=True),
    "iou": _Panel("pattern overlap", "IoU of the smoothed patterns", None, named=True),
    "coverage": _Panel("interval coverage", "share of counts in the 90% interval", 0.9, named=False),
    "nll_gain": _Panel("gain over the floor", "log-likelihood a count over mean-only", 0.0, named=True),
}
#: size of a gene's name, points
NAME_SIZE = 7.0


def scores(
    frame: pd.DataFrame, *, n_named: int = 5, ax: Axes | Sequence[Axes] | np.ndarray | None = None
) -> np.ndarray:
    """Draw how the scores of `stimage_sd.tl.evaluate` are distributed over genes, a violin a section.

    Parameters
    ----------
    frame
        What `stimage_sd.tl.evaluate` returned: a row a section and gene.
    n_named
        How many of a section's best genes to name in each panel.
    ax
        Five axes to draw on; a new figure by default.

    Returns
    -------
    The five axes: Pearson correlation, bivariate Moran's I, IoU, coverage of the 90 % interval, and the gain in
    log-likelihood a count over the mean-only model. Under each section stands its median, and how many genes
    have no score, where there are any.

    Raises
    ------
    ValueError
        If the table is not one of scores, or `ax` is not five axes.

    Examples
    --------
    >>> import numpy as np, pandas as pd, stimage_sd as sti
    >>> values = np.linspace(0.1, 0.9, 20)
    >>> names = ["pearson", "bivariate_morans_i", "iou", "coverage", "nll", "nll_floor"]
    >>> table = pd.DataFrame({"section": "a", "gene": [f"G{i}" for i in range(20)], **dict.fromkeys(names, values)})
    >>> len(sti.pl.scores(table))
    5
    """
    require_columns(frame, ["section", "gene", "pearson", "bivariate_morans_i", "iou", "coverage", "nll", "nll_floor"])
    table = frame.assign(nll_gain=frame["nll_floor"] - frame["nll"])
    sections = list(dict.fromkeys(table["section"]))
    # in one row while a row is no wider than a page
    columns = len(PANELS) if len(sections) <= 2 else 3 if len(sections) <= 6 else 1
    axes = panels(ax, len(PANELS), size=(1.7 + 1.1 * len(sections), 4.2), columns=columns)
    for panel, (name, look) in zip(axes, PANELS.items(), strict=True):
        groups = [table.loc[table["section"] == section].set_index("gene")[name] for section in sections]
        if look.line is not None:
            panel.axhline(look.line, color=WARNING, linestyle="--", linewidth=1.0, zorder=0)
        across = [_draw_group(panel, position, values) for position, values in enumerate(groups)]
        panel.set_title(look.title, fontsize=11)
        panel.set_ylabel(look.label, fontsize=9)
        panel.set_xticks(range(len(sections)), [_label(*pair) for pair in zip(sections, groups, strict=True)])
        panel.set_xlim(-0.6, len(sections) - 0.2 if look.named else len(sections) - 0.4)
        finish(panel)
        if look.named:
            for position, (values, x) in enumerate(zip(groups, across, strict=True)):
                best = np.argsort(-values.to_numpy(dtype=float), kind="stable")[: min(n_named, values.count())]
                _name_best(panel, position, values.iloc[best], x[best])
    return axes


def _draw_group(ax: Axes, position: int, values: pd.Series) -> np.ndarray:
    """Draw a violin, its points, its quartiles; return where across each value was drawn."""
    across = position + np.random.default_rng(0).uniform(-0.14, 0.14, len(values))
    defined = values.notna().to_numpy()
    numbers = values.to_numpy(dtype=float)[defined]
    if len(numbers) > 1 and np.ptp(numbers) > 0:
        parts: dict[str, Any] = ax.violinplot(numbers, positions=[position], widths=0.7, showextrema=False)
        parts["bodies"][0].set(facecolor=MEASURED, alpha=0.25, edgecolor="none")
    ax.scatter(across[defined], numbers, s=5, color=MEASURED, alpha=0.5, linewidth=0, rasterized=True)
    if len(numbers):
        low, middle, high = np.percentile(numbers, [25, 50, 75])
        ax.vlines(position, low, high, color="black", linewidth=3.5, zorder=3)
        ax.plot(position, middle, "o", color="white", markeredgecolor="black", markersize=5, zorder=4)
    return across


def _label(section: str, values: pd.Series) -> str:
    undefined = int(values.isna().sum())
    if undefined == len(values):
        return f"{section}\nno scores"
    label = f"{section}\nmedian {values.median():.2f}"
    return f"{label}\n{undefined} undefined" if undefined else label


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
