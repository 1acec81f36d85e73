"""Show an object by its facts: a table of names and values in notebooks, aligned text elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

#: names and values that describe an object, in the order of reading
Facts = dict[str, str]
Shown = TypeVar("Shown", bound=type)

# Colors come from the page, so that the table can be read on light and dark pages.
_TABLE = "border-collapse:collapse;border:none;margin:.2em 0 .6em 0;text-align:left"
_CELL = "padding:.12em 1.2em .12em 0;border:none;text-align:left;vertical-align:top;background:none"


def shown(cls: Shown) -> Shown:
    """Show the objects of a class by their method `facts`. Above ``dataclass``, whose own repr it replaces."""
    cls.__repr__ = as_text  # type: ignore[assignment]
    cls._repr_html_ = as_html  # type: ignore[attr-defined]
    return cls


def as_text(self: Any) -> str:
    """Return the name of the class, and one line per fact."""
    return "\n".join([type(self).__name__, *(f"  {line}" for line in lines(self.facts()))])


def as_html(self: Any) -> str:
    """Return the name of the class and the facts as an HTML table."""
    import html

    rows = "".join(
        f'<tr style="background:none"><th style="{_CELL};font-weight:normal;opacity:.65;white-space:nowrap">'
        f'{html.escape(name)}</th><td style="{_CELL}">{html.escape(value)}</td></tr>'
        for name, value in self.facts().items()
    )
    return f'<div><strong>{html.escape(type(self).__name__)}</strong><table style="{_TABLE}">{rows}</table></div>'


def lines(facts: Mapping[str, str], *, width: int = 11) -> list[str]:
    """Return one line per fact, with the values below each other.

    >>> lines({"genes": "2: A, B", "tiles": "55 µm"}, width=5)
    ['genes  2: A, B', 'tiles  55 µm']
    """
    width = max([width, *map(len, facts)])
    return [f"{name:<{width}}  {value}" for name, value in facts.items()]


def listed(names: Iterable[Any], *, most: int = 8) -> str:
    """Return the first of some names.

    >>> listed("ABC"), listed("ABCDE", most=3)
    ('A, B, C', 'A, B, C, ... (5)')
    """
    every = [str(name) for name in names]
    return ", ".join(every) if len(every) <= most else f"{', '.join(every[:most])}, ... ({len(every):,})"


def counted(names: Sequence[Any], *, most: int = 6) -> str:
    """Return the number of some names, and the first of them.

    >>> counted(["A", "B", "C"], most=2)
    '3: A, B, ...'
    """
    return f"{len(names):,}: {', '.join(map(str, names[:most]))}{', ...' if len(names) > most else ''}"


def frames(result: Any) -> str:
    """Return the names and sizes of the tables in a named tuple."""
    tables = ((name, value) for name, value in result._asdict().items() if hasattr(value, "columns"))
    return ", ".join(f"{name} ({len(table):,} x {table.shape[1]})" for name, table in tables)
