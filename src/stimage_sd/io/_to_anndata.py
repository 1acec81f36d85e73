"""Predictions as an `AnnData` on the measured spots, for scanpy and squidpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData
from spatialdata.models import TableModel

from stimage_sd import contract
from stimage_sd._squidpy import spatial_uns
from stimage_sd.io._anndata import RENAMED

#: columns of ``obs`` that tie a result to its tiles; not exported, as positions are in ``obsm["spatial"]``
_PLACING = (contract.REGION_KEY, contract.INSTANCE_KEY, "x", "y", "spot_id", "keep")
#: entries of ``uns`` that do not hold for predictions; ``spatial`` is written again
_OTHER_UNS = ("spatial", "log1p", TableModel.ATTRS_KEY)
#: accessors of result tables; their errors name the missing step
_RESULTS: dict[str, Callable[[SpatialData], AnnData]] = {
    contract.TILES: contract.tiles,
    contract.GENE_CLASSES: contract.gene_classes,
    contract.EXPLANATIONS: contract.explanations,
    contract.CELL_TYPES: contract.cell_types,
}


def to_anndata(
    data: SpatialData | contract.Cohort, *, key: str = contract.PREDICTIONS, table_key: str | None = None
) -> AnnData:
    """Return predictions as an `AnnData` with the names and order of the spots, for scanpy and squidpy.

    Parameters
    ----------
    data
        A section or a cohort. The sections of a cohort are concatenated, with their names in ``obs["sample"]``.
    key
        Name of the table of results: ``"predictions"``, ``"gene_classes"``, ``"cell_types"``, ``"explanations"``,
        ``"tiles"`` (embeddings), or another table on tiles.
    table_key
        Name of the table of counts, if the section has several.

    Returns
    -------
    A copy of the results. Changes to the copy do not change the section. The rows are

    - for tiles on spots: all spots of the table of counts, with their names and in their order. Spots without a
      result, such as spots off tissue, have NaN and ``obs["predicted"]`` `False`;
    - for tiles on a grid: the tiles of the result;
    - for ``"cell_types"``: the nuclei.

    ``X``, ``layers``, ``var`` and ``obsm`` come from the result. For ``"predictions"``, ``X`` is the mean, ``layers``
    holds the variances and the interval, and ``var`` holds the scores per gene. ``obs`` has the columns of the result,
    such as ``ood_score``. On spots, ``obs``, ``obsm``, ``obsp`` and ``uns`` also have the entries of the table of
    counts (clusters, UMAP, neighbors). ``obsm["spatial"]`` is in pixels of the H&E, with all transformations applied.
    Together with ``uns["spatial"]``, `squidpy.pl.spatial_scatter` draws on the H&E.

    For a cohort, genes and columns of ``obs`` are those shared by all sections. ``var`` has the columns that are equal
    in all sections. If two sections share a name, all names become ``<name>-<sample>``. To plot a cohort with squidpy,
    pass ``library_key="sample"``.

    Raises
    ------
    KeyError
        If there is no such table, or none of its tiles belongs to a spot.
    ValueError
        If the table holds measured data, or several rows per spot.

    Notes
    -----
    If the section was made from an `AnnData`, both have the same names: ``adata.obsm["predicted"] =
    result.to_df().loc[adata.obs_names]`` adds the predictions to ``adata``.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_to_anndata", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> result = sti.io.to_anndata(section)
    >>> result.shape, result.obs_names.equals(section.tables["counts"].obs_names)
    ((60, 5), True)
    """
    if isinstance(data, SpatialData):
        return _of_section(data, key, table_key)
    tables = {name: _of_section(sdata, key, table_key) for name, sdata in contract.sections(data).items()}
    names = pd.Index(np.concatenate([table.obs_names for table in tables.values()]))
    joined = ad.concat(
        tables, label="sample", merge="same", uns_merge="same", pairwise=True,
        index_unique="-" if names.has_duplicates else None,
    )  # fmt: skip
    joined.uns["spatial"] = {name: next(iter(table.uns["spatial"].values())) for name, table in tables.items()}
    return joined


def _of_section(sdata: SpatialData, key: str, table_key: str | None) -> AnnData:
    table = _result(sdata, key)
    if key == contract.CELL_TYPES:
        units = contract.units_of(sdata, key)
        diameter = units.diameter(sdata)
        return _finished(sdata, table[units.rows].copy(), units.positions(sdata), diameter)
    if "spot_id" not in table.obs or not contract.has_units(sdata):
        centers = contract.tile_geometry(sdata, table).centers
        return _finished(sdata, table.copy(), centers, contract.tiling(sdata)["side_px"])
    units = contract.find_units(sdata, table_key=table_key)
    spots = pd.Index(table.obs["spot_id"].astype(str))
    if spots.has_duplicates:
        raise ValueError(
            f"Expected one row per spot in {key!r} of section {contract.sample(sdata)!r}, found "
            f"{spots[spots.duplicated()][0]!r} more than once."
        )
    where = spots.get_indexer(units.names.astype(str))
    if (where < 0).all():
        raise KeyError(
            f"No row of {key!r} sits on one of the {len(where)} units of table {units.table!r} of section "
            f"{contract.sample(sdata)!r}. Pass the table of the tiled spots as `table_key=`."
        )
    measured = sdata.tables[str(units.table)][units.rows]
    laid = AnnData(
        X=_laid(table.X, where),
        obs=_observations(measured.obs, table.obs, where),
        var=table.var.copy(),
        layers={name: _laid(values, where) for name, values in table.layers.items() if name is not None},
        obsm={**measured.obsm, **{name: _laid(values, where) for name, values in table.obsm.items()}},
        obsp=dict(measured.obsp),
        varm=dict(table.varm),
        uns={**measured.uns, **table.uns},
    ).copy()
    laid = _finished(sdata, laid, units.positions(sdata), units.diameter(sdata))
    _name_as_before(laid, contract.info(sdata).get(RENAMED, {}))
    return laid


def _result(sdata: SpatialData, key: str) -> AnnData:
    """Return a table of results."""
    if key in sdata.tables and not contract.is_result(key, sdata.tables[key]):
        raise ValueError(
            f"Expected a table of results, found that {key!r} of section {contract.sample(sdata)!r} holds measured "
            f"data. Use `sdata.tables[{key!r}]`, which is an `AnnData` already."
        )
    read = _RESULTS.get(key)
    return contract.predictions(sdata, key) if read is None else read(sdata)


def _finished(sdata: SpatialData, table: AnnData, positions: NDArray[np.float64], diameter: float) -> AnnData:
    """Remove the links of a table to its section, and write the positions and images that squidpy needs."""
    table.obs = table.obs.drop(columns=[contract.REGION_KEY, contract.INSTANCE_KEY], errors="ignore")
    for name in _OTHER_UNS:
        table.uns.pop(name, None)
    table.obsm["spatial"] = positions.copy()
    table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=diameter)
    return table


def _laid(values: Any, where: NDArray[np.int64]) -> Any:
    """Return the rows `where` of a matrix or frame, and NaN for negative row numbers."""
    missing = where < 0
    if isinstance(values, pd.DataFrame):
        return values.iloc[where] if not missing.any() else values.reset_index(drop=True).reindex(where)
    if not missing.any():
        return values[where]
    values = values.toarray() if hasattr(values, "toarray") else values
    dtype = values.dtype if values.dtype.kind == "f" else np.dtype(np.float32)
    rows = values[np.maximum(where, 0)].astype(dtype)
    blank = missing.reshape(-1, *([1] * (rows.ndim - 1)))
    return (da if isinstance(rows, da.Array) else np).where(blank, dtype.type(np.nan), rows)


def _observations(measured: pd.DataFrame, predicted: pd.DataFrame, where: NDArray[np.int64]) -> pd.DataFrame:
    """Join the columns of spots and result. Columns of the result replace columns of the spots."""
    added = predicted.drop(columns=[name for name in _PLACING if name in predicted])
    added = _laid(added, where).set_axis(measured.index, axis=0)
    kept = measured.drop(columns=[name for name in added if name in measured])
    return pd.concat([kept, added], axis=1).assign(predicted=where >= 0)


def _name_as_before(table: AnnData, before: Mapping[str, str]) -> None:
    """Restore the names of ``obs`` columns, and their colors in ``uns``, that `io.from_anndata` changed."""
    for new, old in before.items():
        if new not in table.obs or old in table.obs:
            continue
        table.obs = table.obs.rename(columns={new: old})
        if f"{new}_colors" in table.uns:
            table.uns[f"{old}_colors"] = table.uns.pop(f"{new}_colors")
