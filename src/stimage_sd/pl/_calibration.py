"""Compare predicted uncertainty with measured counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.likelihood.pit import N_BINS, coverage, cumulative, pit_histogram
from stimage_sd.pl._canvas import MEASURED, PREDICTED, WARNING, check_gene, finish
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.stats import selective

#: nominal coverage of the tested intervals
LEVELS = np.round(np.arange(0.1, 1.0, 0.1), 2)
#: fractions of tiles kept in selective prediction
KEPT = np.round(np.arange(0.05, 1.001, 0.05), 2)
#: largest number of compared counts, beyond which tiles are drawn at random
_MOST = 2_000_000
#: names of the thirds of genes by mean count
THIRDS = ("lowest third", "middle third", "highest third")


class _Measured(NamedTuple):
    """Predictions and counts, ``float64 (n_tiles, n_genes)``.

    Attributes
    ----------
    upto, below
        Predicted probability of at most the count, and of less than the count.
    stored
        Coverage of the stored interval.
    """

    counts: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    epistemic: np.ndarray
    upto: np.ndarray
    below: np.ndarray
    stored: float


def calibration(
    data: SpatialData,
    *,
    genes: Sequence[str] | None = None,
    key: str = contract.PREDICTIONS,
    table_key: str | None = None,
    layer: str | None = None,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw the coverage of predicted intervals, and the error by predicted uncertainty.

    The first panel shows the fraction of counts inside central intervals of 10 % to 90 %. The intervals are those of
    the predictive distribution with its shifts, or without shifts those of negative binomials with the predicted mean
    and total variance. Predictions of models fitted with exposure are at the measured depth of the section. Intervals
    of whole counts cover more than their nominal fraction, mostly at low counts. The second line corrects for this: a
    count at an end of the interval counts by the part of its probability inside (probability integral transform). A
    star marks the stored interval.

    The second panel shows the root mean square error in ten equal groups of predictions, by predicted standard
    deviation.

    The third panel removes the most uncertain tiles of each gene. It shows the error of the kept tiles divided by the
    error of all tiles, as a mean over genes. Error and uncertainty are of log(1 + count), so high counts are not
    uncertain by themselves. A useless uncertainty stays at 1. The line of the least error is the lower limit
    (`stimage_sd.tl.risk_coverage`).

    The fourth panel shows the histogram of the probability integral transform, for all genes and for thirds of genes by
    mean count. It is flat if the distributions are correct, and U-shaped if they are too narrow.

    Parameters
    ----------
    data
        A section with predictions and counts.
    genes
        Predicted genes to compare. Default: all predicted genes that were measured.
    key
        Name of the table of predictions.
    table_key
        Name of the table of counts.
    layer
        Layer of that table with the raw counts. Default: ``X``, or the layer given to `io.from_spatialdata`.
    ax
        Four axes to draw on. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The four axes. Sections with more than two million counts are sampled by tile with a fixed seed.

    Raises
    ------
    KeyError
        If the section has no predictions or no counts, its tiles are not on spots, or a gene was not predicted or not
        measured.
    ValueError
        If `ax` is not four axes, no predicted gene was measured, or a model with size factors did not predict at the
        spots' measured depth.

    Notes
    -----
    Czado, Gneiting and Held 2009, "Predictive model assessment for count data", Biometrics 65:1254, section 2.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_calibration", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> len(sti.pl.calibration(section))
    4
    """
    sdata = contract.section(data)
    sheet = Sheet(ax, title, figsize, save, return_fig)
    table = contract.predictions(sdata, key)
    measured = _measured(sdata, table, genes, contract.Source(table_key, layer))
    axes = sheet.panels(4, size=(4.6, 4.4))
    nominal = float(table.uns["prediction"]["coverage"])
    _draw_coverage(axes[0], measured, nominal)
    _draw_errors(axes[1], measured)
    _draw_selective(axes[2], measured)
    _draw_pit(axes[3], measured)
    return sheet.done(axes)


def _measured(sdata: SpatialData, table: AnnData, genes: Sequence[str] | None, source: contract.Source) -> _Measured:
    if problem := contract.depth_problem(sdata, table):
        raise ValueError(problem)
    rows, counts = contract.align(sdata, table, source)
    chosen = list(genes) if genes is not None else [gene for gene in table.var_names if gene in counts.var_names]
    for gene in chosen:
        check_gene(table, gene)
        check_gene(counts, gene, what="measured")
    if not chosen:
        raise ValueError(
            f"None of the {table.n_vars} predicted genes was measured in section {contract.sample(sdata)!r}, such as "
            f"{table.var_names[0]!r}."
        )
    most = max(1, _MOST // len(chosen))
    picked = np.arange(len(rows))
    if len(rows) > most:
        picked = np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))
    exposure = contract.measured_exposure(table, rows, counts)
    made = contract.at_depth_of(table, rows[picked], chosen, exposure)
    observed = counts[picked, chosen].X
    observed = np.asarray(observed.toarray() if hasattr(observed, "toarray") else observed, dtype=np.float64)
    mean = np.maximum(made.mean, 1e-8)
    upto, below = cumulative(observed, mean, made.variance, made.shift_sd)
    return _Measured(
        counts=observed,
        mean=mean,
        variance=made.variance,
        epistemic=made.epistemic,
        upto=upto,
        below=below,
        stored=float(((observed >= made.lower) & (observed <= made.upper)).mean()),
    )


