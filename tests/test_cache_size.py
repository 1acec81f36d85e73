"""The cache folder's size: the oldest goes first, and nothing that a process works in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stimage_sd import _cache_size
from stimage_sd._files import LOCK, release, scratch, take
from stimage_sd.cli import app


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images, an interrupted run and a download of 1,000 bytes each, in order of age."""
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path))
    for age, name in enumerate(["her2st/C5", "images/old.zarr", "stream/run", "images/new.zarr"]):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(bytes(1000))
        os.utime(folder, (1000 + age, 1000 + age))
    return tmp_path


def names(cache: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in cache.glob("*/*")}


def test_the_oldest_is_deleted_and_no_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cache_size.trim() == 0  # far from the limit
    assert _cache_size.trim(2500) == 1000
    assert names(cache) == {"her2st/C5", "stream/run", "images/new.zarr"}
    monkeypatch.setenv("STIMAGE_SD_CACHE_LIMIT", "1e-6")
    assert _cache_size.trim() == 1000
    assert names(cache) == {"her2st/C5", "images/new.zarr"}
    monkeypatch.setenv("STIMAGE_SD_CACHE_LIMIT", "much")
    with pytest.raises(ValueError, match="number of GB, found 'much'"):
        _cache_size.trim()


def test_what_is_in_use_stays(cache: Path) -> None:
    _cache_size.mark_used(cache / "images" / "old.zarr")
    lock = take(cache / "stream" / "run" / LOCK)
    with scratch(cache / "images", prefix=".other") as working:
        assert _cache_size.trim(0) == 1000
        assert names(cache) == {"her2st/C5", "images/old.zarr", "stream/run", f"images/{working.name}"}
        assert _cache_size.clear() == 2000
        assert names(cache) == {"stream/run", f"images/{working.name}"}
    release(lock)
    _cache_size.clear()
    assert names(cache) == set()


def test_the_command_lists_and_deletes(cache: Path) -> None:
    listed = CliRunner().invoke(app, ["cache"])
    assert listed.exit_code == 0, listed.output
    assert "images          0.000 GB in 2" in listed.output
    assert f"GB in {cache}" in listed.output
    assert CliRunner().invoke(app, ["cache", "--limit", "0"]).exit_code == 0
    assert names(cache) == {"her2st/C5"}
    assert CliRunner().invoke(app, ["cache", "--clear"]).exit_code == 0
    assert names(cache) == set()
