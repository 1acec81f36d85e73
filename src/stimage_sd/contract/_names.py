"""Names of elements, tables and columns, and the error about a name that cannot be told."""

from __future__ import annotations

from collections.abc import Mapping

from spatialdata import SpatialData

ATTRIBUTE = "stimage_sd"
IMAGE = "he"
NORMALIZED = "he_normalized"
SPOTS = "spots"
COUNTS = "counts"
TISSUE = "tissue"
TILES = "tiles"
#: the tiles' geometry; SpatialData wants every element's name unique, so it cannot be "tiles" as well
TILE_SQUARES = "tile_squares"
PREDICTIONS = "predictions"
_OWN_TABLES = (TILES, PREDICTIONS)

REGION_KEY = "region"
INSTANCE_KEY = "instance_id"
#: side of an image chunk, px: one is read, normalised and cut at a time
CHUNK = 1024

Cohort = Mapping[str, SpatialData]


def single(candidates: list[str], *, what: str, argument: str, found: list[str], mend: str = "") -> str:
    """Return the only candidate; raise `KeyError`, listing what there is, where there is none or several."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise KeyError(f"Found no {what} among {found}. {mend or f'Name it with `{argument}=`.'}")
    raise KeyError(f"Found more than one {what}: {sorted(candidates)}. Choose one with `{argument}=`.")
