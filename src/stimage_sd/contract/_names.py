"""Names of elements, tables and columns, and the error about a name that cannot be told."""

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
#: what `stimage_sd.pp.aggregate` makes; the tables of the cells stay beside them
SPOT_COUNTS = "spot_counts"
SPOT_PROTEINS = "spot_proteins"
TISSUE = "tissue"
TILES = "tiles"
#: the tiles' geometry; SpatialData wants every element's name unique, so it cannot be "tiles" as well
TILE_SQUARES = "tile_squares"
PREDICTIONS = "predictions"
#: predicted classes of genes, High or Low
GENE_CLASSES = "gene_classes"
#: probabilities of predicted cells' types
CELL_TYPES = "cell_types"
#: nuclei, or segments of another kind, with what explanations say of them, and the table of the explained tiles
NUCLEI_EXPLAINED = "nuclei_explained"
SEGMENTS_EXPLAINED = "segments_explained"
EXPLANATIONS = "explanations"

#: coordinate system of the instrument that measured: micrometres, before they are placed on the H&E
INSTRUMENT = "instrument"
#: key in ``obsm`` of positions in it
SPATIAL_UM = "spatial_um"

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
