"""What the steps read and write: the H&E, counts, tissue, tiles, embeddings, predictions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, TableModel
from spatialdata.transformations import (
    Scale,
    get_transformation,
    set_transformation,
)

from stimage_sd.contract._elements import add_microns, annotate, build_image, build_shapes, is_rgb, levels
from stimage_sd.contract._instrument import instrument_elements
from stimage_sd.contract._names import (
    BINS,
    CELLS,
    COUNTS,
    EXPLANATIONS,
    GENE_CLASSES,
    INSTANCE_KEY,
    NUCLEI,
    PREDICTIONS,
    PROTEINS,
    SPATIAL_UM,
    SPOT_PROTEINS,
    TILE_SQUARES,
    TILES,
    TISSUE,
    single,
)
from stimage_sd.contract._section import info, sample

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

#: what a section's units were measured for
Against = Literal["counts", "proteins"]
_NOT_COUNTS = (TILES, PREDICTIONS, GENE_CLASSES, EXPLANATIONS, PROTEINS, SPOT_PROTEINS)


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
        measured = instrument_elements(sdata)  # three channels of fluorescence are no colours
        name = single(
            [name for name in sdata.images if name not in measured and is_rgb(levels(sdata, name)[0])],
            what="RGB image",
            argument="image_key",
            found=sorted(sdata.images),
        )
    if name not in sdata.images:
        raise KeyError(f"No image {name!r} in section {sample(sdata)!r}; its images: {sorted(sdata.images)}.")
    if section["image"] is None and is_rgb(levels(sdata, name)[0]):
        section["image"] = name
    return name


def working_image_name(sdata: SpatialData, image_key: str | None = None) -> str:
    """Return `image_key`, else the stain-normalised H&E where there is one, else the H&E."""
    normalized = info(sdata).get("normalized_image")
    if image_key is None and normalized in sdata.images:
        return str(normalized)
    return image_name(sdata, image_key)


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
    if not is_rgb(array):
        raise ValueError(
            f"Expected the H&E {name!r} to be 8-bit RGB (3 channels of uint8), found {array.shape[0]} channel(s) of "
            f"{array.dtype}. Choose another image with `image_key=`, or convert it."
        )


def derive_image(sdata: SpatialData, source: str, pyramid: list[da.Array]) -> xr.DataTree:
    """Build an image element from lazy levels that lie where those of the element `source` lie."""
    element = build_image(pyramid)
    transformations = get_transformation(sdata.images[source], get_all=True)
    set_transformation(element, transformations, set_all=True)
    return element


def has_counts(sdata: SpatialData) -> bool:
    """Whether the section has a table of raw counts, or several to choose from."""
    return any(name not in _NOT_COUNTS for name in sdata.tables)


def has_units(sdata: SpatialData) -> bool:
    """Whether the section has units that were measured: for counts or for proteins."""
    return has_counts(sdata) or any(name in sdata.tables for name in (PROTEINS, SPOT_PROTEINS))


def counts_name(sdata: SpatialData, table_key: str | None = None) -> str:
    """Return the name of the table of raw counts: the one that was made last, else the platform's own."""
    return _table_name(
        sdata,
        "counts",
        [name for name in sdata.tables if name not in _NOT_COUNTS],
        table_key,
        mend="Read the section with a reader that has molecules, such as `stimage_sd.io.visium`.",
    )


def proteins_name(sdata: SpatialData, table_key: str | None = None) -> str:
    """Return the name of the table of protein intensities: the one that was made last, else the platform's own."""
    return _table_name(
        sdata,
        "proteins",
        [name for name in (PROTEINS, SPOT_PROTEINS) if name in sdata.tables],
        table_key,
        mend="Read the section with a reader that has proteins, such as `stimage_sd.io.codex`.",
    )


def _table_name(sdata: SpatialData, against: Against, candidates: list[str], table_key: str | None, mend: str) -> str:
    if table_key is None:
        preferred = (info(sdata).get(against), COUNTS if against == "counts" else PROTEINS)
        for name in preferred:
            if name in sdata.tables:
                return str(name)
    else:
        candidates = [name for name in sdata.tables if name == table_key]
    what = "table of counts" if against == "counts" else "table of proteins"
    return single(candidates, what=what, argument="table_key", found=sorted(sdata.tables), mend=mend)


