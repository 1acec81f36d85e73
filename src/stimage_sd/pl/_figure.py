"""Figure handling shared by all plots: axes, size, title, output file and return value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from stimage_sd._files import replacing
from stimage_sd.pl._literal_text import show_literally, show_title, texts

#: accepted types of `ax`
AxesLike: TypeAlias = Axes | Sequence[Axes] | np.ndarray
#: accepted types of `title`
Title: TypeAlias = str | Sequence[str]
Drawn = TypeVar("Drawn", Axes, np.ndarray, Axes | np.ndarray)
#: resolution of raster files, dots per inch
DPI = 150


@dataclass(frozen=True)
class Sheet:
    """Figure of one call, from the arguments shared by all plots.

    Attributes
    ----------
    ax
        The user's axes, or `None` for a new figure.
    title
        One title per panel. For several panels of a new figure, also one string above all panels.
    figsize
        Width and height of a new figure, inches. Default: the size of its panels.
    save
        Output file. The suffix gives the format.
    return_fig
        Return the figure instead of the axes.
    """

    ax: AxesLike | None
    title: Title | None
    figsize: tuple[float, float] | None
    save: str | Path | None
    return_fig: bool
    _before: dict[Text, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments before drawing."""
        if self.ax is not None and self.figsize is not None:
            raise ValueError("`figsize` is the size of a new figure. With `ax`, give your own figure its size.")
        if self.save is None:
            return
        path = Path(self.save).expanduser()
        if not path.parent.is_dir():
            raise FileNotFoundError(f"No folder {path.parent} to save {path.name} to. Create it first.")
        known = Figure().canvas.get_supported_filetypes()
        if path.suffix.removeprefix(".").lower() not in known:
            raise ValueError(f"Expected `save` to end in one of {sorted(known)}, found {path.name!r}.")

    def panels(self, n: int, *, size: tuple[float, float], columns: int | None = None) -> np.ndarray:
        """Return the axes to draw on, from the user or of a new figure.

        Parameters
        ----------
        n
            Number of panels.
        size
            Width and height of a panel, inches.
        columns
            Panels per row. Default: all panels in one row.

        Returns
        -------
        Object array of `Axes`, ``(n,)``.

        Raises
        ------
        ValueError
            If the number of axes or titles differs from `n`.
        """
        self._check_title(n)
        if self.ax is None:
            columns = min(columns or n, n)
            rows = -(-n // columns)
            figure = plt.figure(
                figsize=self.figsize or (size[0] * columns, size[1] * rows + 0.3 * self._has_head(n)),
                layout="constrained",
            )
            return np.array([figure.add_subplot(rows, columns, index + 1) for index in range(n)], dtype=object)
        given = np.array([self.ax], dtype=object) if isinstance(self.ax, Axes) else np.asarray(self.ax, dtype=object)
        if given.size != n:
            raise ValueError(f"Expected `ax` to be {n} axes, one per panel, found {given.size}.")
        for figure in {panel.get_figure(root=True) for panel in given.ravel()}:
            self._before.update(texts(figure))
        return given.ravel()

    def panel(self, *, size: tuple[float, float]) -> Axes:
        """Return the axes of a plot with one panel."""
        axes: Axes = self.panels(1, size=size)[0]
        return axes

    def _has_head(self, n: int) -> bool:
        return isinstance(self.title, str) and n > 1

    def _check_title(self, n: int) -> None:
        if self._has_head(n) and self.ax is not None:
            raise ValueError(f"Expected `title` to be {n} titles, one per panel of `ax`, found one.")
        if self.title is not None and not isinstance(self.title, str) and len(self.title) != n:
            raise ValueError(f"Expected `title` to be {n} titles, one per panel, found {len(self.title)}.")

    def done(self, axes: Drawn) -> Drawn | Figure:
        """Set the title, write the file, and return the axes or the figure.

        Parameters
        ----------
        axes
            The drawn axes, in the form to return.

        Returns
        -------
        `axes`, or the figure with `return_fig`.
        """
        drawn = np.ravel(np.array(axes, dtype=object))
        figure = drawn[0].get_figure(root=True)
        for one in {panel.get_figure(root=True) for panel in drawn}:
            show_literally(one, before=self._before)
        if isinstance(self.title, str) and len(drawn) > 1:
            show_title(figure.suptitle(self.title, fontsize=12))
        elif self.title is not None:
            titles = [self.title] if isinstance(self.title, str) else self.title
            for panel, text in zip(drawn, titles, strict=True):
                panel.title.set_text(text)
                show_title(panel.title)
        if self.save is not None:
            target = Path(self.save).expanduser()
            # use the suffix that matplotlib would add
            with replacing(target if target.suffix else target.with_suffix(f".{rcParams['savefig.format']}")) as path:
                figure.savefig(path, dpi=DPI, bbox_inches="tight")
        return figure if self.return_fig else axes
