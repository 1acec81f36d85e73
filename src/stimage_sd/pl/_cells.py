"""Maps of cells by type, uncertainty or gene."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import shapely
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import WARNING, Colors, add_color_bar, column
from stimage_sd.pl._categories import add_legend, categories_of, colors_of, is_category
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import Map, draw_maps, kept_axes, regions_of_cohort
from stimage_sd.pl._zoom import Zoom, Zooms, draw_image, zoom_box

#: largest number of drawn cells, beyond which an even subset is drawn
_MOST = 60_000
#: labels of color bars
_LABELS = {"entropy": "entropy of the type (0 certain, 1 uniform)"}
#: prefix of the columns with the probability of a type
_PROBABILITY = "p_"
_TYPES_COME_FROM = (
    "Types come from `stimage_sd.pp.annotate_cells` (measured cells) or `stimage_sd.tl.predict_cells`. Or draw another "
    "column with `color=`."
)
#: legend of the rim around cells of a wrong type
_WRONG = "rim: wrong type"


def cells(
    data: SpatialData | contract.Cohort,
    color: str | Sequence[str] = "cell_type",
    *,
    zoom: Zooms | None = None,
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
    table_key: str | None = None,
    layer: str | None = None,
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
        A section with predicted cells, or with nuclei of known type, or a cohort of such sections.
    color
        One or several columns of the shapes or of the predicted cells, such as ``"cell_type"``, ``"true_type"``,
        ``"entropy"``, ``"p_<class>"`` or ``"area"``. For measured cells (`shapes_key`) also genes, drawn as log1p of
        the counts. Each column or gene gets a map. Types have the same colors in all maps of a call.
    zoom
        Left, top, right and bottom of the region to draw, H&E px. Default: the whole section. Several regions, as a
        list or keyed by name: each map is drawn whole, with a window for each region beside it.
    outline
        Draw outlines instead of filled cells, so that the tissue is visible.
    mark_wrong
        Draw a red rim with a white halo around cells of a wrong type. Run `stimage_sd.tl.evaluate_cells` first.
    palette
        Colors, keyed by type.
    img_alpha
        Opacity of the H&E, 0 to 1. Default: 1 under outlines, 0.75 under filled cells.
    cmap, vmin, vmax, alpha
        Colormap of numbers. Ends of the color range, by default the 1st and 99th percentile of the drawn cells, or of
        all cells with several regions. Opacity of the cells.
    shapes_key
        Name of the shapes. Default: the predicted cells, or the nuclei without predicted cells.
    image_key
        Name of the image to draw on. Default: the section's H&E.
    table_key
        Name of the table with the counts of measured cells, for genes. Default: the table that annotates the shapes.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    ax
        Axes to draw on, one per column, and with several sections or regions as many for each. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes. An array with one dimension for a cohort, one for a list of colors, and one for several regions (the whole
    map, then its windows), in this order.

    Raises
    ------
    KeyError
        If there are no cells or no such column or gene, or `mark_wrong` lacks measured types.
    ValueError
        If `zoom` lies outside the image, or a cohort has several sections and `zoom` is given.

    Notes
    -----
    Paper, Figures 3c, 4d to 4f and S14.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.cells(section, ["cell_type", "entropy"], mark_wrong=True)  # doctest: +SKIP
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    look = _Look(Colors(cmap, vmin, vmax, alpha), palette or {}, outline)
    cohort = contract.sections(data)
    names = [color] if isinstance(color, str) else list(color)
    if not names:
        raise KeyError("Expected at least one column in `color`, found none.")
    source = contract.Source(table_key, layer)
    drawn = {
        section: _cells_of(sdata, names, shapes_key, image_key, source, mark_wrong=mark_wrong)
        for section, sdata in cohort.items()
    }
    regions = regions_of_cohort(cohort, zoom, image_key)
    first = next(iter(drawn.values()))
    box = zoom_box(first.sdata, first.image, None if regions.several else regions.boxes[0])
    aspect = (box[3] - box[1]) / (box[2] - box[0])
    width = 6.4 if len(cohort) * len(names) * len(regions.boxes) == 1 else 4.6
    size = width, float(np.clip(0.85 * width * aspect, 0.4 * width, 1.4 * width))
    shape = len(cohort), len(names), len(regions.boxes)
    columns = len(regions.boxes) if regions.several else len(names) if len(cohort) > 1 and len(names) > 1 else 3
    axes = sheet.panels(math.prod(shape), size=size, columns=columns).reshape(shape)
    opacity = img_alpha if img_alpha is not None else 1.0 if outline else 0.75
    for number, (section, of_section) in enumerate(drawn.items()):
        background = partial(_draw_background, cells=of_section, img_alpha=opacity)
        maps = []
        for name in names:
            # types have the same colors in all sections
            types = colors_of(categories_of([one.values[name] for one in drawn.values()]), look.palette)
            draw = partial(_draw, cells=of_section, name=name, look=look, types=types, whole=regions.several)
            explain = partial(_explain, cells=of_section, name=name, types=types)
            heading = f"{section if len(cohort) > 1 else contract.sample(of_section.sdata)}: {name}"
            maps.append(Map(heading, background, draw, explain))
        draw_maps(maps, axes[number], regions)
    keep = [not isinstance(data, SpatialData), not isinstance(color, str), regions.several]
    kept: Axes | np.ndarray = axes[0, 0, 0] if not any(keep) else kept_axes(axes, keep)
    return sheet.done(kept)


class _Cells(NamedTuple):
    """Cells of a section.

    Attributes
    ----------
    values
        Values of the columns to draw, one row per cell.
    labels
        Labels of the color bars of columns with numbers.
    shapes
        Outlines in px of the image.
    wrong
        Cells of a wrong type.
    """

    sdata: SpatialData
    image: str
    values: pd.DataFrame
    labels: dict[str, str]
    shapes: NDArray[np.object_]
    wrong: NDArray[np.bool_]


class _Look(NamedTuple):
    colors: Colors
    palette: Mapping[str, str]
    outline: bool


def _cells_of(
    sdata: SpatialData,
    names: Sequence[str],
    shapes_key: str | None,
    image_key: str | None,
    source: contract.Source,
    *,
    mark_wrong: bool,
) -> _Cells:
    predicted = contract.CELL_TYPES in sdata.tables
    shapes = shapes_key or (contract.cell_shapes(sdata) if predicted else contract.nuclei_name(sdata))
    image = contract.image_name(sdata, image_key)
    frame = contract.nuclei(sdata, shapes, image)
    values, labels = pd.DataFrame(index=frame.index), {}
    for name in names:
        values[name], labels[name] = _column(sdata, frame, shapes, name, source)
    wrong = _wrong(sdata, frame) if mark_wrong else np.zeros(len(frame), dtype=bool)
    return _Cells(sdata, image, values, labels, contract.outlines(frame), wrong)


def _column(
    sdata: SpatialData, frame: pd.DataFrame, shapes: str, name: str, source: contract.Source
) -> tuple[pd.Series, str]:
    """Return a column of the shapes or of the predicted cells, or a gene's counts of measured cells, and its label."""
    if name in frame.columns and name != "geometry":
        return frame[name], _label(name)
    if contract.CELL_TYPES in sdata.tables and shapes == contract.cell_shapes(sdata):
        obs = contract.cell_types(sdata).obs.set_index(contract.INSTANCE_KEY)
        if name in obs:
            return obs[name].reindex(frame.index), _label(name)
    found = contract.counts_of_shapes(sdata, shapes, source)
    if found is not None and name in found[1].var_names:
        ids, counts = found
        values = pd.Series(np.log1p(column(counts, name)), index=ids).reindex(frame.index)
        return values, f"log(1 + count of {name})"
    known = sorted(map(str, frame.columns.drop("geometry")))
    genes = "" if found is None else f". Nor is it one of the {found[1].n_vars} genes that were measured in these cells"
    mend = f" {_TYPES_COME_FROM}" if name == "cell_type" else ""
    raise KeyError(
        f"The shapes {shapes!r} of section {contract.sample(sdata)!r} have no column {name!r}, but {known}{genes}."
        f"{mend}"
    )


