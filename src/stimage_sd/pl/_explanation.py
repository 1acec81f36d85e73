"""Explained nuclei: on their tiles, and by their area and class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import PREDICTED, add_colour_bar, cut_tiles, finish, panels

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

#: side of a tile as it is drawn, px
_PIXELS = 320
#: bins of the nuclei's area that a median is drawn of
_BINS = 8


def explanation(
    sdata: SpatialData,
    gene: str | Sequence[str],
    *,
    tiles: Sequence[int] | None = None,
    method: str = "lime",
    cmap: str = "RdBu_r",
    image_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw explained nuclei on their tiles: red speaks for the gene, blue against it.

    Parameters
    ----------
    sdata
        A section with explanations.
    gene
        One gene, or several: a row each.
    tiles
        ``obs["instance_id"]`` of explained tiles; all by default.
    method
        ``"lime"`` or ``"saliency"``: whose scores.
    cmap
        Name of a matplotlib colour map, whose middle is at 0. All tiles of a gene share its range.
    image_key
        The image to draw on; by default the stain-normalised H&E, where there is one.
    ax
        One axes a gene and tile, gene by gene; a new figure by default.

    Returns
    -------
    The axes, gene by gene.

    Raises
    ------
    KeyError
        If nothing was explained, or not this gene or tile.
    ValueError
        If `ax` is not as many axes as there are genes and tiles.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.explanation(section, ["VEGFA", "CD52"])  # doctest: +SKIP
    """
    frame = contract.explained(sdata)
    genes = [gene] if isinstance(gene, str) else list(gene)
    scores = {name: _scores(frame, f"{method}_{name}") for name in genes}
    explained = list(dict.fromkeys(frame["tile"]))
    chosen = explained if tiles is None else list(tiles)
    unknown = [tile for tile in chosen if tile not in explained]
    if unknown or not chosen:
        raise KeyError(f"Expected `tiles` among the explained ones, {explained[:10]}, found {unknown[:5] or 'none'}.")
    side = float(contract.tiling(sdata)["side_px"])
    table = contract.tiles(sdata)
    rows = pd.Index(table.obs[contract.INSTANCE_KEY]).get_indexer(chosen)
    centers = np.asarray(table.obsm["spatial"], dtype=np.float64)[rows]
    pictures = cut_tiles(sdata, centers, side=side, target=_PIXELS, image_key=image_key)
    axes = panels(ax, len(genes) * len(chosen), size=(3.0, 3.3), columns=len(chosen))
    for number, name in enumerate(genes):
        row = axes[number * len(chosen) : (number + 1) * len(chosen)]
        largest = float(np.nanpercentile(np.abs(scores[name]), 99)) or 1.0
        norm = Normalize(-largest, largest)
        for panel, tile, picture, center in zip(row, chosen, pictures, centers, strict=True):
            _draw_tile(panel, picture, center, side)
            _draw_nuclei(panel, frame, scores[name], tile, cmap, norm)
            panel.set_title(f"{name}, tile {tile}{_quality(sdata, name, tile, method)}", fontsize=9)
        add_colour_bar(row[-1], row[-1].collections[0], f"{method.replace('lime', 'LIME')} score", location="right")
    return axes


