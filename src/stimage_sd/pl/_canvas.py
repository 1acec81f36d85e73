"""What the pictures share: panels, the H&E under a map, tiles on it, colour and scale bars, gene names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal

import dask
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import Collection, EllipseCollection, PolyCollection
from matplotlib.colors import Normalize
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from scipy.spatial import KDTree
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.stream import cut_tile

#: longest side of the H&E under a map, px
THUMBNAIL = 1500
#: spots are drawn this much larger than they are, where their neighbours leave the room
LARGEST = 1.6
#: lengths a scale bar may have, in powers of ten
ROUND = (1, 2, 5)
MEASURED, PREDICTED, WARNING = "#4c72b0", "#dd8452", "#c44e52"


def panels(
    ax: Axes | Sequence[Axes] | np.ndarray | None, n: int, *, size: tuple[float, float], columns: int | None = None
) -> np.ndarray:
    """Return the axes to draw on: the user's, checked for their number, or those of a new figure.

    Parameters
    ----------
    ax
        The user's axes; `None` for a new figure.
    n
        How many are needed.
    size
        Width and height of one, inches.
    columns
        How many stand side by side; all by default.

    Returns
    -------
    ``(n,)`` object array of `Axes`.

    Raises
    ------
    ValueError
        If the user's are fewer or more.
    """
    if ax is None:
        columns = min(columns or n, n)
        rows = -(-n // columns)
        figure = plt.figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        return np.array([figure.add_subplot(rows, columns, number + 1) for number in range(n)], dtype=object)
    given = np.array([ax], dtype=object) if isinstance(ax, Axes) else np.asarray(ax, dtype=object).ravel()
    if len(given) != n:
        raise ValueError(f"Expected `ax` to be {n} axes, one a panel, found {len(given)}.")
    return given


def map_size(sdata: SpatialData, positions: np.ndarray, *, width: float, below: float) -> tuple[float, float]:
    """Return the size of a map that leaves no margins: inches, `below` of them for what stands under it."""
    left, right, bottom, top = _extent(sdata, positions)
    return width, float(np.clip(width * (bottom - top) / (right - left), 0.4 * width, 2.0 * width)) + below


def _extent(sdata: SpatialData, positions: np.ndarray) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of what a map shows, H&E px: the tiles and a little around."""
    height, width = contract.levels(sdata, contract.image_name(sdata))[0].shape[1:]
    margin = 1.2 * contract.tiling(sdata)["side_px"]
    low, high = positions.min(axis=0) - margin, positions.max(axis=0) + margin
    return max(0.0, low[0]), min(width, high[0]), min(height, high[1]), max(0.0, low[1])


def check_gene(table: AnnData, gene: str, *, what: str = "predicted") -> None:
    """Raise `KeyError`, naming the closest, where a table lacks a gene."""
    if gene in table.var_names:
        return
    by_fold = {str(name).casefold(): str(name) for name in table.var_names}
    close = [by_fold[name] for name in get_close_matches(str(gene).casefold(), by_fold, n=3, cutoff=0.5)]
    hint = f"closest: {', '.join(close)}" if close else f"such as {', '.join(map(str, table.var_names[:3]))}"
    raise KeyError(f"No gene {gene!r} among the {table.n_vars} {what} ones; {hint}.")


def column(table: AnnData, gene: str, layer: str | None = None) -> np.ndarray:
    """Return a gene's values, ``float64 (n_obs,)``, of ``X`` or a layer."""
    values = table[:, gene].X if layer is None else table[:, gene].layers[layer]
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64).ravel()


def draw_section(ax: Axes, sdata: SpatialData, positions: np.ndarray, *, image_key: str | None, fade: float) -> None:
    """Draw the H&E under a map: a thumbnail in full-resolution pixels, cut to where the tiles are.

    Parameters
    ----------
    ax
        Where to.
    sdata
        The section.
    positions
        ``(n, 2)`` x and y of the tiles, H&E px.
    image_key
        Which image; the section's H&E by default.
    fade
        How far towards white, 0 to 1, so that colours on top are told from the tissue's own.
    """
    name = contract.image_name(sdata, image_key)
    image, _ = contract.thumbnail(sdata, name, max_side=THUMBNAIL)
    height, width = contract.levels(sdata, name)[0].shape[1:]
    faded = (image + (255.0 - image) * fade).astype(np.uint8)
    ax.imshow(faded, extent=(0, width, height, 0), interpolation="antialiased", zorder=0)
    left, right, bottom, top = _extent(sdata, positions)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    add_scale_bar(ax, contract.info(sdata)["mpp"])