def _label(name: str) -> str:
    """Return the label of the color bar of a column."""
    if name.startswith(_PROBABILITY):
        return f"probability of {name.removeprefix(_PROBABILITY)}"
    return _LABELS.get(name, name.replace("_", " "))


def _draw_background(ax: Axes, box: Zoom | None, *, cells: _Cells, img_alpha: float) -> None:
    draw_image(ax, cells.sdata, cells.image, zoom_box(cells.sdata, cells.image, box), faded=1.0 - img_alpha)


def _draw(
    ax: Axes, *, cells: _Cells, name: str, look: _Look, types: Mapping[str, str], whole: bool
) -> ScalarMappable | None:
    """Draw the cells that lie within the limits of the axes."""
    rows = _within(ax, cells)
    rings = [np.asarray(part.exterior.coords)[:, :2] for part in cells.shapes[rows]]
    values, every = cells.values[name].iloc[rows], cells.values[name]
    drawn = None
    if is_category(values):
        _draw_types(ax, rings, values, types, look)
    else:
        norm = look.colors.norm((every if whole else values).to_numpy(dtype=float))
        drawn = _draw_numbers(ax, rings, values.to_numpy(dtype=float), norm, look)
    if cells.wrong.any():
        marked = [rings[n] for n in np.flatnonzero(cells.wrong[rows]).tolist()]
        # the white halo tells a rim from the outline of a type that is red as well
        halo = [withStroke(linewidth=3.0, foreground="white")]
        rims = LineCollection(marked, colors=WARNING, linewidths=1.4, zorder=4, path_effects=halo)
        ax.add_collection(rims, autolim=False)
    return drawn


