"""The section contract: the one place that knows how a section lies in a SpatialData object.

A *section* is one tissue section, held by one `SpatialData`; a *cohort* is a mapping from sample id
to section. Every other module asks this one for the H&E image, the spots, the counts, the tissue, the
tiles and the predictions, and hands it what is to be written, so that element names, coordinate
systems and the errors about missing steps are spelled out here and nowhere else.

Coordinates: `"global"` is pixels of the H&E at full resolution, `"microns"` the same in micrometres
where the section's resolution (`mpp`, micrometres a pixel) is known.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import xarray as xr
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import (
    BaseTransformation,
    Identity,
    Scale,
    Sequence,
    get_transformation,
    set_transformation,
)

from stimage_sd import __version__

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

ATTRIBUTE = "stimage_sd"
IMAGE = "he"
NORMALIZED = "he_normalized"
SPOTS = "spots"
COUNTS = "counts"
TISSUE = "tissue"
TILES = "tiles"
#: the tiles' geometry; SpatialData wants every element's name unique, so it cannot be "tiles" as well
TILE_SQUARES = "tile_squares"
PREDICTIONS = "predictions"
_OWN_TABLES = (TILES, PREDICTIONS)

REGION_KEY = "region"
INSTANCE_KEY = "instance_id"
#: side of an image chunk, px: one is read, normalised and cut at a time
CHUNK = 1024

Cohort = Mapping[str, SpatialData]


# --------------------------------------------------------------------------------------------------
# what belongs to the section


def register(sdata: SpatialData, *, sample: str, platform: str, image: str, mpp: float | None) -> SpatialData:
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
        Name of the H&E image element.
    mpp
        Micrometres a pixel of the H&E at full resolution; `None` where unknown.

    Returns
    -------
    The same object.

    Raises
    ------
    ValueError
        If `mpp` is not a positive number, or `image` is no element of `sdata`.
    """
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"Expected `mpp` to be a positive number of micrometres a pixel, found {mpp!r}.")
    if image not in sdata.images:
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
            _add_microns(element, mpp)
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


# --------------------------------------------------------------------------------------------------
# images


def image_name(sdata: SpatialData, image_key: str | None = None) -> str:
    """Return the name of the section's H&E image, or `image_key` where it is one of its images.

    In an object that no reader of this package made, the H&E is its single RGB image, or the first that
    `image_key` names.

    Raises
    ------
    KeyError
        If there is no such image, or which one is the H&E cannot be told.
    """
    section = info(sdata)
    name = image_key if image_key is not None else section["image"]
    if name is None:
        name = _single(
            [name for name in sdata.images if _is_rgb(levels(sdata, name)[0])],
            what="RGB image",
            argument="image_key",
            found=sorted(sdata.images),
        )
    if name not in sdata.images:
        raise KeyError(f"No image {name!r} in section {sample(sdata)!r}; its images: {sorted(sdata.images)}.")
    if section["image"] is None and _is_rgb(levels(sdata, name)[0]):
        section["image"] = name
    return name


def working_image_name(sdata: SpatialData, image_key: str | None = None) -> str:
    """Return `image_key`, else the stain-normalised H&E where there is one, else the H&E."""
    normalized = info(sdata).get("normalized_image")
    if image_key is None and normalized in sdata.images:
        return str(normalized)
    return image_name(sdata, image_key)


def levels(sdata: SpatialData, name: str) -> list[xr.DataArray]:
    """Return the pyramid of an image element, finest first, each ``(c, y, x)`` and dask-backed."""
    element = sdata.images[name]
    if isinstance(element, xr.DataArray):
        arrays = [element]
    else:
        arrays = [next(iter(element[scale].data_vars.values())) for scale in element.children]
    arrays = [array.transpose("c", "y", "x") for array in arrays]
    return [
        array
        if isinstance(array.data, da.Array)
        else array.copy(data=da.from_array(array.data, chunks=(-1, CHUNK, CHUNK)))
        for array in arrays
    ]


