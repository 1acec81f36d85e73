"""Transform elements to the pixels of an image.

A `Frame` is the pixel grid of one image, by default the section's H&E. Positions, lengths and results are in these
pixels. An element is placed through any coordinate system that it shares with the image. A section without an H&E has
the frame of its coordinate system ``"global"``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
import xarray as xr
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, ShapesModel
from spatialdata.transformations import BaseTransformation, Identity, Scale, Sequence, get_transformation

from stimage_sd.contract._affine import affine, apply, apply_rounded, scale_of, turned
from stimage_sd.contract._images import find_image
from stimage_sd.contract._section import image_shape, info, sample

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

#: largest distance between the places that two coordinate systems give an element, px
_SAME_PLACE = 0.5
#: largest ratio of the axes of a stretched circle that still counts as a circle
_MOST_STRETCH = 1.02
#: matrix entries this close to a whole number are rounded to it
_ROUNDING = 1e-9
#: least ratio of pixel sizes for one image to be a lower-resolution copy of another
_LARGER = 1.02
#: words for the resolution in the names of Visium images
_RESOLUTION = re.compile("fullres|full|hires|lowres")
_XY = ("x", "y")


@dataclass(frozen=True)
class Frame:
    """The pixel grid of an image.

    - `image`: name of the image. `None` for a section without an H&E.
    - `size`: width and height, px. `None` without an image.
    - `sample`: sample id, for error messages.
    - `transformations`: SpatialData transformations from the pixels to each coordinate system of the image.
    - `coordinate_system`: the coordinate system that the user named. `None` allows any.
    """

    image: str | None
    size: tuple[int, int] | None
    sample: str
    transformations: Mapping[str, BaseTransformation]
    coordinate_system: str | None

    def matrix(self, element: Any, name: str) -> NDArray[np.float64]:
        """Return the ``(3, 3)`` matrix from an element's intrinsic ``(x, y, 1)`` to pixels."""
        placed = get_transformation(element, get_all=True)
        shared = [system for system in self.transformations if system in placed]
        if self.coordinate_system is not None:
            shared = [system for system in shared if system == self.coordinate_system]
        if not shared:
            raise ValueError(self._not_placed(name, sorted(placed)))
        matrices = {system: self._through(system, placed[system], name) for system in shared}
        first = matrices["global" if "global" in matrices else shared[0]]
        for system, matrix in matrices.items():
            if self._apart(first, matrix) > _SAME_PLACE:
                raise ValueError(
                    f"The coordinate systems {sorted(matrices)} of section {self.sample!r} place {name!r} at different "
                    f"pixels of {self.image!r} ({system!r} is {self._apart(first, matrix):.1f} px off). Say which one "
                    "is right with `stimage_sd.io.from_spatialdata(sdata, coordinate_system=...)`."
                )
        return first

    def _through(self, system: str, placed: BaseTransformation, name: str) -> NDArray[np.float64]:
        to_system = affine(self.transformations[system], str(self.image))
        if abs(np.linalg.det(to_system[:2, :2])) < 1e-12:
            raise ValueError(
                f"The transformation of {self.image!r} to {system!r} is not invertible: {to_system.tolist()}. Set an "
                "invertible one with `spatialdata.transformations.set_transformation`."
            )
        from_element = affine(placed, name)
        matrix = np.linalg.inv(to_system) @ from_element
        # crops move by whole pixels; remove floating-point noise from these
        whole = np.round(matrix)
        return np.where(np.abs(matrix - whole) < _ROUNDING, whole, matrix)

    def _apart(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        """Return the largest distance between two matrices' results over the image corners, px."""
        width, height = self.size or (1000, 1000)
        corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], dtype=np.float64).T
        return float(np.abs(other @ np.linalg.pinv(one) @ corners - corners)[:2].max())

    def _not_placed(self, name: str, placed: list[str]) -> str:
        where = f"its coordinate systems are {placed}, those of the H&E {self.image!r} {sorted(self.transformations)}"
        if self.coordinate_system is not None:
            return f"{name!r} of section {self.sample!r} is not placed in {self.coordinate_system!r}: {where}."
        return (
            f"{name!r} of section {self.sample!r} is not placed on its H&E yet: {where}. Run "
            "`stimage_sd.pp.register(sdata)`, pass the reader the alignment, or set a common one with "
            "`spatialdata.transformations.set_transformation`."
        )

    def shapes(self, frame: GeoDataFrame) -> GeoDataFrame:
        """Build a shapes element from pixel coordinates, with every coordinate system of the image."""
        return ShapesModel.parse(frame, transformations=dict(self.transformations))

    def labels(self, values: NDArray[np.integer[Any]], *, downsample: tuple[float, float]) -> xr.DataArray:
        """Build a labels element ``(y, x)`` with `downsample` image pixels per label pixel, along y and x."""
        to_pixels = Scale(list(downsample), axes=("y", "x"))
        placed = {name: Sequence([to_pixels, after]) for name, after in self.transformations.items()}
        return Labels2DModel.parse(values, dims=("y", "x"), transformations=placed)