def activate(sdata: SpatialData, against: Against, name: str) -> None:
    """Make a table the one that later steps take for the section's counts, or proteins."""
    info(sdata)[against] = name


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
    _check_placed(sdata, name)
    check_counts(table.X, where=f"table {name!r} of section {sample(sdata)!r}")
    return table


def proteins(sdata: SpatialData, table_key: str | None = None) -> AnnData:
    """Return the table of protein intensities, ``obs`` = measured units, ``var`` = channels.

    Raises
    ------
    KeyError
        If there is none, or several and `table_key` names none of them.
    ValueError
        If the table has no ``obsm["spatial"]``.
    """
    name = proteins_name(sdata, table_key)
    _check_placed(sdata, name)
    return sdata.tables[name]


def measured(sdata: SpatialData, against: Against | None = None, table_key: str | None = None) -> AnnData:
    """Return the table of counts or of proteins; `None`: of counts where there are any, else of proteins."""
    against = _default(sdata) if against is None else against
    return counts(sdata, table_key) if against == "counts" else proteins(sdata, table_key)


def _default(sdata: SpatialData) -> Against:
    return "counts" if has_counts(sdata) or not has_units(sdata) else "proteins"


def _check_placed(sdata: SpatialData, name: str) -> None:
    table = sdata.tables[name]
    if "spatial" in table.obsm:
        return
    if SPATIAL_UM in table.obsm:
        raise ValueError(
            f"The units of section {sample(sdata)!r} are not placed on its H&E yet. Run `stimage_sd.pp.register(sdata)`"
            ", or pass the reader the alignment."
        )
    raise ValueError(
        f'Expected `sdata.tables["{name}"].obsm["spatial"]` (x, y in H&E pixels), found {list(table.obsm)}.'
    )


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
    """Return the name of the shapes that the counts, or else the proteins, annotate."""
    if shapes_key is not None:
        if shapes_key not in sdata.shapes:
            raise KeyError(f"No shapes {shapes_key!r}; this section's shapes: {sorted(sdata.shapes)}.")
        return shapes_key
    find = counts_name if _default(sdata) == "counts" else proteins_name
    table = sdata.tables[find(sdata, table_key)]
    region = table.uns.get(TableModel.ATTRS_KEY, {}).get(TableModel.REGION_KEY)
    candidates = [region] if isinstance(region, str) else list(region or [])
    return single(
        [name for name in candidates if name in sdata.shapes],
        what="element of shapes that the counts annotate",
        argument="shapes_key",
        found=sorted(sdata.shapes),
    )


def stands_on_spots(sdata: SpatialData, shapes_key: str | None = None, table_key: str | None = None) -> bool:
    """Whether the section's units are spots, not cells or bins, which are smaller than a tile."""
    if not has_units(sdata):
        return False
    try:
        return units_name(sdata, shapes_key, table_key) not in (CELLS, NUCLEI, BINS)
    except KeyError:
        return True  # a table without shapes: its own positions are what there is


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
        add_microns(labels, float(info(sdata)["mpp"]))
    sdata.labels[TISSUE] = labels


def tissue(sdata: SpatialData) -> tuple[np.ndarray, tuple[float, float]]:
    """Return the tissue mask, ``(y, x)`` bool, and the full-resolution pixels one of its pixels spans (y, x)."""
    if TISSUE not in sdata.labels:
        raise KeyError(f"Section {sample(sdata)!r} has no tissue mask. Run `stimage_sd.pp.tissue_mask(sdata)` first.")
    labels = sdata.labels[TISSUE]
    matrix = get_transformation(labels, to_coordinate_system="global").to_affine_matrix(("y", "x"), ("y", "x"))
    return np.asarray(labels.data) > 0, (float(matrix[0, 0]), float(matrix[1, 1]))


def check_no_shapes(sdata: SpatialData, name: str, *, call: str) -> None:
    """Raise `ValueError` where there are shapes of a name already, which `call` would replace."""
    if name in sdata.shapes:
        raise ValueError(
            f"Section {sample(sdata)!r} has shapes {name!r} already, such as those that were measured. Write others "
            f"beside them with `{call}(sdata, shapes_key={name + '_2'!r})`, or take them away first with "
            f"`del sdata.shapes[{name!r}]`."
        )


