"""Survival of patients of high and low risk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import blended_transform_factory

from stimage_sd.pl._canvas import MEASURED, WARNING, finish, panels, require_columns

#: colours of groups, in order; the first two are those of low and high risk
_COLOURS = (MEASURED, WARNING, "#55a868", "#8172b3", "#937860", "#64b5cd")


def survival(
    patients: pd.DataFrame,
    *,
    by: str = "risk_group",
    unit: str = "months",
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Draw Kaplan-Meier curves with the numbers at risk under them.

    Parameters
    ----------
    patients
        A row a patient with ``time``, ``event`` and `by`: ``stimage_sd.tl.risk_groups(...).patients``, or your own
        table. With a column ``group``, a panel a group.
    by
        Column with the groups that are compared.
    unit
        Unit of the times, for the label.
    ax
        Axes to draw on, one a panel; a new figure by default.

    Returns
    -------
    The axes. Bands are 95 % intervals (log-log), ticks are censored patients, and the p-value is the log-rank test's.

    Raises
    ------
    ValueError
        If a column is missing, a panel has one group alone, or `ax` are fewer or more than panels.

    Notes
    -----
    Paper, Figure 5d. Curves and test are lifelines'.

    Examples
    --------
    >>> import pandas as pd, stimage_sd as sti
    >>> table = pd.DataFrame({"time": [5, 8, 9, 2, 3, 4], "event": 1, "risk_group": ["low"] * 3 + ["high"] * 3})
    >>> sti.pl.survival(table)[0].get_xlabel()
    'months'
    """
    require_columns(patients, ["time", "event", by], source="`stimage_sd.tl.risk_groups(...).patients`")
    names = patients["group"].astype(str).to_numpy() if "group" in patients else np.full(len(patients), "all")
    parts = {str(name): patients[names == name] for name in dict.fromkeys(names)}
    for name, part in parts.items():
        if part[by].nunique() < 2:
            raise ValueError(f"Expected two or more of {by!r} to compare, found one in {name!r}: {part[by].iloc[0]!r}.")
    axes = panels(ax, len(parts), size=(5.2, 4.6), columns=3)
    for panel, (name, part) in zip(axes, parts.items(), strict=True):
        _draw(panel, part, by, unit, "" if name == "all" else name)
    return axes


def _draw(ax: Axes, patients: pd.DataFrame, by: str, unit: str, title: str) -> None:
    from lifelines import KaplanMeierFitter
    from lifelines.statistics import multivariate_logrank_test

    names = [name for name in ("low", "high") if name in set(patients[by])]
    names += sorted(set(patients[by]) - set(names), key=str)
    colours = dict(zip(names, _COLOURS * (1 + len(names) // len(_COLOURS)), strict=False))
    for name in names:
        part = patients[patients[by] == name]
        fitted = KaplanMeierFitter().fit(part["time"], part["event"])
        curve, interval = fitted.survival_function_.iloc[:, 0], fitted.confidence_interval_
        ax.step(curve.index, curve, where="post", color=colours[name], linewidth=1.8,
                label=f"{name} ({len(part)}, {int(part['event'].sum())} events)")  # fmt: skip
        ax.fill_between(interval.index, interval.iloc[:, 0], interval.iloc[:, 1], step="post", color=colours[name],
                        alpha=0.15, linewidth=0)  # fmt: skip
        censored = part.loc[~part["event"].astype(bool), "time"]
        ax.plot(censored, fitted.predict(censored), "|", color=colours[name], markersize=5, markeredgewidth=0.8)
    p = multivariate_logrank_test(patients["time"], patients[by], patients["event"]).p_value
    shown = f"log-rank p = {p:.2g}" if p >= 1e-4 else f"log-rank p = {p:.0e}"
    ax.set_title(f"{title}: {shown}" if title else shown, fontsize=10)
    ax.set(xlim=(0, None), ylim=(0, 1.02), xlabel=unit, ylabel="share alive")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    finish(ax)
    _numbers_at_risk(ax, patients, by, names, colours)


def _numbers_at_risk(ax: Axes, patients: pd.DataFrame, by: str, names: list[str], colours: dict[str, str]) -> None:
    """Write how many are still watched under the ticks of the time axis."""
    ticks = [tick for tick in ax.get_xticks() if 0 <= tick <= ax.get_xlim()[1]]
    under = blended_transform_factory(ax.transData, ax.transAxes)
    ax.text(0, -0.2, "at risk", transform=under, fontsize=8, ha="left", va="center")
    for line, name in enumerate(names):
        times = patients.loc[patients[by] == name, "time"].to_numpy()
        for tick in ticks:
            ax.text(tick, -0.26 - 0.06 * line, f"{int((times >= tick).sum())}", transform=under, fontsize=8,
                    ha="center", va="center", color=colours[name])  # fmt: skip
