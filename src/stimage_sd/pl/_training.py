"""How the ensemble's loss fell."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from stimage_sd.models._nb import NBModel
from stimage_sd.pl._canvas import MEASURED, PREDICTED, finish, panels

CURVES = {"training_nll": ("training", MEASURED), "validation_nll": ("validation", PREDICTED)}


def training(model: NBModel, *, ax: Axes | None = None) -> Axes:
    """Draw an ensemble's training and validation loss an epoch: a thin line a member, a thick one their mean.

    Parameters
    ----------
    model
        A fitted model, in memory or loaded.
    ax
        Axes to draw on; a new figure by default.

    Returns
    -------
    The axes. A dot marks each member's best epoch, whose weights the model holds; the axis is cut above the
    losses of the first epochs where those would flatten the rest.

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
    if "history" not in model.training:
        raise ValueError("Expected a model with a training history, found none in `model.training`. Fit it again.")
    history = model.history
    panel: Axes = panels(ax, 1, size=(6.0, 4.0))[0]
    for name, (label, colour) in CURVES.items():
        losses = history.pivot(index="epoch", columns="member", values=name)
        panel.plot(losses.index, losses.to_numpy(), color=colour, linewidth=0.8, alpha=0.35)
        panel.plot(losses.index, losses.mean(axis=1), color=colour, linewidth=2.2, label=f"{label}, mean")
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
    panel.set_ylabel("negative log-likelihood a count")
    panel.set_title(f"{model.n_members} members, {len(model.genes)} genes, head {model.head!r}", fontsize=11)
    panel.legend(frameon=False, fontsize=9)
    finish(panel)
    return panel


def _cut(ax: Axes, losses: np.ndarray) -> None:
    """Leave out the spike of the first epochs, and nothing else."""
    low, high = losses.min(), losses.max()
    bulk = np.percentile(losses, 97)
    top = high if high - low < 2.5 * (bulk - low) else bulk + 0.25 * (bulk - low)
    pad = 0.04 * max(top - low, 1e-3)
    ax.set_ylim(low - pad, top + pad)
