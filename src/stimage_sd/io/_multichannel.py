"""Opening a fluorescence or multiplex TIFF of many channels as a lazy pyramid.

OME-TIFF (its channels in one file or one file each, its pyramid in sub-directories), QPTIFF, ImageJ stacks
and plain multi-page TIFF come out alike: a plane a channel, a dask array a level. An uncompressed image in
one piece is mapped into memory; all else is read a tile or strip at a time through tifffile.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import dask.array as da
import numpy as np
import tifffile
from anndata.utils import make_index_unique
from pandas import Index

from stimage_sd.io._multichannel_levels import BROKEN, DamagedFile, extend_channels, file_levels
from stimage_sd.io._raster import MICROMETRES, PLAUSIBLE_MPP
from stimage_sd.io._tiff_complete import missing_part

#: what tifffile logs, and goes on after, where a directory points beyond the end of its file
DAMAGE = re.compile("invalid (page|value) offset|invalid offset to")
#: TIFF tag of a page's name
PAGE_NAME = 285


@dataclass(frozen=True)
class MultichannelImage:
    """An image of many channels.

    Parameters
    ----------
    levels
        The pyramid, finest first, each a lazy ``(c, y, x)`` of the file's own type; the coarsest has a longer
        side of at most 1,024 px.
    channels
        A name a channel, each once.
    named
        Whether the file names all its channels; ``channel_1``, ``channel_2``, ... are made up.
    pixel_um
        Micrometres a pixel of the finest level; `None` where the file states none.
    """

    levels: list[da.Array]
    channels: list[str]
    named: bool
    pixel_um: float | None


def open_multichannel(path: str | Path) -> MultichannelImage:
    """Open a TIFF of one or many channels lazily, as a pyramid.

    Parameters
    ----------
    path
        An OME-TIFF, QPTIFF, ImageJ or multi-page TIFF. Of an OME-TIFF of several files, the one that describes
        them all; the others are found beside it.

    Returns
    -------
    The pyramid, the channels' names and the pixel size. Names are those of the OME-XML, of each page's
    ``Biomarker`` or ``Name`` in a QPTIFF, ImageJ's labels, or pages' names; a repeated one gets a suffix.
    Levels that the file lacks are computed from finer ones when they are asked for.

    Raises
    ------
    FileNotFoundError
        If the file, or one of those that it refers to, is not there.
    ValueError
        If one of them is truncated, empty or no TIFF, or the image is a stack of focal planes.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "two.ome.tif"
    >>> about = {"axes": "CYX", "Channel": {"Name": ["DAPI", "CD3"]}, "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    >>> tifffile.imwrite(path, np.zeros((2, 1500, 1200), np.uint16), metadata=about)
    >>> image = open_multichannel(path)
    >>> [level.shape for level in image.levels], image.channels, image.pixel_um
    ([(2, 1500, 1200), (2, 750, 600)], ['DAPI', 'CD3'], 0.5)
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"Expected an image file at {path}, found {kind}. Check the path.")
    try:
        with _reports_of_damage() as reports, tifffile.TiffFile(path) as tiff:
            ome = ElementTree.fromstring(tiff.ome_metadata) if tiff.is_ome and tiff.ome_metadata else None
            if ome is not None:
                _check_parts(path, ome)
            lacking = missing_part(path, tiff)
            if lacking is not None:
                raise DamagedFile(path, lacking)
            series = tiff.series[0]
            depth = _depth(series)
            if depth == 1:
                levels = file_levels(path, series)
                names = _names(tiff, series, ome)
                pixel_um = _pixel_um(tiff, series.keyframe, ome)
        if reports:
            raise ValueError(reports[0])
    except (FileNotFoundError, DamagedFile):
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
    filled = [name or f"channel_{number}" for number, name in enumerate(names, start=1)]
    return MultichannelImage(extend_channels(levels), list(make_index_unique(Index(filled))), all(names), pixel_um)


