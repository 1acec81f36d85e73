"""Files that runs of Visium and of Visium HD have in common: names, scale factors and the H&E."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from stimage_sd.io._raster import open_raster, raster_size

#: largest relative difference between two sources of the same length or resolution
TOLERANCE = 0.05
POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
#: columns of x and y: in Space Ranger, the pixel column is x and the pixel row is y
PIXEL_COLUMNS = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
SCALEFACTORS = "scalefactors_json.json"
HIRES = "tissue_hires_image.png"


class HE(NamedTuple):
    """H&E of a run.

    - `levels`: levels, ``uint8 (3, y, x)``, finest first.
    - `scale`: pixels of the H&E per full-resolution pixel.
    - `mpp`: micrometers per pixel that the given image states, `None` if it states none.
    """

    levels: list[da.Array]
    scale: float
    mpp: float | None = None


def sample_name(folder: Path) -> str:
    """Return the name of a run, from its folder or its folder ``outs``."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "outs" else folder.name


def find_entry(folder: Path, name: str, *, separator: str = "") -> Path | None:
    """Return the file or folder with a name, with or without a prefix that ends in `separator`."""
    entries = [folder / name] if (folder / name).exists() else sorted(folder.glob(f"*{separator}{name}"))
    if len(entries) > 1:
        raise ValueError(
            f"Expected one {name} in {folder}, found {[entry.name for entry in entries]}. Give each run its own folder."
        )
    return entries[0] if entries else None


def read_scalefactors(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """Read the scale factors, and check that the wanted ones are positive numbers."""
    try:
        scales = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected JSON in {path}, found something else ({error}). Copy it again.") from error
    values = scales if isinstance(scales, dict) else {}
    wrong = [name for name in wanted if not (isinstance(values.get(name), int | float) and 0 < values[name] < np.inf)]
    if wrong:
        raise ValueError(
            f"Expected positive {wanted} in {path}, found {scales!r}; missing or not positive: {wrong}. Copy it again."
        )
    return values


def open_he(
    image: str | Path | None, *, hires: Path | None, hires_scale: float, beside: Path, sample: str, stacklevel: int
) -> HE:
    """Open the full-resolution image of a run, or its ``tissue_hires_image.png`` without `image`.

    - `image`: the full-resolution image.
    - `hires`, `hires_scale`: the image that Space Ranger wrote, and its pixels per full-resolution pixel.
    - `beside`, `sample`: a file beside `hires`, and the name of the sample, for messages.
    - `stacklevel`: level of the warnings, as seen from the caller.
    """
    if image is None:
        if hires is None:
            raise FileNotFoundError(
                f"Expected {HIRES} beside {beside}, found none. Pass the full-resolution image as `image=`."
            )
        warnings.warn(
            f"No full-resolution image given: {hires.name} is the H&E of {sample!r}, and its tiles will be "
            f"{1.0 / hires_scale:.1f} times coarser. Pass the input image of Space Ranger as `image=`.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
        return HE(open_raster(hires)[0], hires_scale)
    levels, mpp = open_raster(image)
    sizes = levels[0].shape[1:]
    implied = sizes if hires is None else [size / hires_scale for size in raster_size(hires)]
    if any(abs(size / expected - 1.0) > TOLERANCE for size, expected in zip(sizes, implied, strict=True)):
        warnings.warn(
            f"{image} has {sizes[1]} x {sizes[0]} px; the scale factors imply that the input image of Space Ranger had "
            f"about {implied[1]:.0f} x {implied[0]:.0f}. Pass that image as `image=` unless this is right.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
    return HE(levels, 1.0, mpp)