def write_nuclei(sdata: SpatialData, frame: GeoDataFrame, *, name: str = NUCLEI) -> None:
    """Write nuclei as shapes, in H&E pixels."""
    sdata.shapes[name] = build_shapes(frame, mpp=info(sdata)["mpp"])


def tile_squares(sdata: SpatialData, names: Iterable[str | int] | None = None) -> np.ndarray:
    """Return the tiles' extents.

    Parameters
    ----------
    sdata
        The section.
    names
        Of the tiles that are wanted: ``obs_names`` or ``instance_id`` of the table of tiles; all by default.

    Returns
    -------
    ``float64 (n, 4)``: left, top, right, bottom; H&E px.

    Raises
    ------
    KeyError
        If the section was not tiled, or a tile is none of its.
    """
    table = tiles(sdata)
    rows = np.arange(table.n_obs)
    if names is not None:
        wanted = list(names)
        by_name = table.obs_names.get_indexer([str(name) for name in wanted])
        by_number = pd.Index(table.obs[INSTANCE_KEY]).get_indexer(
            [name if isinstance(name, int | np.integer) else -1 for name in wanted]
        )
        rows = np.where(by_name >= 0, by_name, by_number)
        if len(rows) == 0 or (rows < 0).any():
            unknown = [name for name, row in zip(wanted, rows, strict=True) if row < 0]
            raise KeyError(
                f"Expected names of tiles of section {sample(sdata)!r}, such as {table.obs_names[0]!r}; found "
                f"{unknown[:5] if unknown else 'none'}. `sdata.tables[{TILES!r}].obs_names` lists them."
            )
    centers, half = np.asarray(table.obsm["spatial"], dtype=np.float64)[rows], tiling(sdata)["side_px"] / 2
    return np.concatenate([centers - half, centers + half], axis=1)


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
    _write_over_tiles(sdata, PREDICTIONS, table)


def gene_classes(sdata: SpatialData) -> AnnData:
    """Return the table of predicted classes of genes.

    Raises
    ------
    KeyError
        If none were predicted yet.
    """
    if GENE_CLASSES not in sdata.tables:
        raise KeyError(
            f"Section {sample(sdata)!r} has no predicted classes of genes. Run "
            "`stimage_sd.tl.predict(sdata, classifier)` with a classifier of `stimage_sd.tl.fit_gene_classifier` first."
        )
    return sdata.tables[GENE_CLASSES]


def write_gene_classes(sdata: SpatialData, table: AnnData) -> None:
    """Write the table of predicted classes of genes, which annotates the tiles; replaces an earlier one."""
    _write_over_tiles(sdata, GENE_CLASSES, table)


def _write_over_tiles(sdata: SpatialData, name: str, table: AnnData) -> None:
    parsed = annotate(table, region=TILE_SQUARES)
    if name in sdata.tables:
        del sdata.tables[name]
    sdata.tables[name] = parsed


def align_to_spots(
    sdata: SpatialData, table: AnnData, table_key: str | None = None, *, against: Against | None = "counts"
) -> tuple[np.ndarray, AnnData]:
    """Match rows of a table over tiles with the spots they sit on.

    Parameters
    ----------
    sdata
        The section.
    table
        A table over tiles with ``obs["spot_id"]``.
    table_key
        Name of the table of counts or proteins.
    against
        Which of them; `None`: counts where there are any.

    Returns
    -------
    Row numbers of `table` that have a measured spot, and what was measured in that order.

    Raises
    ------
    KeyError
        If tiles sit on no spots, as those of a grid do.
    """
    units = measured(sdata, against, table_key)
    if "spot_id" not in table.obs:
        raise KeyError(
            f"The tiles of section {sample(sdata)!r} do not sit on spots, so they cannot be compared with what was "
            'measured. Tile with `stimage_sd.pp.tile(sdata, layout="spots")`; where the units are cells or bins, make '
            "spots of them first with `stimage_sd.pp.aggregate(sdata)`."
        )
    where = units.obs_names.get_indexer(table.obs["spot_id"].astype(str))
    rows = np.flatnonzero(where >= 0)
    if rows.size == 0:
        raise KeyError(
            f"No tile of section {sample(sdata)!r} sits on one of its measured units. Tile again with "
            '`stimage_sd.pp.tile(sdata, layout="spots")` after they were read or aggregated.'
        )
    return rows, units[where[rows]]
