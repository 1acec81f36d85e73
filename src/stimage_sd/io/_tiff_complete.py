"""Completeness checks of TIFF files: offsets in the directories against the size of the file.

A partly copied TIFF may still open. Readers stop at the first missing directory and see fewer levels. A partly
downloaded TIFF ends in zeros, and its directories may lack strips or tiles.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile

from stimage_sd.io._tiff_region import UNCOMPRESSED, kind_of, n_blocks

#: tag that lists the sub-directories of a page: the coarser levels of an OME-TIFF
SUB_DIRECTORIES = 330
#: most directories of a file, and most strips or tiles checked for zeros
MOST_DIRECTORIES, LOOKED_AT = 20_000, 4096


def missing_part(path: Path, tiff: tifffile.TiffFile) -> str | None:
    """Return which part of a TIFF is missing or lies beyond the end of the file, or `None` if it is complete."""
    try:
        pages: list[tifffile.TiffPage | tifffile.TiffFrame] = list(tiff.pages)
        pages += [page for series in tiff.series for level in series.levels for page in level.pages if page is not None]
        for page in pages:
            lacking = _missing_blocks(page)
            if lacking is not None:
                return lacking
    except (struct.error, IndexError, KeyError, TypeError) as error:
        return f"its directories cannot be read: {error}"
    return None


def _missing_blocks(page: tifffile.TiffPage | tifffile.TiffFrame) -> str | None:
    """Return a message if strips or tiles of a page are missing, or `None`."""
    offsets, counts = page.dataoffsets, page.databytecounts
    key = page.keyframe
    if key is None or not key.shape or key.dtype is None:
        return None
    kind = "tiles" if key.is_tiled else "strips"
    # In these formats one directory covers several planes, or one JPEG in parts. Philips leaves out background tiles.
    file = key.parent
    expected = 1 if file.is_ndpi or file.is_stk or file.is_lsm or file.is_philips else n_blocks(key)
    present = sum(1 for offset, count in zip(offsets, counts, strict=False) if offset > 0 and count > 0)
    if present < expected:
        return (
            f"{expected - present} of its {expected} {kind} are missing from its directory; a sparse TIFF has to be "
            "written with all of them"
        )
    size = page.parent.filehandle.size  # planes of an OME-TIFF may lie in other files
    end = max(offset + count for offset, count in zip(offsets, counts, strict=False))
    if end > size:
        return f"its pixels need {end} bytes, the file has {size}"
    return None


def warn_of_zeros(path: Path, n_zero: int, n_all: int, kind: str) -> None:
    """Warn about zeros at the end of an image, which may be damage or a dark border."""
    warnings.warn(
        f"The last {n_zero} of {n_all} {kind} of {path.name} are zeros. If the image is not dark there, copy or export "
        "the file again.",
        UserWarning,
        stacklevel=5,
    )


def zero_tail(page: tifffile.TiffPage) -> tuple[int, int]:
    """Return the number of all-zero strips or tiles at the end of a page, and the number of all strips or tiles.

    A broken download has the full file size and ends in zeros. Compressed strips or tiles are never all zeros. In
    uncompressed pages with strips, rows are counted instead of strips.
    """
    file = page.parent.filehandle
    row_bytes = page.imagewidth * kind_of(page).itemsize * (page.samplesperpixel if page.planarconfig == 1 else 1)
    blocks = sorted(zip(page.dataoffsets, page.databytecounts, strict=False))
    if page.compression == UNCOMPRESSED and not page.is_tiled:
        blocks = [
            (start, min(row_bytes, offset + count - start))
            for offset, count in blocks
            for start in range(offset, offset + count, row_bytes)
        ]
    n_zero = 0
    with file.lock:
        for offset, count in blocks[: -LOOKED_AT - 1 : -1]:
            file.seek(offset)
            if np.frombuffer(file.read(count), np.uint8).any():
                break
            n_zero += 1
    return n_zero, len(blocks)


def beyond_directories(tiff: tifffile.TiffFile, size: int) -> str | None:
    """Check that all directories, sub-directories and tag values lie within the file.

    Returns a message if a part lies beyond the end of the file, if directories form a loop, or if there are too many
    directories. Returns `None` otherwise.
    """
    try:
        return _follow_directories(tiff, size)
    except (struct.error, IndexError, KeyError, TypeError) as error:
        return f"its directories cannot be read: {error}"


def _follow_directories(tiff: tifffile.TiffFile, size: int) -> str | None:
    layout, file = tiff.tiff, tiff.filehandle
    file.seek(8 if layout.is_bigtiff else 4)
    start = struct.unpack(layout.offsetformat, file.read(layout.offsetsize))[0]
    waiting: list[tuple[int, frozenset[int]]] = [(start, frozenset())]
    known: set[int] = set()
    chain: set[int] = set()
    while waiting:
        offset, above = waiting.pop()
        if offset in above:
            return f"its directories lead back to byte {offset}"
        if offset == 0 or offset in known:
            continue
        known.add(offset)
        if len(known) > MOST_DIRECTORIES:
            return f"it has more than {MOST_DIRECTORIES:,} directories"
        if offset + layout.tagnosize > size:
            return f"it has a directory at byte {offset} of {size}"
        file.seek(offset)
        n_tags = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))[0]
        end = offset + layout.tagnosize + n_tags * layout.tagsize
        if end + layout.offsetsize > size:
            return f"a directory ends at byte {end} of {size}"
        tags = file.read(n_tags * layout.tagsize)
        following = struct.unpack(layout.offsetformat, file.read(layout.offsetsize))[0]
        # Sub-directories may be chained and also listed in a tag.
        waiting.append((following, above))
        if not above:
            chain.add(offset)
            if following in chain:
                return f"its directories lead back to byte {following}"
        if layout.is_ndpi:
            continue  # NDPI offsets have 64 bits, and the tag holds only 32 of them
        for code, at, length, count in _values(layout, offset + layout.tagnosize, tags):
            if at + length > size:
                return f"a directory's values end at byte {at + length} of {size}"
            if code == SUB_DIRECTORIES:
                if count > MOST_DIRECTORIES:
                    return f"it has more than {MOST_DIRECTORIES:,} directories"
                file.seek(at)
                form = "Q" if length == 8 * count else "I"
                below = struct.unpack(f"{layout.byteorder}{count}{form}", file.read(length))
                waiting.extend((inner, above | {offset}) for inner in below)
    return None


def _values(layout: tifffile.TiffFormat, start: int, tags: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield code, offset, bytes and number of values of the tags of a directory. The tags begin at byte `start`."""
    for place in range(0, len(tags), layout.tagsize):
        code, kind = struct.unpack_from(f"{layout.byteorder}HH", tags, place)
        count = struct.unpack_from(layout.offsetformat, tags, place + 4)[0]
        if kind not in tifffile.TIFF.DATA_FORMATS:
            continue  # unknown types are never read
        length = count * struct.calcsize(tifffile.TIFF.DATA_FORMATS[kind])
        at = place + 4 + layout.offsetsize
        inline = length <= layout.offsetsize
        yield code, start + at if inline else struct.unpack_from(layout.offsetformat, tags, at)[0], length, count
