"""What is predicted: the kept tiles of a section, or its nuclei or squares."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._squidpy import spatial_uns
from stimage_sd.models._predictor import OpenedBags, OpenedSection, Predictor, n_per_unit, predicts_on

#: share of tiles without nuclei above which a section was hardly segmented as a whole
_MOST_EMPTY = 0.5


class Target(NamedTuple):
    """Tiles, nuclei or squares of a section, opened by a model.

    - `opened`: gives r and p of each.
    - `table`: one row each.
    - `floor`: Mean-only fit of each gene, ``(2, n_genes)``.
    - `background`: mean counts of the part of each tile that no nucleus covers, ``(n_tiles, n_genes)``, for models of
      nuclei.
    - `unit`: their name in progress bars.
    """

    opened: OpenedSection
    table: ad.AnnData
    floor: np.ndarray
    background: np.ndarray | None
    unit: str

    def results(self, sdata: SpatialData, layers: Mapping[str, Any], genes: Sequence[str]) -> ad.AnnData:
        """Make the table of predictions from their mean and layers."""
        values = dict(layers)
        table = ad.AnnData(
            X=values.pop("mean"),
            obs=self.table.obs.drop(columns=contract.REGION_KEY).copy(),
            var=pd.DataFrame({"floor_mean": self.floor[0], "floor_dispersion": self.floor[1]}, index=list(genes)),
            layers=values,
            obsm={"spatial": contract.places(sdata, self.table).copy()},
        )
        table.obs["ood_score"] = self.opened.strangeness
        about = contract.about_instances(self.table)
        if about is not None:
            table.uns["instances"] = about
        diameter = contract.tiling(sdata)["side_px"] if about is None else _diameter(sdata, self.table)
        table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=diameter)
        return table


def open_target(model: Predictor, sdata: SpatialData, *, on: str, section: str) -> Target:
    """Open the tiles, nuclei or squares of a section."""
    able = predicts_on(model)
    if on not in ("tiles", able):
        raise ValueError(
            f"Expected a model of `stimage_sd.tl.fit_nb(..., on={on!r})`, found one that predicts "
            f"{'tiles only' if able == 'tiles' else f'tiles and {able}'}."
        )
    opened = model.open(sdata, section=section)
    every = contract.tiles(sdata)
    kept = every[every.obs["keep"].to_numpy()]
    if on == "tiles":
        if able == "nuclei":
            _warn_of_empty_tiles(sdata, able)
        background = opened.background() if able == "nuclei" and isinstance(opened, OpenedBags) else None
        return Target(opened, kept, model.floor, background, "tile")
    assert isinstance(opened, OpenedBags)
    inner, rows = opened.of_instances()
    table = contract.instances(sdata, on)
    within = contract.within_tiles(sdata, table)
    # without the embeddings, which are gigabytes for a slide of a million nuclei
    table = ad.AnnData(obs=table.obs.iloc[rows].copy(), uns=dict(table.uns))
    table.obs["tile"] = kept.obs_names[within.tile[rows]]
    table.obs["in_tile"] = within.inside[rows]
    return Target(inner, table, model.floor / n_per_unit(model), None, "nucleus" if on == "nuclei" else "square")


def _warn_of_empty_tiles(sdata: SpatialData, on: str) -> None:
    """Warn if most tiles hold no nucleus: they are predicted as background only."""
    within = contract.within_tiles(sdata, contract.instances(sdata, on))
    empty = float((within.per_tile == 0).mean())
    if empty > _MOST_EMPTY:
        warnings.warn(
            f"{empty:.0%} of the tiles of section {contract.sample(sdata)!r} hold no nucleus and are predicted as "
            "background. Find the nuclei of all tiles with `stimage_sd.pp.segment_nuclei(sdata)`, and embed them.",
            UserWarning,
            stacklevel=3,
        )


def _diameter(sdata: SpatialData, table: ad.AnnData) -> float:
    """Return the median diameter of nuclei or squares, px of the H&E, that of the circle of the same area."""
    return float(2 * np.sqrt(np.median(contract.instance_areas(sdata, table)) / np.pi))
