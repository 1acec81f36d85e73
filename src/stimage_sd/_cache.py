"""Where the package keeps what it can make again: image pyramids, embeddings, downloads."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path

import pooch

_INSTEAD: ContextVar[Path | None] = ContextVar("stimage_sd_cache", default=None)


def cache_dir() -> Path:
    """Return the cache folder: that of `caching_in`, ``$STIMAGE_SD_CACHE``, or the operating system's place for caches.

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
    return _INSTEAD.get() or _common_dir()


def _common_dir() -> Path:
    chosen = os.environ.get("STIMAGE_SD_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else Path(pooch.os_cache("stimage-sd"))


def keep_compiled() -> None:
    """Have JAX keep what it compiles on disk, in the cache folder under ``jit``, for the processes that come after.

    Called where the package is about to compile something that takes a while. Where the user has chosen a folder
    (``jax_compilation_cache_dir``, or ``JAX_COMPILATION_CACHE_DIR``) or has switched JAX's cache off, nothing is
    changed. Processors of different kinds, which may share a cache folder on a cluster, have folders of their own:
    code compiled for one need not run on another. Numba's kernels are kept by numba itself.
    """
    import jax

    chosen = jax.config.values
    if chosen["jax_compilation_cache_dir"] is not None or not chosen["jax_enable_compilation_cache"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(_common_dir() / "jit" / _processor()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's own second would leave out the many steps that take half of one
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@lru_cache
def _processor() -> str:
    """Hash of the processor's kind and instructions."""
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    return hashlib.sha256(f"{platform.machine()} {binding.get_host_cpu_name()} {features}".encode()).hexdigest()[:16]


@contextmanager
def caching_in(folder: Path) -> Iterator[None]:
    """Keep what can be made again in a folder of one's own, in this thread alone: one visitor's apart from another's.

    Parameters
    ----------
    folder
        The folder; it need not exist yet.

    Examples
    --------
    >>> with caching_in(Path("mine")):
    ...     str(cache_dir())
    'mine'
    """
    token = _INSTEAD.set(folder)
    try:
        yield
    finally:
        _INSTEAD.reset(token)
