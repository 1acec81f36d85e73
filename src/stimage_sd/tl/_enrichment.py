"""Which sets of genes the predictable ones are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

GeneSets = Mapping[str, Sequence[str]] | str | Path


def enrichment(genes: Sequence[str], gene_sets: GeneSets, *, background: Sequence[str], least: int = 3) -> pd.DataFrame:
    """Test whether genes are more often of a set than the tested genes are; nothing is asked of any server.

    Parameters
    ----------
    genes
        The genes, such as the most predictable ones.
    gene_sets
        Sets by name, or a GMT file, such as MSigDB's or a download of GO's.
    background
        All genes that were tested: those that could have been among `genes`.
    least
        Sets with fewer genes of the background are left out.

    Returns
    -------
    A row a set that holds at least one of the genes, the least p-value first: ``gene_set``, ``n_overlap``, ``n_set``
    (in the background), ``odds_ratio``, ``p_value`` (hypergeometric, one-sided), ``q_value`` (Benjamini and Hochberg,
    over those sets), ``genes``.

    Raises
    ------
    FileNotFoundError
        If there is no such GMT file.
    ValueError
        If genes are not of the background, or no set has enough genes of it.

    Notes
    -----
    Paper, section 3.4. gseapy's offline enrichment.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sets = {"keratins": ["KRT5", "KRT14", "KRT17"], "immune": ["CD3E", "CD4", "CD8A"]}
    >>> tested = [*sets["keratins"], *sets["immune"], "ACTB", "GAPDH", "ERBB2", "ESR1"]
    >>> sti.tl.enrichment(["KRT5", "KRT14", "KRT17"], sets, background=tested)["gene_set"].tolist()
    ['keratins']
    """
    tested = list(dict.fromkeys(background))
    unknown = [gene for gene in genes if gene not in set(tested)]
    if unknown or not len(genes):
        raise ValueError(
            f"Expected genes of the background, found {len(unknown) or 'none'} others, such as {unknown[:3]}. The "
            "background is all genes that were tested."
        )
    sets = {name: [gene for gene in members if gene in set(tested)] for name, members in _read(gene_sets).items()}
    sets = {name: members for name, members in sets.items() if len(members) >= least}
    if not sets:
        raise ValueError(f"No set has {least} genes of the background. Are names of the same kind (symbols)?")
    import gseapy

    found = gseapy.enrich(list(dict.fromkeys(genes)), sets, background=tested, outdir=None, no_plot=True).results
    columns = ["gene_set", "n_overlap", "n_set", "odds_ratio", "p_value", "q_value", "genes"]
    if found is None or not len(found):
        return pd.DataFrame(columns=columns)
    frame = pd.DataFrame(
        {
            "gene_set": found["Term"],
            "n_overlap": found["Overlap"].str.split("/").str[0].astype(int),
            "n_set": found["Overlap"].str.split("/").str[1].astype(int),
            "odds_ratio": found["Odds Ratio"],
            "p_value": found["P-value"],
            "q_value": found["Adjusted P-value"],
            "genes": found["Genes"].str.replace(";", ","),
        }
    )
    return frame.sort_values("p_value", kind="stable").reset_index(drop=True)


def _read(gene_sets: GeneSets) -> dict[str, Sequence[str]]:
    if isinstance(gene_sets, Mapping):
        return dict(gene_sets)
    path = Path(gene_sets)
    if not path.is_file():
        raise FileNotFoundError(f"No GMT file of gene sets at {path}. Such files are published by MSigDB and Enrichr.")
    rows = [line.rstrip("\n").split("\t") for line in path.read_text().splitlines() if line.strip()]
    return {row[0]: [gene for gene in row[2:] if gene] for row in rows}