def _within(ax: Axes, cells: _Cells) -> NDArray[np.int64]:
    """Return the cells within the limits of the axes, an even subset of very many."""
    left, right = sorted(ax.get_xlim())
    top, bottom = sorted(ax.get_ylim())
    rows = np.sort(shapely.STRtree(cells.shapes).query(shapely.box(left, top, right, bottom)))
    chosen: NDArray[np.int64] = rows[
        np.unique(np.linspace(0, max(len(rows) - 1, 0), min(len(rows), _MOST)).astype(int))
    ]
    return chosen


def _explain(
    axes: np.ndarray, drawn: ScalarMappable | None, *, cells: _Cells, name: str, types: Mapping[str, str]
) -> None:
    """Add a color bar of numbers, or a legend of types right of the last window with the numbers of drawn cells."""
    if drawn is not None:
        add_color_bar(axes[0], drawn, cells.labels[name], location="right")
        return
    rows = _within(axes[0], cells)
    numbers = cells.values[name].iloc[rows].astype("string").value_counts()
    shown = {one: int(numbers.get(one, 0)) for one in types}
    if cells.wrong.any():
        types, shown = {**types, _WRONG: WARNING}, {**shown, _WRONG: int(cells.wrong[rows].sum())}
    add_legend(axes[-1], types, shown)


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


def _draw_numbers(
    ax: Axes, rings: Sequence[NDArray[np.float64]], values: NDArray[np.float64], norm: Normalize, look: _Look
) -> ScalarMappable:
    colors = look.colors
    drawn = PolyCollection(rings, cmap=colors.cmap, norm=norm, zorder=2)
    drawn.set_array(values)
    if look.outline:
        drawn.set(facecolor="none", linewidth=1.2, alpha=colors.alpha)
    else:
        drawn.set(edgecolor="face", linewidth=0.2, alpha=0.85 if colors.alpha is None else colors.alpha)
    ax.add_collection(drawn, autolim=False)
    return drawn


def _draw_types(
    ax: Axes, rings: Sequence[NDArray[np.float64]], types: pd.Series, colors: Mapping[str, str], look: _Look
) -> None:
    text = types.astype("string").to_numpy(dtype=object, na_value="")
    alpha = look.colors.alpha
    for name, color in colors.items():
        drawn = PolyCollection([rings[n] for n in np.flatnonzero(text == name).tolist()], zorder=2)
        if look.outline:
            drawn.set(facecolor="none", edgecolor=color, linewidth=1.2, alpha=alpha)
        else:
            drawn.set(facecolor=color, edgecolor="white", linewidth=0.2, alpha=0.8 if alpha is None else alpha)
        ax.add_collection(drawn, autolim=False)
