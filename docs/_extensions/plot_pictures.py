"""A picture on the page of every function of `pl`: `_static/pl/<function>.webp`, drawn by `tools/plot_pictures.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PREFIX = "stimage_sd.pl."


def add_picture(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Insert the picture below the summary line."""
    short = name.removeprefix(PREFIX)
    if what != "function" or not name.startswith(PREFIX):
        return
    path = f"_static/pl/{short}.webp"
    if not (Path(app.srcdir) / path).is_file():
        raise FileNotFoundError(f"No {path}. Draw it with `python tools/plot_pictures.py {short}`.")
    below = lines.index("") if "" in lines else len(lines)
    lines[below:below] = ["", f".. image:: /{path}", f"   :alt: What {short} draws", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", add_picture, priority=900)
    return {"parallel_read_safe": True}
