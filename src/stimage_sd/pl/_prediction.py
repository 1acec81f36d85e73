"""Maps of measured and predicted genes, side by side on the H&E."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import Colors, add_color_bar, check_gene, column, draw_rows
from stimage_sd.pl._cells import Zoom
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import draw_background, draw_nothing, map_size, names_of
from stimage_sd.stats.spatial import pearson

#: maps per row without measured values
_IN_A_ROW = 4


def prediction(
    data: SpatialData,
    gene: str | Sequence[str],
    *,
    zoom: Zoom | None = None,
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
    """Draw measured values and predicted means of genes over the H&E, as log1p.

    Tables of predictions of nuclei or squares (`key`) are drawn in their outlines, which a `zoom` shows best.

    The measured values are the section's counts, or the gene's protein after
    ``stimage_sd.tl.evaluate(..., against="proteins")``.

    Each map has its own color range, because predicted means vary less than counts. The title of the prediction gives
    the correlation of both maps.

    Parameters
    ----------
    data
        A section with predictions.
    gene
        One or several predicted genes. Each gene gets a row of maps.
    zoom
        Left, top, right and bottom of the region to draw, H&E px. Default: all tiles.
    img_alpha
        Opacity of the H&E, 0 to 1. Smaller values make the tiles' colors stand out.
    cmap, vmin, vmax, alpha
        Colormap. Ends of the color range as log(1 + count), by default the 1st and 99th percentile of each map. Opacity
        of the tiles.
    key
        Name of the table of predictions.
    image_key
        Name of the image to draw on. Default: the section's H&E.
    table_key
        Name of the table of counts or proteins.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    ax
        Two axes per gene to draw on, or one axes per gene without measured values. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes of the observed and predicted map, or an array with one row per gene if `gene` is a list. There are no
    observed maps if no gene was measured or the tiles are not on spots. If only some genes were measured, the observed
    panels of the other genes are empty.

    Raises
    ------
    KeyError
        If the section has no predictions, or none of a gene. The message lists the closest names.
    ValueError
        If the number of axes in `ax` differs from the number of maps, or `zoom` lies outside the image.

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
    sdata = contract.section(data)
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, alpha)
    table = contract.predictions(sdata, key)
    genes = names_of(gene)
    for name in genes:
        check_gene(table, name)
    measured = _measured(sdata, table, genes, contract.Source(table_key, layer))
    positions = contract.places(sdata, table)
    size = map_size(sdata, positions, width=5.2 if len(genes) == 1 else 4.4, below=0.95, zoom=zoom)
    columns = 2 if measured else 1
    axes = sheet.panels(len(genes) * columns, size=size, columns=columns if measured else _IN_A_ROW)
    draw = partial(
        _map, sdata=sdata, table=table, shown=positions, colors=colors, zoom=zoom, img_alpha=img_alpha,
        image_key=image_key,
    )  # fmt: skip
    every = np.arange(table.n_obs)
    grid = axes.reshape(len(genes), columns)
    for panels, name in zip(grid, genes, strict=True):
        predicted = np.log1p(column(table, name))
        heading = f"{name}, predicted"
        if name in measured:
            rows, observed, unit = measured[name]
            correlation = float(pearson(predicted[rows, None], observed[:, None])[0])
            heading += f" (Pearson r = {correlation:.2f})" if np.isfinite(correlation) else " (r undefined: constant)"
            draw(panels[0], rows, observed, label=f"log(1 + {unit})", title=f"{name}, observed")
        elif measured:
            draw_nothing(panels[0], f"{name} was not measured")
        draw(panels[-1], every, predicted, label="log(1 + predicted mean count)", title=heading)
    return sheet.done(axes if isinstance(gene, str) else grid)


def _measured(
    sdata: SpatialData, table: AnnData, genes: Sequence[str], source: contract.Source
) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """Return for each gene the rows of tiles on spots, log1p of the measured values, and their unit."""
    about = contract.about_instances(table)
    on_spots = about is None and "spot_id" in table.obs
    of_cells = about is not None and contract.has_cells(sdata, source.table)
    if not (on_spots or of_cells) or not (contract.has_units(sdata) or source.table is not None):
        return {}
    against = table.uns.get("evaluation", {}).get("against")
    if against is None:
        against = "counts" if contract.has_counts(sdata) else "proteins"
    rows, units = contract.align(sdata, table, source, against=against)
    measured = {}
    for gene in genes:
        name = str(table.var["measured"][gene]) if against == "proteins" and "measured" in table.var else gene
        if name in units.var_names:
            values = column(units, name)
            signed = np.sign(values) * np.log1p(np.abs(values))
            measured[gene] = rows, signed, "count" if against == "counts" else f"intensity of {name}"
    return measured


def _map(
    ax: Axes,
    rows: np.ndarray,
    values: np.ndarray,
    *,
    sdata: SpatialData,
    table: AnnData,
    shown: np.ndarray,
    colors: Colors,
    zoom: Zoom | None,
    img_alpha: float,
    image_key: str | None,
    label: str,
    title: str,
) -> None:
    draw_background(ax, sdata, shown, image_key=image_key, img_alpha=img_alpha, zoom=zoom)
    drawn = draw_rows(ax, sdata, table, rows, values, colors=colors)
    add_color_bar(ax, drawn, label)
    ax.set_title(title, fontsize=11)
