"""Where the package keeps what it can make again: image pyramids, embeddings, downloads."""

from __future__ import annotations

import os
from pathlib import Path

import pooch


def cache_dir() -> Path:
    """Return the cache folder: ``$STIMAGE_SD_CACHE``, else the operating system's place for caches.

    Everything in it can be deleted whenever no section read through it is in use.

    Returns
    -------
    The folder; it need not exist yet.

    Examples
    --------
    >>> from stimage_sd._cache import cache_dir
    >>> cache_dir().is_absolute()
    True
    """
    chosen = os.environ.get("STIMAGE_SD_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else Path(pooch.os_cache("stimage-sd"))
