"""Explained nuclei on their tiles, and scores by area and class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import PREDICTED, Colors, add_color_bar, cut_tiles, finish
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import names_of

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

#: side of a drawn tile, px
_PIXELS = 320
#: color of nuclei whose scores cannot be read
UNREADABLE = "0.6"
#: bins of nucleus area for the median line
_BINS = 8


def explanation(
    data: SpatialData,
    gene: str | Sequence[str],
    *,
    tiles: Sequence[int] | None = None,
    method: str = "lime",
    min_stability: float | None = contract.MIN_STABILITY,
    min_r2: float | None = contract.MIN_R2,
    cmap: str | Colormap = "RdBu_r",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    image_key: str | None = None,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw explained nuclei on their tiles, red for positive and blue for negative scores.

    Nuclei are gray where their scores cannot be read. The title then has the reason.

    Parameters
    ----------
    data
        A section with explanations.
    gene
        One or several genes. Each gene gets a row of tiles.
    tiles
        ``obs["instance_id"]`` of explained tiles. Default: all explained tiles.
    method
        Method of the scores, ``"lime"`` or ``"saliency"``.
    min_stability, min_r2
        Lowest stability and held-out R² of scores in color, as in ``tables["explanations"]``. Scores by other methods
        than LIME have neither and are always in color. `None`: no limit.
    cmap, vmin, vmax, alpha
        Colormap. Ends of the color range, shared by all tiles of a gene and symmetric around 0 unless both are given.
        Opacity of the nuclei.
    image_key
        Name of the image to draw on. Default: the stain-normalized H&E, or the H&E without one.
    ax
        One axes per gene and tile, ordered by gene. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    One axes per tile, or an array with one row per gene if `gene` is a list.

    Raises
    ------
    KeyError
        If the section has no explanations, or none of this gene or tile.
    ValueError
        If the number of axes in `ax` differs from genes times tiles.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.explanation(section, ["VEGFA", "CD52"])  # doctest: +SKIP
    """
    sdata = contract.section(data)
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, 0.6 if alpha is None else alpha)
    frame = contract.explained(sdata)
    genes = names_of(gene)
    scores = {name: _scores(frame, f"{method}_{name}") for name in genes}
    table = contract.tiles(sdata)
    # after cropping, nuclei of a removed tile may remain
    there = set(table.obs[contract.INSTANCE_KEY])
    explained = [tile for tile in dict.fromkeys(frame["tile"]) if tile in there]
    chosen = explained if tiles is None else list(tiles)
    unknown = [tile for tile in chosen if tile not in explained]
    if unknown or not chosen:
        raise KeyError(f"Expected `tiles` among the explained ones, {explained[:10]}, found {unknown[:5] or 'none'}.")
    rows = pd.Index(table.obs[contract.INSTANCE_KEY]).get_indexer(chosen)
    centers, side = contract.tile_geometry(sdata, table[rows])
    image = contract.working_image_name(sdata, image_key)
    cut = contract.tile_geometry(sdata, table[rows], image)
    pictures = cut_tiles(sdata, cut.centers, side=cut.side, target=_PIXELS, image_key=image)
    axes = sheet.panels(len(genes) * len(chosen), size=(3.0, 3.15), columns=len(chosen))
    grid = axes.reshape(len(genes), len(chosen))
    for row, name in zip(grid, genes, strict=True):
        unstable = contract.unstable_tiles(sdata, name, method=method, min_stability=min_stability, min_r2=min_r2)
        readable = ~frame["tile"].isin(list(unstable)).to_numpy()
        norm = _norm(colors, scores[name][readable])
        for panel, tile, picture, center in zip(row, chosen, pictures, centers, strict=True):
            _draw_tile(panel, picture, center, side)
            _draw_nuclei(panel, frame, scores[name], tile, colors, None if tile in unstable else norm)
            panel.set_title(f"{name}, tile {tile}\n{_quality(sdata, name, tile, method, unstable)}".strip(), fontsize=9)
        drawn = PolyCollection([], cmap=colors.cmap, norm=norm, alpha=colors.alpha)  # the last tile may be gray
        add_color_bar(row[-1], drawn, f"{method.replace('lime', 'LIME')} score", location="right")
    return sheet.done(axes if isinstance(gene, str) else grid)