def thumbnail(sdata: SpatialData, name: str, *, max_side: int = 1500) -> tuple[np.ndarray, float]:
    """Return a small copy of an image and how many full-resolution pixels one of its pixels spans.

    The finest level whose longer side is at most `max_side` is read; an image without such a level is
    strided down lazily, so that the full resolution never stands in memory.

    Parameters
    ----------
    sdata
        The section.
    name
        Name of an image element.
    max_side
        Longest side of the thumbnail, px.

    Returns
    -------
    The thumbnail, ``uint8 (y, x, 3)``, and its downsampling factor.
    """
    pyramid = levels(sdata, name)
    fitting = [array for array in pyramid if max(array.shape[1:]) <= max_side]
    if fitting:
        chosen = fitting[0].data
    else:
        step = int(np.ceil(max(pyramid[-1].shape[1:]) / max_side))
        chosen = pyramid[-1].data[:, ::step, ::step]
    small = np.ascontiguousarray(np.moveaxis(np.asarray(chosen.compute()), 0, -1))
    return small, pyramid[0].shape[2] / small.shape[1]


def check_rgb(sdata: SpatialData, name: str) -> None:
    """Raise `ValueError` where an image is not three channels of 8 bit."""
    array = levels(sdata, name)[0]
    if not _is_rgb(array):
        raise ValueError(
            f"Expected the H&E {name!r} to be 8-bit RGB (3 channels of uint8), found {array.shape[0]} channel(s) of "
            f"{array.dtype}. Choose another image with `image_key=`, or convert it."
        )


def build_image(pyramid: list[da.Array], *, mpp: float | None = None) -> xr.DataTree:
    """Build a multiscale image element from lazy levels.

    Parameters
    ----------
    pyramid
        Levels, finest first, each ``uint8 (3, y, x)``.
    mpp
        Micrometres a pixel of the finest level, for the ``"microns"`` coordinate system.

    Returns
    -------
    A `DataTree` that `spatialdata` accepts as a multiscale image.
    """
    height, width = pyramid[0].shape[1:]
    scales: dict[str, xr.Dataset] = {}
    for number, level in enumerate(pyramid):
        array = xr.DataArray(
            level,
            dims=("c", "y", "x"),
            coords={
                "c": ["r", "g", "b"],
                "y": (np.arange(level.shape[1]) + 0.5) * height / level.shape[1],
                "x": (np.arange(level.shape[2]) + 0.5) * width / level.shape[2],
            },
        )
        to_full = Scale([height / level.shape[1], width / level.shape[2]], axes=("y", "x"))
        array.attrs["transform"] = {"global": Identity() if number == 0 else to_full}
        scales[f"scale{number}"] = xr.Dataset({"image": array})
    element = xr.DataTree.from_dict(scales)
    Image2DModel().validate(element)
    if mpp is not None:
        _add_microns(element, mpp)
    return element


def derive_image(sdata: SpatialData, source: str, pyramid: list[da.Array]) -> xr.DataTree:
    """Build an image element from lazy levels that lie where those of the element `source` lie."""
    element = build_image(pyramid)
    transformations = get_transformation(sdata.images[source], get_all=True)
    set_transformation(element, transformations, set_all=True)
    return element


# --------------------------------------------------------------------------------------------------
# measured units


def has_counts(sdata: SpatialData) -> bool:
    """Whether the section has a table of raw counts, or several to choose from."""
    return any(name not in _OWN_TABLES for name in sdata.tables)


def counts_name(sdata: SpatialData, table_key: str | None = None) -> str:
    """Return the name of the table of raw counts."""
    if table_key is None and COUNTS in sdata.tables:
        return COUNTS
    candidates = [table_key] if table_key is not None else [name for name in sdata.tables if name not in _OWN_TABLES]
    name = _single(
        [candidate for candidate in candidates if candidate in sdata.tables],
        what="table of counts",
        argument="table_key",
        found=sorted(sdata.tables),
        mend="Read the section with a reader that has molecules, such as `stimage_sd.io.visium`.",
    )
    return name


def counts(sdata: SpatialData, table_key: str | None = None) -> AnnData:
    """Return the table of raw counts, ``obs`` = measured units, ``var`` = genes.

    Raises
    ------
    KeyError
        If there is none, or several and `table_key` names none of them.
    ValueError
        If the table has negative or non-integer values, or no ``obsm["spatial"]``.
    """
    name = counts_name(sdata, table_key)
    table = sdata.tables[name]
    if "spatial" not in table.obsm:
        raise ValueError(
            f'Expected `sdata.tables["{name}"].obsm["spatial"]` (x, y in H&E pixels), found {list(table.obsm)}.'
        )
    check_counts(table.X, where=f"table {name!r} of section {sample(sdata)!r}")
    return table


