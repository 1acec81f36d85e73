"""Readers: each platform's files in, a section (one `SpatialData`) out, lazily."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_anndata": ["from_anndata"],
        "_codex": ["codex"],
        "_legacy_st": ["legacy_st"],
        "_slide": ["slide"],
        "_visium": ["visium"],
        "_visium_hd": ["visium_hd"],
        "_xenium": ["xenium"],
    },
)
