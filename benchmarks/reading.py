"""Reading tiles of a slide: an Aperio SVS with JPEG tiles; the other formats are in ``benchmarks/reading_*.py``.

A synthetic slide of 20,160 px a side lies on disk in four formats, each in tiles of 256 px, three levels a fourth
each: Aperio SVS and OME-TIFF, with JPEG as a scanner writes it, and with JPEG 2000 of 40 dB of the same pixels. Each
side reads the first `n` tiles of 224 px, side by side at the finest level (0.5 µm per px), in the order in which the
package streams them, in RGB, and hands them over in batches of 32, of which a few pixels of each tile are kept.
Opening, imports and a first tile, at the other end of the slide, are not timed. Every side uses both cores, as follows:

- OpenSlide: ``read_region`` of one open slide, which its threads may share, then ``convert("RGB")``.
- tifffile, zarr: ``imread(aszarr=True)`` opened by zarr, and a slice per tile, on two threads.
- tifffile, segments: the segments that a tile touches are read and decoded by ``TiffPage.decode``, on two threads.
- libvips: an image opened with random access, a ``Region`` per thread, and ``fetch`` per tile.
- LazySlide: ``wsi.ds.tile_images`` in torch's ``DataLoader`` with two worker processes. Their memory is not counted.
- decoder alone: every segment that the tiles touch is decoded once on two threads, by the decoder that the package
  uses, from bytes in memory. Nothing is checked, cut or handed over, so this is a limit.

A side that cannot read a format is not among the sides of the format, and `CANNOT` says why. `max_difference` is the
largest difference of the kept pixels from those of OpenSlide, or from those of tifffile where OpenSlide cannot read the
format. `cpu_seconds` is the time of all cores, worker processes too.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import OURS, Comparison
from benchmarks.reading_slides import SIDE, written
from benchmarks.slides import made, needs_bench

PX, BATCH, SIZES = 224, 32, (500, 2000, 8000)
OPENSLIDE, ZARR, SEGMENTS = "OpenSlide", "tifffile, zarr", "tifffile, segments"
LIBVIPS, LAZYSLIDE, DECODER = "libvips", "LazySlide", "decoder alone"
#: pixels of a tile that are kept
KEPT = (slice(None), slice(16, None, 64), slice(16, None, 64))
Job = Callable[[], Mapping[str, Any]]
#: reads a tile, ``uint8 (PX, PX, 3)``, by x and y of its corner
ReadTile = Callable[[int, int], np.ndarray]
#: why a side is not among those of a format
CANNOT: Mapping[str, Mapping[str, str]] = {
    "svs_jpeg": {},
    "svs_jpeg2000": {LIBVIPS: "pyvips comes without JPEG 2000"},
    "ome_jpeg": {},
    "ome_jpeg2000": {
        OPENSLIDE: "it does not recognize JPEG 2000 with compression tag 34712",
        LIBVIPS: "pyvips comes without JPEG 2000",
        LAZYSLIDE: "it reads through OpenSlide",
    },
}


def comparison(kind: str, *, title: str) -> Comparison:
    """Give the comparison of one of `FORMATS`."""
    sides: dict[str, Callable[[str, int], Job]] = {
        OPENSLIDE: partial(by_loop, _openslide),
        ZARR: partial(by_loop, _zarr),
        SEGMENTS: partial(by_loop, _segments),
        LIBVIPS: partial(by_loop, _libvips),
        LAZYSLIDE: by_lazyslide,
        DECODER: alone,
        OURS: ours,
    }
    able = {name: partial(side, kind) for name, side in sides.items() if name not in CANNOT[kind]}
    peers = {name: 1.5 for name in able if name not in (OURS, DECODER)}
    at_most = {name: SIZES[1] for name in (ZARR, SEGMENTS, LAZYSLIDE) if name in able}
    return Comparison(title=title, unit="tiles", sizes=SIZES, sides=able, reach=peers, at_most=at_most)


# --------------------------------------------------------------------------------------------------
# the sides


def ours(kind: str, n_tiles: int) -> Job:
    """Prepare ours: the slide opened."""
    import stimage_sd as sti
    from stimage_sd import contract
    from stimage_sd.stream.driver import run_over_tiles

    corners, expected = _corners(), _reference(kind, n_tiles)
    pyramid = contract.levels(sti.io.slide(written(kind)), contract.IMAGE)

    def read(chosen: np.ndarray) -> np.ndarray:
        centers = chosen + PX / 2
        return run_over_tiles(
            pyramid, centers, _kept, sides=[PX], target=PX, key="reading", shape=(expected.shape[1],), batch_size=BATCH
        )[:, 0]

    read(corners[-1:])
    return _job(lambda: read(corners[:n_tiles]), expected)


def by_loop(opener: Callable[[Path], ReadTile], kind: str, n_tiles: int, *, refer: bool = True) -> Job:
    """Prepare a loop over tiles, in batches on all cores."""
    read = opener(written(kind))
    corners = _corners()
    expected = _reference(kind, n_tiles) if refer else None
    read(*corners[-1].tolist())

    def batch(start: int) -> np.ndarray:
        return _kept(np.stack([read(x, y) for x, y in corners[start : min(start + BATCH, n_tiles)].tolist()]))

    def work() -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.concatenate(list(pool.map(batch, range(0, n_tiles, BATCH))))

    return _job(work, expected)


def by_lazyslide(kind: str, n_tiles: int) -> Job:
    """Prepare LazySlide's: the slide opened and tiled, its tiles put into the order of the others."""
    try:
        import lazyslide
        from torch.utils.data import DataLoader
        from wsidata import open_wsi
    except ImportError as error:
        raise needs_bench("lazyslide") from error
    corners, expected = _corners(), _reference(kind, n_tiles)
    folder = tempfile.TemporaryDirectory()
    wsi = open_wsi(written(kind), store=str(Path(folder.name) / "slide.zarr"))
    lazyslide.pp.tile_tissues(wsi, PX, tissue_key=None)
    tiles = wsi.shapes["tiles"]
    places = {(int(x), int(y)): row for row, (x, y) in enumerate(tiles.bounds[["minx", "miny"]].to_numpy())}
    wsi.shapes["tiles"] = tiles.iloc[[places[x, y] for x, y in corners[:n_tiles].tolist()]].reset_index(drop=True)
    dataset = wsi.ds.tile_images("tiles")
    dataset[len(dataset) - 1]

    def work() -> np.ndarray:
        loader = DataLoader(dataset, batch_size=BATCH, num_workers=os.cpu_count() or 1)
        kept = np.concatenate([_kept(batch["image"].numpy()) for batch in loader])
        folder.cleanup()
        return kept

    return _job(work, expected)


