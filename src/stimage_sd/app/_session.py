"""Session of a visitor: its folder and its results."""

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
#: number of results per kind that a session keeps; the least recently used result is dropped first
_MOST_RESULTS = 40
_MISSING = object()
#: allows one calculation at a time, which uses all cores and bounds the memory
_CALCULATING = threading.Lock()
_SHARED: dict[Hashable, Any] = {}


@dataclass
class Session:
    """Folder and results that belong to one session.

    Attributes
    ----------
    folder
        Folder of the session. Other users of the computer cannot read it. `close` deletes it.
    results
        Results by the key of their inputs. The most recently used result comes last.
    """

    folder: Path
    results: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path) -> Session:
        """Start a session with an empty folder inside `root`."""
        return cls(Path(tempfile.mkdtemp(prefix="session-", dir=root)))

    def close(self) -> None:
        """Delete the session's files and results."""
        self.results.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_folder(self) -> Path:
        """Make an empty folder for an upload."""
        return Path(tempfile.mkdtemp(prefix="upload-", dir=self.folder))

    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """Return the result under a key, or compute and keep it. Errors are not kept.

        Parameters
        ----------
        key
            Key of the result. The first entry of a tuple is the kind of the result. Results are dropped per kind, so
            that explanations never displace the upload that they explain.
        compute
            Computes the result.
        """
        kept = self.results.pop(key, _MISSING)
        result: Result = compute() if kept is _MISSING else kept
        self.results[key] = result
        alike = [one for one in self.results if _kind(one) == _kind(key)]
        for old in alike[:-_MOST_RESULTS]:
            del self.results[old]
        return result

    @contextmanager
    def calculating(self) -> Iterator[None]:
        """Wait for other sessions' calculations, and keep the cache of this one in the session's folder."""
        with _CALCULATING, caching_in(self.folder / "cache"):
            yield


def _kind(key: Hashable) -> Hashable:
    return key[0] if isinstance(key, tuple) else None


def shared_once(key: Hashable, compute: Callable[[], Result]) -> Result:
    """Return a result of the server's own files, computed once for all sessions. Uploads are never shared.

    Parameters
    ----------
    key
        Key of the result: paths that were chosen at the start of the server.
    compute
        Computes the result if it is missing, after other calculations have ended.
    """
    if key not in _SHARED:
        with _CALCULATING:
            if key not in _SHARED:
                _SHARED[key] = compute()
    result: Result = _SHARED[key]
    return result


def others_calculate() -> bool:
    """Return whether a calculation is running, so that the next one has to wait."""
    return _CALCULATING.locked()
