"""Shared parts of figures: H&E background, tiles, color ranges, color and scale bars, gene names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import dask
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import Collection, EllipseCollection, PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from scipy.spatial import KDTree
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.stream.cutting import cut_tile, view_of

#: longest side of the H&E under a map, px
THUMBNAIL = 1500
#: largest magnification of spots, where neighbors leave room
LARGEST = 1.6
#: largest number of nuclei that are drawn in their outlines
_MOST_OUTLINES = 20_000
#: lengths of a scale bar, times a power of ten
ROUND = (1, 2, 5)
MEASURED, PREDICTED, WARNING = "#4c72b0", "#dd8452", "#c44e52"


def map_size(sdata: SpatialData, positions: np.ndarray, *, width: float, below: float) -> tuple[float, float]:
    """Return the size of a map without margins, inches, with `below` inches for the parts under the map."""
    left, right, bottom, top = _extent(sdata, positions)
    return width, float(np.clip(width * (bottom - top) / (right - left), 0.4 * width, 2.0 * width)) + below


def _extent(sdata: SpatialData, positions: np.ndarray) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top of the tiles with a margin, H&E px."""
    width, height = contract.image_size(sdata)
    margin = 1.2 * contract.tiling(sdata)["side_px"]
    low, high = positions.min(axis=0) - margin, positions.max(axis=0) + margin
    return max(0.0, low[0]), min(width, high[0]), min(height, high[1]), max(0.0, low[1])


def check_gene(table: AnnData, gene: str, *, what: str = "predicted") -> None:
    """Raise `KeyError` with the closest names if a table lacks a gene."""
    if gene in table.var_names:
        return
    by_fold = {str(name).casefold(): str(name) for name in table.var_names}
    close = [by_fold[name] for name in get_close_matches(str(gene).casefold(), by_fold, n=3, cutoff=0.5)]
    hint = f"closest: {', '.join(close)}" if close else f"such as {', '.join(map(str, table.var_names[:3]))}"
    raise KeyError(f"No gene {gene!r} among the {table.n_vars} {what} genes; {hint}.")


def column(table: AnnData, gene: str, layer: str | None = None) -> np.ndarray:
    """Return a gene's values from ``X`` or a layer, ``float64 (n_obs,)``."""
    values = table[:, gene].X if layer is None else table[:, gene].layers[layer]
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64).ravel()


def draw_section(ax: Axes, sdata: SpatialData, positions: np.ndarray, *, image_key: str | None, fade: float) -> None:
    """Draw a thumbnail of the H&E under a map, in full-resolution coordinates, cropped to the tiles.

    Parameters
    ----------
    ax
        Axes to draw on.
    sdata
        The section.
    positions
        x and y of the tiles, H&E px, ``(n, 2)``.
    image_key
        Name of the image. Default: the section's H&E.
    fade
        Blend toward white, 0 to 1, so that colors on top stand out from the tissue.
    """
    name = contract.image_name(sdata, image_key)
    image, _ = contract.thumbnail(sdata, name, max_side=THUMBNAIL)
    faded = (image + (255.0 - image) * fade).astype(np.uint8)
    ax.imshow(faded, extent=contract.image_extent(sdata, name), interpolation="antialiased", zorder=0)
    left, right, bottom, top = _extent(sdata, positions)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    add_scale_bar(ax, contract.mpp(sdata))


def add_scale_bar(ax: Axes, mpp: float | None) -> None:
    """Add a scale bar of a round length, about a fifth of the map, if the resolution is known."""
    if mpp is None:
        return
    left, right = ax.get_xlim()
    about = abs(right - left) * float(mpp) / 5
    power = 10.0 ** np.floor(np.log10(about))
    length = max(step * power for step in ROUND if step * power <= about)
    label = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    bar = AnchoredSizeBar(
        ax.transData,
        length / float(mpp),
        label,
        loc="lower left",
        pad=0.4,
        sep=3,
        frameon=False,
        size_vertical=abs(right - left) / 150,
        fill_bar=True,
        fontproperties=FontProperties(size=9),
    )
    bar.txt_label._text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    bar.set_zorder(5)
    ax.add_artist(bar)


