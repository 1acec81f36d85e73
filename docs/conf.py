"""Sphinx configuration; the tutorials' notebooks are run anew during the build."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import typer

import stimage_sd
from stimage_sd.cli import app

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_extensions"))

project = "stimage-sd"
author = "The stimage-sd developers"
copyright = "2026, The stimage-sd developers"
version = release = stimage_sd.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
    "prose_returns",
    "signature_table",
]
exclude_patterns = ["_build", "_extensions", "**.ipynb_checkpoints", "jupyter_execute"]
suppress_warnings = ["mystnb.unknown_mime_type"]
nitpicky = False
default_role = "py:obj"

html_theme = "furo"
html_title = f"stimage-sd {release}"
html_static_path = ["_static"]

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"


def copy_notebooks() -> None:
    """Lay each notebook of `tutorials/`, without its outputs, where MyST-NB runs it."""
    folder = DOCS / "tutorials"
    folder.mkdir(exist_ok=True)
    for source in sorted((DOCS.parent / "tutorials").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / source.name)


def write_help() -> None:
    """Write what each command says to `--help`, without colors and boxes, for the command line page."""
    folder = DOCS / "generated" / "help"
    folder.mkdir(parents=True, exist_ok=True)
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        command.rich_markup_mode = None
        context = typer.Context(command, info_name=f"stimage-sd {name}", terminal_width=100, max_content_width=100)
        (folder / f"{name}.txt").write_text(command.get_help(context) + "\n", encoding="utf-8")


# The tutorial runs in a folder of its own, so the data beside the repository is named in full.
beside = DOCS.parents[1] / "shared" / "data"
if "STIMAGE_SD_DATA" not in os.environ and beside.is_dir():
    os.environ["STIMAGE_SD_DATA"] = str(beside)
copy_notebooks()
write_help()
