"""A directive whose content is a table that Python writes in Markdown."""

from __future__ import annotations

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList


class MarkdownTable(Directive):
    """Insert the table of `lines`."""

    def lines(self) -> list[str]:
        """Return the lines of the table."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Return the table, parsed as Markdown."""
        holder = nodes.container()
        self.state.nested_parse(StringList([*self.lines(), ""]), self.content_offset, holder)
        return holder.children
