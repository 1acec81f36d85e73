"""Settings of the package in this process: cache folder, threads, progress bars and messages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from stimage_sd._shown import Facts, as_html

Verbosity = Literal["error", "warning", "info", "debug"]

#: the logger of all messages; they go to standard error unless the program set up logging itself
logger = logging.getLogger("stimage_sd")


class _Console(logging.StreamHandler):
    """Standard error, where messages go above the progress bars and not into them."""

    def emit(self, record: logging.LogRecord) -> None:
        bar = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
        with nullcontext() if bar is None else bar.external_write_mode(file=self.stream):
            super().emit(record)


_console = _Console()
_console.setFormatter(logging.Formatter("%(name)s: %(message)s"))
_console.addFilter(lambda record: not logging.getLogger().handlers)
logger.addHandler(_console)


@dataclass
class Settings:
    """Settings of the package in this process.

    Attributes
    ----------
    cache
        Folder for image pyramids, interrupted runs, downloads and compiled code. It comes before the environment
        variable ``STIMAGE_SD_CACHE``. `None`: the folder of that variable, else the cache folder of the operating
        system.
    n_jobs
        Number of threads of calls that get no `n_jobs`. `None`: one per core. Threads of JAX, of linear algebra and of
        `dask.distributed` have their own settings.
    progress
        Whether long calls show progress bars.
    verbosity
        Lowest level of the logger ``stimage_sd``: ``"error"``, ``"warning"``, ``"info"`` (one message per step and
        section) or ``"debug"`` (parameters too).

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.settings.verbosity = "error"
    >>> with sti.settings.override(n_jobs=2, progress=False):
    ...     sti.settings
    Settings(cache=None, n_jobs=2, progress=False, verbosity='error')
    >>> sti.settings.verbosity = "warning"
    """

    cache: str | Path | None = None
    n_jobs: int | None = None
    progress: bool = True
    verbosity: Verbosity = "warning"

    def facts(self) -> Facts:
        """Names and values of the settings, as notebooks show them."""
        return {
            "cache": "the folder of $STIMAGE_SD_CACHE, else of the user" if self.cache is None else str(self.cache),
            "n_jobs": f"one thread per core ({os.cpu_count()})" if self.n_jobs is None else str(self.n_jobs),
            "progress": "bars are shown" if self.progress else "no bars",
            "verbosity": self.verbosity,
        }

    def _repr_html_(self) -> str:
        return as_html(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _CHECKED:
            raise AttributeError(f"Expected one of the settings {', '.join(_CHECKED)}, found {name!r}.")
        super().__setattr__(name, _CHECKED[name](value))
        if name == "verbosity":
            logger.setLevel(value.upper())

    @contextmanager
    def override(self, **options: Any) -> Iterator[None]:
        """Change settings within a ``with`` block.

        Parameters
        ----------
        options
            Settings and their values.
        """
        before = {name: getattr(self, name) for name in options}
        try:
            for name, value in options.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


def _folder(value: Any) -> Path | None:
    return None if value is None else Path(value).expanduser().resolve()


def _count(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"Expected `n_jobs` to be a positive number of threads or None, found {value!r}.")
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"Expected `progress` to be True or False, found {value!r}.")
    return value


def _level(value: Any) -> str:
    if value not in get_args(Verbosity):
        raise ValueError(f"Expected `verbosity` to be one of {get_args(Verbosity)}, found {value!r}.")
    return str(value)


_CHECKED: dict[str, Callable[[Any], Any]] = {
    "cache": _folder,
    "n_jobs": _count,
    "progress": _switch,
    "verbosity": _level,
}
settings = Settings()


def n_threads(n_jobs: int | None = None) -> int:
    """Return the number of threads of a call: its `n_jobs`, else that of the settings, else one per core."""
    return n_jobs or settings.n_jobs or os.cpu_count() or 1
