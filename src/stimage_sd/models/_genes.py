"""Selection of the genes that vary most over a cohort."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

#: whether rare genes are removed before ranking or after it
Filtering: TypeAlias = Literal["before", "after"]


def shared_genes(tables: Mapping[str, ad.AnnData]) -> list[str]:
    """Return the genes that every section measured, in the first section's order."""
    first, *others = tables.values()
    shared = [str(gene) for gene in first.var_names if all(gene in table.var_names for table in others)]
    if not shared:
        examples = {name: list(map(str, table.var_names[:3])) for name, table in tables.items()}
        raise ValueError(f"The sections share no gene; their names begin {examples}. Use one naming scheme.")
    return shared


def most_variable(
    tables: Mapping[str, ad.AnnData],
    shared: list[str],
    *,
    n_top: int,
    min_spots: float = 0.1,
    filtering: Filtering = "before",
) -> list[str]:
    """Rank genes by the variance of their Pearson residuals, with sections as batches.

    - `tables`: raw counts of each section.
    - `shared`: candidate genes, which every table must have.
    - `n_top`: maximum number of genes.
    - `min_spots`: minimum share of all spots that express a gene.
    - `filtering`: whether genes in fewer spots are removed before or after ranking. If after, genes without counts are
      still removed before.
    - returns: names of the genes, most variable first.
    """
    joint = ad.concat(
        {
            name: ad.AnnData(table[:, shared].X.astype(np.float32), var=pd.DataFrame(index=shared))
            for name, table in tables.items()
        },
        label="section",
        index_unique="-",
    )
    share = np.asarray((joint.X > 0).mean(axis=0)).ravel()
    frequent = {gene for gene, of_spots in zip(shared, share, strict=True) if of_spots >= min_spots}
    if not frequent:
        raise ValueError(f"Expected genes in at least {min_spots:.0%} of the spots, found none. Lower `min_spots=`.")
    joint = joint[:, share >= min_spots if filtering == "before" else share > 0].copy()
    ranked = sc.experimental.pp.highly_variable_genes(
        joint, flavor="pearson_residuals", n_top_genes=min(n_top, joint.n_vars), batch_key="section", inplace=False
    ).set_axis(joint.var_names)
    top = ranked[ranked["highly_variable"]].sort_values("highly_variable_rank", kind="stable").index
    return [str(gene) for gene in top if gene in frequent]
