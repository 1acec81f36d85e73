"""Sections from objects and stores of LazySlide, with their tissue, tiles and features."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import shapely
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import contract
from stimage_sd.io._other_objects import PLAUSIBLE
from stimage_sd.io._slide import slide as read_slide

#: attributes of LazySlide objects, and names of their elements
PROPERTIES, TILE_SPEC = "slide_properties", "tile_spec"
_IMAGE, _TISSUES, _TILES = "wsi", "tissues", "tiles"
#: longest side of the tissue labels, px
_MASK_SIDE = 1500


def is_wsi(data: SpatialData) -> bool:
    """Return whether an object or store was made by LazySlide."""
    return PROPERTIES in data.attrs or (PROPERTIES.replace("_", "") in type(data).__name__.lower())


def section_of_wsi(
    data: SpatialData,
    *,
    slide: str | Path | SpatialData | None,
    image: str | None,
    mpp: float | None,
    sample: str | None,
    patient: str | None,
) -> SpatialData:
    """Build a section from an object of LazySlide.

    The shapes ``tiles`` become tiles, their features become embeddings, and ``tissues`` become the tissue labels.
    """
    inside = image if image is not None else _IMAGE if _IMAGE in data.images and slide is None else None
    section = _slide_of(data, slide, inside, mpp, sample)
    _check_size(section, data)
    if _TISSUES in data.shapes:
        _take_tissue(section, _placed(data, _TISSUES, inside))
    if _TILES in data.shapes:
        _take_tiles(section, data, _placed(data, _TILES, inside))
    others = sorted(name for name, table in data.tables.items() if _TILES not in contract.regions_of(table))
    if others:
        warnings.warn(
            f"Tables {others} of the LazySlide store do not annotate its tiles and are left out.",
            UserWarning,
            stacklevel=3,
        )
    if patient is not None:
        contract.remember(section, patient=patient)
    contract.record(
        section, "io.from_spatialdata", slide=slide if isinstance(slide, str | Path) else None, of="wsidata"
    )
    return section


def _placed(data: SpatialData, name: str, inside: str | None) -> GeoDataFrame:
    """Return shapes in pixels of the slide.

    If the store holds the image, the transformations are applied. Otherwise the shapes are returned as stored.
    """
    if inside is not None:
        return contract.shapes_in_pixels(data, name, image_key=inside)
    systems = get_transformation(data.shapes[name], get_all=True)
    if not any(np.array_equal(contract.affine(after, name), np.eye(3)) for after in systems.values()):
        raise ValueError(
            f"The shapes {name!r} of this LazySlide store were moved: their transformations are {systems}. The store "
            "holds no image, so their position on the slide is unknown. Use the store as written by LazySlide."
        )
    return data.shapes[name]


def _slide_of(
    data: SpatialData, slide: str | Path | SpatialData | None, inside: str | None, mpp: float | None, sample: str | None
) -> SpatialData:
    """Return the section of the slide, from the given slide, the stored image, or the file opened by LazySlide."""
    properties = data.attrs.get(PROPERTIES, {})
    stated_mpp, mpp = mpp, mpp if mpp is not None else _plausible(properties.get("mpp"))
    if slide is None and inside is None:
        slide = getattr(getattr(data, "reader", None), "file", None)
    if isinstance(slide, SpatialData):
        if stated_mpp is not None or sample is not None:
            raise ValueError(
                "`slide=` is a section, which has a resolution and a sample id. Leave `mpp=` and `sample=` out."
            )
        return slide
    if slide is not None:
        return read_slide(Path(slide), mpp=mpp, sample=sample)
    if inside is None:
        raise ValueError(
            "This LazySlide store holds no image, and does not say where its slide is. Pass the slide as `slide=`: its "
            "path, or the section from `stimage_sd.io.slide`."
        )
    contract.check_rgb(data, inside)
    element = contract.derive_image(data, inside, [level.data for level in contract.levels(data, inside)])
    section = SpatialData(images={contract.IMAGE: element})
    return contract.register(
        section, sample=sample if sample is not None else "slide", platform="slide", image=contract.IMAGE, mpp=mpp
    )


def _plausible(mpp: Any) -> float | None:
    """Return a resolution if a microscope can have it, or `None`. Some files state the dots per inch of a print."""
    return float(mpp) if mpp is not None and PLAUSIBLE[0] <= float(mpp) <= PLAUSIBLE[1] else None


def _check_size(section: SpatialData, data: SpatialData) -> None:
    shape = data.attrs.get(PROPERTIES, {}).get("shape")
    width, height = contract.image_size(section)
    if shape is not None and tuple(shape) != (height, width):
        raise ValueError(
            f"The store is of a slide of {shape[1]} x {shape[0]} px, found {width} x {height} px. Pass the original "
            "slide of the store as `slide=`."
        )


def _take_tissue(section: SpatialData, tissues: GeoDataFrame) -> None:
    width, height = contract.image_size(section)
    step = max(1.0, max(width, height) / _MASK_SIDE)
    shape = max(1, round(height / step)), max(1, round(width / step))
    down = height / shape[0], width / shape[1]
    small = shapely.transform(tissues.geometry.to_numpy(), lambda points: points / [down[1], down[0]])
    mask = np.zeros(shape, np.uint8)
    for part in shapely.get_parts(small):
        for ring, value in [(part.exterior, 1), *((hole, 0) for hole in part.interiors)]:
            cv2.fillPoly(mask, [np.round(shapely.get_coordinates(ring)).astype(np.int32)], value)
    if mask.any():
        contract.write_tissue(section, mask > 0, downsample=down)


def _take_tiles(section: SpatialData, data: SpatialData, squares: GeoDataFrame) -> None:
    bounds = shapely.bounds(squares.geometry.to_numpy())
    sides = bounds[:, 2:] - bounds[:, :2]
    side = float(np.sqrt(np.median(shapely.area(squares.geometry.to_numpy()))))
    if (np.abs(sides - side) > 1).any():
        raise ValueError(
            f"Expected square tiles of one size in shapes {_TILES!r}, found {sides.min()} to {sides.max()} px."
        )
    specification = data.attrs.get(TILE_SPEC, {}).get(_TILES, {})
    centers = (bounds[:, :2] + bounds[:, 2:]) / 2
    obs = pd.DataFrame({"x": centers[:, 0], "y": centers[:, 1], "tissue_fraction": np.nan, "keep": True})
    tiling: dict[str, Any] = {
        "layout": "grid",
        "side_px": side,
        "target_px": int(specification.get("width") or max(1, round(side))),
    }
    mpp = contract.mpp(section)
    if mpp is not None:
        tiling["size_um"] = side * mpp
    contract.write_tiles(section, obs, tiling)
    for name, table in data.tables.items():
        if _TILES in contract.regions_of(table) and name.endswith(f"_{_TILES}"):
            extractor = name.removesuffix(f"_{_TILES}")
            instances = pd.Index(table.obs[contract.keys_of(table)["instance_key"]])
            rows = instances.get_indexer(squares.get("tile_id", squares.index))
            if (rows >= 0).all():
                values = np.asarray(table.X, dtype=np.float32)[rows]
                contract.write_embeddings(
                    section, extractor, values, image=contract.image_name(section), input_px=tiling["target_px"],
                    source="LazySlide",
                )  # fmt: skip