def cut_tiles(
    sdata: SpatialData, positions: np.ndarray, *, side: float, target: int, image_key: str | None
) -> list[np.ndarray]:
    """Cut tiles at the coarsest sufficient pyramid level, reading only the chunks under the tiles.

    Parameters
    ----------
    sdata
        The section.
    positions
        x and y of the tiles' centers, px of the image, ``(n, 2)``.
    side
        Side of a tile, px of the image.
    target
        Side of a resampled tile, px.
    image_key
        Name of the image. Default: the stain-normalized H&E, or the H&E without one.

    Returns
    -------
    One array per tile, ``uint8 (target, target, 3)``.
    """
    pyramid = contract.levels(sdata, contract.working_image_name(sdata, image_key))
    view = view_of(pyramid, side, target)
    level, length = pyramid[view.level], view.side
    blocks, corners = [], []
    for x, y in zip(*(corner.tolist() for corner in view.corners(positions)), strict=True):
        top, left = (min(max(0, edge), size - 1) for edge, size in zip((y, x), level.shape[1:], strict=True))
        # add a tile's length on each side, so that pixels beyond the image border can be mirrored
        blocks.append(level.data[:, max(0, top - length) : top + 2 * length, max(0, left - length) : left + 2 * length])
        corners.append((y - max(0, top - length), x - max(0, left - length)))
    return [
        cut_tile(block, top=top, left=left, side=length, target=target)
        for block, (top, left) in zip(dask.compute(*blocks), corners, strict=True)
    ]


def draw_tiles(
    ax: Axes,
    *,
    sdata: SpatialData,
    positions: np.ndarray,
    values: np.ndarray,
    cmap: str | Colormap,
    norm: Normalize,
    alpha: float | None,
) -> Collection:
    """Draw colored tiles, as circles on spots or as squares on a grid.

    Parameters
    ----------
    ax
        Axes to draw on.
    sdata
        The section.
    positions
        x and y of the tiles, H&E px, ``(n, 2)``.
    values
        One value per tile, ``(n,)``.
    cmap, norm, alpha
        Colormap, color range and opacity. Without `alpha`, squares are slightly transparent.

    Returns
    -------
    The collection. Its ``get_array()`` returns the values.
    """
    tiling = contract.tiling(sdata)
    side = float(tiling["side_px"])
    drawn: Collection
    if tiling["layout"] == "grid":
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * side / 2
        drawn = PolyCollection(list(positions[:, None] + corners), antialiased=False, alpha=0.8)
    else:
        width = np.full(len(positions), side * _growth(positions, side))
        drawn = EllipseCollection(
            width, width, np.zeros(len(positions)), units="xy", offsets=positions, offset_transform=ax.transData
        )
    drawn.set(array=values, cmap=cmap, norm=norm, linewidth=0, zorder=2)
    if alpha is not None:
        drawn.set_alpha(alpha)
    ax.add_collection(drawn, autolim=False)
    return drawn


def draw_rows(
    ax: Axes,
    *,
    sdata: SpatialData,
    table: AnnData,
    rows: np.ndarray,
    values: np.ndarray,
    cmap: str | Colormap,
    norm: Normalize,
    alpha: float | None,
) -> Collection:
    """Draw colored rows of a table of predictions: tiles, or the visible nuclei or squares in their outlines.

    Parameters
    ----------
    ax
        Axes to draw on, with the limits of the map.
    sdata
        The section.
    table, rows
        Predictions, and the rows to draw.
    values
        One value per row, ``(n,)``.
    cmap, norm, alpha
        Colormap, color range and opacity.
    """
    places = contract.places(sdata, table)[rows]
    if contract.about_instances(table) is None:
        return draw_tiles(ax, sdata=sdata, positions=places, values=values, cmap=cmap, norm=norm, alpha=alpha)
    low, high = np.sort([ax.get_xlim(), ax.get_ylim()], axis=1).T
    seen = np.flatnonzero(((places >= low) & (places <= high)).all(axis=1))
    shown = table[rows[seen]]
    drawn: Collection
    if len(seen) <= _MOST_OUTLINES:
        rings = (np.asarray(shape.exterior.coords) for shape in contract.instance_outlines(sdata, shown))
        drawn = PolyCollection(list(rings), alpha=0.9)
    else:
        width = np.sqrt(4 / np.pi * contract.instance_areas(sdata, shown))
        drawn = EllipseCollection(
            width, width, np.zeros(len(width)), units="xy", offsets=places[seen], offset_transform=ax.transData
        )
    drawn.set(array=values[seen], cmap=cmap, norm=norm, linewidth=0, zorder=2, rasterized=True)
    if alpha is not None:
        drawn.set_alpha(alpha)
    ax.add_collection(drawn, autolim=False)
    return drawn


