"""Fitted models, their files, and the registry of extractors."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_extractors": ["Extractor", "extractors", "get_extractor", "register_extractor"],
        "_files": ["load"],
        "_nb": ["NBModel"],
    },
)
