"""Receiver operating characteristic of a response, fold by fold."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from sklearn.metrics import roc_curve

from stimage_sd.pl._canvas import PREDICTED, finish, panels

#: false positive rates that folds are averaged at
_RATES = np.linspace(0, 1, 201)


class Told(Protocol):
    """What is drawn of `stimage_sd.tl.DrugResponse`."""

    @property
    def patients(self) -> pd.DataFrame:
        """``response``, ``score`` and ``fold`` of each patient."""
        ...

    @property
    def auc(self) -> float:
        """Mean over folds."""
        ...

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        ...

    @property
    def p_value(self) -> float | None:
        """By permutations."""
        ...

    @property
    def positive(self) -> str:
        """The response that is told."""
        ...


def roc(found: Told, *, ax: Axes | None = None) -> Axes:
    """Draw how well responders are told: a thin curve a fold, a thick one their mean.

    Parameters
    ----------
    found
        What `stimage_sd.tl.drug_response` returned.
    ax
        Axes to draw on; a new figure by default.

    Returns
    -------
    The axes.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.roc(sti.tl.drug_response(cohort, response="pcr"))  # doctest: +SKIP
    """
    panel: Axes = panels(ax, 1, size=(4.4, 4.4))[0]
    curves = []
    for _, part in found.patients.groupby("fold"):
        false, true, _ = roc_curve(part["response"], part["score"])
        panel.plot(false, true, color=PREDICTED, linewidth=0.8, alpha=0.5)
        # the upper end of each vertical step
        curves.append(true[np.searchsorted(false, _RATES, side="right") - 1])
    mean = np.mean(curves, axis=0)
    panel.plot([0, *_RATES], [0, *mean], color=PREDICTED, linewidth=2.2, label=f"mean of {len(curves)} folds")
    panel.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="chance")
    low, high = found.interval
    by_chance = "" if found.p_value is None else f", p = {found.p_value:.2g}"
    panel.set_title(f"AUC {found.auc:.2f} ({low:.2f} to {high:.2f}){by_chance}", fontsize=10)
    panel.set(xlabel="false positive rate", ylabel=f"true positive rate ({found.positive})", xlim=(-0.01, 1),
              ylim=(0, 1.01), aspect="equal")  # fmt: skip
    panel.legend(frameon=False, fontsize=8, loc="lower right")
    finish(panel)
    return panel
