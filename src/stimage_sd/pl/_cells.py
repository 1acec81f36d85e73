"""Cells on the slide by type or uncertainty, and how predicted types agree with measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import shapely
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import WARNING, add_colour_bar, add_scale_bar, panels, require_columns, robust_norm

#: longest side of the picture under the cells, px
_PIXELS = 1600
#: cells that are drawn at most; of more, as many are drawn that lie anywhere
_MOST = 60_000
_BOX = tuple[float, float, float, float]


def cells(
    sdata: SpatialData,
    color: str = "cell_type",
    *,
    zoom: _BOX | None = None,
    shapes_key: str | None = None,
    outline: bool = False,
    mark_wrong: bool = False,
    palette: Mapping[str, str] | None = None,
    cmap: str = "viridis",
    image_key: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw cells on the H&E, coloured by their type, their entropy or another column.

    Parameters
    ----------
    sdata
        A section with predicted cells, or with nuclei of known type.
    color
        A column of the shapes: ``"cell_type"``, ``"entropy"``, ``"p_<class>"``, ``"area"`` and so on.
    zoom
        Left, top, right and bottom of the part to draw, H&E px; all of the section by default.
    shapes_key
        Name of the shapes; by default the predicted cells, or the nuclei where there are none.
    outline
        Draw outlines alone rather than filled cells, so that the tissue is seen.
    mark_wrong
        Draw a red rim around predicted cells whose measured type is another, after `stimage_sd.tl.evaluate_cells`.
    palette
        From types to colours.
    cmap
        Name of a matplotlib colour map, for numbers.
    image_key
        The image to draw on; the section's H&E by default.
    ax
        Axes to draw on; a new figure by default.

    Returns
    -------
    The axes.

    Raises
    ------
    KeyError
        If there are no cells, or they have no such column.
    ValueError
        If `zoom` holds no part of the image.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.cells(section, "entropy", mark_wrong=True)  # doctest: +SKIP
    """
    predicted = contract.CELL_TYPES in sdata.tables
    name = shapes_key or (contract.cell_shapes(sdata) if predicted else contract.NUCLEI)
    frame = contract.nuclei(sdata, name)
    if color not in frame.columns:
        known = sorted(map(str, frame.columns.drop("geometry")))
        raise KeyError(
            f"The shapes {name!r} of section {contract.sample(sdata)!r} have no column {color!r}, but {known}."
        )
    wrong = _wrong(sdata, frame) if mark_wrong else np.zeros(len(frame), dtype=bool)
    image = contract.image_name(sdata, image_key)
    box = _box(sdata, image, zoom)
    shapes = contract.outlines(frame)
    rows = np.sort(shapely.STRtree(shapes).query(shapely.box(*box)))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST)).astype(int))] if len(rows) else rows
    aspect = (box[3] - box[1]) / (box[2] - box[0])
    (panel,) = panels(ax, 1, size=(6.4, float(np.clip(5.4 * aspect, 2.5, 9.0))))
    _draw_image(panel, sdata, image, box, faded=0.0 if outline else 0.25)
    rings = [np.asarray(part.exterior.coords)[:, :2] for part in shapes[rows]]
    values = frame[color].iloc[rows]
    if pd.api.types.is_numeric_dtype(values):
        _draw_numbers(panel, rings, values.to_numpy(dtype=float), color, cmap, outline)
    else:
        _draw_types(panel, rings, values, palette or {}, outline)
    if wrong.any():
        marked = [rings[n] for n in np.flatnonzero(wrong[rows]).tolist()]
        panel.add_collection(LineCollection(marked, colors=WARNING, linewidths=1.4, zorder=4), autolim=False)
    panel.set_title(f"{contract.sample(sdata)}: {color}", fontsize=11)
    return panel


def confusion(table: pd.DataFrame, *, normalize: bool = True, cmap: str = "Blues", ax: Axes | None = None) -> Axes:
    """Draw how measured types (rows) were predicted (columns).

    Parameters
    ----------
    table
        ``confusion`` of what `stimage_sd.tl.evaluate_cells` returns; sections are added up.
    normalize
        Colour, and name, the share of the measured type; the numbers of cells are named in either case.
    cmap
        Name of a matplotlib colour map.
    ax
        Axes to draw on; a new figure by default.

    Returns
    -------
    The axes.

    Raises
    ------
    ValueError
        If the table is another, or empty.

    Examples
    --------
    >>> import pandas as pd, stimage_sd as sti
    >>> table = pd.DataFrame({"truth": list("aabb"), "predicted": list("abab"), "n": [8, 2, 1, 9]})
    >>> sti.pl.confusion(table).get_ylabel()
    'measured'
    """
    require_columns(table, ["truth", "predicted", "n"], source="`confusion` of `stimage_sd.tl.evaluate_cells`")
    names = list(dict.fromkeys(table["truth"]))
    counts = table.pivot_table(index="truth", columns="predicted", values="n", aggfunc="sum").loc[names, names]
    numbers = counts.to_numpy(dtype=float)
    shares = numbers / np.maximum(numbers.sum(axis=1, keepdims=True), 1)
    shown = shares if normalize else numbers
    side = 1.4 + 0.85 * len(names)
    (panel,) = panels(ax, 1, size=(side + 0.9, side))
    panel.imshow(shown, cmap=cmap, vmin=0, vmax=1 if normalize else None)
    for row, column in np.ndindex(*numbers.shape):
        text = f"{shares[row, column]:.0%}\n" if normalize else ""
        dark = shown[row, column] > 0.55 * max(shown.max(), 1e-12)
        panel.text(
            column, row, f"{text}{numbers[row, column]:,.0f}", ha="center", va="center", fontsize=8,
            color="white" if dark else "black",
        )  # fmt: skip
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=9)
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.set(xlabel="predicted", ylabel="measured")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return panel


