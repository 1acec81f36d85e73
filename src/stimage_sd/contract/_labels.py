"""Read labels in the pixels of the H&E: as a mask, as a window, or as the centers of labeled cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy.ndimage import affine_transform
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd._zarr_chunks import guarded
from stimage_sd.contract._affine import affine, apply, scale_of
from stimage_sd.contract._frame import pixel_frame
from stimage_sd.contract._names import CHUNK
from stimage_sd.contract._section import sample

#: longest side of a mask in memory, px
_MASK_SIDE = 4096


class LabelWindow(NamedTuple):
    """A rectangular part of a labels element.

    - `labels`: ``int (y, x)``.
    - `left`, `top`: corner of the first label pixel, px of the H&E.
    - `pixel`: H&E pixels per label pixel, along x and y.
    """

    labels: np.ndarray
    left: float
    top: float
    pixel: tuple[float, float]


def finest_labels(sdata: SpatialData, name: str) -> xr.DataArray:
    """Return labels at their finest resolution, ``(y, x)``."""
    if name not in sdata.labels:
        raise KeyError(f"No labels {name!r} in section {sample(sdata)!r}; its labels: {sorted(sdata.labels)}.")
    element = sdata.labels[name]
    array = element if isinstance(element, xr.DataArray) else next(iter(element["scale0"].data_vars.values()))
    array = array.transpose("y", "x")
    return array.copy(data=guarded(array.data)) if isinstance(array.data, da.Array) else array


def label_window(sdata: SpatialData, name: str, box: tuple[float, float, float, float]) -> LabelWindow:
    """Return the part of a labels element inside a box, and read only that part.

    - `sdata`: the section.
    - `name`: name of the labels.
    - `box`: left, top, right and bottom, px of the H&E.
    """
    array = finest_labels(sdata, name)
    matrix = pixel_frame(sdata).matrix(sdata.labels[name], name)
    if max(abs(matrix[0, 1]), abs(matrix[1, 0])) > 1e-9 or min(matrix[0, 0], matrix[1, 1]) <= 0:
        raise ValueError(f"Expected labels that lie straight on the H&E, found {name!r} turned or mirrored.")
    pixel, shift = (float(matrix[0, 0]), float(matrix[1, 1])), (float(matrix[0, 2]), float(matrix[1, 2]))
    (x0, x1), (y0, y1) = (
        (
            int(np.clip(np.floor((box[axis] - shift[axis]) / pixel[axis]), 0, size)),
            int(np.clip(np.ceil((box[axis + 2] - shift[axis]) / pixel[axis]), 0, size)),
        )
        for axis, size in ((0, array.sizes["x"]), (1, array.sizes["y"]))
    )
    part = np.asarray(array.data[y0:y1, x0:x1])
    return LabelWindow(part, x0 * pixel[0] + shift[0], y0 * pixel[1] + shift[1], pixel)


def mask_in_pixels(
    sdata: SpatialData, name: str, image_key: str | None = None
) -> tuple[NDArray[np.bool_], tuple[float, float]]:
    """Return a mask of the nonzero labels over the whole H&E or another image.

    - returns: ``bool (y, x)``, and the H&E pixels per mask pixel, along y and x. Labels that cover the H&E are not
      resampled. Other labels, such as those of a cropped or rotated section, are sampled by nearest neighbor.
    """
    finest = finest_labels(sdata, name)
    # labels from other software may be as large as the slide
    step = max(1, -(-max(finest.shape) // _MASK_SIDE))
    mask = np.asarray(finest.data[step // 2 :: step, step // 2 :: step]) > 0
    frame = pixel_frame(sdata, image_key)
    matrix = frame.matrix(sdata.labels[name], name) @ np.diag([step, step, 1.0])
    corner = np.array([mask.shape[1], mask.shape[0], 1.0])
    if frame.size is None:
        return mask, (float(matrix[1, 1]), float(matrix[0, 0]))
    width, height = frame.size
    whole = np.diag([width / mask.shape[1], height / mask.shape[0], 1.0])
    if np.abs(matrix - whole).max() * corner.max() < 1e-6 * max(frame.size):
        return mask, (height / mask.shape[0], width / mask.shape[1])
    pixel = max(scale_of(matrix), 1.0)
    shape = max(1, round(height / pixel)), max(1, round(width / pixel))
    span = (height / shape[0], width / shape[1])
    # affine_transform counts pixels from their centers, transformations from their corners
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    back = np.linalg.inv(half) @ np.linalg.inv(matrix) @ np.diag([span[1], span[0], 1.0]) @ half
    laid = affine_transform(mask.astype(np.uint8), back[np.ix_([1, 0, 2], [1, 0, 2])], output_shape=shape, order=0)
    return laid > 0, span


def label_centers(sdata: SpatialData, name: str, image_key: str | None = None) -> pd.DataFrame:
    """Return the centers of labeled cells in px of the H&E or another image.

    The table has one row per label, with ``x`` and ``y``. Labels are read chunk by chunk, so the whole array is never
    in memory.
    """
    sums = _label_sums(finest_labels(sdata, name))
    matrix = pixel_frame(sdata, image_key).matrix(sdata.labels[name], name)
    return pd.DataFrame(apply(matrix, sums[["x", "y"]].to_numpy()), columns=["x", "y"], index=sums.index)


def label_circles(sdata: SpatialData, name: str, coordinate_system: str) -> pd.DataFrame:
    """Return labeled cells as circles of equal area in a coordinate system.

    The table has one row per label, with ``x``, ``y`` and ``radius``.
    """
    sums = _label_sums(finest_labels(sdata, name))
    matrix = affine(get_transformation(sdata.labels[name], coordinate_system), name)
    circles = pd.DataFrame(apply(matrix, sums[["x", "y"]].to_numpy()), columns=["x", "y"], index=sums.index)
    return circles.assign(radius=np.sqrt(sums["n"] / np.pi) * scale_of(matrix))


def _label_sums(array: xr.DataArray) -> pd.DataFrame:
    """Return the number of pixels ``n`` and the mean ``x`` and ``y`` per label."""
    lazy = array.data if hasattr(array.data, "to_delayed") else array.chunk({"y": CHUNK, "x": CHUNK}).data
    tops, lefts = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in lazy.chunks)
    blocks = lazy.to_delayed()
    sums = [
        dask.delayed(_sums)(blocks[row, column], int(tops[row]), int(lefts[column]))
        for row, column in np.ndindex(blocks.shape)
    ]
    total = pd.concat(dask.compute(*sums)).groupby(level=0).sum()
    return total.assign(x=total["x"] / total["n"], y=total["y"] / total["n"])


def _sums(block: NDArray[np.integer[Any]], top: int, left: int) -> pd.DataFrame:
    """Return the number of pixels ``n`` and the sums of x and y per label of a block."""
    rows, columns = np.nonzero(block)
    labels, member = np.unique(block[rows, columns], return_inverse=True)
    weights = {"n": None, "x": columns + left + 0.5, "y": rows + top + 0.5}
    return pd.DataFrame(
        {key: np.bincount(member, weights=value, minlength=len(labels)) for key, value in weights.items()}, index=labels
    )
