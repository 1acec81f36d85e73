"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; tests that need it are skipped only where it is absent."""
    folder = Path(os.environ.get("STIMAGE_SD_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set STIMAGE_SD_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test's image and embedding cache away from the user's."""
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path_factory.getbasetemp() / "stimage-sd-cache"))
