"""The app as a visitor meets it: a server of its own and a headless browser; and files that are sent to it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import re
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

import cv2
import numpy as np
import psutil
import pytest
import spatialdata

from stimage_sd.app._example import SECTION

#: calculations on a shared machine take several times as long as on one's own, ms
LONG = 400_000
#: what must not lie on one another
KEY_ELEMENTS = (
    "h1", ".st-key-slide", ".st-key-model", ".st-key-about-model", ".st-key-outside", ".st-key-order", ".st-key-gene",
    ".st-key-tile", ".st-key-layer", ".st-key-gray", ".viewer .tools", ".viewer .map >> nth=0", ".viewer .map >> nth=1",
    ".st-key-n_samples", ".st-key-pictures", ".st-key-nuclei", ".st-key-downloads",
)  # fmt: skip
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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app without arguments; its example is made once."""
    pytest.importorskip("streamlit")
    with serving(tmp_path_factory.mktemp("app")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; tests that need it are skipped only where it or playwright is not installed.

    Its event loop would disturb tests of other modules.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@functools.cache
def tile_centers(section: Path) -> dict[int, tuple[float, float]]:
    """Centers of a section's kept tiles, H&E px, by number."""
    tiles = spatialdata.read_zarr(section).tables["tiles"]
    tiles = tiles[tiles.obs["keep"].to_numpy()]
    return dict(zip(tiles.obs["instance_id"], map(tuple, np.asarray(tiles.obsm["spatial"])), strict=True))


class Visitor:
    """A browser of one's own: no cookies or storage of any other."""

    def __init__(self, browser: Any, server: Any, *, width: int = 1280, height: int = 900) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.began = time.monotonic()
        self.page.goto(server.url)
        self.page.get_by_role("heading", name="Gene expression from H&E").wait_for(timeout=60_000)
        self.waited = time.monotonic() - self.began

    def choose(self, option: str) -> None:
        self.page.locator("label").filter(has_text=option).first.click()

    def see(self, text: str | re.Pattern[str]) -> Any:
        found = self.page.get_by_text(text).first
        found.wait_for(timeout=LONG)
        return found

    def until_done(self) -> None:
        """Wait until the server has nothing more to send."""
        self.page.wait_for_function("!document.querySelector('[data-testid=stStatusWidget]')", timeout=LONG)
        self.page.wait_for_timeout(600)

    def send(self, path: Path, *, label: str) -> None:
        # Streamlit 1.67 drops an upload that begins within ten milliseconds before a run of the page
        self.until_done()
        box = self.page.locator("[data-testid=stFileUploader]").filter(has_text=label)
        box.wait_for(timeout=LONG)
        box.locator("input[type=file]").set_input_files(path)

    def overlaps(self) -> list[tuple[str, str]]:
        """Pairs of key elements whose boxes lie on one another, and what hangs over the window's border."""
        boxes = {}
        for selector in KEY_ELEMENTS:
            found = self.page.locator(selector)
            if found.count():
                boxes[selector] = found.first.bounding_box()
        wrong = []
        for (first, one), (second, two) in itertools.combinations(boxes.items(), 2):
            width = min(one["x"] + one["width"], two["x"] + two["width"]) - max(one["x"], two["x"])
            height = min(one["y"] + one["height"], two["y"] + two["height"]) - max(one["y"], two["y"])
            if width > 1 and height > 1:
                wrong.append((first, second))
        limit = self.page.viewport_size["width"]
        return wrong + [(name, "window") for name, box in boxes.items() if box["x"] + box["width"] > limit + 1]

    # -- the viewer of the slide

    @property
    def view(self) -> tuple[float, float, float]:
        """The point in the middle of both maps, H&E px, and the screen pixels per H&E pixel."""
        state = self.page.locator(".viewer").evaluate("one => ({...one.dataset})")
        x, y = map(float, state["center"].split(","))
        return x, y, float(state["scale"])

    def until_drawn(self) -> None:
        """Wait until every piece of the slide that is in view is there."""
        self.page.locator(".viewer[data-complete=true]").wait_for(timeout=LONG)
        self.page.wait_for_timeout(100)

    def canvas(self, number: int = 0) -> Any:
        """The left or right map."""
        return self.page.locator(".viewer canvas").nth(number)

    def screen_of(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the H&E lies on a map, px from its corner."""
        # a map that is made anew has no box for a moment
        self.until(lambda: self.canvas().bounding_box() is not None)
        box, (middle_x, middle_y, scale) = self.canvas().bounding_box(), self.view
        return (x - middle_x) * scale + box["width"] / 2, (y - middle_y) * scale + box["height"] / 2

    def click_tile(self, section: Path, number: int, *, map_number: int = 0) -> None:
        """Click on a tile, by the section's own coordinates."""
        place = tile_centers(section)[number]
        self.until_drawn()
        x, y = self.screen_of(*place)
        self.canvas(map_number).click(position={"x": x, "y": y}, timeout=LONG)

    def colors(self, number: int = 0, *, side: int = 16) -> np.ndarray:
        """Colors around the middle of a map, ``(side, side, 3)``."""
        values = self.canvas(number).evaluate(
            "(one, side) => [...one.getContext('2d').getImageData("
            "(one.width - side) / 2, (one.height - side) / 2, side, side).data]",
            side,
        )
        return np.array(values, dtype=np.float64).reshape(side, side, 4)[..., :3]

    def pick(self, key: str, option: str) -> None:
        """Choose from a list."""
        # the list shows only what matches the typed text, and only its beginning
        self.page.locator(f".st-key-{key} input").fill(option)
        self.page.get_by_role("option", name=option).first.click()

    def until(self, condition: Callable[[], bool], *, seconds: float = 60) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            self.page.wait_for_timeout(100)


@pytest.fixture
def visit(request: pytest.FixtureRequest, browser: Any) -> Iterator[Callable[..., Visitor]]:
    """Give visitors of the server, or of another one; their browsers are closed at the end."""
    visitors: list[Visitor] = []

    def new(server: Server | None = None, **size: int) -> Visitor:
        visitors.append(Visitor(browser, server or request.getfixturevalue("server"), **size))
        return visitors[-1]

    yield new
    for visitor in visitors:
        visitor.context.close()


@pytest.fixture(scope="module")
def example(server: Server, browser: Any) -> Path:
    """The section of the bundled example, made by a first visit."""
    is_first = not list((server.cache / "app").glob("example-*"))
    visitor = Visitor(browser, server)
    # the page is there long before the section is
    assert visitor.waited < float(os.environ.get("STIMAGE_SD_TEST_FIRST_PAGE", "20"))
    visitor.see("Click on a tile to see")
    # seconds of one core, which hardly depend on other processes: measured 12, of which 5 before the server is up
    used = psutil.Process(server.process.pid).cpu_times()
    limit = float(os.environ.get("STIMAGE_SD_TEST_FIRST_MAP", "60"))
    assert not is_first or used.user + used.system < limit
    visitor.context.close()
    return next((server.cache / "app").glob("example-*")) / SECTION


@pytest.fixture(scope="module")
def pieces(example: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a visitor may upload: a tile, a larger piece of the example's H&E, and that piece in other colors."""
    folder = tmp_path_factory.mktemp("pieces")
    sdata = spatialdata.read_zarr(example)
    image = np.moveaxis(np.asarray(sdata.images["he"]["scale0"]["image"].data), 0, -1)
    x, y = (int(value) for value in sdata.tables["tiles"].obsm["spatial"].mean(axis=0))
    piece = image[y - 350 : y + 350, x - 350 : x + 350]
    parts = {"tile": image[y - 60 : y + 60, x - 60 : x + 60], "piece": piece, "strange": 255 - piece}
    paths = {name: folder / f"{name}.png" for name in parts}
    for name, part in parts.items():
        cv2.imwrite(str(paths[name]), part[..., ::-1])
    return paths
