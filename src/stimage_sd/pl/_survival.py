"""Kaplan-Meier curves of patient groups."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from stimage_sd.pl._canvas import MEASURED, WARNING, finish, require_columns
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.stats.survival import kaplan_meier, log_rank_p

#: colors of groups in order, starting with low and high risk
_COLORS = (MEASURED, WARNING, "#55a868", "#8172b3", "#937860", "#64b5cd")


class Groups(Protocol):
    """Attributes of `stimage_sd.tl.RiskGroups` that are drawn."""

    @property
    def patients(self) -> pd.DataFrame:
        """Return ``time``, ``event``, ``risk_group`` and ``group`` of each patient."""
        ...


def survival(
    data: Groups | pd.DataFrame,
    *,
    by: str = "risk_group",
    unit: str = "months",
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw Kaplan-Meier curves with the numbers at risk under them.

    Parameters
    ----------
    data
        Result of `stimage_sd.tl.risk_groups`, or its table ``patients``: one row per patient with ``time``, ``event``
        and `by`. With a column ``group``, each group gets a panel.
    by
        Column with the groups to compare.
    unit
        Unit of the times, for the label.
    ax
        Axes to draw on, one per panel. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    The axes. Bands are 95 % intervals (log-log), ticks are censored patients, and the p-value is the log-rank test's.

    Raises
    ------
    ValueError
        If a column is missing, a panel has only one group to compare, or the number of axes in `ax` differs from the
        number of panels.

    Notes
    -----
    Paper, Figure 5d. Curves and test are statsmodels'; limits are Greenwood's, on the scale of log(-log).

    Examples
    --------
    >>> import pandas as pd, stimage_sd as sti
    >>> table = pd.DataFrame({"time": [5, 8, 9, 2, 3, 4], "event": 1, "risk_group": ["low"] * 3 + ["high"] * 3})
    >>> sti.pl.survival(table)[0].get_xlabel()
    'months'
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    patients = data if isinstance(data, pd.DataFrame) else data.patients
    require_columns(patients, ["time", "event", by], source="`patients` of `stimage_sd.tl.risk_groups`")
    names = patients["group"].astype(str).to_numpy() if "group" in patients else np.full(len(patients), "all")
    parts = {str(name): patients[names == name] for name in dict.fromkeys(names)}
    for name, part in parts.items():
        if part[by].nunique() < 2:
            raise ValueError(f"Expected two or more of {by!r} to compare, found one in {name!r}: {part[by].iloc[0]!r}.")
    axes = sheet.panels(len(parts), size=(5.2, 4.6), columns=3)
    for panel, (name, part) in zip(axes, parts.items(), strict=True):
        _draw(panel, part, by, unit, "" if name == "all" else name)
    return sheet.done(axes)


def _draw(ax: Axes, patients: pd.DataFrame, by: str, unit: str, title: str) -> None:
    names = [name for name in ("low", "high") if name in set(patients[by])]
    names += sorted(set(patients[by]) - set(names), key=str)
    colors = dict(zip(names, _COLORS * (1 + len(names) // len(_COLORS)), strict=False))
    curves = []
    for name in names:
        part = patients[patients[by] == name]
        curve = kaplan_meier(part["time"], part["event"])
        curves += ax.step(curve.time, curve.share, where="post", color=colors[name], linewidth=1.8,
                          label=f"{name} ({len(part)}, {int(part['event'].sum())} events)")  # fmt: skip
        ax.fill_between(curve.time, curve.lower, curve.upper, step="post", color=colors[name], alpha=0.15, linewidth=0)
        censored = part.loc[~part["event"].astype(bool), "time"]
        ax.plot(censored, curve.at(censored), "|", color=colors[name], markersize=5, markeredgewidth=0.8)
    p = log_rank_p(patients["time"], patients["event"], patients[by])
    shown = "not comparable" if np.isnan(p) else f"log-rank p = {p:.2g}" if p >= 1e-4 else f"log-rank p = {p:.0e}"
    ax.set_title(f"{title}: {shown}" if title else shown, fontsize=10)
    ax.set(xlim=(0, None), ylim=(0, 1.02), xlabel=unit, ylabel="share alive")
    # pass handles, because matplotlib otherwise drops labels that begin with an underscore
    ax.legend(handles=curves, frameon=False, fontsize=8, loc="lower left")
    finish(ax)
    _numbers_at_risk(ax, patients, by, names, colors)


def _numbers_at_risk(ax: Axes, patients: pd.DataFrame, by: str, names: list[str], colors: dict[str, str]) -> None:
    """Write the numbers at risk under the ticks of the time axis."""
    ticks = [tick for tick in ax.get_xticks() if 0 <= tick <= ax.get_xlim()[1]]
    under = blended_transform_factory(ax.transData, ax.transAxes)
    ax.text(0, -0.2, "at risk", transform=under, fontsize=8, ha="left", va="center")
    for line, name in enumerate(names):
        times = patients.loc[patients[by] == name, "time"].to_numpy()
        for tick in ticks:
            ax.text(tick, -0.26 - 0.06 * line, f"{int((times >= tick).sum())}", transform=under, fontsize=8,
                    ha="center", va="center", color=colors[name])  # fmt: skip
