"""Score accuracy, spatial pattern and calibration of predictions against counts or proteins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood import negative_binomial
from stimage_sd.likelihood.expectation import expected_log1p
from stimage_sd.stats.lattice import find_lattice, neighbor_graph
from stimage_sd.stats.spatial import morans_i, pattern_iou, pearson, spearman

Transform = Literal["log1p", "raw", "lognorm"]
METRICS = (
    "pearson",
    "spearman",
    "morans_i_observed",
    "morans_i_predicted",
    "bivariate_morans_i",
    "iou",
    "coverage",
    "nll",
    "nll_floor",
)


def evaluate(
    data: SpatialData | contract.Cohort,
    *,
    against: contract.Against = "counts",
    names: Mapping[str, str] | None = None,
    transform: Transform = "log1p",
    graph: sp.spmatrix | None = None,
    key: str = contract.PREDICTIONS,
    table_key: str | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Compare predictions with measurements on the same spots.

    Parameters
    ----------
    data
        A section or a cohort of sections with predictions and counts (or proteins).
    against
        ``"counts"``: RNA counts of any platform. ``"proteins"``: intensities of the gene's protein, such as from CODEX.
        Coverage and likelihood apply to counts only and are NaN for proteins.
    names
        Measured names of genes that go by another name, such as ``{"MS4A1": "CD20"}``. All other genes keep their
        name.
    transform
        Scale of correlations, Moran's I and IoU. ``"log1p"``: of counts and means. Negative intensities, which
        compensation can leave, keep their sign. ``"raw"``: no transform. ``"lognorm"``: scaled to the median total over
        the predicted genes, then log1p (counts only). Log-normalized counts are compared with their expectation under
        the predicted distribution (`stimage_sd.likelihood.expectation`).
    graph
        Spatial weights, sparse ``(n, n)`` over the predicted tiles on a measured spot. Default: the eight neighbors on
        a square lattice, or the six neighbors on a hexagonal lattice. Rows are standardized.
    key
        Name of the prediction table.
    table_key
        Name of the count or protein table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    A table with one row per section and gene. Columns are ``section``, ``gene``, ``n_tiles`` and:

    - ``pearson``, ``spearman``: correlation of predicted mean and measurement over tiles;
    - ``morans_i_observed``, ``morans_i_predicted``, ``bivariate_morans_i`` (predicted against neighbors' observed);
    - ``iou``: overlap of the smoothed patterns of high expression (paper, 2.8), NaN with a warning if the tiles are
      not on a lattice;
    - ``coverage``: share of counts inside the 90 % interval;
    - ``nll``: negative log-likelihood per count, under the negative binomial with the predicted mean and total
      variance;
    - ``nll_floor``: negative log-likelihood per count under the mean-only fit to the training counts.

    Coverage and likelihood need predictions at the measured depth of each spot. For predictions at median depth, from
    a model with size factors, they are NaN with a warning. To get them, predict with ``size_factors="total"``.

    Constant genes get NaN in scores that are undefined for them. The scores are also written to
    ``tables["predictions"].var``, with the measured name of each gene in column ``measured``.

    Raises
    ------
    KeyError
        If a section has no predictions, counts or proteins, or no tiles on spots. Also if `names` has genes that were
        not predicted, or names that were not measured.
    ValueError
        If no predicted gene was measured.

    Notes
    -----
    Paper, sections 2.7 and 2.8.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_evaluate", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> len(sti.tl.evaluate(section))
    5
    """
    source = contract.Source(table_key, layer)
    if transform not in ("log1p", "raw", "lognorm"):
        raise ValueError(f'Expected `transform` to be "log1p", "raw" or "lognorm", found {transform!r}.')
    if against not in ("counts", "proteins"):
        raise ValueError(f'Expected `against` to be "counts" or "proteins", found {against!r}.')
    if against == "proteins" and transform == "lognorm":
        raise ValueError('Intensities of proteins have no total to scale to: use `transform="log1p"` or "raw".')
    tables = []
    for name, sdata in contract.sections(data).items():
        predictions = contract.predictions(sdata, key)
        rows, units = contract.align_to_spots(sdata, predictions, source, against=against)
        measured = measured_names(predictions, units, names or {}, section=name, against=against)
        compared = _taken(sdata, predictions, rows, list(measured))
        observed = dense(units[:, list(measured.values())])
        scores = _agreement(compared, observed, transform, graph)
        problem = contract.depth_problem(sdata, predictions) if against == "counts" else None
        if problem:
            warnings.warn(f"Coverage and likelihood are left out. {problem}", stacklevel=2)
        elif against == "counts":
            scores = scores.join(_calibration(compared, observed))
        scores = scores.reindex(columns=list(METRICS))
        for metric in METRICS:
            predictions.var[metric] = scores[metric].reindex(predictions.var_names)
        predictions.var["measured"] = [measured.get(gene, "") for gene in predictions.var_names]
        predictions.uns["evaluation"] = {"against": against, "transform": transform, "n_tiles": len(rows)}
        contract.record(
            sdata, "tl.evaluate", against=against, transform=transform, n_genes=len(measured), n_tiles=len(rows)
        )
        tables.append(scores.rename_axis("gene").reset_index().assign(section=name, n_tiles=len(rows)))
    return pd.concat(tables, ignore_index=True)[["section", "gene", "n_tiles", *METRICS]]