def check_counts(values: Any, *, where: str) -> None:
    """Raise `ValueError` where a matrix, dense or sparse, holds anything but counts."""
    data = np.asarray(values.data if hasattr(values, "tocsr") else values)
    if data.size == 0:
        return
    if not np.issubdtype(data.dtype, np.number) or not np.isfinite(data).all():
        raise ValueError(f"Expected raw counts in {where}, found values that are not finite numbers.")
    if data.min() < 0:
        raise ValueError(f"Expected raw counts in {where}, found negative values (lowest {data.min()}).")
    if not np.issubdtype(data.dtype, np.integer) and (data != np.round(data)).any():
        example = data[data != np.round(data)][0]
        raise ValueError(
            f"Expected raw integer counts in {where}, found {example!r}. Pass counts before normalisation and log."
        )


def units_name(sdata: SpatialData, shapes_key: str | None = None, table_key: str | None = None) -> str:
    """Return the name of the shapes that the counts annotate."""
    if shapes_key is not None:
        if shapes_key not in sdata.shapes:
            raise KeyError(f"No shapes {shapes_key!r}; this section's shapes: {sorted(sdata.shapes)}.")
        return shapes_key
    table = sdata.tables[counts_name(sdata, table_key)]
    region = table.uns.get(TableModel.ATTRS_KEY, {}).get(TableModel.REGION_KEY)
    candidates = [region] if isinstance(region, str) else list(region or [])
    return _single(
        [name for name in candidates if name in sdata.shapes],
        what="element of shapes that the counts annotate",
        argument="shapes_key",
        found=sorted(sdata.shapes),
    )


def annotate(table: AnnData, *, region: str) -> AnnData:
    """Make a table annotate the element `region`, by its column ``instance_id``."""
    table.obs[REGION_KEY] = region
    table.obs[REGION_KEY] = table.obs[REGION_KEY].astype("category")
    if INSTANCE_KEY not in table.obs:
        table.obs[INSTANCE_KEY] = np.arange(table.n_obs)
    table.uns.pop(TableModel.ATTRS_KEY, None)
    return TableModel.parse(table, region=region, region_key=REGION_KEY, instance_key=INSTANCE_KEY)


def build_shapes(frame: GeoDataFrame, *, mpp: float | None) -> GeoDataFrame:
    """Give shapes in H&E pixels the section's coordinate systems."""
    shapes = ShapesModel.parse(frame, transformations={"global": Identity()})
    if mpp is not None:
        _add_microns(shapes, mpp)
    return shapes


# --------------------------------------------------------------------------------------------------
# what the steps write and need


def write_tissue(sdata: SpatialData, mask: np.ndarray, *, downsample: tuple[float, float]) -> None:
    """Write the tissue labels.

    Parameters
    ----------
    sdata
        The section.
    mask
        ``(y, x)`` bool, `True` on tissue, at low resolution.
    downsample
        Full-resolution pixels a mask pixel spans, along y and x.
    """
    labels = Labels2DModel.parse(
        mask.astype(np.uint8),
        dims=("y", "x"),
        transformations={"global": Scale(list(downsample), axes=("y", "x"))},
    )
    if info(sdata)["mpp"] is not None:
        _add_microns(labels, float(info(sdata)["mpp"]))
    sdata.labels[TISSUE] = labels


def tissue(sdata: SpatialData) -> tuple[np.ndarray, tuple[float, float]]:
    """Return the tissue mask, ``(y, x)`` bool, and the full-resolution pixels one of its pixels spans (y, x)."""
    if TISSUE not in sdata.labels:
        raise KeyError(f"Section {sample(sdata)!r} has no tissue mask. Run `stimage_sd.pp.tissue_mask(sdata)` first.")
    labels = sdata.labels[TISSUE]
    matrix = get_transformation(labels, to_coordinate_system="global").to_affine_matrix(("y", "x"), ("y", "x"))
    return np.asarray(labels.data) > 0, (float(matrix[0, 0]), float(matrix[1, 1]))


