"""Visium-sized pseudo-spots from what was measured more finely: transcripts, cells, bins, a multiplex image."""

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
from stimage_sd.pp._aggregate_units import Image, Units, find_image, find_units, unit_tables
from stimage_sd.pp._spot_layout import Onto, Spots, annotating, existing_spots, lay_lattice

Source = Literal["transcripts", "cells", "image"]
#: column of ``obs`` with how many of them a spot holds
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
    image_key: str | None = None,
    shapes_key: str | None = None,
    n_workers: int | None = None,
) -> None:
    """Make Visium-sized pseudo-spots of transcripts, cells, bins or a protein image.

    Neither the transcripts nor the image are ever in memory as a whole: partitions and chunks are read, counted and
    dropped. The result does not depend on how they are cut, nor on the number of workers.

    Parameters
    ----------
    data
        A section, or a cohort of them. What was measured lies on the H&E: by the reader or by `register`.
    source
        ``"transcripts"``: counts of transcripts. ``"cells"``: sums of the counts, or means of the proteins, of the
        cells (or bins) whose centroids lie in a spot, each of the same weight. ``"image"``: mean intensity of each
        channel over the pixels whose centres lie in a spot, at the coarsest level of the pyramid with at least 20
        pixels across a spot.
    onto
        ``"hex"``: circles on a hexagonal lattice as Visium's. ``"grid"``: on a square one. ``"spots"``: shapes that
        are there, circles or polygons, as they are.
    spot_um, pitch_um
        Diameter of a circle, and distance of neighbouring centres, micrometres. Not used with ``onto="spots"``.
    min_quality
        Transcripts of a lower Phred-scaled quality (column ``qv``) are left out; `None`, or points without that
        column: none are.
    controls
        What the names of features that are no genes begin with; they are left out.
    min_units
        Spots with fewer transcripts, cells or pixels are left out. A lattice's circles are left out also where they
        do not lie wholly within what was measured (the box around all transcripts or centroids in the instrument's
        coordinates, the outline of the image) and within the H&E.
    points_key, image_key
        Names of the transcripts and of the protein image, where they are not the section's own.
    table_key
        The table of cells, where it is not the section's own. Of transcripts, those of its genes are counted;
        without any table all features that are found but controls.
    shapes_key
        With ``onto="spots"`` the shapes to aggregate onto; else the name to write the new ones under. ``"spots"`` by
        default.
    n_workers
        Threads; all cores by default. An active `dask.distributed` client is used instead.

    Returns
    -------
    Nothing; written are, replacing what an earlier call wrote, ``shapes["spots"]`` (circles, H&E px; not with
    ``onto="spots"``) and ``tables["spot_counts"]`` (X: CSR of int32) or ``tables["spot_proteins"]`` (X: float32),
    which later steps then take for the section's counts or proteins. ``obs`` has ``n_transcripts``, ``n_cells`` or
    ``n_pixels``, and ``array_row`` and ``array_col`` on a lattice. The table of cells stays.

    Raises
    ------
    KeyError
        If the section has no such source; the error says which it has.
    ValueError
        If the source is not placed on the H&E, the resolution is unknown, spots of another origin would be
        replaced, or no spot is left.

    Notes
    -----
    Paper, section 2.1: spots of 55 µm. On a circle's rim a point is inside; of polygons that share an edge, a point on
    it is in one.

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
        found: Transcripts | Units | Image
        if source == "transcripts":
            found = find_transcripts(
                sdata, points_key=points_key, table_key=table_key, min_quality=min_quality, controls=controls
            )
            options |= {"min_quality": min_quality if found.rule.quality else None, "controls": list(controls)}
        elif source == "cells":
            found = find_units(sdata, table_key=table_key)
        else:
            found = find_image(sdata, image_key=image_key)
        spots = _spots(sdata, found, name, onto=onto, sizes_um=(spot_um, pitch_um), n_workers=n_workers)
        measured = found.measure(spots.regions, n_workers)
        kept = measured.n_units >= min_units
        if not kept.any():
            raise ValueError(
                f"None of {len(kept)} spots of section {contract.sample(sdata)!r} holds {min_units} of its {source} "
                f"(most: {measured.n_units.max()}). Lower `min_units=`, or look at where they lie on the H&E."
            )
        table = _table(sdata, spots, measured, kept, source=source, options=options)
        _write(sdata, spots.shapes[kept], table, name=name, onto=onto)
        contract.record(sdata, "pp.aggregate", n_spots=table.n_obs, shapes=name, **options, **measured.notes)


def _check_source(sdata: SpatialData, source: Source, key: str | None) -> None:
    """Raise `KeyError`, saying what there is, where a section lacks what is to be aggregated."""
    there = {
        "transcripts": len(sdata.points) > 0,
        "cells": len(unit_tables(sdata)) > 0,
        "image": contract.MULTIPLEX in sdata.images,
    }
    if key is None and not there[source]:
        others = [f'source="{name}"' for name, found in there.items() if found]
        raise KeyError(
            f"Section {contract.sample(sdata)!r} has no {source} to aggregate. It has "
            f"{' and '.join(others) or 'none of the other sources either'}."
        )


def _spots(
    sdata: SpatialData,
    found: Transcripts | Units | Image,
    name: str,
    *,
    onto: Onto,
    sizes_um: tuple[float, float],
    n_workers: int | None,
) -> Spots:
    """The spots to aggregate onto, checked before anything is counted."""
    if onto == "spots":
        if name not in sdata.shapes:
            raise KeyError(
                f"No shapes {name!r} to aggregate onto; this section's shapes: {sorted(sdata.shapes)}. Choose with "
                '`shapes_key=`, or lay new spots with `onto="hex"`.'
            )
        return existing_spots(sdata, name)
    mpp = contract.require_mpp(sdata, purpose="`spot_um=`")
    _check_replaceable(sdata, name)
    field = found.field(n_workers)
    image = _he(sdata)
    if image is not None:
        height, width = contract.levels(sdata, image)[0].shape[1:]
        on_image = field.intersection(shapely.box(0, 0, width, height))
        if not isinstance(on_image, shapely.Polygon) or on_image.is_empty:
            raise ValueError(
                f"What was measured in section {contract.sample(sdata)!r} does not lie on its H&E of {width} x "
                f"{height} px. Is the alignment that of this image?"
            )
        field = on_image
    return lay_lattice(field, onto=onto, diameter=sizes_um[0] / mpp, pitch=sizes_um[1] / mpp)


def _he(sdata: SpatialData) -> str | None:
    """Name of the section's H&E; `None` for a section that was read without one."""
    return None if contract.info(sdata)["image"] is None else contract.image_name(sdata)


def _check_replaceable(sdata: SpatialData, name: str) -> None:
    """Raise `ValueError` where new spots would replace an element that no call of `aggregate` made."""
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
    centres = shapely.get_coordinates(shapely.centroid(spots.shapes.geometry.to_numpy()[kept]))
    table = AnnData(X=measured.values[kept], obs=obs, var=measured.var, obsm={"spatial": centres})
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
            contract.info(sdata).pop("counts" if other == contract.SPOT_COUNTS else "proteins", None)
        sdata.shapes.pop(name, None)
        sdata.shapes[name] = contract.build_shapes(shapes, mpp=contract.info(sdata)["mpp"])
    sdata.tables[written] = contract.annotate(table, region=name)
    contract.activate(sdata, against, written)
