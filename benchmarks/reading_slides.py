"""One synthetic slide in four formats, for the comparisons of reading: painted once, transcoded once, and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.slides import made, slide

#: side of the slide, px: 90 tiles of 224 px; micrometers per pixel
SIDE, MPP = 20_160, 0.5
FORMATS = ("svs_jpeg", "svs_jpeg2000", "ome_jpeg", "ome_jpeg2000")
#: quality of JPEG 2000, dB: about as many bytes as the JPEG
DECIBEL = 40
#: compression tags: Aperio's JPEG 2000 of RGB, and the JPEG 2000 that OME-TIFF uses
APERIO_RGB, JPEG_2000 = 33005, 34712
Recode = Callable[[bytes], bytes]


def written(kind: str) -> Path:
    """Give the slide in one of `FORMATS`."""
    if kind == "svs_jpeg":
        return slide(SIDE)
    ending = "svs" if kind.startswith("svs") else "ome.tif"
    writer = _write_svs if kind.startswith("svs") else _write_ome
    return made(f"reading_{kind}_{SIDE}.{ending}", partial(writer, slide(SIDE), kind.endswith("jpeg2000")))


def _write_svs(source: Path, jpeg2000: bool, path: Path) -> None:
    """Write the slide as Aperio does, with JPEG 2000; the thumbnail stays a JPEG."""
    import tifffile

    with tifffile.TiffFile(source) as tiff, tifffile.TiffWriter(path, bigtiff=True) as target:
        for page in (page.aspage() for page in tiff.pages):
            about: dict[str, Any] = {"metadata": None, "software": False, "description": page.description}
            if not page.is_tiled:
                target.write(page.asarray(), photometric="rgb", compression="jpeg", rowsperstrip=16, **about)
                continue
            target.write(_tiles(page, jpeg2000), **_layout(page, jpeg2000, APERIO_RGB), **about)


def _write_ome(source: Path, jpeg2000: bool, path: Path) -> None:
    """Write the slide as an OME-TIFF, with its coarser levels in sub-directories."""
    import tifffile

    with tifffile.TiffFile(source) as tiff, tifffile.TiffWriter(path, bigtiff=True, ome=True) as target:
        pages = [page.aspage() for page in tiff.pages if page.aspage().is_tiled]
        size = {f"PhysicalSize{axis}": MPP for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
        for level, page in enumerate(pages):
            first = {"metadata": {"axes": "YXS", **size}, "subifds": len(pages) - 1}
            about: dict[str, Any] = {"subfiletype": 1} if level else first
            target.write(_tiles(page, jpeg2000), **_layout(page, jpeg2000, JPEG_2000), **about)


def _layout(page: Any, jpeg2000: bool, compression: int) -> dict[str, Any]:
    """Give the arguments of the writer for tiles that are compressed already."""
    layout = {"shape": page.shape, "dtype": np.uint8, "tile": (page.tilelength, page.tilewidth)}
    if jpeg2000:
        return {**layout, "photometric": "rgb", "compression": compression}
    return {**layout, "photometric": "ycbcr", "subsampling": (2, 2), "compression": "jpeg"}


def _tiles(page: Any, jpeg2000: bool) -> Iterator[bytes]:
    """Give the compressed tiles of a level, as they are or as JPEG 2000."""
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    recode = partial(_in_jpeg2000, page) if jpeg2000 else bytes
    with ThreadPoolExecutor() as pool:
        contents = iter(places)
        while part := list(islice(contents, 256)):
            yield from pool.map(recode, [_content(page, offset, count) for offset, count in part])


def _content(page: Any, offset: int, count: int) -> bytes:
    page.parent.filehandle.seek(offset)
    return bytes(page.parent.filehandle.read(count))


def _in_jpeg2000(page: Any, content: bytes) -> bytes:
    import imagecodecs

    pixels = np.ascontiguousarray(imagecodecs.jpeg8_decode(content))
    return bytes(imagecodecs.jpeg2k_encode(pixels, level=DECIBEL, codecformat="J2K", mct=True, reversible=False))
