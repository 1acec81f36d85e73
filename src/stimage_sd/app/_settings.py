"""What the app was started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: largest file that a visitor may upload unless told otherwise, MB
UPLOAD_MB = 200


@dataclass(frozen=True)
class Settings:
    """What the one who starts the app chooses, and no visitor can.

    Attributes
    ----------
    root
        Folder of this run of the server: every session has a folder in it; deleted at the end.
    model
        Model that visitors may choose, if any.
    data
        Zarr store of a section that they may choose, if any.
    upload_mb
        Largest file that may be uploaded, MB.
    """

    root: Path
    model: Path | None = None
    data: Path | None = None
    upload_mb: int = UPLOAD_MB


_chosen: list[Settings] = []


def choose(settings: Settings) -> None:
    """Set the settings of this process."""
    _chosen[:] = [settings]


def chosen() -> Settings:
    """Return the settings of this process.

    Raises
    ------
    RuntimeError
        If the page was not started by ``stimage-sd app``.
    """
    if not _chosen:
        raise RuntimeError("Start the app with `stimage-sd app`, which makes and deletes its temporary folder.")
    return _chosen[0]