def explanation_scores(
    data: pd.DataFrame,
    *,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw the scores of explained nuclei against their area, and by class.

    Parameters
    ----------
    data
        Table from `stimage_sd.tl.explained_nuclei` for one or several genes. Each gene gets a row of panels. With
        column ``class`` each gene gets a second panel. Nuclei whose column ``readable`` is `False` are gray. Medians
        and boxes leave them out.
    ax
        One axes per gene, or two with classes. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes, ordered by gene.

    Raises
    ------
    ValueError
        If a column is missing, the table is empty, or the number of axes in `ax` differs from the number of panels.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> nuclei = sti.tl.explained_nuclei(section, ["VEGFA", "CD52"], by="annotation")  # doctest: +SKIP
    >>> sti.pl.explanation_scores(nuclei)  # doctest: +SKIP
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    area = "area_um2" if "area_um2" in data else "area_px"
    missing = [name for name in ("gene", "score", area) if name not in data]
    if missing or data.empty:
        what = f"lacking {missing}" if missing else "without a row"
        raise ValueError(f"Expected what `stimage_sd.tl.explained_nuclei` returns, found a table {what}.")
    genes, columns = list(dict.fromkeys(data["gene"])), 2 if "class" in data else 1
    axes = sheet.panels(len(genes) * columns, size=(4.0, 3.2), columns=columns)
    for row, name in enumerate(genes):
        scores = data[data["gene"] == name]
        _draw_by_area(axes[row * columns], scores, area)
        axes[row * columns].set(title=name, ylabel="score")
        if columns == 2:
            _draw_by_class(axes[row * columns + 1], scores)
            axes[row * columns + 1].set(title=f"{name}, by class", ylabel="score")
    return sheet.done(axes)


def _scores(frame: GeoDataFrame, column: str) -> np.ndarray:
    if column not in frame:
        known = sorted(name for name in frame.columns if name.startswith(("lime_", "saliency_")))
        raise KeyError(f"No scores {column!r} among the explained nuclei's {known}.")
    return frame[column].to_numpy(dtype=np.float64)


def _norm(colors: Colors, scores: np.ndarray) -> Normalize:
    """Return the color range of the scores that can be read."""
    finite = np.abs(scores[np.isfinite(scores)])
    return colors.around_zero(float(np.percentile(finite, 99)) or 1.0 if finite.size else 1.0)


def _quality(sdata: SpatialData, gene: str, tile: int, method: str, unstable: Mapping[int, str]) -> str:
    """Return the reason for gray nuclei, or stability and held-out R², or an empty string without these."""
    if tile in unstable:
        return f"not readable: {unstable[tile]}"
    if method != "lime" or contract.EXPLANATIONS not in sdata.tables:
        return ""
    table = contract.explanations(sdata)
    rows = np.flatnonzero(table.obs[contract.INSTANCE_KEY].to_numpy() == tile)
    if gene not in table.var_names or rows.size == 0:
        return ""
    column = table.var_names.get_loc(gene)
    names = {"stability": "stability", "r2": "R²"}
    values = {shown: float(np.asarray(table.layers[name])[rows[0], column]) for name, shown in names.items()
              if name in table.layers}  # fmt: skip
    return ", ".join(f"{shown} {value:.2f}" for shown, value in values.items() if np.isfinite(value))


def _draw_tile(ax: Axes, picture: np.ndarray, center: np.ndarray, side: float) -> None:
    left, top = center - side / 2
    ax.imshow(picture, extent=(left, left + side, top + side, top), interpolation="antialiased", zorder=0)
    ax.set_xlim(left, left + side)
    ax.set_ylim(top + side, top)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _draw_nuclei(
    ax: Axes, frame: GeoDataFrame, scores: np.ndarray, tile: int, colors: Colors, norm: Normalize | None
) -> None:
    """Draw the nuclei of a tile in the colors of their scores, or gray without a color range."""
    rows = np.flatnonzero((frame["tile"].to_numpy() == tile) & np.isfinite(scores))
    parts = [(part, scores[row]) for row in rows for part in shapely.get_parts(frame.geometry.iloc[row])]
    drawn = PolyCollection(
        [np.asarray(part.exterior.coords)[:, :2] for part, _ in parts],
        alpha=colors.alpha,
        facecolor=UNREADABLE,
        edgecolor="black",
        linewidth=0.5,
    )
    if norm is not None:
        drawn.set(array=np.array([score for _, score in parts]), cmap=colors.cmap, norm=norm)
    ax.add_collection(drawn, autolim=False)


def _draw_by_area(ax: Axes, scores: pd.DataFrame, area: str) -> None:
    """Draw scores against area, and medians in bins of equal numbers of nuclei."""
    ax.axhline(0, color="0.6", linewidth=0.8)
    scores, others = _split(scores)
    ax.scatter(scores[area], scores["score"], s=8, alpha=0.4, linewidth=0, color=PREDICTED)
    if len(others):
        ax.scatter(others[area], others["score"], s=8, alpha=0.4, linewidth=0, color=UNREADABLE, label="not readable")
        ax.legend(frameon=False, fontsize=8)
    if len(scores) >= 3 * _BINS:
        groups = scores.groupby(pd.qcut(scores[area], _BINS, duplicates="drop"), observed=True)
        medians = groups[[area, "score"]].median()
        ax.plot(medians[area], medians["score"], color="black", marker="o", markersize=4, label="median")
        ax.legend(frameon=False, fontsize=8)
    ax.set_xlabel(f"area of the nucleus ({'µm²' if area == 'area_um2' else 'px'})")
    finish(ax)


def _split(scores: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the nuclei whose scores can be read, and the others."""
    readable = scores["readable"].to_numpy(bool) if "readable" in scores else np.ones(len(scores), bool)
    return scores[readable], scores[~readable]


def _draw_by_class(ax: Axes, scores: pd.DataFrame) -> None:
    scores, _ = _split(scores)
    groups = [(str(name), group["score"].to_numpy()) for name, group in scores.groupby("class", observed=True)]
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.boxplot(
        [values for _, values in groups],
        tick_labels=[f"{name}\n({len(values)})" for name, values in groups],
        showfliers=False,
        medianprops={"color": "black"},
    )
    finish(ax)