def alone(kind: str, n_tiles: int) -> Job:
    """Prepare the decoder alone: the bytes of the segments in memory."""
    import tifffile

    tiff = tifffile.TiffFile(written(kind))
    page = tiff.pages[0].aspage()
    corners = _corners()[:n_tiles].tolist()
    touched = sorted({index for x, y in corners for index, _, _ in _touched(page, x, y)})
    contents = [(index, _content(page, index)) for index in touched]
    page.decode(contents[0][1], contents[0][0], jpegtables=page.jpegtables)

    def decode(segment: tuple[int, bytes]) -> int:
        return np.asarray(page.decode(segment[1], segment[0], jpegtables=page.jpegtables)[0]).size

    def job() -> Mapping[str, Any]:
        begin = _cpu()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            n_values = sum(pool.map(decode, contents))
        return {"segments": len(contents), "megapixels": n_values / 3e6, "cpu_seconds": _cpu() - begin}

    return job


# --------------------------------------------------------------------------------------------------
# how peers read a tile


def _openslide(path: Path) -> ReadTile:
    import openslide

    slide = openslide.OpenSlide(path)
    return lambda x, y: np.asarray(slide.read_region((x, y), 0, (PX, PX)).convert("RGB"))


def _zarr(path: Path) -> ReadTile:
    import tifffile
    import zarr

    opened = zarr.open(tifffile.imread(path, aszarr=True, level=0), mode="r")
    return lambda x, y: np.asarray(opened[y : y + PX, x : x + PX])


