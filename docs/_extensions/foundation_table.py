"""The directive `foundation-table`: one row per foundation model, from the settings that the package loads it by."""

from __future__ import annotations

from markdown_table import MarkdownTable
from sphinx.application import Sphinx

from stimage_sd.models._foundation import FOUNDATION_MODELS


class FoundationTable(MarkdownTable):
    """Insert the table of foundation models."""

    def lines(self) -> list[str]:
        """Return one row per model."""
        lines = ["| name | numbers per tile | input | license | weights |", "|---|---|---|---|---|"]
        for name, model in FOUNDATION_MODELS.items():
            access = "access on request" if model.needs_access else "open"
            page = f"[{model.page.removeprefix('https://')}]({model.page}), {access}"
            lines.append(f"| `{name}` | {model.embedding_size:,} | {model.input_size} px | {model.license} | {page} |")
        return lines


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("foundation-table", FoundationTable)
    return {"parallel_read_safe": True}
