"""Start the server with its options and a temporary folder that is deleted at the end."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stimage_sd._files import scratch
from stimage_sd.app._guard import Guard
from stimage_sd.app._settings import UPLOAD_MB, Settings, choose
from stimage_sd.app._slides import PIECE, serve_piece

PAGE = Path(__file__).with_name("page.py")
PREFIX = "stimage-sd-app-"


def options(address: str, port: int, upload_mb: int) -> dict[str, Any]:
    """Return Streamlit's options, which override the user's configuration files.

    Parameters
    ----------
    address, port
        Address and port where the server listens.
    upload_mb
        Largest size of an uploaded file, MB.
    """
    return {
        "server.address": address,
        "server.port": port,
        "server.baseUrlPath": "",
        # do not open a browser or ask for a mail address on the terminal
        "server.headless": True,
        "server.maxUploadSize": upload_mb,
        "server.enableXsrfProtection": True,
        "server.enableCORS": True,
        "server.enableStaticServing": False,
        "server.fileWatcherType": "none",
        # seconds after which a disconnected session ends and its files are deleted
        "server.disconnectedSessionTTL": 60,
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "viewer",
        # do not show the server's paths to visitors in unexpected errors
        "client.showErrorDetails": "none",
        "global.developmentMode": False,
        "runner.magicEnabled": False,
        # the welcome message asks an external service for the server's address
        "logger.hideWelcomeMessage": True,
    }


def check_extra() -> None:
    """Raise `ValueError` with the name of the extra if Streamlit is not installed."""
    if find_spec("streamlit") is None:
        raise ValueError('The app needs streamlit, which is not installed. Run `pip install "stimage-sd[app]"`.')


def launch(
    *,
    model: Path | None,
    data: Path | None,
    address: str = "localhost",
    port: int = 8501,
    upload_mb: int = UPLOAD_MB,
    allow_hosts: tuple[str, ...] = (),
) -> None:
    """Serve the app until it is stopped.

    Parameters
    ----------
    model
        Model that visitors can choose.
    data
        Zarr store of a section that visitors can choose. The store is only read.
    address, port
        Address and port where the server listens. By default other computers cannot reach it.
    upload_mb
        Largest size of an uploaded file, MB.
    allow_hosts
        Host names of the app besides ``localhost`` and `address`, such as that of a proxy.

    Raises
    ------
    FileNotFoundError
        If the model or the store does not exist.
    ValueError
        If Streamlit is not installed, or the store is not a section.
    """
    check_extra()
    if model is not None and not model.exists():
        raise FileNotFoundError(f"No model at {model}.")
    if data is not None:
        from stimage_sd._store import check_section

        check_section(data)
    import streamlit
    from starlette.middleware import Middleware
    from starlette.routing import Route

    # import before the server listens, so that the first visitor does not wait
    import_module("stimage_sd.app._results")
    # and the rest while the first visitor reads the page
    threading.Thread(target=_import_early, daemon=True).start()
    # stay offline: do not look for missing weights on the hub
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Streamlit adds the folder of the started script, here the page, to the module path
    sys.argv = [str(PAGE)]
    guard = Middleware(Guard, address=address, port=port, names=allow_hosts)
    # `scratch` also deletes the uploads of an earlier server that was killed
    with suppress(KeyboardInterrupt), _signals_end(), scratch(Path(tempfile.gettempdir()), prefix=PREFIX) as root:
        choose(Settings(root=root, model=model, data=data, upload_mb=upload_mb))
        app = streamlit.App(PAGE, middleware=[guard], routes=[Route(PIECE, serve_piece)])
        app.run(config=options(address, port, upload_mb))


def _import_early() -> None:
    """Import what a prediction needs."""
    for name in (
        "pp._prepare",
        "datasets._synthetic_visium",
        "io._visium",
        "pp._embed",
        "tl._predict.predict",
        "tl._score.evaluate",
    ):
        import_module(f"stimage_sd.{name}")


@contextmanager
def _signals_end() -> Iterator[None]:
    """Turn terminating signals into `SystemExit`, so that the cleanup runs."""

    def leave(signal_number: int, _: object) -> None:
        raise SystemExit(128 + signal_number)

    def stop(signal_number: int, _: object) -> None:
        # the server handles SIGTERM, closes its connections and passes the signal on to `leave`
        signal.raise_signal(signal.SIGTERM)

    handlers = {"SIGTERM": leave, "SIGHUP": stop, "SIGQUIT": stop}
    known = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    # a process started with nohup keeps ignoring SIGHUP
    before = {one: old for one in known if (old := signal.getsignal(one)) is not signal.SIG_IGN}
    for one in before:
        signal.signal(one, known[one])
    try:
        yield
    finally:
        for one, old in before.items():
            signal.signal(one, old)
