"""Open a fluorescence or multiplex TIFF with many channels as a lazy pyramid.

Supported are OME-TIFF (channels in one file or in one file per channel, pyramid in sub-directories), QPTIFF, ImageJ
stacks and plain multi-page TIFF. All become one plane per channel and one dask array per level. An uncompressed image
in one piece is mapped into memory. Other images are read tile by tile or strip by strip through tifffile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import dask.array as da
import tifffile
from anndata.utils import make_index_unique
from pandas import Index

from stimage_sd.io._multichannel_levels import extend_channels, file_levels
from stimage_sd.io._section import require_file
from stimage_sd.io._tiff_complete import warn_of_zeros, zero_tail
from stimage_sd.io._tiff_images import (
    NoSuchImage,
    choose_image,
    ome_image,
    pixels_of,
    tiff_pixel_um,
    warn_of_orientation,
)
from stimage_sd.io._tiff_open import BROKEN, DamagedFile, OtherFile, open_tiff
from stimage_sd.io._tiff_region import UNCOMPRESSED

#: TIFF tag of the page name
PAGE_NAME = 285


@dataclass(frozen=True)
class MultichannelImage:
    """An image with many channels.

    - `levels`: pyramid levels, finest first, each a lazy ``(c, y, x)`` with the dtype of the file. The longer side of
      the coarsest level is at most 1,024 px.
    - `channels`: unique channel names.
    - `named`: whether the file names all channels. Unnamed channels are called ``channel_1``, ``channel_2``, ...
    - `pixel_um`: micrometers per pixel of the finest level, or `None` where the file states no pixel size.
    """

    levels: list[da.Array]
    channels: list[str]
    named: bool
    pixel_um: float | None


def open_multichannel(
    path: str | Path, *, series: int | str | None = None, several_files: bool = False
) -> MultichannelImage:
    """Open a TIFF with one or more channels as a lazy pyramid.

    - `path`: an OME-TIFF, QPTIFF, ImageJ or multi-page TIFF. For an OME-TIFF in several files, the file that describes
      all of them.
    - `series`: image to read from a file with several images: its number in the file, from 0, or its name. Default: the
      largest.
    - `several_files`: whether to read the other files of an OME-TIFF in several files, from the same folder. By default
      such an image is refused, since a file would decide which other files are read.
    - returns: the pyramid, the channel names and the pixel size. Names are from the OME-XML, the ``Biomarker`` or
      ``Name`` of each QPTIFF page, ImageJ's labels, or the page names. A repeated name gets a suffix. Levels that the
      file lacks are computed lazily from finer levels.

    >>> import tempfile
    >>> import numpy as np
    >>> path = Path(tempfile.mkdtemp()) / "two.ome.tif"
    >>> about = {"axes": "CYX", "Channel": {"Name": ["DAPI", "CD3"]}, "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    >>> tifffile.imwrite(path, np.zeros((2, 1500, 1200), np.uint16), metadata=about)
    >>> image = open_multichannel(path)
    >>> [level.shape for level in image.levels], image.channels, image.pixel_um
    ([(2, 1500, 1200), (2, 750, 600)], ['DAPI', 'CD3'], 0.5)
    """
    path = require_file(path, what="an image file").absolute()
    try:
        with open_tiff(path, several_files=several_files) as tiff:
            chosen = choose_image(path, tiff, series, in_color=False).series
            depth = _depth(chosen)
            if depth == 1:
                described = ome_image(tiff, chosen)
                levels = file_levels(path, chosen)
                names = _names(tiff, chosen, described)
                pixel_um = tiff_pixel_um(tiff, chosen.keyframe, described)
                warn_of_orientation(path, chosen.keyframe.tags.valueof("Orientation", 1))
                _warn_of_zeros(path, chosen)
    except (FileNotFoundError, DamagedFile, OtherFile, NoSuchImage):
        raise
    except BROKEN as error:
        raise DamagedFile(path, error) from error
    if depth > 1:
        raise ValueError(
            f"Expected a two-dimensional image, found a stack of {depth} focal planes in {path}. Pass its projection, "
            "such as the morphology focus image of a Xenium run."
        )
    n_channels = levels[0].shape[0]
    if len(names) != n_channels:
        names = [""] * n_channels
    filled = [name or f"channel_{channel}" for channel, name in enumerate(names, start=1)]
    return MultichannelImage(extend_channels(levels), list(make_index_unique(Index(filled))), all(names), pixel_um)


# --------------------------------------------------------------------------------------------------
# metadata of a file


def _warn_of_zeros(path: Path, series: tifffile.TiffPageSeries) -> None:
    """Warn if the last plane of a file ends in zeros, as after a broken download or in some dark images.

    Zeros in a compressed plane are an error, since dark pixels do not compress to zeros.
    """
    pages = [page.aspage() for page in series.pages if page is not None and page.parent.filehandle.path == str(path)]
    if not pages:
        return
    last = max(pages, key=lambda page: max(page.dataoffsets))
    n_zero, n_all = zero_tail(last)
    if n_zero and last.compression != UNCOMPRESSED:
        raise ValueError(f"the last {n_zero} of {n_all} strips or tiles are zeros alone")
    if 0 < n_zero < n_all:
        warn_of_zeros(path, n_zero, n_all, "rows or tiles")


def _depth(series: tifffile.TiffPageSeries) -> int:
    return series.shape[series.axes.index("Z")] if "Z" in series.axes else 1


def _names(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, ome: ElementTree.Element | None) -> list[str]:
    if ome is not None:
        pixels = pixels_of(ome)
        channels = [] if pixels is None else [part for part in pixels if part.tag.endswith("Channel")]
        return [part.attrib.get("Name", "") for part in channels]
    if series.kind == "qpi":
        described = [ElementTree.fromstring(page.aspage().description) for page in series.pages if page is not None]
        return [next((name for tag in ("Biomarker", "Name") if (name := page.findtext(tag))), "") for page in described]
    if tiff.imagej_metadata and "Labels" in tiff.imagej_metadata:
        return [str(label) for label in tiff.imagej_metadata["Labels"]]
    pages = [page.aspage() for page in series.pages if page is not None]
    return [str(page.tags[PAGE_NAME].value) if PAGE_NAME in page.tags else "" for page in pages]
