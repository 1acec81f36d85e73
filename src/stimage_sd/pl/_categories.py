"""Colors and legends of categories, the same in all figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex
from matplotlib.lines import Line2D

#: categories without a color of their own, and their color
_GRAY_NAMES, GRAY = ("background",), "#c8c8c8"
#: entries per column of a legend
_TALLEST = 14
#: largest number of categories that colors can tell apart
MOST = 40


def categories_of(columns: Iterable[pd.Series]) -> list[str]:
    """Return all categories: those of categorical columns in their order, then others in natural order.

    Examples
    --------
    >>> categories_of([pd.Series(["10", "2"]), pd.Series(pd.Categorical(["low"], categories=["high", "low"]))])
    ['high', 'low', '2', '10']
    """
    ordered: dict[str, None] = {}
    others: set[str] = set()
    for values in columns:
        if isinstance(values.dtype, pd.CategoricalDtype):
            ordered |= dict.fromkeys(map(str, values.cat.categories))
        else:
            others |= set(map(str, values.dropna().unique()))
    rest = sorted(
        others - set(ordered), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)
    )
    return [*ordered, *rest]


def colors_of(names: Sequence[str], palette: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the color of each category, the palette's where it has one."""
    colored = [name for name in names if name not in _GRAY_NAMES]
    if len(colored) <= 20:
        steps = mpl.colormaps["tab10" if len(colored) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    else:
        steps = mpl.colormaps["turbo"](np.linspace(0.03, 0.97, len(colored)))
    colors = {name: to_hex(step) for name, step in zip(colored, steps, strict=False)}
    return {name: (palette or {}).get(name, colors.get(name, GRAY)) for name in names}


def stored_colors(table: AnnData, name: str) -> dict[str, str]:
    """Return the colors that scanpy or another tool keeps for a column in ``uns``."""
    colors = table.uns.get(f"{name}_colors")
    if colors is None or name not in table.obs or not isinstance(table.obs[name].dtype, pd.CategoricalDtype):
        return {}
    names = table.obs[name].cat.categories
    return dict(zip(map(str, names), map(str, colors), strict=False)) if len(colors) >= len(names) else {}


def is_category(values: pd.Series) -> bool:
    """Return whether a column holds categories, and neither numbers nor booleans."""
    return not (pd.api.types.is_bool_dtype(values) or pd.api.types.is_numeric_dtype(values))


def codes_of(values: pd.Series, names: Sequence[str]) -> np.ndarray:
    """Return the place of each value among the categories, NaN for missing values, ``float64 (n,)``."""
    codes = pd.Index(names).get_indexer(pd.Index(values.astype("string").astype(object)))
    return np.where(codes < 0, np.nan, codes.astype(float))


def coloring(colors: Mapping[str, str]) -> dict[str, Any]:
    """Return colormap and norm for codes of categories."""
    return {
        "cmap": ListedColormap(list(colors.values())),
        "norm": BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors)),
    }


def add_legend(ax: Axes, colors: Mapping[str, str], numbers: Mapping[str, int] | None = None) -> None:
    """Add a legend right of a map, with the number of elements of each category."""
    labels = {name: name if numbers is None else f"{name} ({numbers[name]:,})" for name in colors}
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=6, color=color, label=labels[name])
        for name, color in colors.items()
    ]
    ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, handletextpad=0.1,
        ncols=-(-len(handles) // _TALLEST),
    )  # fmt: skip
