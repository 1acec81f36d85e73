"""Decide whether three gray planes of a TIFF are the red, green and blue of an H&E.

Some converters write H&E as three planes instead of pixels of three samples. A multiplex image of three markers has the
same layout. Where the file says what its planes are, that is used. Otherwise brightness decides: H&E is bright, since
glass and stained tissue let most light through, and fluorescence is dark.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from stimage_sd.io._tiff_images import TiffImage, ome_image
from stimage_sd.io._tiff_open import BROKEN, DamagedFile
from stimage_sd.io._tiff_region import read_region

#: mean 8-bit value above which an image is taken as brightfield; H&E sections have 130 to 220, fluorescence under 60
BRIGHT = 100.0
#: side of the sampled windows in pixels, and the number of windows along each side
WINDOW, WINDOWS = 256, 3
#: names of the color planes in an OME-TIFF
COLOR_NAMES = (("red", "green", "blue"), ("r", "g", "b"))
#: placeholder names that converters write for unnamed channels: "", "Channel 0", "C:0", "2"
NO_NAME = re.compile(r"(channel|ch|c)?[\s:_-]*\d*(:\d+)*")


def are_colors(path: Path, tiff: tifffile.TiffFile, image: TiffImage) -> bool:
    """Return whether an image is red, green and blue in three 8-bit planes."""
    series = image.series
    if series.axes != "CYX" or series.shape[0] != 3 or series.dtype != np.uint8 or len(image.pages(0)) != 3:
        return False
    if series.keyframe.photometric == tifffile.PHOTOMETRIC.RGB:
        return True
    names = _channel_names(ome_image(tiff, series))
    if names:
        return names in COLOR_NAMES
    try:
        brightness = _brightness(image.pages(len(series.levels) - 1))
    except BROKEN as error:
        raise DamagedFile(path, error) from error
    if brightness < BRIGHT:
        return False
    warnings.warn(
        f"{path} has three planes and does not say what they are. They are too bright for fluorescence and were "
        "taken for red, green and blue.",
        UserWarning,
        stacklevel=5,
    )
    return True


def _channel_names(image: ElementTree.Element | None) -> tuple[str, ...]:
    """Return the channel names in lower case; empty where the file does not name every channel."""
    channels = [] if image is None else [tag for tag in image.iter() if tag.tag.endswith("}Channel")]
    if len(channels) == 1 and channels[0].get("SamplesPerPixel") == "3":
        return COLOR_NAMES[0]
    names = tuple(channel.get("Name", "").strip().lower() for channel in channels)
    return names if len(names) == 3 and not any(NO_NAME.fullmatch(name) for name in names) else ()


def _brightness(planes: list[tifffile.TiffPage]) -> float:
    """Return the mean value of a few windows of a level."""
    first = planes[0]
    starts = [
        np.unique(np.linspace(0, max(0, length - WINDOW), WINDOWS + 2).astype(int)[1:-1])
        for length in (first.imagelength, first.imagewidth)
    ]
    means = [
        read_region(page, slice(0, 1), slice(y, y + WINDOW), slice(x, x + WINDOW)).mean()
        for page in planes
        for y in starts[0]
        for x in starts[1]
    ]
    return float(np.mean(means))
