"""Show names of genes, samples and groups literally, without matplotlib's math mode."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter


def texts(figure: Figure) -> dict[Text, str]:
    """Return the content of every text of a figure."""
    return {text: text.get_text() for text in figure.findobj(Text)}


def show_literally(figure: Figure, *, before: Mapping[Text, str] | None = None) -> None:
    """Switch math mode off in a figure's texts, so that ``$`` in a name is a dollar sign.

    Parameters
    ----------
    figure
        The figure.
    before
        Texts from before drawing (`texts`). Unchanged texts belong to the user and are left alone.
    """
    known = before or {}
    computed = {
        text
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        # number formatters may need math mode for powers of ten, and names only come from these three formatters
        if not isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter | StrCategoryFormatter)
        for text in axis.findobj(Text)
        if text is not axis.label
    }
    for text, said in texts(figure).items():
        if text not in computed and known.get(text) != said:
            text.set_parse_math(False)


def show_title(text: Text) -> None:
    """Show a user's title in math mode if matplotlib can parse it, else literally."""
    text.set_parse_math(True)
    try:
        MathTextParser("path").parse(text.get_text())
    except ValueError:
        text.set_parse_math(False)
