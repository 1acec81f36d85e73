"""Read and write the results of a section: tissue, nuclei, predictions, gene classes, cell types, explanations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from spatialdata import SpatialData

from stimage_sd.contract._elements import annotate, regions_of
from stimage_sd.contract._frame import pixel_frame, shapes_in_pixels
from stimage_sd.contract._labels import mask_in_pixels
from stimage_sd.contract._names import (
    EXPLANATIONS,
    GENE_CLASSES,
    INSTANCE_KEY,
    NUCLEI,
    NUCLEI_EXPLAINED,
    PREDICTIONS,
    SEGMENTS_EXPLAINED,
    TILE_SQUARES,
    TISSUE,
)
from stimage_sd.contract._section import info, remember, sample
from stimage_sd.contract._tiles import check_free

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from numpy.typing import NDArray


from typing import TYPE_CHECKING

import shapely
from numpy.typing import NDArray

from stimage_sd.contract._elements import PREDICTED_CELLS, is_result
from stimage_sd.contract._names import CELL_TYPES, REGION_KEY

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

#: name that `spatialdata_io.xenium` gives to the nuclei
_NUCLEI_OF_XENIUM = "nucleus_boundaries"


def write_tissue(
    sdata: SpatialData,
    mask: NDArray[np.bool_],
    *,
    downsample: tuple[float, float],
    image_key: str | None = None,
    key_added: str | None = None,
) -> None:
    """Write the tissue labels and store their name in the section.

    - `sdata`: the section.
    - `mask`: ``(y, x)`` bool, `True` on tissue, at low resolution.
    - `downsample`: Full-resolution pixels per mask pixel, along y and x.
    - `image_key`: the image that the tissue was found on, if not the section's H&E.
    - `key_added`: name of the labels. By default ``"tissue"``, or ``"tissue_mask"`` if another element has that name.
    """
    name = key_added
    if name is None:
        name = TISSUE if TISSUE in sdata.labels or TISSUE not in sdata else f"{TISSUE}_mask"
    check_free(sdata, name, of="labels")
    labels = pixel_frame(sdata, image_key).labels(mask.astype(np.uint8), downsample=downsample)
    sdata.labels[name] = labels
    remember(sdata, tissue=None if name == TISSUE else name)


def tissue_name(sdata: SpatialData) -> str:
    """Return the name of the section's tissue labels."""
    return str(info(sdata).get("tissue", TISSUE))


def has_tissue(sdata: SpatialData) -> bool:
    """Return whether the section has tissue labels."""
    return tissue_name(sdata) in sdata.labels


def tissue(sdata: SpatialData, image_key: str | None = None) -> tuple[NDArray[np.bool_], tuple[float, float]]:
    """Return the tissue mask over the whole H&E, ``(y, x)`` bool, and the H&E pixels per mask pixel (y, x)."""
    if not has_tissue(sdata):
        raise KeyError(f"Section {sample(sdata)!r} has no tissue mask. Run `stimage_sd.pp.tissue_mask(sdata)` first.")
    return mask_in_pixels(sdata, tissue_name(sdata), image_key)


def check_no_shapes(sdata: SpatialData, name: str, *, call: str) -> None:
    """Raise `ValueError` if the section already has shapes of a name that `call` would replace."""
    if name in sdata.shapes:
        raise ValueError(
            f"Section {sample(sdata)!r} has shapes {name!r} already, such as measured ones. Write the new shapes under "
            f"another name with `{call}(sdata, key_added={name + '_2'!r})`, or first delete the existing ones with "
            f"`del sdata.shapes[{name!r}]`."
        )


def write_shapes(sdata: SpatialData, frame: GeoDataFrame, *, name: str, image_key: str | None = None) -> None:
    """Write shapes in pixels of the H&E or another image, with every coordinate system of that image."""
    check_free(sdata, name, of="shapes")
    placed = pixel_frame(sdata, image_key).shapes(frame)
    sdata.shapes.pop(name, None)
    sdata.shapes[name] = placed


def nuclei_name(sdata: SpatialData, shapes_key: str | None = None) -> str:
    """Return the name of the nuclei's shapes: as given, else ``"nuclei"``, else that of spatialdata-io for Xenium."""
    if shapes_key is not None:
        return shapes_key
    return next((name for name in (NUCLEI, _NUCLEI_OF_XENIUM) if name in sdata.shapes), NUCLEI)


