"""Find the samples, the cells and the resolution in objects of other tools."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import geopandas
import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity, get_transformation

from stimage_sd import contract

#: elements by kind and name
Elements = dict[str, dict[str, object]]
_KINDS = ("images", "labels", "points", "shapes")


def split_samples(
    sdata: SpatialData, *, image: str | None = None, shapes: str | None = None
) -> dict[str, SpatialData] | None:
    """Split an object of several samples, such as from `spatialdata.concatenate`.

    Each H&E image is one sample. Its elements are found by coordinate system, if no two H&E images share one, or else
    by name: ``"a"`` and ``"b"`` are the samples of ``"he-a"`` and ``"he-b"``.

    - `sdata`: the object.
    - `image`, `shapes`: elements that the caller named. Only the sample with this element is returned.
    - returns: one object per sample, sharing its elements with `sdata`. Tables hold the rows that annotate elements of
      the sample. The sample suffix is removed from names. `None` for an object of one sample.
    """
    normalized = contract.info(sdata).get("normalized_image")
    candidates = [
        name for name in contract.rgb_images(sdata) if not name.startswith(contract.NORMALIZED) and name != normalized
    ]
    pictures = contract.pictures(sdata, candidates)
    if len(pictures) < 2:
        return None
    first = [group[0] for group in pictures]
    keys = _keys(first)
    owner = _by_coordinate_systems(sdata, dict(zip(keys, pictures, strict=True))) or _by_names(sdata, keys)
    if owner is None:
        if image is not None:
            return None  # the caller names the elements of the section
        raise KeyError(
            f"Found more than one RGB image: {sorted(first)}, and neither coordinate systems nor names tell which "
            "elements belong to which image. Choose the H&E with `image=`, and its units with `shapes=`."
        )
    _tell_of_others(sdata, owner)
    views = {key: _view(sdata, [name for name, of in owner.items() if of == key], key) for key in keys}
    named = image if image is not None else shapes
    if named is None:
        return views
    if named not in owner:
        return None
    return {owner[named]: views[owner[named]]}


def _tell_of_others(sdata: SpatialData, owner: Mapping[str, str]) -> None:
    """Warn of units that belong to no sample with an H&E."""
    regions = {region for name, table in sdata.tables.items() if not contract.is_result(name, table)
               for region in contract.regions_of(table)}  # fmt: skip
    left_out = sorted(region for region in regions if region in sdata and region not in owner)
    if left_out:
        warnings.warn(
            f"{', '.join(left_out)} belong to no sample with an H&E and are left out.", UserWarning, stacklevel=4
        )


def _keys(names: list[str]) -> list[str]:
    """Return the words of each name that are not in all names, or the names if that is not unique."""
    words = [_words(name) for name in names]
    shared = set(words[0]).intersection(*words[1:])
    keys = ["-".join(word for word in part if word not in shared) for part in words]
    return keys if all(keys) and len(set(keys)) == len(keys) else names


def _words(name: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+", name)


def _by_coordinate_systems(sdata: SpatialData, pictures: Mapping[str, list[str]]) -> dict[str, str] | None:
    """Map elements to samples by coordinate system; `None` if samples share a coordinate system."""
    systems = {
        key: set().union(*(get_transformation(sdata.images[name], get_all=True) for name in names))
        for key, names in pictures.items()
    }
    if sum(map(len, systems.values())) > len(set().union(*systems.values())):
        return None
    return {
        name: key
        for _, name, element in sdata.gen_spatial_elements()
        for key, elements in systems.items()
        if elements & set(get_transformation(element, get_all=True))
    }


def _by_names(sdata: SpatialData, keys: list[str]) -> dict[str, str] | None:
    """Map elements to samples by the key in their name; `None` if a sample has no shapes."""
    owner = {}
    for _, name, _ in sdata.gen_spatial_elements():
        held = [key for key in keys if set(_words(key)) <= set(_words(name))]
        if len(held) == 1:
            owner[name] = held[0]
    has_units = all(any(of == key and name in sdata.shapes for name, of in owner.items()) for key in keys)
    return owner if has_units else None


def _view(sdata: SpatialData, names: Iterable[str], key: str) -> SpatialData:
    """Return an object with the named elements and the table rows that annotate them."""
    names = list(names)
    new_name = {name: _without(name, key) for name in names}
    if len(set(new_name.values())) < len(names):
        new_name = {name: name for name in names}
    elements: Elements = {
        kind: {new_name[name]: element for name, element in getattr(sdata, kind).items() if name in new_name}
        for kind in _KINDS
    }
    tables = {}
    for name, table in sdata.tables.items():
        part = _rows(table, new_name)
        if part is None:
            continue
        short = _without(name, key)
        tables[short if short not in elements and short not in tables else name] = part
    view = SpatialData(**elements, tables=tables)
    stated = sdata.attrs.get("spatialdata_io_reader")
    if stated is not None:
        view.attrs = {"spatialdata_io_reader": stated}
    return view


def _without(name: str, key: str) -> str:
    """Remove the sample suffix that `spatialdata.concatenate` adds."""
    return name.removesuffix(f"-{key}") or name


def _rows(table: AnnData, new_name: Mapping[str, str]) -> AnnData | None:
    """Return the table rows that annotate the elements of `new_name`; `None` without rows."""
    keys = contract.keys_of(table)
    annotated = [region for region in contract.regions_of(table) if region in new_name]
    if not annotated:
        return None
    column = keys[TableModel.REGION_KEY_KEY]
    part = table[table.obs[column].astype(str).isin(annotated).to_numpy()].copy()
    part.obs[column] = part.obs[column].astype(str).map(new_name).astype("category")
    regions = [new_name[region] for region in annotated]
    del part.uns[TableModel.ATTRS_KEY]
    return TableModel.parse(
        part,
        region=regions[0] if len(regions) == 1 else regions,
        region_key=column,
        instance_key=keys[TableModel.INSTANCE_KEY],
    )


def gathered_cells(sdata: SpatialData, table: AnnData) -> tuple[GeoDataFrame, AnnData] | None:
    """Gather the cells of a table that annotates labels of several fields of view, as in CosMx.

    - `sdata`: the object.
    - `table`: table of the object. Cell ids are unique only within a field of view.
    - returns: circles at the cell centers with the cell areas, in the coordinate system that all fields share, and a
      copy of the table that annotates the circles. `None` where the table does not annotate labels of several fields.
    """
    regions = contract.regions_of(table)
    if len(regions) < 2 or not set(regions) <= set(sdata.labels):
        return None
    systems = [set(get_transformation(sdata.labels[region], get_all=True)) for region in regions]
    shared = sorted(set.intersection(*systems))
    if not shared:
        return None
    system = "global" if "global" in shared else shared[0]
    keys = contract.keys_of(table)
    cells = pd.concat([contract.label_circles(sdata, region, system).assign(region=region) for region in regions])
    known = pd.MultiIndex.from_arrays([cells["region"], cells.index.astype(int)])
    fields = table.obs[keys[TableModel.REGION_KEY_KEY]].astype(str)
    rows = known.get_indexer(pd.MultiIndex.from_arrays([fields, table.obs[keys[TableModel.INSTANCE_KEY]].astype(int)]))
    cells = cells.iloc[rows[rows >= 0]]
    circles = geopandas.GeoDataFrame({"radius": cells["radius"].to_numpy()}, geometry=shapely.points(cells[["x", "y"]]))
    kept = table[rows >= 0].copy()
    del kept.uns[TableModel.ATTRS_KEY]
    kept.obs["cells_region"] = pd.Categorical([contract.CELLS] * kept.n_obs)
    kept.obs["cells_index"] = np.arange(kept.n_obs)
    return (
        ShapesModel.parse(circles, transformations={system: Identity()}),
        TableModel.parse(kept, region=contract.CELLS, region_key="cells_region", instance_key="cells_index"),
    )


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


def is_in_micrometers(sdata: SpatialData, name: str) -> bool:
    """Return whether the reader that made an object wrote the shapes or points `name` in micrometers."""
    words = _IN_MICRONS.get(str(sdata.attrs.get("spatialdata_io_reader")), ())
    return any(name.startswith(word) or name.endswith(word) for word in words)


def _of_elements(sdata: SpatialData) -> Iterator[float]:
    frame = contract.pixel_frame(sdata)
    for kind, name, element in sdata.gen_spatial_elements():
        systems = get_transformation(element, get_all=True)
        if not set(systems) & set(frame.transformations) or name == frame.image:
            continue
        to_pixels = contract.scale_of(frame.matrix(element, name))
        if "microns" in systems:
            yield contract.scale_of(contract.affine(systems["microns"], name)) / to_pixels
        elif kind in ("shapes", "points") and is_in_micrometers(sdata, name):
            yield 1.0 / to_pixels
