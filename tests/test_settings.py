"""Settings: each changes what the package does, and refuses what it cannot mean."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import stimage_sd as sti
from stimage_sd import contract
from stimage_sd._cache import cache_dir, caching_in
from stimage_sd._progress import tqdm
from stimage_sd.stats import spatial
from stimage_sd.stream.driver import run_over_tiles

PACKAGE = Path(sti.__file__).parent


def test_the_cache_folder_comes_before_the_variable_and_after_a_visitors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STIMAGE_SD_CACHE", str(tmp_path / "variable"))
    with sti.settings.override(cache=tmp_path / "setting"):
        assert cache_dir() == tmp_path / "setting"
        with caching_in(tmp_path / "visitor"):
            assert cache_dir() == tmp_path / "visitor"
    assert cache_dir() == tmp_path / "variable"
    monkeypatch.chdir(tmp_path)
    with sti.settings.override(cache="here"):
        monkeypatch.chdir("/")
        assert cache_dir() == tmp_path / "here"


def test_settings_show_what_they_mean() -> None:
    with sti.settings.override(n_jobs=2, progress=False, cache=None):
        assert repr(sti.settings).startswith("Settings(cache=None, n_jobs=2, progress=False")
        assert ">no bars<" in sti.settings._repr_html_()
        assert sti.settings.facts()["n_jobs"] == "2"


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_threads_of_scores(n_jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial, "FEW", 0)
    together = threading.Barrier(n_jobs)
    used = set()

    def work(start: int, stop: int) -> None:
        together.wait(60)
        used.add(threading.get_ident())

    with sti.settings.override(n_jobs=n_jobs):
        spatial.each_block((10, 4), work, width=1)
    assert len(used) == n_jobs
    assert (threading.get_ident() in used) == (n_jobs == 1)


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_threads_of_tiles(n_jobs: int, counted_image: Callable) -> None:
    image, used = counted_image(300, 300, chunk=100), set()
    centers = np.random.default_rng(0).uniform(40, 260, (30, 2))
    together = threading.Barrier(n_jobs)

    def where(tiles: np.ndarray) -> np.ndarray:
        together.wait(60)
        used.add(threading.get_ident())
        return tiles.mean(axis=(1, 2))

    with sti.settings.override(n_jobs=n_jobs):
        run_over_tiles(image.pyramid, centers, where, sides=[20.0], target=20, key="where", shape=(3,), batch_size=5)
    assert len(used) == n_jobs


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bars(progress: bool) -> None:
    written = io.StringIO()
    with sti.settings.override(progress=progress):
        assert list(tqdm(range(3), file=written, disable=False)) == [0, 1, 2]
    assert ("3/3" in written.getvalue()) == progress


def test_every_bar_obeys_the_setting() -> None:
    of_tqdm = re.compile(r"^\s*(from|import) tqdm", re.MULTILINE)
    assert [path.name for path in PACKAGE.rglob("*.py") if of_tqdm.search(path.read_text())] == ["_progress.py"]


def test_verbosity(make_spots: Callable, caplog: pytest.LogCaptureFixture) -> None:
    section = make_spots(n_side=4)
    said = {}
    for verbosity in ("warning", "info", "debug"):
        caplog.clear()
        with sti.settings.override(verbosity=verbosity):
            contract.record(section, "tl.cluster", resolution=0.5)
        said[verbosity] = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    step = f"{contract.sample(section)}: tl.cluster"
    assert said["warning"] == []
    assert said["info"] == [("stimage_sd", "INFO", step)]
    assert said["debug"] == [*said["info"], ("stimage_sd", "DEBUG", f"{step} with {{'resolution': 0.5}}")]


@pytest.mark.parametrize("own", [False, True])
def test_messages_are_printed_once(own: bool) -> None:
    code = "import logging, stimage_sd as sti; sti.settings.verbosity = 'info';"
    code += "logging.basicConfig(format='mine: %(message)s');" if own else ""
    code += "logging.getLogger('stimage_sd').info('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "mine: done\n" if own else "stimage_sd: done\n")


def test_bars_nest_and_messages_stay_out_of_them() -> None:
    code = """
from stimage_sd import settings
from stimage_sd._progress import tqdm
from stimage_sd._settings import logger
settings.verbosity = "info"
with tqdm(total=1, desc="outer", mininterval=0) as outer:
    with tqdm(total=1, desc="inner", mininterval=0) as inner:
        inner.update()
        logger.info("between")
    outer.update()
print(outer.leave, inner.leave)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "True False\n"
    lines = re.split(r"[\r\n]", done.stderr)
    assert "stimage_sd: between" in [line.replace("\x1b[A", "") for line in lines]
    last = [line for line in lines if line.strip()][-1]
    assert last.startswith("outer: 100%")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`n_jobs` to be a positive number of threads or None, found 0"):
        sti.settings.n_jobs = 0
    with pytest.raises(ValueError, match="`progress` to be True or False, found 'no'"):
        sti.settings.progress = "no"
    with pytest.raises(ValueError, match=r"`verbosity` to be one of .*'info'.* found 'loud'"):
        sti.settings.verbosity = "loud"
    with pytest.raises(AttributeError, match="settings cache, n_jobs, progress, verbosity, found 'n_job'"):
        sti.settings.n_job = 2
    with pytest.raises(ValueError, match="found 'loud'"), sti.settings.override(n_jobs=2, verbosity="loud"):
        pass
    assert sti.settings == type(sti.settings)()
