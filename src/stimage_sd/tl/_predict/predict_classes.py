"""Predict on which tiles genes are High."""

from __future__ import annotations

from collections.abc import Mapping

import anndata as ad
import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._squidpy import spatial_uns
from stimage_sd.models._gene_classifier import GeneClassifier


def predict_classes(cohort: Mapping[str, SpatialData], model: GeneClassifier, *, key: str) -> None:
    """Write ``tables["gene_classes"]`` of every section, after checking all sections.

    ``X`` holds the probability of High, ``float32 (n_tiles, n_genes)``. Layer ``high`` is True where the probability is
    above one half. ``var`` holds threshold and base rate in training. ``obs["ood_score"]`` is written too.
    """
    for sdata in cohort.values():
        contract.check_prediction_key(sdata, key)
    predicted = {name: model.probabilities(sdata, section=name) for name, sdata in cohort.items()}
    for name, sdata in cohort.items():
        tiles = contract.tiles(sdata)
        kept = tiles[tiles.obs["keep"].to_numpy()]
        probability, strangeness = predicted[name]
        table = ad.AnnData(
            X=probability,
            obs=kept.obs.drop(columns=contract.REGION_KEY).copy(),
            var=pd.DataFrame({"threshold": model.thresholds, "base_rate": model.base_rates}, index=list(model.genes)),
            layers={"high": probability > 0.5},
            obsm={"spatial": contract.tile_geometry(sdata, kept).centers.copy()},
        )
        table.obs["ood_score"] = strangeness
        table.uns["spatial"] = spatial_uns(sdata, spot_diameter_px=contract.tiling(sdata)["side_px"])
        table.uns["prediction"] = {**model.description, "trained_on": list(model.training.get("sections", []))}
        contract.write_gene_classes(sdata, table, key=key)
        contract.record(sdata, "tl.predict", n_genes=len(model.genes), model="GeneClassifier")