def explanation_scores(nuclei: pd.DataFrame, *, ax: Axes | Sequence[Axes] | None = None) -> np.ndarray:
    """Draw the scores of explained nuclei against their area, and by class.

    Parameters
    ----------
    nuclei
        What `stimage_sd.tl.explained_nuclei` returns, of one gene or several: a row of panels each. With its
        column ``class`` there is a second panel a gene.
    ax
        One axes a gene, or two with classes; a new figure by default.

    Returns
    -------
    The axes, gene by gene.

    Raises
    ------
    ValueError
        If the table is another, or empty, or `ax` is not as many axes as there are panels.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> nuclei = sti.tl.explained_nuclei(section, ["VEGFA", "CD52"], by="annotation")  # doctest: +SKIP
    >>> sti.pl.explanation_scores(nuclei)  # doctest: +SKIP
    """
    area = "area_um2" if "area_um2" in nuclei else "area_px"
    missing = [name for name in ("gene", "score", area) if name not in nuclei]
    if missing or nuclei.empty:
        what = f"lacking {missing}" if missing else "without a row"
        raise ValueError(f"Expected what `stimage_sd.tl.explained_nuclei` returns, found a table {what}.")
    genes, columns = list(dict.fromkeys(nuclei["gene"])), 2 if "class" in nuclei else 1
    axes = panels(ax, len(genes) * columns, size=(4.0, 3.2), columns=columns)
    for number, name in enumerate(genes):
        own = nuclei[nuclei["gene"] == name]
        _draw_by_area(axes[number * columns], own, area)
        axes[number * columns].set(title=name, ylabel="score")
        if columns == 2:
            _draw_by_class(axes[number * columns + 1], own)
            axes[number * columns + 1].set(title=f"{name}, by class", ylabel="score")
    return axes


def _scores(frame: GeoDataFrame, column: str) -> np.ndarray:
    if column not in frame:
        known = sorted(name for name in frame.columns if name.startswith(("lime_", "saliency_")))
        raise KeyError(f"No scores {column!r} among the explained nuclei's {known}.")
    return frame[column].to_numpy(dtype=np.float64)


def _quality(sdata: SpatialData, gene: str, tile: int, method: str) -> str:
    """R² of the linear model, where it is LIME's."""
    if method != "lime" or contract.EXPLANATIONS not in sdata.tables:
        return ""
    table = contract.explanations(sdata)
    rows = np.flatnonzero(table.obs[contract.INSTANCE_KEY].to_numpy() == tile)
    if gene not in table.var_names or rows.size == 0 or "r2" not in table.layers:
        return ""
    value = float(np.asarray(table.layers["r2"])[rows[0], table.var_names.get_loc(gene)])
    return f" (R² = {value:.2f})"


def _draw_tile(ax: Axes, picture: np.ndarray, center: np.ndarray, side: float) -> None:
    left, top = center - side / 2
    ax.imshow(picture, extent=(left, left + side, top + side, top), interpolation="antialiased", zorder=0)
    ax.set_xlim(left, left + side)
    ax.set_ylim(top + side, top)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _draw_nuclei(ax: Axes, frame: GeoDataFrame, scores: np.ndarray, tile: int, cmap: str, norm: Normalize) -> None:
    rows = np.flatnonzero((frame["tile"].to_numpy() == tile) & np.isfinite(scores))
    parts = [(part, scores[row]) for row in rows for part in shapely.get_parts(frame.geometry.iloc[row])]
    drawn = PolyCollection(
        [np.asarray(part.exterior.coords)[:, :2] for part, _ in parts],
        array=np.array([score for _, score in parts]),
        cmap=cmap,
        norm=norm,
        alpha=0.6,
        edgecolor="black",
        linewidth=0.5,
    )
    ax.add_collection(drawn, autolim=False)


def _draw_by_area(ax: Axes, own: pd.DataFrame, area: str) -> None:
    """Scores against area, and their median in bins of as many nuclei each."""
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.scatter(own[area], own["score"], s=8, alpha=0.4, linewidth=0, color=PREDICTED)
    if len(own) >= 3 * _BINS:
        groups = own.groupby(pd.qcut(own[area], _BINS, duplicates="drop"), observed=True)
        medians = groups[[area, "score"]].median()
        ax.plot(medians[area], medians["score"], color="black", marker="o", markersize=4, label="median")
        ax.legend(frameon=False, fontsize=8)
    ax.set_xlabel(f"area of the nucleus ({'µm²' if area == 'area_um2' else 'px'})")
    finish(ax)


def _draw_by_class(ax: Axes, own: pd.DataFrame) -> None:
    groups = [(str(name), group["score"].to_numpy()) for name, group in own.groupby("class", observed=True)]
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.boxplot(
        [values for _, values in groups],
        tick_labels=[f"{name}\n({len(values)})" for name, values in groups],
        showfliers=False,
        medianprops={"color": "black"},
    )
    finish(ax)
