"""Score accuracy, spatial pattern and calibration of predictions against counts or proteins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood.expectation import expected_log1p
from stimage_sd.likelihood.predictive import log_pmf, log_prob
from stimage_sd.stats.lattice import find_lattice, neighbor_graph
from stimage_sd.stats.spatial import morans_i, pattern_iou, pearson, spearman
from stimage_sd.tl._score.graphs import Graph, weights_of
from stimage_sd.tl._score.scales import calibration_of_sums, groups_of, sums

Transform = Literal["log1p", "raw", "lognorm"]
#: nearest nuclei that are neighbors, squidpy's default
_NEIGHBORS = 6
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
    graph: Graph | None = None,
    scale: int | str | None = None,
    by: str | None = None,
    exposure: float | None = None,
    key: str = contract.PREDICTIONS,
    table_key: str | None = None,
    layer: str | None = None,
) -> pd.DataFrame:
    """Compare predictions with measurements on the same spots.

    Parameters
    ----------
    data
        A section or a cohort of sections with predictions and counts (or proteins). Predictions of nuclei or squares
        (`key`) are compared with the counts of measured cells or bins on them.
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
        Spatial weights, sparse ``(n, n)`` over the predicted tiles on a measured spot. For a cohort: weights by
        section, or a function from the tiles' positions ``(n, 2)`` to weights, such as
        ``functools.partial(sklearn.neighbors.kneighbors_graph, n_neighbors=6)`` for cells. Default: the eight neighbors
        on a square lattice, or the six neighbors on a hexagonal lattice, or the six nearest nuclei. Rows are
        standardized.
    scale
        `None`: single tiles. A number: every tile together with its neighbors up to so many steps on the graph. A name:
        regions, from this column of the spots' or the tiles' ``obs``. Correlations are then of means over these tiles,
        coverage and likelihood of sums of counts. Moran's I, IoU and ``nll_floor`` are NaN.
    by
        Column with strata that are scored apart, such as clusters or a pathologist's annotation
        (`stimage_sd.pp.label_by_annotations`). It is looked up in the spots' ``obs``, then in the predictions', then in
        the tiles'. Tiles without a value are left out. Neighbors of other strata do not count in Moran's I and in
        neighborhoods (`scale`).
    exposure
        Depth of the sections relative to the training sections, for models fitted with exposure. Default: one number
        per section from its total counts. Predictions are moved to this depth before they are compared. ``1`` compares
        predictions for the cohort's median depth.
    key
        Name of the prediction table.
    table_key
        Name of the count or protein table.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    A table with one row per section and gene. Columns are ``section``, ``gene``, ``n_tiles``, ``exposure`` (NaN for
    models without exposure) and:

    - ``pearson``, ``spearman``: correlation of predicted mean and measurement over tiles;
    - ``morans_i_observed``, ``morans_i_predicted``, ``bivariate_morans_i`` (predicted against neighbors' observed);
    - ``iou``: overlap of the smoothed patterns of high expression (paper, 2.8), NaN with a warning if the tiles are
      not on a lattice, and NaN for nuclei;
    - ``coverage``: share of counts inside the 90 % interval;
    - ``nll``: negative log-likelihood per count, under the predictive distribution with its shifts, or without shifts
      under the negative binomial with the predicted mean and total variance;
    - ``nll_floor``: negative log-likelihood per count under the mean-only fit to the training counts.

    Coverage and likelihood need predictions at the measured depth of each spot. For predictions at median depth, from
    a model with size factors, they are NaN with a warning. To get them, predict with ``size_factors="total"``.

    Constant genes get NaN in scores that are undefined for them. The scores are also written to
    ``tables["predictions"].var``, with the measured name of each gene in column ``measured``.

    With `by`, there is one row per section, stratum and gene, with the column ``stratum``. `n_tiles` is of the stratum.
    The table is returned only.

    Raises
    ------
    KeyError
        If a section has no predictions, counts or proteins, or no tiles on spots. Also if `names` has genes that were
        not predicted, or names that were not measured, or there is no column `by` or `scale`.
    ValueError
        If no predicted gene was measured, or no compared tile has a stratum.

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
    if against == "proteins" and exposure is not None:
        raise ValueError("Intensities of proteins have no depth, so `exposure` has no meaning for them.")
    if against == "proteins" and transform == "lognorm":
        raise ValueError('Intensities of proteins have no total to scale to: use `transform="log1p"` or "raw".')
    tables = []
    for name, sdata in contract.sections(data).items():
        predictions = contract.predictions(sdata, key)
        rows, units = contract.align(sdata, predictions, source, against=against)
        measured = measured_names(predictions, units, names or {}, section=name, against=against)
        depth = None if against == "proteins" else _exposure(predictions, rows, units, exposure)
        compared = _taken(sdata, predictions, rows, list(measured), depth)
        observed = dense(units[:, list(measured.values())])
        problem = contract.depth_problem(sdata, predictions) if against == "counts" else None
        if problem:
            warnings.warn(f"Coverage and likelihood are left out. {problem}", stacklevel=2)
        labels = partial(contract.row_labels, sdata, predictions.obs.iloc[rows], units=units.obs, source=source)
        way = _Way(
            transform, labels(scale) if isinstance(scale, str) else scale, against == "counts" and not problem,
            predictions.uns["prediction"],
        )  # fmt: skip
        weights = _weights(compared, graph, section=name)
        strata = {None: np.arange(len(rows))} if by is None else _strata(labels(by), by, section=name)
        exposed = np.nan if depth is None else depth
        for stratum, chosen in strata.items():
            part = compared if by is None else compared.of(chosen)
            near = weights if by is None else weights[chosen][:, chosen]
            scores = _scored(part, observed[chosen], near, way.of(chosen)).reindex(columns=list(METRICS))
            table = scores.rename_axis("gene").reset_index()
            tables.append(table.assign(section=name, stratum=stratum, n_tiles=len(chosen), exposure=exposed))
        how: dict[str, Any] = {"against": against, "transform": transform, "n_tiles": len(rows)}
        how |= {} if depth is None else {"exposure": depth}
        how |= {} if scale is None else {"scale": scale}
        if by is None:
            for metric in METRICS:
                predictions.var[metric] = scores[metric].reindex(predictions.var_names)
            predictions.var["measured"] = [measured.get(gene, "") for gene in predictions.var_names]
            predictions.uns["evaluation"] = how
        contract.record(sdata, "tl.evaluate", n_genes=len(measured), **how, **({} if by is None else {"by": by}))
    keys = ["section", "gene"] if by is None else ["section", "stratum", "gene"]
    return pd.concat(tables, ignore_index=True)[[*keys, "n_tiles", "exposure", *METRICS]]


class _Way(NamedTuple):
    """How tiles are compared.

    Attributes
    ----------
    transform
        Scale of the correlations.
    scale
        Steps to neighbors, or the region of each tile. `None` for single tiles.
    calibrated
        Whether coverage and likelihood are scored.
    about
        How the predictions were made.
    """

    transform: Transform
    scale: int | np.ndarray | None
    calibrated: bool
    about: Mapping[str, Any]

    def of(self, rows: np.ndarray) -> _Way:
        """Return the way for some tiles."""
        return self._replace(scale=self.scale[rows]) if isinstance(self.scale, np.ndarray) else self


def _scored(predictions: _Predicted, observed: np.ndarray, weights: sp.csr_matrix, way: _Way) -> pd.DataFrame:
    """Score some tiles."""
    if way.scale is None:
        scores = _agreement(predictions, observed, way.transform, weights)
        return scores.join(_calibration(predictions, observed)) if way.calibrated else scores
    groups = groups_of(way.scale, weights)
    scores = _agreement_of_means(predictions, observed, way.transform, groups)
    return scores.join(_calibration_of_sums(predictions, observed, groups, way.about)) if way.calibrated else scores


def _strata(labels: np.ndarray, by: str, *, section: str) -> dict[Any, np.ndarray]:
    """Return the rows of each stratum, in the order of their names."""
    codes, names = pd.factorize(labels, sort=True)
    if not len(names):
        raise ValueError(f"No compared tile of section {section!r} has a value in column {by!r}.")
    return {name: np.flatnonzero(codes == number) for number, name in enumerate(names)}


def _exposure(predictions: ad.AnnData, rows: np.ndarray, units: ad.AnnData, given: float | None) -> float | None:
    """Return the exposure to compare at, or `None` for models without exposure."""
    measured = contract.measured_exposure(predictions, rows, units)
    if given is None or measured is None:
        if given is not None:
            raise ValueError("The predictions are of a model without exposure, so `exposure` has no meaning for them.")
        return measured
    if not (np.isfinite(given) and given > 0):
        raise ValueError(f"Expected `exposure` to be a positive number, found {given}.")
    return float(given)


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

    - `genes`: gene names.
    - `coordinates`: tile centers, ``(n_tiles, 2)``.
    - `at_depth`: distributions at the depth of the spots.
    - `floor_mean`, `floor_dispersion`: ``float64 (n_genes,)``.
    - `on_lattice`: whether the rows are tiles or squares, which may lie on a lattice, and not nuclei.
    """

    genes: list[str]
    coordinates: np.ndarray
    at_depth: contract.Compared
    floor_mean: np.ndarray
    floor_dispersion: np.ndarray
    on_lattice: bool

    def of(self, rows: np.ndarray) -> _Predicted:
        """Return the predictions of some of the tiles."""
        made = self.at_depth
        parts = {name: getattr(made, name)[rows] for name in made._fields if name != "shift_sd"}
        return self._replace(coordinates=self.coordinates[rows], at_depth=made._replace(**parts))


def _taken(
    sdata: SpatialData, predictions: ad.AnnData, rows: np.ndarray, genes: list[str], exposure: float | None
) -> _Predicted:
    mean, dispersion = (
        predictions.var.loc[genes, name].to_numpy(np.float64) for name in ("floor_mean", "floor_dispersion")
    )
    return _Predicted(
        genes,
        contract.places(sdata, predictions)[rows],
        contract.at_depth_of(predictions, rows, genes, exposure),
        mean,
        dispersion,
        (contract.about_instances(predictions) or {}).get("on") != "nuclei",
    )


def dense(units: ad.AnnData) -> np.ndarray:
    """Return the matrix of a table as ``float64 (n_units, n_genes)``."""
    return np.asarray(units.X.toarray() if sp.issparse(units.X) else units.X, dtype=np.float64)


def _agreement(
    predictions: _Predicted, observed: np.ndarray, transform: Transform, weights: sp.csr_matrix
) -> pd.DataFrame:
    """Score how well predicted means follow the measurements over tiles and in space."""
    coordinates = predictions.coordinates
    predicted, measured = _expected(predictions, transform), transformed(observed, transform)
    return pd.DataFrame(
        {
            "pearson": pearson(predicted, measured),
            "spearman": spearman(predicted, measured),
            "morans_i_observed": morans_i(measured, weights),
            "morans_i_predicted": morans_i(predicted, weights),
            "bivariate_morans_i": morans_i(predicted, weights, measured),
            "iou": pattern_ious(predicted, measured, coordinates) if predictions.on_lattice else np.nan,
        },
        index=predictions.genes,
    )


def _weights(predictions: _Predicted, graph: Graph | None, *, section: str) -> sp.csr_matrix:
    positions = predictions.coordinates
    if graph is None and not predictions.on_lattice:
        return neighbor_graph(positions, n_neighbors=min(_NEIGHBORS, len(positions) - 1))
    return weights_of(graph, positions, section=section)


def _agreement_of_means(
    predictions: _Predicted, observed: np.ndarray, transform: Transform, groups: sp.csr_matrix
) -> pd.DataFrame:
    """Score how well predicted means over groups of tiles follow the measured means."""
    n_tiles = np.asarray(groups.sum(axis=1)).reshape(-1, 1)
    made = sums(predictions.at_depth, groups)
    of_means = made._replace(mean=made.mean / n_tiles, aleatoric=made.variance / n_tiles**2, epistemic=np.zeros(1))
    predicted = _expected(predictions._replace(at_depth=of_means), transform)
    measured = transformed(groups @ observed / n_tiles, transform)
    scores = {"pearson": pearson(predicted, measured), "spearman": spearman(predicted, measured)}
    return pd.DataFrame(scores, index=predictions.genes)


def _calibration_of_sums(
    predictions: _Predicted, observed: np.ndarray, groups: sp.csr_matrix, about: Mapping[str, Any]
) -> pd.DataFrame:
    """Score coverage and likelihood of sums over groups of tiles."""
    made = sums(predictions.at_depth, groups)
    # the level of models without shifts belongs to central intervals of single counts
    level = float(about["coverage" if made.shift_sd is None else "interval_level"])
    return pd.DataFrame(calibration_of_sums(made, groups @ observed, level=level), index=predictions.genes)


def depth_scores(sdata: SpatialData, source: contract.Source) -> pd.DataFrame:
    """Compute coverage and likelihood of the predictions of a section per gene."""
    predictions = contract.predictions(sdata)
    rows, units = contract.align(sdata, predictions, source)
    genes = list(measured_names(predictions, units, {}, section=contract.sample(sdata), against="counts"))
    exposure = contract.measured_exposure(predictions, rows, units)
    return _calibration(_taken(sdata, predictions, rows, genes, exposure), dense(units[:, genes]))


def _calibration(predictions: _Predicted, observed: np.ndarray) -> pd.DataFrame:
    """Score coverage and likelihood of the predicted distributions."""
    made = predictions.at_depth
    inside = (observed >= made.lower) & (observed <= made.upper)
    if made.shift_sd is None:
        nll = _nll(observed, made.mean, made.variance)
    else:
        nll = -log_prob(observed, made.mean, made.variance, made.shift_sd).mean(axis=0)
    return pd.DataFrame(
        {
            "coverage": inside.mean(axis=0),
            "nll": nll,
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
    mean = predictions.at_depth.mean
    if transform != "lognorm":
        return transformed(mean, transform)
    totals = mean.sum(axis=1, keepdims=True)
    return expected_log1p(mean, predictions.at_depth.variance, scale=np.median(totals) / np.maximum(totals, 1e-12))


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
    mean = np.maximum(mean.astype(np.float64), 1e-8)
    r = mean**2 / np.maximum(variance - mean, 1e-6 * mean)
    return np.asarray(-log_pmf(counts, r, r / (r + mean)).mean(axis=0))


def _floor_nll(counts: np.ndarray, predictions: _Predicted) -> np.ndarray:
    mean = predictions.floor_mean * predictions.at_depth.size_factor[:, None]
    return _nll(counts, mean, mean + mean**2 / predictions.floor_dispersion)
