"""Which genes to learn: highly variable over a cohort, or a list of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from spatialdata import SpatialData

from stimage_sd import contract


def select_genes(
    data: SpatialData | contract.Cohort,
    genes: Sequence[str] | None = None,
    *,
    n_top: int = 1000,
    min_spots: float = 0.1,
    include: Sequence[str] = (),
    table_key: str | None = None,
) -> list[str]:
    """Choose the genes to learn.

    Parameters
    ----------
    data
        A section, or a cohort of them, with raw counts.
    genes
        A list to take instead of highly variable genes; those that a section lacks are named in a warning
        and left out.
    n_top
        Highly variable genes to take, by the variance of their Pearson residuals under a negative-binomial null
        (Lause et al. 2021, scanpy's ``flavor="pearson_residuals"``), sections as batches.
    min_spots
        Least share of the cohort's spots that express a highly variable gene.
    include
        Genes to take besides, such as markers, whatever their variability.
    table_key
        Name of the table of counts.

    Returns
    -------
    Gene names: the most variable first, then `include`; or `genes` in their own order.

    Raises
    ------
    ValueError
        If the sections share no gene, or none of the list, or `n_top` is not positive.

    Notes
    -----
    Paper, section 2.7: the top 1,000 highly variable genes, those in fewer than 10 % of spots removed.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_genes", n_spots=60, n_genes=40)
    >>> section = sti.io.visium(path)  # doctest: +SKIP
    >>> len(sti.pp.select_genes(section, n_top=10))  # doctest: +SKIP
    10
    """
    if n_top < 1:
        raise ValueError(f"Expected `n_top` of at least 1, found {n_top}.")
    if genes is not None and not len(genes):
        raise ValueError("Expected `genes` as a list of names, found none. Leave it out for highly variable genes.")
    tables = {name: contract.counts(sdata, table_key) for name, sdata in contract.sections(data).items()}
    shared = _shared_genes(tables)
    if genes is not None:
        return _present(genes, shared)
    included = _present(include, shared) if include else []
    joint = ad.concat(
        {
            name: ad.AnnData(table[:, shared].X.astype(np.float32), var=pd.DataFrame(index=shared))
            for name, table in tables.items()
        },
        label="section",
        index_unique="-",
    )
    expressed = np.asarray((joint.X > 0).mean(axis=0)).ravel() >= min_spots
    if not expressed.any():
        raise ValueError(f"Expected genes in at least {min_spots:.0%} of the spots, found none. Lower `min_spots=`.")
    joint = joint[:, expressed].copy()
    ranked = sc.experimental.pp.highly_variable_genes(
        joint, flavor="pearson_residuals", n_top_genes=min(n_top, joint.n_vars), batch_key="section", inplace=False
    ).set_axis(joint.var_names)
    top = ranked[ranked["highly_variable"]].sort_values("highly_variable_rank", kind="stable").index
    return list(dict.fromkeys([*map(str, top), *included]))


def _shared_genes(tables: dict[str, ad.AnnData]) -> list[str]:
    """Genes that every section measured, in the first section's order."""
    first, *others = tables.values()
    shared = [str(gene) for gene in first.var_names if all(gene in table.var_names for table in others)]
    if not shared:
        examples = {name: list(map(str, table.var_names[:3])) for name, table in tables.items()}
        raise ValueError(f"The sections share no gene; their names begin {examples}. Are they of one naming scheme?")
    return shared


def _present(genes: Sequence[str], shared: list[str]) -> list[str]:
    known = set(shared)
    missing = [gene for gene in genes if gene not in known]
    if len(missing) == len(genes):
        raise ValueError(f"None of the {len(genes)} genes is measured in every section, such as {missing[:5]}.")
    if missing:
        warnings.warn(f"{len(missing)} of {len(genes)} genes are not in every section: {missing}", stacklevel=3)
    return [gene for gene in dict.fromkeys(genes) if gene in known]
