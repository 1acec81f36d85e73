"""Define the names of elements, tables and columns, and unify names of genes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from spatialdata import SpatialData

ATTRIBUTE = "stimage_sd"
IMAGE = "he"
NORMALIZED = "he_normalized"
MULTIPLEX = "multiplex"
DAPI = "dapi"
#: names that `spatialdata_io.xenium` gives to the morphology image
MORPHOLOGY = ("morphology_focus", "morphology_mip")
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

#: lowest stability and held-out R² of scores of explained tiles that figures and summaries read
MIN_STABILITY = 0.9
MIN_R2 = 0.2

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


#: feature type of genes, and column of feature types, as named by 10x Genomics' software
GENES, FEATURE_TYPES = "Gene Expression", "feature_types"

#: an Ensembl id with a version, of any species
_VERSIONED = r"^(ENS[A-Z]*\d{11})\.\d+$"


def without_versions(names: pd.Index) -> pd.Index:
    """Return gene names with the version of Ensembl ids removed, as it differs between releases.

    >>> without_versions(pd.Index(["ENSG00000141736.14", "ENSMUSG00000062312.8", "RP11-34P13.7"])).tolist()
    ['ENSG00000141736', 'ENSMUSG00000062312', 'RP11-34P13.7']
    """
    if not len(names):
        return names
    return pd.Index(names.astype(str).str.replace(_VERSIONED, r"\1", regex=True), name=names.name)


def are_genes(var: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which features are genes and not antibodies, guides or controls, by ``var["feature_types"]``.

    Without that column all features are genes.

    >>> are_genes(pd.DataFrame({"feature_types": ["Gene Expression", "Antibody Capture"]})).tolist()
    [True, False]
    """
    if FEATURE_TYPES not in var:
        return np.ones(len(var), dtype=bool)
    kinds = var[FEATURE_TYPES].astype(object)
    genes = kinds.eq(GENES)
    # concatenated tables may lack the type of some features
    return (genes | kinds.isna() if genes.any() else genes | True).to_numpy(dtype=bool)
