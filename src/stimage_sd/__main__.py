"""``python -m stimage_sd`` is the command ``stimage-sd``."""

from __future__ import annotations

from stimage_sd.cli import app

app(prog_name="stimage-sd")
