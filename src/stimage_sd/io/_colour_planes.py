"""Colours that a TIFF keeps apart, a grey plane each: whether they are colours, and streaming them.

Converters write H&E as three planes as often as they write it as pixels of three samples; a multiplex image of
three markers has the same layout. A file that says what its planes are is believed; of one that does not, the light
tells: glass and stained tissue let most of it through, while fluorescence is dark.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile
import zarr

#: mean of 8 bit over which a picture is one of light that passed tissue; sections are at 130 to 220, fluorescence
#: is under 60
BRIGHT = 100.0
#: side of the windows that are looked at, px, and how many of them lie along a side
WINDOW, WINDOWS = 256, 3
#: what an OME-TIFF may call the planes
COLOUR_NAMES = (("red", "green", "blue"), ("r", "g", "b"))
#: what converters write for a name where there is none: "", "Channel 0", "C:0", "2"
NO_NAME = re.compile(r"(channel|ch|c)?[\s:_-]*\d*(:\d+)*")


def are_colours(path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> bool:
    """Tell whether an image is red, green and blue in three planes of 8 bit.

    Warns
    -----
    UserWarning
        If the file does not say what its planes are, and they are taken for colours because they are light.
    """
    if series.axes != "CYX" or series.shape[0] != 3 or series.dtype != np.uint8:
        return False
    if series.keyframe.photometric == tifffile.PHOTOMETRIC.RGB:
        return True
    names = _channel_names(tiff)
    if names:
        return names in COLOUR_NAMES
    if _brightness(path, series) < BRIGHT:
        return False
    warnings.warn(
        f"{path} has three planes and does not say what they are. They are light, as no fluorescence is, and were "
        "taken for red, green and blue.",
        UserWarning,
        stacklevel=5,
    )
    return True


def read_whole(path: Path) -> np.ndarray:
    """Return the planes, ``uint8 (3, y, x)``, mapped from the file or decoded into a temporary one, not in memory."""
    return np.asanyarray(tifffile.imread(path, series=0, level=0, out="memmap"))


def _channel_names(tiff: tifffile.TiffFile) -> tuple[str, ...]:
    """Return the channels' names in small letters; empty where the file does not name each."""
    if not tiff.ome_metadata:
        return ()
    image = next((tag for tag in ElementTree.fromstring(tiff.ome_metadata).iter() if tag.tag.endswith("}Image")), None)
    channels = [] if image is None else [tag for tag in image.iter() if tag.tag.endswith("}Channel")]
    if len(channels) == 1 and channels[0].get("SamplesPerPixel") == "3":
        return COLOUR_NAMES[0]
    names = tuple(channel.get("Name", "").strip().lower() for channel in channels)
    return names if len(names) == 3 and not any(NO_NAME.fullmatch(name) for name in names) else ()


def _brightness(path: Path, series: tifffile.TiffPageSeries) -> float:
    """Mean over a few windows of the coarsest level."""
    store = tifffile.imread(path, aszarr=True, series=0, level=len(series.levels) - 1)
    try:
        array = zarr.open_array(store, mode="r")
        starts = [
            np.unique(np.linspace(0, max(0, length - WINDOW), WINDOWS + 2).astype(int)[1:-1])
            for length in array.shape[1:]
        ]
        windows = [np.asarray(array[:, y : y + WINDOW, x : x + WINDOW]) for y in starts[0] for x in starts[1]]
    finally:
        store.close()
    return float(np.mean([window.mean() for window in windows]))
