"""Whom the app serves: foreign names and pages are turned away, over HTTP and WebSocket; what a signal leaves."""

from __future__ import annotations

import base64
import http.client
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")

from stimage_sd.app._guard import Guard

pytestmark = pytest.mark.slow


async def nothing(*_: object) -> None: ...


@pytest.mark.parametrize(
    ("address", "host", "allowed"),
    [
        ("localhost", "localhost:8501", True),
        ("localhost", "LOCALHOST.", True),
        ("localhost", "127.0.0.1:8501", True),
        ("localhost", "[::1]:8501", True),
        ("localhost", "proxy.example", True),
        ("localhost", "evil.example:8501", False),
        ("localhost", "localhost.evil.example", False),
        ("localhost", "10.0.0.7:8501", False),
        ("localhost", "localhost@evil.example", False),
        ("localhost", "localhost/evil", False),
        ("localhost", "localhost:port", False),
        ("localhost", "", False),
        ("10.0.0.7", "10.0.0.7:8501", True),
        ("lab.example", "lab.example", True),
        # whoever sends an address has looked up no name, so that none was rebound
        ("0.0.0.0", "10.0.0.7:8501", True),
        ("::", "[fd00::1]:8501", True),
        ("0.0.0.0", socket.gethostname(), True),
        ("0.0.0.0", "evil.example", False),
    ],
)
def test_hosts(address: str, host: str, allowed: bool) -> None:
    assert Guard(nothing, address=address, port=8501, names=("proxy.example",)).allows_host(host) is allowed


def ask(server: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, str]:
    """Send one request as it is; return status, body and cookies."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers.get("Set-Cookie", "")


def shake_hands(server: Any, *, host: str, origin: str) -> int:
    """Ask for the page's WebSocket as a browser does; return the status."""
    key = base64.b64encode(os.urandom(16)).decode()
    status, _, _ = ask(
        server, "/_stcore/stream", Host=host, Origin=origin, Upgrade="websocket", Connection="Upgrade",
        **{"Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13", "Sec-WebSocket-Protocol": "streamlit"},
    )  # fmt: skip
    return status


@pytest.fixture
def pair(tmp_path: Path, serve: Callable[..., Any]) -> Callable[[], Any]:
    """Start servers that share a temporary folder."""
    return lambda: serve(tmp_path)


def folders(server: Any) -> list[Path]:
    return sorted(server.temporary.glob("stimage-sd-app-*"))


@pytest.mark.slow
def test_a_foreign_name_or_page_is_turned_away_and_no_signal_leaves_uploads(pair: Callable[[], Any]) -> None:
    with pair() as server:
        own, foreign = server.url.removeprefix("http://"), "rebound.example:8501"
        for path in ("/", "/_stcore/health", "/_stcore/host-config", "/media/picture.png"):
            status, body, _ = ask(server, path, Host=foreign)
            assert (status, b"--allow-host" in body) == (400, True)
        status, page, cookie = ask(server, "/", Host=own)
        assert (status, b"<html" in page) == (200, True)
        assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
        # what is served as a file is for those who opened the page
        assert ask(server, "/media/none.png")[0] == 403
        assert ask(server, "/slides/none/0/0_0.jpg")[0] == 403
        assert ask(server, "/slides/none/0/0_0.jpg", Cookie=cookie.partition(";")[0])[0] == 404
        assert ask(server, "/media/none.png", Cookie="stimage-sd-1=guess")[0] == 403
        assert ask(server, "/media/none.png", Cookie=cookie.partition(";")[0])[0] == 404
        assert ask(server, "/_stcore/host-config", Origin="http://evil.example")[0] == 403
        assert ask(server, "/_stcore/upload_file/a/b", "PUT", Origin="null")[0] == 403
        assert shake_hands(server, host=own, origin=server.url) == 101
        assert shake_hands(server, host=foreign, origin=f"http://{foreign}") == 403
        assert shake_hands(server, host=own, origin="http://evil.example") == 403
        killed = folders(server)
        assert len(killed) == 1
        (killed[0] / "session-1").mkdir()
        server.process.kill()
        server.process.wait(120)
    with pair() as server:
        assert set(folders(server)).isdisjoint(killed)
        upload = folders(server)[0] / "session-2" / "image.tif"
        upload.parent.mkdir()
        upload.touch()
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(120) == 128 + signal.SIGTERM
        assert folders(server) == []
