"""Where the tiles lie, and what is on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize, to_rgba
from matplotlib.patches import Patch
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import (
    PREDICTED,
    WARNING,
    add_colour_bar,
    cut_tiles,
    draw_section,
    map_size,
    panels,
    robust_norm,
)

#: side of an example tile, px
EXAMPLE = 160
KEPT = "#2a9d8f"
#: examples side by side
IN_A_ROW = 8
#: width of a map, inches
WIDTH = 6.0


def tiles(
    sdata: SpatialData,
    color: str = "tissue_fraction",
    *,
    n_examples: int = 0,
    cmap: str = "viridis",
    image_key: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the tiles over the H&E, and, where asked for, some of them enlarged in a strip below.

    Parameters
    ----------
    sdata
        A tiled section.
    color
        Column of the tiles' ``obs``: ``"tissue_fraction"``, ``"keep"``, or another that holds numbers or truth
        values.
    n_examples
        How many kept tiles to show enlarged, spread evenly over them; cut from the stain-normalised H&E where
        there is one, read at the coarsest level that shows them sharply. Their numbers are on the map.
    cmap
        Name of a matplotlib colour map.
    image_key
        The image to draw on and to cut from, where it is not the section's own.
    ax
        Axes to draw on; a new figure by default. The strip is inset below them.

    Returns
    -------
    The axes of the map; the strip's are its ``child_axes``.

    Raises
    ------
    KeyError
        If the section was not tiled, or its tiles have no such column.
    ValueError
        If the column holds no numbers, or `n_examples` is negative.

    Examples
    --------
    >>> import cv2, numpy as np, stimage_sd as sti
    >>> _ = cv2.imwrite("slide.png", np.full((400, 600, 3), (200, 120, 180), np.uint8))
    >>> section = sti.io.slide("slide.png", mpp=0.5)
    >>> sti.pp.tile(section, size_um=50)
    >>> panel = sti.pl.tiles(section, "keep", n_examples=4)
    >>> len(panel.child_axes)
    4
    """
    table = contract.tiles(sdata)
    if color not in table.obs:
        raise KeyError(f"No column {color!r} among the tiles' {sorted(table.obs.columns)}.")
    values = table.obs[color]
    if not (pd.api.types.is_bool_dtype(values) or pd.api.types.is_numeric_dtype(values)):
        raise ValueError(
            f"Expected `color` to be a column of numbers or truth values, found {color!r} of {values.dtype}."
        )
    if n_examples < 0:
        raise ValueError(f"Expected `n_examples` of at least 0, found {n_examples}.")
    positions = np.asarray(table.obsm["spatial"], dtype=np.float64)
    strip = -(-n_examples // IN_A_ROW) * WIDTH / min(max(n_examples, 1), IN_A_ROW)
    panel: Axes = panels(ax, 1, size=map_size(sdata, positions, width=WIDTH, below=0.4 + strip))[0]
    side = float(contract.tiling(sdata)["side_px"])
    draw_section(panel, sdata, positions, image_key=image_key, fade=0.2)
    squares = positions[:, None] + np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * side / 2
    if pd.api.types.is_bool_dtype(values):
        _draw_truth(panel, squares, values.to_numpy(dtype=bool), color)
    else:
        _draw_numbers(panel, squares, values.to_numpy(dtype=np.float64), color, cmap)
    kept = int(table.obs["keep"].sum())
    panel.set_title(f"{contract.sample(sdata)}: {table.n_obs} tiles, {kept} kept", fontsize=11)
    rows = np.flatnonzero(table.obs["keep"].to_numpy())
    if n_examples:
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(n_examples, len(rows))).round().astype(int))]
        _draw_examples(
            panel,
            cut_tiles(sdata, positions[chosen], side=side, target=EXAMPLE, image_key=image_key),
            positions[chosen],
        )
    return panel


def _draw_truth(ax: Axes, squares: np.ndarray, values: np.ndarray, name: str) -> None:
    colours = np.where(values[:, None], to_rgba(KEPT), to_rgba(WARNING))
    faces = colours * [1, 1, 1, 0.35]
    drawn = PolyCollection(list(squares), facecolors=faces, edgecolors=colours, linewidth=0.8)
    ax.add_collection(drawn, autolim=False)
    handles = [
        Patch(facecolor=colour, alpha=0.6, label=f"{name}: {text} ({count})")
        for colour, text, count in ((KEPT, "yes", int(values.sum())), (WARNING, "no", int((~values).sum())))
    ]
    ax.legend(handles=handles, loc="upper left", framealpha=0.85, edgecolor="none", fontsize=9)


def _draw_numbers(ax: Axes, squares: np.ndarray, values: np.ndarray, name: str, cmap: str) -> None:
    norm = Normalize(0.0, 1.0) if name == "tissue_fraction" else robust_norm(values)
    drawn = PolyCollection(list(squares), array=values, cmap=cmap, norm=norm, alpha=0.65, linewidth=0)
    ax.add_collection(drawn, autolim=False)
    add_colour_bar(ax, drawn, name.replace("_", " "), location="right")


def _draw_examples(ax: Axes, examples: list[np.ndarray], positions: np.ndarray) -> None:
    columns = min(len(examples), IN_A_ROW)
    below, width = -0.02, 1.0 / columns
    left, right = ax.get_xlim()
    bottom, top = ax.get_ylim()
    height = width * abs(right - left) / abs(bottom - top)
    for number, (example, position) in enumerate(zip(examples, positions, strict=True)):
        row, place = divmod(number, columns)
        inset = ax.inset_axes((place * width, below - (row + 1) * height, 0.95 * width, 0.95 * height))
        inset.imshow(example)
        inset.set_xticks([])
        inset.set_yticks([])
        inset.spines[:].set_edgecolor(PREDICTED)
        label: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "color": "black"}
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        inset.text(0.06, 0.94, str(number + 1), transform=inset.transAxes, va="top", bbox=box, **label)
        ax.text(position[0], position[1], str(number + 1), ha="center", va="center", bbox=box, zorder=4, **label)
