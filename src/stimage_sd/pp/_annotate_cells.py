"""Annotate measured cells with types, from a single-cell reference or from given labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler, normalize
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.stats.platform_effects import gene_efficiencies

Labels = str | Mapping[str, str] | pd.Series
#: names of the written columns
_TYPE, _CONFIDENCE = "cell_type", "cell_type_confidence"
#: least number of genes that a reference and a section share
_LEAST_GENES = 5
#: largest number of cells of a section for the estimate of gene efficiencies
_MOST_CELLS = 20_000


def annotate_cells(
    data: SpatialData,
    reference: AnnData | None = None,
    *,
    labels: Labels = "cell_type",
    merge: Mapping[str, str | None] | None = None,
    n_components: int = 30,
    n_neighbors: int = 15,
    table_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> None:
    """Assign a type to each measured cell, and to the outlines of cells and nuclei.

    Parameters
    ----------
    data
        A section with a table of counts over the shapes ``cells`` (Xenium, CODEX).
    reference
        Single-cell reference with raw counts in ``X``. The types are transferred from its cells. Without a reference,
        `labels` are the types.
    labels
        With a reference, the column of its ``obs`` with the types. Without a reference, a mapping or a series from cell
        names (``obs_names``) to types, or a column of the section's table. Cells that `labels` does not name get no
        type.
    merge
        Mapping from types to coarser types, such as ``{"T cell": "immune", "B cell": "immune"}``. `None` as the coarser
        type leaves a type out. The mapping must name all types that occur.
    n_components, n_neighbors
        Number of principal components of the reference, and number of nearest reference cells that vote. Votes are
        weighted by nearness.
    table_key
        Name of the table of counts. By default the table of the cells, also after `stimage_sd.pp.aggregate`.
    layer
        Layer of that table with the raw counts. By default ``X``, or the layer given to `io.from_spatialdata`.
    seed
        Seed of the principal component analysis.

    Returns
    -------
    Nothing. Writes ``obs["cell_type"]`` (categorical) and ``obs["cell_type_confidence"]`` to the table of counts, and
    the same columns to the shapes ``cells`` and ``nuclei`` if they exist. The confidence is the share of the neighbors'
    vote for the merged type. It is 1 for given labels and 0 without a type. Cells without a count of the shared genes
    get no type.

    Raises
    ------
    KeyError
        If the column does not exist, `labels` name unknown cells, or `merge` lacks a type.
    ValueError
        If the reference shares too few genes, has duplicate gene names or holds no counts in ``X``, or if no cell gets
        a type.

    Notes
    -----
    Paper, section 2.7: Seurat's reference-based integration, and four merged classes: immune, stromal, cancer
    epithelial and endothelial.

    Types do not depend on the proportions of the types in the section. Counts are divided by the cell's total, and by
    the efficiency of each gene on the section's platform. This efficiency is estimated within types, as in RCTD
    (Cable et al. 2022). The reference and the section are then scaled by the reference's means and deviations.

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
    sdata = contract.section(data)
    name = contract.cell_table_name(sdata, table_key)
    units = contract.units_of(sdata, name)
    # given labels need no counts
    source = contract.Source(name, layer)
    table = sdata.tables[name][units.rows] if reference is None else contract.counts(sdata, source)
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
    by_name = pd.DataFrame(columns, index=units.names)
    for column, values in by_name.reindex(sdata.tables[name].obs_names).items():
        sdata.tables[name].obs[column] = values.to_numpy() if column == _CONFIDENCE else pd.Categorical(values)
    by_cell = by_name.set_axis(units.ids.astype(str), axis=0)
    for shapes in dict.fromkeys((units.shapes, contract.CELLS, contract.nuclei_name(sdata))):
        if shapes in sdata.shapes and (shapes == units.shapes or _names_cells(sdata.shapes[shapes])):
            _carry(sdata, shapes, by_cell)
    contract.record(
        sdata, "pp.annotate_cells", source="labels" if reference is None else "reference", n_cells=table.n_obs,
        cells=dict(types.value_counts()), merge=merge,
    )  # fmt: skip


def _given(table: AnnData, labels: Labels) -> pd.Series:
    """Return the given types, one row per cell."""
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
        raise ValueError(f"Expected one label per cell, found several of {given.index[given.index.duplicated()][0]!r}.")
    return given.reindex(table.obs_names)


