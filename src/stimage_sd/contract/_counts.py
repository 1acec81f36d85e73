"""Read measured counts and proteins, and match them with tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from spatialdata import SpatialData

from stimage_sd.contract._elements import counts_problem, regions_of
from stimage_sd.contract._names import are_genes, without_versions
from stimage_sd.contract._section import info, sample
from stimage_sd.contract._tables import Against, cell_table_names, counts_name, default_against, holds_counts
from stimage_sd.contract._units import find_units, units_of, units_on


class Source(NamedTuple):
    """Names of the table and layer that hold the counts. `None` means the section's own."""

    table: str | None = None
    layer: str | None = None

    def as_keys(self) -> dict[str, str | None]:
        """Return the table and layer as keyword arguments of the public functions."""
        return {"table_key": self.table, "layer": self.layer}


def counts(sdata: SpatialData, source: Source | None = None) -> AnnData:
    """Return raw counts: ``obs`` are measured units, ``var`` are genes, ``X`` holds the counts.

    Antibodies and controls are left out by ``var["feature_types"]``. The result may be a copy, so do not write to it.

    - `sdata`: the section.
    - `source`: table and layer. The default table is the section's own. The default layer is the one passed to
      `stimage_sd.io.from_spatialdata`, else ``X``.
    """
    table_key, layer = source or Source()
    name = counts_name(sdata, table_key)
    table = sdata.tables[name]
    layer = layer if layer is not None else info(sdata).get("layers", {}).get(name)
    where = f"table {name!r} of section {sample(sdata)!r}"
    if layer is not None and layer not in table.layers:
        known = sorted(name for name in table.layers if name is not None)
        raise KeyError(f"No layer {layer!r} in {where}; its layers: {known}.")
    values = table.X if layer is None else table.layers[layer]
    check_counts(values, where=where if layer is None else f"layer {layer!r} of {where}", table=table)
    genes = are_genes(table.var)
    _check_genes(table.var_names[genes], where)
    # a table that annotates no element still has counts
    rows = units_of(sdata, name).rows if regions_of(table) else np.arange(table.n_obs)
    return _taken(table, rows, layer, None if genes.all() else np.flatnonzero(genes))


def _check_genes(names: pd.Index, where: str) -> None:
    """Raise `ValueError` if two genes have the same name."""
    plain = without_versions(names)
    wrong = plain[plain.duplicated()]
    if len(wrong):
        mend = (
            "The table has two versions of one Ensembl id. Add up their columns, or leave one out."
            if names.is_unique
            else "Run `sdata.tables[...].var_names_make_unique()` on that table."
        )
        raise ValueError(
            f"Expected every gene once in {where}, found {len(wrong)} repeated, such as {str(wrong[0])!r}. {mend}"
        )


def proteins(sdata: SpatialData, table_key: str | None = None) -> AnnData:
    """Return the table of protein intensities: ``obs`` are measured units, ``var`` are channels."""
    units = find_units(sdata, table_key=table_key, against="proteins")
    return _taken(sdata.tables[str(units.table)], units.rows, None)


def _taken(
    table: AnnData, rows: NDArray[np.int64], layer: str | None, columns: NDArray[np.int64] | None = None
) -> AnnData:
    """Return a table with some rows, columns and one matrix, or the table itself if nothing changes."""
    values = table.X if layer is None else table.layers[layer]
    # without versions, sections of different Ensembl releases have the same genes
    var, genes = table.var, without_versions(table.var_names)
    if columns is not None:
        values, var, genes = values[:, columns], var.iloc[columns], genes[columns]
    # scanpy does not accept sparse arrays everywhere; the matrix shares their memory
    if isinstance(values, sp.sparray):
        values = sp.csr_matrix(values)
    elif columns is None and layer is None and len(rows) == table.n_obs and genes.equals(table.var_names):
        return table
    var = var.set_axis(genes, axis=0)
    if len(rows) == table.n_obs:
        return AnnData(X=values, obs=table.obs, var=var, uns=dict(table.uns))
    return AnnData(X=values[rows], obs=table.obs.iloc[rows], var=var, uns=dict(table.uns))


