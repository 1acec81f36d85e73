"""Size, levels, colors and resolution of an image file, from its header. No pixels are read."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from stimage_sd.io._lazy_levels import openslide_properties, scanner
from stimage_sd.io._raster import openslide_format, raster_size, slide_mpp
from stimage_sd.io._tiff_images import choose_image, ome_image, tiff_pixel_um
from stimage_sd.io._tiff_open import open_tiff

#: suffixes of images without levels that libvips reads
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".jp2")


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image file states.

    - `kind`: format of the file, in words.
    - `height`, `width`: size of the finest level, px.
    - `n_levels`, `n_images`, `n_channels`: number of levels, of images and of channels.
    - `is_color`: whether the pixels are 8-bit colors.
    - `mpp`: micrometers per pixel, `None` if not stated.
    - `power`: power of the objective, `None` if not stated.
    """

    kind: str
    height: int
    width: int
    n_levels: int = 1
    n_images: int = 1
    n_channels: int = 3
    is_color: bool = True
    mpp: float | None = None
    power: float | None = None


def read_header(path: Path) -> ImageHeader | None:
    """Read the header of an image file. `None` if the file is no image."""
    vendor = openslide_format(path)
    if vendor not in (None, "generic-tiff"):
        return _of_slide(path, str(vendor))
    try:
        with open_tiff(path) as tiff:
            return _of_tiff(path, tiff)
    except tifffile.TiffFileError:
        pass
    if path.suffix.lower() not in PICTURES:
        return None
    height, width = raster_size(path)
    return ImageHeader(path.suffix[1:].upper(), height, width)


def _of_slide(path: Path, vendor: str) -> ImageHeader:
    properties = openslide_properties(path)
    power = scanner(path)["objective_power"]
    return ImageHeader(
        kind=f"whole slide of {vendor}",
        height=int(properties["openslide.level[0].height"]),
        width=int(properties["openslide.level[0].width"]),
        n_levels=int(properties["openslide.level-count"]),
        mpp=slide_mpp(properties),
        power=None if power is None else float(power),
    )


def _of_tiff(path: Path, tiff: tifffile.TiffFile) -> ImageHeader:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* images: ")  # the number of images is stated
        image = choose_image(path, tiff, None, in_color=True)
    page, (height, width) = image.series.keyframe, image.height_width
    is_color = page.dtype == np.uint8 and page.samplesperpixel in (3, 4)
    axes = dict(zip(image.series.axes, image.series.shape, strict=True))
    return ImageHeader(
        kind="OME-TIFF" if tiff.is_ome else "TIFF",
        height=height,
        width=width,
        n_levels=len(image.series.levels),
        n_images=len(tiff.series),
        n_channels=page.samplesperpixel if is_color else axes.get("C", axes.get("I", axes.get("Q", 1))),
        is_color=is_color,
        mpp=tiff_pixel_um(tiff, page, ome_image(tiff, image.series)),
    )
