"""Cluster tiles by predicted expression or by embeddings."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._features import Standardize
from stimage_sd.models._latent_space import components


def cluster(
    data: SpatialData | contract.Cohort,
    *,
    resolution: float = 1.0,
    n_components: int = 50,
    n_neighbors: int = 15,
    use: Literal["predictions", "embeddings"] = "predictions",
    extractor: str = "efficientnet_lite0_stages",
    standardize: Standardize = "section",
    key: str = contract.PREDICTIONS,
    key_added: str = "leiden",
    seed: int = 0,
) -> None:
    """Cluster tiles of one or several sections by the Leiden algorithm.

    Parameters
    ----------
    data
        A section or a cohort of sections. The tiles of a cohort are clustered together.
    resolution
        Resolution of the Leiden algorithm. Larger values give more clusters.
    n_components
        Maximum number of principal components of the expression or the embeddings.
    n_neighbors
        Number of nearest neighbors that a tile is connected to.
    use
        ``"predictions"``: log1p of the predicted means. ``"embeddings"``: embeddings of `extractor`.
    extractor
        Extractor whose embeddings are used.
    standardize
        ``"section"``: standardize genes or embeddings by the mean and standard deviation of each section. This removes
        shifts common to a section, from stain, scanner or the model of a fold. ``"cohort"``: by those of all tiles.
    key
        Name of the prediction table, for ``use="predictions"``.
    key_added
        Name of the column to write.
    seed
        Seed of components, neighbors and clusters.

    Returns
    -------
    Nothing. The categorical column ``obs[key_added]`` is written to ``tables["predictions"]``, or to
    ``tables["tiles"]`` for embeddings. There, tiles that are not kept have no cluster. Clusters are named ``"0"``,
    ``"1"``, ... from the largest to the smallest, and names agree across the sections of a cohort. The settings are
    stored in ``uns[key_added]``.

    Raises
    ------
    ModuleNotFoundError
        If the extra ``cluster`` is not installed.
    KeyError
        If a section has no predictions or embeddings.
    ValueError
        If the number of tiles does not exceed `n_neighbors`, or an option is out of range.

    Notes
    -----
    Paper, results on TCGA. The paper uses the Louvain algorithm, and Leiden is its successor.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_cluster", n_spots=60, n_genes=20)
    >>> section = sti.io.visium(path, image=path / "image.tif")
    >>> sti.pp.tile(section)
    >>> sti.pp.embed(section, fields_of_view=(1.0,))
    >>> model = sti.tl.fit_nb(section, genes=sti.pp.select_genes(section, n_top=5), n_members=2, max_epochs=2)
    >>> sti.tl.predict(section, model)
    >>> sti.tl.cluster(section)
    >>> section.tables["predictions"].obs["leiden"].dtype.name
    'category'
    """
    cohort = contract.sections(data)
    if not resolution > 0 or n_neighbors < 2:
        raise ValueError(
            "Expected `resolution` to be positive and `n_neighbors` to be 2 or more, found "
            f"{resolution} and {n_neighbors}."
        )
    if use not in ("predictions", "embeddings"):
        raise ValueError(f'Expected `use` to be "predictions" or "embeddings", found {use!r}.')
    if find_spec("igraph") is None:
        raise ModuleNotFoundError(
            'Found no igraph, which `tl.cluster` needs. Install it with `pip install "stimage-sd[cluster]"`.'
        )
    placed = components(
        cohort, use=use, extractor=extractor, n_components=n_components, standardize=standardize, seed=seed,
        key=key,
    )  # fmt: skip
    n_tiles = sum(map(len, placed.values()))
    if n_tiles <= n_neighbors:
        raise ValueError(f"Expected more tiles than `n_neighbors`, found {n_tiles} and {n_neighbors}.")
    names = _leiden(np.concatenate(list(placed.values())), resolution=resolution, n_neighbors=n_neighbors, seed=seed)
    categories = [str(index) for index in range(len(set(names)))]
    how = {
        "use": use,
        "standardize": standardize,
        "resolution": resolution,
        "n_components": n_components,
        "n_neighbors": n_neighbors,
        "seed": seed,
    }
    start = 0
    for section, values in placed.items():
        own = names[start : start + len(values)]
        start += len(values)
        table = contract.predictions(cohort[section], key) if use == "predictions" else contract.tiles(cohort[section])
        column = np.full(table.n_obs, None, dtype=object)
        column[slice(None) if use == "predictions" else table.obs["keep"].to_numpy()] = own
        table.obs[key_added] = pd.Categorical(column, categories=categories)
        table.uns[key_added] = {**how, "sections": list(placed)}
        contract.record(cohort[section], "tl.cluster", **how, n_clusters=len(categories), key_added=key_added)


def _leiden(values: np.ndarray, *, resolution: float, n_neighbors: int, seed: int) -> list[str]:
    """Return the cluster name per tile, with ``"0"`` for the largest cluster."""
    table = ad.AnnData(values, obs=pd.DataFrame(index=[str(number) for number in range(len(values))]))
    sc.pp.neighbors(table, n_neighbors=n_neighbors, use_rep="X", random_state=seed)
    # iterate until nothing improves, since two iterations leave some tiles in the wrong cluster
    sc.tl.leiden(table, resolution=resolution, flavor="igraph", directed=False, n_iterations=-1, random_state=seed)
    clusters = table.obs["leiden"].astype(int).to_numpy()
    order = np.argsort(-np.bincount(clusters), kind="stable")
    return [str(number) for number in np.argsort(order)[clusters]]