def measured(sdata: SpatialData, against: Against | None = None, source: Source | None = None) -> AnnData:
    """Return the table of counts or of proteins. `None` prefers counts and falls back to proteins."""
    against = default_against(sdata) if against is None else against
    return counts(sdata, source) if against == "counts" else proteins(sdata, (source or Source()).table)


def check_counts(values: Any, *, where: str, table: AnnData | None = None) -> None:
    """Raise `ValueError` if a dense or sparse matrix does not hold counts.

    The message names a layer of `table` that holds counts, if there is one.
    """
    problem = counts_problem(values)
    if problem is None:
        return
    message = f"Expected raw counts in {where}, found {problem}."
    layers = [] if table is None else [str(name) for name in table.layers if name is not None]
    holding = [name for name in layers if table is not None and counts_problem(table.layers[name]) is None]
    if holding:
        raise ValueError(f"{message} Its layer {holding[0]!r} holds counts: pass `layer={holding[0]!r}`.")
    raise ValueError(
        f"{message} Pass counts before normalization and log, or name a layer that has them with `layer=`."
    )


def count_type(values: Any) -> type[np.int32] | type[np.int64]:
    """Return the dtype that holds counts exactly: int32 if all counts fit, else int64."""
    data = values.data if hasattr(values, "tocsr") else np.asarray(values)
    largest = data.max() if data.size else 0
    if largest > np.iinfo(np.int64).max:
        raise ValueError(f"Expected counts below 2**63, found {largest}. These are not counts of molecules.")
    return np.int32 if largest <= np.iinfo(np.int32).max else np.int64


def align_to_spots(
    sdata: SpatialData,
    table: AnnData,
    source: Source | None = None,
    *,
    against: Against | None = "counts",
) -> tuple[NDArray[np.int64], AnnData]:
    """Match the rows of a tile table with the spots that the tiles sit on.

    - `sdata`: the section.
    - `table`: a table with one row per tile and ``obs["spot_id"]``.
    - `source`: table of counts or proteins, and layer.
    - `against`: ``"counts"`` or ``"proteins"``. `None` prefers counts and falls back to proteins.
    - returns: row numbers of `table` that have a measured spot, and the measured table in the same order.
    """
    units = measured(sdata, against, source)
    if "spot_id" not in table.obs:
        raise KeyError(
            f"The tiles of section {sample(sdata)!r} do not sit on spots, so they cannot be compared with counts or "
            'proteins. Tile with `stimage_sd.pp.tile(sdata, layout="spots")`. If the units are cells or bins, first '
            "make spots with `stimage_sd.pp.aggregate(sdata)`."
        )
    where = units.obs_names.get_indexer(table.obs["spot_id"].astype(str))
    rows = np.flatnonzero(where >= 0)
    if rows.size == 0:
        raise KeyError(
            f"No tile of section {sample(sdata)!r} sits on one of its measured units. Tile again with "
            '`stimage_sd.pp.tile(sdata, layout="spots")` after the units were read or aggregated.'
        )
    return rows, units[where[rows]]


def counts_of_shapes(sdata: SpatialData, shapes: str, source: Source | None = None) -> tuple[pd.Index, AnnData] | None:
    """Return ids of measured cells among some shapes, and their counts, or `None` if no table has counts of them.

    - `sdata`: the section.
    - `shapes`: name of the shapes.
    - `source`: table and layer. Default: the first table of counts that annotates the shapes, or has their ids.
    """
    table, layer = source or Source()
    for name in [table] if table is not None else cell_table_names(sdata):
        units = units_on(sdata, name, shapes) if holds_counts(sdata, name) else None
        if units is None:
            continue
        counted = counts(sdata, Source(name, layer))
        where = counted.obs_names.get_indexer(units.names)
        return units.ids[where >= 0], counted[where[where >= 0]]
    return None
