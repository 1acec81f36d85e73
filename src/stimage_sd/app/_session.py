"""One visitor's session: a folder of its own, and what was computed in it."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stimage_sd._cache import caching_in

Result = TypeVar("Result")
#: results that a session keeps, the oldest dropped first
_MOST_RESULTS = 40
#: one calculation at a time: each uses all cores, and memory is bounded by one
_CALCULATING = threading.Lock()
_SHARED: dict[Hashable, Any] = {}


@dataclass
class Session:
    """What belongs to one session and no other.

    Attributes
    ----------
    folder
        Its folder, readable by no other user of the machine; deleted by `close`.
    results
        What was computed, by what it was computed from.
    """

    folder: Path
    results: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path) -> Session:
        """Begin a session with an empty folder in the server's."""
        return cls(Path(tempfile.mkdtemp(prefix="session-", dir=root)))

    def close(self) -> None:
        """Delete the session's files, and forget its results."""
        self.results.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_folder(self) -> Path:
        """Make an empty folder for one upload."""
        return Path(tempfile.mkdtemp(prefix="upload-", dir=self.folder))

    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """Return what was computed under a key, or compute it; an error is not kept."""
        if key not in self.results:
            self.results[key] = compute()
            for old in list(self.results)[:-_MOST_RESULTS]:
                del self.results[old]
        result: Result = self.results[key]
        return result

    @contextmanager
    def calculating(self) -> Iterator[None]:
        """Wait for other sessions' calculations, and keep what this one caches in the session's folder."""
        with _CALCULATING, caching_in(self.folder / "cache"):
            yield


def shared_once(key: Hashable, compute: Callable[[], Result]) -> Result:
    """Return what the server itself brings, computed once for all sessions; no upload ever comes here.

    Parameters
    ----------
    key
        What it is computed from: paths that were chosen when the server was started.
    compute
        Computes it, where no session did yet; waits for other calculations.
    """
    if key not in _SHARED:
        with _CALCULATING:
            if key not in _SHARED:
                _SHARED[key] = compute()
    result: Result = _SHARED[key]
    return result


def others_calculate() -> bool:
    """Tell whether a calculation is running that the next one has to wait for."""
    return _CALCULATING.locked()