def pixel_frame(sdata: SpatialData, image_key: str | None = None) -> Frame:
    """Return the frame of an image, by default of the section's H&E.

    A section that was read without an H&E has the frame of its coordinate system ``"global"``.
    """
    about = info(sdata)
    named = about.get("coordinate_system")
    if image_key is None and is_without_image(sdata):
        systems: dict[str, BaseTransformation] = {"global" if named is None else named: Identity()}
        if about["mpp"] is not None and named is None:
            systems["microns"] = Scale([float(about["mpp"])] * 2, axes=_XY)
        return Frame(None, None, sample(sdata), systems, named)
    name = find_image(sdata, image_key)
    height, width = image_shape(sdata.images[name])
    systems = get_transformation(sdata.images[name], get_all=True)
    return Frame(name, (width, height), sample(sdata), systems, named)


def is_without_image(sdata: SpatialData) -> bool:
    """Return whether the section was read without an H&E."""
    about = info(sdata)
    return about["image"] is None and (about["platform"] != "unknown" or not sdata.images)


def image_size(sdata: SpatialData, image_key: str | None = None) -> tuple[int, int]:
    """Return the width and height of an image in px, by default of the H&E."""
    height, width = image_shape(sdata.images[find_image(sdata, image_key)])
    return width, height


def image_extent(sdata: SpatialData, name: str) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top of an image in pixels of the H&E, to draw the image under a map."""
    matrix = pixel_frame(sdata).matrix(sdata.images[name], name)
    if turned(matrix):
        raise ValueError(f"The image {name!r} is rotated or mirrored on the H&E, so maps cannot be drawn on it.")
    (left, top), (right, bottom) = apply(matrix, np.array([[0, 0], image_size(sdata, name)], dtype=np.float64))
    return float(left), float(right), float(bottom), float(top)


def pictures(sdata: SpatialData, names: list[str]) -> list[list[str]]:
    """Group images that are copies of one picture at several resolutions, finest first in each group.

    Images of the same resolution are different pictures. So are images that do not cover the same area.
    """
    groups: list[list[str]] = []
    frames = {name: pixel_frame(sdata, name) for name in names}
    for name in sorted(names, key=lambda name: (-float(np.prod(frames[name].size or (0, 0))), names.index(name))):
        for group in groups:
            if _is_copy(sdata, frames[group[0]], name, frames[name].size or (1, 1)):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _is_copy(sdata: SpatialData, of: Frame, name: str, size: tuple[int, int]) -> bool:
    """Return whether an image covers the same area as another image, with larger pixels."""
    systems = get_transformation(sdata.images[name], get_all=True)
    if not set(systems) & set(of.transformations) or of.size is None:
        return False
    matrix = of.matrix(sdata.images[name], name)
    width, height = size
    corners = apply(matrix, np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64))
    apart = np.abs([corners.min(axis=0), corners.max(axis=0) - of.size]).max()
    same_place = apart < 0.02 * max(of.size)
    # Space Ranger's high-resolution image of a small slide may have the size of the slide
    same_name = _RESOLUTION.sub("", name) == _RESOLUTION.sub("", str(of.image))
    return bool(same_place and (scale_of(matrix) > _LARGER or same_name))


def mpp(sdata: SpatialData, image_key: str | None = None) -> float | None:
    """Return the micrometers per pixel of an image, by default of the H&E, or `None` if unknown.

    The section stores the resolution of the H&E as it was read. For a resampled H&E or another image, the stored value
    is scaled through a shared coordinate system. Without a stored value, the coordinate system ``"microns"`` is used.
    """
    about = info(sdata)
    stated, home = about["mpp"], about["image"]
    if image_key is None and is_without_image(sdata):
        return None if stated is None else float(stated)
    name = find_image(sdata, image_key)
    systems = get_transformation(sdata.images[name], get_all=True)
    if stated is None:
        # spatialdata.concatenate renames the coordinate system to "microns-<sample>"
        microns = [system for system in systems if system.split("-")[0] == "microns"]
        return scale_of(affine(systems[microns[0]], name)) if len(microns) == 1 else None
    if home is None:
        return float(stated)
    if name != home and home in sdata.images:
        frame = pixel_frame(sdata)
        if not set(systems) & set(frame.transformations):
            return None
        return scale_of(frame.matrix(sdata.images[name], name)) * float(mpp(sdata, home) or 0.0) or None
    size = about.get("image_px", {}).get(home)
    before = about.get("image_scale", {}).get(home, {})
    if name == home and (size is None or list(size) == image_shape(sdata.images[name])):
        return float(stated)
    shared = [system for system in before if system in systems]
    if not shared:
        return None
    return float(stated) * scale_of(affine(systems[shared[0]], name)) / float(before[shared[0]])


def require_mpp(sdata: SpatialData, *, purpose: str, image_key: str | None = None) -> float:
    """Return the micrometers per pixel of an image, by default of the H&E."""
    resolution = mpp(sdata, image_key)
    if resolution is None:
        raise ValueError(
            f"Section {sample(sdata)!r} has no known resolution, which {purpose} needs. Pass `mpp=` (micrometers per "
            "pixel at full resolution) to the reader, or call `stimage_sd.io.from_spatialdata(sdata, mpp=...)`."
        )
    return resolution


def shapes_in_pixels(sdata: SpatialData, name: str, *, image_key: str | None = None) -> GeoDataFrame:
    """Return shapes with geometry and radius in pixels of the H&E or of another image."""
    element, matrix = _shapes_and_matrix(sdata, name, image_key)
    if np.array_equal(matrix, np.eye(3)):
        return element
    geometry = shapely.transform(shapely.force_2d(element.geometry.to_numpy()), lambda points: apply(matrix, points))
    moved = element.set_geometry(type(element.geometry)(geometry, index=element.index), inplace=False)
    if "radius" in element:
        moved["radius"] = element["radius"].to_numpy(dtype=np.float64) * _stretch(matrix, name)
    return moved


def _shapes_and_matrix(
    sdata: SpatialData, name: str, image_key: str | None
) -> tuple[GeoDataFrame, NDArray[np.float64]]:
    if name not in sdata.shapes:
        raise KeyError(f"No shapes {name!r} in section {sample(sdata)!r}; its shapes: {sorted(sdata.shapes)}.")
    element = sdata.shapes[name]
    return element, pixel_frame(sdata, image_key).matrix(element, name)


def _stretch(matrix: NDArray[np.float64], name: str) -> float:
    """Return the factor by which a matrix scales the radius of circles."""
    longest, shortest = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if longest > _MOST_STRETCH * shortest:
        raise ValueError(
            f"The transformation of {name!r} makes its circles ellipses ({longest / shortest:.2f} times as long as "
            "wide). Replace the circles by polygons, for instance with `geometry.buffer(radius)`."
        )
    return scale_of(matrix)


def centers_in_pixels(sdata: SpatialData, name: str, *, image_key: str | None = None) -> NDArray[np.float64]:
    """Return the centers of shapes, ``(n, 2)`` x and y, px of the H&E or of another image.

    The center of a polygon is its centroid. Empty geometries get NaN.
    """
    element, matrix = _shapes_and_matrix(sdata, name, image_key)
    middles = shapely.centroid(element.geometry.to_numpy())
    # get_coordinates skips empty geometries; they keep their row, with NaN
    places = np.full((len(middles), 2), np.nan)
    there = ~shapely.is_empty(middles)
    places[there] = shapely.get_coordinates(middles[there])
    return apply_rounded(matrix, places)
