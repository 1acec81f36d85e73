"""Whether a TIFF is all there: what its directories point at, against the size of the file.

A TIFF that was copied half may still open: readers stop at a directory they cannot find, and know of fewer levels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import tifffile

#: tag that lists a page's own directories: the coarser levels of an OME-TIFF
SUB_DIRECTORIES = 330


def missing_part(path: Path, tiff: tifffile.TiffFile) -> str | None:
    """Return what of a TIFF lies beyond the file's end, or `None` where all of it is there."""
    size = path.stat().st_size
    try:
        beyond = _beyond_directories(tiff, size)
        if beyond is not None:
            return beyond
        pages: list[tifffile.TiffPage | tifffile.TiffFrame] = list(tiff.pages)
        pages += [page for series in tiff.series for level in series.levels for page in level.pages if page is not None]
        for page in pages:
            for offset, count in zip_longest(page.dataoffsets, page.databytecounts):
                if offset is None or count is None:
                    return "its directory does not say where the pixels are"
                if offset + count > page.parent.filehandle.size:  # of an OME-TIFF the planes may lie in other files
                    return f"its pixels need {offset + count} bytes, it has {page.parent.filehandle.size}"
    except (struct.error, IndexError, KeyError, TypeError) as error:
        return f"its directories cannot be read: {error}"
    return None


def _beyond_directories(tiff: tifffile.TiffFile, size: int) -> str | None:
    """Follow the chain of directories and those within them; each is whole, and so are its tags' values."""
    layout, file = tiff.tiff, tiff.filehandle
    file.seek(8 if layout.is_bigtiff else 4)
    waiting = [struct.unpack(layout.offsetformat, file.read(layout.offsetsize))[0]]
    known = set()
    while waiting:
        offset = waiting.pop()
        if offset == 0 or offset in known:
            continue
        known.add(offset)
        if offset + layout.tagnosize > size:
            return f"it has a directory at byte {offset} of {size}"
        file.seek(offset)
        n_tags = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))[0]
        end = offset + layout.tagnosize + n_tags * layout.tagsize
        if end + layout.offsetsize > size:
            return f"a directory ends at byte {end} of {size}"
        tags = file.read(n_tags * layout.tagsize)
        waiting.append(struct.unpack(layout.offsetformat, file.read(layout.offsetsize))[0])
        if layout.is_ndpi:
            continue  # its offsets are of 64 bit, of which a tag holds 32
        for code, at, length, count in _values(layout, offset + layout.tagnosize, tags):
            if at + length > size:
                return f"a directory's values end at byte {at + length} of {size}"
            if code == SUB_DIRECTORIES:
                file.seek(at)
                form = "Q" if length == 8 * count else "I"
                waiting.extend(struct.unpack(f"{layout.byteorder}{count}{form}", file.read(length)))
    return None


def _values(layout: tifffile.TiffFormat, start: int, tags: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield code, place, bytes and number of the values of a directory's tags, which begin at the byte `start`."""
    for place in range(0, len(tags), layout.tagsize):
        code, kind = struct.unpack_from(f"{layout.byteorder}HH", tags, place)
        count = struct.unpack_from(layout.offsetformat, tags, place + 4)[0]
        if kind not in tifffile.TIFF.DATA_FORMATS:
            continue  # a type that no reader knows is for no reader to read
        length = count * struct.calcsize(tifffile.TIFF.DATA_FORMATS[kind])
        at = place + 4 + layout.offsetsize
        inline = length <= layout.offsetsize
        yield code, start + at if inline else struct.unpack_from(layout.offsetformat, tags, at)[0], length, count
