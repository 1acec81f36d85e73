"""Summarize the predictions of a slide's tiles in one row, as for bulk expression."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.stats.lattice import neighbor_graph
from stimage_sd.stats.spatial import morans_i

#: layers of the cohort table beside the mean in ``X``
SUMMARIES = ("median", "q90", "heterogeneity", "morans_i", "epistemic")
#: genes per block of the quantiles
_GENES = 128
#: neighbors of a tile, for Moran's I
_NEIGHBORS = 6


def pseudobulk(data: SpatialData | contract.Cohort, *, key: str = contract.PREDICTIONS) -> ad.AnnData:
    """Summarize the predictions of each slide in one row.

    Parameters
    ----------
    data
        A section or a cohort with predictions.
    key
        Name of the table of predictions.

    Returns
    -------
    Slides x genes, for the genes common to all slides. ``X`` is the mean over tiles. Layer ``median`` is the median
    over tiles and ``q90`` the 90th percentile. Layer ``heterogeneity`` is the coefficient of variation over tiles.
    Layer ``morans_i`` is Moran's I of log1p of the predictions, with the six nearest tiles as neighbors. Layer
    ``epistemic`` is the mean over tiles of the variance between members. ``obs`` has ``n_tiles`` and ``ood_score``
    (mean over tiles).

    Raises
    ------
    KeyError
        If a section has no predictions.
    ValueError
        If sections have no gene in common.

    Notes
    -----
    Paper, section 2.10: "averaged across all spots".

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_pseudobulk", n_spots=40, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> sti.tl.pseudobulk(section).shape
    (1, 5)
    """
    tables = {name: contract.predictions(sdata, key) for name, sdata in contract.sections(data).items()}
    rows = {name: summary_of(table) for name, table in tables.items()}
    return stacked(rows, {name: about_tiles(table) for name, table in tables.items()})


def summary_of(table: ad.AnnData) -> pd.DataFrame:
    """Summarize predictions over tiles, one row per gene, columns ``mean`` and `SUMMARIES`, ``float64``."""
    values = np.asarray(table.X)
    mean = values.mean(axis=0, dtype=np.float64)
    deviation = np.sqrt(np.maximum(values.var(axis=0, dtype=np.float64), 0))
    median, high = np.empty(len(mean)), np.empty(len(mean))
    for start in range(0, len(mean), _GENES):
        part = slice(start, start + _GENES)
        median[part], high[part] = np.quantile(values[:, part], [0.5, 0.9], axis=0)
    spread = np.full(len(mean), np.nan)
    if len(values) > _NEIGHBORS:
        graph = neighbor_graph(np.asarray(table.obsm["spatial"]), n_neighbors=_NEIGHBORS)
        spread = morans_i(np.log1p(values), graph)
    return pd.DataFrame(
        {
            "mean": mean,
            "median": median,
            "q90": high,
            "heterogeneity": deviation / np.where(mean > 0, mean, np.nan),
            "morans_i": spread,
            "epistemic": np.asarray(table.layers["epistemic"]).mean(axis=0, dtype=np.float64),
        },
        index=table.var_names,
    )


def about_tiles(table: ad.AnnData) -> dict[str, float]:
    """Return the number of tiles and their mean out-of-distribution score."""
    return {"n_tiles": table.n_obs, "ood_score": float(table.obs["ood_score"].mean())}


def stacked(rows: dict[str, pd.DataFrame], about: dict[str, dict[str, float]]) -> ad.AnnData:
    """Stack the summaries of slides in one table."""
    genes = next(iter(rows.values())).index
    for row in rows.values():
        genes = genes[genes.isin(row.index)]
    if not len(genes):
        raise ValueError("The slides have no predicted gene in common. Predict all of them with one model.")
    chosen = {name: row.loc[genes] for name, row in rows.items()}

    def layer(column: str) -> np.ndarray:
        return np.array([row[column].to_numpy() for row in chosen.values()], dtype=np.float32)

    obs = pd.DataFrame.from_dict(about, orient="index")
    return ad.AnnData(layer("mean"), obs, pd.DataFrame(index=genes), layers={name: layer(name) for name in SUMMARIES})