def nuclei(sdata: SpatialData, shapes_key: str | None = None, image_key: str | None = None) -> GeoDataFrame:
    """Return the nuclei as polygons in H&E pixels.

    - `sdata`: the section.
    - `shapes_key`: name of the nuclei's shapes. By default that of `nuclei_name`.
    - `image_key`: the image whose pixels are used, if not the H&E.
    """
    name = nuclei_name(sdata, shapes_key)
    if name not in sdata.shapes:
        raise KeyError(
            f"Section {sample(sdata)!r} has no shapes {name!r} (found {sorted(sdata.shapes)}). Run "
            "`stimage_sd.pp.segment_nuclei(sdata)` first, or name others with `shapes_key=`."
        )
    frame = shapes_in_pixels(sdata, name, image_key=image_key)
    if "radius" in frame.columns and len(frame) and frame.geometry.iloc[0].geom_type == "Point":
        frame = frame.assign(geometry=frame.geometry.buffer(frame["radius"])).drop(columns="radius")
    return frame


def predictions(sdata: SpatialData, key: str = PREDICTIONS) -> AnnData:
    """Return a table of predictions."""
    if key not in sdata.tables:
        others = [name for name, table in sdata.tables.items() if "prediction" in table.uns]
        hint = f" It has {others}: name one with `key=`." if others else ""
        call = "" if key == PREDICTIONS else f", key_added={key!r}"
        raise KeyError(
            f"Section {sample(sdata)!r} has no predictions {'' if key == PREDICTIONS else repr(key)}".rstrip()
            + f". Run `stimage_sd.tl.predict(sdata, model{call})` first.{hint}"
        )
    return sdata.tables[key]


def write_predictions(sdata: SpatialData, table: AnnData, *, key: str = PREDICTIONS) -> None:
    """Write a table of predictions that annotates the tiles, and replace an earlier one of that name."""
    _write_over_tiles(sdata, key, table)


def check_prediction_key(sdata: SpatialData, key: str) -> None:
    """Raise `ValueError` if predictions cannot be written under a name."""
    check_free(sdata, key, of="tables")
    if key in sdata.tables and TILE_SQUARES not in regions_of(sdata.tables[key]):
        raise ValueError(
            f"Section {sample(sdata)!r} has a table {key!r} already, and it holds no predictions. Choose another name "
            "with `key_added=`."
        )


def gene_classes(sdata: SpatialData, key: str = GENE_CLASSES) -> AnnData:
    """Return the table of predicted gene classes."""
    if key not in sdata.tables:
        raise KeyError(
            f"Section {sample(sdata)!r} has no predicted classes of genes. Run "
            "`stimage_sd.tl.predict(sdata, classifier)` with a classifier of `stimage_sd.tl.fit_gene_classifier` first."
        )
    return sdata.tables[key]


def write_gene_classes(sdata: SpatialData, table: AnnData, *, key: str = GENE_CLASSES) -> None:
    """Write the table of predicted gene classes that annotates the tiles, and replace an earlier one."""
    _write_over_tiles(sdata, key, table)


def _write_over_tiles(sdata: SpatialData, name: str, table: AnnData) -> None:
    check_prediction_key(sdata, name)
    parsed = annotate(table, region=TILE_SQUARES)
    if name in sdata.tables:
        del sdata.tables[name]
    sdata.tables[name] = parsed


def explained(sdata: SpatialData) -> GeoDataFrame:
    """Return the explained nuclei, or else the explained segments of another kind, in H&E pixels."""
    for name in (NUCLEI_EXPLAINED, SEGMENTS_EXPLAINED):
        if name in sdata.shapes:
            return shapes_in_pixels(sdata, name)
    raise KeyError(
        f"Section {sample(sdata)!r} has no explained nuclei. Run `stimage_sd.tl.explain(sdata, model, gene)` first."
    )


def explanations(sdata: SpatialData) -> AnnData:
    """Return the table of explained tiles: ``obs`` are tiles, ``var`` are genes."""
    if EXPLANATIONS not in sdata.tables:
        raise KeyError(
            f"Section {sample(sdata)!r} has no explained tiles. Run `stimage_sd.tl.explain(sdata, model, gene)` first."
        )
    return sdata.tables[EXPLANATIONS]


