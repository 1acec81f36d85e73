"""The app as a visitor meets it: a server of its own and a headless browser; and files that are sent to it."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))), None)
#: nothing but the page is to be asked for
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
)  # fmt: skip


def _write_flat_png(path: Path, width: int, height: int) -> Path:
    """Write a PNG of one color, row by row: of 30,000 x 30,000 px it has a few megabytes and needs no memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\x00" + bytes((200, 120, 180)) * width
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
        for _ in range(height):
            packed = packer.compress(row)
            if packed:
                file.write(chunk(b"IDAT", packed))
        file.write(chunk(b"IDAT", packer.flush()) + chunk(b"IEND", b""))
    return path


@pytest.fixture(scope="session")
def flat_png() -> Callable[[Path, int, int], Path]:
    """`_write_flat_png`."""
    return _write_flat_png


class Trap:
    """What a pickle could do when it is opened: here it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture
def pickled_model(tmp_path: Path) -> Iterator[Path]:
    """A pickle named as a model; that it was opened is found out at the end."""
    sprung = tmp_path / "sprung"
    path = tmp_path / "evil.stimage"
    path.write_bytes(pickle.dumps(Trap(sprung)))
    yield path
    assert not sprung.exists()


@dataclass
class Server:
    """A running app.

    Attributes
    ----------
    url
        Where.
    temporary
        The folder that it makes its temporary folder in.
    cache
        Its cache folder.
    process
        Its process.
    """

    url: str
    temporary: Path
    cache: Path
    process: subprocess.Popen[bytes]

    def stop(self) -> int:
        """Ask it to stop, as Ctrl-C does, and wait."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    """Start the app as a user does, in a process of its own, and stop it at the end."""
    temporary, cache = folder / "temporary", folder / "cache"
    temporary.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "TMPDIR": str(temporary), "STIMAGE_SD_CACHE": str(cache), "HOME": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY / "src"), environment.get("PYTHONPATH", "")])
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "stimage_sd", "app", "--port", str(port), *arguments],
            env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
            # tests may run where a terminal's end is ignored, as under nohup
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )  # fmt: skip
        server = Server(f"http://localhost:{port}", temporary, cache, process)
        try:
            _wait_for(server, folder / "server.log")
            yield server
        finally:
            if process.poll() is None:
                server.stop()


def _wait_for(server: Server, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/_stcore/health", timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"The app did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """`serving`, for tests that stop their own."""
    pytest.importorskip("streamlit")
    return serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app without arguments, for the tests of a module; its example is made once."""
    pytest.importorskip("streamlit")
    with serving(tmp_path_factory.mktemp("app")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; tests that need it are skipped only where it or playwright is not installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()