# --------------------------------------------------------------------------------------------------
# what a file says about itself


@contextmanager
def _reports_of_damage() -> Iterator[list[str]]:
    """Gather what tifffile logs, and goes on after, where a directory points beyond the end of its file."""
    reports: list[str] = []
    thread = threading.get_ident()

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread and DAMAGE.search(record.getMessage()):
                reports.append(record.getMessage())

    handler = Gather(logging.ERROR)
    tifffile.logger().addHandler(handler)
    try:
        yield reports
    finally:
        tifffile.logger().removeHandler(handler)


def _check_parts(path: Path, ome: ElementTree.Element) -> None:
    """Raise where a file that an OME-TIFF of several files refers to is not there, truncated or no TIFF."""
    own = ome.attrib.get("UUID")
    for part in ome.iter():
        name = part.attrib.get("FileName") if part.tag.endswith("UUID") else None
        if name is None or part.text == own or name == path.name:
            continue
        beside = path.parent / name
        if not beside.is_file():
            raise FileNotFoundError(
                f"Expected {name} beside {path}, which says that some of its channels lie there, found no such file. "
                "Keep the image's files in one folder, under their own names."
            )
        try:
            # Its description is that of all the files: they would be looked for again.
            with tifffile.TiffFile(beside, is_ome=False) as tiff:
                lacking = missing_part(beside, tiff)
        except BROKEN as error:
            raise DamagedFile(beside, error) from error
        if lacking is not None:
            raise DamagedFile(beside, lacking)


def _depth(series: tifffile.TiffPageSeries) -> int:
    return series.shape[series.axes.index("Z")] if "Z" in series.axes else 1


def _names(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, ome: ElementTree.Element | None) -> list[str]:
    if ome is not None:
        pixels = _pixels(ome)
        found = [] if pixels is None else [part for part in pixels if part.tag.endswith("Channel")]
        return [part.attrib.get("Name", "") for part in found]
    if series.kind == "qpi":
        described = [ElementTree.fromstring(page.aspage().description) for page in series.pages if page is not None]
        return [next((name for tag in ("Biomarker", "Name") if (name := page.findtext(tag))), "") for page in described]
    if tiff.imagej_metadata and "Labels" in tiff.imagej_metadata:
        return [str(label) for label in tiff.imagej_metadata["Labels"]]
    pages = [page.aspage() for page in series.pages if page is not None]
    return [str(page.tags[PAGE_NAME].value) if PAGE_NAME in page.tags else "" for page in pages]


def _pixel_um(tiff: tifffile.TiffFile, page: tifffile.TiffPage, ome: ElementTree.Element | None) -> float | None:
    pixels = _pixels(ome) if ome is not None else None
    if pixels is not None:
        sizes = [
            float(pixels.attrib[f"PhysicalSize{axis}"])
            * MICROMETRES.get(pixels.attrib.get(f"PhysicalSize{axis}Unit", "µm"), np.nan)
            for axis in "XY"
            if f"PhysicalSize{axis}" in pixels.attrib
        ]
        if sizes:
            return _plausible(sizes)
    imagej = tiff.imagej_metadata or {}
    unit = {"micron": 1.0, "microns": 1.0, "inch": MICROMETRES[2], **MICROMETRES}.get(
        str(imagej.get("unit", "")).replace("\\u00B5", "µ")
    ) or MICROMETRES.get(int(page.tags.valueof("ResolutionUnit", 2)))
    resolutions = [page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution")]
    if unit is None or any(dots == 0 or units == 0 for dots, units in resolutions):
        return None
    return _plausible([unit * units / dots for dots, units in resolutions])


def _pixels(ome: ElementTree.Element) -> ElementTree.Element | None:
    return next((part for part in ome.iter() if part.tag.endswith("Pixels")), None)


def _plausible(values: list[float]) -> float | None:
    if not all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in values):
        return None
    return float(np.mean(values))
