"""Load a fitted model of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# imported to register their kinds
from stimage_sd.models import (  # noqa: F401
    _adapted,
    _baseline_model,
    _cell_classifier,
    _combined,
    _finetuned,
    _gene_classifier,
    _instance_model,
    _nb,
    _wrapped,
)
from stimage_sd.models._files import model_from, read_model


def load(path: str | Path) -> Any:
    """Load a fitted model.

    Parameters
    ----------
    path
        File or directory that `save` wrote.

    Returns
    -------
    The model, of the class that was saved.

    Raises
    ------
    FileNotFoundError
        If the path does not exist.
    ValueError
        If the file is not a model, is damaged, or was written by a newer version of the package.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.models.load("no-such.stimage")
    Traceback (most recent call last):
    FileNotFoundError: No model at no-such.stimage.
    """
    config, arrays = read_model(path)
    try:
        return model_from(config, arrays)
    except NotImplementedError as error:
        raise ValueError(f"{path} holds {error}. Update stimage-sd.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The model at {path} is damaged: {error}. Save it again.") from error
