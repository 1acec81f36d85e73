"""Regions of a TIFF page, read from strips or tiles that are decoded in full and checked.

Decoders do not report damage. They pad short data and cut long data. Here, a missing strip or tile is an error, and so
is a wrong decoded length. Pixels are returned as stored. The stated orientation is not applied.
"""

from __future__ import annotations

from math import ceil

import imagecodecs
import numpy as np
import tifffile

from stimage_sd.io._jpeg_check import check_jpeg

#: compression tags of TIFF
UNCOMPRESSED, JPEG, APERIO_RGB = 1, 7, 33005
#: extra bytes that some writers add to the last row of a strip or tile
SURPLUS = 4
#: decoders of LZW and PackBits; these data have no checksum, so only the decoded length shows damage
WITHOUT_CHECKSUM = {5: imagecodecs.lzw_decode, 32773: imagecodecs.packbits_decode}


def block_shape(page: tifffile.TiffPage) -> tuple[int, int]:
    """Return the size ``(y, x)`` of the tiles or strips of a page, px."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def is_planar(page: tifffile.TiffPage) -> bool:
    """Return whether a page stores its samples in separate planes."""
    return page.samplesperpixel > 1 and page.planarconfig == 2


def n_blocks(page: tifffile.TiffPage) -> int:
    """Return the number of tiles or strips of a page."""
    height, width = block_shape(page)
    planes = page.samplesperpixel if is_planar(page) else 1
    return planes * ceil(page.imagelength / height) * ceil(page.imagewidth / width)


def kind_of(page: tifffile.TiffPage) -> np.dtype:
    """Return the dtype of the pixels of a page, in native byte order."""
    if page.dtype is None:
        raise ValueError(f"its pixels have {page.bitspersample} bits of an unknown type")
    return page.dtype.newbyteorder("=")


def holds_rgb_in_jpeg_2000(page: tifffile.TiffPage) -> bool:
    """Return whether the tiles of a page are JPEG 2000 of red, green and blue at full resolution.

    Other color models and sizes of the components are left to OpenSlide.
    """
    if page.compression != APERIO_RGB or page.samplesperpixel != 3:
        return False
    header = _read(page, page.dataoffsets[0], min(page.databytecounts[0], 51))
    # The first two markers are the start and the size. The size ends with three bytes per component.
    return header[:4] == b"\xff\x4f\xff\x51" and header[40:] == b"\x00\x03" + 3 * b"\x07\x01\x01"


def read_region(page: tifffile.TiffPage, samples: slice, rows: slice, columns: slice) -> np.ndarray:
    """Return a region of a page as ``(sample, y, x)``, in memory as the page stores it.

    - `page`: the page. Its file is open and has a lock.
    - `samples`, `rows`, `columns`: the region, as slices with step 1.
    """
    planes = range(*samples.indices(page.samplesperpixel))
    top, bottom, _ = rows.indices(page.imagelength)
    left, right, _ = columns.indices(page.imagewidth)
    height, width = block_shape(page)
    across, down = ceil(page.imagewidth / width), ceil(page.imagelength / height)
    # Pixels with their samples side by side are copied row by row, many times faster than sample by sample.
    height_width, kind = (bottom - top, right - left), kind_of(page)
    if is_planar(page):
        region = np.empty((len(planes), *height_width), kind)
    else:
        region = np.moveaxis(np.empty((*height_width, len(planes)), kind), -1, 0)
    for plane in planes if is_planar(page) else (None,):
        target = np.moveaxis(region, 0, -1) if plane is None else region[plane - planes.start][..., None]
        for row in range(top // height, ceil(bottom / height)):
            y = slice(max(top, row * height), min(bottom, (row + 1) * height))
            for column in range(left // width, ceil(right / width)):
                x = slice(max(left, column * width), min(right, (column + 1) * width))
                segment = ((plane or 0) * down + row) * across + column
                inside = slice(y.start - row * height, y.stop - row * height)
                block = _read_rows(page, segment, inside)[:, x.start - column * width : x.stop - column * width]
                colors = block if plane is not None or len(planes) == block.shape[2] else block[..., samples]
                target[y.start - top : y.stop - top, x.start - left : x.stop - left] = colors
    return region


def _read_rows(page: tifffile.TiffPage, segment: int, rows: slice) -> np.ndarray:
    """Return rows of a tile or strip as ``(y, x, sample)``."""
    if segment >= min(len(page.dataoffsets), len(page.databytecounts)):
        raise ValueError(f"the directory names {len(page.dataoffsets)} of its {n_blocks(page)} strips or tiles")
    offset, count = page.dataoffsets[segment], page.databytecounts[segment]
    if offset == 0 or count == 0:
        raise ValueError(f"strip or tile {segment} is missing")
    kind = kind_of(page).newbyteorder(page.parent.byteorder)
    plain = page.compression == UNCOMPRESSED and page.predictor == 1 and page.bitspersample == 8 * kind.itemsize
    if plain and not page.is_tiled and page.fillorder == 1:
        # A strip may be the whole image, so only the requested rows are read.
        samples = 1 if is_planar(page) else page.samplesperpixel
        row_bytes = page.imagewidth * samples * kind.itemsize
        data = _read(page, offset + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)
        return np.frombuffer(data, kind).reshape(rows.stop - rows.start, page.imagewidth, samples)
    data = _read(page, offset, count)
    if page.compression == JPEG:
        check_jpeg(data, page.jpegtables)
    elif page.compression in WITHOUT_CHECKSUM and page.fillorder == 1:
        _check_length(page, len(WITHOUT_CHECKSUM[page.compression](data)), segment)
    block = page.decode(data, segment, jpegtables=page.jpegtables)[0]
    if block is None:
        raise ValueError(f"strip or tile {segment} is missing")
    return np.asarray(block[0, rows])


def _check_length(page: tifffile.TiffPage, decoded: int, segment: int) -> None:
    """Raise if a strip or tile decodes to the wrong length. tifffile would pad or cut the data."""
    height, width = block_shape(page)
    row = -(-width * (1 if is_planar(page) else page.samplesperpixel) * page.bitspersample // 8)
    last = page.imagelength - segment % ceil(page.imagelength / height) * height
    allowed = {row * height, row * (height if page.is_tiled else min(height, last))}
    if not any(0 <= decoded - length <= SURPLUS for length in allowed):
        raise ValueError(f"strip or tile {segment} decodes to {decoded} bytes, not to {row * height}")


def _read(page: tifffile.TiffPage, offset: int, count: int) -> bytes:
    """Read bytes from the file of a page, under the lock that all threads share."""
    file = page.parent.filehandle
    with file.lock:
        file.seek(offset)
        data: bytes = file.read(count)
    if len(data) != count:
        raise ValueError(f"the file ends at byte {offset + len(data)}, {count - len(data)} bytes too early")
    return data
