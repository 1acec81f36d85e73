"""Convert cells that are labels of several fields of view to shapes of one section."""

from __future__ import annotations

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
