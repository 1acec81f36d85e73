"""Adopt an object of another tool as a section: find its H&E, its measured units and its resolution."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from stimage_sd import contract
from stimage_sd.io._other_objects import PLAUSIBLE, gathered_cells, split_samples, stated_mpp
from stimage_sd.io._section import check_mpp
from stimage_sd.io._wsidata import is_wsi, section_of_wsi

#: attributes in which other tools name the image of the tissue
_IMAGE_ATTRIBUTES = ("tissue_segmentation_image",)
#: fraction of units off the H&E above which units and image are refused as not matching
_MOST_OUTSIDE = 0.5
#: relative difference above which two statements of the resolution contradict each other
_CONTRADICTION = 0.05


def from_spatialdata(
    data: SpatialData,
    *,
    image: str | None = None,
    shapes: str | None = None,
    table: str | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    sample: str | None = None,
    patient: str | None = None,
    slide: str | Path | SpatialData | None = None,
    layer: str | None = None,
) -> SpatialData | dict[str, SpatialData]:
    """Adopt a SpatialData object of any origin as a section, or as a cohort of sections.

    No data are copied or moved. The names of image, shapes, table and coordinate system are written to
    ``attrs["stimage_sd"]``, where every function of this package looks them up. Name only what is ambiguous.

    Parameters
    ----------
    data
        Object from spatialdata-io, sopa or LazySlide (``WSIData`` or its store), or one of your own.
    image
        H&E image. By default the only RGB image, or the finest of several copies of one image.
    shapes
        Measured units: spots, bins or cells. By default the shapes that the table annotates.
    table
        Table with counts. By default the only table that holds counts.
    coordinate_system
        Coordinate system that aligns image and units. By default any shared one, if all shared ones agree.
    mpp
        Micrometers per pixel of the H&E. By default the value that the object states: from its coordinate system
        ``"microns"``, the pitch of the Visium array, the size of Visium HD bins, or the micrometers of Xenium and
        MERSCOPE.
    sample
        Sample id. By default the id in the object, where it has one.
    patient
        Patient that the section is of. All sections of a patient are held out together (`stimage_sd.tl.fit_nb`).
    slide
        Slide of a LazySlide store without an image: its path, or the section from `stimage_sd.io.slide`.
    layer
        Layer with raw counts, where ``X`` does not hold them. By default ``"counts"``, or the only layer with counts.

    Returns
    -------
    The same object. For an object of several samples, such as from `spatialdata.concatenate`, a dictionary with one
    section per sample. These sections share the images, and their element names have no sample suffix. For a LazySlide
    store, a new object with its tiles as ``tables["tiles"]`` and its features as embeddings.
    Cells that are labels of several fields of view, as in CosMx, become the shapes ``"cells"``: circles at the cell
    centers with the cell areas. The table then annotates these shapes. Antibodies and controls, as marked in
    ``var["feature_types"]``, stay in the table and are left out where counts are read.

    Raises
    ------
    KeyError
        If a named element does not exist, or the choice is ambiguous. The error lists the candidates.
    ValueError
        If units and image share no coordinate system, or share two that disagree; if most units lie off the image;
        if a transformation is not affine; if a layer holds no counts; if the resolution is not plausible.

    Examples
    --------
    >>> import geopandas, numpy as np, shapely
    >>> from spatialdata.models import Image2DModel, ShapesModel
    >>> from spatialdata.transformations import Translation
    >>> pixels = np.full((3, 300, 400), 200, np.uint8)
    >>> moved = Translation([500, 500], axes=("x", "y"))
    >>> he = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"global": moved})
    >>> spots = geopandas.GeoDataFrame({"radius": [20.0]}, geometry=[shapely.Point(600, 620)])
    >>> theirs = SpatialData(images={"scan": he}, shapes={"spots": ShapesModel.parse(spots)})
    >>> section = from_spatialdata(theirs, shapes="spots", mpp=0.5)
    >>> contract.find_units(section).positions(section).tolist()
    [[100.0, 120.0]]
    """
    check_mpp(mpp)
    if not isinstance(data, SpatialData):
        raise TypeError(f"Expected a SpatialData object, found {type(data).__name__}.")
    if is_wsi(data):
        return section_of_wsi(data, slide=slide, image=image, mpp=mpp, sample=sample, patient=patient)
    if slide is not None:
        raise ValueError(
            "`slide=` is for LazySlide stores. Other objects have their image inside; name it with `image=`."
        )
    named = {"image": image, "shapes": shapes, "table": table, "coordinate_system": coordinate_system, "layer": layer}
    views = split_samples(data, image=image, shapes=shapes)
    if views is None:
        return _in_own_words(lambda: _adopt(data, mpp=mpp, sample=sample, patient=patient, **named))
    if image is not None or shapes is not None:
        # one of several samples was named; element names of its view have no sample suffix
        ((name, view),) = views.items()
        named |= {"image": None, "shapes": None, "table": table if table in view.tables else None}
        return _in_own_words(lambda: _adopt(view, mpp=mpp, sample=sample or name, patient=patient, **named))
    if sample is not None or patient is not None:
        given = "patient" if sample is None else "sample"
        raise ValueError(f"Found {len(views)} samples, {list(views)}. Leave `{given}=` out, or name one with `image=`.")
    return {
        name: _in_own_words(lambda view=view, name=name: _adopt(view, mpp=mpp, sample=name, patient=None, **named))  # type: ignore[misc]
        for name, view in views.items()
    }


def _in_own_words(adopt: Callable[[], SpatialData]) -> SpatialData:
    """Replace argument names of other functions in error messages by those of `from_spatialdata`."""
    try:
        return adopt()
    except (KeyError, ValueError) as error:
        text = str(error.args[0]) if error.args else str(error)
        for key in ("image", "shapes", "table"):
            text = text.replace(f"`{key}_key=`", f"`{key}=`")
        raise type(error)(text) from error


def _adopt(
    sdata: SpatialData,
    *,
    image: str | None,
    shapes: str | None,
    table: str | None,
    coordinate_system: str | None,
    layer: str | None,
    mpp: float | None,
    sample: str | None,
    patient: str | None,
) -> SpatialData:
    """Find unnamed elements, check that all match, and record them. Restore the object after an error."""
    before = dict(sdata.attrs)
    gathered = _gather_cells(sdata, table)
    try:
        name = _image(sdata, image)
        if coordinate_system is None:
            coordinate_system = contract.info(sdata).get("coordinate_system")  # recorded by an earlier call
        if name is None and coordinate_system is None and "global" not in sdata.coordinate_systems:
            # without an H&E, the only coordinate system is used
            systems = list(sdata.coordinate_systems)
            coordinate_system = systems[0] if len(systems) == 1 else None
        _check_coordinate_system(sdata, name, coordinate_system)
        about: dict[str, Any] = {
            "sample": _sample(sdata, sample),
            "platform": _platform(sdata),
            "image": name,
            "coordinate_system": coordinate_system,
            # a section that knows its patient keeps it
            "patient": patient if patient is not None else contract.info(sdata).get("patient"),
        }
        given = mpp
        if mpp is None and name is not None:
            mpp = contract.mpp(sdata, name)
        if contract.info(sdata).get("normalized_image") is None:
            # `spatialdata.concatenate` keeps tables but drops `attrs["stimage_sd"]`
            for normalized, stain in _stains(sdata).items():
                about |= {"normalized_image": normalized, "stain": stain}
        if name is not None:
            about |= contract.stated_of_image(sdata, name)
            if contract.was_cropped(sdata, name):
                del about["image_px"]  # keeps the recorded size of the whole image
        contract.remember(sdata, **about, mpp=mpp)
        units = _units(sdata, shapes, table, layer)
        contract.remember(sdata, mpp=_resolution(sdata, units, given, mpp))
        contract.record(
            sdata, "io.from_spatialdata", image=name, shapes=None if units is None else units.shapes,
            table=None if units is None else units.table, coordinate_system=coordinate_system, layer=layer, mpp=mpp,
        )  # fmt: skip
    except Exception:
        sdata.attrs = before
        if gathered is not None:
            name, replaced = gathered
            del sdata.shapes[contract.CELLS], sdata.tables[name]
            sdata.tables[name] = replaced
        raise
    return sdata


def _gather_cells(sdata: SpatialData, table: str | None) -> tuple[str, AnnData] | None:
    """Add shapes for cells that are labels of several fields; return the name and the table that was replaced."""
    if contract.CELLS in sdata or not contract.has_counts(sdata):
        return None
    name = table if table is not None else contract.counts_name(sdata)
    cells = gathered_cells(sdata, sdata.tables[name]) if name in sdata.tables else None
    if cells is None:
        return None
    replaced = sdata.tables[name]
    sdata.shapes[contract.CELLS] = cells[0]
    del sdata.tables[name]
    sdata.tables[name] = cells[1]
    return name, replaced


def _resolution(
    sdata: SpatialData, units: contract.Units | None, given: float | None, known: float | None
) -> float | None:
    """Return micrometers per pixel as given, recorded or stated by the object; warn if these disagree."""
    stated = stated_mpp(sdata, units)
    if known is None:
        return stated
    if given is None and not PLAUSIBLE[0] <= known <= PLAUSIBLE[1]:
        raise ValueError(
            f"The object states {known:.4g} micrometers per pixel of its H&E, which no microscope has. Pass `mpp=`."
        )
    if stated is not None and abs(known / stated - 1) > _CONTRADICTION:
        warnings.warn(
            f"Section {contract.sample(sdata)!r} has {known:.4g} micrometers per pixel "
            f"{'as given' if given is not None else 'by its own statement'}; by its array, bins or shapes it has "
            f"{stated:.4g}. Pass `mpp=` if that is right.",
            UserWarning,
            stacklevel=5,
        )
    return known


def _sample(sdata: SpatialData, sample: str | None) -> str:
    stated = contract.info(sdata)["sample"]
    chosen = sample if sample is not None else stated
    if not str(chosen) or "/" in str(chosen):
        raise ValueError(f"Expected a sample id without a slash, which zarr stores cannot hold, found {chosen!r}.")
    return str(chosen)


def _platform(sdata: SpatialData) -> str:
    stated = contract.info(sdata)["platform"]
    return str(sdata.attrs.get("spatialdata_io_reader", "spatialdata")) if stated == "unknown" else str(stated)


def _image(sdata: SpatialData, image: str | None) -> str | None:
    """Return the name of the H&E, or `None` for an object without color images."""
    if image is not None:
        image_name = contract.find_image(sdata, image)
        contract.check_rgb(sdata, image_name)
    else:
        stated = [sdata.attrs.get(key) for key in _IMAGE_ATTRIBUTES] + [contract.info(sdata)["image"]]
        known = [name for name in stated if name in contract.rgb_images(sdata)]
        derived = _stains(sdata)
        others = [
            name
            for name in contract.rgb_images(sdata)
            if name not in derived and not name.startswith(contract.NORMALIZED)
        ]
        candidates = known[:1] or others or contract.rgb_images(sdata)
        if not candidates:
            _check_no_other_colors(sdata)
            return None
        image_name = candidates[0] if len(candidates) == 1 else _finest(sdata, candidates)
    _check_alignment(sdata, image_name)
    return image_name


def _check_no_other_colors(sdata: SpatialData) -> None:
    """Raise an error for color images that are not 8-bit RGB."""
    for name in sdata.images:
        finest = contract.levels(sdata, name)[0]
        channels = [str(channel).lower()[:1] for channel in finest.coords["c"].values] if "c" in finest.coords else []
        if channels[:3] == ["r", "g", "b"]:
            raise ValueError(
                f"The image {name!r} has colors of {finest.dtype} in {finest.shape[0]} channels; an H&E is 8-bit RGB. "
                "Convert it, and keep its transformations: `Image2DModel.parse(..., transformations=...)`."
            )


def _stains(sdata: SpatialData) -> dict[str, Any]:
    """Return the stain normalization of each image that tiles were embedded from, by image name."""
    tiles = sdata.tables.get(contract.TILES)
    embeddings = {} if tiles is None else tiles.uns.get("embeddings", {})
    return {
        str(how["image"]): json.loads(how["stain"])
        for how in embeddings.values()
        if isinstance(how, Mapping) and how.get("stain") and how.get("image") in sdata.images
    }


def _finest(sdata: SpatialData, candidates: list[str]) -> str:
    """Return the copy of an image with the smallest pixels."""
    pictures = contract.pictures(sdata, candidates)
    if len(pictures) > 1:
        raise KeyError(f"Found more than one RGB image: {sorted(candidates)}. Choose the H&E with `image=`.")
    return pictures[0][0]


def _check_alignment(sdata: SpatialData, name: str) -> None:
    """Raise an error for a Xenium H&E without alignment, since its pixels are not those of the morphology image."""
    if sdata.attrs.get("spatialdata_io_reader") != "xenium" or "global" not in get_transformation(
        sdata.images[name], get_all=True
    ):
        return
    morphology = next((key for key in contract.MORPHOLOGY if key in sdata.images), None)
    matrix = contract.affine(get_transformation(sdata.images[name], "global"), name)
    if morphology is None or name == morphology or not np.array_equal(matrix, np.eye(3)):
        return
    sizes = [np.array(contract.image_size(sdata, key)) for key in (name, morphology)]
    if (np.abs(sizes[0] / sizes[1] - 1) > 0.01).any():
        raise ValueError(
            f"The H&E {name!r} of this Xenium object has no alignment: its {sizes[0][0]} x {sizes[0][1]} px lie on the "
            f"{sizes[1][0]} x {sizes[1][1]} px of {morphology!r} as they are. Lay it on with "
            "`stimage_sd.pp.register(sdata)` before this call, read it with its alignment file, or set the matrix with "
            "`spatialdata.transformations.set_transformation`."
        )


def _check_coordinate_system(sdata: SpatialData, image: str | None, coordinate_system: str | None) -> None:
    if coordinate_system is None:
        return
    known = list(sdata.coordinate_systems)
    if image is not None:
        known = list(get_transformation(sdata.images[image], get_all=True))
    if coordinate_system not in known:
        raise KeyError(f"No coordinate system {coordinate_system!r} of the H&E {image!r}; it has {sorted(known)}.")


def _units(sdata: SpatialData, shapes: str | None, table: str | None, layer: str | None) -> contract.Units | None:
    """Find, check and record the measured units; `None` for an object without measurements."""
    if table is None and shapes is None and not contract.has_counts(sdata):
        if layer is not None:
            raise KeyError(f"No table to read the layer {layer!r} of; the object's tables: {sorted(sdata.tables)}.")
        return None
    if table is not None and table not in sdata.tables:
        raise KeyError(f"No table {table!r}; the object's tables: {sorted(sdata.tables)}.")
    units = contract.find_units(sdata, shapes_key=shapes, table_key=table, against="counts" if shapes is None else None)
    if units.table is not None:
        contract.remember(
            sdata, counts=units.table, units=units.table, shapes=_with(sdata, "shapes", units.table, shapes)
        )
        layer = _layer(sdata, units.table, layer)
        contract.remember(sdata, layers=_with(sdata, "layers", units.table, layer))
    else:
        contract.remember(sdata, unit_shapes=units.shapes)
    if contract.info(sdata)["image"] is not None:
        _check_on_image(sdata, units)
    return units


def _with(sdata: SpatialData, entry: str, table: str, value: str | None) -> dict[str, str]:
    known = dict(contract.info(sdata).get(entry, {}))
    return known if value is None else {**known, table: value}


def _layer(sdata: SpatialData, name: str, layer: str | None) -> str | None:
    """Return the name of the layer with counts, or `None` where ``X`` holds counts or no layer does."""
    table = sdata.tables[name]
    layers = [str(key) for key in table.layers if key is not None]
    if layer is not None:
        if layer not in layers:
            raise KeyError(f"No layer {layer!r} in table {name!r}; its layers: {sorted(layers)}.")
        contract.check_counts(table.layers[layer], where=f"layer {layer!r} of table {name!r}")
        return layer
    said = contract.info(sdata).get("layers", {}).get(name)
    if said in layers:
        return str(said)
    if contract.counts_problem(table.X) is None:
        return None
    holding = [key for key in layers if contract.counts_problem(table.layers[key]) is None]
    if "counts" in holding:
        return "counts"
    if len(holding) > 1:
        raise KeyError(f"Found counts in several layers of table {name!r}: {sorted(holding)}. Choose with `layer=`.")
    return holding[0] if holding else None


def _check_on_image(sdata: SpatialData, units: contract.Units) -> None:
    positions = units.positions(sdata)
    width, height = contract.image_size(sdata)
    inside = np.all((positions >= 0) & (positions < [width, height]), axis=1)
    if len(positions) and 1 - inside.mean() > _MOST_OUTSIDE:
        low, high = np.nanmin(positions, axis=0), np.nanmax(positions, axis=0)
        raise ValueError(
            f"{1 - inside.mean():.0%} of the units {units.shapes!r} lie off the H&E {contract.find_image(sdata)!r} of "
            f"{width} x {height} px: they span x {low[0]:.0f} to {high[0]:.0f}, y {low[1]:.0f} to {high[1]:.0f}. Check "
            "the transformation of the image. Name another image with `image=`, or another coordinate system with "
            "`coordinate_system=`."
        )