def measured_names(
    predictions: ad.AnnData, units: ad.AnnData, names: Mapping[str, str], *, section: str, against: str
) -> dict[str, str]:
    """Return the measured name of each predicted gene that was measured."""
    names = dict(zip(names, contract.without_versions(pd.Index([*names.values()])), strict=True))
    unknown = [gene for gene in names if gene not in predictions.var_names]
    absent = [name for name in names.values() if name not in units.var_names]
    if unknown or absent:
        what = f"genes that were not predicted: {unknown}" if unknown else f"names that were not measured: {absent}"
        raise KeyError(
            f"`names` has {what}. Section {section!r} has predictions of {list(predictions.var_names[:5])} and others, "
            f"{against} of {list(units.var_names[:40])}."
        )
    measured = {gene: names.get(gene, gene) for gene in predictions.var_names}
    measured = {gene: name for gene, name in measured.items() if name in units.var_names}
    if not measured:
        raise ValueError(
            f"None of the {predictions.n_vars} predicted genes was measured in section {section!r}, such as "
            f"{predictions.var_names[0]!r}; its {against} are {list(units.var_names[:5])} and others. If genes have "
            'other names there, pass `names={"GENE": "NAME"}`.'
        )
    return measured


class _Predicted(NamedTuple):
    """Predictions of some tiles and genes as plain arrays, since access to a table view takes a millisecond.

    Attributes
    ----------
    genes
        Gene names.
    coordinates
        Tile centers, ``(n_tiles, 2)``.
    mean, variance, lower, upper
        ``(n_tiles, n_genes)``.
    size_factor
        ``float64 (n_tiles,)``.
    floor_mean, floor_dispersion
        ``float64 (n_genes,)``.
    """

    genes: list[str]
    coordinates: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    size_factor: np.ndarray
    floor_mean: np.ndarray
    floor_dispersion: np.ndarray


def _taken(sdata: SpatialData, predictions: ad.AnnData, rows: np.ndarray, genes: list[str]) -> _Predicted:
    at = np.ix_(rows, predictions.var_names.get_indexer(genes))
    floors = (predictions.var[name].to_numpy(dtype=np.float64)[at[1][0]] for name in ("floor_mean", "floor_dispersion"))
    return _Predicted(
        genes,
        contract.tile_geometry(sdata, predictions).centers[rows],
        np.asarray(predictions.X)[at].astype(np.float64),
        np.asarray(predictions.layers["total_variance"])[at].astype(np.float64),
        np.asarray(predictions.layers["lower"])[at],
        np.asarray(predictions.layers["upper"])[at],
        predictions.obs["size_factor"].to_numpy(dtype=np.float64)[rows],
        *floors,
    )


