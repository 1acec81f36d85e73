"""Add the file name to errors of libraries that read files."""

from __future__ import annotations

import csv
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: errors that libraries raise on damaged files; errors of pandas, pyarrow, h5py and JSON are subclasses
_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, csv.Error, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
#: errors that already name the path
_OF_THE_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@contextmanager
def reading(path: str | Path, *, what: str) -> Iterator[None]:
    """Replace errors of a library that reads a file by a `ValueError` that names the file.

    - `path`: the file to read.
    - `what`: the expected content, such as "a matrix of counts".

    >>> with reading("a.csv", what="a number"):
    ...     float("x")
    Traceback (most recent call last):
    ValueError: Expected a number in a.csv, found a file that cannot be read (ValueError: could not convert string to \
    t: 'x'). It is truncated, damaged or something else: copy or export it again.
    """
    try:
        yield
    except _OF_THE_PATH:
        raise
    except _DAMAGE as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"Expected {what} in {path}, found a file that cannot be read ({type(error).__name__}: {error}). It is "
            "truncated, damaged or something else: copy or export it again."
        ) from error
