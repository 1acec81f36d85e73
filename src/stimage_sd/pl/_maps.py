"""Shared parts of maps: list of genes, drawn region, image background, empty panels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl import _canvas
from stimage_sd.pl._cells import Zoom, draw_image, zoom_box


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
    sdata: SpatialData,
    positions: np.ndarray,
    *,
    image_key: str | None,
    img_alpha: float,
    zoom: Zoom | None,
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
