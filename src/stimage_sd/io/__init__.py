"""Read each platform's files as a section (one lazy `SpatialData`), and write other formats."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_anndata": ["from_anndata"],
        "_codex": ["codex"],
        "_from_spatialdata": ["from_spatialdata"],
        "_geojson": ["read_geojson", "write_geojson"],
        "_hest": ["hest"],
        "_legacy_st": ["legacy_st"],
        "_loupe": ["read_loupe"],
        "_read": ["read"],
        "_slide": ["slide"],
        "_tile_features": ["read_tile_features"],
        "_to_anndata": ["to_anndata"],
        "_visium": ["visium"],
        "_visium_hd": ["visium_hd"],
        "_xenium": ["xenium"],
    },
)
