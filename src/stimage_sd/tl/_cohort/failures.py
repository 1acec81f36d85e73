"""One-line reasons for the failure of a section or slide."""

from __future__ import annotations

#: characters of an error text to keep
_MOST = 500


def reason(error: Exception) -> str:
    """Return type and text of an error in one line."""
    # str() of a KeyError adds quotes
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:_MOST]}"
