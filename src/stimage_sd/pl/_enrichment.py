"""Dots of enriched gene sets."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from stimage_sd.pl._canvas import Colors, add_color_bar, finish, require_columns
from stimage_sd.pl._figure import AxesLike, Sheet, Title

#: largest number of characters per line of a name
_LINE = 38
#: areas of the smallest and the largest dot, points squared
_AREAS = 25.0, 200.0
#: column with the library of a gene set
LIBRARY = "library"


def enrichment(
    data: pd.DataFrame,
    *,
    n_sets: int = 10,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw the most enriched gene sets as dots, one panel per library.

    Parameters
    ----------
    data
        Table from `stimage_sd.tl.enrichment`.
    n_sets
        Number of sets per panel, those of the smallest p-values.
    cmap, vmin, vmax, alpha
        Colormap of -log10 of the q-values. Ends of the color range, by default 0 and the largest drawn value. Opacity.
    ax
        Axes to draw on, one per library. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    One axes per library. The position of a dot is the share of the set's background genes that are among the genes, its
    size is their number, and its color the q-value.

    Raises
    ------
    ValueError
        If a column is missing, the table is empty, `n_sets` is not positive, or the number of axes in `ax` differs from
        the number of libraries.

    Notes
    -----
    Paper, Figures S5 to S7, a to c.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sets = {"keratins": ["KRT5", "KRT14", "KRT17"], "immune": ["CD3E", "CD4", "CD8A"]}
    >>> tested = [*sets["keratins"], *sets["immune"], "ACTB", "GAPDH", "ERBB2", "ESR1"]
    >>> table = sti.tl.enrichment(["KRT5", "KRT14", "CD4"], sets, background=tested)
    >>> [label.get_text() for label in sti.pl.enrichment(table)[0].get_yticklabels()]
    ['keratins', 'immune']
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    require_columns(
        data, ["gene_set", "n_overlap", "n_set", "p_value", "q_value"], source="the table of `stimage_sd.tl.enrichment`"
    )
    if n_sets < 1:
        raise ValueError(f"Expected `n_sets` of at least 1, found {n_sets}.")
    names = data[LIBRARY].astype(str).to_numpy() if LIBRARY in data else np.full(len(data), "")
    parts = {
        str(name): data[names == name].sort_values("p_value", kind="stable").head(n_sets)
        for name in dict.fromkeys(names)
    }
    drawn = pd.concat(parts.values())
    norm = colors.between(0.0, float(_strength(drawn).max()))
    most = int(drawn["n_overlap"].max())
    height = max(3.0, 1.4 + 0.3 * max(len(part) for part in parts.values()))
    axes = sheet.panels(len(parts), size=(6.2, height), columns=1 if len(parts) > 1 else None)
    for panel, (name, part) in zip(axes, parts.items(), strict=True):
        _draw(panel, part, colors, norm, most)
        panel.set_title(name.replace("_", " "), fontsize=11)
    return sheet.done(axes)


def _strength(sets: pd.DataFrame) -> pd.Series:
    """Return -log10 of the q-values."""
    return -np.log10(sets["q_value"].clip(lower=1e-300)) + 0.0


def _area(number: np.ndarray | float, most: int) -> np.ndarray:
    low, high = _AREAS
    return np.asarray(low + (high - low) * np.asarray(number) / most)


def _draw(ax: Axes, sets: pd.DataFrame, colors: Colors, norm: Normalize, most: int) -> None:
    places = np.arange(len(sets))
    ratio = sets["n_overlap"] / sets["n_set"]
    drawn = ax.scatter(
        ratio, places, s=_area(sets["n_overlap"].to_numpy(float), most), c=_strength(sets), cmap=colors.cmap, norm=norm,
        alpha=colors.alpha, edgecolor="0.3", linewidth=0.5, zorder=2,
    )  # fmt: skip
    ax.set_yticks(places, [fill(str(name).replace("_", " "), _LINE) for name in sets["gene_set"]])
    ax.set_ylim(len(sets) - 0.4, -0.6)
    pad = 0.12 * max(float(ratio.max()), 0.05)
    ax.set_xlim(max(0.0, float(ratio.min()) - pad), float(ratio.max()) + pad)
    ax.set_xlabel("share of the set that is among the genes", fontsize=9)
    ax.grid(axis="x", color="0.9", linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)
    finish(ax)
    add_color_bar(ax, drawn, "-log10 q-value", location="right")
    numbers = [int(number) for number in MaxNLocator(3, integer=True).tick_values(1, most) if 1 <= number <= most]
    handles = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color="0.5",
            markersize=float(np.sqrt(_area(number, most))),
            label=str(number),
        )
        for number in dict.fromkeys([*numbers, most])
    ]
    ax.legend(handles=handles, title="genes", title_fontsize=8, fontsize=8, frameon=False, labelspacing=0.9, loc="best")
