"""Baselines for comparison with new models. Each is a recipe for `stimage_sd.tl.fit_baseline`."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_hist2st": ["Hist2ST"],
        "_histogene": ["HisToGene"],
        "_igidl": ["IGIDL"],
        "_mean_only": ["MeanOnly"],
        "_nearest_tiles": ["NearestTiles"],
        "_retrieval": ["Retrieval"],
        "_ridge": ["Ridge"],
        "_stnet": ["STnet"],
        "_thitogene": ["THItoGene"],
        "_vit_nb": ["ViTNB"],
    },
)