def _wrong(sdata: SpatialData, frame: pd.DataFrame) -> NDArray[np.bool_]:
    obs = contract.cell_types(sdata).obs
    if "true_type" not in obs:
        raise KeyError(
            f"Section {contract.sample(sdata)!r} does not say which of its predicted cells are wrong. Run "
            "`stimage_sd.tl.evaluate_cells(sdata)` first."
        )
    if len(obs) != len(frame):
        raise ValueError("`mark_wrong` is of the predicted cells; leave `shapes_key` out.")
    true = obs["true_type"].astype("string")
    return (true.notna() & (true != obs["cell_type"].astype("string"))).to_numpy(dtype=bool)


def _box(sdata: SpatialData, image: str, zoom: _BOX | None) -> _BOX:
    height, width = contract.levels(sdata, image)[0].shape[1:]
    if zoom is None:
        return 0.0, 0.0, float(width), float(height)
    left, top, right, bottom = zoom
    box = max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"Expected `zoom` as left, top, right, bottom within {width} x {height} px, found {zoom}.")
    return box


def _draw_image(ax: Axes, sdata: SpatialData, image: str, box: _BOX, *, faded: float) -> None:
    """Draw a part of the H&E, of the coarsest level that has enough pixels."""
    pyramid = contract.levels(sdata, image)
    factors = [pyramid[0].shape[2] / level.shape[2] for level in pyramid]
    longest = max(box[2] - box[0], box[3] - box[1])
    enough = [number for number, factor in enumerate(factors) if longest / factor >= min(_PIXELS, longest)]
    number = enough[-1] if enough else 0
    factor = factors[number]
    step = max(1, int(longest / factor / _PIXELS))
    left, top, right, bottom = (round(edge / factor) for edge in box)
    part = np.asarray(pyramid[number].data[:, top:bottom:step, left:right:step])
    picture = np.moveaxis(part, 0, -1).astype(float)
    picture = (picture + (255 - picture) * faded).astype(np.uint8)
    ax.imshow(picture, extent=(box[0], box[2], box[3], box[1]), interpolation="antialiased", zorder=0)
    ax.set_xlim(box[0], box[2])
    ax.set_ylim(box[3], box[1])
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    add_scale_bar(ax, contract.info(sdata)["mpp"])


def _draw_numbers(
    ax: Axes, rings: Sequence[NDArray[np.float64]], values: NDArray[np.float64], name: str, cmap: str, outline: bool
) -> None:
    drawn = PolyCollection(rings, cmap=cmap, norm=robust_norm(values), zorder=2)
    drawn.set_array(values)
    if outline:
        drawn.set(facecolor="none", linewidth=1.2)
    else:
        drawn.set(edgecolor="face", linewidth=0.2, alpha=0.85)
    ax.add_collection(drawn, autolim=False)
    add_colour_bar(ax, drawn, name, location="right")


def _draw_types(
    ax: Axes, rings: Sequence[NDArray[np.float64]], types: pd.Series, palette: Mapping[str, str], outline: bool
) -> None:
    names = pd.Categorical(types).categories.astype(str)
    colours = {name: palette.get(name, mpl.colormaps["tab10"](n % 10)) for n, name in enumerate(names)}
    text = types.astype(object).to_numpy()
    handles = []
    for name, colour in colours.items():
        own = np.flatnonzero(text == name).tolist()
        drawn = PolyCollection([rings[n] for n in own], zorder=2)
        if outline:
            drawn.set(facecolor="none", edgecolor=colour, linewidth=1.2)
        else:
            drawn.set(facecolor=colour, edgecolor="white", linewidth=0.2, alpha=0.8)
        ax.add_collection(drawn, autolim=False)
        label = f"{name} ({len(own):,})"
        handles.append(Line2D([], [], marker="o", linestyle="", markersize=7, color=colour, label=label))
    ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, handletextpad=0.1
    )
