"""A gene as it was measured and as it is predicted, side by side on the H&E."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.nn.spatial import pearson
from stimage_sd.pl._canvas import add_colour_bar, check_gene, column, draw_section, draw_tiles, map_size, panels


def prediction(
    sdata: SpatialData,
    gene: str,
    *,
    cmap: str = "magma",
    fade: float = 0.35,
    image_key: str | None = None,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw a gene over the H&E: log1p of what was measured, and of its predicted mean.

    What was measured are the section's counts, or what `stimage_sd.tl.evaluate` compared with last: the gene's
    protein, where it was ``against="proteins"``.

    Each map has its own range of colours, the 1st to the 99th percentile, named by its colour bar: a predicted
    mean varies less than counts do. The title of the prediction has their correlation.

    Parameters
    ----------
    sdata
        A section with predictions.
    gene
        One of the predicted genes.
    cmap
        Name of a matplotlib colour map.
    fade
        How far towards white the H&E is faded, 0 to 1.
    image_key
        The image to draw on; by default the section's H&E.
    table_key
        Name of the table of counts, or proteins.
    ax
        Two axes to draw on (one, where there is nothing measured); a new figure by default.

    Returns
    -------
    The axes: observed and predicted; the prediction alone where nothing was measured on the section, its tiles
    do not sit on spots, or the gene was not measured.

    Raises
    ------
    KeyError
        If the section has no predictions, or the gene is none of them; the closest names are given.
    ValueError
        If `ax` is not as many axes as there are maps.

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
    table = contract.predictions(sdata)
    check_gene(table, gene)
    measured = _measured(sdata, gene, table_key)
    positions = np.asarray(table.obsm["spatial"])
    axes = panels(ax, 1 if measured is None else 2, size=map_size(sdata, positions, width=5.2, below=1.1))
    predicted = np.log1p(column(table, gene))
    title = f"{gene}, predicted"
    if measured is not None:
        rows, observed, unit = measured
        correlation = float(pearson(predicted[rows, None], observed[:, None])[0])
        title += f" (Pearson r = {correlation:.2f})" if np.isfinite(correlation) else " (r undefined: constant)"
        _map(axes[0], sdata, positions[rows], observed, positions, cmap=cmap, fade=fade, image_key=image_key)
        add_colour_bar(axes[0], axes[0].collections[0], f"log(1 + {unit})")
        axes[0].set_title(f"{gene}, observed", fontsize=11)
    _map(axes[-1], sdata, positions, predicted, positions, cmap=cmap, fade=fade, image_key=image_key)
    add_colour_bar(axes[-1], axes[-1].collections[0], "log(1 + predicted mean count)")
    axes[-1].set_title(title, fontsize=11)
    return axes


def _measured(sdata: SpatialData, gene: str, table_key: str | None) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Rows of the predictions that sit on a unit, log1p of what was measured there, and what that is."""
    table = contract.predictions(sdata)
    if "spot_id" not in table.obs or not (contract.has_units(sdata) or table_key is not None):
        return None
    against = table.uns.get("evaluation", {}).get("against")
    if against is None:
        against = "counts" if contract.has_counts(sdata) else "proteins"
    rows, units = contract.align_to_spots(sdata, table, table_key, against=against)
    name = str(table.var["measured"][gene]) if against == "proteins" and "measured" in table.var else gene
    if name not in units.var_names:
        return None
    values = column(units, name)
    signed = np.sign(values) * np.log1p(np.abs(values))
    return rows, signed, "count" if against == "counts" else f"intensity of {name}"


def _map(
    ax: Axes,
    sdata: SpatialData,
    positions: np.ndarray,
    values: np.ndarray,
    shown: np.ndarray,
    *,
    cmap: str,
    fade: float,
    image_key: str | None,
) -> None:
    draw_section(ax, sdata, shown, image_key=image_key, fade=fade)
    draw_tiles(ax, sdata, positions, values, cmap=cmap)
