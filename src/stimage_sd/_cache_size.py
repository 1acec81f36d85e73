"""Measure and trim the cache folder: oldest entries first, and no entry that is in use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stimage_sd._cache import cache_dir
from stimage_sd._files import LOCK, UNFINISHED, discard, remove, remove_abandoned, take

#: folders that `trim` deletes from; only `clear` deletes downloads and compiled code
_REPRODUCIBLE = ("images", "tables", "stream", "app")
#: default limit of these folders without ``$STIMAGE_SD_CACHE_LIMIT``, GB
LIMIT_GB = 200.0
#: entries that were opened this recently may be in use, seconds
_IN_USE = 24 * 3600.0


@dataclass(frozen=True)
class Entry:
    """A file or folder in the cache.

    - `path`: path of the file or folder.
    - `size`: size, bytes.
    - `used`: time of the last use, seconds since the epoch.
    """

    path: Path
    size: int
    used: float


def entries() -> list[Entry]:
    """Return the entries of the cache folder, oldest first."""
    files = []
    for path in (path for kind in _folders() for path in kind.iterdir()):
        with suppress(FileNotFoundError):  # other processes write and delete at the same time
            files.append(Entry(path, _size(path), path.stat().st_mtime))
    return sorted(files, key=lambda entry: entry.used)


def limit_bytes() -> float:
    """Return the size limit of the reproducible folders, bytes."""
    stated = os.environ.get("STIMAGE_SD_CACHE_LIMIT", "")
    try:
        return float(stated or LIMIT_GB) * 1e9
    except ValueError as error:
        raise ValueError(f"Expected STIMAGE_SD_CACHE_LIMIT as a number of GB, found {stated!r}.") from error


def trim(limit: float | None = None, *, in_use: float = _IN_USE) -> int:
    """Delete the oldest reproducible entries down to `limit` bytes, and return the deleted bytes.

    Entries that were opened in the last `in_use` seconds stay. So do entries that another process works in.
    """
    for kind in _folders():
        remove_abandoned(kind)
    kept = [entry for entry in entries() if entry.path.parent.name in _REPRODUCIBLE]
    excess = sum(entry.size for entry in kept) - (limit_bytes() if limit is None else limit)
    deleted = 0
    for entry in kept:
        if deleted >= excess:
            break
        if time.time() - entry.used >= in_use and _delete(entry.path):
            deleted += entry.size
    return deleted


def clear() -> int:
    """Delete all entries that no process works in, and return the deleted bytes."""
    for kind in _folders():
        remove_abandoned(kind)
    return sum(entry.size for entry in entries() if _delete(entry.path))


def report() -> str:
    """Return a text with the sizes of the cached folders and their limit."""
    sizes: dict[str, list[int]] = {}
    for entry in entries():
        sizes.setdefault(entry.path.parent.name, []).append(entry.size)
    lines = [f"{kind:<10} {sum(parts) / 1e9:10.3f} GB in {len(parts)}" for kind, parts in sorted(sizes.items())]
    lines.append(f"{'all':<10} {sum(map(sum, sizes.values())) / 1e9:10.3f} GB in {cache_dir()}")
    lines.append(f"Images, tables and interrupted runs are kept up to {limit_bytes() / 1e9:g} GB.")
    return "\n".join(lines)


def mark_used(path: Path) -> None:
    """Set the time of last use of an entry to now."""
    with suppress(OSError):  # the cache is read-only or belongs to another user
        os.utime(path)


def _folders() -> Iterator[Path]:
    folder = cache_dir()
    return (path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else iter(())


def _size(path: Path) -> int:
    size = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            size += 0 if file.is_dir() else file.lstat().st_size
    return size


def _delete(path: Path) -> bool:
    """Delete an entry, and return `False` if a process works in it."""
    if UNFINISHED in path.name:
        return False
    lock = take(path / LOCK) if (path / LOCK).exists() else None
    if lock is None and (path / LOCK).exists():
        return False
    if lock is not None:
        discard(path, lock)
    else:
        with suppress(OSError):  # the entry belongs to another user, or another process was first
            remove(path)
    return not path.exists()
