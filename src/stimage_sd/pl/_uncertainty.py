"""How sure a prediction is, and of which kind its doubt is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import add_colour_bar, check_gene, column, draw_section, draw_tiles, map_size, panels


def uncertainty(
    sdata: SpatialData,
    gene: str,
    *,
    cmap: str = "viridis",
    fade: float = 0.35,
    image_key: str | None = None,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw a gene's predicted mean over the H&E, and beside it how sure it is, all in counts.

    Parameters
    ----------
    sdata
        A section with predictions.
    gene
        One of the predicted genes.
    cmap
        Name of a matplotlib colour map, for the three maps of uncertainty.
    fade
        How far towards white the H&E is faded, 0 to 1.
    image_key
        The image to draw on; by default the section's H&E.
    ax
        Four axes to draw on; a new figure by default.

    Returns
    -------
    The four axes: mean; aleatoric standard deviation (the counts' own scatter); epistemic standard deviation
    (how far the members of the ensemble disagree); width of the central interval.

    Raises
    ------
    KeyError
        If the section has no predictions, or the gene is none of them; the closest names are given.
    ValueError
        If `ax` is not four axes.

    Notes
    -----
    Paper, section 2.4; the layers ``aleatoric`` and ``epistemic`` are variances, drawn as their square roots.

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
    table = contract.predictions(sdata)
    check_gene(table, gene)
    nominal = float(table.uns["prediction"]["coverage"])
    maps = {
        f"{gene}, predicted mean": (column(table, gene), "counts"),
        "aleatoric (the counts' scatter)": (np.sqrt(column(table, gene, "aleatoric")), "standard deviation, counts"),
        "epistemic (members disagree)": (np.sqrt(column(table, gene, "epistemic")), "standard deviation, counts"),
        f"width of the {nominal:.0%} interval": (
            column(table, gene, "upper") - column(table, gene, "lower"),
            "counts",
        ),
    }
    positions = np.asarray(table.obsm["spatial"])
    axes = panels(ax, len(maps), size=map_size(sdata, positions, width=4.0, below=1.1))
    for number, (panel, (title, (values, label))) in enumerate(zip(axes, maps.items(), strict=True)):
        draw_section(panel, sdata, positions, image_key=image_key, fade=fade)
        drawn = draw_tiles(panel, sdata, positions, values, cmap="magma" if number == 0 else cmap)
        add_colour_bar(panel, drawn, label)
        panel.set_title(title, fontsize=11)
    return axes