def _draw_coverage(ax: Axes, measured: _Measured, nominal: float) -> None:
    whole, part = coverage(measured.upto, measured.below, LEVELS)
    ax.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1.0, label="nominal")
    ax.plot(LEVELS, whole, "o-", color=MEASURED, markersize=4, label="intervals of whole counts")
    ax.plot(LEVELS, part, "s-", color=PREDICTED, markersize=4, label="counts' steps taken out")
    ax.plot(
        nominal,
        measured.stored,
        "*",
        color=WARNING,
        markersize=13,
        zorder=3,
        label=f"stored {nominal:.0%} interval: {measured.stored:.1%}",
    )
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="measured coverage", aspect="equal")
    ax.set_title(f"coverage, {measured.counts.size:,} counts", fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    finish(ax)


def _draw_errors(ax: Axes, measured: _Measured) -> None:
    deviation = np.sqrt(measured.variance).ravel()
    squared = ((measured.counts - measured.mean) ** 2).ravel()
    groups = np.array_split(np.argsort(deviation, kind="stable"), min(10, deviation.size))
    predicted = np.array([np.sqrt((deviation[group] ** 2).mean()) for group in groups])
    error = np.array([np.sqrt(squared[group].mean()) for group in groups])
    ends = [min(predicted.min(), error[error > 0].min(initial=np.inf)), max(predicted.max(), error.max())]
    ax.plot(ends, ends, color="gray", linestyle="--", linewidth=1.0, label="equal")
    ax.plot(predicted, error, "o-", color=MEASURED, markersize=5, label="a tenth of the predictions")
    ax.set(xscale="log", yscale="log", aspect="equal", adjustable="datalim")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("predicted standard deviation, counts")
    ax.set_ylabel("root mean square error, counts")
    ax.set_title("error by predicted uncertainty", fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    finish(ax)


def _draw_selective(ax: Axes, measured: _Measured) -> None:
    error, total = selective.log_scale(measured.counts, measured.mean, measured.variance)
    _, epistemic = selective.log_scale(measured.counts, measured.mean, measured.epistemic)
    # genes without error cannot be normalized
    genes = [gene for gene in range(error.shape[1]) if error[:, gene].mean() > 0]
    ax.axhline(1.0, color="gray", linestyle="--", linewidth=1.0, label="random tiles kept")
    for label, uncertainty, color in (
        ("least total uncertainty", total, MEASURED),
        ("least epistemic uncertainty", epistemic, PREDICTED),
        ("least error", error, "gray"),
    ):
        curves = [selective.risk_coverage(error[:, gene], uncertainty[:, gene]) for gene in genes]
        relative = np.mean([selective.kept(curve.risk, KEPT) / curve.random for curve in curves], axis=0)
        ax.plot(KEPT, relative, color=color, linewidth=1.8 if color != "gray" else 1.0, label=label)
    ax.set(xlim=(0, 1), xlabel="share of tiles kept", ylabel="error of those, over that of all")
    ax.set_ylim(bottom=0)
    ax.set_title(f"selective prediction, {len(genes):,} genes", fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    finish(ax)


def _draw_pit(ax: Axes, measured: _Measured) -> None:
    edges, n_genes = np.linspace(0, 1, N_BINS + 1), measured.counts.shape[1]
    order = np.argsort(measured.counts.mean(axis=0), kind="stable")
    groups = {"all genes": order}
    if n_genes >= len(THIRDS):
        groups |= dict(zip(THIRDS, np.array_split(order, len(THIRDS)), strict=True))
    ax.axhline(1.0, color="gray", linestyle="--", linewidth=1.0, label="correct")
    highest = 0.0
    for (label, genes), color in zip(groups.items(), (MEASURED, *plt.cm.viridis([0.15, 0.5, 0.8])), strict=False):
        density = pit_histogram(measured.upto[:, genes], measured.below[:, genes])
        highest = max(highest, float(density.max()))
        ax.stairs(density, edges, label=label, color=color, linewidth=2.2 if label == "all genes" else 1.1)
    ax.set(xlim=(0, 1), xlabel="predicted probability of a smaller count", ylabel="density")
    ax.set_ylim(0, max(2.0, 1.1 * highest))
    ax.set_title("probability integral transform", fontsize=11)
    ax.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    finish(ax)
