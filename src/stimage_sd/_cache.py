"""Choose the cache folder for reproducible files: image pyramids, embeddings, downloads, compiled code."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path

from stimage_sd._settings import settings

_INSTEAD: ContextVar[Path | None] = ContextVar("stimage_sd_cache", default=None)


def cache_dir() -> Path:
    """Return the cache folder, which may not exist yet.

    The folder is that of `caching_in`, else ``stimage_sd.settings.cache``, else ``$STIMAGE_SD_CACHE``, else the
    operating system's cache folder. If the latter is not writable, a temporary folder of the user is used.

    Everything in the folder can be deleted while no section that was read through it is in use.

    >>> from stimage_sd._cache import cache_dir
    >>> cache_dir().is_absolute()
    True
    """
    return _INSTEAD.get() or _common_dir()


def _common_dir() -> Path:
    chosen = settings.cache or os.environ.get("STIMAGE_SD_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    usual = _users_cache("stimage-sd")
    return usual if _is_writable(usual) else _temporary_dir()


def _users_cache(name: str) -> Path:
    """Return a program's folder in the user's cache, as a relative path if the user has no home."""
    import pooch

    return Path(pooch.os_cache(name))


def _is_writable(folder: Path) -> bool:
    """Return whether a folder can be written or created."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@lru_cache
def _temporary_dir() -> Path:
    """Return a temporary folder of the user, for use without a writable home."""
    folder = Path(tempfile.gettempdir()) / f"stimage-sd-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_own = not folder.is_symlink() and (not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid())
    except FileExistsError:
        is_own = False
    # another user may have created the folder
    return folder if is_own else Path(tempfile.mkdtemp(prefix="stimage-sd-"))


def keep_kernels() -> None:
    """Let numba cache its kernels in the cache folder if it has no other writable folder.

    Numba tries the folder of the package and the user's cache, and raises an error if neither is writable. This
    function is called on import of the package.
    """
    beside = Path(__file__).parent / "__pycache__"
    if os.environ.get("NUMBA_CACHE_DIR") or _is_writable(beside) or _is_writable(_users_cache("numba")):
        return
    folder = str(_common_dir() / "numba")
    os.environ["NUMBA_CACHE_DIR"] = folder
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = folder


def keep_compiled() -> None:
    """Let JAX keep compiled code in the folder ``jit`` of the cache folder, for later processes.

    Call this before long compilations. Nothing changes if the user chose a folder (``jax_compilation_cache_dir`` or
    ``JAX_COMPILATION_CACHE_DIR``) or switched JAX's cache off. Every kind of processor has its own folder, because
    processors on a cluster may share the cache folder and cannot always run each other's code. Numba keeps its own
    kernels.
    """
    import jax

    chosen = jax.config.values
    if chosen["jax_compilation_cache_dir"] is not None or not chosen["jax_enable_compilation_cache"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(_common_dir() / "jit" / _processor()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's default of 1 s would skip the many small steps, which are read ten times as fast as they compile
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@lru_cache
def _processor() -> str:
    """Return a hash of the processor's kind and instructions."""
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    return hashlib.sha256(f"{platform.machine()} {binding.get_host_cpu_name()} {features}".encode()).hexdigest()[:16]


@contextmanager
def caching_in(folder: Path) -> Iterator[None]:
    """Use another cache folder in this thread only, for instance one folder per visitor of the app.

    >>> with caching_in(Path("mine")):
    ...     str(cache_dir())
    'mine'
    """
    token = _INSTEAD.set(folder)
    try:
        yield
    finally:
        _INSTEAD.reset(token)
