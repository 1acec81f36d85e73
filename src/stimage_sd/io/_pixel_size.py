"""Pixel sizes as stated in image files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import tifffile

#: allowed relative difference between height and width of a pixel; scanners measure and state both
TOLERANCE = 0.01
#: micrometers per unit of length in ImageJ metadata
IMAGEJ_UNITS = {"micron": 1.0, "microns": 1.0, "um": 1.0, "µm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "inch": 25_400.0}


def imagej_unit(tiff: tifffile.TiffFile) -> float | None:
    """Return the micrometers per unit of length that ImageJ stated, or `None` if the file states no unit."""
    stated = str((tiff.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ").replace("μ", "µ")
    return IMAGEJ_UNITS.get(stated)


def square(sizes: Sequence[float]) -> float | None:
    """Return the side of a square pixel from its width and height, or from one of the two.

    If width and height differ, the function warns and returns `None`. Pixels that are not square are not supported.

    Examples
    --------
    >>> square([0.25, 0.2501])
    0.25005
    """
    if max(sizes) > min(sizes) * (1.0 + TOLERANCE):
        warnings.warn(
            f"The file states pixels of {sizes[0]:.4f} x {sizes[1]:.4f} µm (x, y), which are not square. This "
            "resolution is not used. Resample the image, or pass `mpp=` if the file is wrong.",
            UserWarning,
            stacklevel=5,
        )
        return None
    return float(sum(sizes) / len(sizes))
