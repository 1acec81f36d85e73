"""Run the command ``stimage-sd`` by ``python -m stimage_sd``."""

from __future__ import annotations

from stimage_sd.cli import app

app(prog_name="stimage-sd")
