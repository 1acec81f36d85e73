"""Inventories of other packages' documentation, for builds without a network.

`inventories.toml` names the entries that these pages link to. Sphinx loads the published inventory of a package. Where
it cannot be reached, it loads the file that is written here, and the links are the same.
"""

from __future__ import annotations

import tomllib
import zlib
from pathlib import Path


def intersphinx_mapping(source: Path, folder: Path) -> dict[str, tuple[str, tuple[str | None, str]]]:
    """Write one inventory per package of a TOML file, and return the setting of `sphinx.ext.intersphinx`."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = tomllib.loads(source.read_text(encoding="utf-8"))
    mapping = {}
    for name, package in packages.items():
        path = folder / f"{name}.inv"
        path.write_bytes(inventory(name, package["entries"]))
        mapping[name] = (package["url"], (None, str(path)))
    return mapping


def names(source: Path) -> list[str]:
    """Return the names of all entries of the TOML file."""
    packages = tomllib.loads(source.read_text(encoding="utf-8"))
    return [name for package in packages.values() for pages in package["entries"].values() for name in pages]


def inventory(name: str, entries: dict[str, dict[str, str]]) -> bytes:
    """Return an inventory (version 2) of Python objects: by role, names and their pages."""
    header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    lines = [f"{entry} py:{role} 1 {page} -\n" for role, pages in entries.items() for entry, page in pages.items()]
    return header.encode() + zlib.compress("".join(lines).encode())