def add_scale_bar(ax: Axes, mpp: float | None) -> None:
    """Add a bar of a round length, about a fifth of the map, where the section's resolution is known."""
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
    """Cut tiles at the coarsest level that has their pixels; only the chunks they touch are read.

    Parameters
    ----------
    sdata
        The section.
    positions
        ``(n, 2)`` x and y of their centres, H&E px.
    side
        H&E px.
    target
        Side they are resampled to, px.
    image_key
        Which image; the stain-normalised H&E where there is one by default.

    Returns
    -------
    ``uint8 (target, target, 3)`` each.
    """
    pyramid = contract.levels(sdata, contract.working_image_name(sdata, image_key))
    factors = [pyramid[0].shape[2] / level.shape[2] for level in pyramid]
    sufficient = [number for number, factor in enumerate(factors) if side / factor >= target]
    level, factor = (pyramid[sufficient[-1]], factors[sufficient[-1]]) if sufficient else (pyramid[0], 1.0)
    length = max(1, round(side / factor))
    blocks, corners = [], []
    for x, y in positions / factor - length / 2:
        top, left = (min(max(0, round(edge)), size - 1) for edge, size in zip((y, x), level.shape[1:], strict=True))
        # one tile's length more on each side, so that what lies over the border can be mirrored
        blocks.append(level.data[:, max(0, top - length) : top + 2 * length, max(0, left - length) : left + 2 * length])
        corners.append((round(y) - max(0, top - length), round(x) - max(0, left - length)))
    return [
        cut_tile(block, top=top, left=left, side=length, target=target)
        for block, (top, left) in zip(dask.compute(*blocks), corners, strict=True)
    ]


def draw_tiles(
    ax: Axes, sdata: SpatialData, positions: np.ndarray, values: np.ndarray, *, cmap: str, norm: Normalize | None = None
) -> Collection:
    """Draw tiles, coloured: circles where they sit on spots, squares where they are a grid.

    Parameters
    ----------
    ax
        Where to.
    sdata
        The section.
    positions
        ``(n, 2)`` x and y, H&E px.
    values
        ``(n,)`` what is coloured.
    cmap
        Name of a matplotlib colour map.
    norm
        From values to colours; by default from the 1st to the 99th percentile.

    Returns
    -------
    The collection, whose ``get_array()`` are the values.
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
    drawn.set(array=values, cmap=cmap, norm=norm if norm is not None else robust_norm(values), linewidth=0, zorder=2)
    ax.add_collection(drawn, autolim=False)
    return drawn


def _growth(positions: np.ndarray, side: float) -> float:
    """How much larger than they are spots can be drawn without touching."""
    if len(positions) < 2:
        return 1.0
    pitch = float(np.median(KDTree(positions).query(positions, k=2)[0][:, 1]))
    return float(np.clip(0.8 * pitch / side, 1.0, LARGEST))


def robust_norm(values: np.ndarray) -> Normalize:
    """Return a range of colours from the 1st to the 99th percentile of the finite values."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return Normalize(0.0, 1.0)
    low, high = np.percentile(finite, [1, 99])
    return Normalize(low, high if high > low else low + 1.0)


def add_colour_bar(
    ax: Axes, drawn: ScalarMappable, label: str, *, location: Literal["bottom", "right"] = "bottom"
) -> None:
    """Put a labelled colour bar under a map, or right of it."""
    bar = ax.figure.colorbar(drawn, ax=ax, location=location, shrink=0.7, aspect=28, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def finish(ax: Axes) -> None:
    """Give a chart the frame that all have."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)


def require_columns(
    frame: pd.DataFrame, names: Sequence[str], *, source: str = "the scores that `stimage_sd.tl.evaluate` returns"
) -> None:
    """Raise `ValueError` where a table lacks what its source gives."""
    missing = [name for name in names if name not in frame.columns]
    if missing or frame.empty:
        what = f"lacking {missing}" if missing else "without a row"
        raise ValueError(f"Expected {source}, found a table {what}.")
