"""Saliency maps over their tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pl._canvas import Colors, add_color_bar, cut_tiles
from stimage_sd.pl._figure import AxesLike, Sheet, Title
from stimage_sd.pl._maps import names_of

#: side of a drawn tile, px
_PIXELS = 320
#: contrast of the tissue under a map
_CONTRAST = 0.7


def saliency(
    data: SpatialData,
    gene: str | Sequence[str],
    *,
    tiles: Sequence[int] | None = None,
    smooth: float = 8.0,
    cmap: str | Colormap = "RdBu_r",
    vmin: float | None = None,
    vmax: float | None = None,
    alpha: float | None = None,
    image_key: str | None = None,
    ax: AxesLike | None = None,
    title: Title | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Draw saliency maps over their tiles, red where pixels raise the prediction and blue where they lower it.

    Pixels are the more opaque, the larger their value. The tissue is drawn in gray, and stays visible elsewhere.

    Parameters
    ----------
    data
        A section with maps from `stimage_sd.tl.saliency`.
    gene
        One or several genes. Each gene gets a row of tiles.
    tiles
        ``obs["instance_id"]`` of tiles with a map. Default: all tiles with a map.
    smooth
        Standard deviation of the Gaussian that smooths the maps, in pixels of the map. The default shows nuclei. ``0``:
        no smoothing.
    cmap, vmin, vmax, alpha
        Colormap. Ends of the color range, shared by all tiles of a gene and symmetric around 0 unless both are given.
        Largest opacity.
    image_key
        Name of the image to draw on. Default: the stain-normalized H&E, or the H&E without one.
    ax
        One axes per gene and tile, ordered by gene. Default: a new figure.
    title, figsize, save, return_fig
        `title`: one title per panel, or one above all panels. `figsize`: size of a new figure, inches. `save`: output
        file. `return_fig`: return the figure instead of the axes.

    Returns
    -------
    One axes per tile, or an array with one row per gene if `gene` is a list.

    Raises
    ------
    KeyError
        If the section has no maps, or none of this gene or tile.
    ValueError
        If `smooth` is negative, or the number of axes in `ax` differs from genes times tiles.

    Notes
    -----
    Paper, section 3.11 and figure S12.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.pl.saliency(section, "VEGFA")  # doctest: +SKIP
    """
    sdata = contract.section(data)
    sheet = Sheet(ax, title, figsize, save, return_fig)
    colors = Colors(cmap, vmin, vmax, 0.8 if alpha is None else alpha)
    if not smooth >= 0:
        raise ValueError(f"Expected `smooth` of 0 or more, found {smooth}.")
    genes, maps = names_of(gene), contract.tile_maps(sdata, tiles)
    for name in genes:
        lacking = {tile: one.genes for tile, one in maps.items() if name not in one.genes}
        if lacking:
            tile, known = next(iter(lacking.items()))
            raise KeyError(f"Found no map of {name!r} on tile {tile}, only of {list(known)}. Run `tl.saliency` for it.")
    pictures = _pictures(sdata, list(maps.values()), image_key)
    axes = sheet.panels(len(genes) * len(maps), size=(3.0, 3.15), columns=len(maps))
    grid = axes.reshape(len(genes), len(maps))
    for row, name in zip(grid, genes, strict=True):
        values = [
            scipy.ndimage.gaussian_filter(one.values[one.genes.index(name)], smooth) if smooth > 0
            else one.values[one.genes.index(name)]
            for one in maps.values()
        ]  # fmt: skip
        largest = float(np.nanpercentile(np.abs(np.concatenate([one.ravel() for one in values])), 99.5)) or 1.0
        norm = colors.around_zero(largest)
        for panel, (tile, one), picture, value in zip(row, maps.items(), pictures, values, strict=True):
            _draw(panel, picture, one.extent, value, colors, norm)
            panel.set_title(f"{name}, tile {tile}", fontsize=9)
        add_color_bar(row[-1], ScalarMappable(norm, colors.cmap), "saliency", location="right")
    return sheet.done(axes if isinstance(gene, str) else grid)


def _pictures(sdata: SpatialData, maps: Sequence[contract.TileMap], image_key: str | None) -> list[np.ndarray]:
    """Cut the squares of the maps from the image, each ``uint8 (y, x, 3)``."""
    image = contract.working_image_name(sdata, image_key)
    boxes = np.array([[one.extent[0], one.extent[3], one.extent[1], one.extent[2]] for one in maps])
    home = contract.image_name(sdata)
    matrix = contract.pixel_frame(sdata, image).matrix(sdata.images[home], home)
    corners = contract.apply(matrix, boxes.reshape(-1, 2)).reshape(-1, 2, 2)
    sides = np.abs(corners[:, 1] - corners[:, 0]).max(axis=1)
    return cut_tiles(sdata, corners.mean(axis=1), side=float(sides[0]), target=_PIXELS, image_key=image)


def _draw(
    ax: Axes, picture: np.ndarray, extent: tuple[float, float, float, float], values: np.ndarray, colors: Colors,
    norm: Normalize,
) -> None:  # fmt: skip
    # in light gray, because the blue of nuclei hides that of values
    gray = 255 - _CONTRAST * (255 - picture.mean(axis=-1))
    ax.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="antialiased", zorder=0)
    strength = np.clip(np.abs(norm(values) - norm(0.0)) / max(1 - float(norm(0.0)), 1e-12), 0, 1)
    opacity = (0.8 if colors.alpha is None else colors.alpha) * np.asarray(strength)
    ax.imshow(values, extent=extent, cmap=colors.cmap, norm=norm, alpha=opacity, interpolation="bilinear", zorder=1)
    ax.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
