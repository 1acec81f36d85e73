"""Safe opening of TIFF files that may be damaged or hostile.

A TIFF of a few kilobytes can request 10^8 planes, tiles of a terabyte, or any other file on the computer. Everything
that tifffile would allocate or open is checked before tifffile reads the series of the file. Other files are only
opened on request.
"""

from __future__ import annotations

import json
import logging
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import tifffile

from stimage_sd.io._tiff_complete import beyond_directories, missing_part
from stimage_sd.io._tiff_region import UNCOMPRESSED, block_shape

#: most planes in a description; a multiplex image has hundreds
MOST_PLANES = 20_000
#: most bytes of a decoded tile and of a decoded strip; in some files the strip is the whole image
LARGEST_TILE, LARGEST_STRIP = 1 << 28, 1 << 32
#: largest description, bytes
LARGEST_DESCRIPTION = 1 << 26
#: errors that tifffile raises on truncated files and on files that are not TIFF
BROKEN = (
    tifffile.TiffFileError,
    struct.error,
    ElementTree.ParseError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    RecursionError,
    MemoryError,
    OSError,
)
#: log messages of tifffile about directories that point beyond the end of the file
DAMAGE = re.compile("invalid (page|value) offset|invalid offset to|circular")
#: ImageJ description lines with a number of planes
PLANES = re.compile(r"^(?:images|channels|slices|frames)=(\d+)", re.MULTILINE)


class DamagedFile(ValueError):
    """Error for a file that is truncated, damaged or not a TIFF."""

    def __init__(self, path: Path, error: Exception | str) -> None:
        self.reason = " ".join(str(error).split()) or type(error).__name__
        super().__init__(
            f"Expected a complete TIFF image, found that {path} is truncated, damaged or no TIFF ({self.reason}). Copy "
            "or export it again."
        )


@contextmanager
def open_tiff(path: Path, *, several_files: bool = False) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF after checking that it is complete and within the limits.

    - `path`: the file.
    - `several_files`: whether an OME-TIFF may keep planes in other files of the same folder.
    """
    with _reports_of_damage() as reports, _open(path, several_files=several_files) as tiff:
        try:
            _check(path, tiff, several_files=several_files)
            if reports:
                raise ValueError(reports[0])
            for page in [level.keyframe for series in tiff.series for level in series.levels]:
                _check_blocks(page)
        except (FileNotFoundError, DamagedFile, OtherFile):
            raise
        except BROKEN as error:
            raise DamagedFile(path, error) from error
        yield tiff


def _open(path: Path, *, several_files: bool) -> tifffile.TiffFile:
    try:
        return tifffile.TiffFile(path, _multifile=several_files)
    except tifffile.TiffFileError:
        raise
    except BROKEN as error:
        raise DamagedFile(path, error) from error


class OtherFile(ValueError):
    """Error for a file that refers to another file that may not be read."""


def ome_root(tiff: tifffile.TiffFile) -> ElementTree.Element | None:
    """Return the OME-XML of a file, or `None` if it has none."""
    if not tiff.is_ome or not tiff.ome_metadata:
        return None
    return ElementTree.fromstring(tiff.ome_metadata)


def _check(path: Path, tiff: tifffile.TiffFile, *, several_files: bool) -> None:
    """Raise if a file is truncated, exceeds a limit, or refers to other files."""
    beyond = beyond_directories(tiff, path.stat().st_size)
    if beyond is not None:
        raise DamagedFile(path, beyond)
    description = tiff.pages.first.description
    if len(description) > LARGEST_DESCRIPTION:
        raise DamagedFile(path, f"its description has {len(description):,} characters")
    for page in tiff.pages:
        _check_blocks(page)
    root = ome_root(tiff)
    if root is not None:
        _check_planes(root)
        others = _other_files(path, root)
        if others and not several_files:
            raise OtherFile(
                f"Expected an image in one file, found that {path} keeps planes in {sorted(others)[:3]}. Other files "
                "are read only on request, by `stimage_sd.io.codex(..., several_files=True)`."
            )
        for name in sorted(others):
            _check_other(path, name)
    elif tiff.is_shaped:
        _check_count(prod(json.loads(description).get("shape", [1])[:-2]) if description.startswith("{") else 1)
    elif tiff.is_imagej:
        _check_count(prod(int(count) for count in PLANES.findall(description)[:1]))
    lacking = missing_part(path, tiff)
    if lacking is not None:
        raise DamagedFile(path, lacking)


def _check_count(n_planes: int) -> None:
    if not 0 <= n_planes <= MOST_PLANES:
        raise ValueError(f"its description speaks of {n_planes:,} planes; at most {MOST_PLANES:,} are read")


def _check_planes(root: ElementTree.Element) -> None:
    """Check all plane counts in OME-XML."""
    for element in root.iter():
        said = element.attrib
        if element.tag.endswith("Pixels"):
            _check_count(prod(max(1, int(said.get(f"Size{axis}", 1))) for axis in "CZT"))
        elif element.tag.endswith("TiffData"):
            for name in ("IFD", "NumPlanes", "PlaneCount", "FirstC", "FirstZ", "FirstT"):
                _check_count(int(said.get(name, 0)))
        elif element.tag.endswith("Channel"):
            _check_count(int(said.get("SamplesPerPixel", 1)))
        elif element.tag[:-1].endswith("Along") and "Start" in said and "End" in said:
            step = float(said.get("Step", 1)) or 1e-300
            _check_count(int(abs((float(said["End"]) - float(said["Start"])) / step)))


def _check_blocks(page: tifffile.TiffPage | tifffile.TiffFrame) -> None:
    """Check the decoded size of one strip or tile of a page."""
    page = page.aspage()
    if page.dtype is None:
        return
    height, width = block_shape(page)
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    n_bytes = height * width * samples * page.dtype.itemsize
    most = LARGEST_TILE if page.is_tiled else LARGEST_STRIP
    if n_bytes > most and (page.is_tiled or page.compression != UNCOMPRESSED):
        raise ValueError(f"a strip or tile of it has {n_bytes:,} bytes; at most {most:,} are read at once")


def _other_files(path: Path, root: ElementTree.Element) -> set[str]:
    """Return the names of other files that OME-XML refers to."""
    uuid = root.attrib.get("UUID")
    others = set()
    for part in root.iter():
        name = part.attrib.get("FileName") if part.tag.endswith("UUID") else None
        if name is not None and (uuid is None or part.text != uuid) and name != path.name:
            others.add(name)
    return others


def _check_other(path: Path, name: str) -> None:
    """Raise if another file of an image is in another folder, is missing, or is not a complete TIFF."""
    if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise OtherFile(
            f"Expected the files of an image in one folder, found that {path} refers to {name!r}. Put them into one "
            "folder, and export the image again."
        )
    beside = path.parent / name
    if not beside.is_file():
        raise FileNotFoundError(
            f"Expected {name} beside {path}, which refers to it for some of its channels, found no such file. "
            "Keep the files of an image in one folder, under their original names."
        )
    try:
        # The OME-XML describes all files. `is_ome=False` avoids a second search for them.
        with tifffile.TiffFile(beside, is_ome=False, _multifile=False) as tiff:
            lacking = beyond_directories(tiff, beside.stat().st_size) or missing_part(beside, tiff)
            for page in tiff.pages:
                _check_blocks(page)
    except BROKEN as error:
        raise DamagedFile(beside, error) from error
    if lacking is not None:
        raise DamagedFile(beside, lacking)


@contextmanager
def _reports_of_damage() -> Iterator[list[str]]:
    """Collect log messages of tifffile about directories that point beyond the end of the file."""
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
