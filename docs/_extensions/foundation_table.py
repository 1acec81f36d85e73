"""The directive `foundation-table`: one row per foundation model, from the settings that the package loads it by."""

from __future__ import annotations

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from stimage_sd.models._foundation import FOUNDATION_MODELS


class FoundationTable(Directive):
    """Insert the table of foundation models."""

    def run(self) -> list[nodes.Node]:
        """Return the table, parsed as Markdown."""
        lines = ["| name | numbers per tile | input | license | weights |", "|---|---|---|---|---|"]
        for name, model in FOUNDATION_MODELS.items():
            access = "access on request" if model.needs_access else "open"
            page = f"[{model.page.removeprefix('https://')}]({model.page}), {access}"
            lines.append(f"| `{name}` | {model.embedding_size:,} | {model.input_size} px | {model.license} | {page} |")
        holder = nodes.container()
        self.state.nested_parse(StringList([*lines, ""]), self.content_offset, holder)
        return holder.children


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("foundation-table", FoundationTable)
    return {"parallel_read_safe": True}
