"""The section contract: the one place that knows how a section lies in a SpatialData object.

A *section* is one tissue section, held by one `SpatialData`; a *cohort* is a mapping from sample id
to section. Every other module asks this one for the H&E image, the spots, the counts, the tissue, the
tiles and the predictions, and hands it what is to be written, so that element names, coordinate
systems and the errors about missing steps are spelled out here and nowhere else.

Coordinates: `"global"` is pixels of the H&E at full resolution, `"microns"` the same in micrometres
where the section's resolution (`mpp`, micrometres a pixel) is known.
"""

from __future__ import annotations

from stimage_sd.contract._access import (
    align_to_spots,
    check_counts,
    check_rgb,
    context_key,
    counts,
    counts_name,
    derive_image,
    embeddings,
    feature_key,
    has_counts,
    image_name,
    predictions,
    thumbnail,
    tiles,
    tiling,
    tissue,
    units_name,
    working_image_name,
    write_predictions,
    write_tissue,
)
from stimage_sd.contract._elements import annotate, build_image, build_shapes, levels
from stimage_sd.contract._names import (
    ATTRIBUTE,
    CHUNK,
    COUNTS,
    IMAGE,
    INSTANCE_KEY,
    NORMALIZED,
    PREDICTIONS,
    REGION_KEY,
    SPOTS,
    TILE_SQUARES,
    TILES,
    TISSUE,
    Cohort,
)
from stimage_sd.contract._section import info, plain, record, register, require_mpp, sample, sections

__all__ = [
    "ATTRIBUTE",
    "CHUNK",
    "COUNTS",
    "IMAGE",
    "INSTANCE_KEY",
    "NORMALIZED",
    "PREDICTIONS",
    "REGION_KEY",
    "SPOTS",
    "TILES",
    "TILE_SQUARES",
    "TISSUE",
    "Cohort",
    "align_to_spots",
    "annotate",
    "build_image",
    "build_shapes",
    "check_counts",
    "check_rgb",
    "context_key",
    "counts",
    "counts_name",
    "derive_image",
    "embeddings",
    "feature_key",
    "has_counts",
    "image_name",
    "info",
    "levels",
    "plain",
    "predictions",
    "record",
    "register",
    "require_mpp",
    "sample",
    "sections",
    "thumbnail",
    "tiles",
    "tiling",
    "tissue",
    "units_name",
    "working_image_name",
    "write_predictions",
    "write_tissue",
]
