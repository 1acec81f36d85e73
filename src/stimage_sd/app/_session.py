"""Session of a visitor: its folder and its results, and whose calculation is running."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stimage_sd._cache import caching_in

Result = TypeVar("Result")
Say = Callable[[str], None]
#: number of results per kind that a session keeps; the least recently used result is dropped first
_MOST_RESULTS = 40
#: seconds between two looks at a running calculation
_LOOK_AGAIN = 0.5
_MISSING = object()
#: allows one calculation at a time, which uses all cores and bounds the memory
_CALCULATING = threading.Lock()
_SHARED: dict[Hashable, Any] = {}


@dataclass(frozen=True)
class _Running:
    """The running calculation: its visitor, its name, and when it began."""

    visitor: str
    name: str
    began: float


_running: list[_Running] = []


@dataclass
class Session:
    """Folder and results that belong to one session.

    Attributes
    ----------
    folder
        Folder of the session. Other users of the computer cannot read it. `close` deletes it.
    visitor
        Mark of the visitor's browser. A reloaded page is a new session of the same visitor.
    results
        Results by the key of their inputs. The most recently used result comes last.
    """

    folder: Path
    visitor: str
    results: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path, visitor: str | None = None) -> Session:
        """Start a session with an empty folder inside `root`."""
        return cls(Path(tempfile.mkdtemp(prefix="session-", dir=root)), visitor or secrets.token_urlsafe(16))

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

    def calculated(self, key: Hashable, compute: Callable[[], Result], *, name: str, say: Say) -> Result:
        """Return the result under a key as `once` does, and compute it after running calculations have ended.

        Parameters
        ----------
        key, compute
            As in `once`. A result that an earlier run of the page has computed meanwhile is not computed again.
        name, say
            As in `calculating`.
        """

        def in_turn() -> Result:
            with self.calculating(name, say):
                return self.results[key] if key in self.results else compute()

        return self.once(key, in_turn)

    @contextmanager
    def calculating(self, name: str, say: Say) -> Iterator[None]:
        """Wait for running calculations, and keep the cache of this one in the session's folder.

        Parameters
        ----------
        name
            What is calculated, for those who wait.
        say
            Called while waiting, with the reason, and with an empty text when the wait is over.
        """
        with _in_turn(self.visitor, name, say, caching_in(self.folder / "cache")):
            yield


def _kind(key: Hashable) -> Hashable:
    return key[0] if isinstance(key, tuple) else None


def shared_once(key: Hashable, compute: Callable[[], Result], *, visitor: str, name: str, say: Say) -> Result:
    """Return a result of the server's own files, computed once for all sessions. Uploads are never shared.

    Parameters
    ----------
    key
        Key of the result: paths that were chosen at the start of the server.
    compute
        Computes the result if it is missing, after other calculations have ended.
    visitor
        Mark of the visitor's browser, as in `Session`.
    name, say
        As in `Session.calculating`.
    """
    if key not in _SHARED:
        with _in_turn(visitor, name, say, nullcontext()):
            if key not in _SHARED:
                _SHARED[key] = compute()
    result: Result = _SHARED[key]
    return result


@contextmanager
def _in_turn(visitor: str, name: str, say: Say, cache: AbstractContextManager[Any]) -> Iterator[None]:
    """Hold the lock of the calculations, and say while waiting who holds it."""
    # `say` shows the words on the page, where Streamlit ends a run that the visitor's next click has replaced
    has_waited = False
    while not _CALCULATING.acquire(timeout=_LOOK_AGAIN):
        has_waited = True
        say(waiting_for(visitor))
    try:
        if has_waited:
            say("")
        _running[:] = [_Running(visitor, name, time.monotonic())]
        with cache:
            yield
    finally:
        _running.clear()
        _CALCULATING.release()


def waiting_for(visitor: str) -> str:
    """Return whose calculation a visitor waits for, or an empty text if none is running."""
    running = next(iter(_running), None)
    if running is None:
        return ""
    seconds = f"{time.monotonic() - running.began:.0f} s so far"
    # what another visitor looks at is private
    if running.visitor != visitor:
        return f"Waiting for another visitor's calculation, {seconds}"
    return f"Waiting for your earlier calculation ({running.name}), {seconds}"
