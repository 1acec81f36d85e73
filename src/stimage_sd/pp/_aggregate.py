"""Aggregate transcripts, cells, bins or a multiplex image into pseudo-spots of Visium size."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._squidpy import spatial_uns
from stimage_sd.pp._aggregate_common import Measured
from stimage_sd.pp._aggregate_transcripts import CONTROLS, Transcripts, find_transcripts
from stimage_sd.pp._aggregate_units import Image, Units, find_image, find_units
from stimage_sd.pp._spot_layout import Onto, Spots, annotating, existing_spots, lay_lattice

Source = Literal["transcripts", "cells", "image"]
#: column of ``obs`` with the number of transcripts, cells or pixels per spot
_HELD = {"transcripts": "n_transcripts", "cells": "n_cells", "image": "n_pixels"}


def aggregate(
    data: SpatialData | contract.Cohort,
    source: Source = "transcripts",
    *,
    onto: Onto = "hex",
    spot_um: float = 55.0,
    pitch_um: float = 100.0,
    min_quality: float | None = 20.0,
    controls: Sequence[str] = CONTROLS,
    min_units: int = 1,
    points_key: str | None = None,
    table_key: str | None = None,
    layer: str | None = None,
    image_key: str | None = None,
    shapes_key: str | None = None,
    n_jobs: int | None = None,
) -> None:
    """Aggregate transcripts, cells, bins or a protein image into pseudo-spots of Visium size.

    Transcripts are read by partition and images by chunk, so neither is held in memory as a whole. The result does not
    depend on the partitions, the chunks or the number of workers.

    Parameters
    ----------
    data
        A section, or a cohort of sections. The reader or `register` must have placed the source on the H&E.
    source
        ``"transcripts"`` counts transcripts. ``"cells"`` sums the counts, or averages the proteins, of the cells (or
        bins) whose centroids lie in a spot. All cells have the same weight. ``"image"`` averages each channel over the
        pixels whose centers lie in a spot. It reads the coarsest pyramid level with at least 20 pixels across a spot.
    onto
        ``"hex"`` lays circles on a hexagonal lattice like that of Visium. ``"grid"`` lays circles on a square lattice.
        ``"spots"`` uses existing shapes, circles or polygons.
    spot_um, pitch_um
        Diameter of a circle and distance between neighboring centers, in micrometers. Not used with ``onto="spots"``.
    min_quality
        Lowest Phred-scaled quality (column ``qv``) of a transcript that is counted. `None` counts all transcripts, and
        so do points without that column.
    controls
        Prefixes of feature names that are not genes. These features are left out.
    min_units
        Least number of transcripts, cells or pixels per spot. Spots with fewer are left out. A lattice also leaves out
        circles that reach outside the H&E or outside the measured area. The measured area is the box around all
        transcripts or centroids in the instrument's coordinates, or the outline of the image.
    points_key, image_key
        Names of the transcripts and of the protein image, if not the section's default.
    table_key
        The table of cells, if not the section's default. With transcripts, only the genes of this table are counted.
        Without a table, all features except controls are counted.
    layer
        Layer of that table with the counts, if not the section's default.
    shapes_key
        With ``onto="spots"``, the shapes to aggregate onto. Otherwise the name of the new shapes. ``"spots"`` by
        default.
    n_jobs
        Number of threads; all cores by default. An active `dask.distributed` client is used instead.

    Returns
    -------
    Nothing. Writes ``shapes["spots"]`` (circles, H&E px; not with ``onto="spots"``) and ``tables["spot_counts"]``
    (X: CSR of int32) or ``tables["spot_proteins"]`` (X: float32), and replaces the results of an earlier call. Later
    steps use this table as the section's counts or proteins. ``obs`` has ``n_transcripts``, ``n_cells`` or
    ``n_pixels``. On a lattice it also has ``array_row`` and ``array_col``. The table of cells stays.

    Raises
    ------
    KeyError
        If the section has no such source. The error lists the sources of the section.
    ValueError
        If the source is not placed on the H&E, the resolution is unknown, no spot is left, or the call would replace
        spots that `aggregate` did not make.

    Notes
    -----
    Paper, section 2.1: spots of 55 µm. A point on the rim of a circle is inside. A point on an edge that two polygons
    share is in one of them.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from spatialdata import SpatialData
    >>> from spatialdata.models import PointsModel
    >>> from stimage_sd import contract, pp
    >>> random = np.random.default_rng(0)
    >>> found = pd.DataFrame(random.uniform(0, 500, (4000, 2)), columns=["x", "y"])
    >>> found["feature_name"] = pd.Categorical(random.choice(["ERBB2", "CD3E", "BLANK_1"], 4000))
    >>> section = SpatialData(points={"transcripts": PointsModel.parse(found, feature_key="feature_name")})
    >>> _ = contract.register(section, sample="made", platform="xenium", image=None, mpp=1.0)
    >>> pp.aggregate(section)
    >>> section.tables["spot_counts"].shape, section.tables["spot_counts"].var_names.tolist()
    ((27, 2), ['CD3E', 'ERBB2'])
    """
    if source not in _HELD:
        raise ValueError(f"Expected `source` to be one of {sorted(_HELD)}, found {source!r}.")
    if onto not in ("hex", "grid", "spots"):
        raise ValueError(f'Expected `onto` to be "hex", "grid" or "spots", found {onto!r}.')
    if not (spot_um > 0 and pitch_um > 0):
        raise ValueError(f"Expected positive `spot_um` and `pitch_um`, found {spot_um} and {pitch_um}.")
    for sdata in contract.sections(data).values():
        name = contract.SPOTS if shapes_key is None else shapes_key
        _check_source(sdata, source, {"transcripts": points_key, "cells": table_key, "image": image_key}[source])
        options: dict[str, Any] = {"source": source, "onto": onto, "min_units": min_units}
        if onto != "spots":
            options |= {"spot_um": float(spot_um), "pitch_um": float(pitch_um)}
        measurable: Transcripts | Units | Image
        if source == "transcripts":
            measurable = find_transcripts(
                sdata, points_key=points_key, table_key=table_key, min_quality=min_quality, controls=controls
            )
            options |= {"min_quality": min_quality if measurable.rule.quality else None, "controls": list(controls)}
        elif source == "cells":
            measurable = find_units(sdata, table_key=table_key, layer=layer)
        else:
            measurable = find_image(sdata, image_key=image_key)
        spots = _spots(sdata, measurable, name, onto=onto, sizes_um=(spot_um, pitch_um), n_jobs=n_jobs)
        measured = measurable.measure(spots.regions, n_jobs)
        kept = measured.n_units >= min_units
        if not kept.any():
            raise ValueError(
                f"None of {len(kept)} spots of section {contract.sample(sdata)!r} holds {min_units} of its {source} "
                f"(most: {measured.n_units.max()}). Lower `min_units=`, or check their positions on the H&E."
            )
        table = _table(sdata, spots, measured, kept, source=source, options=options)
        _write(sdata, spots.shapes[kept], table, name=name, onto=onto)
        contract.record(sdata, "pp.aggregate", n_spots=table.n_obs, shapes=name, **options, **measured.notes)


def _check_source(sdata: SpatialData, source: Source, key: str | None) -> None:
    """Raise `KeyError` with the available sources if the section lacks `source`."""
    there = {
        "transcripts": len(sdata.points) > 0,
        "cells": len(contract.cell_table_names(sdata)) > 0,
        "image": contract.MULTIPLEX in sdata.images,
    }
    if key is None and not there[source]:
        others = [f'source="{name}"' for name, is_there in there.items() if is_there]
        raise KeyError(
            f"Section {contract.sample(sdata)!r} has no {source} to aggregate. It has "
            f"{' and '.join(others) or 'none of the other sources either'}."
        )


def _spots(
    sdata: SpatialData,
    measurable: Transcripts | Units | Image,
    name: str,
    *,
    onto: Onto,
    sizes_um: tuple[float, float],
    n_jobs: int | None,
) -> Spots:
    """Return the spots to aggregate onto, checked before anything is counted."""
    if onto == "spots":
        if name not in sdata.shapes:
            raise KeyError(
                f"No shapes {name!r} to aggregate onto; this section's shapes: {sorted(sdata.shapes)}. Choose with "
                '`shapes_key=`, or lay new spots with `onto="hex"`.'
            )
        return existing_spots(sdata, name)
    mpp = contract.require_mpp(sdata, purpose="`spot_um=`")
    _check_replaceable(sdata, name)
    field = measurable.field(n_jobs)
    image = _he(sdata)
    if image is not None:
        height, width = contract.levels(sdata, image)[0].shape[1:]
        on_image = field.intersection(shapely.box(0, 0, width, height))
        if not isinstance(on_image, shapely.Polygon) or on_image.is_empty:
            raise ValueError(
                f"The measurements of section {contract.sample(sdata)!r} do not lie on its H&E of {width} x {height} "
                "px. Does the alignment belong to this image?"
            )
        field = on_image
    return lay_lattice(field, onto=onto, diameter=sizes_um[0] / mpp, pitch=sizes_um[1] / mpp)


def _he(sdata: SpatialData) -> str | None:
    """Return the name of the section's H&E, or `None` for a section without one."""
    return None if contract.is_without_image(sdata) else contract.image_name(sdata)


