"""H&E images of any format, opened as a lazy pyramid.

Slides are read in place. OpenSlide reads the scanner formats. tifffile reads TIFF and Aperio files, returns the levels
as stored and reports damage. Other files (JPEG, PNG, striped TIFF) have no random access. They are streamed once into a
pyramid in the cache folder (`stimage_sd._cache.cache_dir`). A large tiled TIFF with one level, or a slide with a large
coarsest level, is also extended in the cache. Otherwise every thumbnail would read that level in full.

Pixels are used as stored. A stated orientation is not applied, because some tools place spots on stored pixels and
others on rotated pixels. The user gets a warning.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import openslide
import pyvips
import tifffile

from stimage_sd.contract import CHUNK
from stimage_sd.io._color_planes import are_colors
from stimage_sd.io._jpeg_check import check_jpeg
from stimage_sd.io._lazy_levels import TiffLevel, as_dask, openslide_levels, openslide_properties, tiff_levels
from stimage_sd.io._pyramid import ReadRows, cached_pyramid, extend_lazily
from stimage_sd.io._section import require_file
from stimage_sd.io._tiff_complete import warn_of_zeros, zero_tail
from stimage_sd.io._tiff_images import choose_image, ome_image, plausible, tiff_pixel_um, warn_of_orientation
from stimage_sd.io._tiff_open import DamagedFile, open_tiff
from stimage_sd.io._tiff_region import UNCOMPRESSED, block_shape, holds_rgb_in_jpeg_2000

#: a coarsest level with a longer side above this limit gets a pyramid in the cache, px
LARGE = 4096
#: allowed share of black rows or tiles at the end of an uncompressed H&E; registered images have such borders
BORDER = 0.25
#: compression tags of Aperio's JPEG 2000; OpenSlide converts the colors of some
JPEG_2000 = (33003, 33004, 33005)
#: slide formats with the pixel data in a folder; the file itself is only a thumbnail or an index
PARTED = (".mrxs", ".vms", ".vmu")
#: keys that name other files in the index of a slide
NAMES_A_FILE = re.compile(r"\s*(\w*file(_\d+)?|macroimage)\s*(\([\d,\s]*\))?\s*", re.IGNORECASE)


def open_raster(path: str | Path, *, series: int | str | None = None) -> tuple[list[da.Array], float | None]:
    """Open an H&E image lazily, as a pyramid.

    - `path`: a JPEG, PNG or TIFF file, or a slide in a format that OpenSlide knows (SVS, NDPI, MRXS, SCN, ...).
    - `series`: image to read from a TIFF with several images: its number in file order, from 0, or its name. By default
      the largest image.
    - returns: the levels and the resolution. Levels are lazy ``uint8 (3, y, x)`` arrays, finest first, in chunks of at
      most 1,024 px. The longer side of the coarsest level is at most 1,024 px. The resolution is the micrometers per
      pixel stated in the file, or `None` if the file states none.

    >>> import cv2, numpy as np, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "white.png"
    >>> _ = cv2.imwrite(str(path), np.full((3000, 2000, 3), 255, np.uint8))
    >>> levels, mpp = open_raster(path)
    >>> [level.shape for level in levels], mpp
    ([(3, 3000, 2000), (3, 1500, 1000), (3, 750, 500)], None)
    """
    path = require_file(path, what="an image file").absolute()
    try:
        with open_tiff(path) as tiff:
            return _open_tiff(path, tiff, series)
    except DamagedFile as error:
        raise ValueError(_unreadable(path, error.reason)) from error
    except (struct.error, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(_unreadable(path, repr(error))) from error
    except tifffile.TiffFileError:
        if series not in (None, 0):
            raise ValueError(
                f"Expected `series` only for a TIFF, found {series!r} for {path}. Leave out `series`."
            ) from None
        _check_named_files(path)
        if openslide_format(path) is not None:
            return _open_with_openslide(path)
        if path.suffix.lower() in PARTED:
            raise ValueError(
                f"Expected the folder of {path.name} beside it, found that OpenSlide cannot read {path} without it. "
                f"Put the folder {path.with_suffix('')} with the data of the slide there."
            ) from None
        return _stream_with_vips(path), None


def raster_size(path: Path) -> tuple[int, int]:
    """Return the size ``(y, x)`` of a JPEG or PNG from its header, px."""
    try:
        image = pyvips.Image.new_from_file(str(path), access="sequential")
    except pyvips.Error as error:
        raise ValueError(_unreadable(path, error)) from error
    return image.height, image.width


def raster_from_array(array: np.ndarray | da.Array) -> list[da.Array]:
    """Build a pyramid from an image in memory or from a lazy array.

    - `array`: RGB ``(y, x, 3)`` or ``(3, y, x)``, or RGB with an alpha channel ``(y, x, 4)``. Values are ``uint8``,
      other numbers from 0 to 255, or floating-point numbers from 0 to 1. The function computes the range of the values.
      Values are converted to ``uint8`` when they are read.
    - returns: lazy levels ``uint8 (3, y, x)``, finest first. Coarser levels of a lazy array are computed on access.

    >>> import numpy as np
    >>> [level.shape for level in raster_from_array(np.zeros((1500, 1300, 3), np.uint8))]
    [(3, 1500, 1300), (3, 750, 650)]
    >>> raster_from_array(np.full((8, 8, 3), 0.2))[0][0, 0, 0].compute()
    np.uint8(51)
    """
    shape = tuple(array.shape)
    if array.ndim != 3 or not (shape[2] in (3, 4) or shape[0] == 3):
        raise ValueError(
            f"Expected an RGB image, (y, x, 3) or (3, y, x), found {array.dtype} {shape}. Pass the H&E in color."
        )
    lazy = array if isinstance(array, da.Array) else da.from_array(array, chunks=-1)
    if shape[2] in (3, 4):
        lazy = da.moveaxis(lazy, -1, 0)
    lazy = _as_uint8(lazy.rechunk((-1, CHUNK, CHUNK)))
    if lazy.shape[0] == 4:
        _warn_of_alpha("The array")
        lazy = _drop_alpha(lazy)
    return extend_lazily([lazy])


def _as_uint8(lazy: da.Array) -> da.Array:
    """Convert colors to 8 bit, after one pass over the image for the range of the values."""
    if lazy.dtype == np.uint8:
        return lazy
    low, high = dask.compute(lazy.min(), lazy.max()) if lazy.dtype.kind in "fiu" else (np.nan, np.nan)
    if not (low >= 0 and high <= 255):  # also rejects NaN
        raise ValueError(
            f"Expected colors as uint8, or numbers from 0 to 1 or from 0 to 255, found {lazy.dtype} from {low} to "
            f"{high}. Convert the image to 8-bit RGB, for example with `skimage.util.img_as_ubyte`."
        )
    factor = 255 if lazy.dtype.kind == "f" and high <= 1 else 1
    return da.rint(lazy * lazy.dtype.type(factor)).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# readers by kind of file


def _open_tiff(path: Path, tiff: tifffile.TiffFile, series: int | str | None) -> tuple[list[da.Array], float | None]:
    known = openslide_format(path)
    first = tiff.series[0].keyframe
    aperio = known == "aperio" and (first.compression not in JPEG_2000 or _tiles_are_rgb(tiff))
    if known not in (None, "generic-tiff") and not aperio:
        # Only OpenSlide reads these layouts: one huge JPEG (NDPI), overlapping tiles (BIF), missing tiles (Philips).
        if series is not None:
            raise ValueError(
                f"Expected no `series` for a slide of format {known!r}, which marks its label and macro images, found "
                f"{series!r} for {path}. Leave out `series`."
            )
        _check_colors(path, tiff.series[0], first)
        levels, stated = _open_with_openslide(path, whole=False)
        if stated is None:
            stated = tiff_pixel_um(tiff, first, ome_image(tiff, tiff.series[0]))
        return _complete(path, levels, "slide"), stated
    image = choose_image(path, tiff, 0 if aperio and series is None else series, in_color=True)
    pages = [image.pages(index) for index in range(len(image.series.levels))]
    page = pages[0][0]
    if not are_colors(path, tiff, image):
        _check_colors(path, image.series, page)
    warn_of_orientation(path, page.tags.valueof("Orientation", 1))
    mpp = tiff_pixel_um(tiff, image.series.keyframe, ome_image(tiff, image.series))
    if aperio and series is None:
        # In Aperio files, the tiled pages are the levels. Thumbnail, label and macro image have strips.
        tiled = [page.aspage() for page in tiff.pages if page.aspage().is_tiled]
        pages = [[page] for page in sorted(tiled, key=lambda page: -page.imagewidth)] or pages
        page = pages[0][0]
        mpp = slide_mpp(openslide_properties(path)) or mpp
    if page.samplesperpixel == 4:
        _warn_of_alpha(path.name)
    for one in (page for level in pages for page in level):
        _check_tail(path, one)
    if not _in_rgb(page):
        return _stream_with_vips(path, page), mpp
    return _tiff_pyramid(path, tiff_levels(path, pages), pages), mpp


def _tiles_are_rgb(tiff: tifffile.TiffFile) -> bool:
    """Return whether tifffile decodes the JPEG 2000 of all levels of an Aperio slide to the pixels of OpenSlide."""
    return all(holds_rgb_in_jpeg_2000(page) for page in (one.aspage() for one in tiff.pages) if page.is_tiled)


def _in_rgb(page: tifffile.TiffPage) -> bool:
    """Return whether tifffile decodes a page to RGB."""
    if page.photometric == tifffile.PHOTOMETRIC.YCBCR:
        return page.compression == tifffile.COMPRESSION.JPEG
    return page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK)


def _tiff_pyramid(path: Path, levels: list[TiffLevel], pages: list[list[tifffile.TiffPage]]) -> list[da.Array]:
    """Return the pyramid of a TIFF. Tiled pages are read in place, striped pages are streamed into the cache."""
    part = f"image {'.'.join(str(index) for index in levels[0].places[0])}"
    if all(page.is_tiled for level in pages for page in level):
        return _complete(path, [as_dask(level) for level in levels], part)
    finest, page = levels[0], pages[0][0]
    height, width = finest.shape[1:]

    def open_rows() -> ReadRows:
        # A compressed strip is always decoded as a whole, so an image of few tall strips is read only once.
        at_once = page.compression != UNCOMPRESSED and block_shape(page)[0] > CHUNK
        source = finest[slice(None), slice(None), slice(None)] if at_once else finest
        return lambda start, stop: np.ascontiguousarray(
            np.moveaxis(source[slice(None), slice(start, stop), slice(None)], 0, -1)
        )

    return cached_pyramid(path, part=part, height=height, width=width, open_rows=open_rows)


def _check_tail(path: Path, page: tifffile.TiffPage) -> None:
    """Raise if an image ends in zeros, as after a broken download. Warn if the zeros may be a black border."""
    n_zero, n_all = zero_tail(page)
    if not n_zero:
        return
    kind = "tiles" if page.is_tiled else "rows" if page.compression == UNCOMPRESSED else "strips"
    if page.compression != UNCOMPRESSED or n_zero > BORDER * n_all:
        raise ValueError(_unreadable(path, f"the last {n_zero} of its {n_all} {kind} are all zeros"))
    warn_of_zeros(path, n_zero, n_all, kind)


def _open_with_openslide(path: Path, *, whole: bool = True) -> tuple[list[da.Array], float | None]:
    try:
        levels, slide = openslide_levels(path)
    except openslide.OpenSlideError as error:
        raise ValueError(
            f"Expected a readable slide, found that OpenSlide cannot open {path} ({error}). Copy or export it again."
        ) from error
    return _complete(path, levels, "slide") if whole else levels, slide_mpp(slide.properties)


def _stream_with_vips(path: Path, page: tifffile.TiffPage | None = None) -> list[da.Array]:
    """Stream an image, or a TIFF page with colors that libvips converts to RGB."""
    image = _open_with_vips(path, page)
    if page is None:
        warn_of_orientation(path, int(image.get("orientation")) if image.get_typeof("orientation") else 1)
    if page is None and image.hasalpha():
        _warn_of_alpha(path.name)

    def open_rows() -> ReadRows:
        _check_jpeg_file(path)
        opened = _open_with_vips(path, page)
        if opened.hasalpha():
            opened = opened.flatten(background=[255.0, 255.0, 255.0])

        def read_rows(start: int, stop: int) -> np.ndarray:
            try:
                rows = opened.crop(0, start, opened.width, stop - start).write_to_memory()
            except pyvips.Error as error:
                raise ValueError(_unreadable(path, error)) from error
            return np.frombuffer(rows, np.uint8).reshape(stop - start, opened.width, 3)

        return read_rows

    part = "image" if page is None else f"converted {'.'.join(str(index) for index in page.treeindex)}"
    return cached_pyramid(path, part=part, height=image.height, width=image.width, open_rows=open_rows)


def _check_jpeg_file(path: Path) -> None:
    """Raise `ValueError` if a JPEG file is damaged. The decoder itself does not report damage."""
    content = np.memmap(path, np.uint8, mode="r")
    if bytes(content[:3]) == b"\xff\xd8\xff":
        try:
            check_jpeg(content.data)
        except ValueError as error:
            raise ValueError(_unreadable(path, error)) from error


def _open_with_vips(path: Path, page: tifffile.TiffPage | None = None) -> pyvips.Image:
    """Open an image for one pass from top to bottom, with libvips warnings about damage raised as errors."""
    options: dict[str, Any] = {"fail_on": "warning"}
    if page is not None:
        # For a TIFF, libvips warns about every unknown tag, so only errors count.
        options = {"fail_on": "error", "page": page.treeindex[0], "subifd": (*page.treeindex, -1)[1]}
    try:
        # libvips caches files by name. `revalidate` avoids the old content of an overwritten file.
        image = pyvips.Image.new_from_file(str(path), access="sequential", revalidate=True, **options)
    except pyvips.Error as error:
        raise ValueError(_unreadable(path, error)) from error
    if image.format != "uchar" or image.bands - image.hasalpha() != 3 or image.interpretation == "cmyk":
        raise ValueError(_not_rgb(path, f"{image.bands} channel(s) of {image.format} ({image.interpretation})"))
    if page is None and image.get_n_pages() > 1:
        raise ValueError(
            f"Expected one image, found {image.get_n_pages()} in {path}. Save the section image as a PNG or TIFF."
        )
    return image


def _complete(path: Path, levels: list[da.Array], part: str) -> list[da.Array]:
    """Add missing coarser levels to a tiled slide; `part` names the image within the file."""
    coarsest = levels[-1]
    height, width = coarsest.shape[1:]
    if max(height, width) <= LARGE:
        return extend_lazily(levels)

    def read_rows(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(coarsest[:, start:stop].compute(), 0, -1))

    part = f"{part}, level {len(levels) - 1}"
    return levels[:-1] + cached_pyramid(path, part=part, height=height, width=width, open_rows=lambda: read_rows)


# --------------------------------------------------------------------------------------------------
# file metadata


def _check_named_files(path: Path) -> None:
    """Raise if a slide of several files names a file outside its folder. Otherwise a slide could read any file."""
    index = path.with_suffix("") / "Slidedat.ini" if path.suffix.lower() == ".mrxs" else path
    if path.suffix.lower() not in PARTED or not index.is_file():
        return
    for line in index.read_text(errors="replace").splitlines():
        key, _, name = line.partition("=")
        if NAMES_A_FILE.fullmatch(key) and re.search(r"[/\\]|^\s*\.\.\s*$", name):
            raise ValueError(
                f"Expected the files of a slide in one folder, found that {index} refers to {name.strip()!r}. Copy the "
                "slide again, with its folder."
            )


def openslide_format(path: Path) -> str | None:
    return openslide.OpenSlide.detect_format(str(path))


def _check_colors(path: Path, series: tifffile.TiffPageSeries, page: tifffile.TiffPage) -> None:
    colors = page.samplesperpixel in (3, 4) or page.photometric == tifffile.PHOTOMETRIC.PALETTE
    if page.dtype != np.uint8 or not colors:
        channels = series.shape[0] if series.axes[0] == "C" else page.samplesperpixel
        described = f"{channels} channel(s) of {page.dtype} ({tifffile.PHOTOMETRIC(page.photometric).name})"
        raise ValueError(_not_rgb(path, described, fluorescence=not colors))


def slide_mpp(properties: Mapping[str, str]) -> float | None:
    stated = [properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
    return plausible([float(value) for value in stated if value is not None])


def _drop_alpha(lazy: da.Array) -> da.Array:
    opacity = lazy[3:].astype(np.float32) / 255.0
    return (lazy[:3] * opacity + 255.0 * (1.0 - opacity)).round().astype(np.uint8).rechunk((3, CHUNK, CHUNK))


def _warn_of_alpha(what: str) -> None:
    warnings.warn(f"{what} has an alpha channel, which was blended with white and dropped.", UserWarning, stacklevel=4)


def _not_rgb(path: Path, colors: str, *, fluorescence: bool = False) -> str:
    mend = "Read a fluorescence image with `stimage_sd.io.codex(cells, image=...)`. " if fluorescence else ""
    return (
        f"Expected an 8-bit RGB H&E image, found {colors} in {path}. "
        f"{mend}Pass the brightfield image, or convert this one to 8-bit RGB."
    )


def _unreadable(path: Path, reason: object) -> str:
    return (
        f"Expected a complete image, found that {path} is truncated, damaged or no image "
        f"({' '.join(str(reason).split())}). Copy or export it again."
    )
