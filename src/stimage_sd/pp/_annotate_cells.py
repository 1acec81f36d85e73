"""Types of measured cells, from a reference or from labels, on the table and on the outlines of cells and nuclei."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from spatialdata import SpatialData

from stimage_sd import contract

Labels = str | Mapping[str, str] | pd.Series
#: columns that are written
_TYPE, _CONFIDENCE = "cell_type", "cell_type_confidence"
#: genes that a reference shares with a section, at least
_LEAST_GENES = 5


def annotate_cells(
    sdata: SpatialData,
    reference: AnnData | None = None,
    *,
    labels: Labels = "cell_type",
    merge: Mapping[str, str | None] | None = None,
    n_components: int = 30,
    n_neighbors: int = 15,
    table_key: str | None = None,
    seed: int = 0,
) -> None:
    """Give measured cells a type each, and carry it onto the outlines of cells and nuclei.

    Parameters
    ----------
    sdata
        A section with cells: a table of counts over the shapes ``cells`` (Xenium, CODEX).
    reference
        A single-cell reference with raw counts in ``X``, of which the section's cells take the types. Without one the
        types are `labels`.
    labels
        With a reference, the column of its ``obs`` with the types. Without, the types themselves: a mapping or a series
        from names of cells (``obs_names``) to types, or the name of a column of the section's own table. Cells that it
        does not name have no type.
    merge
        From types to the coarser ones that are wanted, such as ``{"T cell": "immune", "B cell": "immune"}``; `None` for
        a type that is to be left out. All types that occur must be named.
    n_components, n_neighbors
        Principal components of the reference, and its nearest cells whose vote is taken, weighted by nearness. Genes
        are standardised in each of the two by itself: what a platform adds to all its cells is taken out.
    table_key
        Name of the table of counts.
    seed
        Of the principal components.

    Returns
    -------
    Nothing; ``obs["cell_type"]`` (categorical) and ``obs["cell_type_confidence"]`` (share of the neighbours' vote, of
    merged types; 1 for given labels) are written to the table of counts, and the same columns to the shapes ``cells``
    and ``nuclei``, where they are.

    Raises
    ------
    KeyError
        If there is no such column, labels name cells that are not there, or `merge` does not name a type.
    ValueError
        If the reference shares too few genes, has counts that are none, or no cell gets a type.

    Notes
    -----
    Paper, section 2.7: Seurat's reference-based integration, and four merged classes: immune, stromal, cancer
    epithelial and endothelial.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_xenium("run_cells", size_um=300.0, n_genes=9, pixel_um=0.85, n_markers=3)
    >>> section = sti.io.xenium(path, he_image=path / "he_image.ome.tif")
    >>> reference = sti.datasets.synthetic_reference(n_markers=3)
    >>> sti.pp.annotate_cells(section, reference, merge=reference.uns["merge"])
    >>> sorted(section.shapes["nuclei"]["cell_type"].unique())
    ['cancer epithelial', 'endothelial', 'immune', 'stromal']
    """
    table = contract.counts(sdata, table_key)
    if reference is None:
        types, confidence = _given(table, labels), None
        types = _merged(types, merge)
    else:
        types, confidence = _transferred(
            table, reference, labels, merge, n_components=n_components, n_neighbors=n_neighbors, seed=seed
        )
    if types.isna().all():
        raise ValueError(f"Expected a type for some cell of section {contract.sample(sdata)!r}, found none.")
    sure = types.notna().astype(float) if confidence is None else pd.Series(confidence, index=types.index)
    columns = {_TYPE: pd.Categorical(types), _CONFIDENCE: sure.to_numpy(dtype=np.float32)}
    for name, values in columns.items():
        table.obs[name] = values
    by_cell = pd.DataFrame(columns, index=table.obs[contract.INSTANCE_KEY].astype(str).to_numpy())
    for name in (contract.CELLS, contract.NUCLEI):
        if name in sdata.shapes:
            _carry(sdata, name, by_cell)
    contract.record(
        sdata, "pp.annotate_cells", source="labels" if reference is None else "reference", n_cells=table.n_obs,
        cells=dict(types.value_counts()), merge=merge,
    )  # fmt: skip


def _given(table: AnnData, labels: Labels) -> pd.Series:
    """Types as they were given, a row a cell."""
    if isinstance(labels, str):
        if labels not in table.obs.columns:
            raise KeyError(
                f"No column {labels!r} in the table of counts; its columns: {sorted(map(str, table.obs.columns))}. "
                "Pass `labels=` as a mapping from cells to types, or a `reference`."
            )
        return table.obs[labels].astype("string").astype(object)
    given = pd.Series(labels, dtype=object)
    given.index = given.index.astype(str)
    unknown = given.index.difference(table.obs_names)
    if len(unknown):
        raise KeyError(
            f"Expected labels of the section's {table.n_obs} cells, such as {table.obs_names[0]!r}, found "
            f"{len(unknown)} of {len(given)} that are not there, such as {unknown[0]!r}."
        )
    if given.index.has_duplicates:
        raise ValueError(f"Expected one label a cell, found several of {given.index[given.index.duplicated()][0]!r}.")
    return given.reindex(table.obs_names)


def _merged(types: pd.Series, merge: Mapping[str, str | None] | None) -> pd.Series:
    """Types by their coarser names."""
    if merge is None:
        return types
    missing = sorted(set(types.dropna().unique()) - set(merge))
    if missing:
        raise KeyError(
            f"Expected `merge` to name all types, found none for {missing}. Name them, with None to leave them out."
        )
    return types.map(lambda name: merge[name] if isinstance(name, str) else None).astype(object)


def _transferred(
    table: AnnData, reference: AnnData, labels: Labels, merge: Mapping[str, str | None] | None, *, n_components: int,
    n_neighbors: int, seed: int,
) -> tuple[pd.Series, NDArray[np.float64]]:  # fmt: skip
    """Types of the most similar cells of a reference, and the share of the vote."""
    if not isinstance(labels, str) or labels not in reference.obs.columns:
        raise KeyError(
            f"Expected `labels` as a column of the reference's obs, {sorted(map(str, reference.obs.columns))}, found "
            f"{labels if isinstance(labels, str) else type(labels).__name__!r}."
        )
    genes = [gene for gene in table.var_names if gene in set(reference.var_names)]
    if len(genes) < _LEAST_GENES:
        raise ValueError(
            f"Expected the reference to share at least {_LEAST_GENES} genes with the section, found {len(genes)} of "
            f"{table.n_vars} (section: {list(table.var_names[:3])}, reference: {list(reference.var_names[:3])})."
        )
    contract.check_counts(reference.X, where="the reference's X")
    types = _merged(reference.obs[labels].astype("string").astype(object), merge)
    known = reference[types.notna().to_numpy(), genes].copy()
    known_types = types.dropna().to_numpy(dtype=str)
    n_neighbors = min(n_neighbors, known.n_obs)
    n_components = min(n_components, len(genes) - 1, known.n_obs - 1)
    near, far = _standard_components(table[:, genes].copy(), known, n_components, seed)
    votes, classes = _votes(near, far, known_types, n_neighbors)
    return pd.Series(classes[votes.argmax(axis=1)], index=table.obs_names, dtype=object), votes.max(axis=1)


def _log_normalised(table: AnnData) -> AnnData:
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    return table


def _standard_components(
    own: AnnData, known: AnnData, n_components: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Principal components of the reference, and the section's cells in them."""
    values = []
    for table in (known, own):
        dense = np.asarray(_log_normalised(table).to_df(), dtype=np.float32)
        deviation = dense.std(axis=0)
        values.append((dense - dense.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0))
    pca = PCA(n_components, random_state=seed).fit(values[0])
    return pca.transform(values[1]), pca.transform(values[0])


