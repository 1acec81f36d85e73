"""Score predictions against measured counts or proteins: accuracy, spatial pattern, calibration."""

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
from stimage_sd.nn import negative_binomial
from stimage_sd.nn.expectation import expected_log1p
from stimage_sd.nn.lattice import find_lattice, neighbour_graph
from stimage_sd.nn.spatial import morans_i, pattern_iou, pearson, spearman

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
    table_key: str | None = None,
) -> pd.DataFrame:
    """Compare predictions with what was measured on the spots that the tiles sit on.

    Parameters
    ----------
    data
        A section, or a cohort of them, with predictions and counts (or proteins).
    against
        ``"counts"``: RNA, of any platform. ``"proteins"``: intensities of the gene's protein, as CODEX measures
        them; coverage and likelihood, which are of counts, are then NaN.
    names
        Where a gene has another name among what was measured, such as ``{"MS4A1": "CD20"}``; genes that are not
        named here go by their own.
    transform
        What correlations, Moran's I and IoU are computed on: ``"log1p"`` of counts and means (of intensities below
        zero, which compensation leaves, with the sign kept); ``"raw"``; ``"lognorm"``: scaled to the median total
        over the predicted genes, then log1p (counts only). Log-normalised counts are compared with what the
        predicted distribution expects of them (`stimage_sd.nn.expectation`).
    graph
        Spatial weights, sparse ``(n, n)`` over the predicted tiles that sit on a measured spot; by default
        the eight neighbours of a square lattice or the six of a hexagonal one. Rows are standardised.
    table_key
        Name of the table of counts, or proteins.

    Returns
    -------
    A row a section and gene: ``section``, ``gene``, ``n_tiles`` and

    - ``pearson``, ``spearman``: predicted mean against measured, over tiles;
    - ``morans_i_observed``, ``morans_i_predicted``, ``bivariate_morans_i`` (predicted, neighbours' observed);
    - ``iou``: overlap of the smoothed patterns of high expression (paper, 2.8); NaN, with a warning, where the
      tiles stand on no lattice;
    - ``coverage``: share of counts inside the 90 % interval;
    - ``nll``: negative log-likelihood a count, by the negative binomial of the predicted mean and total
      variance; ``nll_floor``: the same by the mean-only fit to the training counts.

    A gene that is constant where it is measured, or predicted, scores NaN where that leaves a score without
    meaning. The scores are written to ``tables["predictions"].var`` too, with the name of what each gene was
    compared with (``measured``).

    Raises
    ------
    KeyError
        If the section has no predictions, counts or proteins, or its tiles do not sit on spots; or `names` names
        what was not predicted or measured.
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
    if transform not in ("log1p", "raw", "lognorm"):
        raise ValueError(f'Expected `transform` to be "log1p", "raw" or "lognorm", found {transform!r}.')
    if against not in ("counts", "proteins"):
        raise ValueError(f'Expected `against` to be "counts" or "proteins", found {against!r}.')
    if against == "proteins" and transform == "lognorm":
        raise ValueError('Intensities of proteins have no total to scale to: use `transform="log1p"` or "raw".')
    tables = []
    for name, sdata in contract.sections(data).items():
        predictions = contract.predictions(sdata)
        rows, units = contract.align_to_spots(sdata, predictions, table_key, against=against)
        measured = _measured_names(predictions, units, names or {}, section=name, against=against)
        compared = _taken(predictions, rows, list(measured))
        observed = _dense(units[:, list(measured.values())])
        scores = _agreement(compared, observed, transform, graph)
        scores = scores.join(_calibration(compared, observed) if against == "counts" else pd.DataFrame())
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


def _measured_names(
    predictions: ad.AnnData, units: ad.AnnData, names: Mapping[str, str], *, section: str, against: str
) -> dict[str, str]:
    """Return, for the predicted genes that were measured, the names they were measured under."""
    unknown = [gene for gene in names if gene not in predictions.var_names]
    absent = [name for name in names.values() if name not in units.var_names]
    if unknown or absent:
        what = f"genes that were not predicted: {unknown}" if unknown else f"what was not measured: {absent}"
        raise KeyError(
            f"`names` has {what}. Section {section!r} has predictions of {list(predictions.var_names[:5])} and others, "
            f"{against} of {list(units.var_names[:40])}."
        )
    measured = {gene: names.get(gene, gene) for gene in predictions.var_names}
    measured = {gene: name for gene, name in measured.items() if name in units.var_names}
    if not measured:
        raise ValueError(
            f"None of the {predictions.n_vars} predicted genes was measured in section {section!r}, such as "
            f"{predictions.var_names[0]!r}; its {against} are {list(units.var_names[:5])} and others. Where they go by "
            'other names, pass `names={"GENE": "NAME"}`.'
        )
    return measured


class _Predicted(NamedTuple):
    """Predictions of some tiles and genes as plain arrays, as each look into a view of a table takes a millisecond.

    Attributes
    ----------
    genes
        Names.
    coordinates
        ``(n_tiles, 2)``.
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