def _merged(types: pd.Series, merge: Mapping[str, str | None] | None) -> pd.Series:
    """Return the types under their coarser names."""
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
    """Return the types of the most similar reference cells, and their share of the vote."""
    if not isinstance(labels, str) or labels not in reference.obs.columns:
        raise KeyError(
            f"Expected `labels` as a column of the reference's obs, {sorted(map(str, reference.obs.columns))}, found "
            f"{labels if isinstance(labels, str) else type(labels).__name__!r}."
        )
    theirs = contract.without_versions(reference.var_names)
    if not theirs.is_unique:
        twice = theirs[theirs.duplicated()][:3].tolist()
        raise ValueError(
            f"Expected unique gene names in the reference, found {twice} twice. Add up the columns of a name, or call "
            "`reference.var_names_make_unique()`."
        )
    genes = table.var_names[table.var_names.isin(theirs)]
    if len(genes) < _LEAST_GENES:
        raise ValueError(
            f"Expected the reference to share at least {_LEAST_GENES} genes with the section, found {len(genes)} of "
            f"{table.n_vars} (section: {list(table.var_names[:3])}, reference: {list(reference.var_names[:3])})."
        )
    contract.check_counts(reference.X, where="the reference's X")
    finer = reference.obs[labels].astype("string").astype(object)
    types = _merged(finer, merge)
    counts, known = (csr_matrix(part.X, dtype=np.float64) for part in (
        table[:, genes], reference[:, theirs.get_indexer(genes)]
    ))  # fmt: skip
    used, seen = types.notna().to_numpy() & _nonzero(known), _nonzero(counts)
    if not used.any() or not seen.any():
        raise ValueError(
            f"Expected counts of the {len(genes)} shared genes, found none in "
            f"{'the cells of the section' if used.any() else 'the typed cells of the reference'}."
        )
    near, far = _components(counts[seen], known[used], finer[used].to_numpy(dtype=str), n_components, seed)
    votes, classes = _votes(near, far, types[used].to_numpy(dtype=str), min(n_neighbors, int(used.sum())))
    names, confidence = np.full(len(seen), None, dtype=object), np.zeros(len(seen))
    names[seen], confidence[seen] = classes[votes.argmax(axis=1)], votes.max(axis=1)
    return pd.Series(names, index=table.obs_names, dtype=object), confidence


def _nonzero(counts: csr_matrix) -> NDArray[np.bool_]:
    """Return whether each cell has any count."""
    return np.asarray(counts.sum(axis=1)).ravel() > 0


def _components(
    measured: csr_matrix, known: csr_matrix, types: NDArray[np.str_], n_components: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the section and the reference in the reference's principal components, scaled by the reference alone.

    Means and deviations of the section would depend on the cell types in the section.
    """
    depth = min(float(np.median(np.asarray(counts.sum(axis=1)))) for counts in (measured, known))
    sample = np.random.default_rng(seed).permutation(measured.shape[0])[:_MOST_CELLS]
    shares = csr_matrix(normalize(known, norm="l1"))
    profiles = np.stack([np.asarray(shares[types == name].mean(axis=0)).ravel() for name in np.unique(types)])
    measured = measured @ diags(1 / gene_efficiencies(measured[sample], profiles))
    # scale both sides to the shallower depth, so that a single count weighs the same on both sides
    near, far = (
        csr_matrix(depth * normalize(counts, norm="l1"), dtype=np.float32).log1p() for counts in (measured, known)
    )
    scaler = StandardScaler().fit(far.toarray())
    known_values = scaler.transform(far.toarray())
    pca = PCA(min(n_components, *(size - 1 for size in known_values.shape)), random_state=seed).fit(known_values)
    # the section may have a million cells, so only its components are made dense
    weights = pca.components_.T / scaler.scale_[:, None]
    projected = near @ weights - (scaler.mean_ @ weights + pca.mean_ @ pca.components_.T)
    return np.asarray(projected, dtype=np.float32), pca.transform(known_values)


def _votes(
    near: NDArray[np.float32], far: NDArray[np.float32], types: NDArray[np.str_], n_neighbors: int
) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Return the share of the vote per type, ``(n_cells, n_types)``, and the types."""
    classes, codes = np.unique(types, return_inverse=True)
    distance, index = NearestNeighbors(n_neighbors=n_neighbors).fit(far).kneighbors(near)
    # dividing by the mean distance makes the weights independent of the unit of distance
    weight = np.exp(-((distance / np.maximum(distance.mean(axis=1, keepdims=True), 1e-9)) ** 2))
    votes = np.zeros((len(near), len(classes)))
    np.add.at(votes, (np.arange(len(near))[:, None], codes[index]), weight)
    return votes / votes.sum(axis=1, keepdims=True), classes


def _names_cells(frame: pd.DataFrame) -> bool:
    """Return whether outlines name their cells. An unnamed index of integers does not."""
    return "cell_id" in frame.columns or frame.index.name == "cell_id" or frame.index.dtype.kind not in "iu"


def _carry(sdata: SpatialData, name: str, by_cell: pd.DataFrame) -> None:
    """Write the columns to shapes whose index or column ``cell_id`` holds the cell names."""
    frame = sdata.shapes[name]
    owners = (frame["cell_id"] if "cell_id" in frame.columns else frame.index.to_series()).astype(str)
    rows = by_cell.index.get_indexer(owners.to_numpy())
    types = by_cell[_TYPE].cat
    frame[_TYPE] = pd.Categorical.from_codes(np.where(rows >= 0, types.codes.to_numpy()[rows], -1), types.categories)
    frame[_CONFIDENCE] = np.where(rows >= 0, by_cell[_CONFIDENCE].to_numpy()[rows], np.nan).astype(np.float32)