def dense(units: ad.AnnData) -> np.ndarray:
    """Return the matrix of a table as ``float64 (n_units, n_genes)``."""
    return np.asarray(units.X.toarray() if sp.issparse(units.X) else units.X, dtype=np.float64)


def _agreement(
    predictions: _Predicted, observed: np.ndarray, transform: Transform, graph: sp.spmatrix | None
) -> pd.DataFrame:
    """Score how well predicted means follow the measurements over tiles and in space."""
    coordinates = predictions.coordinates
    weights = neighbor_graph(coordinates) if graph is None else sp.csr_matrix(graph)
    predicted, measured = _expected(predictions, transform), transformed(observed, transform)
    return pd.DataFrame(
        {
            "pearson": pearson(predicted, measured),
            "spearman": spearman(predicted, measured),
            "morans_i_observed": morans_i(measured, weights),
            "morans_i_predicted": morans_i(predicted, weights),
            "bivariate_morans_i": morans_i(predicted, weights, measured),
            "iou": pattern_ious(predicted, measured, coordinates),
        },
        index=predictions.genes,
    )


def depth_scores(sdata: SpatialData, source: contract.Source) -> pd.DataFrame:
    """Compute coverage and likelihood of the predictions of a section per gene."""
    predictions = contract.predictions(sdata)
    rows, units = contract.align_to_spots(sdata, predictions, source)
    genes = list(measured_names(predictions, units, {}, section=contract.sample(sdata), against="counts"))
    return _calibration(_taken(sdata, predictions, rows, genes), dense(units[:, genes]))


def _calibration(predictions: _Predicted, observed: np.ndarray) -> pd.DataFrame:
    """Score coverage and likelihood of the predicted distributions."""
    inside = (observed >= predictions.lower) & (observed <= predictions.upper)
    return pd.DataFrame(
        {
            "coverage": inside.mean(axis=0),
            "nll": _nll(observed, predictions.mean, predictions.variance),
            "nll_floor": _floor_nll(observed, predictions),
        },
        index=predictions.genes,
    )


def pattern_ious(predicted: np.ndarray, measured: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Compute the IoU per gene, or NaN with a warning if units are not on a lattice."""
    try:
        find_lattice(coordinates)
    except ValueError as error:
        warnings.warn(f"The IoU is left out: {error}", stacklevel=4)
        return np.full(predicted.shape[1], np.nan)
    return pattern_iou(predicted, measured, coordinates)


def _expected(predictions: _Predicted, transform: Transform) -> np.ndarray:
    """Return the transformed mean, or for `lognorm` the expectation of log-normalized counts."""
    mean = predictions.mean
    if transform != "lognorm":
        return transformed(mean, transform)
    totals = mean.sum(axis=1, keepdims=True)
    return expected_log1p(mean, predictions.variance, scale=np.median(totals) / np.maximum(totals, 1e-12))


def transformed(values: np.ndarray, transform: Transform) -> np.ndarray:
    """Return values on the scale of the scores; see `evaluate`."""
    if transform == "raw":
        return values
    if transform == "lognorm":
        totals = values.sum(axis=1, keepdims=True)
        values = values / np.maximum(totals, 1e-12) * np.median(totals)
    return np.sign(values) * np.log1p(np.abs(values))


def _nll(counts: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return the mean negative log-likelihood, nearly Poisson where variance is at most the mean."""
    excess = np.maximum(variance - mean, 1e-6 * mean)
    log_prob = negative_binomial.log_prob_from_mean(
        counts.astype(np.float32),
        log_mean=np.log(np.maximum(mean, 1e-8)).astype(np.float32),
        log_dispersion=np.log(np.maximum(mean, 1e-8) ** 2 / np.maximum(excess, 1e-14)).astype(np.float32),
    )
    return -np.asarray(log_prob).mean(axis=0)


def _floor_nll(counts: np.ndarray, predictions: _Predicted) -> np.ndarray:
    mean = predictions.floor_mean * predictions.size_factor[:, None]
    return _nll(counts, mean, mean + mean**2 / predictions.floor_dispersion)
