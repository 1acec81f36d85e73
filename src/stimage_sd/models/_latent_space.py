"""Principal components of tiles (by predictions or embeddings) and of predicted cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._features import FeatureSpace, Standardize
from stimage_sd.models._specification import common_specification, features

Use = Literal["predictions", "embeddings", "cells"]
#: key in ``obsm`` of the features of predicted cells, and key in ``uns`` of the features of places without a nucleus
CELL_FEATURES, BACKGROUND_FEATURES = "X_cell_features", "background_features"
#: maximum number of cells per section
_MOST_CELLS = 5000


def kept_table(sdata: SpatialData, use: Use, key: str = contract.PREDICTIONS) -> ad.AnnData:
    """Return the table of predictions, the kept tiles, or the predicted cells with background."""
    if use == "predictions":
        return contract.predictions(sdata, key)
    if use == "cells":
        return _cells_and_background(sdata)
    table = contract.tiles(sdata)
    return table[table.obs["keep"].to_numpy()]


def components(
    cohort: Mapping[str, SpatialData],
    *,
    use: Use,
    extractor: str,
    n_components: int,
    standardize: Standardize,
    seed: int,
    key: str = contract.PREDICTIONS,
) -> dict[str, np.ndarray]:
    """Compute principal components of the tiles or cells of all sections in one space.

    - `cohort`: sections with predictions, embeddings or predicted cells.
    - `use`: ``"predictions"``: log1p of the predicted means. ``"embeddings"``: embeddings of `extractor`, with their
      context. ``"cells"``: features of predicted cells.
    - `extractor`: name of the extractor.
    - `n_components`: maximum number of components.
    - `standardize`: ``"section"`` or ``"cohort"``: standardize by the mean and deviation of each section or of the
      cohort.
    - `seed`: seed of the decomposition.
    - `key`: name of the tables of predictions.
    - returns: components of each section, ``float32 (n_tiles, n_components)``, by section name.
    """
    if use not in get_args(Use):
        raise ValueError(f"Expected `use` to be one of {list(get_args(Use))}, found {use!r}.")
    if n_components < 1:
        raise ValueError(f"Expected `n_components` of at least 1, found {n_components}.")
    if standardize not in ("section", "cohort"):
        raise ValueError(f'Expected `standardize` to be "section" or "cohort", found {standardize!r}.')
    if use == "embeddings":
        tiles = common_specification(dict(cohort), extractor)
        embedded = {name: features(sdata, tiles) for name, sdata in cohort.items()}
        space = FeatureSpace.fit(embedded, n_components=n_components, standardize=standardize, seed=seed)
        return {name: space.reduce(values) for name, values in embedded.items()}
    if use == "cells":
        of_cells = {name: np.asarray(_cells_and_background(sdata).X) for name, sdata in cohort.items()}
        n_components = min(n_components, next(iter(of_cells.values())).shape[1])
        space = FeatureSpace.fit(of_cells, n_components=n_components, standardize=standardize, seed=seed)
        return {name: space.reduce(values) for name, values in of_cells.items()}
    tables = [contract.predictions(sdata, key) for sdata in cohort.values()]
    genes = [gene for gene in tables[0].var_names if all(gene in table.var_names for table in tables[1:])]
    if len(genes) < 2:
        raise ValueError(f"Expected two or more predicted genes that all sections share, found {genes}.")
    logged = [np.log1p(np.asarray(table[:, genes].X, dtype=np.float64)) for table in tables]
    if standardize == "section":
        scaled = np.concatenate([_standardized(values) for values in logged])
    else:
        scaled = _standardized(np.concatenate(logged))
    rank = min(n_components, len(genes), len(scaled) - 1)
    reduced = PCA(rank, random_state=seed).fit_transform(scaled).astype(np.float32)
    ends = np.cumsum([table.n_obs for table in tables])[:-1]
    return dict(zip(cohort, np.split(reduced, ends), strict=True))


def _cells_and_background(sdata: SpatialData) -> ad.AnnData:
    """Return features of predicted cells (at most `_MOST_CELLS`) and of places without a nucleus."""
    table = contract.cell_types(sdata)
    if CELL_FEATURES not in table.obsm:
        raise KeyError(
            f"The predicted cells of section {contract.sample(sdata)!r} have no features: their network gives none."
        )
    rows = np.unique(np.linspace(0, table.n_obs - 1, min(table.n_obs, _MOST_CELLS)).astype(int))
    background = np.asarray(table.uns.get(BACKGROUND_FEATURES, np.empty((0, table.obsm[CELL_FEATURES].shape[1]))))
    obs = table.obs.iloc[rows].copy()
    types = [*map(str, table.obs["cell_type"].astype("category").cat.categories), "background"]
    obs["cell_type"] = obs["cell_type"].astype(object)
    nothing = pd.DataFrame({"cell_type": "background"}, index=[f"background_{n}" for n in range(len(background))])
    values = np.concatenate([np.asarray(table.obsm[CELL_FEATURES])[rows], background]).astype(np.float32)
    together = pd.concat([obs, nothing])
    # types that do not occur keep their place among the colors of the figures
    together["cell_type"] = pd.Categorical(together["cell_type"], categories=types)
    return ad.AnnData(values, together)


def _standardized(values: np.ndarray) -> np.ndarray:
    deviation = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(deviation > 1e-12, deviation, 1.0)
