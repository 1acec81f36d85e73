"""Whatever moment a process is killed at, the old or the new content is whole and found, and nothing stays behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stimage_sd import _files
from stimage_sd._files import LOCK, UNFINISHED, release, remove_abandoned, replacing, restored, scratch, take

#: replaces a folder, or a file, in children of which each is killed at a later step than the one before
KILLS = """
    import os, shutil, signal, sys
    from pathlib import Path
    from stimage_sd import _files
    from stimage_sd._files import replacing, restored

    STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
    root, kind, exchanges = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
    if not exchanges:
        _files._exchange = lambda *_: False
    target = root / "target"

    def write(path, text):
        if kind == "file":
            path.write_text(text)
            return
        path.mkdir()
        for name in "ab":
            (path / name).write_text(text)

    def read(path):
        if kind == "file":
            return path.read_text()
        assert sorted(item.name for item in path.iterdir()) == ["a", "b"]
        (text,) = {item.read_text() for item in path.iterdir()}
        return text

    def replace(killed_at):
        done = 0

        def step(event, _):
            nonlocal done
            if event in STEPS:
                done += 1
                if done == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(step)
        with replacing(target) as path:
            write(path, "new")
        os._exit(0)

    step, found = 0, []
    while not found or found[-1] is not None:
        step += 1
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        write(target, "old")
        child = os.fork()
        if not child:
            replace(step)
        _, status = os.waitpid(child, 0)
        found.append(read(restored(target)) if os.WIFSIGNALED(status) else None)
        for left in root.glob(".*.unfinished-*"):
            os.utime(left, (0, 0))  # those without a lock yet are removed when they are old
        with replacing(target) as path:
            write(path, "newest")
        assert read(target) == "newest"
        assert [item.name for item in root.iterdir()] == ["target"], list(root.iterdir())
    print(*found[:-1])
"""


@pytest.mark.parametrize(("kind", "exchanges"), [("file", True), ("folder", True), ("folder", False)])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(kind: str, exchanges: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLS), str(tmp_path / "root"), kind, str(exchanges)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert len(found) >= 6
    assert found == sorted(found, reverse=True)  # the old ones come first
    assert set(found) == {"old", "new"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_a_file_and_back(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(_files, "_system_exchange", lambda: None)
    target = tmp_path / "target"
    target.write_text("file")
    with replacing(target) as path:
        path.mkdir()
        (path / "inside").write_text("folder")
    assert (target / "inside").read_text() == "folder"
    with replacing(target) as path:
        path.write_text("file again")
    assert target.read_text() == "file again"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_between_the_two_renames_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "_system_exchange", lambda: None)
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = os.rename

    def full(source: str, to: str) -> None:
        if Path(source).parent != tmp_path:
            raise OSError(28, "No space left on device")
        rename(source, to)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"), replacing(target) as path:
        path.mkdir()
    assert [item.name for item in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "model").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    with replacing(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model").read_text() == "new"


def test_what_is_aside_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside = tmp_path / ".model.replaced"
    aside.write_text("old")

    def read_only(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "rename", read_only)
    assert restored(tmp_path / "model") == aside
    monkeypatch.undo()
    assert restored(tmp_path / "model").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_only_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead, starting, old = (tmp_path / f"{UNFINISHED}{name}" for name in ("dead", "starting", "old"))
    for folder in (dead, starting, old):
        folder.mkdir()
    (dead / LOCK).touch()
    os.utime(old, (0, 0))
    other = tmp_path / f".model{UNFINISHED}other"
    other.mkdir()
    with scratch(tmp_path) as alive:
        remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {alive, starting, other}
    assert set(tmp_path.iterdir()) == {starting, other}


def test_a_lock_is_had_once_also_where_its_file_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "folder" / LOCK
    first = take(path)
    assert first is not None
    assert take(path) is None
    path.unlink()  # as with its folder
    second = take(path)
    assert second is not None
    release(first)
    assert take(path) is None
    release(second)
    third = take(path)
    assert third is not None
    release(third)
    release(None)


def test_no_other_module_moves_or_stages_files() -> None:
    """Who writes goes through `replacing`; who has a folder for a while, through `scratch`."""
    package = Path(_files.__file__).parent
    allowed = {"_files.py", "_cache.py", "app/_session.py"}
    own_way = re.compile(r"os\.(replace|rename)\(|shutil\.(rmtree|move)\(|mkdtemp\(|mkstemp\(|TemporaryDirectory\(")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if own_way.search(line) and not line.lstrip().startswith((">>>", "..."))
    }
    datasets = {name for name in found if name.startswith("datasets/_synthetic")}  # scratch files of their own bundles
    assert found - datasets == allowed
