"""Nuclei, and what explanations say of them: read and written here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import spatialdata
import xarray as xr
from spatialdata import SpatialData
from spatialdata.transformations import Identity, get_transformation

from stimage_sd.contract._elements import annotate, build_shapes
from stimage_sd.contract._names import EXPLANATIONS, NUCLEI, NUCLEI_EXPLAINED, SEGMENTS_EXPLAINED, TILE_SQUARES
from stimage_sd.contract._section import info, sample

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame


class LabelWindow(NamedTuple):
    """A part of a labels element.

    Attributes
    ----------
    labels
        ``int (y, x)``.
    left, top
        H&E pixels of its first pixel's corner.
    pixel
        H&E pixels that one of its pixels spans, along x and y.
    """

    labels: np.ndarray
    left: float
    top: float
    pixel: tuple[float, float]


def nuclei(sdata: SpatialData, shapes_key: str | None = None) -> GeoDataFrame:
    """Return the nuclei as polygons in H&E pixels.

    Parameters
    ----------
    sdata
        The section.
    shapes_key
        Name of their shapes; ``"nuclei"`` by default.

    Raises
    ------
    KeyError
        If there are none.
    """
    name = NUCLEI if shapes_key is None else shapes_key
    if name not in sdata.shapes:
        raise KeyError(
            f"Section {sample(sdata)!r} has no shapes {name!r} (found {sorted(sdata.shapes)}). Run "
            "`stimage_sd.pp.segment_nuclei(sdata)` first, or name others with `shapes_key=`."
        )
    frame = sdata.shapes[name]
    placed = get_transformation(frame, get_all=True)
    if "global" not in placed:
        raise ValueError(
            f"The shapes {name!r} of section {sample(sdata)!r} are not placed on its H&E yet (they lie in "
            f"{sorted(placed)}). Run `stimage_sd.pp.register(sdata)`, or pass the reader the alignment."
        )
    if not isinstance(placed["global"], Identity):
        frame = spatialdata.transform(frame, to_coordinate_system="global")
    if "radius" in frame.columns and len(frame) and frame.geometry.iloc[0].geom_type == "Point":
        frame = frame.assign(geometry=frame.geometry.buffer(frame["radius"])).drop(columns="radius")
    return frame


def label_window(sdata: SpatialData, name: str, box: tuple[float, float, float, float]) -> LabelWindow:
    """Return what a labels element has in a box; only that part is read.

    Parameters
    ----------
    sdata
        The section.
    name
        Name of the labels.
    box
        Left, top, right and bottom, H&E pixels.

    Raises
    ------
    KeyError
        If there are no such labels.
    ValueError
        If they do not lie straight on the H&E.
    """
    if name not in sdata.labels:
        raise KeyError(f"No labels {name!r} in section {sample(sdata)!r}; its labels: {sorted(sdata.labels)}.")
    element = sdata.labels[name]
    matrix = get_transformation(element, to_coordinate_system="global").to_affine_matrix(("x", "y"), ("x", "y"))
    if matrix[0, 1] or matrix[1, 0] or min(matrix[0, 0], matrix[1, 1]) <= 0:
        raise ValueError(f"Expected labels that lie straight on the H&E, found {name!r} turned or mirrored.")
    array = element if isinstance(element, xr.DataArray) else next(iter(element["scale0"].data_vars.values()))
    pixel, shift = (float(matrix[0, 0]), float(matrix[1, 1])), (float(matrix[0, 2]), float(matrix[1, 2]))
    (x0, x1), (y0, y1) = (
        (
            int(np.clip(np.floor((box[axis] - shift[axis]) / pixel[axis]), 0, size)),
            int(np.clip(np.ceil((box[axis + 2] - shift[axis]) / pixel[axis]), 0, size)),
        )
        for axis, size in ((0, array.sizes["x"]), (1, array.sizes["y"]))
    )
    part = np.asarray(array.transpose("y", "x").data[y0:y1, x0:x1])
    return LabelWindow(part, x0 * pixel[0] + shift[0], y0 * pixel[1] + shift[1], pixel)


def explained(sdata: SpatialData) -> GeoDataFrame:
    """Return the explained nuclei, or else the explained segments of another kind.

    Raises
    ------
    KeyError
        If nothing was explained yet.
    """
    for name in (NUCLEI_EXPLAINED, SEGMENTS_EXPLAINED):
        if name in sdata.shapes:
            return sdata.shapes[name]
    raise KeyError(
        f"Section {sample(sdata)!r} has no explained nuclei. Run `stimage_sd.tl.explain(sdata, model, gene)` first."
    )


def explanations(sdata: SpatialData) -> AnnData:
    """Return the table of explained tiles, ``obs`` = tiles, ``var`` = genes.

    Raises
    ------
    KeyError
        If nothing was explained yet.
    """
    if EXPLANATIONS not in sdata.tables:
        raise KeyError(
            f"Section {sample(sdata)!r} has no explained tiles. Run `stimage_sd.tl.explain(sdata, model, gene)` first."
        )
    return sdata.tables[EXPLANATIONS]


def write_explained(sdata: SpatialData, frame: GeoDataFrame, *, of_nuclei: bool = True) -> None:
    """Write explained nuclei, or segments of another kind; they replace earlier ones of either kind."""
    shapes = build_shapes(frame, mpp=info(sdata)["mpp"])
    for name in (NUCLEI_EXPLAINED, SEGMENTS_EXPLAINED):
        if name in sdata.shapes:
            del sdata.shapes[name]
    sdata.shapes[NUCLEI_EXPLAINED if of_nuclei else SEGMENTS_EXPLAINED] = shapes


def write_explanations(sdata: SpatialData, table: AnnData) -> None:
    """Write the table of explained tiles; replaces an earlier one."""
    parsed = annotate(table, region=TILE_SQUARES)
    if EXPLANATIONS in sdata.tables:
        del sdata.tables[EXPLANATIONS]
    sdata.tables[EXPLANATIONS] = parsed