def _segments(path: Path) -> ReadTile:
    import tifffile

    tiff = tifffile.TiffFile(path)
    page = tiff.pages[0].aspage()
    lock = threading.Lock()

    def read(x: int, y: int) -> np.ndarray:
        tile = np.empty((PX, PX, 3), np.uint8)
        for index, rows, columns in _touched(page, x, y):
            with lock:
                content = _content(page, index)
            block = np.asarray(page.decode(content, index, jpegtables=page.jpegtables)[0])[0]
            inside = block[_within(y, rows), _within(x, columns)]
            top, left = max(rows.start - y, 0), max(columns.start - x, 0)
            tile[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return tile

    return read


def _libvips(path: Path) -> ReadTile:
    import pyvips

    image = pyvips.Image.new_from_file(str(path), access="random")
    local = threading.local()

    def read(x: int, y: int) -> np.ndarray:
        if not hasattr(local, "region"):
            local.region = pyvips.Region.new(image)
        return np.ndarray((PX, PX, 3), np.uint8, local.region.fetch(x, y, PX, PX))

    return read


# --------------------------------------------------------------------------------------------------
# what they share


def _touched(page: Any, x: int, y: int) -> Iterator[tuple[int, slice, slice]]:
    """Give the segments that a tile touches: number, rows and columns in the image."""
    height, width = page.tilelength, page.tilewidth
    across = -(-page.imagewidth // width)
    for row in range(y // height, (y + PX - 1) // height + 1):
        for column in range(x // width, (x + PX - 1) // width + 1):
            rows = slice(row * height, (row + 1) * height)
            yield row * across + column, rows, slice(column * width, (column + 1) * width)


def _within(start: int, segment: slice) -> slice:
    """Give the part of a segment that a tile from `start` on covers, along one axis."""
    return slice(max(start - segment.start, 0), min(start + PX, segment.stop) - segment.start)


def _content(page: Any, index: int) -> bytes:
    offset, count = int(page.dataoffsets[index]), int(page.databytecounts[index])
    page.parent.filehandle.seek(offset)
    return bytes(page.parent.filehandle.read(count))


def _kept(tiles: np.ndarray) -> np.ndarray:
    """Give the pixels of a batch that are kept, ``float32 (n, 48)``."""
    return tiles[KEPT].reshape(len(tiles), -1).astype(np.float32)


def _job(work: Callable[[], np.ndarray], expected: np.ndarray | None) -> Job:
    def job() -> Mapping[str, Any]:
        begin = _cpu()
        values = work()
        seconds = _cpu() - begin
        if expected is None:
            return {"values": values}
        difference = float(np.abs(values - expected).max())
        return {"tiles": len(values), "max_difference": difference, "cpu_seconds": round(seconds, 3)}

    return job


def _cpu() -> float:
    """Seconds of all cores of this process, and of the worker processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _corners() -> np.ndarray:
    """Corners of all tiles, ``(n, 2)`` x and y, in the order in which the package streams them."""
    return np.load(made(f"reading_corners_{SIDE}.npy", _write_corners))


def _write_corners(path: Path) -> None:
    from stimage_sd import contract, io
    from stimage_sd.stream.cutting import visit_order

    start = np.arange(0, SIDE - PX + 1, PX)
    corners = np.stack(np.meshgrid(start, start), axis=-1).reshape(-1, 2)
    (finest, *_) = contract.levels(io.slide(written("svs_jpeg")), contract.IMAGE)
    np.save(path, corners[visit_order(corners + PX / 2, finest.data)])


def _reference(kind: str, n_tiles: int) -> np.ndarray:
    """Give the kept pixels as OpenSlide or tifffile reads them, computed once."""
    return np.load(made(f"reading_{kind}_{SIDE}.npy", partial(_write_reference, kind)))[:n_tiles]


def _write_reference(kind: str, path: Path) -> None:
    opener = _segments if OPENSLIDE in CANNOT[kind] else _openslide
    np.save(path, by_loop(opener, kind, max(SIZES), refer=False)()["values"])


WORK = comparison("svs_jpeg", title="Reading tiles of an Aperio SVS, JPEG, 224 px")
