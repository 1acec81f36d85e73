"""Maps of measured and predicted genes, side by side on the H&E."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import Colors, add_color_bar, check_gene, draw_rows
from stimage_sd.pl._categories import add_legend
from stimage_sd.pl._compared import Shown, as_patterns, class_norm, norms_of, shown
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import (
    Map,
    draw_background,
    draw_maps,
    draw_nothing,
    kept_axes,
    map_size,
    names_of,
    regions_of_cohort,
)
from stimage_sd.pl._zoom import Regions, Zooms

Scale = Literal["shared", "each", "pattern"]
#: maps per row without measured values
_IN_A_ROW = 4
#: color of tiles unlike the training tiles
UNLIKE = "#b5b5b5"
CLASS_COLORS = {"Low": "#4c72b0", "High": "#dd8452"}


def prediction(
    data: SpatialData | contract.Cohort,
    gene: str | Sequence[str],
    *,
    scale: Scale = "shared",
    max_ood: float | None = None,
    zoom: Zooms | None = None,
    img_alpha: float = 0.65,
    cmap: str | Colormap = "magma",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    key: str = contract.PREDICTIONS,
    image_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw measured values and predicted means of genes over the H&E, as log1p, on one scale.

    Tables of predictions of nuclei or squares (`key`) are drawn in their outlines, which a `zoom` shows best. Of tables
    of gene classes (``key="gene_classes"``) the observed and the predicted class are drawn, High or Low.

    The measured values are the section's counts, or the gene's protein after
    ``stimage_sd.tl.evaluate(..., against="proteins")``. Predicted means of a model with exposure are moved to the depth
    that the section was measured at. For predictions at median depth of a model with size factors, the counts of each
    spot are moved to this depth.

    Parameters
    ----------
    data
        A section with predictions, or a cohort of such sections. All sections share one color range per gene.
    gene
        One or several predicted genes. Each gene gets a row of maps.
    scale
        ``"shared"``: the measured and the predicted maps of a gene have one color range. Predicted means vary less than
        counts, so their colors do too. ``"each"``: both have a range of their own, which shows faint patterns.
        Intensities of proteins always have their own. ``"pattern"``: the smoothed patterns of high expression that the
        IoU of `stimage_sd.tl.evaluate` compares. The title gives the IoU.
    max_ood
        Largest ``ood_score`` of predictions to show, such as 1. Other tiles are gray, and without a color bar if these
        are all tiles. Default: show all.
    zoom
        Left, top, right and bottom of the region to draw, H&E px. Default: all tiles. Several regions, as a list or
        keyed by name: each map is drawn whole, with a window for each region beside it.
    img_alpha
        Opacity of the H&E, 0 to 1. Smaller values make the tiles' colors stand out.
    cmap, vmin, vmax, alpha
        Colormap. Ends of the color range as log(1 + count), by default the 1st and 99th percentile of all drawn values
        of a range. Opacity of the tiles.
    key
        Name of the table of predictions or gene classes.
    image_key
        Name of the image to draw on. Default: the section's H&E.
    table_key
        Name of the table of counts or proteins.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`. For
        layers of the predictions see `stimage_sd.pl.uncertainty`.
    ax
        Two axes per gene to draw on, or one axes per gene without measured values. With several sections or regions, as
        many for each. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes of the observed and predicted map, ``(2,)``. There is one more dimension in front for a list of genes, one
    in front of that for a cohort, and one at the end for several regions: the whole map, then its windows. The title
    of the predicted map gives the correlation of both maps, or the AUC of classes.

    There are no observed maps if no gene was measured or the tiles are not on spots. If only some genes were measured,
    the observed panels of the other genes are empty.

    Raises
    ------
    KeyError
        If a section has no predictions, or none of a gene. The message lists the closest names. Also if `layer` is a
        layer of the predictions.
    ValueError
        If the number of axes in `ax` differs from the number of maps, `zoom` lies outside the image, or a cohort has
        several sections and `zoom` is given. Also if a gene has no pattern, as it was not measured or its tiles are not
        on a lattice.

    Notes
    -----
    Paper, Figures 1c, 1d, 1f, 1g, 2d, 3, 5b, S5e to S10 and S11.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_prediction_plot", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> observed, predicted = sti.pl.prediction(section, model.genes[0])
    >>> observed.get_title() == f"{model.genes[0]}, observed"
    True
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    if scale not in get_args(Scale):
        raise ValueError(f"Expected `scale` to be one of {list(get_args(Scale))}, found {scale!r}.")
    cohort = contract.sections(data)
    genes = names_of(gene)
    tables = {name: contract.predictions(sdata, key) for name, sdata in cohort.items()}
    for table in tables.values():
        for name in genes:
            check_gene(table, name)
    regions = regions_of_cohort(cohort, zoom, image_key)
    _check_layer(tables, layer)
    source = contract.Source(table_key, layer)
    values = {name: shown(cohort[name], table, genes, source) for name, table in tables.items()}
    if max_ood is not None:
        colors = replace(colors, cmap=plt.get_cmap(cmap).with_extremes(bad=UNLIKE))
        values = {name: _familiar(of, tables[name], max_ood) for name, of in values.items()}
    if scale == "pattern":
        values = {
            section: {
                name: as_patterns(one, contract.places(cohort[section], tables[section])) for name, one in of.items()
            }
            for section, of in values.items()
        }
    n_maps = 2 if any(one.observed is not None for of in values.values() for one in of.values()) else 1
    of_cohort = not isinstance(data, SpatialData)
    of_classes = any(one.kind for of in values.values() for one in of.values())
    layout = _Layout.of(len(cohort) if of_cohort else 0, len(genes), n_maps, regions, of_classes=of_classes)
    first = next(iter(cohort))
    size = map_size(
        cohort[first], contract.places(cohort[first], tables[first]), width=layout.width, below=layout.below,
        zoom=None if regions.several else regions.boxes[0],
    )  # fmt: skip
    shape = len(cohort), len(genes), n_maps, len(regions.boxes)
    axes = sheet.panels(math.prod(shape), size=size, columns=layout.columns).reshape(shape)
    for index, name in enumerate(genes):
        of_gene = [values[section][name] for section in cohort]
        looks = _looks(of_gene, colors, scale)
        drawn: list[list[ScalarMappable | None]] = []
        for number, (section, sdata) in enumerate(cohort.items()):
            draw = partial(
                _map, sdata=sdata, table=tables[section], image_key=image_key, img_alpha=img_alpha, alpha=alpha,
            )  # fmt: skip
            heading = f"{section}: {name}" if of_cohort else name
            maps = _pair(of_gene[number], heading, looks, draw, n_maps)
            drawn.append(draw_maps(maps, axes[number, index], regions))
        _explain(axes[:, index], drawn, looks, name if of_cohort else "", together=of_cohort)
    return sheet.done(kept_axes(axes, [of_cohort, not isinstance(gene, str), True, regions.several]))


def _check_layer(tables: Mapping[str, AnnData], layer: str | None) -> None:
    """Refuse a layer of the predictions, since `layer` names a layer of the counts."""
    if layer is not None and any(layer in table.layers for table in tables.values()):
        raise KeyError(
            f"`layer` names a layer of the counts, and {layer!r} is a layer of the predictions. Draw it by "
            "`stimage_sd.pl.uncertainty(data, gene)`, or by "
            f"`squidpy.pl.spatial_scatter(stimage_sd.io.to_anndata(data), color=gene, layer={layer!r})`."
        )


def _familiar(values: dict[str, Shown], table: AnnData, max_ood: float) -> dict[str, Shown]:
    """Hide the predictions of tiles that are too far from the training tiles."""
    outside = table.obs["ood_score"].to_numpy() > max_ood
    gray = f"gray: ood_score above {max_ood:g}"
    hidden = {}
    for gene, one in values.items():
        first, second = one.labels
        hidden[gene] = one._replace(
            predicted=np.where(outside, np.nan, one.predicted),
            labels=(first, f"{second}\n{gray}"),
            one_scale=None if one.one_scale is None else f"{one.one_scale}; {gray}",
            agreement="all tiles unlike" if outside.all() else one.agreement,
        )
    return hidden


def _has_values(drawn: ScalarMappable) -> bool:
    values = drawn.get_array()
    return values is not None and bool(np.isfinite(np.ma.filled(values, np.nan)).any())


class _Layout(NamedTuple):
    """Panels per row, width of a map, and height of what is under a map, inches."""

    columns: int
    width: float
    below: float

    @classmethod
    def of(cls, n_sections: int, n_genes: int, n_maps: int, regions: Regions, *, of_classes: bool) -> _Layout:
        if regions.several:
            return cls(len(regions.boxes), 3.6, 0.7)
        if n_sections:
            pairs = n_genes * n_maps
            beside = max(1, min(round(math.sqrt(1.5 * n_sections * pairs) / pairs), 8 // pairs, n_sections))
            return cls(pairs * beside, 2.9, 0.4)
        width = 5.2 if n_genes == 1 else 4.4
        # rows of about the same length
        beside = math.ceil(n_genes / math.ceil(n_genes / _IN_A_ROW))
        return cls(n_maps if n_maps == 2 else beside, width, 0.4 if of_classes else 0.95)


class _Look(NamedTuple):
    """Colors of the measured or the predicted maps of a gene, and the label of their color bar."""

    cmap: str | Colormap
    norm: Normalize
    label: str
    shared: bool


def _looks(of_gene: Sequence[Shown], colors: Colors, scale: Scale) -> tuple[_Look, _Look]:
    if any(one.kind for one in of_gene):
        cmap = ListedColormap(list(CLASS_COLORS.values()))
        return (_Look(cmap, class_norm(), "", shared=False),) * 2
    norms = norms_of(of_gene, colors, scale)
    measured = next((one for one in of_gene if one.observed is not None), None)
    if measured is not None and norms[0] is norms[1]:
        return (_Look(colors.cmap, norms[0], str(measured.one_scale), shared=True),) * 2
    labels = (measured or of_gene[0]).labels
    own = " (own scale)" if measured is not None else ""
    first, second = (
        _Look(colors.cmap, norm, f"{label}{own}", shared=False) for norm, label in zip(norms, labels, strict=True)
    )
    return first, second


def _pair(values: Shown, heading: str, looks: tuple[_Look, _Look], draw: Callable[..., Map], n_maps: int) -> list[Map]:
    """Return the measured and the predicted map of a gene."""
    kind = f" {values.kind}" if values.kind else ""
    agreement = f" ({values.agreement})" if values.agreement else ""
    every = np.arange(len(values.predicted))
    predicted = draw(every, values.predicted, look=looks[1], title=f"{heading}, predicted{kind}{agreement}")
    if n_maps == 1:
        return [predicted]
    if values.observed is None:
        name = heading.rsplit(": ", maxsplit=1)[-1]
        nothing = Map("", lambda ax, _: draw_nothing(ax, f"{name} was not measured"), lambda _: None)
        return [nothing, predicted]
    observed = draw(values.rows, values.observed, look=looks[0], title=f"{heading}, observed{kind}")
    return [observed, predicted]


def _map(
    rows: np.ndarray,
    values: np.ndarray,
    *,
    sdata: SpatialData,
    table: AnnData,
    image_key: str | None,
    img_alpha: float,
    alpha: float | None,
    look: _Look,
    title: str,
) -> Map:
    positions = contract.places(sdata, table)
    background = partial(
        draw_background, sdata=sdata, positions=positions, image_key=image_key, img_alpha=img_alpha
    )  # fmt: skip
    draw = partial(
        draw_rows, sdata=sdata, table=table, rows=rows, values=values, cmap=look.cmap, norm=look.norm, alpha=alpha
    )
    return Map(title, background, draw)


def _explain(
    axes: np.ndarray, drawn: list[list[ScalarMappable | None]], looks: tuple[_Look, _Look], gene: str, *, together: bool
) -> None:
    """Add color bars of a gene: one that all maps share, or one per map, or one for each kind of map of a cohort.

    `axes` are ``(n_sections, n_maps, n_regions)``.
    """
    prefix = f"{gene}: " if gene else ""
    if looks[0].label == "":
        # right of the first row of panels
        places = [(-panel.get_position().y1.round(3), -panel.get_position().x1, panel) for panel in axes.ravel()]
        add_legend(min(places, key=lambda place: place[:2])[2], CLASS_COLORS)
        return
    bars = [(axes, drawn[0][-1], looks[1])] if looks[0].shared else []
    if not bars:
        n_maps = axes.shape[1]
        for place, look in zip(range(n_maps), looks[-n_maps:], strict=True):
            shown_maps = [row[place] for row in drawn]
            # a map whose tiles are all gray needs no colors
            first = next((one for one in shown_maps if one is not None and _has_values(one)), None)
            bars.append((axes if together else axes[:, place, :1], first, look))
    for panels, mappable, look in bars:
        if mappable is not None:
            add_color_bar(panels, mappable, f"{prefix}{look.label}")
