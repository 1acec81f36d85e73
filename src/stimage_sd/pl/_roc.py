"""ROC curves of a predicted response, per fold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score, roc_curve

from stimage_sd.pl._canvas import PREDICTED, finish, require_columns
from stimage_sd.pl._figure import Sheet, Title

#: false positive rates for the mean over folds
_RATES = np.linspace(0, 1, 201)


class Response(Protocol):
    """Attributes of `stimage_sd.tl.DrugResponse` that are drawn."""

    @property
    def patients(self) -> pd.DataFrame:
        """Return ``response``, ``score`` and ``fold`` of each patient."""
        ...

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the mean area under the curve."""
        ...

    @property
    def p_value(self) -> float | None:
        """Return the p-value from permutations."""
        ...

    @property
    def positive(self) -> str:
        """Return the response that counts as 1."""
        ...


def roc(
    data: Response | pd.DataFrame,
    *,
    ax: Axes | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Draw ROC curves of a predicted response, one thin curve per fold and the mean.

    Parameters
    ----------
    data
        Result of `stimage_sd.tl.drug_response`, or its table ``patients``: one row per patient with ``response`` (0 or
        1), ``score`` and ``fold``. Only the result has the interval and the p-value.
    ax
        Axes to draw on. Default: a new figure.
    title, figsize, save, return_fig
        `title`: title of the panel. `figsize`: size of a new figure, inches. `save`: output file. `return_fig`: return
        the figure instead of the axes.

    Returns
    -------
    The axes. The title gives the mean area under the curve over the folds.

    Raises
    ------
    ValueError
        If a column is missing, or a fold has one response only.

    Notes
    -----
    Paper, Figure S16c.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.roc(sti.tl.drug_response(cohort, response_key="pcr"))  # doctest: +SKIP
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    patients = data if isinstance(data, pd.DataFrame) else data.patients
    require_columns(patients, ["response", "score", "fold"], source="`patients` of `stimage_sd.tl.drug_response`")
    folds = {str(fold): part for fold, part in patients.groupby("fold")}
    single = [fold for fold, part in folds.items() if part["response"].nunique() < 2]
    if single:
        raise ValueError(f"Expected patients of both responses in every fold, found one response in fold {single[0]}.")
    panel = sheet.panel(size=(4.4, 4.4))
    curves = []
    for part in folds.values():
        false, true, _ = roc_curve(part["response"], part["score"])
        panel.plot(false, true, color=PREDICTED, linewidth=0.8, alpha=0.5)
        # use the upper end of each vertical step
        curves.append(true[np.searchsorted(false, _RATES, side="right") - 1])
    mean = np.mean(curves, axis=0)
    panel.plot([0, *_RATES], [0, *mean], color=PREDICTED, linewidth=2.2, label=f"mean of {len(curves)} folds")
    panel.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="chance")
    panel.set_title(_title(data, folds), fontsize=10)
    positive = "" if isinstance(data, pd.DataFrame) else f" ({data.positive})"
    panel.set(xlabel="false positive rate", ylabel=f"true positive rate{positive}", xlim=(-0.01, 1), ylim=(0, 1.01),
              aspect="equal")  # fmt: skip
    panel.legend(frameon=False, fontsize=8, loc="lower right")
    finish(panel)
    return sheet.done(panel)


def _title(data: Response | pd.DataFrame, folds: Mapping[str, pd.DataFrame]) -> str:
    """Return the mean AUC over folds, and the interval and p-value of a result."""
    auc = np.mean([roc_auc_score(part["response"], part["score"]) for part in folds.values()])
    if isinstance(data, pd.DataFrame):
        return f"AUC {auc:.2f}"
    low, high = data.interval
    by_chance = "" if data.p_value is None else f", p = {data.p_value:.2g}"
    return f"AUC {auc:.2f} ({low:.2f} to {high:.2f}){by_chance}"
