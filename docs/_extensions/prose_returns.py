"""Let "Returns" be prose, and let one entry of "Attributes" have several names.

Docstrings here describe what comes back in sentences, since the signature has the type. Napoleon would
take the first line of such a section for a type; where nothing is indented below it, it is text. It splits names by
commas in "Parameters" only.
"""

from __future__ import annotations

from functools import partial

from sphinx.application import Sphinx
from sphinx.ext.napoleon import NumpyDocstring

_parse_typed = NumpyDocstring._parse_returns_section
_parse_single = NumpyDocstring._parse_attributes_section


def _parse_returns(self: NumpyDocstring, section: str) -> list[str]:
    lines = self._dedent(self._consume_to_next_section())
    if len(lines) > 1 and lines[0].strip() and lines[1].startswith(" "):
        for line in reversed([*lines, ""]):
            self._lines.appendleft(line)
        return _parse_typed(self, section)
    return [":returns:", *self._indent([*lines, ""], 4)]


def _parse_attributes(self: NumpyDocstring, section: str) -> list[str]:
    self._consume_fields = partial(NumpyDocstring._consume_fields, self, multiple=True)
    try:
        return _parse_single(self, section)
    finally:
        del self._consume_fields


def setup(app: Sphinx) -> dict[str, bool]:
    # a property's sentence may have a colon; the signature has the type
    NumpyDocstring._parse_attribute_docstring = lambda _: []
    NumpyDocstring._parse_returns_section = _parse_returns
    NumpyDocstring._parse_attributes_section = _parse_attributes
    return {"parallel_read_safe": True}
