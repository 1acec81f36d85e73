"""Write files and folders atomically: write beside the target, and move to the target when complete.

Every writer of this package uses `replacing`. Unfinished work is in folders of `scratch`, which are locked while their
process lives. The next run removes folders of killed processes.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no locks here, so every process needs its own cache folder
    fcntl = None  # type: ignore[assignment]

#: infix in the names of unfinished folders, after the name of the target
UNFINISHED = ".unfinished-"
#: infix in the names of folders that an interrupted run continues
RESUMABLE = ".resumable-"
LOCK = ".lock"
#: age at which an unfinished folder without a lock file counts as left by a killed process, seconds
ABANDONED = 600.0
#: the same age on file systems without locks, seconds
_LONGEST = 24 * 3600.0
#: error codes of file systems that cannot exchange two paths
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to, and move the file or folder from there to `target` on success.

    If the process is killed at any moment, the old or the new content is whole, and `restored` finds it.

    - `target`: final path of the file or folder. Links are followed.
    - yields: a path with the same name, in a new folder on the same file system. After an error, `target` is unchanged.
    """
    target = Path(os.path.realpath(restored(target)))
    with scratch(target.parent, prefix=f".{target.name}") as folder:
        yield folder / target.name
        _put(folder / target.name, target)


@contextmanager
def resuming(target: Path, key: str) -> Iterator[Path]:
    """Yield a path as `replacing` does, but keep what was written there if the run is killed or interrupted.

    The next run of the same `key` finds it there. After an error it is deleted, as by `replacing`.

    - `target`: final path of the folder.
    - `key`: identifies what is written. Remains of other keys are deleted.
    - yields: a path in a hidden folder beside the target. It exists already if an earlier run was interrupted.
    """
    target = Path(os.path.realpath(restored(target)))
    begun = target.with_name(f".{target.name}{RESUMABLE}{key}")
    lock = take(begun / LOCK)
    if lock is None:
        raise RuntimeError(f"Another process is writing {target}. Wait for it, or choose another folder.")
    for other in target.parent.glob(f".{glob.escape(target.name)}{RESUMABLE}*"):
        if other != begun and (left := take(other / LOCK)) is not None:
            discard(other, left)
    try:
        yield begun / target.name
    except Exception:
        discard(begun, lock)
        raise
    except BaseException:  # interrupted by the user
        release(lock)
        raise
    _put(begun / target.name, target)
    discard(begun, lock)


def write_whole(path: Path, content: bytes | bytearray) -> None:
    """Write one of many small files atomically. The folder's owner deletes leftovers of killed processes."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def restored(path: Path) -> Path:
    """Undo a replacement that was killed halfway, and return the path to read, which is usually `path`."""
    real = Path(os.path.realpath(path))
    aside = _aside(real)
    if real.exists() or not aside.exists():
        return path
    try:
        os.rename(aside, real)
    except OSError:  # the folder is not writable, or another process was first
        return path if real.exists() else aside
    return path


@contextmanager
def scratch(parent: Path, *, prefix: str = "") -> Iterator[Path]:
    """Yield a new temporary folder, and first delete folders of killed processes with the same prefix."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, prefix=prefix)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{UNFINISHED}", dir=parent))
    lock = take(folder / LOCK)
    try:
        yield folder
    finally:
        discard(folder, lock)


def remove_abandoned(parent: Path, *, prefix: str = "") -> None:
    """Delete the folders of `scratch` that ended processes left."""
    for left in parent.glob(f"{glob.escape(prefix)}*{UNFINISHED}*"):
        with suppress(OSError):  # the folder belongs to another user, or another process deletes it
            if not (left / LOCK).exists() and time.time() - left.stat().st_mtime < ABANDONED:
                continue  # a new process is about to lock the folder
            if (lock := take(left / LOCK)) is None:
                continue
            if time.time() - left.stat().st_mtime < _LONGEST and not _excludes(left / LOCK):
                release(lock)  # without working locks, another process may use the folder
            else:
                discard(left, lock)


def take(path: Path) -> int | None:
    """Lock a file and return its handle, or `None` if another process holds the lock.

    A missing file is created with its folder. The system releases the lock of a process that dies. On a file system
    without locks every lock succeeds.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was deleted meanwhile
            continue
        except PermissionError:
            return None
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            return handle
        with suppress(FileNotFoundError):
            # the previous holder may have deleted the file, so check that the lock is on the current file
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def _excludes(path: Path) -> bool:
    """Return whether a held lock keeps others out, as not all file systems support locks."""
    other = take(path)
    release(other)
    return other is None


def discard(folder: Path, lock: int | None) -> None:
    """Delete a locked folder and release the lock."""
    # twice, because NFS keeps an entry for the open lock file
    shutil.rmtree(folder, ignore_errors=True)
    release(lock)
    shutil.rmtree(folder, ignore_errors=True)


def release(lock: int | None) -> None:
    """Release a lock of `take`."""
    if lock is not None:
        os.close(lock)


def remove(path: Path) -> None:
    """Delete a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _put(source: Path, target: Path) -> None:
    """Move `source` to `target`, and only then delete the old content."""
    if source.is_file():
        with source.open("rb") as file:
            os.fsync(file.fileno())
    try:
        os.replace(source, target)
    except OSError:  # a folder is in the way
        if not target.exists():
            raise
        if not _exchange(source, target):
            _put_by_steps(source, target)
    with suppress(OSError):
        remove(_aside(target))


def _put_by_steps(source: Path, target: Path) -> None:
    """Move the old content aside, then move `source` to `target`. Between both steps, `restored` undoes the first."""
    aside = _aside(target)
    remove(aside)
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(aside, target)
        raise


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, and return `False` if the system cannot."""
    call = _system_exchange()
    if call is None:
        return False
    function, before, between, after = call
    if function(*before, os.fsencode(one), *between, os.fsencode(other), after) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


@lru_cache
def _system_exchange() -> tuple[Any, tuple[int, ...], tuple[int, ...], int] | None:
    """Return the system call for `_exchange`, and its arguments before, between and after the two paths."""
    if os.name != "posix":
        return None
    library, flag, here = ctypes.CDLL(None, use_errno=True), 2, -100
    if hasattr(library, "renameat2"):  # Linux
        return library.renameat2, (here,), (here,), flag
    if hasattr(library, "renamex_np"):  # macOS
        return library.renamex_np, (), (), flag
    return None
