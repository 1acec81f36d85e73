"""How the server is started: what it listens on and tells, and what it refuses to start with."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stimage_sd.app import _launch
from stimage_sd.cli import app

pytest.importorskip("streamlit")


def test_options_are_streamlits_and_keep_to_this_machine() -> None:
    from streamlit import config

    options = _launch.options("localhost", 8501, 200)
    known = config.get_config_options()
    assert set(options) <= set(known)
    assert options["server.address"] == "localhost"
    assert options["browser.gatherUsageStats"] is False
    assert options["server.enableXsrfProtection"] is True


@pytest.mark.parametrize(("option", "message"), [("--model", "No model at"), ("--data", "No zarr store at")])
def test_what_is_not_there_is_said_before_anything_is_served(tmp_path: Path, option: str, message: str) -> None:
    done = CliRunner().invoke(app, ["app", option, str(tmp_path / "nothing")])
    assert done.exit_code != 0
    assert message in (done.output + str(done.exception))


def test_something_else_is_no_section(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="Expected the zarr store of a section"):
        _launch.launch(model=None, data=tmp_path / "other")


def test_without_streamlit_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "stimage-sd\[app\]"'):
        _launch.launch(model=None, data=None)
