"""Files that visitors send: taken in with care, before anything in them is decoded.

What is decided here is decided by a file's first bytes and headers, never by its name. A picture of a few kilobytes can
say that it is 30,000 pixels wide and high, and a model of a few kilobytes that it unpacks to gigabytes; both are told
from their headers. Nothing that could run code is opened: models are JSON and plain arrays.
"""

from __future__ import annotations

import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tifffile

#: most pixels of an image that has to be decoded whole: a square of 14,000 px
MOST_WHOLE = 200_000_000
#: most pixels of a slide in tiles, of which only those on tissue are read
MOST_IN_TILES = 20_000_000_000
#: longest side of a slide's stored tile, px, and most pages of a TIFF
LARGEST_TILE, MOST_PAGES = 8192, 1000
#: what the parts of a model may unpack to, bytes
MODEL_PARTS = {"config.json": 64 << 20, "model.safetensors": 1 << 30}
#: first bytes of the formats that are taken, and the name that such a file is kept under
SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image.png",
    b"\xff\xd8\xff": "image.jpg",
    b"II*\x00": "image.tif",
    b"MM\x00*": "image.tif",
    b"II+\x00": "image.tif",
    b"MM\x00+": "image.tif",
}
IMAGE_TYPES = ("png", "jpg", "jpeg", "tif", "tiff", "svs")
DAMAGED = "The image is truncated, damaged or no image. Copy or export it again."
_MENDS = "Crop it, save it at half the resolution, or save it as a tiled, pyramidal TIFF."
#: what tifffile ends in on a damaged file
_BROKEN = (tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error, OSError,
           RecursionError, MemoryError, OverflowError, ZeroDivisionError)  # fmt: skip


class UploadError(ValueError):
    """What is wrong with a file, in words for the visitor who sent it."""


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image says.

    Attributes
    ----------
    width, height
        Pixels.
    """

    width: int
    height: int


def display_name(name: str) -> str:
    """Return a file's name as it is shown: letters, digits and ``. _ -``, no more than 60 of them.

    Examples
    --------
    >>> display_name("../../etc/![x](http://a.b/c.png)")
    'x_http_a.b_c.png'
    """
    short = re.sub(r"[^\w.-]+", "_", Path(name.replace("\\", "/").replace("/", "_")).name, flags=re.ASCII)
    return re.sub(r"^[._-]+|[._-]+$", "", short)[:60] or "file"


def store_image(content: bytes | memoryview, folder: Path, *, most_bytes: int) -> Path:
    """Write an uploaded image into a folder, under a name of ours.

    Parameters
    ----------
    content
        What was sent.
    folder
        The session's own; it exists.
    most_bytes
        Largest that is taken.

    Returns
    -------
    The file; its header is checked.

    Raises
    ------
    UploadError
        If it is too large, of no known format, damaged, or too many pixels. Nothing is left in the folder.
    """
    _check_size(content, most_bytes)
    kept = next((name for start, name in SIGNATURES.items() if bytes(content[: len(start)]) == start), None)
    if kept is None:
        raise UploadError(
            "This is no image that the app reads: expected a PNG, JPEG, TIFF or SVS file, found something else by its "
            "first bytes."
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
    """Read the header of an image and check that it can be worked on; no pixel is decoded.

    Parameters
    ----------
    path
        A PNG, JPEG or TIFF file.

    Returns
    -------
    What the header says.

    Raises
    ------
    UploadError
        If it is damaged, or too many pixels.
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
    try:
        with tifffile.TiffFile(path) as tiff:
            if len(tiff.pages) > MOST_PAGES:
                raise UploadError(f"The TIFF has {len(tiff.pages)} pages; at most {MOST_PAGES} are taken.")
            pages = [level.keyframe for level in tiff.series[0].levels]
            sizes = [(int(page.imagewidth), int(page.imagelength)) for page in pages]
            tiles = [(int(page.tilewidth), int(page.tilelength)) if page.is_tiled else None for page in pages]
    except UploadError:
        raise
    except _BROKEN as error:
        raise UploadError(DAMAGED) from error
    for size, tile in zip(sizes, tiles, strict=True):
        _check_pixels(*size, MOST_WHOLE if tile is None else MOST_IN_TILES)
        if tile is not None and max(tile) > LARGEST_TILE:
            raise UploadError(
                f"The TIFF is stored in tiles of {tile[0]:,} x {tile[1]:,} px; at most {LARGEST_TILE:,} px a side are "
                "taken. Save it with tiles of 512 px."
            )
    # thumbnails are made of the coarsest level, which is therefore read whole
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
    """Write an uploaded model into a folder, if it is one of this package's.

    Parameters
    ----------
    content
        What was sent.
    folder
        The session's own; it exists.
    most_bytes
        Largest that is taken.

    Returns
    -------
    The file; what it holds is checked by name and size, and not unpacked.

    Raises
    ------
    UploadError
        If it is too large, no zip, or holds anything but the parts of a model. Nothing is left in the folder.
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
    """Check that a file is a zip of the parts of a model, and what they unpack to; nothing is unpacked.

    Raises
    ------
    UploadError
        If it is not.
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
        # zipfile itself stops at the size that is stated, so that a lie is found out as damage
        if entry.file_size > MODEL_PARTS[entry.filename]:
            raise UploadError(
                f"{entry.filename} in the model unpacks to {entry.file_size >> 20:,} MB; at most "
                f"{MODEL_PARTS[entry.filename] >> 20:,} MB are taken. It was not unpacked."
            )


def load_model(path: Path) -> Any:
    """Load a model whose parts were checked.

    Raises
    ------
    UploadError
        If it is damaged, newer than this version, or of a kind that the app does not show.
    """
    from stimage_sd import models
    from stimage_sd.models._stand_ins import Explainable

    try:
        model = models.load(path)
    except (ValueError, IndexError, RecursionError, MemoryError) as error:
        raise UploadError(f"The model cannot be read: {plain_words(error, path)}") from error
    if not isinstance(model, Explainable) or not all(hasattr(model, name) for name in ("tiles", "features", "floor")):
        raise UploadError(
            f"The app shows ensembles and fine-tuned models (`fit_nb`, `finetune_nb`); this is a "
            f"{type(model).__name__}. Use it in Python or on the command line."
        )
    return model


def _check_size(content: bytes | memoryview, most_bytes: int) -> None:
    if len(content) > most_bytes:
        raise UploadError(
            f"The file is {len(content) / 1e6:,.0f} MB; at most {most_bytes / 1e6:,.0f} MB are taken. Whoever starts "
            "the app can show larger slides with `stimage-sd app --data`."
        )
    if len(content) == 0:
        raise UploadError("The file is empty.")


def plain_words(error: BaseException, path: Path) -> str:
    """An error's words, without the server's paths."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.replace(str(path), "the file").replace(str(path.parent), "").split())[:500]
