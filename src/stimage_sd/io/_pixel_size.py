"""Pixel sizes as stated in image files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
import tifffile

from stimage_sd.io._tiff_images import pixels_of

#: resolutions of microscopes, µm per pixel; TIFF tags outside this range describe a printer or screen
PLAUSIBLE_MPP = (0.05, 10.0)
#: micrometers per unit of OME-TIFF and of TIFF tags (2: inch, 3: centimeter)
MICROMETERS = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, 2: 25_400.0, 3: 10_000.0}

#: allowed relative difference between height and width of a pixel; scanners measure and state both
TOLERANCE = 0.01
#: micrometers per unit of length in ImageJ metadata
IMAGEJ_UNITS = {"micron": 1.0, "microns": 1.0, "um": 1.0, "µm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "inch": 25_400.0}


def imagej_unit(tiff: tifffile.TiffFile) -> float | None:
    """Return the micrometers per unit of length that ImageJ stated, or `None` if the file states no unit."""
    stated = str((tiff.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ").replace("μ", "µ")
    return IMAGEJ_UNITS.get(stated)


def tiff_pixel_um(tiff: tifffile.TiffFile, page: tifffile.TiffPage, ome: ElementTree.Element | None) -> float | None:
    """Return the micrometers per pixel that a TIFF states, by its OME-XML or else by its tags."""
    pixels = pixels_of(ome)
    if pixels is not None:
        sizes = [
            float(pixels.attrib[f"PhysicalSize{axis}"])
            * MICROMETERS.get(pixels.attrib.get(f"PhysicalSize{axis}Unit", "µm"), np.nan)
            for axis in "XY"
            if f"PhysicalSize{axis}" in pixels.attrib
        ]
        if sizes:
            return plausible(sizes)
    unit = imagej_unit(tiff) or MICROMETERS.get(int(page.tags.valueof("ResolutionUnit", 2)))
    resolutions = [page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution")]
    if unit is None or any(dots == 0 or units == 0 for dots, units in resolutions):
        return None
    return plausible([unit * units / dots for dots, units in resolutions])


def plausible(sizes: Sequence[float]) -> float | None:
    """Return the side of a pixel as `square`, or `None` if a size is not that of a microscope, or there is none."""
    if not sizes or not all(PLAUSIBLE_MPP[0] <= size <= PLAUSIBLE_MPP[1] for size in sizes):
        return None
    return square(sizes)


def square(sizes: Sequence[float]) -> float | None:
    """Return the side of a square pixel from its width and height, or from one of the two.

    If width and height differ, the function warns and returns `None`. Pixels that are not square are not supported.

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
