"""Score predicted classes of genes, High or Low, against measured counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import rankdata
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._gene_classifier import is_high
from stimage_sd.nn.spatial import binary_pattern
from stimage_sd.tl._evaluate import _dense, _iou, _measured_names

METRICS = ("base_rate", "auc", "f1", "balanced_accuracy", "iou")


def evaluate_genes_high(data: SpatialData | contract.Cohort, *, table_key: str | None = None) -> pd.DataFrame:
    """Compare predicted classes of genes with what was measured on the spots that the tiles sit on.

    Observed classes follow the classifier's own rule: log1p counts above their mean over the section's tiles, or,
    where the classifier was fitted with ``standardize="cohort"``, above the training tiles' mean.

    Parameters
    ----------
    data
        A section, or a cohort of them, with predicted classes and counts.
    table_key
        Name of the table of counts.

    Returns
    -------
    A row a section and gene: ``section``, ``gene``, ``n_tiles`` and

    - ``base_rate``: share of the tiles on which the gene is observed High;
    - ``auc``: area under the ROC curve of the probability of High;
    - ``f1``, ``balanced_accuracy``: of the classes at a probability of one half;
    - ``iou``: overlap of the smoothed patterns of High (paper, 2.8); 0 where the gene is predicted High nowhere;
      NaN, with a warning, where the tiles stand on no lattice.

    A gene that is observed in one class only scores NaN in all but the base rate. The scores are written to
    ``tables["gene_classes"].var`` too.

    Raises
    ------
    KeyError
        If the section has no predicted classes or counts, or its tiles do not sit on spots.
    ValueError
        If no predicted gene was measured.

    Notes
    -----
    Paper, sections 2.6 and 2.8.

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
    tables = []
    for name, sdata in contract.sections(data).items():
        classes = contract.gene_classes(sdata)
        rows, units = contract.align_to_spots(sdata, classes, table_key)
        genes = list(_measured_names(classes, units, {}, section=name, against="counts"))
        compared = classes[rows, genes]
        by_cohort = classes.uns["prediction"]["standardize"] == "cohort"
        thresholds = compared.var["threshold"].to_numpy(dtype=np.float64) if by_cohort else None
        observed = is_high(_dense(units[:, genes]), thresholds)
        high = compared.layers["high"]
        scores = _scores(
            np.asarray(compared.X, dtype=np.float64),
            np.asarray(high.toarray() if sp.issparse(high) else high, dtype=bool),
            observed,
            np.asarray(compared.obsm["spatial"]),
        ).set_axis(genes)
        for metric in METRICS:
            # the training's base rate stays beside the section's own
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
        # the rank sum of the High tiles, ties at their average, is Mann and Whitney's statistic
        ranks = (rankdata(probability, axis=0) * observed).sum(axis=0)
        auc = (ranks - n_high * (n_high + 1) / 2) / (n_high * n_low)
        f1 = 2 * hits / (high.sum(axis=0) + n_high)
        balanced = (hits / n_high + (~high & ~observed).sum(axis=0) / n_low) / 2
    iou = _iou(high.astype(np.float64), observed.astype(np.float64), coordinates)
    if high.shape[0] and not np.isnan(iou).all():
        iou = np.where(~high.any(axis=0), 0.0, iou)
        everywhere = high.all(axis=0)
        if everywhere.any():
            iou[everywhere] = binary_pattern(observed[:, everywhere].astype(np.float64), coordinates).mean(axis=0)
    scores = pd.DataFrame({"auc": auc, "f1": f1, "balanced_accuracy": balanced, "iou": iou})
    scores.loc[~both] = np.nan
    return scores.assign(base_rate=observed.mean(axis=0))[list(METRICS)]