def _check_replaceable(sdata: SpatialData, name: str) -> None:
    """Raise `ValueError` if new spots would replace an element that `aggregate` did not make."""
    if name not in sdata.shapes:
        if name in sdata:
            raise ValueError(f"{name!r} is the name of another element. Choose one for the spots with `shapes_key=`.")
        return
    tables = annotating(sdata, name)
    made = any(
        step["step"] == "pp.aggregate"
        and step["parameters"]["shapes"] == name
        and step["parameters"]["onto"] != "spots"
        for step in contract.info(sdata)["history"]
    )
    if not made or set(tables) - {contract.SPOT_COUNTS, contract.SPOT_PROTEINS}:
        raise ValueError(
            f"Shapes {name!r} of section {contract.sample(sdata)!r} were not made by `aggregate` (tables on them: "
            f'{tables}). Aggregate onto them with `onto="spots"`, or write new ones beside them with '
            '`shapes_key="pseudo_spots"`.'
        )


def _table(
    sdata: SpatialData, spots: Spots, measured: Measured, kept: np.ndarray, *, source: Source, options: dict[str, Any]
) -> AnnData:
    obs = spots.obs[kept].copy()
    obs.index.name = None
    obs.insert(0, contract.INSTANCE_KEY, spots.shapes.index[kept])
    obs[_HELD[source]] = measured.n_units[kept]
    centers = shapely.get_coordinates(shapely.centroid(spots.shapes.geometry.to_numpy()[kept]))
    table = AnnData(X=measured.values[kept], obs=obs, var=measured.var, obsm={"spatial": centers})
    notes = contract.plain(options | measured.notes)
    table.uns["aggregation"] = {key: value for key, value in notes.items() if value is not None}
    if _he(sdata) is not None:
        table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=spots.diameter)
    return table


def _write(sdata: SpatialData, shapes: GeoDataFrame, table: AnnData, *, name: str, onto: Onto) -> None:
    against: contract.Against = "counts" if sp.issparse(table.X) else "proteins"
    written = contract.SPOT_COUNTS if against == "counts" else contract.SPOT_PROTEINS
    sdata.tables.pop(written, None)
    if onto != "spots":
        for other in annotating(sdata, name):
            warnings.warn(
                f"Table {other!r} was dropped with the spots it was made for. Aggregate its source again with "
                '`onto="spots"`, so that both lie on the same spots.',
                UserWarning,
                stacklevel=3,
            )
            del sdata.tables[other]
            contract.activate(sdata, "counts" if other == contract.SPOT_COUNTS else "proteins", None)
        contract.write_shapes(sdata, shapes, name=name)
    sdata.tables[written] = contract.annotate(table, region=name)
    contract.activate(sdata, against, written)
