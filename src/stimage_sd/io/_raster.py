"""Opening an H&E image of any format as a lazy pyramid.

Slides are read where they lie, through OpenSlide, or through tifffile where OpenSlide does not know the file,
its compression or its layout. All else (JPEG, PNG, striped TIFF) has no random access and is streamed once,
through libvips, into a pyramid in the cache folder (`stimage_sd._cache.cache_dir`). The same is done with
a large tiled TIFF of one level, and from the coarsest level of a slide where that one is still large, since
every thumbnail would otherwise read it through. Measured on a tiled JPEG-in-TIFF of 4,608 × 4,608 px, two
cores: 0.15 s to stream it through libvips, 0.6 s to read it through OpenSlide.

Pixels are taken as they are stored. An EXIF orientation is not applied, because a table of spots counts
stored pixels in some tools and turned ones in others; the user is warned of it instead.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dask.array as da
import numpy as np
import openslide
import pyvips
import tifffile

from stimage_sd.contract import CHUNK
from stimage_sd.io._colour_planes import are_colours, read_whole
from stimage_sd.io._lazy_levels import BROKEN, openslide_levels, tiff_levels
from stimage_sd.io._pyramid import ReadRows, cached_pyramid, extend_lazily
from stimage_sd.io._tiff_complete import missing_part

#: a coarsest level with a longer side than this gets a pyramid in the cache, px
LARGE = 4096
#: resolutions that a microscope makes, µm a pixel; a TIFF tag outside is that of a printer or screen
PLAUSIBLE_MPP = (0.05, 10.0)
#: compressions that libvips need not have been built with
JPEG_2000 = (33003, 33004, 33005, 34712)
#: what OpenSlide's own libtiff reads: none, LZW, JPEG, deflate, PackBits, Aperio's JPEG 2000, zstd
OPENSLIDE_READS = (1, 5, 7, 8, 32946, 32773, 33003, 33005, 50000)
#: slides whose file is but a thumbnail or an index of a folder of data
PARTED = (".mrxs", ".vms", ".vmu")
#: micrometres in the units an OME-TIFF and a TIFF tag (2: inch, 3: centimetre) may state
MICROMETRES = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, 2: 25_400.0, 3: 10_000.0}


def open_raster(path: str | Path) -> tuple[list[da.Array], float | None]:
    """Open an H&E image lazily, as a pyramid.

    Parameters
    ----------
    path
        A JPEG, PNG or TIFF file, or a slide in a format that OpenSlide knows (SVS, NDPI, MRXS, SCN, ...).

    Returns
    -------
    Levels, finest first, each a lazy ``uint8 (3, y, x)`` in chunks of at most 1,024 px, the coarsest with a
    longer side of at most 1,024 px; and the micrometres a pixel that the file states, `None` where it
    states none.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no image, is truncated, or is not 8-bit RGB.

    Warns
    -----
    UserWarning
        If the image has an alpha channel, which is laid on white and dropped, states an orientation, or has three
        planes that are taken for colours because they are light.

    Examples
    --------
    >>> import cv2, numpy as np, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "white.png"
    >>> _ = cv2.imwrite(str(path), np.full((3000, 2000, 3), 255, np.uint8))
    >>> levels, mpp = open_raster(path)
    >>> [level.shape for level in levels], mpp
    ([(3, 3000, 2000), (3, 1500, 1000), (3, 750, 500)], None)
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"Expected an image file at {path}, found {kind}. Check the path.")
    try:
        with tifffile.TiffFile(path) as tiff:
            return _open_tiff(path, tiff)
    except (struct.error, IndexError) as error:
        raise ValueError(_unreadable(path, error)) from error
    except tifffile.TiffFileError:
        if _openslide_format(path) is not None:
            return _open_with_openslide(path)
        if path.suffix.lower() in PARTED:
            raise ValueError(
                f"Expected the folder of {path.name} beside it, found that OpenSlide does not know {path} without. "
                f"Put the folder {path.with_suffix('')} with the slide's data there."
            ) from None
        return _stream_with_vips(path), None


def raster_size(path: Path) -> tuple[int, int]:
    """Return ``(y, x)`` of a plain image, in pixels, from its header."""
    try:
        image = pyvips.Image.new_from_file(str(path), access="sequential")
    except pyvips.Error as error:
        raise ValueError(_unreadable(path, error)) from error
    return image.height, image.width


