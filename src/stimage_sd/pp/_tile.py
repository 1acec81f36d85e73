"""Where the tiles lie: one a spot, or a grid over the tissue."""

from __future__ import annotations

from typing import Any, Literal

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from scipy.ndimage import map_coordinates
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.pp._tissue import tissue_mask

Layout = Literal["spots", "grid"]
#: a smaller share of tissue is rounding, not tissue
_TOUCHES = 1e-6


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
    """Lay square tiles over a section: around its spots, or as a grid over its tissue.

    No pixel is read: tiles are cut when they are needed, borders reflected.

    Parameters
    ----------
    data
        A section, or a cohort of them. The tissue is found first where no one has.
    layout
        ``"spots"``: a tile centred on each spot. ``"grid"``: side by side over the tissue; those that touch
        none are left out. By default spots where the section has any, measured or made by
        `stimage_sd.pp.aggregate`; a grid where it has none, or cells or bins only.
    size_um
        Side of a tile in micrometres. By default the spot's own diameter, as in the paper. A model of another
        platform's tiles wants theirs here: 55 for one trained on Visium, 100 for one trained on legacy ST.
    stride_um
        Distance of neighbouring tiles of a grid in micrometres; by default their side.
    target_px
        Side in pixels to which tiles are resampled for an extractor that takes any size.
    min_tissue
        Tiles with a smaller share of tissue are kept but marked ``keep=False``.
    image_key, shapes_key, table_key
        Names of the H&E, the spots and the counts, where they are not the section's own.

    Returns
    -------
    Nothing; ``shapes["tile_squares"]`` and ``tables["tiles"]`` are written (replacing earlier ones): ``obs`` has
    ``x``, ``y`` (centre, H&E px), ``tissue_fraction``, ``keep`` and, on spots, ``spot_id``.

    Raises
    ------
    ValueError
        If micrometres are asked for and the resolution is unknown, spots lie outside the image, or no
        tile has enough tissue.
    KeyError
        If the layout is ``"spots"`` and nothing was measured on the section.

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
    for sdata in contract.sections(data).values():
        name = contract.image_name(sdata, image_key)
        chosen = layout or ("spots" if contract.stands_on_spots(sdata, shapes_key, table_key) else "grid")
        if chosen not in ("spots", "grid"):
            raise ValueError(f'Expected `layout` to be "spots" or "grid", found {layout!r}.')
        mpp = contract.require_mpp(sdata, purpose="`size_um=`") if size_um is not None else None
        side = (
            size_um / mpp if size_um is not None and mpp is not None else _spot_diameter(sdata, shapes_key, table_key)
        )
        if not side > 0:
            raise ValueError(f"Expected tiles of a positive size, found {side} px.")
        height, width = contract.levels(sdata, name)[0].shape[1:]
        if chosen == "spots":
            obs = _on_spots(sdata, table_key, width=width, height=height)
        else:
            stride = side if stride_um is None else stride_um / contract.require_mpp(sdata, purpose="`stride_um=`")
            obs = _grid(width, height, side=side, stride=stride)
        if contract.TISSUE not in sdata.labels:
            tissue_mask(sdata, image_key=image_key)
        obs["tissue_fraction"] = tissue_fraction(*contract.tissue(sdata), obs[["x", "y"]].to_numpy(), side=side)
        if chosen == "grid":
            obs = obs[obs["tissue_fraction"] > _TOUCHES].reset_index(drop=True)
        obs["keep"] = obs["tissue_fraction"] >= min_tissue
        if not obs["keep"].any():
            raise ValueError(
                f"No tile of section {contract.sample(sdata)!r} has {min_tissue:.0%} tissue (most: "
                f"{obs['tissue_fraction'].max():.0%}). Lower `min_tissue=` or look at `labels['tissue']`."
            )
        tiling = {"layout": chosen, "side_px": float(side), "target_px": int(target_px)}
        if contract.info(sdata)["mpp"] is not None:
            tiling["size_um"] = float(side * contract.info(sdata)["mpp"])
        _write(sdata, obs, tiling)
        contract.record(sdata, "pp.tile", min_tissue=min_tissue, **tiling)


def tissue_fraction(
    mask: np.ndarray, downsample: tuple[float, float], centers: np.ndarray, *, side: float
) -> np.ndarray:
    """Share of each tile that lies on tissue, exact for boxes that cut mask pixels.

    Parameters
    ----------
    mask
        ``bool (y, x)``.
    downsample
        Full-resolution pixels a mask pixel spans, along y and x.
    centers
        ``(n_tiles, 2)`` x and y, full-resolution px.
    side
        Side of a tile, full-resolution px.

    Returns
    -------
    ``float64 (n_tiles,)``, 0 to 1; what lies off the image is no tissue.

    Examples
    --------
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


