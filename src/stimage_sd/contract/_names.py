"""Define the names of elements, tables and columns."""

from __future__ import annotations

from collections.abc import Mapping

from spatialdata import SpatialData

ATTRIBUTE = "stimage_sd"
IMAGE = "he"
NORMALIZED = "he_normalized"
MULTIPLEX = "multiplex"
DAPI = "dapi"
SPOTS = "spots"
BINS = "bins"
CELLS = "cells"
NUCLEI = "nuclei"
TRANSCRIPTS = "transcripts"
COUNTS = "counts"
PROTEINS = "proteins"
#: tables that `stimage_sd.pp.aggregate` writes; the cells keep their own tables
SPOT_COUNTS = "spot_counts"
SPOT_PROTEINS = "spot_proteins"
TISSUE = "tissue"
TILES = "tiles"
#: geometry of the tiles; not named "tiles" because SpatialData requires unique element names
TILE_SQUARES = "tile_squares"
PREDICTIONS = "predictions"
#: predicted gene classes, High or Low
GENE_CLASSES = "gene_classes"
#: cell-type probabilities of predicted cells
CELL_TYPES = "cell_types"
#: explained nuclei, explained segments of another kind, and the table of explained tiles
NUCLEI_EXPLAINED = "nuclei_explained"
SEGMENTS_EXPLAINED = "segments_explained"
EXPLANATIONS = "explanations"
#: prefix of the images with saliency maps of tiles, before the number of the tile
SALIENCY = "saliency_"

#: coordinate system of the measuring instrument, in micrometers
INSTRUMENT = "instrument"
#: ``obsm`` key of positions in the instrument's micrometers
SPATIAL_UM = "spatial_um"

#: Visium spots, µm: real diameter, diameter that Space Ranger writes as ``spot_diameter_fullres``, and pitch
SPOT_UM, NOMINAL_SPOT_UM, PITCH_UM = 55.0, 65.0, 100.0

REGION_KEY = "region"
INSTANCE_KEY = "instance_id"
#: side of an image chunk, px; images are read, normalized and cut chunk by chunk
CHUNK = 1024

Cohort = Mapping[str, SpatialData]


def single(candidates: list[str], *, what: str, argument: str, found: list[str], mend: str = "") -> str:
    """Return the only candidate. Raise `KeyError` with a list of names if there is none or more than one."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise KeyError(f"Found no {what} among {found}. {mend or f'Name it with `{argument}=`.'}")
    raise KeyError(f"Found more than one {what}: {sorted(candidates)}. Choose one with `{argument}=`.")
