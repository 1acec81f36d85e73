"""Check uploaded files before anything in them is decoded.

The checks use a file's first bytes and headers, never its name. An image of a few kilobytes can decode to 30,000 x
30,000 pixels, and a model of a few kilobytes can unpack to gigabytes. The headers reveal both. Files that could run
code are never opened. Models are JSON and plain arrays.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tifffile

#: largest number of pixels of an image that is decoded whole, a square of 14,000 px
MOST_WHOLE = 200_000_000
#: largest number of pixels of a tiled slide, of which only tiles on tissue are read
MOST_IN_TILES = 20_000_000_000
#: longest side of a slide's stored tile, px, and largest number of pages of a TIFF
LARGEST_TILE, MOST_PAGES = 8192, 1000
#: largest unpacked size of the parts of a model, bytes
MODEL_PARTS = {"config.json": 64 << 20, "model.safetensors": 1 << 30}
#: first bytes of the accepted formats, and the name of the stored file
SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image.png",
    b"\xff\xd8\xff": "image.jpg",
    b"II*\x00": "image.tif",
    b"MM\x00*": "image.tif",
    b"II+\x00": "image.tif",
    b"MM\x00+": "image.tif",
}
IMAGE_TYPES = ("png", "jpg", "jpeg", "tif", "tiff", "svs")
DAMAGED = "The file is truncated, damaged or no image. Copy or export it again."
_MENDS = "Crop it, save it at half the resolution, or save it as a tiled, pyramidal TIFF."
#: errors that tifffile raises for a damaged file
_BROKEN = (tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error, OSError,
           RecursionError, MemoryError, OverflowError, ZeroDivisionError, ElementTree.ParseError)  # fmt: skip


class UploadError(ValueError):
    """Error about an uploaded file, with a message for the visitor."""


@dataclass(frozen=True)
class ImageHeader:
    """Header of an image.

    Attributes
    ----------
    width, height
        Size in pixels.
    """

    width: int
    height: int


def display_name(name: str) -> str:
    """Return a file's name for display, with letters, digits and ``. _ -``, at most 60 characters.

    Examples
    --------
    >>> display_name("../../etc/![x](http://a.b/c.png)")
    'etc__x_http___a.b_c.png'
    """
    short = re.sub(r"[^\w.-]+", "_", Path(name.replace("\\", "/").replace("/", "_")).name, flags=re.ASCII)
    return re.sub(r"^[._-]+|[._-]+$", "", short)[:60] or "file"


def store_image(content: bytes | memoryview, folder: Path, *, most_bytes: int) -> Path:
    """Write an uploaded image to a folder, under a fixed name.

    Parameters
    ----------
    content
        Content of the upload.
    folder
        Existing folder of the session.
    most_bytes
        Largest size of the file, bytes.

    Returns
    -------
    Path of the file, with a checked header.

    Raises
    ------
    UploadError
        If the file is too large, damaged or of an unknown format, or has too many pixels. The folder stays empty then.
    """
    _check_size(content, most_bytes)
    kept = next((name for start, name in SIGNATURES.items() if bytes(content[: len(start)]) == start), None)
    if kept is None:
        raise UploadError(
            "This is no image that the app reads. Expected a PNG, JPEG, TIFF or SVS file, found other first bytes."
        )
    path = folder / kept
    path.write_bytes(content)
    try:
        check_image(path)
    except UploadError:
        path.unlink()
        raise
    return path


def check_image(path: Path) -> ImageHeader:
    """Read the header of an image and check that the app can use it, without decoding pixels.

    Parameters
    ----------
    path
        A PNG, JPEG or TIFF file.

    Returns
    -------
    The header.

    Raises
    ------
    UploadError
        If the image is damaged or has too many pixels, or its metadata name other files.
    """
    if path.suffix == ".tif":
        return _check_tiff(path)
    from stimage_sd.io._raster import raster_size

    try:
        height, width = raster_size(path)
    except ValueError as error:
        raise UploadError(DAMAGED) from error
    _check_pixels(width, height, MOST_WHOLE)
    return ImageHeader(width, height)


def _check_tiff(path: Path) -> ImageHeader:
    from stimage_sd.io._tiff_images import choose_image
    from stimage_sd.io._tiff_open import OtherFile, open_tiff

    try:
        with warnings.catch_warnings(), open_tiff(path) as tiff:
            warnings.simplefilter("ignore")  # the reader warns later about the choice of image
            if len(tiff.pages) > MOST_PAGES:
                raise UploadError(f"The TIFF has {len(tiff.pages)} pages; at most {MOST_PAGES} are taken.")
            pages = [level.keyframe for level in choose_image(path, tiff, None, in_color=True).series.levels]
            sizes = [(int(page.imagewidth), int(page.imagelength)) for page in pages]
            tiles = [(int(page.tilewidth), int(page.tilelength)) if page.is_tiled else None for page in pages]
    except UploadError:
        raise
    except OtherFile as error:
        raise UploadError(
            "The metadata of this OME-TIFF name other files. The app reads only the uploaded file. Export the image "
            "as a single OME-TIFF."
        ) from error
    except _BROKEN as error:
        raise UploadError(DAMAGED) from error
    for size, tile in zip(sizes, tiles, strict=True):
        _check_pixels(*size, MOST_WHOLE if tile is None else MOST_IN_TILES)
        if tile is not None and max(tile) > LARGEST_TILE:
            raise UploadError(
                f"The TIFF is stored in tiles of {tile[0]:,} x {tile[1]:,} px; at most {LARGEST_TILE:,} px a side are "
                "taken. Save it with tiles of 512 px."
            )
    # the coarsest level is read whole, for thumbnails
    _check_pixels(*min(sizes), MOST_WHOLE)
    width, height = sizes[0]
    return ImageHeader(width, height)


def _check_pixels(width: int, height: int, most: int) -> None:
    if width < 1 or height < 1:
        raise UploadError(f"The image says that it is {width} x {height} px. Export it again.")
    if width * height > most:
        raise UploadError(
            f"The image is {width:,} x {height:,} px ({width * height / 1e6:,.0f} megapixels), of which at most "
            f"{most / 1e6:,.0f} megapixels are read at once. It was not decoded. {_MENDS}"
        )


def store_model(content: bytes | memoryview, folder: Path, *, most_bytes: int) -> Path:
    """Write an uploaded model to a folder, after checking that it is a model of this package.

    Parameters
    ----------
    content
        Content of the upload.
    folder
        Existing folder of the session.
    most_bytes
        Largest size of the file, bytes.

    Returns
    -------
    Path of the file. Names and sizes of its parts are checked without unpacking them.

    Raises
    ------
    UploadError
        If the file is too large, not a zip, or holds other parts than a model. The folder stays empty then.
    """
    _check_size(content, most_bytes)
    path = folder / "model.stimage"
    path.write_bytes(content)
    try:
        check_model(path)
    except UploadError:
        path.unlink()
        raise
    return path


def check_model(path: Path) -> None:
    """Check the parts of a zipped model and their unpacked sizes, without unpacking them.

    Raises
    ------
    UploadError
        If the file is not a zip of these parts, or a part is too large.
    """
    expected = f"Expected a model as `model.save` or `stimage-sd train` writes it: a zip of {' and '.join(MODEL_PARTS)}"
    never = "Files that can run code when they are opened, such as pickles, are never opened."
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise UploadError(f"{expected}; this is no zip. {never}") from error
    if sorted(entry.filename for entry in entries) != sorted(MODEL_PARTS):
        names = ", ".join(display_name(entry.filename) for entry in entries[:3]) or "nothing"
        raise UploadError(f"{expected}; this one holds {names}. {never}")
    for entry in entries:
        # zipfile stops at the stated size, so a wrong size shows up as damage later
        if entry.file_size > MODEL_PARTS[entry.filename]:
            raise UploadError(
                f"{entry.filename} in the model unpacks to {entry.file_size >> 20:,} MB; at most "
                f"{MODEL_PARTS[entry.filename] >> 20:,} MB are taken. It was not unpacked."
            )


def load_model(path: Path) -> Any:
    """Load a model after its parts were checked.

    Raises
    ------
    UploadError
        If the model is damaged, newer than this version, or of a kind that the app does not show.
    """
    from stimage_sd import models
    from stimage_sd.models._stand_ins import Explainable

    try:
        model = models.load(path)
    except (ValueError, IndexError, RecursionError, MemoryError) as error:
        raise UploadError(f"The model cannot be read: {plain_words(error, path)}") from error
    if not isinstance(model, Explainable) or not all(hasattr(model, name) for name in ("tiles", "features", "floor")):
        raise UploadError(
            f"The app shows ensembles and fine-tuned models (`fit_nb`, `finetune_nb`). This model is a "
            f"{type(model).__name__}. Use it in Python or on the command line."
        )
    return model


def _check_size(content: bytes | memoryview, most_bytes: int) -> None:
    if len(content) > most_bytes:
        raise UploadError(
            f"The file is {len(content) / 1e6:,.0f} MB; at most {most_bytes / 1e6:,.0f} MB are taken. To show a larger "
            "slide, start the app with `stimage-sd app --data`."
        )
    if len(content) == 0:
        raise UploadError("The file is empty.")


def plain_words(error: BaseException, path: Path) -> str:
    """Return the message of an error without the server's paths."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.replace(str(path), "the file").replace(str(path.parent), "").split())[:500]
