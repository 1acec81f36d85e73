"""Read the nuclei of H&E or fluorescence images at the working resolution of registration, chunk by chunk."""

from __future__ import annotations

import re
from dataclasses import dataclass

import dask.array as da
import numpy as np
import xarray as xr
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import contract
from stimage_sd.image.keypoints import Picture
from stimage_sd.image.nuclear_contrast import find_padding, hematoxylin, nuclear_contrast
from stimage_sd.stream.cutting import coarsest_level

#: names of channels that show nuclei
NUCLEAR = re.compile(r"dapi|hoechst|draq5|syto|histone|\bh3\b|\bdna", re.IGNORECASE)
#: approximate diameter of a nucleus, µm
_NUCLEUS_UM = 8.0
#: least length of the longer side of a working image, px, and its largest number of pixels
_LEAST_SIDE, _MOST_PIXELS = 1024, 64_000_000


@dataclass(frozen=True, eq=False)
class WorkingImage:
    """Image at the working resolution.

    - `picture`: contrast of the nuclei.
    - `to_full`: ``(3, 3)`` matrix from working pixels to full-resolution pixels.
    - `um`: micrometers per working pixel, computed from the stated full resolution.
    """

    picture: Picture
    to_full: np.ndarray
    um: float


def read_nuclei(
    sdata: SpatialData, name: str, channel: str | None, *, pixel_um: float, working_um: float
) -> WorkingImage:
    """Read the nuclei of an image at about the working resolution, one chunk at a time.

    - `sdata`: the section.
    - `name`: name of the image.
    - `channel`: name of the channel that shows nuclei. `None` finds the channel, or takes the hematoxylin of an H&E.
    - `pixel_um`: micrometers per pixel at full resolution.
    - `working_um`: micrometers per pixel of the working image. The coarsest level that is not coarser is read and
      averaged over blocks. Small images are read at a finer resolution, large images at a coarser one.
    - returns: the image at the working resolution.
    """
    levels = contract.levels(sdata, name)
    height, width = levels[0].shape[1:]
    factor = min(working_um / pixel_um, max(height, width) / _LEAST_SIDE)
    factor = max(1.0, factor, np.sqrt(height * width / _MOST_PIXELS))
    steps = [_downsampling((height, width), level.shape[1:]) for level in levels]
    level = coarsest_level([max(step) for step in steps], factor)
    block = max(1, int(factor / max(steps[level]) + 1e-3))
    if height * width / (max(steps[level]) * block) ** 2 > _MOST_PIXELS * 1.001:
        block += 1
    # an instrument's image of three channels is fluorescence, not RGB
    colored = contract.INSTRUMENT not in get_transformation(sdata.images[name], get_all=True)
    nuclei = _nuclei(levels[level], channel, name, colored=colored)
    values = np.empty(tuple(side // block for side in nuclei.shape), np.float16)
    # threads, because another process would write to a copy of the array
    da.store(_block_means(nuclei, block).astype(np.float16), values, lock=False, scheduler="threads")
    low, high = np.percentile(values[::4, ::4].astype(np.float32), [0.1, 99.8])
    if high <= low:
        raise ValueError(f"Expected nuclei in image {name!r}, found that it shows nothing: {low} nearly everywhere.")
    intensity = _to_bytes(values, float(low), float(high))
    del values
    padding = find_padding(intensity)
    along_y, along_x = (step * block for step in steps[level])
    um = pixel_um * float(np.sqrt(along_y * along_x))
    contrast = nuclear_contrast(intensity, padding, nucleus_px=max(_NUCLEUS_UM / um, 3.0))
    return WorkingImage(Picture(contrast, padding), np.diag([along_x, along_y, 1.0]), um)


def _downsampling(full: tuple[int, ...], level: tuple[int, ...]) -> tuple[float, ...]:
    """Return full-resolution pixels per level pixel, along y and x, whole where the level's size was rounded."""
    steps = []
    for long, short in zip(full, level, strict=True):
        whole = max(1, round(long / short))
        steps.append(float(whole) if short in (long // whole, -(-long // whole)) else long / short)
    return tuple(steps)


def _nuclei(level: xr.DataArray, channel: str | None, name: str, *, colored: bool) -> da.Array:
    """Return hematoxylin, or the square root of a nuclear fluorescence channel, as lazy ``float (y, x)``."""
    channels = [str(value) for value in level.coords["c"].values] if "c" in level.coords else []
    named = [index for index, value in enumerate(channels) if NUCLEAR.search(value)]
    if channel is not None and channel in channels:
        named = [channels.index(channel)]
    elif colored and level.shape[0] == 3 and level.dtype == np.uint8 and not named:
        whole = level.data.rechunk({0: -1})
        return whole.map_blocks(hematoxylin, drop_axis=0, dtype=np.float32, meta=np.empty((0, 0), np.float32))
    elif channel is not None or (not named and level.shape[0] > 1):
        raise KeyError(
            f"Found no channel {channel or 'of nuclei, such as DAPI or Hoechst,'} in image {name!r}; its channels: "
            f"{channels}. Name one with `channel=`."
        )
    one = level.data[named[0] if named else 0].astype(np.float32)
    return da.sqrt(da.clip(da.nan_to_num(one), 0.0, 4e9))


def _block_means(image: da.Array, block: int) -> da.Array:
    if block == 1:
        return image
    whole = image[: image.shape[0] // block * block, : image.shape[1] // block * block]
    side = contract.CHUNK // block * block or block
    return da.coarsen(np.mean, whole.rechunk((side, side)), {0: block, 1: block})


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    out = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), contract.CHUNK):
        rows = values[start : start + contract.CHUNK].astype(np.float32)
        out[start : start + contract.CHUNK] = np.clip((rows - low) * (255 / (high - low)), 0, 255)
    return out
