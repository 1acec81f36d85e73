"""Let "Returns" be prose.

Docstrings here describe what comes back in sentences, since the signature has the type. Napoleon would
take the first line of such a section for a type; where nothing is indented below it, it is text.
"""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.ext.napoleon import NumpyDocstring

_parse_typed = NumpyDocstring._parse_returns_section


def _parse_returns(self: NumpyDocstring, section: str) -> list[str]:
    lines = self._dedent(self._consume_to_next_section())
    if len(lines) > 1 and lines[0].strip() and lines[1].startswith(" "):
        for line in reversed([*lines, ""]):
            self._lines.appendleft(line)
        return _parse_typed(self, section)
    return [":returns:", *self._indent([*lines, ""], 4)]


def setup(app: Sphinx) -> dict[str, bool]:
    NumpyDocstring._parse_returns_section = _parse_returns
    return {"parallel_read_safe": True}
