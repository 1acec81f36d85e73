"""What belongs to a section as a whole: sample, platform, resolution, history; and cohorts of sections."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import __version__
from stimage_sd.contract._elements import add_microns
from stimage_sd.contract._names import ATTRIBUTE, Cohort


def register(sdata: SpatialData, *, sample: str, platform: str, image: str | None, mpp: float | None) -> SpatialData:
    """Write what belongs to a section into ``sdata.attrs`` and give every element its coordinate systems.

    Parameters
    ----------
    sdata
        The object that becomes a section.
    sample
        Sample id.
    platform
        Name of the measuring platform, such as ``"visium"``.
    image
        Name of the H&E image element; `None` for a section without one.
    mpp
        Micrometres a pixel of the H&E at full resolution; `None` where unknown. Without an H&E that of the
        instrument's own image, whose pixels are then ``"global"``.

    Returns
    -------
    The same object.

    Raises
    ------
    ValueError
        If `mpp` is not a positive number, `sample` is empty or has a slash, or `image` is no element of `sdata`.
    """
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"Expected `mpp` to be a positive number of micrometres a pixel, found {mpp!r}.")
    if not str(sample) or "/" in str(sample):
        raise ValueError(f"Expected a sample id without a slash, which zarr stores cannot hold, found {sample!r}.")
    if image is not None and image not in sdata.images:
        raise ValueError(f"Expected an image named {image!r}, found {sorted(sdata.images)}.")
    sdata.attrs[ATTRIBUTE] = {
        "sample": str(sample),
        "platform": platform,
        "image": image,
        "mpp": None if mpp is None else float(mpp),
        "history": [],
    }
    if mpp is not None:
        for _, _, element in sdata.gen_spatial_elements():
            if "global" in get_transformation(element, get_all=True):
                add_microns(element, mpp)
    return sdata


def info(sdata: SpatialData) -> dict[str, Any]:
    """Return what belongs to the section: ``sample``, ``platform``, ``image``, ``mpp``, ``history``.

    An object that no reader of this package made gets an entry of what can be told without a guess: no
    resolution, no history, and `None` for the image until `image_name` finds it or the user names it.

    Raises
    ------
    TypeError
        If `sdata` is not a `SpatialData`.
    """
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"Expected a SpatialData section, found {type(sdata).__name__}.")
    if ATTRIBUTE not in sdata.attrs:
        sdata.attrs[ATTRIBUTE] = {
            "sample": "section",
            "platform": "unknown",
            "image": None,
            "mpp": None,
            "history": [],
        }
    return sdata.attrs[ATTRIBUTE]


def sample(sdata: SpatialData) -> str:
    """Return the section's sample id."""
    return str(info(sdata)["sample"])


def require_mpp(sdata: SpatialData, *, purpose: str) -> float:
    """Return micrometres a pixel at full resolution.

    Raises
    ------
    ValueError
        If the section's resolution is unknown; it is never guessed.
    """
    mpp = info(sdata)["mpp"]
    if mpp is None:
        raise ValueError(
            f"Section {sample(sdata)!r} has no known resolution, which {purpose} needs. Pass `mpp=` (micrometres "
            f'a pixel at full resolution) to the reader, or set `sdata.attrs["{ATTRIBUTE}"]["mpp"]`.'
        )
    return float(mpp)


def record(sdata: SpatialData, step: str, **parameters: Any) -> None:
    """Append a step and its parameters to the section's history."""
    info(sdata)["history"].append(
        {
            "step": step,
            "parameters": plain(parameters),
            "version": __version__,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )


def plain(value: Any) -> Any:
    """Turn a parameter into what JSON, and so a zarr store's attributes, can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def sections(data: SpatialData | Cohort) -> dict[str, SpatialData]:
    """Return a cohort: `data` itself where it is one, a section under its sample id otherwise.

    Raises
    ------
    TypeError
        If `data` is neither a section nor a mapping of sections.
    ValueError
        If the cohort is empty.
    """
    if isinstance(data, SpatialData):
        return {sample(data): data}
    if not isinstance(data, Mapping):
        raise TypeError(f"Expected a SpatialData section or a dict of them, found {type(data).__name__}.")
    if not data:
        raise ValueError("Expected at least one section, found an empty cohort.")
    for name, sdata in data.items():
        if not isinstance(sdata, SpatialData):
            raise TypeError(f"Expected SpatialData under {name!r} of the cohort, found {type(sdata).__name__}.")
    return dict(data)
