"""Lay out tiles: one per spot, or a grid over the tissue."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import pandas as pd
from scipy.ndimage import map_coordinates
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pp._tissue import tissue_mask

Layout = Literal["spots", "grid"]
#: share of tissue up to which a tile counts as empty, because of rounding
_TOUCHES = 1e-6
#: share of spots off the image above which their coordinates must belong to another image or scale
_MOST_OUTSIDE = 0.2


def tile(
    data: SpatialData | contract.Cohort,
    *,
    layout: Layout | None = None,
    size_um: float | None = None,
    stride_um: float | None = None,
    target_px: int = 299,
    min_tissue: float = 0.7,
    image_key: str | None = None,
    shapes_key: str | None = None,
    table_key: str | None = None,
) -> None:
    """Lay square tiles over a section, around its spots or as a grid over its tissue.

    No pixels are read here. Tiles are cut when they are needed, with reflected borders.

    Parameters
    ----------
    data
        A section, or a cohort of sections. The tissue is found first if needed.
    layout
        ``"spots"`` centers a tile on each spot. ``"grid"`` lays tiles side by side over the tissue and leaves out tiles
        without tissue. The default is ``"spots"`` if the section has spots, measured or made by
        `stimage_sd.pp.aggregate`. Without spots, or with only cells or bins, it is ``"grid"``.
    size_um
        Side of a tile in micrometers. By default the diameter of the spots, as in the paper. To use a model of another
        platform, pass the tile size of that platform: 55 for Visium, 100 for legacy ST.
    stride_um
        Distance between neighboring tiles of a grid in micrometers. By default the side of a tile.
    target_px
        Side in pixels to which tiles are resampled for an extractor that takes any size.
    min_tissue
        Least share of tissue. Tiles with less stay in the table with ``keep=False``.
    image_key, shapes_key, table_key
        Names of the H&E, the spots and the counts, if not the section's defaults.

    Returns
    -------
    Nothing. Writes ``shapes["tile_squares"]`` and ``tables["tiles"]`` and replaces earlier ones. ``obs`` has ``x``,
    ``y`` (center, H&E px), ``tissue_fraction``, ``keep`` and, on spots, ``spot_id``.

    Raises
    ------
    ValueError
        If a size in micrometers is requested and the resolution is unknown, more than 20 % of the spots lie outside an
        image that was not cropped, or no tile has enough tissue.
    KeyError
        If the layout is ``"spots"`` and the section has no measurements.

    Notes
    -----
    Paper, sections 2.1 (tiles of a spot's size, 299 px) and 2.2 (tissue coverage under 70 % removed).

    Examples
    --------
    >>> import cv2, numpy as np, stimage_sd as sti
    >>> pink = np.full((400, 600, 3), (200, 120, 180), np.uint8)
    >>> pink[:, :100] = 255
    >>> _ = cv2.imwrite("pink.png", pink)
    >>> section = sti.io.slide("pink.png", mpp=0.5)
    >>> sti.pp.tile(section, size_um=50)
    >>> int(section.tables["tiles"].obs["keep"].sum())
    20
    """
    if target_px < 1:
        raise ValueError(f"Expected `target_px` of at least 1, found {target_px}.")
    if stride_um is not None and not stride_um > 0:
        raise ValueError(f"Expected `stride_um` to be positive, found {stride_um}.")
    if layout not in (None, "spots", "grid"):
        raise ValueError(f'Expected `layout` to be "spots" or "grid", found {layout!r}.')
    for sdata in contract.sections(data).values():
        name = contract.image_name(sdata, image_key)
        chosen = layout or ("spots" if contract.stands_on_spots(sdata, shapes_key, table_key) else "grid")
        side = _side(sdata, name, size_um, shapes_key, table_key)
        height, width = contract.levels(sdata, name)[0].shape[1:]
        if chosen == "spots":
            obs = _on_spots(sdata, name, shapes_key, table_key, width=width, height=height)
        else:
            mpp = None if stride_um is None else contract.require_mpp(sdata, purpose="`stride_um=`", image_key=name)
            obs = _grid(width, height, side=side, stride=side if stride_um is None or mpp is None else stride_um / mpp)
        if not contract.has_tissue(sdata):
            tissue_mask(sdata, image_key=image_key)
        mask, downsample = contract.tissue(sdata, name)
        obs["tissue_fraction"] = tissue_fraction(mask, downsample, obs[["x", "y"]].to_numpy(), side=side)
        if chosen == "grid":
            obs = obs[obs["tissue_fraction"] > _TOUCHES].reset_index(drop=True)
        obs["keep"] = obs["tissue_fraction"] >= min_tissue
        if not obs["keep"].any():
            raise ValueError(
                f"No tile of section {contract.sample(sdata)!r} has {min_tissue:.0%} tissue (most: "
                f"{obs['tissue_fraction'].max():.0%}). Lower `min_tissue=` or look at `labels['tissue']`."
            )
        tiling = {"layout": chosen, "side_px": float(side), "target_px": int(target_px)}
        mpp = contract.mpp(sdata, name)
        if mpp is not None:
            tiling["size_um"] = float(side * mpp)
        contract.write_tiles(sdata, obs, tiling, image_key=name)
        contract.record(sdata, "pp.tile", min_tissue=min_tissue, **tiling)


def _side(
    sdata: SpatialData, image: str, size_um: float | None, shapes_key: str | None, table_key: str | None
) -> float:
    """Return the side of the tiles, px: the requested size, else the spots' diameter."""
    if size_um is not None:
        side = size_um / contract.require_mpp(sdata, purpose="`size_um=`", image_key=image)
    elif shapes_key is None and not contract.has_places(sdata):
        raise ValueError(
            f"Section {contract.sample(sdata)!r} has no spots to take the tiles' size from. "
            "Pass `size_um=`, such as 55 for the size of a Visium spot."
        )
    else:
        units = contract.find_units(sdata, shapes_key=shapes_key, table_key=table_key)
        if units.shapes not in sdata.shapes or "radius" not in sdata.shapes[units.shapes]:
            raise ValueError("The measured units are no circles, so they have no diameter. Pass `size_um=`.")
        side = units.diameter(sdata, image)
    if not side > 0:
        raise ValueError(f"Expected tiles of a positive size, found {side} px.")
    return side


def tissue_fraction(
    mask: np.ndarray, downsample: tuple[float, float], centers: np.ndarray, *, side: float
) -> np.ndarray:
    """Return the share of tissue per tile, exact for tiles that cut mask pixels.

    - `mask`: ``bool (y, x)``.
    - `downsample`: Full-resolution pixels per mask pixel, along y and x.
    - `centers`: ``(n_tiles, 2)`` x and y, full-resolution px.
    - `side`: side of a tile, full-resolution px.
    - returns: ``float64 (n_tiles,)``, 0 to 1. Area off the image does not count as tissue.

    >>> mask = np.zeros((10, 10), bool)
    >>> mask[:, 5:] = True
    >>> tissue_fraction(mask, (1.0, 1.0), np.array([[5.0, 5.0], [6.0, 5.0]]), side=4.0)
    array([0.5 , 0.75])
    """
    integral = np.pad(np.cumsum(np.cumsum(mask, axis=0, dtype=np.float64), axis=1), ((1, 0), (1, 0)))

    def below(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        position = [np.clip(y / downsample[0], 0, mask.shape[0]), np.clip(x / downsample[1], 0, mask.shape[1])]
        return map_coordinates(integral, position, order=1)

    left, right = centers[:, 0] - side / 2, centers[:, 0] + side / 2
    top, bottom = centers[:, 1] - side / 2, centers[:, 1] + side / 2
    area = below(right, bottom) - below(left, bottom) - below(right, top) + below(left, top)
    return np.clip(area * downsample[0] * downsample[1] / side**2, 0, 1)


def _on_spots(
    sdata: SpatialData, image: str, shapes_key: str | None, table_key: str | None, *, width: int, height: int
) -> pd.DataFrame:
    units = contract.find_units(sdata, shapes_key=shapes_key, table_key=table_key)
    centers = units.positions(sdata, image)
    inside = (centers >= 0) & (centers < [width, height])
    outside = np.logical_not(inside.all(axis=1))  # negate `inside`, so that NaN counts as outside
    cropped = contract.was_cropped(sdata, image)
    if outside.all() or (outside.mean() > _MOST_OUTSIDE and not cropped):
        raise ValueError(
            f"{int(outside.sum())} of {len(outside)} spots lie outside the image of {width} x {height} px, such as "
            f"{units.names[int(np.argmax(outside))]!r} at {centers[np.argmax(outside)].round(1).tolist()}. "
            "Do the coordinates belong to another image or resolution?"
        )
    if outside.any():
        warnings.warn(
            f"{int(outside.sum())} of {len(outside)} spots of section {contract.sample(sdata)!r} lie outside its "
            f"{'cropped ' if cropped else ''}image and get no tile, such as "
            f"{units.names[int(np.argmax(outside))]!r} at {centers[np.argmax(outside)].round(1).tolist()}.",
            UserWarning,
            stacklevel=3,
        )
    names = units.names.astype(str)
    return pd.DataFrame({"x": centers[~outside, 0], "y": centers[~outside, 1], "spot_id": names[~outside]})


def _grid(width: int, height: int, *, side: float, stride: float) -> pd.DataFrame:
    """Return centers of tiles that lie wholly on the image, row by row, with equal margins at opposite borders."""
    if side > min(width, height):
        raise ValueError(
            f"Expected tiles smaller than the image of {width} x {height} px, found a side of {side:.0f} px."
        )
    columns, rows = (int((length - side) // stride) + 1 for length in (width, height))
    x = side / 2 + (width - side - (columns - 1) * stride) / 2 + stride * np.arange(columns)
    y = side / 2 + (height - side - (rows - 1) * stride) / 2 + stride * np.arange(rows)
    return pd.DataFrame({"x": np.tile(x, rows), "y": np.repeat(y, columns)})