def _spot_diameter(sdata: SpatialData, shapes_key: str | None, table_key: str | None) -> float:
    try:
        spots = sdata.shapes[contract.units_name(sdata, shapes_key, table_key)]
    except KeyError as error:
        raise ValueError(
            f"Section {contract.sample(sdata)!r} has no spots to take the tiles' size from. "
            "Pass `size_um=`, such as 55 for the size of a Visium spot."
        ) from error
    if "radius" not in spots:
        raise ValueError("The measured units are no circles, so they have no diameter. Pass `size_um=`.")
    return 2 * float(np.median(spots["radius"]))


def _on_spots(sdata: SpatialData, table_key: str | None, *, width: int, height: int) -> pd.DataFrame:
    units = contract.measured(sdata, table_key=table_key)
    centers = np.asarray(units.obsm["spatial"], dtype=np.float64)
    inside = (centers >= 0) & (centers < [width, height])
    outside = np.logical_not(inside.all(axis=1))  # so that NaN is outside too
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} of {len(outside)} spots lie outside the image of {width} x {height} px, such as "
            f"{units.obs_names[np.argmax(outside)]!r} at {centers[np.argmax(outside)].round(1).tolist()}. "
            "Do the coordinates belong to another image or resolution?"
        )
    return pd.DataFrame({"x": centers[:, 0], "y": centers[:, 1], "spot_id": units.obs_names.astype(str)})


def _grid(width: int, height: int, *, side: float, stride: float) -> pd.DataFrame:
    """Tiles that lie wholly on the image, row by row; a remainder is shared by both borders."""
    if side > min(width, height):
        raise ValueError(
            f"Expected tiles smaller than the image of {width} x {height} px, found a side of {side:.0f} px."
        )
    columns, rows = (int((length - side) // stride) + 1 for length in (width, height))
    x = side / 2 + (width - side - (columns - 1) * stride) / 2 + stride * np.arange(columns)
    y = side / 2 + (height - side - (rows - 1) * stride) / 2 + stride * np.arange(rows)
    return pd.DataFrame({"x": np.tile(x, rows), "y": np.repeat(y, columns)})


def _write(sdata: SpatialData, obs: pd.DataFrame, tiling: dict[str, Any]) -> None:
    centers, half = obs[["x", "y"]].to_numpy(), tiling["side_px"] / 2
    squares = shapely.box(*(centers - half).T, *(centers + half).T)
    obs.insert(0, contract.INSTANCE_KEY, np.arange(len(obs)))
    obs.index = [f"tile_{number}" for number in range(len(obs))]
    table = ad.AnnData(X=np.zeros((len(obs), 0), dtype=np.float32), obs=obs)
    table.obsm["spatial"] = centers.copy()
    table.uns["tiling"] = tiling
    sdata.tables.pop(contract.TILES, None)
    sdata.shapes.pop(contract.TILE_SQUARES, None)
    sdata.shapes[contract.TILE_SQUARES] = contract.build_shapes(
        gpd.GeoDataFrame(geometry=squares), mpp=contract.info(sdata)["mpp"]
    )
    sdata.tables[contract.TILES] = contract.annotate(table, region=contract.TILE_SQUARES)
