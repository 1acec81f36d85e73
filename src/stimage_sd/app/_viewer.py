"""Slide viewer of the page: two maps that zoom and pan together, in plain JavaScript without other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from stimage_sd.app._slides import Slide

#: key of the viewer, and name of its event
VIEWER, CHOSEN = "viewer", "tile"
#: colors of a map
N_COLORS = 64
#: legend marks of counts
_MARKS = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000)


@dataclass(frozen=True)
class Map:
    """A map of the viewer: one color per tile.

    Attributes
    ----------
    title, unit
        Words above the map, and below its legend.
    values
        One value per tile. Tiles with NaN get no color.
    low, high
        Ends of the color range.
    of_counts
        Whether colors are linear in log(1 + value), as for counts.
    cmap
        Name of a colormap of Matplotlib.
    masked
        Whether tiles unlike the training tiles can be gray.
    """

    title: str
    unit: str
    values: np.ndarray
    low: float
    high: float
    of_counts: bool = False
    cmap: str = "viridis"
    masked: bool = True

    def as_data(self) -> dict[str, Any]:
        """Return the map as JSON for the viewer: number of the color per tile, -1 without."""
        share = self.share(self.values)
        colors = np.where(np.isfinite(share), np.clip(share, 0, 1) * (N_COLORS - 1), -1).round().astype(int)
        ticks = [(round(float(self.share(np.array(mark))), 4), f"{mark:.3g}") for mark in self.marks()]
        return {
            "title": self.title, "unit": self.unit, "values": colors.tolist(), "colors": _colors(self.cmap),
            "ticks": ticks, "masked": self.masked,
        }  # fmt: skip

    def share(self, values: np.ndarray) -> np.ndarray:
        """Return the place of values in the color range, 0 to 1."""
        scale = np.log1p if self.of_counts else np.asarray
        low, high = float(scale(self.low)), float(scale(self.high))
        return np.asarray((scale(np.asarray(values, np.float64)) - low) / (high - low))

    def marks(self) -> list[float]:
        """Return the values at the marks of the legend, from one end of the colors to the other."""
        if not self.of_counts:
            return np.linspace(self.low, self.high, 4).tolist()
        round_ones = [mark for mark in _MARKS if self.low <= mark <= self.high]
        # marks nearer than a seventh of the legend would touch
        kept: list[float] = []
        for mark in round_ones:
            if not kept or float(self.share(np.array(mark)) - self.share(np.array(kept[-1]))) > 1 / 7:
                kept.append(float(mark))
        return kept if len(kept) > 1 else [self.low, self.high]


def color_range(*values: np.ndarray) -> tuple[float, float]:
    """Return the 1st and 99th percentile of all values, which are the ends of a color range."""
    together = np.concatenate([part[np.isfinite(part)] for part in values])
    if not len(together):
        return 0.0, 1.0
    low, high = (float(bound) for bound in np.percentile(together, [1, 99]))
    return (low, high) if high > low else (low, low + 1)


def show_slide(
    slide: Slide,
    tiles: pd.DataFrame,
    side: float,
    maps: tuple[Map, Map],
    *,
    chosen: int | None,
    outside: np.ndarray | None,
    on_choice: Callable[[], None],
) -> None:
    """Show two maps over the H&E.

    Parameters
    ----------
    slide
        The H&E.
    tiles
        One row per tile: ``tile``, ``x``, ``y`` (H&E px), ``words`` (shown under the pointer).
    side
        Side of a tile, H&E px.
    maps
        Left and right map.
    chosen
        The chosen tile, which gets an outline.
    outside
        Tiles to show in gray, or `None` to show all in color.
    on_choice
        Called after a click on a tile, whose number is in the state of `VIEWER` as `CHOSEN`.
    """
    places = tiles[["x", "y"]].to_numpy()
    low, high = places.min(axis=0) - 1.2 * side, places.max(axis=0) + 1.2 * side
    left, top = np.maximum(low, 0.0).tolist()
    right, bottom = np.minimum(high, [slide.width, slide.height]).tolist()
    data = {
        **slide.as_data(),
        "bounds": [left, top, right, bottom],
        "side": side,
        "tiles": {
            "id": tiles["tile"].tolist(), "x": tiles["x"].round(1).tolist(), "y": tiles["y"].round(1).tolist(),
            "words": tiles["words"].tolist(),
        },
        "outside": [] if outside is None else outside.tolist(),
        "chosen": chosen,
        "maps": [one.as_data() for one in maps],
    }  # fmt: skip
    _component()(data=data, key=VIEWER, on_tile_change=on_choice)


@cache
def _component() -> Any:
    """Register the viewer, which is served with the page from this folder's files."""
    from streamlit.components.v2 import component

    html, css, js = (Path(__file__).with_name(f"viewer.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    return component("stimage_sd_viewer", html=html, css=css, js=js)


@cache
def _colors(cmap: str) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(color) for color in colormaps[cmap](np.linspace(0, 1, N_COLORS))]
