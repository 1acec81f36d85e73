"""Images of a TIFF: selection of the section image, the largest or the requested one, and its pixel size.

Scanners and converters put several images in one file: a macro image or a label first, several scenes or fields of
view, or a thumbnail in page 0.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from stimage_sd.io._tiff_open import DamagedFile, ome_root
from stimage_sd.io._tiff_pages import page_below

#: names of images that do not show the section
BESIDE = re.compile(r"(?<![a-z])(thumb(nail)?s?|labels?|macro|overview|preview)(?![a-z])", re.IGNORECASE)


class NoSuchImage(ValueError):
    """Error if a file does not have the requested image."""


@dataclass(frozen=True)
class TiffImage:
    """One image of a TIFF.

    - `series`: the series of pages that tifffile groups together.
    - `frame`: number of the page, if the series is several images of one size. `None` if the series is one image.
    - `name`: name of the image in the file, may be empty.
    """

    series: tifffile.TiffPageSeries
    frame: int | None
    name: str

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the finest level, px."""
        shape = dict(zip(self.series.axes, self.series.shape, strict=True))
        return shape["Y"], shape["X"]

    def pages(self, level: int) -> list[tifffile.TiffPage]:
        """Return the pages of a level."""
        within = level > 0 and bool(self.series.keyframe.subifds)
        pages = self.series.levels[0 if within else level].pages
        chosen = [page for page in (pages if self.frame is None else [pages[self.frame]]) if page is not None]
        if len(chosen) < (len(pages) if self.frame is None else 1):
            path = Path(self.series.keyframe.parent.filehandle.path)
            raise DamagedFile(path, f"{len(pages) - len(chosen)} planes are missing that its description speaks of")
        return [page_below(page.aspage(), level - 1) if within else page.aspage() for page in chosen]


def choose_image(path: Path, tiff: tifffile.TiffFile, series: int | str | None, *, in_color: bool) -> TiffImage:
    """Return the requested image, or the largest one.

    - `path`: the file.
    - `tiff`: the open file.
    - `series`: number of the image in file order, from 0, or its name.
    - `in_color`: whether color pages of the same size are separate images. Otherwise they are channels of one image.
    """
    images = [image for one in tiff.series for image in _images(one, in_color=in_color)]
    if not images:
        raise ValueError("it has no image")
    listing = ", ".join(_listed(index, image) for index, image in enumerate(images))
    if series is not None:
        return images[_find(path, images, series, listing)]
    index = max(range(len(images)), key=lambda index: _rank(images[index], index))
    beside = [BESIDE.search(image.name) for other, image in enumerate(images) if other != index]
    if not all(beside) or (beside and BESIDE.search(images[index].name)):
        warnings.warn(
            f"{path.name} holds {len(images)} images: {listing}. Image {index} was taken. Pass `series=` to the reader "
            "to choose another.",
            UserWarning,
            stacklevel=5,
        )
    return images[index]


def ome_image(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> ElementTree.Element | None:
    """Return the OME-XML element of an image, or `None` if there is none or the match is not unique."""
    root = ome_root(tiff)
    if root is None:
        return None
    elements = [element for element in root if element.tag.endswith("Image") and pixels_of(element) is not None]
    numbers = [index for index, one in enumerate(tiff.series) if one is series]
    if numbers and len(elements) == len(tiff.series):
        return elements[numbers[0]]
    shape = dict(zip(series.axes, series.shape, strict=True))
    fitting = [
        element
        for element in elements
        if (pixels := pixels_of(element)) is not None
        and [pixels.attrib.get(f"Size{axis}") for axis in "XY"] == [str(shape.get(axis)) for axis in "XY"]
    ]
    return fitting[0] if len(fitting) == 1 else None


def pixels_of(image: ElementTree.Element | None) -> ElementTree.Element | None:
    """Return the ``Pixels`` element of an OME image, with its sizes and channels."""
    return None if image is None else next((part for part in image if part.tag.endswith("Pixels")), None)


def warn_of_orientation(path: Path, orientation: int) -> None:
    """Warn if an image states an orientation other than the stored one."""
    if orientation != 1:
        warnings.warn(
            f"{path.name} states orientation {orientation}, which is not applied: coordinates count pixels as they are "
            "stored. Rotate the image and save it again if its spots were placed on the rotated image.",
            UserWarning,
            stacklevel=5,
        )


def _images(series: tifffile.TiffPageSeries, *, in_color: bool) -> list[TiffImage]:
    if not {"Y", "X"} <= set(series.axes):
        return []
    n_frames = len(series.pages) if in_color and "S" in series.axes else 1
    return [TiffImage(series, frame if n_frames > 1 else None, series.name) for frame in range(n_frames)]


def _rank(image: TiffImage, index: int) -> tuple[bool, int, int]:
    """Return the sort key of an image: not a label or macro image, then the largest, then the first."""
    height, width = image.height_width
    return not BESIDE.search(image.name), height * width, -index


def _listed(index: int, image: TiffImage) -> str:
    height, width = image.height_width
    return f"{index} ({image.name + ', ' if image.name else ''}{width} x {height} px)"


def _find(path: Path, images: list[TiffImage], series: int | str, listing: str) -> int:
    names = [image.name for image in images]
    if isinstance(series, str) and names.count(series) == 1:
        return names.index(series)
    if isinstance(series, int) and not isinstance(series, bool) and 0 <= series < len(images):
        return series
    raise NoSuchImage(f"Expected `series` to be one of the images in {path}, {listing}, found {series!r}.")


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
