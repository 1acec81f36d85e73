"""Maps of values over the pixels of single tiles: one image per tile, placed on the H&E."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale, Translation
from spatialdata.transformations import Sequence as Steps

from stimage_sd.contract._affine import apply
from stimage_sd.contract._frame import pixel_frame
from stimage_sd.contract._images import levels
from stimage_sd.contract._names import SALIENCY
from stimage_sd.contract._section import sample


class TileMap(NamedTuple):
    """Values over the pixels of a tile.

    Attributes
    ----------
    genes
        Names of the channels.
    values
        ``float32 (n_genes, y, x)``.
    extent
        Left, right, bottom and top, px of the H&E.
    """

    genes: tuple[str, ...]
    values: NDArray[np.float32]
    extent: tuple[float, float, float, float]


def write_tile_maps(sdata: SpatialData, maps: Mapping[int, TileMap]) -> None:
    """Write one image per tile, ``saliency_<tile>`` with a channel per gene, and replace all earlier ones."""
    frame, made = pixel_frame(sdata), {}
    for tile, one in maps.items():
        left, right, bottom, top = one.extent
        _, height, width = one.values.shape
        scale = Scale([(bottom - top) / height, (right - left) / width], axes=("y", "x"))
        placed = [scale, Translation([top, left], axes=("y", "x"))]
        made[f"{SALIENCY}{tile}"] = Image2DModel.parse(
            one.values.astype(np.float32), dims=("c", "y", "x"), c_coords=list(one.genes),
            transformations={name: Steps([*placed, after]) for name, after in frame.transformations.items()},
        )  # fmt: skip
    for name in tile_map_names(sdata):
        del sdata.images[name]
    for name, image in made.items():
        sdata.images[name] = image


def tile_map_names(sdata: SpatialData) -> list[str]:
    """Return the names of the images that hold maps of tiles."""
    return [name for name in sdata.images if name.removeprefix(SALIENCY).isdigit() and name.startswith(SALIENCY)]


def tile_maps(sdata: SpatialData, tiles: Sequence[int] | None = None) -> dict[int, TileMap]:
    """Return the maps of tiles, all by default.

    Raises
    ------
    KeyError
        If there are no maps, or none of a tile.
    """
    stored = {int(name.removeprefix(SALIENCY)): name for name in tile_map_names(sdata)}
    unknown = [tile for tile in tiles or () if tile not in stored]
    if not stored or unknown or (tiles is not None and not len(tiles)):
        found = f"of tiles {sorted(stored)[:10]}, none of {unknown[:5]}" if stored else "no maps"
        raise KeyError(
            f"Found {found} in section {sample(sdata)!r}. Run `stimage_sd.tl.saliency(sdata, model, gene, tiles=...)` "
            "first."
        )
    frame, maps = pixel_frame(sdata), {}
    for tile in sorted(stored) if tiles is None else tiles:
        image = levels(sdata, stored[tile])[0]
        values = np.asarray(image.data.compute(), dtype=np.float32)
        corners = np.array([[0, 0], [values.shape[2], values.shape[1]]], dtype=np.float64)
        (left, top), (right, bottom) = apply(frame.matrix(sdata.images[stored[tile]], stored[tile]), corners)
        genes = tuple(map(str, image.coords["c"].values))
        maps[int(tile)] = TileMap(genes, values, (float(left), float(right), float(bottom), float(top)))
    return maps
