"""Shared parts of maps: sections, genes, regions, image background, panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl import _canvas
from stimage_sd.pl._zoom import Regions, Zoom, Zooms, draw_image, mark_windows, regions_of, zoom_box


class Map(NamedTuple):
    """One map.

    Attributes
    ----------
    title
        Title of the map.
    background
        Function that draws the H&E of a region (`None`: of all tiles) and sets the limits of the axes.
    draw
        Function that draws the values on axes with limits. It returns what a color bar needs.
    explain
        Function that adds a color bar or a legend, given the axes of the map and its windows and what was drawn.
    """

    title: str
    background: Callable[[Axes, Zoom | None], None]
    draw: Callable[[Axes], ScalarMappable | None]
    explain: Callable[[np.ndarray, ScalarMappable | None], None] = lambda _axes, _drawn: None


def draw_maps(maps: Sequence[Map], axes: np.ndarray, regions: Regions) -> list[ScalarMappable | None]:
    """Draw maps, each with its windows, and return what was drawn on each map.

    Parameters
    ----------
    maps
        The maps.
    axes
        Axes, ``(n_maps, n_regions)``.
    regions
        The regions of each map.
    """
    every = []
    for one, panels in zip(maps, axes, strict=True):
        drawn = []
        for panel, box in zip(panels, regions.boxes, strict=True):
            one.background(panel, box)
            drawn.append(one.draw(panel))
        panels[0].set_title(one.title, fontsize=11)
        one.explain(panels, drawn[0])
        if regions.several:
            mark_windows(panels[0], panels[1:], regions)
        every.append(drawn[0])
    return every


def regions_of_cohort(cohort: dict[str, SpatialData], zoom: Zooms | None, image_key: str | None) -> Regions:
    """Return the regions to draw. Only a single section has regions."""
    if zoom is not None and len(cohort) > 1:
        raise ValueError(
            f"`zoom` has regions of one section, found a cohort of {len(cohort)}: {list(cohort)[:5]}. Pass one section."
        )
    sdata = next(iter(cohort.values()))
    return regions_of(sdata, contract.image_name(sdata, image_key) if zoom is not None else "", zoom)


def kept_axes(axes: np.ndarray, keep: Sequence[bool]) -> np.ndarray:
    """Return the axes without the dimensions that the call does not have."""
    kept: np.ndarray = axes[tuple(slice(None) if one else 0 for one in keep)]
    return kept


def names_of(gene: str | Sequence[str]) -> list[str]:
    """Return genes or colors as a list."""
    names = [gene] if isinstance(gene, str) else list(gene)
    if not names:
        raise ValueError("Expected at least one name, found none.")
    return names


def map_size(
    sdata: SpatialData, positions: np.ndarray, *, width: float, below: float, zoom: Zoom | None
) -> tuple[float, float]:
    """Return the size of a map without margins, inches, for the tiles or the zoomed region."""
    if zoom is None:
        return _canvas.map_size(sdata, positions, width=width, below=below)
    left, top, right, bottom = zoom_box(sdata, contract.image_name(sdata), zoom)
    return width, float(np.clip(width * (bottom - top) / (right - left), 0.4 * width, 2.0 * width)) + below


def draw_background(
    ax: Axes,
    zoom: Zoom | None,
    *,
    sdata: SpatialData,
    positions: np.ndarray,
    image_key: str | None,
    img_alpha: float,
) -> None:
    """Draw the H&E under the tiles or in the zoomed region, blended with white."""
    if zoom is None:
        _canvas.draw_section(ax, sdata, positions, image_key=image_key, fade=1.0 - img_alpha)
        return
    name = contract.image_name(sdata, image_key)
    draw_image(ax, sdata, name, zoom_box(sdata, name, zoom), faded=1.0 - img_alpha)


def draw_nothing(ax: Axes, text: str) -> None:
    """Write the reason for a missing map in its panel."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=10, color="0.4")