def raster_from_array(array: np.ndarray | da.Array) -> list[da.Array]:
    """Turn an image in memory, or a lazy one, into a pyramid.

    Parameters
    ----------
    array
        ``uint8 (y, x, 3)`` or ``(3, y, x)``.

    Returns
    -------
    Levels, finest first, each a lazy ``uint8 (3, y, x)``. Coarser levels of a lazy array are computed
    from it when they are asked for.

    Raises
    ------
    ValueError
        If it is not 8-bit RGB.

    Examples
    --------
    >>> import numpy as np
    >>> [level.shape for level in raster_from_array(np.zeros((1500, 1300, 3), np.uint8))]
    [(3, 1500, 1300), (3, 750, 650)]
    """
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]) or array.dtype != np.uint8:
        if array.ndim == 3 and array.shape[2] == 4 and array.dtype == np.uint8:
            _warn_of_alpha("The array")
            return raster_from_array(_drop_alpha(array))
        raise ValueError(
            f"Expected an 8-bit RGB image, uint8 (y, x, 3) or (3, y, x), found {array.dtype} {tuple(array.shape)}. "
            f"Convert it, for example with `skimage.util.img_as_ubyte`."
        )
    lazy = array if isinstance(array, da.Array) else da.from_array(array, chunks=-1)
    if lazy.shape[2] == 3:
        lazy = da.moveaxis(lazy, -1, 0)
    return extend_lazily([lazy.rechunk((3, CHUNK, CHUNK))])


# --------------------------------------------------------------------------------------------------
# one way for each kind of file


def _open_tiff(path: Path, tiff: tifffile.TiffFile) -> tuple[list[da.Array], float | None]:
    missing = missing_part(path, tiff)
    if missing is not None:
        raise ValueError(_unreadable(path, missing))
    series = tiff.series[0]
    page = series.keyframe
    planes = are_colours(path, tiff, series)
    if not planes:
        _check_colours(path, series, page)
        planes = series.ndim == 3 and series.axes.startswith("S")
    mpp = _tiff_mpp(tiff, page)
    known = _openslide_format(path)
    levels: list[da.Array] | None
    if known in (None, "generic-tiff"):
        levels = _generic_levels(path, series, known, planes=planes)
    else:
        levels, stated = _open_with_openslide(path, whole=False)
        mpp = stated if stated is not None else mpp
        if known != "aperio":
            # Scanners' own layouts: one huge JPEG (NDPI), overlapping tiles (BIF), tiles left out (Philips).
            return _complete(path, levels), mpp
    single = len(series.levels) == 1 and max(page.shape) > LARGE and page.compression not in JPEG_2000
    if levels and not (single and not planes):
        if page.samplesperpixel == 4:
            _warn_of_alpha(path.name)
        return _complete(path, levels), mpp
    return _stream_planes(path, series) if planes else _stream_with_vips(path), mpp


def _generic_levels(
    path: Path, series: tifffile.TiffPageSeries, known: str | None, *, planes: bool
) -> list[da.Array] | None:
    """Return the levels of a TIFF that is no scanner's own; `None` where it has no tiles and so no random access."""
    page = series.keyframe
    if not page.is_tiled:
        return None
    if known is not None and not planes and page.compression in OPENSLIDE_READS:
        levels, _ = _open_with_openslide(path, whole=False)
        # OpenSlide takes a pyramid it does not know the layout of for a plain tiled TIFF of one level.
        if len(levels) >= len(series.levels):
            return levels
    if planes or (series.ndim == 3 and series.shape[series.axes.find("S")] == 3):
        return tiff_levels(path, series)
    return None


def _open_with_openslide(path: Path, *, whole: bool = True) -> tuple[list[da.Array], float | None]:
    try:
        levels, slide = openslide_levels(path)
    except openslide.OpenSlideError as error:
        raise ValueError(
            f"Expected a readable slide, found that OpenSlide cannot open {path} ({error}). Copy or export it again."
        ) from error
    return _complete(path, levels) if whole else levels, _openslide_mpp(slide)


def _stream_with_vips(path: Path) -> list[da.Array]:
    image = _open_with_vips(path)
    if image.get_typeof("orientation") and int(image.get("orientation")) > 1:
        warnings.warn(
            f"{path.name} states orientation {image.get('orientation')}, which is not applied: coordinates count "
            "pixels as they are stored. Turn the image and save it again if its spots were placed on the turned one.",
            UserWarning,
            stacklevel=4,
        )
    if image.hasalpha():
        _warn_of_alpha(path.name)

    def open_rows() -> ReadRows:
        opened = _open_with_vips(path)
        if opened.hasalpha():
            opened = opened.flatten(background=[255.0, 255.0, 255.0])

        def read_rows(start: int, stop: int) -> np.ndarray:
            try:
                rows = opened.crop(0, start, opened.width, stop - start).write_to_memory()
            except pyvips.Error as error:
                raise ValueError(_unreadable(path, error)) from error
            return np.frombuffer(rows, np.uint8).reshape(stop - start, opened.width, 3)

        return read_rows

    return cached_pyramid(path, part="image", height=image.height, width=image.width, open_rows=open_rows)


