"""Maps of tiles on the H&E, with enlarged examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import PREDICTED, WARNING, Colors, add_color_bar, cut_tiles
from stimage_sd.pl._categories import MOST, add_legend, categories_of, colors_of, is_category, stored_colors
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import Map, draw_background, draw_maps, kept_axes, map_size, names_of, regions_of_cohort
from stimage_sd.pl._zoom import Zoom, Zooms

#: side of an example tile, px
EXAMPLE = 160
KEPT = "#2a9d8f"
#: examples per row
IN_A_ROW = 8
#: width of a map, inches
WIDTH = 6.0


def tiles(
    data: SpatialData | contract.Cohort,
    color: str | Sequence[str] = "tissue_fraction",
    *,
    n_examples: int = 0,
    palette: Mapping[str, str] | None = None,
    zoom: Zooms | None = None,
    img_alpha: float = 0.8,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    key: str = contract.PREDICTIONS,
    image_key: str | None = None,
    table_key: str | None = None,
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
        A tiled section, or a cohort of tiled sections.
    color
        One or several columns with numbers, booleans or categories. They are columns of the ``obs`` of the tiles (such
        as ``"tissue_fraction"``, ``"keep"`` or ``"annotation"``), of the predictions (``"leiden"``, ``"ood_score"``) or
        of the spots (a pathologist's labels). Each column gets a map. Tiles without a value are not drawn.
    n_examples
        Number of kept tiles to show enlarged, spread evenly over the kept tiles. They are cut from the stain-normalized
        H&E if there is one, at the coarsest sufficient pyramid level. The map shows their numbers.
    palette
        Colors, keyed by category.
    zoom
        Left, top, right and bottom of the region to draw, H&E px. Default: all tiles. Several regions, as a list or
        keyed by name: each map is drawn whole, with a window for each region beside it.
    img_alpha
        Opacity of the H&E, 0 to 1.
    cmap, vmin, vmax, alpha
        Colormap of numbers. Ends of the color range, by default the 1st and 99th percentile, or 0 and 1 for the tissue
        fraction. Opacity of the tiles.
    key
        Name of the table of predictions that may have the column.
    image_key
        Name of the image to draw on and to cut from. Default: the section's image.
    table_key
        Name of the table of spots that may have the column. Default: the section's counts.
    ax
        Axes to draw on, one per column, and with several sections or regions as many for each. Default: a new figure.
        Examples are inset below the axes.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes of the map. An array with one dimension for a cohort, one for a list of colors, and one for several regions
    (the whole map, then its windows), in this order. The examples are ``child_axes`` of the map.

    Raises
    ------
    KeyError
        If a section has no tiles, or none of its tables has such a column.
    ValueError
        If the column holds too many categories, `n_examples` is negative, or `zoom` lies outside the image. Also if a
        cohort has several sections and `zoom` or `n_examples` is given.

    Notes
    -----
    Paper, Figures 1h, S2a, S8c, S13a and S17a.

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
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    if n_examples < 0:
        raise ValueError(f"Expected `n_examples` of at least 0, found {n_examples}.")
    cohort = contract.sections(data)
    names = names_of(color)
    tables = {section: contract.tiles(sdata) for section, sdata in cohort.items()}
    values = {
        name: {section: _column(sdata, name, key, table_key) for section, sdata in cohort.items()} for name in names
    }
    regions = regions_of_cohort(cohort, zoom, image_key)
    if n_examples and len(cohort) * len(regions.boxes) > 1:
        raise ValueError("`n_examples` shows tiles of one map. Pass one section, and no or one region.")
    first = next(iter(cohort.values()))
    positions, _ = contract.tile_geometry(first)
    chosen = _examples(next(iter(tables.values())).obs["keep"].to_numpy(), positions, n_examples, regions.boxes[0])
    strip = -(-len(chosen) // IN_A_ROW) * WIDTH / min(max(len(chosen), 1), IN_A_ROW)
    shape = len(cohort), len(names), len(regions.boxes)
    width = WIDTH if math.prod(shape) == 1 else 4.4
    box = None if regions.several else regions.boxes[0]
    size = map_size(first, positions, width=width, below=0.4 + strip, zoom=box)
    columns = len(regions.boxes) if regions.several else len(names) if len(cohort) > 1 and len(names) > 1 else 3
    axes = sheet.panels(math.prod(shape), size=size, columns=columns).reshape(shape)
    for row, (section, sdata) in zip(axes, cohort.items(), strict=True):
        kept = int(tables[section].obs["keep"].sum())
        heading = section if len(cohort) > 1 else contract.sample(sdata)
        maps = [
            _map(
                sdata, values[name][section], name, f"{heading}: {tables[section].n_obs} tiles, {kept} kept",
                colors=colors, types=_types(cohort, name, values[name], palette, key), image_key=image_key,
                img_alpha=img_alpha,
            )
            for name in names
        ]  # fmt: skip
        draw_maps(maps, row, regions)
    if len(chosen):
        image = contract.working_image_name(first, image_key)
        cut = contract.tile_geometry(first, next(iter(tables.values()))[chosen], image)
        pictures = cut_tiles(first, cut.centers, side=cut.side, target=EXAMPLE, image_key=image)
        for panel in axes[0, :, 0]:
            _draw_examples(panel, pictures, positions[chosen])
    keep = [not isinstance(data, SpatialData), not isinstance(color, str), regions.several]
    drawn: Axes | np.ndarray = axes[0, 0, 0] if not any(keep) else kept_axes(axes, keep)
    return sheet.done(drawn)


def _column(sdata: SpatialData, name: str, key: str, table_key: str | None) -> pd.Series:
    """Return a column of the tiles, of the predictions or of the spots, by row of the tiles; NaN without a value."""
    tiles = contract.tiles(sdata)
    if name in tiles.obs:
        found = tiles.obs[name]
    elif key in sdata.tables and name in sdata.tables[key].obs:
        found = sdata.tables[key].obs[name]
    else:
        found = _of_spots(sdata, tiles, name, table_key)
    values = found.reindex(tiles.obs_names)
    if is_category(values) and (number := values.nunique()) > MOST:
        raise ValueError(
            f"Expected `color` to be a column of numbers, truth values or up to {MOST} categories, found {name!r} with "
            f"{number} of {values.dtype}."
        )
    return values


def _of_spots(sdata: SpatialData, tiles: AnnData, name: str, table_key: str | None) -> pd.Series:
    known = {*tiles.obs.columns}
    if contract.has_units(sdata) and "spot_id" in tiles.obs:
        rows, units = contract.align_to_spots(sdata, tiles, contract.Source(table_key), against=None)
        if name in units.obs:
            return pd.Series(units.obs[name].array, index=tiles.obs_names[rows])
        known |= {*units.obs.columns}
    raise KeyError(f"No column {name!r} among the tiles' {sorted(map(str, known))}.")


def _types(
    cohort: Mapping[str, SpatialData],
    name: str,
    columns: Mapping[str, pd.Series],
    palette: Mapping[str, str] | None,
    key: str,
) -> dict[str, str]:
    """Return the colors of the categories of a column, the same in all sections, or nothing for numbers."""
    of_kind = [values for values in columns.values() if is_category(values)]
    stored: dict[str, str] = {}
    for sdata in cohort.values():
        for table in (contract.tiles(sdata), *([sdata.tables[key]] if key in sdata.tables else [])):
            stored |= stored_colors(table, name)
    return colors_of(categories_of(of_kind), {**stored, **(palette or {})}) if of_kind else {}


def _map(
    sdata: SpatialData,
    values: pd.Series,
    name: str,
    title: str,
    *,
    colors: Colors,
    types: Mapping[str, str],
    image_key: str | None,
    img_alpha: float,
) -> Map:
    positions, side = contract.tile_geometry(sdata)
    background = partial(draw_background, sdata=sdata, positions=positions, image_key=image_key, img_alpha=img_alpha)
    known = values.notna().to_numpy()
    squares = (positions[:, None] + np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * side / 2)[known]
    shown = values[known]
    if types:
        label = name.replace("_", " ")
        draw = partial(_draw_types, squares=squares, values=shown, types=types, alpha=colors.alpha)
        return Map(
            f"{title.split(':', maxsplit=1)[0]}: {label}",
            background,
            draw,
            partial(_name_types, values=shown, types=types),
        )
    if pd.api.types.is_bool_dtype(shown) or set(map(type, shown)) == {bool}:
        truth = shown.to_numpy(dtype=bool)
        draw = partial(_draw_truth, squares=squares, values=truth, alpha=colors.alpha)
        return Map(title, background, draw, partial(_name_truth, values=truth, name=name))
    numbers = shown.to_numpy(dtype=np.float64)
    norm = colors.between(0.0, 1.0) if name == "tissue_fraction" else colors.norm(numbers)
    draw_numbers = partial(_draw_numbers, squares=squares, values=numbers, norm=norm, colors=colors)
    return Map(title, background, draw_numbers, partial(_name_numbers, name=name))


def _examples(keep: np.ndarray, positions: np.ndarray, n_examples: int, zoom: Zoom | None) -> np.ndarray:
    """Return rows of the kept tiles to enlarge, spread evenly over the drawn tiles."""
    shown = keep.astype(bool)
    if zoom is not None:
        shown &= ((positions >= zoom[:2]) & (positions <= zoom[2:])).all(axis=1)
    rows = np.flatnonzero(shown)
    if not (n_examples and len(rows)):
        return rows[:0]
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(n_examples, len(rows))).round().astype(int))]


def _draw_truth(ax: Axes, *, squares: np.ndarray, values: np.ndarray, alpha: float | None) -> None:
    colors = np.where(values[:, None], to_rgba(KEPT), to_rgba(WARNING))
    faces = colors * [1, 1, 1, 0.35 if alpha is None else alpha]
    drawn = PolyCollection(list(squares), facecolors=faces, edgecolors=colors, linewidth=0.8)
    ax.add_collection(drawn, autolim=False)


def _name_truth(axes: np.ndarray, _: ScalarMappable | None, *, values: np.ndarray, name: str) -> None:
    handles = [
        Patch(facecolor=color, alpha=0.6, label=f"{name}: {text} ({count})")
        for color, text, count in ((KEPT, "yes", int(values.sum())), (WARNING, "no", int((~values).sum())))
    ]
    axes[0].legend(handles=handles, loc="upper left", framealpha=0.85, edgecolor="none", fontsize=9)


def _draw_types(
    ax: Axes, *, squares: np.ndarray, values: pd.Series, types: Mapping[str, str], alpha: float | None
) -> None:
    faces = [types[name] for name in values.astype(str)]
    drawn = PolyCollection(list(squares), facecolors=faces, alpha=0.75 if alpha is None else alpha, linewidth=0)
    ax.add_collection(drawn, autolim=False)


def _name_types(axes: np.ndarray, _: ScalarMappable | None, *, values: pd.Series, types: Mapping[str, str]) -> None:
    numbers = values.astype(str).value_counts()
    add_legend(axes[-1], types, {name: int(numbers.get(name, 0)) for name in types})


def _draw_numbers(
    ax: Axes, *, squares: np.ndarray, values: np.ndarray, norm: Normalize, colors: Colors
) -> ScalarMappable:
    alpha = 0.65 if colors.alpha is None else colors.alpha
    drawn = PolyCollection(list(squares), array=values, cmap=colors.cmap, norm=norm, alpha=alpha, linewidth=0)
    ax.add_collection(drawn, autolim=False)
    return drawn


def _name_numbers(axes: np.ndarray, drawn: ScalarMappable | None, *, name: str) -> None:
    if drawn is not None:
        add_color_bar(axes[0], drawn, name.replace("_", " "), location="right")


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
