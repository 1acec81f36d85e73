"""Maps of predicted means and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from anndata import AnnData
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import Colors, add_color_bar, check_gene, column, draw_rows
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import Map, draw_background, draw_maps, kept_axes, map_size, names_of, regions_of_cohort
from stimage_sd.pl._zoom import Zooms

#: maps per gene
_MAPS = 4


def uncertainty(
    data: SpatialData | contract.Cohort,
    gene: str | Sequence[str],
    *,
    zoom: Zooms | None = None,
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
        A section with predictions, or a cohort of such sections. Each section has its own color ranges.
    gene
        One or several predicted genes. Each gene gets a row of maps.
    zoom
        Left, top, right and bottom of the region to draw, H&E px. Default: all tiles. Several regions, as a list or
        keyed by name: each map is drawn whole, with a window for each region beside it.
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
        Four axes per gene to draw on. With several sections or regions, as many for each. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The four axes: mean, aleatoric standard deviation (scatter of the counts), epistemic standard deviation
    (disagreement of the members), and width of the central interval, ``(4,)``. There is one more dimension in front for
    a list of genes, one in front of that for a cohort, and one at the end for several regions.

    Raises
    ------
    KeyError
        If the section has no predictions, or none of a gene. The message lists the closest names.
    ValueError
        If `ax` is not four axes per gene, `zoom` lies outside the image, or a cohort has several sections and `zoom` is
        given.

    Notes
    -----
    Paper, section 2.4, and Figure 2a and 2b. The layers ``aleatoric`` and ``epistemic`` are variances. The maps show
    their square roots.

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
    sheet = Sheet(ax, title, figsize, save, return_fig)
    mean_colors, colors = Colors("magma", vmin, vmax, alpha), Colors(cmap, vmin, vmax, alpha)
    cohort = contract.sections(data)
    genes = names_of(gene)
    tables = {name: contract.predictions(sdata, key) for name, sdata in cohort.items()}
    for table in tables.values():
        for name in genes:
            check_gene(table, name)
    regions = regions_of_cohort(cohort, zoom, image_key)
    first = next(iter(cohort))
    size = map_size(
        cohort[first], contract.places(cohort[first], tables[first]), width=4.0, below=0.95,
        zoom=None if regions.several else regions.boxes[0],
    )  # fmt: skip
    shape = len(cohort), len(genes), _MAPS, len(regions.boxes)
    columns = len(regions.boxes) if regions.several else _MAPS
    axes = sheet.panels(math.prod(shape), size=size, columns=columns).reshape(shape)
    of_cohort = not isinstance(data, SpatialData)
    for row, (section, sdata) in zip(axes, cohort.items(), strict=True):
        positions, every = contract.places(sdata, tables[section]), np.arange(tables[section].n_obs)
        background = partial(
            draw_background, sdata=sdata, positions=positions, image_key=image_key, img_alpha=img_alpha
        )  # fmt: skip
        for panels, name in zip(row, genes, strict=True):
            maps = []
            for index, (heading, (values, label)) in enumerate(_values(tables[section], name).items()):
                look = colors if index else mean_colors
                draw = partial(
                    draw_rows, sdata=sdata, table=tables[section], rows=every, values=values, cmap=look.cmap,
                    norm=look.norm(values), alpha=alpha,
                )  # fmt: skip
                text = f"{section}: {heading}" if of_cohort and not index else heading
                maps.append(Map(text, background, draw, partial(_explain, label=label)))
            draw_maps(maps, panels, regions)
    return sheet.done(kept_axes(axes, [of_cohort, not isinstance(gene, str), True, regions.several]))


def _explain(axes: np.ndarray, drawn: ScalarMappable | None, *, label: str) -> None:
    if drawn is not None:
        add_color_bar(axes[0], drawn, label)


def _values(table: AnnData, gene: str) -> dict[str, tuple[np.ndarray, str]]:
    """Return values and color bar label, keyed by map title."""
    of_model = "members disagree, patients differ" if "shift" in table.layers else "members disagree"
    nominal = float(table.uns["prediction"]["coverage"])
    return {
        f"{gene}, predicted mean": (column(table, gene), "counts"),
        "aleatoric (the counts' scatter)": (np.sqrt(column(table, gene, "aleatoric")), "standard deviation, counts"),
        f"epistemic ({of_model})": (np.sqrt(column(table, gene, "epistemic")), "standard deviation, counts"),
        f"width of the {nominal:.0%} interval": (
            column(table, gene, "upper") - column(table, gene, "lower"),
            "counts",
        ),
    }
