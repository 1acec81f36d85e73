"""Select the genes to learn: highly variable genes of a cohort, or a given list."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import get_args

import pandas as pd
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._genes import Filtering, most_variable, shared_genes


def select_genes(
    data: SpatialData | contract.Cohort,
    genes: Sequence[str] | None = None,
    *,
    n_top: int = 1000,
    min_spots: float = 0.1,
    filtering: Filtering = "before",
    include: Sequence[str] = (),
    table_key: str | None = None,
    layer: str | None = None,
) -> list[str]:
    """Select the genes to learn.

    Parameters
    ----------
    data
        A section, or a cohort of sections, with raw counts.
    genes
        Genes to take instead of highly variable genes. Genes that a section lacks are left out with a warning.
    n_top
        Number of highly variable genes, by the variance of their Pearson residuals under a negative-binomial null
        (Lause et al. 2021, scanpy's ``flavor="pearson_residuals"``). Sections are the batches.
    min_spots
        Least share of the cohort's spots that express a highly variable gene.
    filtering
        ``"before"``: genes in fewer spots are removed before genes are ranked, so `n_top` genes remain. ``"after"``, as
        published: `n_top` of all genes are ranked, and then genes in fewer spots are removed, so fewer remain.
    include
        Further genes to take, such as markers, whatever their variability.
    table_key
        Name of the table of counts.
    layer
        Layer of that table with the raw counts. By default ``X``, or the layer given to `io.from_spatialdata`.

    Returns
    -------
    Gene names. The most variable genes come first, then `include`. Given `genes` keep their order.

    Raises
    ------
    ValueError
        If the sections share no gene, if they share none of `genes`, if `n_top` is not positive, or no gene is in so
        many spots.

    Notes
    -----
    Paper, section 2.7: the top 1,000 highly variable genes, then without genes in fewer than 10 % of spots, which left
    785. To compare with results on these 785 genes of her2st, pass the published list as `genes`. On 28 of the 36
    sections, this rule leaves 675 genes, 219 of them on the list.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> path = sti.datasets.synthetic_visium("bundle_genes", n_spots=60, n_genes=40)
    >>> section = sti.io.visium(path)  # doctest: +SKIP
    >>> len(sti.pp.select_genes(section, n_top=10))  # doctest: +SKIP
    10
    """
    source = contract.Source(table_key, layer)
    if n_top < 1:
        raise ValueError(f"Expected `n_top` of at least 1, found {n_top}.")
    if filtering not in get_args(Filtering):
        raise ValueError(f'Expected `filtering` to be "before" or "after", found {filtering!r}.')
    if genes is not None and not len(genes):
        raise ValueError("Expected `genes` as a list of names, found none. Leave it out for highly variable genes.")
    tables = {name: contract.counts(sdata, source) for name, sdata in contract.sections(data).items()}
    shared = shared_genes(tables)
    if genes is not None:
        return _present(genes, shared)
    included = _present(include, shared) if include else []
    top = most_variable(tables, shared, n_top=n_top, min_spots=min_spots, filtering=filtering)
    return list(dict.fromkeys([*top, *included]))


def _present(genes: Sequence[str], shared: list[str]) -> list[str]:
    known, genes = set(shared), contract.without_versions(pd.Index([str(gene) for gene in genes])).tolist()
    missing = [gene for gene in genes if gene not in known]
    if len(missing) == len(genes):
        raise ValueError(f"None of the {len(genes)} genes is measured in every section, such as {missing[:5]}.")
    if missing:
        warnings.warn(f"{len(missing)} of {len(genes)} genes are not in every section: {missing}", stacklevel=3)
    return [gene for gene in dict.fromkeys(genes) if gene in known]
