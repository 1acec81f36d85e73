"""Sessions: a folder each, results that are theirs alone, and a cache that is nobody else's."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from stimage_sd._cache import cache_dir
from stimage_sd.app._session import Session, shared_once, waiting_for
from stimage_sd.app._settings import Settings, choose, chosen


def test_a_session_is_a_folder_that_is_gone_when_it_ends(tmp_path: Path) -> None:
    one, other = Session.open(tmp_path), Session.open(tmp_path)
    assert one.folder != other.folder
    assert one.folder.stat().st_mode & 0o077 == 0
    upload = one.new_folder()
    (upload / "image.png").write_bytes(b"...")
    one.close()
    assert not upload.exists()
    assert other.folder.is_dir()


def test_results_are_computed_once_and_errors_again(tmp_path: Path) -> None:
    session, calls = Session.open(tmp_path), []

    def compute() -> int:
        calls.append(None)
        if len(calls) == 1:
            raise ValueError("not yet")
        return len(calls)

    with pytest.raises(ValueError, match="not yet"):
        session.once("key", compute)
    assert [session.once("key", compute) for _ in range(3)] == [2, 2, 2]
    for number in range(60):
        session.once(number, lambda number=number: number)
    assert len(session.results) == 40
    assert "key" not in session.results  # the oldest go first


def test_an_upload_outlives_any_number_of_explanations(tmp_path: Path) -> None:
    session, stored = Session.open(tmp_path), []
    for number in range(100):
        assert session.once(("image", "a"), lambda: stored.append(None)) is None
        session.once(("explanation", number), lambda number=number: number)
    assert stored == [None]
    for number in range(100, 200):
        session.once(("explanation", number), lambda number=number: number)
        session.once(("explanation", 99), lambda: -1)
    assert ("image", "a") in session.results
    # what was asked for last stays
    assert session.results["explanation", 99] == 99
    assert len(session.results) == 41


def test_what_is_cached_in_a_calculation_lies_in_the_sessions_folder(tmp_path: Path) -> None:
    session, usual, seen = Session.open(tmp_path, "me"), cache_dir(), []
    with session.calculating("tile 3", seen.append):
        assert cache_dir() == session.folder / "cache"
        assert waiting_for("me").startswith("Waiting for your earlier calculation (tile 3), 0 s")
        # what another visitor looks at is private
        assert waiting_for("you").startswith("Waiting for another visitor's calculation, 0 s")
        # another visitor's thread has its own
        thread = threading.Thread(target=lambda: seen.append(cache_dir()))
        thread.start()
        thread.join()
    assert seen == [usual]
    assert cache_dir() == usual
    assert waiting_for("me") == ""


def test_what_all_see_is_computed_by_one(tmp_path: Path) -> None:
    calls = []
    began = threading.Event()

    def compute() -> str:
        calls.append(None)
        began.wait(5)
        return "done"

    options = {"visitor": "me", "name": "all", "say": print}
    threads = [threading.Thread(target=shared_once, args=(tmp_path, compute), kwargs=options) for _ in range(4)]
    for thread in threads:
        thread.start()
    began.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert shared_once(tmp_path, compute, **options) == "done"


def test_a_run_of_the_page_that_was_replaced_still_leaves_its_result(tmp_path: Path) -> None:
    session, said, calls = Session.open(tmp_path), [], []
    began, go_on = threading.Event(), threading.Event()

    def compute() -> str:
        calls.append(None)
        began.set()
        go_on.wait(20)
        return "scores"

    def run() -> None:
        session.calculated("tile", compute, name="tile 3", say=print)

    first = threading.Thread(target=run)
    first.start()
    began.wait(20)

    def say(words: str) -> None:
        said.append(words)
        go_on.set()

    # the same tile again, as after a click on it: the visitor waits for the first run, and takes its result
    assert session.calculated("tile", compute, name="tile 3", say=say) == "scores"
    first.join()
    assert len(calls) == 1
    assert said[0].startswith("Waiting for your earlier calculation (tile 3), ")
    # the page no longer says so when the wait is over
    assert said[-1] == ""


def test_a_visitor_who_went_on_stops_waiting(tmp_path: Path) -> None:
    session, calls = Session.open(tmp_path), []

    class Replaced(Exception):
        """What Streamlit raises in a run that a later click has replaced."""

    def say(_: str) -> None:
        raise Replaced("by a later click")

    def run() -> None:
        with pytest.raises(Replaced, match="by a later click"):
            session.calculated("tile 4", lambda: calls.append(None), name="tile 4", say=say)
        calls.append("stopped")

    with session.calculating("tile 3", print):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    assert calls == ["stopped"]
    # the lock is free again
    assert session.calculated("tile 4", lambda: 1, name="tile 4", say=say) == 1


def test_the_page_is_served_by_the_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stimage_sd.app._settings._chosen", [])
    with pytest.raises(RuntimeError, match="Start the app with `stimage-sd app`"):
        chosen()
    choose(Settings(root=tmp_path))
    assert chosen().upload_mb == 200
