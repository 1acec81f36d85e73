"""Maps of predicted means and their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import Colors, add_color_bar, check_gene, column, draw_rows
from stimage_sd.pl._cells import Zoom
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import draw_background, map_size, names_of

#: maps per gene
_MAPS = 4


def uncertainty(
    data: SpatialData,
    gene: str | Sequence[str],
    *,
    zoom: Zoom | None = None,
    img_alpha: float = 0.65,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    key: str = contract.PREDICTIONS,
    image_key: str | None = None,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw maps of the predicted mean and its uncertainty over the H&E, in counts.

    Parameters
    ----------
    data
        A section with predictions.
    gene
        One or several predicted genes. Each gene gets a row of maps.
    zoom
        Left, top, right and bottom of the region to draw, H&E px. Default: all tiles.
    img_alpha
        Opacity of the H&E, 0 to 1.
    cmap, vmin, vmax, alpha
        Colormap of the three maps of uncertainty. Ends of the color range of all maps in counts, by default the 1st and
        99th percentile of each map. Opacity of the tiles.
    key
        Name of the table of predictions.
    image_key
        Name of the image to draw on. Default: the section's H&E.
    ax
        Four axes per gene to draw on. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The four axes: mean, aleatoric standard deviation (scatter of the counts), epistemic standard deviation
    (disagreement of the members), and width of the central interval. An array with one row per gene if `gene` is a
    list.

    Raises
    ------
    KeyError
        If the section has no predictions, or none of a gene. The message lists the closest names.
    ValueError
        If `ax` is not four axes per gene, or `zoom` lies outside the image.

    Notes
    -----
    Paper, section 2.4. The layers ``aleatoric`` and ``epistemic`` are variances. The maps show their square roots.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_uncertainty", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> len(sti.pl.uncertainty(section, model.genes[0]))
    4
    """
    sdata = contract.section(data)
    sheet = Sheet(ax, title, figsize, save, return_fig)
    mean_colors, colors = Colors("magma", vmin, vmax, alpha), Colors(cmap, vmin, vmax, alpha)
    table = contract.predictions(sdata, key)
    genes = names_of(gene)
    for name in genes:
        check_gene(table, name)
    positions, every = contract.places(sdata, table), np.arange(table.n_obs)
    size = map_size(sdata, positions, width=4.0, below=0.95, zoom=zoom)
    axes = sheet.panels(_MAPS * len(genes), size=size, columns=_MAPS)
    grid = axes.reshape(len(genes), _MAPS)
    for panels, name in zip(grid, genes, strict=True):
        for index, (panel, (heading, (values, label))) in enumerate(
            zip(panels, _maps(table, name).items(), strict=True)
        ):
            draw_background(panel, sdata, positions, image_key=image_key, img_alpha=img_alpha, zoom=zoom)
            drawn = draw_rows(panel, sdata, table, every, values, colors=colors if index else mean_colors)
            add_color_bar(panel, drawn, label)
            panel.set_title(heading, fontsize=11)
    return sheet.done(axes if isinstance(gene, str) else grid)


def _maps(table: AnnData, gene: str) -> dict[str, tuple[np.ndarray, str]]:
    """Return values and color bar label, keyed by map title."""
    nominal = float(table.uns["prediction"]["coverage"])
    return {
        f"{gene}, predicted mean": (column(table, gene), "counts"),
        "aleatoric (the counts' scatter)": (np.sqrt(column(table, gene, "aleatoric")), "standard deviation, counts"),
        "epistemic (members disagree)": (np.sqrt(column(table, gene, "epistemic")), "standard deviation, counts"),
        f"width of the {nominal:.0%} interval": (
            column(table, gene, "upper") - column(table, gene, "lower"),
            "counts",
        ),
    }
