"""Example data: real sections, and synthetic sections in vendor formats."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_cell_types": ["synthetic_reference"],
        "_her2st": ["her2st"],
        "_synthetic_codex": ["synthetic_codex"],
        "_synthetic_slide": ["synthetic_slide"],
        "_synthetic_visium": ["synthetic_visium"],
        "_synthetic_visium_hd": ["synthetic_visium_hd"],
        "_synthetic_xenium": ["synthetic_xenium"],
        "_visium": ["visium"],
    },
)
