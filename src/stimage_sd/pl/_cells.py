"""Maps of cells by type or uncertainty, and confusion of cell types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib as mpl
import numpy as np
import pandas as pd
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import WARNING, Colors, add_color_bar, add_scale_bar, require_columns
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.stream.cutting import view_of

#: longest side of the image under the cells, px
_PIXELS = 1600
#: largest number of drawn cells, beyond which an even subset is drawn
_MOST = 60_000
#: left, top, right and bottom of a region of the H&E, px
Zoom: TypeAlias = tuple[float, float, float, float]


def cells(
    data: SpatialData,
    color: str | Sequence[str] = "cell_type",
    *,
    zoom: Zoom | None = None,
    outline: bool = False,
    mark_wrong: bool = False,
    palette: Mapping[str, str] | None = None,
    img_alpha: float | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | np.ndarray | Figure:
    """Draw cells on the H&E, colored by type, entropy or another column.

    Parameters
    ----------
    data
        A section with predicted cells, or with nuclei of known type.
    color
        One or several columns of the shapes, such as ``"cell_type"``, ``"entropy"``, ``"p_<class>"`` or ``"area"``.
        Each column gets a map.
    zoom
        Left, top, right and bottom of the region to draw, H&E px. Default: the whole section.
    outline
        Draw outlines instead of filled cells, so that the tissue is visible.
    mark_wrong
        Draw a red rim around predicted cells of a wrong type. Run `stimage_sd.tl.evaluate_cells` first.
    palette
        Colors, keyed by type.
    img_alpha
        Opacity of the H&E, 0 to 1. Default: 1 under outlines, 0.75 under filled cells.
    cmap, vmin, vmax, alpha
        Colormap of numbers. Ends of the color range, by default the 1st and 99th percentile of the drawn cells. Opacity
        of the cells.
    shapes_key
        Name of the shapes. Default: the predicted cells, or the nuclei without predicted cells.
    image_key
        Name of the image to draw on. Default: the section's H&E.
    ax
        Axes to draw on, one per column. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes, or an array of axes if `color` is a list.

    Raises
    ------
    KeyError
        If there are no cells or no such column, or `mark_wrong` lacks measured types.
    ValueError
        If `zoom` lies outside the image.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.cells(section, ["cell_type", "entropy"], mark_wrong=True)  # doctest: +SKIP
    """
    sdata = contract.section(data)
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    predicted = contract.CELL_TYPES in sdata.tables
    name = shapes_key or (contract.cell_shapes(sdata) if predicted else contract.NUCLEI)
    image = contract.image_name(sdata, image_key)
    frame = contract.nuclei(sdata, name, image)
    columns = [color] if isinstance(color, str) else list(color)
    unknown = [column for column in columns if column not in frame.columns]
    if unknown or not columns:
        known = sorted(map(str, frame.columns.drop("geometry")))
        raise KeyError(
            f"The shapes {name!r} of section {contract.sample(sdata)!r} have no column "
            f"{unknown[0] if unknown else ''!r}, but {known}."
        )
    wrong = _wrong(sdata, frame) if mark_wrong else np.zeros(len(frame), dtype=bool)
    box = zoom_box(sdata, image, zoom)
    shapes = contract.outlines(frame)
    rows = np.sort(shapely.STRtree(shapes).query(shapely.box(*box)))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST)).astype(int))] if len(rows) else rows
    rings = [np.asarray(part.exterior.coords)[:, :2] for part in shapes[rows]]
    aspect = (box[3] - box[1]) / (box[2] - box[0])
    axes = sheet.panels(len(columns), size=(6.4, float(np.clip(5.4 * aspect, 2.5, 9.0))), columns=3)
    opacity = img_alpha if img_alpha is not None else 1.0 if outline else 0.75
    for panel, column in zip(axes, columns, strict=True):
        draw_image(panel, sdata, image, box, faded=1.0 - opacity)
        values = frame[column].iloc[rows]
        if pd.api.types.is_numeric_dtype(values):
            _draw_numbers(panel, rings, values.to_numpy(dtype=float), column, colors, outline)
        else:
            _draw_types(panel, rings, values, palette or {}, outline, alpha)
        if wrong.any():
            marked = [rings[n] for n in np.flatnonzero(wrong[rows]).tolist()]
            panel.add_collection(LineCollection(marked, colors=WARNING, linewidths=1.4, zorder=4), autolim=False)
        panel.set_title(f"{contract.sample(sdata)}: {column}", fontsize=11)
    return sheet.done(axes[0] if isinstance(color, str) else axes)


def confusion(
    data: pd.DataFrame,
    *,
    normalize: bool = True,
    cmap: str | Colormap = "Blues",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    ax: Axes | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Draw the confusion matrix of measured (rows) and predicted (columns) types.

    Parameters
    ----------
    data
        Table ``confusion`` from `stimage_sd.tl.evaluate_cells`. Sections are summed.
    normalize
        Color and label by the fraction of the measured type. If `False`, color by the number of cells. The numbers of
        cells are always written.
    cmap, vmin, vmax, alpha
        Colormap. Ends of the color range, by default 0 and 1, or 0 and the largest number. Opacity.
    ax
        Axes to draw on. Default: a new figure.
    title, figsize, save, return_fig
        `title`: title of the panel. `figsize`: size of a new figure, inches. `save`: output file. `return_fig`: return
        the figure instead of the axes.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If a column is missing or the table is empty.

    Examples
    --------
    >>> import pandas as pd, stimage_sd as sti
    >>> table = pd.DataFrame({"truth": list("aabb"), "predicted": list("abab"), "n": [8, 2, 1, 9]})
    >>> sti.pl.confusion(table).get_ylabel()
    'measured'
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    require_columns(data, ["truth", "predicted", "n"], source="`confusion` of `stimage_sd.tl.evaluate_cells`")
    names = list(dict.fromkeys(data["truth"]))
    counts = data.pivot_table(index="truth", columns="predicted", values="n", aggfunc="sum").loc[names, names]
    numbers = counts.to_numpy(dtype=float)
    shares = numbers / np.maximum(numbers.sum(axis=1, keepdims=True), 1)
    shown = shares if normalize else numbers
    side = 1.4 + 0.85 * len(names)
    panel = sheet.panel(size=(side + 0.9, side))
    norm = colors.between(0.0, 1.0 if normalize else float(shown.max()))
    panel.imshow(shown, cmap=colors.cmap, norm=norm, alpha=colors.alpha)
    for row, column in np.ndindex(*numbers.shape):
        text = f"{shares[row, column]:.0%}\n" if normalize else ""
        dark = norm(shown[row, column]) > 0.55
        panel.text(
            column, row, f"{text}{numbers[row, column]:,.0f}", ha="center", va="center", fontsize=8,
            color="white" if dark else "black",
        )  # fmt: skip
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.set(xlabel="predicted", ylabel="measured")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return sheet.done(panel)


def _wrong(sdata: SpatialData, frame: pd.DataFrame) -> NDArray[np.bool_]:
    obs = contract.cell_types(sdata).obs
    if "true_type" not in obs:
        raise KeyError(
            f"Section {contract.sample(sdata)!r} has no measured types of its predicted cells. Run "
            "`stimage_sd.tl.evaluate_cells(sdata)` first."
        )
    obs = obs.set_index(contract.INSTANCE_KEY)
    if len(obs) != len(frame) or not frame.index.isin(obs.index).all():
        raise ValueError("`mark_wrong` needs the predicted cells. Leave `shapes_key` out.")
    obs = obs.loc[frame.index]
    true = obs["true_type"].astype("string")
    return (true.notna() & (true != obs["cell_type"].astype("string"))).to_numpy(dtype=bool)


def zoom_box(sdata: SpatialData, image: str, zoom: Zoom | None) -> Zoom:
    """Return the region to draw, clipped to the image, or the whole image without `zoom`."""
    height, width = contract.levels(sdata, image)[0].shape[1:]
    if zoom is None:
        return 0.0, 0.0, float(width), float(height)
    left, top, right, bottom = zoom
    box = max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"Expected `zoom` as left, top, right, bottom within {width} x {height} px, found {zoom}.")
    return box


def draw_image(ax: Axes, sdata: SpatialData, image: str, box: Zoom, *, faded: float) -> None:
    """Draw a region of the H&E from the coarsest sufficient pyramid level."""
    pyramid = contract.levels(sdata, image)
    longest = max(box[2] - box[0], box[3] - box[1])
    view = view_of(pyramid, longest, max(1, round(min(_PIXELS, longest))))
    level, factor = view.level, view.factor
    step = max(1, int(longest / factor / _PIXELS))
    left, top, right, bottom = (max(0, round((edge - view.start[axis % 2]) / factor)) for axis, edge in enumerate(box))
    part = np.asarray(pyramid[level].data[:, top:bottom:step, left:right:step])
    picture = np.moveaxis(part, 0, -1).astype(float)
    picture = (picture + (255 - picture) * faded).astype(np.uint8)
    ax.imshow(picture, extent=(box[0], box[2], box[3], box[1]), interpolation="antialiased", zorder=0)
    ax.set_xlim(box[0], box[2])
    ax.set_ylim(box[3], box[1])
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    add_scale_bar(ax, contract.mpp(sdata, image))


def _draw_numbers(
    ax: Axes,
    rings: Sequence[NDArray[np.float64]],
    values: NDArray[np.float64],
    name: str,
    colors: Colors,
    outline: bool,
) -> None:
    drawn = PolyCollection(rings, cmap=colors.cmap, norm=colors.norm(values), zorder=2)
    drawn.set_array(values)
    if outline:
        drawn.set(facecolor="none", linewidth=1.2, alpha=colors.alpha)
    else:
        drawn.set(edgecolor="face", linewidth=0.2, alpha=0.85 if colors.alpha is None else colors.alpha)
    ax.add_collection(drawn, autolim=False)
    add_color_bar(ax, drawn, name, location="right")


def _draw_types(
    ax: Axes,
    rings: Sequence[NDArray[np.float64]],
    types: pd.Series,
    palette: Mapping[str, str],
    outline: bool,
    alpha: float | None,
) -> None:
    names = pd.Categorical(types).categories.astype(str)
    colors = {name: palette.get(name, mpl.colormaps["tab10"](n % 10)) for n, name in enumerate(names)}
    text = types.astype(object).to_numpy()
    handles = []
    for name, color in colors.items():
        rows = np.flatnonzero(text == name).tolist()
        drawn = PolyCollection([rings[n] for n in rows], zorder=2)
        if outline:
            drawn.set(facecolor="none", edgecolor=color, linewidth=1.2, alpha=alpha)
        else:
            drawn.set(facecolor=color, edgecolor="white", linewidth=0.2, alpha=0.8 if alpha is None else alpha)
        ax.add_collection(drawn, autolim=False)
        label = f"{name} ({len(rows):,})"
        handles.append(Line2D([], [], marker="o", linestyle="", markersize=7, color=color, label=label))
    ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, handletextpad=0.1
    )
