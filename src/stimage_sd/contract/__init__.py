"""The section contract: how a section is laid out in a SpatialData object.

A *section* is one tissue section in one `SpatialData`. A *cohort* is a mapping from sample id to section. All other
modules read and write the H&E image, spots, counts, tissue, tiles and predictions through this package. Element
names, coordinate systems and the errors about missing steps are defined only here.

Coordinates: all positions and lengths are in pixels of the H&E at full resolution. They are computed through any
coordinate system that the element and the H&E share. Results are written in every coordinate system of the H&E. This
package's readers use `"global"` (pixels of the H&E) and `"microns"` (micrometers). Elements measured in an
instrument's own micrometers (Xenium, CODEX) have `"instrument"`, and also `"global"` once they are placed on the H&E.
"""

from __future__ import annotations

from stimage_sd.contract._affine import affine, apply, scale_of
from stimage_sd.contract._counts import (
    Source,
    align_to_spots,
    check_counts,
    count_type,
    counts,
    counts_of_shapes,
    measured,
    proteins,
)
from stimage_sd.contract._depth import (
    Compared,
    at_depth_of,
    depth_change,
    depth_problem,
    exposure_of,
    measured_exposure,
    totals_compare,
)
from stimage_sd.contract._elements import (
    annotate,
    build_shapes,
    counts_problem,
    instrument_elements,
    is_result,
    keys_of,
    regions_of,
)
from stimage_sd.contract._fingerprints import fingerprint, is_seen, repeated_sections
from stimage_sd.contract._frame import (
    Frame,
    image_extent,
    image_size,
    is_without_image,
    mpp,
    pictures,
    pixel_frame,
    require_mpp,
    shapes_in_pixels,
)
from stimage_sd.contract._images import (
    build_image,
    check_rgb,
    derive_image,
    find_image,
    image_name,
    levels,
    rgb_images,
    thumbnail,
    was_cropped,
    working_image_name,
)
from stimage_sd.contract._instances import (
    GRID_SQUARES,
    On,
    Within,
    about_instances,
    align,
    align_to_instances,
    check_instance_key,
    features_key,
    has_cells,
    instance_areas,
    instance_outlines,
    instance_shapes,
    instances,
    near_tiles,
    places,
    predictions_key,
    within_tiles,
    write_instance_predictions,
    write_instances,
)
from stimage_sd.contract._instrument import build_multichannel, instrument_matrix, place_instrument
from stimage_sd.contract._labels import LabelWindow, label_circles, label_window
from stimage_sd.contract._names import (
    BINS,
    CELL_TYPES,
    CELLS,
    CHUNK,
    COUNTS,
    DAPI,
    EXPLANATIONS,
    GENE_CLASSES,
    GENES,
    IMAGE,
    INSTANCE_KEY,
    INSTRUMENT,
    MIN_R2,
    MIN_STABILITY,
    MORPHOLOGY,
    MULTIPLEX,
    NOMINAL_SPOT_UM,
    NORMALIZED,
    NUCLEI,
    NUCLEI_EXPLAINED,
    PITCH_UM,
    PREDICTIONS,
    PROTEINS,
    REGION_KEY,
    SEGMENTS_EXPLAINED,
    SPATIAL_UM,
    SPOT_COUNTS,
    SPOT_PROTEINS,
    SPOT_UM,
    SPOTS,
    TILE_SQUARES,
    TILES,
    TISSUE,
    TRANSCRIPTS,
    Cohort,
    without_versions,
)
from stimage_sd.contract._results import (
    cell_shapes,
    cell_types,
    check_cells_can_be_written,
    check_no_shapes,
    check_prediction_key,
    explained,
    explanations,
    gene_classes,
    has_tissue,
    nuclei,
    nuclei_name,
    outlines,
    predictions,
    tissue,
    tissue_name,
    unstable_tiles,
    write_cells,
    write_explained,
    write_explanations,
    write_gene_classes,
    write_predictions,
    write_shapes,
    write_tissue,
)
from stimage_sd.contract._row_labels import Labeled, labeled_rows, row_labels
from stimage_sd.contract._section import (
    info,
    patients,
    plain,
    record,
    register,
    remember,
    sample,
    section,
    sections,
    stain_of,
    stated_of_image,
)
from stimage_sd.contract._tables import (
    Against,
    activate,
    cell_table_name,
    cell_table_names,
    counts_name,
    has_counts,
    has_units,
    holds_counts,
    proteins_name,
)
from stimage_sd.contract._tile_maps import TileMap, tile_map_names, tile_maps, write_tile_maps
from stimage_sd.contract._tiles import (
    TileGeometry,
    check_finite,
    check_free,
    context_key,
    embeddings,
    feature_key,
    tile_geometry,
    tile_squares,
    tiles,
    tiling,
    write_embeddings,
    write_tiles,
)
from stimage_sd.contract._units import Units, find_units, has_places, stands_on_spots, units_name, units_of
