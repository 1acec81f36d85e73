"""Track slides that end the process. They run last in the next call, and are skipped after the second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: times that the process may end on a slide before the slide is skipped
MOST = 2


class Tries:
    """Folder with a note for each slide in progress.

    A crashing decoder or lack of memory ends the process without an exception. The note of the slide then remains.

    - `folder`: folder of the notes. It is created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def ended(self, name: str) -> int:
        """Return how many times the process ended during a slide."""
        path = self._folder / name
        return path.stat().st_size if path.exists() else 0

    def why_not(self, name: str) -> str | None:
        """Return why a slide is skipped, or `None`."""
        if self.ended(name) < MOST:
            return None
        return (
            f"the process ended {MOST} times during this slide. Its file may crash a decoder, memory may run out, or "
            f"the job was stopped. Delete {self._folder / name} to try it again."
        )

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Keep a note while a slide is in progress."""
        path = self._folder / name
        with path.open("ab") as note:
            note.write(b"x")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
