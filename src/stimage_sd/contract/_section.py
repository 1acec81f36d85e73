"""Read and write the metadata of a section (sample, platform, resolution, history), and handle cohorts."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import __version__
from stimage_sd._settings import logger
from stimage_sd.contract._affine import affine, scale_of
from stimage_sd.contract._elements import add_microns
from stimage_sd.contract._names import ATTRIBUTE, Cohort

#: metadata of a section from other software
_UNKNOWN = {"sample": "section", "platform": "unknown", "image": None, "mpp": None}


def register(sdata: SpatialData, *, sample: str, platform: str, image: str | None, mpp: float | None) -> SpatialData:
    """Write the section metadata to ``sdata.attrs``, and add ``"microns"`` to the elements.

    Elements with the coordinate system ``"global"`` get ``"microns"`` if `mpp` is known.

    - `sdata`: the object to turn into a section.
    - `sample`: sample id.
    - `platform`: name of the measuring platform, such as ``"visium"``.
    - `image`: name of the H&E image element. `None` for a section without an H&E.
    - `mpp`: micrometers per pixel of the H&E at full resolution. `None` if unknown. Without an H&E, the micrometers per
      pixel of the instrument's image, whose pixels are then ``"global"``.
    - returns: the same object.
    """
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"Expected `mpp` to be a positive number of micrometers per pixel, found {mpp!r}.")
    if not str(sample) or "/" in str(sample):
        raise ValueError(f"Expected a sample id without a slash, which zarr stores cannot hold, found {sample!r}.")
    if image is not None and image not in sdata.images:
        raise ValueError(f"Expected an image named {image!r}, found {sorted(sdata.images)}.")
    about: dict[str, Any] = {
        "sample": str(sample),
        "platform": platform,
        "image": image,
        "mpp": None if mpp is None else float(mpp),
        "history": [],
    }
    if image is not None:
        about |= stated_of_image(sdata, image)
    sdata.attrs = {**sdata.attrs, ATTRIBUTE: about}
    if mpp is not None:
        for _, _, element in sdata.gen_spatial_elements():
            if "global" in get_transformation(element, get_all=True):
                add_microns(element, mpp)
    return sdata


def info(sdata: SpatialData) -> dict[str, Any]:
    """Return a copy of the section metadata: ``sample``, ``platform``, ``image``, ``mpp``, ``history``.

    Nothing is guessed for an object from other software. It has no resolution and no history, and its image is `None`
    until `image_name` finds it or the user names it. Use `remember` to write metadata.
    """
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"Expected a SpatialData section, found {type(sdata).__name__}.{_how_to_convert(sdata)}")
    return {**_UNKNOWN, "history": [], **sdata.attrs.get(ATTRIBUTE, {})}


def remember(sdata: SpatialData, **values: Any) -> None:
    """Write entries of the section metadata. `None` removes an entry."""
    # crops share the attrs of the whole section: replace the dict, so that the whole is not changed
    about = {**info(sdata), **values}
    sdata.attrs = {
        **sdata.attrs,
        ATTRIBUTE: {name: value for name, value in about.items() if value is not None or name in _UNKNOWN},
    }


def stated_of_image(sdata: SpatialData, name: str) -> dict[str, Any]:
    """Return the size and scales of an image, to detect later crops and resampling."""
    systems = get_transformation(sdata.images[name], get_all=True)
    scales = {system: scale_of(affine(after, name)) for system, after in systems.items()}
    return {"image_px": {name: image_shape(sdata.images[name])}, "image_scale": {name: scales}}


def image_shape(element: xr.DataArray | xr.DataTree) -> list[int]:
    """Return the height and width of an image at full resolution, px."""
    array = element if isinstance(element, xr.DataArray) else next(iter(element["scale0"].data_vars.values()))
    return [int(array.sizes["y"]), int(array.sizes["x"])]


def sample(sdata: SpatialData) -> str:
    """Return the section's sample id."""
    return str(info(sdata)["sample"])


def patients(cohort: Cohort, named: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the patient of each section of a cohort, as far as known.

    - `cohort`: sections by sample id. The patient of a section is ``sdata.attrs["stimage_sd"]["patient"]``.
    - `named`: patient by section, instead of what sections know. Sections that are not in the cohort are ignored.
    """
    known = {name: (named or {}).get(name, info(sdata).get("patient")) for name, sdata in cohort.items()}
    return {name: str(patient) for name, patient in known.items() if patient is not None}


def stain_of(sdata: SpatialData, image: str) -> str:
    """Return the stain normalization of an image as JSON, or an empty string for an image as it was read."""
    about = info(sdata)
    return json.dumps(about["stain"]) if about.get("normalized_image") == image else ""


def record(sdata: SpatialData, step: str, **parameters: Any) -> None:
    """Append a step and its parameters to the section's history."""
    entry = {
        "step": step,
        "parameters": plain(parameters),
        "version": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    remember(sdata, history=[*info(sdata)["history"], entry])
    logger.info("%s: %s", sample(sdata), step)
    logger.debug("%s: %s with %s", sample(sdata), step, entry["parameters"])


def plain(value: Any) -> Any:
    """Convert a parameter to plain types that JSON and zarr attributes can hold."""
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


def _how_to_convert(value: object) -> str:
    if not isinstance(value, AnnData):
        return ""
    return ' Make a section of an AnnData and its H&E: `stimage_sd.io.from_anndata(adata, "he.tif")`.'


def sections(data: SpatialData | Cohort) -> dict[str, SpatialData]:
    """Return `data` as a cohort. A single section becomes a cohort of one, under its sample id."""
    if isinstance(data, SpatialData):
        return {sample(data): data}
    if not isinstance(data, Mapping):
        raise TypeError(
            f"Expected a SpatialData section or a dict of them, found {type(data).__name__}.{_how_to_convert(data)}"
        )
    if not data:
        raise ValueError("Expected at least one section, found an empty cohort.")
    for name, sdata in data.items():
        if not isinstance(sdata, SpatialData):
            raise TypeError(
                f"Expected SpatialData under {name!r} of the cohort, found {type(sdata).__name__}."
                f"{_how_to_convert(sdata)}"
            )
    return dict(data)


def section(data: SpatialData | Cohort) -> SpatialData:
    """Return `data` as a single section."""
    if isinstance(data, SpatialData):
        return data
    cohort = sections(data)
    if len(cohort) > 1:
        raise ValueError(
            f"Expected one section, found a cohort of {len(cohort)}: {list(cohort)[:5]}. Pass one of them, such as "
            f"`data[{next(iter(cohort))!r}]`."
        )
    return next(iter(cohort.values()))
