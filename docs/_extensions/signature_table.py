"""The directive `signature-table`: one row per public function of a subpackage, from the functions themselves."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from markdown_table import MarkdownTable
from sphinx.application import Sphinx


class Row(NamedTuple):
    """A function's name, its positional arguments, and its keyword-only options."""

    name: str
    positional: list[str]
    options: list[str]


def public_functions(module: str) -> dict[str, Callable[..., Any]]:
    """Return the public functions of `stimage_sd.<module>` by name, in alphabetical order."""
    package = importlib.import_module(f"stimage_sd.{module}")
    values = {name: getattr(package, name) for name in sorted(package.__all__)}
    return {name: value for name, value in values.items() if callable(value) and not inspect.isclass(value)}


def signature_rows(module: str) -> list[Row]:
    """Return one row per public function of `stimage_sd.<module>`."""
    rows = []
    for name, function in public_functions(module).items():
        arguments = inspect.signature(function).parameters.values()
        keyword = [each for each in arguments if each.kind is each.KEYWORD_ONLY]
        rows.append(
            Row(name, [_shown(each) for each in arguments if each not in keyword], [_shown(each) for each in keyword])
        )
    return rows


def _shown(argument: inspect.Parameter) -> str:
    """Show an argument with its default, where that is short; `=...` where it is long."""
    if argument.default is argument.empty:
        return argument.name
    default = repr(argument.default)
    return f"{argument.name}={default if len(default) <= 24 else '...'}"


class SignatureTable(MarkdownTable):
    """Insert the table of a subpackage."""

    required_arguments = 1

    def lines(self) -> list[str]:
        """Return one row per function."""
        module = self.arguments[0]
        lines = ["| function | arguments | options |", "|---|---|---|"]
        for row in signature_rows(module):
            cells = [", ".join(f"`{text}`" for text in part).replace("|", "\\|") for part in row[1:]]
            lines.append(f"| {{py:obj}}`{row.name} <stimage_sd.{module}.{row.name}>` | {cells[0]} | {cells[1]} |")
        return lines


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("signature-table", SignatureTable)
    return {"parallel_read_safe": True}
