"""Loss curves of an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stimage_sd.models._finetuned import FinetunedModel
from stimage_sd.models._instance_model import InstanceModel
from stimage_sd.models._nb import NBModel
from stimage_sd.models._resolve import as_model
from stimage_sd.pl._canvas import MEASURED, PREDICTED, finish
from stimage_sd.pl._figure import Sheet, Title

CURVES = {"training_nll": ("training", MEASURED), "validation_nll": ("validation", PREDICTED)}


def training(
    model: NBModel | FinetunedModel | InstanceModel | str | Path,
    *,
    ax: Axes | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Draw training and validation loss by epoch, one thin line per member and the mean.

    Parameters
    ----------
    model
        A fitted model, or the path of one.
    ax
        Axes to draw on. Default: a new figure.
    title, figsize, save, return_fig
        `title`: title of the panel. `figsize`: size of a new figure, inches. `save`: output file. `return_fig`: return
        the figure instead of the axes.

    Returns
    -------
    The axes. A dot marks each member's best epoch. The model holds the weights of this epoch. Members stop at different
    epochs. A member that has stopped counts in the mean with its last loss. The loss axis is cut where high losses of
    the first epochs would flatten the other epochs.

    Raises
    ------
    ValueError
        If the model has no training history.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_training_plot", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.pl.training(model).get_xlabel()
    'epoch'
    """
    sheet = Sheet(ax, title, figsize, save, return_fig)
    fitted = cast(NBModel | FinetunedModel | InstanceModel, as_model(model))
    if not {*CURVES, "member"} <= set(fitted.training.get("history", {})):
        raise ValueError(
            "Expected a model with a training history of negative log-likelihoods, found "
            f"{sorted(fitted.training.get('history', {})) or 'none'} in `model.training`. Fit it again with "
            "`stimage_sd.tl.fit_nb` or `stimage_sd.tl.finetune_nb`."
        )
    history = pd.DataFrame(fitted.training["history"])
    panel = sheet.panel(size=(6.0, 4.0))
    for name, (label, color) in CURVES.items():
        losses = history.pivot(index="epoch", columns="member", values=name)
        panel.plot(losses.index, losses.to_numpy(), color=color, linewidth=0.8, alpha=0.35)
        # a mean over the members that still train would jump where a member stops
        panel.plot(losses.index, losses.ffill().mean(axis=1), color=color, linewidth=2.2, label=f"{label}, mean")
    best = history.loc[history.groupby("member")["validation_nll"].idxmin()]
    panel.plot(
        best["epoch"],
        best["validation_nll"],
        "o",
        color=PREDICTED,
        markeredgecolor="black",
        markersize=5,
        label="a member's best epoch",
        zorder=3,
    )
    _cut(panel, history[list(CURVES)].to_numpy())
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("epoch")
    panel.set_ylabel("negative log-likelihood per count")
    n_members = history["member"].nunique()
    head = "" if isinstance(fitted, InstanceModel) else f", head {fitted.head!r}"
    panel.set_title(f"{n_members} member{'s' * (n_members != 1)}, {len(fitted.genes)} genes{head}", fontsize=11)
    panel.legend(frameon=False, fontsize=9)
    finish(panel)
    return sheet.done(panel)


def _cut(ax: Axes, losses: np.ndarray) -> None:
    """Limit the loss axis, cutting only a spike of the first epochs."""
    low, high = losses.min(), losses.max()
    bulk = np.percentile(losses, 97)
    top = high if high - low < 2.5 * (bulk - low) else bulk + 0.25 * (bulk - low)
    pad = 0.04 * max(top - low, 1e-3)
    ax.set_ylim(low - pad, top + pad)
