"""Which genes to learn: highly variable over a cohort, or a list of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._genes import most_variable, shared_genes


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
    shared = shared_genes(tables)
    if genes is not None:
        return _present(genes, shared)
    included = _present(include, shared) if include else []
    top = most_variable(tables, shared, n_top=n_top, min_spots=min_spots)
    return list(dict.fromkeys([*top, *included]))


def _present(genes: Sequence[str], shared: list[str]) -> list[str]:
    known = set(shared)
    missing = [gene for gene in genes if gene not in known]
    if len(missing) == len(genes):
        raise ValueError(f"None of the {len(genes)} genes is measured in every section, such as {missing[:5]}.")
    if missing:
        warnings.warn(f"{len(missing)} of {len(genes)} genes are not in every section: {missing}", stacklevel=3)
    return [gene for gene in dict.fromkeys(genes) if gene in known]
