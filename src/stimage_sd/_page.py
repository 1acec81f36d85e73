"""Reports of a page: headings, paragraphs, tables and figures, as Markdown or as one HTML file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from stimage_sd._files import replacing

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px/1.45 sans-serif; max-width: 940px; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }} th, td {{ padding: 3px 14px 3px 0; text-align: left; }}
th {{ border-bottom: 1px solid #999; }} img {{ max-width: 100%; }}</style></head><body>
{body}
</body></html>
"""


class Block(NamedTuple):
    """A part of a page: a paragraph or heading (`text`), a table, or a figure that is drawn when it is needed.

    - `text`: paragraph, or what a figure shows.
    - `is_heading`: whether the text is a heading.
    - `table`: table with formatted cells.
    - `figure`: function that draws a PNG.
    """

    text: str = ""
    is_heading: bool = False
    table: pd.DataFrame | None = None
    figure: Callable[[], bytes] | None = None

    def html(self) -> str:
        """Return the block as HTML, with its figure inside and addresses as links.

        >>> Block("See https://example.org/a#b").html()
        '<p>See <a href="https://example.org/a#b">https://example.org/a#b</a></p>'
        """
        if self.figure is not None:
            picture = base64.b64encode(self.figure()).decode()
            return f'<img alt="{html.escape(self.text)}" src="data:image/png;base64,{picture}">'
        if self.table is not None:
            return str(self.table.to_html(index=False, border=0, justify="left"))
        tag = "h1" if self.is_heading else "p"
        text = re.sub(r"https://[\w./#-]+", r'<a href="\g<0>">\g<0></a>', html.escape(self.text))
        return f"<{tag}>{text}</{tag}>"

    def markdown(self, picture: str) -> str:
        """Return the block as Markdown, given the file of its figure."""
        if self.figure is not None:
            return f"![{self.text}]({picture})"
        if self.table is not None:
            rows = [list(self.table.columns), ["---"] * self.table.shape[1], *self.table.to_numpy().tolist()]
            return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
        return f"# {self.text}" if self.is_heading else self.text


def as_text(blocks: Iterable[Block]) -> str:
    """Return a page as Markdown without its figures."""
    return "\n\n".join(block.markdown("") for block in blocks if block.figure is None) + "\n"


def as_page(blocks: Iterable[Block]) -> str:
    """Return a page as HTML with its figures inside."""
    every = list(blocks)
    title = next((block.text for block in every if block.is_heading), "")
    return _PAGE.format(title=html.escape(title), body="\n".join(block.html() for block in every))


def write_page(path: str | Path, blocks: Iterable[Block]) -> Path:
    """Write a page to one file; figures of Markdown go to PNG files beside it."""
    path, blocks = Path(path), list(blocks)
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"Expected a path ending in .html or .md for the page, found {path.name!r}.")
    if path.suffix == ".html":
        text = as_page(blocks)
    else:
        parts = []
        for index, block in enumerate(blocks):
            picture = path.with_name(f"{path.stem}_{index}.png")
            if block.figure is not None:
                with replacing(picture) as staged:
                    staged.write_bytes(block.figure())
            parts.append(block.markdown(picture.name))
        text = "\n\n".join(parts) + "\n"
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")
    return path