def unstable_tiles(
    sdata: SpatialData, gene: str, *, method: str = "lime", min_stability: float | None, min_r2: float | None
) -> dict[int, str]:
    """Say why the scores of explained tiles are not to be read, such as ``"stability 0.41 < 0.9"``, keyed by tile.

    - `sdata`: the section.
    - `gene`: the gene.
    - `method`: method of the scores. Only scores by ``"lime"`` have a stability.
    - `min_stability`: lowest stability of scores that can be read. Tiles with fewer than three segments have no
      stability. `None`: any.
    - `min_r2`: lowest held-out R² of the linear model. `None`: any.
    - returns: only tiles that fail. It is empty if nothing is known of the tiles.
    """
    if method != "lime" or EXPLANATIONS not in sdata.tables:
        return {}
    table = sdata.tables[EXPLANATIONS]
    if gene not in table.var_names or not {"stability", "r2"} <= set(table.layers):
        return {}
    column = table.var_names.get_loc(gene)
    stability, r2 = (np.asarray(table.layers[name])[:, column] for name in ("stability", "r2"))
    reasons = {}
    for row, (tile, n_segments) in enumerate(table.obs[[INSTANCE_KEY, "n_segments"]].itertuples(index=False)):
        if n_segments > 2 and min_stability is not None and not stability[row] >= min_stability:
            reasons[int(tile)] = _below("stability", stability[row], min_stability)
        elif n_segments and min_r2 is not None and not r2[row] >= min_r2:
            reasons[int(tile)] = _below("R²", r2[row], min_r2)
    return reasons


def _below(name: str, value: float, limit: float) -> str:
    if np.isnan(value):
        return "hidden segments change nothing"
    return f"{name} {np.floor(100 * value + 1e-4) / 100:.2f} < {limit:g}"  # rounded down, so that it is below the limit


def write_explained(sdata: SpatialData, frame: GeoDataFrame, *, of_nuclei: bool = True) -> None:
    """Write explained nuclei or other segments, in H&E pixels, and replace earlier ones of either kind."""
    shapes = pixel_frame(sdata).shapes(frame)
    for name in (NUCLEI_EXPLAINED, SEGMENTS_EXPLAINED):
        if name in sdata.shapes:
            del sdata.shapes[name]
    sdata.shapes[NUCLEI_EXPLAINED if of_nuclei else SEGMENTS_EXPLAINED] = shapes


def write_explanations(sdata: SpatialData, table: AnnData) -> None:
    """Write the table of explained tiles, and replace an earlier one."""
    _write_over_tiles(sdata, EXPLANATIONS, table)


def cell_types(sdata: SpatialData) -> AnnData:
    """Return the table of predicted cells: ``obs`` are nuclei, ``var`` are cell types."""
    if CELL_TYPES not in sdata.tables:
        raise KeyError(
            f"Section {sample(sdata)!r} has no predicted cells. Run `stimage_sd.tl.predict(sdata, model)` with a cell "
            "classifier first."
        )
    return sdata.tables[CELL_TYPES]


def cell_shapes(sdata: SpatialData) -> str:
    """Return the name of the predicted cells' shapes."""
    return str(cell_types(sdata).obs[REGION_KEY].iloc[0])


def outlines(frame: GeoDataFrame) -> NDArray[np.object_]:
    """Return shapes as polygons. A multipolygon is replaced by its largest part.

    >>> import geopandas, shapely
    >>> apart = shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(5, 0, 9, 4)])
    >>> outlines(geopandas.GeoDataFrame(geometry=[apart]))[0].area
    16.0
    """
    shapes = np.array(frame.geometry.array, dtype=object)
    for index in np.flatnonzero(shapely.get_type_id(shapes) != shapely.GeometryType.POLYGON):
        shapes[index] = max(shapely.get_parts(shapes[index]), key=shapely.area)
    return shapes


def check_cells_can_be_written(sdata: SpatialData, name: str, *, call: str) -> None:
    """Raise `ValueError` if predicted cells would replace a table or shapes that were not predicted."""
    if CELL_TYPES in sdata.tables and not is_result(CELL_TYPES, sdata.tables[CELL_TYPES]):
        raise ValueError(
            f"Section {sample(sdata)!r} has a table {CELL_TYPES!r} already, and it holds no predicted cells. Rename it "
            f"first: `sdata[{CELL_TYPES + '_measured'!r}] = sdata.tables.pop({CELL_TYPES!r})`."
        )
    if CELL_TYPES not in sdata.tables or cell_shapes(sdata) != name:
        check_no_shapes(sdata, name, call=call)


def write_cells(
    sdata: SpatialData, frame: GeoDataFrame, table: AnnData, *, name: str, image_key: str | None = None
) -> None:
    """Write the table and shapes of predicted cells, and remove earlier predicted cells.

    The coordinates of `frame` are pixels of `image_key`, or of the H&E by default.
    """
    shapes, parsed = pixel_frame(sdata, image_key).shapes(frame), annotate(table, region=name)
    parsed.uns[PREDICTED_CELLS] = True
    if CELL_TYPES in sdata.tables:
        before = cell_shapes(sdata)
        del sdata.tables[CELL_TYPES]
        if before in sdata.shapes:
            del sdata.shapes[before]
    sdata.shapes[name] = shapes
    sdata.tables[CELL_TYPES] = parsed
