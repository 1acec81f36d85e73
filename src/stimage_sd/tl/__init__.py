"""Tools: fit, predict, evaluate; one file a task."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"_evaluate": ["evaluate"], "_fit_nb": ["fit_nb"], "_predict": ["predict"]},
)
