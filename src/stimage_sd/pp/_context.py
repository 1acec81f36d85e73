"""Spatial context of tiles: embeddings of neighboring tiles, aggregated per ring."""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.sparse as sp
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.stats.lattice import neighbor_graph


def spatial_context(
    data: SpatialData | contract.Cohort,
    extractor: str = "efficientnet_lite0_stages",
    *,
    n_rings: int = 1,
    aggregate: Literal["mean", "max"] = "mean",
    graph: sp.spmatrix | str | None = None,
) -> None:
    """Aggregate the embeddings of each tile's neighbors.

    Parameters
    ----------
    data
        An embedded section, or a cohort of embedded sections.
    extractor
        Name of the extractor that made the embeddings.
    n_rings
        Number of rings: neighbors at 1, 2, ... `n_rings` steps. Rings are aggregated separately and concatenated.
    aggregate
        ``"mean"`` or ``"max"`` over a ring.
    graph
        Neighbor graph of the tiles: a sparse ``(n_tiles, n_tiles)`` matrix, or its name in the tiles' ``obsp`` (such as
        squidpy's ``"spatial_connectivities"``). By default the eight neighbors of a square lattice or the six of a
        hexagonal lattice.

    Returns
    -------
    Nothing. Writes ``tables["tiles"].obsm["X_<extractor>_context"]``, ``float32``, `n_rings` times as wide as the
    embeddings. Only tiles with ``keep`` count as neighbors. An empty ring repeats the next ring inside. An empty first
    ring repeats the tile's own embedding.

    Raises
    ------
    KeyError
        If the section was not embedded, or the graph does not exist.
    ValueError
        If the graph's shape does not match the tiles, or `n_rings` is not positive.

    Examples
    --------
    >>> import cv2, numpy as np, stimage_sd as sti
    >>> _ = cv2.imwrite("all_tissue.png", np.full((300, 300, 3), (200, 120, 180), np.uint8))
    >>> section = sti.io.slide("all_tissue.png", mpp=1.0)
    >>> sti.pp.tile(section, size_um=100)
    >>> section.tables["tiles"].obsm["X_mine"] = np.arange(9, dtype=np.float32)[:, None]
    >>> sti.pp.spatial_context(section, "mine")
    >>> section.tables["tiles"].obsm["X_mine_context"][4]  # the middle one: the mean of the other eight
    array([4.], dtype=float32)
    """
    if n_rings < 1:
        raise ValueError(f"Expected `n_rings` of at least 1, found {n_rings}.")
    if aggregate not in ("mean", "max"):
        raise ValueError(f'Expected `aggregate` to be "mean" or "max", found {aggregate!r}.')
    for sdata in contract.sections(data).values():
        values = contract.embeddings(sdata, extractor)
        contract.check_finite(sdata, values, extractor)
        table = contract.tiles(sdata)
        neighbors = _graph(sdata, graph)
        kept = sp.diags(table.obs["keep"].to_numpy().astype(np.float32))
        blocks, inner = [], values
        for ring in _rings(neighbors, n_rings):
            inner = _aggregate(sp.csr_matrix(ring @ kept), values, inner, aggregate)
            blocks.append(inner)
        table.obsm[contract.context_key(extractor)] = np.concatenate(blocks, axis=1)
        table.uns.setdefault("embeddings", {}).setdefault(extractor, {})["context_rings"] = int(n_rings)
        contract.record(sdata, "pp.spatial_context", extractor=extractor, n_rings=n_rings, aggregate=aggregate)


def _graph(sdata: SpatialData, graph: sp.spmatrix | str | None) -> sp.csr_matrix:
    table = contract.tiles(sdata)
    if graph is None:
        return neighbor_graph(contract.tile_geometry(sdata).centers)
    if isinstance(graph, str):
        if graph not in table.obsp:
            raise KeyError(f"No graph {graph!r} among the tiles' `obsp`: {sorted(table.obsp)}.")
        graph = table.obsp[graph]
    matrix = sp.csr_matrix(graph)
    if matrix.shape != (table.n_obs, table.n_obs):
        raise ValueError(f"Expected a graph over {table.n_obs} tiles, found a matrix of {matrix.shape}.")
    return matrix


def _rings(neighbors: sp.csr_matrix, n_rings: int) -> list[sp.csr_matrix]:
    """Return the binary adjacency at exactly 1, 2, ... steps."""
    step = (neighbors != 0).astype(np.float32)
    step.setdiag(0)
    step.eliminate_zeros()
    reached = (step + sp.identity(step.shape[0], dtype=np.float32, format="csr")) != 0
    rings, frontier = [step], step
    for _ in range(n_rings - 1):
        frontier = ((frontier @ step) != 0).astype(np.float32)
        frontier = frontier - frontier.multiply(reached)
        frontier = sp.csr_matrix(frontier)
        frontier.eliminate_zeros()
        reached = (reached.astype(np.float32) + frontier) != 0
        rings.append(frontier)
    return rings


def _aggregate(ring: sp.csr_matrix, embeddings: np.ndarray, inner: np.ndarray, how: str) -> np.ndarray:
    degree = np.asarray(ring.sum(axis=1)).ravel()
    if how == "mean":
        values = np.asarray(ring @ embeddings) / np.maximum(degree, 1)[:, None]
    else:
        values = np.full_like(embeddings, -np.inf)
        rows = np.repeat(np.arange(ring.shape[0]), np.diff(ring.indptr))
        np.maximum.at(values, rows, embeddings[ring.indices])
    return np.where(degree[:, None] > 0, values, inner).astype(np.float32)
