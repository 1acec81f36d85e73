"""Sphinx configuration; the tutorials' notebooks are run anew during the build."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import cv2
import nbformat
import numpy as np
import typer

import stimage_sd
from stimage_sd.cli import app

DOCS = Path(__file__).resolve().parent
INVENTORIES = DOCS / "inventories.toml"
sys.path.insert(0, str(DOCS / "_extensions"))

import local_inventories  # noqa: E402

project = "stimage-sd"
author = "The stimage-sd developers"
copyright = "2026, The stimage-sd developers"
version = release = stimage_sd.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",
    "foundation_table",
    "plot_pictures",
    "prose_returns",
    "public_names",
    "signature_table",
]
exclude_patterns = ["_build", "_extensions", "_templates", "**.ipynb_checkpoints", "jupyter_execute"]
suppress_warnings = ["mystnb.unknown_mime_type"]
nitpicky = True
nitpick_ignore = [
    # modules and calls of other packages that are named, and not linked to
    *(("py:obj", name) for name in ("dask.distributed", "jax.checkpoint", "torch.export")),
    # a new version of a package's documentation that lacks a name does not break the build
    *(("py:class", name) for name in local_inventories.names(INVENTORIES)),
]  # fmt: skip
nitpick_ignore_regex = [
    # types that are not public names; the text of the argument says what is accepted
    ("py:class", r"stimage_sd\.(\w+\.)*_\w+\..*"),
    # internal modules, which docstrings name for readers of the code
    ("py:(class|obj)", r"stimage_sd\.(baselines|contract|image|likelihood|nn|stats|stream)\b.*"),
]
default_role = "py:obj"

html_theme = "sphinx_book_theme"
html_title = "stimage-sd"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "collapse_navigation": True,
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
intersphinx_mapping = local_inventories.intersphinx_mapping(INVENTORIES, DOCS / "generated" / "inventories")
intersphinx_timeout = 10
# sites that refuse programs, and the address of the app on the reader's machine
linkcheck_ignore = [r"http://localhost.*", r"https://doi\.org/.*"]
linkcheck_timeout = 20
linkcheck_retries = 2

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"ArrayLike": "numpy.typing.ArrayLike", "Matrix": "numpy.typing.ArrayLike"}
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


def write_thumbnail(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write the first picture among the stored outputs of a notebook, as wide as a card."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output.data["image/jpeg"] for output in outputs if "image/jpeg" in output.get("data", {})]
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(pictures[0]), np.uint8), cv2.IMREAD_COLOR)
    scale = min(480 / pixels.shape[1], 1)
    cv2.imwrite(str(path), cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))


def copy_notebooks() -> None:
    """Lay each notebook of `tutorials/`, without its outputs, where MyST-NB runs it."""
    folder = DOCS / "tutorials"
    folder.mkdir(exist_ok=True)
    thumbnails = DOCS / "generated" / "thumbnails"
    thumbnails.mkdir(parents=True, exist_ok=True)
    for source in sorted((DOCS.parent / "tutorials").glob("[0-9]*.ipynb")):
        notebook = nbformat.read(source, as_version=4)
        write_thumbnail(notebook, thumbnails / f"{source.stem}.webp")
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
