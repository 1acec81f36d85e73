"""Regions of a map: one region, or an overview with windows beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import add_scale_bar
from stimage_sd.stream.cutting import view_of

#: left, top, right and bottom of a region of the H&E, px
Zoom: TypeAlias = tuple[float, float, float, float]
#: one region, or several regions to draw beside the whole map
Zooms: TypeAlias = Zoom | Sequence[Zoom] | Mapping[str, Zoom]
#: longest side of the image of a region, px
_PIXELS = 1600


class Regions(NamedTuple):
    """Regions of which a map is drawn.

    Attributes
    ----------
    boxes
        One box per panel. `None` is the whole map.
    names
        Titles of the windows. The first panel has none.
    several
        Whether the first panel is an overview with windows beside it.
    """

    boxes: list[Zoom | None]
    names: list[str]
    several: bool


def regions_of(sdata: SpatialData, image: str, zoom: Zooms | None) -> Regions:
    """Return the regions to draw, after checking that they lie in the image.

    Raises
    ------
    ValueError
        If a region lies outside the image, is not four numbers, or there is none.
    """
    if zoom is None:
        return Regions([None], [""], several=False)
    if isinstance(zoom, Mapping):
        boxes = {str(name): box for name, box in zoom.items()}
    elif len(zoom) and all(isinstance(edge, Real) for edge in zoom):
        return Regions([zoom_box(sdata, image, zoom)], [""], several=False)
    else:
        boxes = {str(number): cast(Zoom, box) for number, box in enumerate(zoom, 1)}
    if not boxes:
        raise ValueError("Expected `zoom` to have at least one region, found none.")
    for box in boxes.values():
        zoom_box(sdata, image, box)
    return Regions([None, *boxes.values()], ["", *boxes], several=True)


def zoom_box(sdata: SpatialData, image: str, zoom: object) -> Zoom:
    """Return the region to draw, clipped to the image, or the whole image without `zoom`."""
    height, width = contract.levels(sdata, image)[0].shape[1:]
    if zoom is None:
        return 0.0, 0.0, float(width), float(height)
    edges = np.asarray(zoom)
    box = None
    if edges.shape == (4,) and np.issubdtype(edges.dtype, np.number):
        left, top, right, bottom = edges.tolist()
        box = max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
    if box is None or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"Expected `zoom` as left, top, right, bottom within {width} x {height} px, found {zoom}.")
    return box


def draw_image(ax: Axes, sdata: SpatialData, image: str, box: Zoom, *, faded: float) -> None:
    """Draw a region of the H&E from the coarsest sufficient pyramid level."""
    pyramid = contract.levels(sdata, image)
    longest = max(box[2] - box[0], box[3] - box[1])
    view = view_of(pyramid, longest, max(1, round(min(_PIXELS, longest))))
    level, factor = view.level, view.factor
    step = max(1, int(longest / factor / _PIXELS))
    left, top, right, bottom = (max(0, round((edge - view.start[axis % 2]) / factor)) for axis, edge in enumerate(box))
    part = np.asarray(pyramid[level].data[:, top:bottom:step, left:right:step])
    picture = np.moveaxis(part, 0, -1).astype(float)
    picture = (picture + (255 - picture) * faded).astype(np.uint8)
    ax.imshow(picture, extent=(box[0], box[2], box[3], box[1]), interpolation="antialiased", zorder=0)
    ax.set_xlim(box[0], box[2])
    ax.set_ylim(box[3], box[1])
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    add_scale_bar(ax, contract.mpp(sdata, image))


def mark_windows(overview: Axes, windows: Sequence[Axes], regions: Regions) -> None:
    """Outline each window on the overview, and frame and name its panel."""
    halo = [withStroke(linewidth=3.0, foreground="white")]
    for panel, box, name in zip(windows, regions.boxes[1:], regions.names[1:], strict=True):
        if box is None:
            continue
        left, top, right, bottom = box
        outline = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="black", linewidth=1.2)
        outline.set(zorder=4, path_effects=halo)
        overview.add_patch(outline)
        overview.annotate(
            name, (left, top), xytext=(2, 2), textcoords="offset points", fontsize=9, fontweight="bold", zorder=5,
            path_effects=halo,
        )  # fmt: skip
        panel.spines[:].set(visible=True, edgecolor="black", linewidth=1.2)
        panel.set_title(name, fontsize=10)
