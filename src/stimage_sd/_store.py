"""Read zarr stores of sections with clear errors, and write them atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import spatialdata
from spatialdata import SpatialData

from stimage_sd._files import replacing, restored


def is_store(path: Path) -> bool:
    """Return whether a path holds a zarr group, in zarr format 2 or 3."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def check_section(path: Path) -> None:
    """Raise `FileNotFoundError` or `ValueError` if a path does not hold the zarr store of a section."""
    if not restored(path).exists():
        raise FileNotFoundError(f"No zarr store at {path}.")
    if not is_store(path) or not is_spatialdata(path):
        raise ValueError(
            f"Expected the zarr store of a section at {path}, found something else. Read the section with one of the "
            "readers of `stimage_sd.io` and write it with `sdata.write(...)`."
        )


def read_section(path: Path) -> SpatialData:
    """Read a section lazily from its zarr store.

    - `path`: the store's folder.
    - returns: the section.

    >>> read_section(Path("no-such.zarr"))
    Traceback (most recent call last):
    FileNotFoundError: No zarr store at no-such.zarr.
    """
    check_section(path)
    try:
        return spatialdata.read_zarr(path)
    except (ValueError, KeyError, OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The zarr store at {path} cannot be read ({type(error).__name__}: {error}). Write it again."
        ) from error


def is_spatialdata(path: Path) -> bool:
    """Return whether the attributes of a zarr store are those of a SpatialData object."""
    return "spatialdata_attrs" in attributes_of(path)


def attributes_of(path: Path) -> dict[str, Any]:
    """Return the attributes of a zarr store, an empty dictionary if they cannot be read."""
    attributes: dict[str, Any] = {}
    for name in ("zarr.json", ".zattrs"):
        if (path / name).is_file():
            try:
                content = json.loads((path / name).read_text())
            except ValueError:  # JSON or encoding error
                continue
            stated = content.get("attributes") or content if isinstance(content, dict) else None
            attributes |= stated if isinstance(stated, dict) else {}
    return attributes


def check_free(target: Path, *, overwrite: bool) -> None:
    """Raise `FileExistsError` if a path holds something that must not be replaced.

    - `target`: the path to write to.
    - `overwrite`: whether an existing file, zarr store or model may be replaced. Other folders are never replaced.
    """
    if not restored(target).exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists. Choose another place, or pass --overwrite to replace it.")
    if target.is_dir() and any(target.iterdir()) and not is_store(target) and not (target / "config.json").is_file():
        raise FileExistsError(f"{target} is a folder but no zarr store or model, so it is not replaced.")


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write to, as `_files.replacing`, after a check that `target` may be replaced.

    - `target`: final path of the file or folder.
    - `overwrite`: whether existing content may be replaced.
    - yields: a path with the name of `target`, in a new folder on the same file system.
    """
    check_free(target, overwrite=overwrite)
    with replacing(target) as path:
        yield path


def write_changed(sdata: SpatialData, *, source: Path, target: Path, changed: Iterable[str], overwrite: bool) -> None:
    """Write the changed elements of a section into a copy of its store, or back to its own store.

    The store is copied file by file, without decoding. The changed elements and the attributes are written into the
    copy. The complete copy is then moved to `target`.

    - `sdata`: the section, read from `source`.
    - `source`: store of the section.
    - `target`: path of the new store, which may be `source`.
    - `changed`: names of the elements to write. Names that the section lacks are deleted. Other elements stay as in the
      store.
    - `overwrite`: whether a store at `target` may be replaced.
    """
    with staged(target, overwrite=overwrite) as path:
        shutil.copytree(source, path)
        copy = spatialdata.read_zarr(path)
        known = {Path(name).name for name in copy.elements_paths_on_disk()}
        for name in changed:
            if name in copy:
                del copy[name]
            if name in known:
                copy.delete_element_from_disk(name)
        for name in changed:
            if name not in sdata:
                continue
            copy[name] = sdata[name]
            copy.write_element(name)
        copy.attrs = sdata.attrs
        copy.write_attrs()
        copy.write_consolidated_metadata()
