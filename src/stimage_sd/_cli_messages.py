"""Print the steps of a command, and its errors and warnings as one line each on standard error."""

from __future__ import annotations

import logging
import traceback
import warnings
from typing import Any

import typer
from typer.core import TyperGroup


def say(message: str) -> None:
    """Print a step of a command."""
    typer.echo(f"- {message}")


class OneLineErrors(TyperGroup):
    """Turn a user's mistake into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, with one line per warning and error on standard error."""
        # ome_zarr warns about labels without an image in every SpatialData store
        logging.getLogger("ome_zarr").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                _show_warnings_to_users()
                return super().invoke(ctx)
        except (ValueError, KeyError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            if ctx.params.get("show_traceback"):
                typer.echo(traceback.format_exc(), err=True)
            typer.echo(f"stimage-sd: error: {_one_line(error)}", err=True)
            raise typer.Exit(2) from error


def _one_line(error: BaseException) -> str:
    # str() of a KeyError puts the message in quotes
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())


def _show_warnings_to_users() -> None:
    """Show every warning once, as one line, without the warnings that are for developers."""
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", message="zarr v3 autosharding", category=UserWarning)
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            typer.echo(f"stimage-sd: warning: {text}", err=True)

    warnings.showwarning = show
