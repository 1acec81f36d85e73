"""Detect whether the file of a lazy image was replaced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileState:
    """State of a file when an image was opened. It is part of the name of every chunk."""

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: str | Path) -> FileState:
        """Record the absolute path, size (bytes) and modification time (ns) of a file."""
        # an absolute path stays valid after the working directory changes
        absolute = Path(path).expanduser().absolute()
        state = absolute.stat()
        return cls(str(absolute), state.st_size, state.st_mtime_ns)

    def check(self) -> None:
        """Raise `ValueError` if the file was replaced or removed since it was opened."""
        try:
            now = FileState.of(self.path)
        except OSError as error:
            raise ValueError(f"the file is gone: {error}") from error
        if now != self:
            raise ValueError(
                "the file was replaced since it was opened, and its pixels are no longer those of this section: "
                "read the section again"
            )