def _votes(
    near: NDArray[np.float32], far: NDArray[np.float32], types: NDArray[np.str_], n_neighbors: int
) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Share of the vote of every type, ``(n_cells, n_types)``, and the types."""
    classes, codes = np.unique(types, return_inverse=True)
    distance, index = NearestNeighbors(n_neighbors=n_neighbors).fit(far).kneighbors(near)
    # the nearest counts as much as the farthest counts little, whatever the unit
    weight = np.exp(-((distance / np.maximum(distance.mean(axis=1, keepdims=True), 1e-9)) ** 2))
    votes = np.zeros((len(near), len(classes)))
    np.add.at(votes, (np.arange(len(near))[:, None], codes[index]), weight)
    return votes / votes.sum(axis=1, keepdims=True), classes


def _carry(sdata: SpatialData, name: str, by_cell: pd.DataFrame) -> None:
    """Write the columns to shapes whose index, or column ``cell_id``, says which cell an outline is of."""
    frame = sdata.shapes[name]
    owners = (frame["cell_id"] if "cell_id" in frame.columns else frame.index.to_series()).astype(str)
    rows = by_cell.index.get_indexer(owners.to_numpy())
    types = by_cell[_TYPE].cat
    frame[_TYPE] = pd.Categorical.from_codes(np.where(rows >= 0, types.codes.to_numpy()[rows], -1), types.categories)
    frame[_CONFIDENCE] = np.where(rows >= 0, by_cell[_CONFIDENCE].to_numpy()[rows], np.nan).astype(np.float32)