def _growth(positions: np.ndarray, side: float) -> float:
    """Return the magnification at which spots do not touch."""
    if len(positions) < 2:
        return 1.0
    pitch = float(np.median(KDTree(positions).query(positions, k=2)[0][:, 1]))
    return float(np.clip(0.8 * pitch / side, 1.0, LARGEST))


@dataclass(frozen=True)
class Colors:
    """Color settings shared by all figures of values.

    Attributes
    ----------
    cmap
        A matplotlib colormap, or its name.
    vmin, vmax
        Ends of the range. Default: the 1st and 99th percentile of the finite values.
    alpha
        Opacity of the drawn elements, 0 to 1.
    """

    cmap: str | Colormap
    vmin: float | None = None
    vmax: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the range and the opacity."""
        if self.vmin is not None and self.vmax is not None and self.vmin >= self.vmax:
            raise ValueError(f"Expected `vmin` below `vmax`, found {self.vmin:g} and {self.vmax:g}.")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"Expected `alpha` from 0 to 1, found {self.alpha:g}.")

    def norm(self, values: np.ndarray) -> Normalize:
        """Return the color range of values."""
        finite = values[np.isfinite(values)]
        low, high = (float(end) for end in np.percentile(finite, [1, 99])) if finite.size else (0.0, 1.0)
        return self.between(low, high)

    def between(self, low: float, high: float) -> Normalize:
        """Return a color range, with `low` and `high` for ends that the user did not give."""
        low, high = low if self.vmin is None else self.vmin, high if self.vmax is None else self.vmax
        if low >= high:
            low, high = (low, low + 1.0) if self.vmax is None else (high - 1.0, high)
        return Normalize(low, high)

    def around_zero(self, largest: float) -> Normalize:
        """Return a color range centered at 0, unless the user gave both ends."""
        if self.vmin is not None and self.vmax is not None:
            return Normalize(self.vmin, self.vmax)
        end = next((abs(given) for given in (self.vmin, self.vmax) if given is not None), largest)
        return Normalize(-end, end)


def add_color_bar(
    ax: Axes | np.ndarray, drawn: ScalarMappable, label: str, *, location: Literal["bottom", "right"] = "bottom"
) -> None:
    """Add a labeled color bar below or to the right of a map, or of several maps that share the colors."""
    panels = [ax] if isinstance(ax, Axes) else list(ax.ravel())
    figure = panels[-1].figure
    panels = [panel for panel in panels if panel.figure is figure]
    # a bar of many maps keeps the thickness that it has below two
    across = len({round(panel.get_position().x0, 3) for panel in panels}) if location == "bottom" else 1
    bar = figure.colorbar(
        drawn, ax=panels, location=location, shrink=0.7 if across == 1 else min(0.6, 1.2 / across), aspect=28, pad=0.02
    )
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def finish(ax: Axes) -> None:
    """Apply the shared frame to a chart."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)


def require_columns(
    frame: pd.DataFrame, names: Sequence[str], *, source: str = "the scores that `stimage_sd.tl.evaluate` returns"
) -> None:
    """Raise `ValueError` if a table is empty or lacks a column."""
    missing = [name for name in names if name not in frame.columns]
    if missing or frame.empty:
        what = f"lacking {missing}" if missing else "without a row"
        raise ValueError(f"Expected {source}, found a table {what}.")
