"""Find the resolution of the H&E that an object of another tool states."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import shapely
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import contract

#: beginnings or ends of the names of elements in micrometers, by reader of spatialdata-io
_IN_MICRONS = {
    "xenium": ("cell_boundaries", "cell_circles", "nucleus_boundaries", "transcripts"),
    "merscope": ("_polygons", "_transcripts"),
}
#: plausible range of micrometers per pixel of a microscope
PLAUSIBLE = (0.05, 20.0)
_BIN = re.compile(r"square_(\d{3})um")


def stated_mpp(sdata: SpatialData, units: contract.Units | None) -> float | None:
    """Return the micrometers per pixel of the H&E that the object states, or `None`.

    Sources are the pitch of the Visium array, the side of Visium HD bins, elements that the reader wrote in
    micrometers, and elements with a coordinate system ``"microns"``.
    """
    mpp = None if units is None else _of_units(sdata, units)
    if mpp is None:
        mpp = next(_of_elements(sdata), None)
    if mpp is not None and not PLAUSIBLE[0] <= mpp <= PLAUSIBLE[1]:
        raise ValueError(
            f"The object states {mpp:.4g} micrometers per pixel of its H&E, which no microscope has. Pass `mpp=`."
        )
    return mpp


def _of_units(sdata: SpatialData, units: contract.Units) -> float | None:
    pitch = units.visium_pitch(sdata)
    if pitch:
        return contract.PITCH_UM / pitch
    size = _BIN.search(units.shapes)
    if size is None or units.shapes not in sdata.shapes:
        return None
    bins = contract.shapes_in_pixels(sdata, units.shapes)
    if "radius" in bins:
        side = 2.0 * float(np.median(bins["radius"]))
    else:
        side = float(np.sqrt(np.median(shapely.area(bins.geometry.to_numpy()))))
    return int(size[1]) / side


def _of_elements(sdata: SpatialData) -> Iterator[float]:
    frame = contract.pixel_frame(sdata)
    names = _IN_MICRONS.get(str(sdata.attrs.get("spatialdata_io_reader")), ())
    for kind, name, element in sdata.gen_spatial_elements():
        systems = get_transformation(element, get_all=True)
        if not set(systems) & set(frame.transformations) or name == frame.image:
            continue
        to_pixels = contract.scale_of(frame.matrix(element, name))
        if "microns" in systems:
            yield contract.scale_of(contract.affine(systems["microns"], name)) / to_pixels
        elif kind in ("shapes", "points") and any(name.startswith(word) or name.endswith(word) for word in names):
            yield 1.0 / to_pixels
