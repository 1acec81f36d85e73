"""Text tables: gzipped or plain, in UTF-8, UTF-16 or Windows-1252."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
from pathlib import Path
from typing import BinaryIO, TypedDict, cast

_GZIP = b"\x1f\x8b"
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WITH_COMMA = re.compile(r"\s*-?\d+,\d+\s*")
#: bytes decoded per block
_BLOCK = 1 << 20
#: longest allowed first line, characters; the header of a table of all genes has less than one million
MOST_IN_A_LINE = 1 << 24


def open_text(path: Path) -> io.TextIOWrapper:
    """Open a file as text, without its byte order mark. Gzip is recognized by the first bytes."""
    text = io.TextIOWrapper(_open(path), encoding=encoding_of(path), newline="")
    if len(text.readline(MOST_IN_A_LINE + 1)) > MOST_IN_A_LINE:
        text.close()
        raise ValueError(
            f"Expected a table in {path}, found a first line of more than {MOST_IN_A_LINE:,} characters. It is damaged "
            "or something else: copy or export it again."
        )
    text.seek(0)
    return text


class Punctuation(TypedDict):
    """Arguments of `pandas.read_csv`: field separator and decimal mark."""

    sep: str
    decimal: str


def punctuation(lines: io.TextIOWrapper, usual: str) -> Punctuation:
    """Return the field separator and decimal mark of a table, and rewind the file.

    Both depend on the language of the program that wrote the file. The usual separator is used unless another one gives
    more columns.
    """
    header, row = lines.readline(), lines.readline()
    lines.seek(0)
    separator = max((usual, ";", "\t", ","), key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    if separator == ",":
        return {"sep": separator, "decimal": "."}
    fields = next(csv.reader([row], delimiter=separator), [])
    return {"sep": separator, "decimal": "," if any(map(_WITH_COMMA.fullmatch, fields)) else "."}


def encoding_of(path: Path) -> str:
    """Return the encoding of a file, from its byte order mark, else UTF-8 if it is valid, else Windows-1252."""
    with _open(path) as file:
        block = file.read(_BLOCK)
        for mark, encoding in _MARKS.items():
            if block.startswith(mark):
                return encoding
        if block[1:2] == b"\0" or block[:1] == b"\0":
            return "utf-16-le" if block[1:2] == b"\0" else "utf-16-be"
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while block:
                decoder.decode(block)
                block = file.read(_BLOCK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8"


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP
    return cast(BinaryIO, gzip.open(path) if compressed else path.open("rb"))
