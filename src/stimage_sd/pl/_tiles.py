"""Maps of tiles on the H&E, with enlarged examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import PREDICTED, WARNING, Colors, add_color_bar, cut_tiles
from stimage_sd.pl._cells import Zoom
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import draw_background, map_size, names_of

#: side of an example tile, px
EXAMPLE = 160
KEPT = "#2a9d8f"
#: examples per row
IN_A_ROW = 8
#: width of a map, inches
WIDTH = 6.0


def tiles(
    data: SpatialData,
    color: str | Sequence[str] = "tissue_fraction",
    *,
    n_examples: int = 0,
    zoom: Zoom | None = None,
    img_alpha: float = 0.8,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    image_key: str | None = None,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | np.ndarray | Figure:
    """Draw the tiles over the H&E, with optional enlarged examples below.

    Parameters
    ----------
    data
        A tiled section.
    color
        One or several columns of the tiles' ``obs`` with numbers or booleans, such as ``"tissue_fraction"`` or
        ``"keep"``. Each column gets a map.
    n_examples
        Number of kept tiles to show enlarged, spread evenly over the kept tiles. They are cut from the stain-normalized
        H&E if there is one, at the coarsest sufficient pyramid level. The map shows their numbers.
    zoom
        Left, top, right and bottom of the region to draw, H&E px. Default: all tiles.
    img_alpha
        Opacity of the H&E, 0 to 1.
    cmap, vmin, vmax, alpha
        Colormap of numbers. Ends of the color range, by default the 1st and 99th percentile, or 0 and 1 for the tissue
        fraction. Opacity of the tiles.
    image_key
        Name of the image to draw on and to cut from. Default: the section's image.
    ax
        Axes to draw on, one per column. Default: a new figure. Examples are inset below the axes.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes of the map, or an array of axes if `color` is a list. The examples are its ``child_axes``.

    Raises
    ------
    KeyError
        If the section has no tiles, or the tiles have no such column.
    ValueError
        If the column holds neither numbers nor booleans, `n_examples` is negative, or `zoom` lies outside the image.

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
    sdata = contract.section(data)
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    table = contract.tiles(sdata)
    names = names_of(color)
    columns = {name: _column(table, name) for name in names}
    if n_examples < 0:
        raise ValueError(f"Expected `n_examples` of at least 0, found {n_examples}.")
    positions, side = contract.tile_geometry(sdata)
    chosen = _examples(table.obs["keep"].to_numpy(), positions, n_examples, zoom)
    strip = -(-len(chosen) // IN_A_ROW) * WIDTH / min(max(len(chosen), 1), IN_A_ROW)
    size = map_size(sdata, positions, width=WIDTH, below=0.4 + strip, zoom=zoom)
    axes = sheet.panels(len(names), size=size, columns=3)
    image = contract.working_image_name(sdata, image_key)
    cut = contract.tile_geometry(sdata, table[chosen], image)
    pictures = cut_tiles(sdata, cut.centers, side=cut.side, target=EXAMPLE, image_key=image) if len(chosen) else []
    squares = positions[:, None] + np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * side / 2
    kept = int(table.obs["keep"].sum())
    for panel, (name, values) in zip(axes, columns.items(), strict=True):
        draw_background(panel, sdata, positions, image_key=image_key, img_alpha=img_alpha, zoom=zoom)
        if pd.api.types.is_bool_dtype(values):
            _draw_truth(panel, squares, values.to_numpy(dtype=bool), name, alpha)
        else:
            _draw_numbers(panel, squares, values.to_numpy(dtype=np.float64), name, colors)
        panel.set_title(f"{contract.sample(sdata)}: {table.n_obs} tiles, {kept} kept", fontsize=11)
        if pictures:
            _draw_examples(panel, pictures, positions[chosen])
    return sheet.done(axes[0] if isinstance(color, str) else axes)


def _column(table: AnnData, name: str) -> pd.Series:
    if name not in table.obs:
        raise KeyError(f"No column {name!r} among the tiles' {sorted(table.obs.columns)}.")
    values = table.obs[name]
    if not (pd.api.types.is_bool_dtype(values) or pd.api.types.is_numeric_dtype(values)):
        raise ValueError(
            f"Expected `color` to be a column of numbers or truth values, found {name!r} of {values.dtype}."
        )
    return values


def _examples(keep: np.ndarray, positions: np.ndarray, n_examples: int, zoom: Zoom | None) -> np.ndarray:
    """Return rows of the kept tiles to enlarge, spread evenly over the drawn tiles."""
    shown = keep.astype(bool)
    if zoom is not None:
        shown &= ((positions >= zoom[:2]) & (positions <= zoom[2:])).all(axis=1)
    rows = np.flatnonzero(shown)
    if not (n_examples and len(rows)):
        return rows[:0]
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(n_examples, len(rows))).round().astype(int))]


def _draw_truth(ax: Axes, squares: np.ndarray, values: np.ndarray, name: str, alpha: float | None) -> None:
    colors = np.where(values[:, None], to_rgba(KEPT), to_rgba(WARNING))
    faces = colors * [1, 1, 1, 0.35 if alpha is None else alpha]
    drawn = PolyCollection(list(squares), facecolors=faces, edgecolors=colors, linewidth=0.8)
    ax.add_collection(drawn, autolim=False)
    handles = [
        Patch(facecolor=color, alpha=0.6, label=f"{name}: {text} ({count})")
        for color, text, count in ((KEPT, "yes", int(values.sum())), (WARNING, "no", int((~values).sum())))
    ]
    ax.legend(handles=handles, loc="upper left", framealpha=0.85, edgecolor="none", fontsize=9)


def _draw_numbers(ax: Axes, squares: np.ndarray, values: np.ndarray, name: str, colors: Colors) -> None:
    norm = colors.between(0.0, 1.0) if name == "tissue_fraction" else colors.norm(values)
    alpha = 0.65 if colors.alpha is None else colors.alpha
    drawn = PolyCollection(list(squares), array=values, cmap=colors.cmap, norm=norm, alpha=alpha, linewidth=0)
    ax.add_collection(drawn, autolim=False)
    add_color_bar(ax, drawn, name.replace("_", " "), location="right")


def _draw_examples(ax: Axes, examples: list[np.ndarray], positions: np.ndarray) -> None:
    columns = min(len(examples), IN_A_ROW)
    below, width = -0.02, 1.0 / columns
    left, right = ax.get_xlim()
    bottom, top = ax.get_ylim()
    height = width * abs(right - left) / abs(bottom - top)
    for index, (example, position) in enumerate(zip(examples, positions, strict=True)):
        row, place = divmod(index, columns)
        inset = ax.inset_axes((place * width, below - (row + 1) * height, 0.95 * width, 0.95 * height))
        inset.imshow(example)
        inset.set_xticks([])
        inset.set_yticks([])
        inset.spines[:].set_edgecolor(PREDICTED)
        label: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "color": "black"}
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        inset.text(0.06, 0.94, str(index + 1), transform=inset.transAxes, va="top", bbox=box, **label)
        ax.text(position[0], position[1], str(index + 1), ha="center", va="center", bbox=box, zorder=4, **label)
