"""Settings with which the app was started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: default of the largest size of an uploaded file, MB
UPLOAD_MB = 200


@dataclass(frozen=True)
class Settings:
    """Settings that are fixed at the start of the app. Visitors cannot change them.

    Attributes
    ----------
    root
        Folder of this run of the server, with one folder per session. It is deleted at the end.
    model
        Model that visitors can choose, if any.
    data
        Zarr store of a section that visitors can choose, if any.
    upload_mb
        Largest size of an uploaded file, MB.
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