def tiles(sdata: SpatialData) -> AnnData:
    """Return the table of tiles.

    Raises
    ------
    KeyError
        If the section was not tiled.
    """
    if TILES not in sdata.tables:
        raise KeyError(f"Section {sample(sdata)!r} has no tiles. Run `stimage_sd.pp.tile(sdata)` first.")
    return sdata.tables[TILES]


def tiling(sdata: SpatialData) -> dict[str, Any]:
    """Return how the section was tiled: ``side_px``, ``size_um``, ``target_px``, ``layout``."""
    return dict(tiles(sdata).uns["tiling"])


def feature_key(extractor: str) -> str:
    """Return the ``obsm`` key of an extractor's embeddings."""
    return f"X_{extractor}"


def context_key(extractor: str) -> str:
    """Return the ``obsm`` key of the neighbours' embeddings."""
    return f"X_{extractor}_context"


def embeddings(sdata: SpatialData, extractor: str) -> np.ndarray:
    """Return an extractor's embeddings, ``float32 (n_tiles, n_features)``.

    Raises
    ------
    KeyError
        If they were not computed.
    """
    table = tiles(sdata)
    key = feature_key(extractor)
    if key not in table.obsm:
        known = sorted(name.removeprefix("X_") for name in table.obsm if name.startswith("X_"))
        raise KeyError(
            f"Section {sample(sdata)!r} has no embeddings by {extractor!r} (found {known}). "
            f"Run `stimage_sd.pp.embed(sdata, {extractor!r})` first."
        )
    return np.asarray(table.obsm[key])


def predictions(sdata: SpatialData) -> AnnData:
    """Return the table of predictions.

    Raises
    ------
    KeyError
        If nothing was predicted yet.
    """
    if PREDICTIONS not in sdata.tables:
        raise KeyError(
            f"Section {sample(sdata)!r} has no predictions. Run `stimage_sd.tl.predict(sdata, model)` first."
        )
    return sdata.tables[PREDICTIONS]


def write_predictions(sdata: SpatialData, table: AnnData) -> None:
    """Write the table of predictions, which annotates the tiles; replaces an earlier one."""
    parsed = annotate(table, region=TILE_SQUARES)
    if PREDICTIONS in sdata.tables:
        del sdata.tables[PREDICTIONS]
    sdata.tables[PREDICTIONS] = parsed


def align_to_spots(sdata: SpatialData, table: AnnData, table_key: str | None = None) -> tuple[np.ndarray, AnnData]:
    """Match rows of a table over tiles with the spots they sit on.

    Parameters
    ----------
    sdata
        The section.
    table
        A table over tiles with ``obs["spot_id"]``.
    table_key
        Name of the table of counts.

    Returns
    -------
    Row numbers of `table` that have a measured spot, and the counts in that order.

    Raises
    ------
    KeyError
        If tiles sit on no spots, as those of a grid do.
    """
    measured = counts(sdata, table_key)
    if "spot_id" not in table.obs:
        raise KeyError(
            f"The tiles of section {sample(sdata)!r} do not sit on spots, so they cannot be compared with counts. "
            'Tile with `stimage_sd.pp.tile(sdata, layout="spots")`.'
        )
    where = measured.obs_names.get_indexer(table.obs["spot_id"].astype(str))
    rows = np.flatnonzero(where >= 0)
    if rows.size == 0:
        raise KeyError(f"No tile of section {sample(sdata)!r} sits on a spot of its counts.")
    return rows, measured[where[rows]]


def _single(candidates: list[str], *, what: str, argument: str, found: list[str], mend: str = "") -> str:
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise KeyError(f"Found no {what} among {found}. {mend or f'Name it with `{argument}=`.'}")
    raise KeyError(f"Found more than one {what}: {sorted(candidates)}. Choose one with `{argument}=`.")


def _is_rgb(array: xr.DataArray) -> bool:
    return array.shape[0] == 3 and array.dtype == np.uint8


def _add_microns(element: Any, mpp: float) -> None:
    to_global: BaseTransformation = get_transformation(element, to_coordinate_system="global")
    to_microns = Sequence([to_global, Scale([mpp, mpp], axes=("x", "y"))])
    set_transformation(element, to_microns, to_coordinate_system="microns")
