"""Zarr stores of sections: read with a clear error, written beside and moved when complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import spatialdata
from spatialdata import SpatialData


def is_store(path: Path) -> bool:
    """Tell whether a zarr group lies at a path, of either format of zarr."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def check_section(path: Path) -> None:
    """Raise `FileNotFoundError` or `ValueError` where no zarr store of a section lies at a path."""
    if not path.exists():
        raise FileNotFoundError(f"No zarr store at {path}.")
    if not is_store(path) or not _is_spatialdata(path):
        raise ValueError(
            f"Expected the zarr store of a section at {path}, found something else. Read the section with one of the "
            "readers of `stimage_sd.io` and write it with `sdata.write(...)`."
        )


def read_section(path: Path) -> SpatialData:
    """Read a section lazily from its zarr store.

    Parameters
    ----------
    path
        The store's folder.

    Returns
    -------
    The section.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it is no store of `spatialdata`, or is damaged.

    Examples
    --------
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


def _is_spatialdata(path: Path) -> bool:
    for name in ("zarr.json", ".zattrs"):
        if (path / name).is_file():
            try:
                content = json.loads((path / name).read_text())
            except json.JSONDecodeError:
                continue
            if "spatialdata_attrs" in content.get("attributes", content):
                return True
    return False


def check_free(target: Path, *, overwrite: bool) -> None:
    """Raise `FileExistsError` where something lies at a path that is not to be replaced.

    Parameters
    ----------
    target
        Where something is to be written.
    overwrite
        Whether a file, or a zarr store, that is there may be replaced; another folder never is.
    """
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists. Choose another place, or pass --overwrite to replace it.")
    if target.is_dir() and any(target.iterdir()) and not is_store(target) and not (target / "config.json").is_file():
        raise FileExistsError(f"{target} is a folder but no zarr store or model, so it is not replaced.")


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a path to write to, beside `target`, and move what is there to `target` when all went well.

    Parameters
    ----------
    target
        Where a file or folder is to be in the end.
    overwrite
        Whether what is there may be replaced.

    Yields
    ------
    A path in a new folder on the same file system, with the name of `target`. On an error, or an interruption,
    that folder is deleted and `target` is as it was.
    """
    check_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder / target.name
        move(folder / target.name, target, aside=folder / "replaced")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move(source: Path, target: Path, *, aside: Path) -> None:
    """Move a file or folder to where another may be, which is put aside first and back again on failure."""
    if target.exists():
        os.replace(target, aside)
    try:
        os.replace(source, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise


def write_changed(sdata: SpatialData, *, source: Path, target: Path, changed: Iterable[str], overwrite: bool) -> None:
    """Write a section that was read from one store to another place, or back to its own.

    The store is copied file by file, nothing decoded; into the copy go the elements that changed, by
    SpatialData's incremental writing, and the attributes; the complete copy is then moved to its place.

    Parameters
    ----------
    sdata
        The section, read from `source`.
    source
        Its store.
    target
        Where to; may be `source`.
    changed
        Names of the elements to write; the others are as they are in the store. Those that the section lacks are gone.
    overwrite
        Whether a store at `target` may be replaced.
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
