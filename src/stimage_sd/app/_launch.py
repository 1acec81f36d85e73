"""Starting the server: what it is configured with, and its temporary folder, which does not outlive it."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from stimage_sd.app._settings import UPLOAD_MB, Settings, choose

PAGE = Path(__file__).with_name("page.py")
PREFIX = "stimage-sd-app-"


def options(address: str, port: int, upload_mb: int) -> dict[str, str]:
    """Return Streamlit's options; given on its command line they win over any configuration file of the user's.

    Parameters
    ----------
    address, port
        Where the server listens.
    upload_mb
        Largest file that may be uploaded, MB.
    """
    return {
        "server.address": address,
        "server.port": str(port),
        # no browser is opened, and no one is asked for a mail address on the terminal
        "server.headless": "true",
        "server.maxUploadSize": str(upload_mb),
        "server.enableXsrfProtection": "true",
        "server.enableCORS": "true",
        "server.enableStaticServing": "false",
        "server.fileWatcherType": "none",
        # a session whose browser is gone is ended, and its files deleted, after so many seconds
        "server.disconnectedSessionTTL": "60",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        # where something unforeseen goes wrong, visitors are not shown the server's paths
        "client.showErrorDetails": "none",
        "global.developmentMode": "false",
        "runner.magicEnabled": "false",
        # its greeting asks an outside service for the machine's address
        "logger.hideWelcomeMessage": "true",
    }


def check_extra() -> None:
    """Raise `ValueError`, naming the extra, where Streamlit is not installed."""
    if find_spec("streamlit") is None:
        raise ValueError('The app needs streamlit, which is not installed. Run `pip install "stimage-sd[app]"`.')


def launch(
    *, model: Path | None, data: Path | None, address: str = "localhost", port: int = 8501, upload_mb: int = UPLOAD_MB
) -> None:
    """Serve the app until it is stopped.

    Parameters
    ----------
    model
        Model that visitors may choose.
    data
        Zarr store of a section that they may choose; it is only read.
    address, port
        Where the server listens; by default no other machine reaches it.
    upload_mb
        Largest file that may be uploaded, MB.

    Raises
    ------
    FileNotFoundError
        If there is no such model or store.
    ValueError
        If Streamlit is not installed, or the store is none.
    """
    check_extra()
    if model is not None and not model.exists():
        raise FileNotFoundError(f"No model at {model}.")
    if data is not None:
        from stimage_sd._store import check_section

        check_section(data)
    from streamlit.web import cli

    # loaded before the server listens, so that the first visitor does not wait for it
    import_module("stimage_sd.app._figures")
    # nothing leaves the machine: weights that are not here are not looked for on the hub
    os.environ["HF_HUB_OFFLINE"] = "1"
    root = Path(tempfile.mkdtemp(prefix=PREFIX))
    choose(Settings(root=root, model=model, data=data, upload_mb=upload_mb))
    flags = [f"--{name}={value}" for name, value in options(address, port, upload_mb).items()]
    try:
        cli.main(["run", str(PAGE), *flags], standalone_mode=False)
    finally:
        shutil.rmtree(root, ignore_errors=True)