def _taken(predictions: ad.AnnData, rows: np.ndarray, genes: list[str]) -> _Predicted:
    at = np.ix_(rows, predictions.var_names.get_indexer(genes))
    floors = (predictions.var[name].to_numpy(dtype=np.float64)[at[1][0]] for name in ("floor_mean", "floor_dispersion"))
    return _Predicted(
        genes,
        np.asarray(predictions.obsm["spatial"])[rows],
        np.asarray(predictions.X)[at].astype(np.float64),
        np.asarray(predictions.layers["total_variance"])[at].astype(np.float64),
        np.asarray(predictions.layers["lower"])[at],
        np.asarray(predictions.layers["upper"])[at],
        predictions.obs["size_factor"].to_numpy(dtype=np.float64)[rows],
        *floors,
    )


def _dense(units: ad.AnnData) -> np.ndarray:
    return np.asarray(units.X.toarray() if sp.issparse(units.X) else units.X, dtype=np.float64)


def _agreement(
    predictions: _Predicted, observed: np.ndarray, transform: Transform, graph: sp.spmatrix | None
) -> pd.DataFrame:
    """How well the predicted means follow what was measured, over tiles and in space."""
    coordinates = predictions.coordinates
    weights = neighbour_graph(coordinates) if graph is None else sp.csr_matrix(graph)
    predicted, measured = _expected(predictions, transform), _transformed(observed, transform)
    return pd.DataFrame(
        {
            "pearson": pearson(predicted, measured),
            "spearman": spearman(predicted, measured),
            "morans_i_observed": morans_i(measured, weights),
            "morans_i_predicted": morans_i(predicted, weights),
            "bivariate_morans_i": morans_i(predicted, weights, measured),
            "iou": _iou(predicted, measured, coordinates),
        },
        index=predictions.genes,
    )


def _calibration(predictions: _Predicted, observed: np.ndarray) -> pd.DataFrame:
    """How well the predicted distributions hold the counts."""
    inside = (observed >= predictions.lower) & (observed <= predictions.upper)
    return pd.DataFrame(
        {
            "coverage": inside.mean(axis=0),
            "nll": _nll(observed, predictions.mean, predictions.variance),
            "nll_floor": _floor_nll(observed, predictions),
        },
        index=predictions.genes,
    )


def _iou(predicted: np.ndarray, measured: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """IoU a gene; NaN, said aloud, where the units stand on no lattice to lay a pattern out on."""
    try:
        find_lattice(coordinates)
    except ValueError as error:
        warnings.warn(f"The IoU is left out: {error}", stacklevel=4)
        return np.full(predicted.shape[1], np.nan)
    return pattern_iou(predicted, measured, coordinates)


def _expected(predictions: _Predicted, transform: Transform) -> np.ndarray:
    """What is compared with transformed counts: the transformed mean, or the expectation where depth matters."""
    mean = predictions.mean
    if transform != "lognorm":
        return _transformed(mean, transform)
    totals = mean.sum(axis=1, keepdims=True)
    return expected_log1p(mean, predictions.variance, scale=np.median(totals) / np.maximum(totals, 1e-12))


def _transformed(values: np.ndarray, transform: Transform) -> np.ndarray:
    if transform == "raw":
        return values
    if transform == "lognorm":
        totals = values.sum(axis=1, keepdims=True)
        values = values / np.maximum(totals, 1e-12) * np.median(totals)
    return np.sign(values) * np.log1p(np.abs(values))


def _nll(counts: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """By the negative binomial with this mean and variance; the Poisson where the variance is no larger."""
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
