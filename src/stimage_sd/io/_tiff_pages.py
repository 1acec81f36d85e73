"""TIFF pages for lazy levels, kept open in each process, and whether their file was replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tifffile

from stimage_sd.io._tiff_open import BROKEN, DamagedFile

#: position of a page in the page tree of a file
Place = tuple[int, ...]


def place_of(page: tifffile.TiffPage | tifffile.TiffFrame) -> Place:
    """Return the position of a page in the page tree: page number and sub-directory number."""
    place: Place = tuple(page.treeindex)
    if len(place) != 2:
        return place
    # tifffile counts sub-directories from 0 or from 1, depending on how it found them.
    within = page.parent.pages[place[0]].aspage().subifds or ()
    return place[0], list(within).index(page.offset)


def page_at(tiff: tifffile.TiffFile, place: Sequence[int]) -> tifffile.TiffPage:
    """Return the page at a position in the page tree."""
    page = tiff.pages[place[0]].aspage()
    for index in place[1:]:
        page = page_below(page, index)
    return page


def page_below(page: tifffile.TiffPage, index: int) -> tifffile.TiffPage:
    """Return a sub-directory of a page. Sub-directories hold the coarser levels."""
    try:
        if page.pages is None:
            raise ValueError("it lacks the coarser levels of the other pages")
        return page.pages[index].aspage()
    except BROKEN as error:
        raise DamagedFile(Path(page.parent.filehandle.path), error) from error


@lru_cache(maxsize=64)
def _open_file(file: FileState) -> tifffile.TiffFile:
    tiff = tifffile.TiffFile(file.path, _multifile=False)
    # All pages of a file share one handle and its position, so pixels are read under this lock.
    tiff.filehandle.set_lock(True)
    return tiff


@lru_cache(maxsize=1024)
def open_page(file: FileState, place: Place) -> tifffile.TiffPage:
    """Return a page for `read_region`. The state of the file is part of the cache key."""
    tiff = _open_file(file)
    # tifffile reads directories without the lock, and another thread may read pixels at the same time.
    with tiff.filehandle.lock:
        page = page_at(tiff, place)
        page.init_decode()
    return page


@dataclass(frozen=True)
class FileState:
    """State of a file when an image was opened. It is part of the name of every chunk."""

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: str | Path) -> FileState:
        """Record the absolute path, size (bytes) and modification time (ns) of a file."""
        # an absolute path stays valid after the working directory changes
        absolute = Path(path).expanduser().absolute()
        state = absolute.stat()
        return cls(str(absolute), state.st_size, state.st_mtime_ns)

    def check(self) -> None:
        """Raise `ValueError` if the file was replaced or removed since it was opened."""
        try:
            now = FileState.of(self.path)
        except OSError as error:
            raise ValueError(f"the file is gone: {error}") from error
        if now != self:
            raise ValueError(
                "the file was replaced since it was opened, and its pixels are no longer those of this section: "
                "read the section again"
            )