def _stream_planes(path: Path, series: tifffile.TiffPageSeries) -> list[da.Array]:
    """Stream colours that lie apart and in strips, which libvips does not read side by side."""

    def open_rows() -> ReadRows:
        try:
            planes = read_whole(path)
        except BROKEN as error:
            raise ValueError(_unreadable(path, error)) from error
        return lambda start, stop: np.ascontiguousarray(np.moveaxis(planes[:, start:stop], 0, -1))

    height, width = series.shape[1:]
    return cached_pyramid(path, part="planes", height=height, width=width, open_rows=open_rows)


def _open_with_vips(path: Path) -> pyvips.Image:
    try:
        # `revalidate`: libvips remembers files by name, and would show an overwritten one as it was.
        image = pyvips.Image.new_from_file(str(path), access="sequential", fail_on="truncated", revalidate=True)
    except pyvips.Error as error:
        raise ValueError(_unreadable(path, error)) from error
    if image.format != "uchar" or image.bands - image.hasalpha() != 3 or image.interpretation == "cmyk":
        raise ValueError(_not_rgb(path, f"{image.bands} channel(s) of {image.format} ({image.interpretation})"))
    return image


def _complete(path: Path, levels: list[da.Array]) -> list[da.Array]:
    """Give a tiled slide the coarser levels it lacks."""
    coarsest = levels[-1]
    height, width = coarsest.shape[1:]
    if max(height, width) <= LARGE:
        return extend_lazily(levels)

    def read_rows(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(coarsest[:, start:stop].compute(), 0, -1))

    part = f"level {len(levels) - 1}"
    return levels[:-1] + cached_pyramid(path, part=part, height=height, width=width, open_rows=lambda: read_rows)


# --------------------------------------------------------------------------------------------------
# what a file says about itself


def _openslide_format(path: Path) -> str | None:
    return openslide.OpenSlide.detect_format(str(path))


def _check_colours(path: Path, series: tifffile.TiffPageSeries, page: tifffile.TiffPage) -> None:
    colours = page.samplesperpixel in (3, 4) or page.photometric == tifffile.PHOTOMETRIC.PALETTE
    if page.dtype != np.uint8 or not colours:
        channels = series.shape[0] if series.axes[0] == "C" else page.samplesperpixel
        found = f"{channels} channel(s) of {page.dtype} ({tifffile.PHOTOMETRIC(page.photometric).name})"
        raise ValueError(_not_rgb(path, found, fluorescence=not colours))


def _openslide_mpp(slide: openslide.OpenSlide) -> float | None:
    stated = [slide.properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
    return _mean_mpp([float(value) for value in stated if value is not None])


def _tiff_mpp(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> float | None:
    if tiff.ome_metadata:
        pixels = next(
            (element for element in ElementTree.fromstring(tiff.ome_metadata).iter() if element.tag.endswith("Pixels")),
            None,
        )
        if pixels is not None and "PhysicalSizeX" in pixels.attrib:
            sizes = [
                float(pixels.attrib[f"PhysicalSize{axis}"])
                * MICROMETRES.get(pixels.attrib.get(f"PhysicalSize{axis}Unit", "µm"), np.nan)
                for axis in "XY"
                if f"PhysicalSize{axis}" in pixels.attrib
            ]
            return _mean_mpp(sizes)
    unit = MICROMETRES.get(int(_tag(page, "ResolutionUnit", 2)))
    resolutions = [_tag(page, name, (0, 1)) for name in ("XResolution", "YResolution")]
    if unit is None or any(pixels == 0 or units == 0 for pixels, units in resolutions):
        return None
    return _mean_mpp([unit * units / pixels for pixels, units in resolutions])


def _tag(page: tifffile.TiffPage, name: str, default: Any) -> Any:
    return page.tags[name].value if name in page.tags else default


def _mean_mpp(values: list[float]) -> float | None:
    if not values or not all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in values):
        return None
    return float(np.mean(values))


def _drop_alpha(array: np.ndarray | da.Array) -> np.ndarray | da.Array:
    opacity = array[..., 3:].astype(np.float32) / 255.0
    return (array[..., :3] * opacity + 255.0 * (1.0 - opacity)).round().astype(np.uint8)


def _warn_of_alpha(what: str) -> None:
    warnings.warn(f"{what} has an alpha channel: it was laid on white and dropped.", UserWarning, stacklevel=4)


def _not_rgb(path: Path, found: str, *, fluorescence: bool = False) -> str:
    mend = "An image of fluorescence belongs to `stimage_sd.io.codex(cells, image=...)`. " if fluorescence else ""
    return (
        f"Expected an 8-bit RGB H&E image, found {found} in {path}. "
        f"{mend}Pass the brightfield image, or convert this one to 8-bit RGB."
    )


def _unreadable(path: Path, reason: object) -> str:
    return (
        f"Expected a complete image, found that {path} is truncated, damaged or no image "
        f"({' '.join(str(reason).split())}). Copy or export it again."
    )
