"""Score predicted gene classes, High or Low, against measured counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import rankdata
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._gene_classifier import is_high
from stimage_sd.stats.spatial import binary_pattern, morans_i
from stimage_sd.tl._score.evaluate import dense, measured_names, pattern_ious
from stimage_sd.tl._score.graphs import Graph, weights_of

METRICS = (
    "base_rate",
    "auc",
    "f1",
    "balanced_accuracy",
    "iou",
    "morans_i_observed",
    "morans_i_predicted",
    "bivariate_morans_i",
)


def evaluate_genes_high(
    data: SpatialData | contract.Cohort,
    *,
    graph: Graph | None = None,
    key: str = contract.GENE_CLASSES,
    table_key: str | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Compare predicted gene classes with classes from the counts measured on the same spots.

    Observed classes follow the rule of the classifier. A gene is High where its log1p count is above the mean over the
    tiles of the section. With ``standardize="cohort"``, the threshold is the mean over the training tiles.

    Parameters
    ----------
    data
        A section or a cohort of sections with predicted classes and counts.
    graph
        Spatial weights between the predicted tiles on a measured spot, as in `stimage_sd.tl.evaluate`.
    key
        Name of the class table.
    table_key
        Name of the count table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    A table with one row per section and gene. Columns are ``section``, ``gene``, ``n_tiles`` and:

    - ``base_rate``: share of the tiles on which the gene is observed High;
    - ``auc``: area under the ROC curve of the probability of High;
    - ``f1``, ``balanced_accuracy``: scores of the classes at a probability of one half;
    - ``iou``: overlap of the smoothed patterns of High (paper, 2.8). The IoU is 0 if the gene is predicted High
      nowhere, and NaN with a warning if the tiles are not on a lattice;
    - ``morans_i_observed`` of the observed classes, ``morans_i_predicted`` of the probability of High, and
      ``bivariate_morans_i`` (the probability against the neighbors' observed classes). NaN if the tiles are not on a
      lattice and no `graph` is given.

    A gene observed in one class only gets NaN in all columns except the base rate and ``morans_i_predicted``. The
    scores are also written to ``tables["gene_classes"].var``.

    Raises
    ------
    KeyError
        If a section has no predicted classes, counts, or tiles on spots.
    ValueError
        If no predicted gene was measured.

    Notes
    -----
    Paper, sections 2.6, 2.8 and 3.10.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_high", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> genes = sti.pp.select_genes(section, n_top=5)
    >>> sti.tl.predict(section, sti.tl.fit_gene_classifier(section, genes=genes))
    >>> len(sti.tl.evaluate_genes_high(section))
    5
    """
    source = contract.Source(table_key, layer)
    tables = []
    for name, sdata in contract.sections(data).items():
        classes = contract.gene_classes(sdata, key)
        rows, units = contract.align_to_spots(sdata, classes, source)
        genes = list(measured_names(classes, units, {}, section=name, against="counts"))
        compared = classes[rows, genes]
        by_cohort = classes.uns["prediction"]["standardize"] == "cohort"
        thresholds = compared.var["threshold"].to_numpy(dtype=np.float64) if by_cohort else None
        observed = is_high(dense(units[:, genes]), thresholds)
        high = compared.layers["high"]
        probability, centers = np.asarray(compared.X, np.float64), contract.tile_geometry(sdata, classes).centers[rows]
        predicted = np.asarray(high.toarray() if sp.issparse(high) else high, dtype=bool)
        scores = _scores(probability, predicted, observed, centers).set_axis(genes)
        scores = scores.join(
            _in_space(probability, observed.astype(np.float64), centers, graph, section=name).set_axis(genes)
        )
        for metric in METRICS:
            # column `base_rate` holds the base rate in training
            column = "observed_base_rate" if metric == "base_rate" else metric
            classes.var[column] = scores[metric].reindex(classes.var_names)
        contract.record(sdata, "tl.evaluate_genes_high", n_genes=len(genes), n_tiles=len(rows))
        tables.append(scores.rename_axis("gene").reset_index().assign(section=name, n_tiles=len(rows)))
    return pd.concat(tables, ignore_index=True)[["section", "gene", "n_tiles", *METRICS]]


def _scores(probability: np.ndarray, high: np.ndarray, observed: np.ndarray, coordinates: np.ndarray) -> pd.DataFrame:
    n_high, n_low = observed.sum(axis=0), (~observed).sum(axis=0)
    both = (n_high > 0) & (n_low > 0)
    hits = (high & observed).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # AUC from the Mann-Whitney rank sum of the High tiles, with average ranks for ties
        ranks = (rankdata(probability, axis=0) * observed).sum(axis=0)
        auc = (ranks - n_high * (n_high + 1) / 2) / (n_high * n_low)
        f1 = 2 * hits / (high.sum(axis=0) + n_high)
        balanced = (hits / n_high + (~high & ~observed).sum(axis=0) / n_low) / 2
    iou = pattern_ious(high.astype(np.float64), observed.astype(np.float64), coordinates)
    if high.shape[0] and not np.isnan(iou).all():
        iou = np.where(~high.any(axis=0), 0.0, iou)
        everywhere = high.all(axis=0)
        if everywhere.any():
            iou[everywhere] = binary_pattern(observed[:, everywhere].astype(np.float64), coordinates).mean(axis=0)
    scores = pd.DataFrame({"auc": auc, "f1": f1, "balanced_accuracy": balanced, "iou": iou})
    scores.loc[~both] = np.nan
    return scores.assign(base_rate=observed.mean(axis=0))


def _in_space(
    probability: np.ndarray, observed: np.ndarray, centers: np.ndarray, graph: Graph | None, *, section: str
) -> pd.DataFrame:
    """Return Moran's I of classes and probabilities, NaN for tiles on no lattice."""
    try:
        weights = weights_of(graph, centers, section=section)
    except ValueError:
        if graph is not None:
            raise
        # the IoU is left out too, with a warning
        return pd.DataFrame(np.nan, index=range(observed.shape[1]), columns=list(METRICS[-3:]))
    scores = (morans_i(observed, weights), morans_i(probability, weights), morans_i(probability, weights, observed))
    return pd.DataFrame(dict(zip(METRICS[-3:], scores, strict=True)))
