"""Enrichment of gene sets among chosen genes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom

from stimage_sd._damaged_files import reading

GeneSets: TypeAlias = Mapping[str, Sequence[str]] | str | Path
#: gene sets by name of the library
Libraries: TypeAlias = Mapping[str, GeneSets]
#: weight after a gene's name in weighted GMT files
_WEIGHT = re.compile(r"\s*,\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def enrichment(
    genes: Sequence[str], gene_sets: GeneSets | Libraries, *, background: Sequence[str], least: int = 3
) -> pd.DataFrame:
    """Test gene sets for enrichment among genes, offline.

    Parameters
    ----------
    genes
        The genes, such as the most predictable genes.
    gene_sets
        Gene sets keyed by name, or a GMT file, such as from MSigDB or GO. Gene weights, as in ``KRT5,1.0``, are
        ignored. Several libraries in one call, keyed by name, such as the three ontologies of GO: ``{"BP": "bp.gmt",
        "CC": "cc.gmt", "MF": "mf.gmt"}``.
    background
        All candidate genes, including `genes`.
    least
        Smallest number of background genes in a set. Smaller sets are left out.

    Returns
    -------
    One row per set with at least one of the genes, sorted by p-value: ``gene_set``, ``n_overlap``, ``n_set`` (genes of
    the set in the background), ``odds_ratio`` (of the 2 x 2 table, infinite if a cell of the denominator is empty),
    ``p_value`` (hypergeometric, one-sided, equal to Fisher's exact test), ``q_value`` (Benjamini and Hochberg, over all
    tested sets, including sets without any of the genes), ``genes``.

    With several libraries, the first column is ``library``. Rows are sorted within a library, and q-values are over the
    sets of a library, as by Enrichr.

    Raises
    ------
    FileNotFoundError
        If the GMT file does not exist.
    ValueError
        If genes are missing from the background, no set of a library has enough background genes, or the GMT file has
        a malformed line or two different sets of one name.

    Notes
    -----
    Paper, section 3.4.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sets = {"keratins": ["KRT5", "KRT14", "KRT17"], "immune": ["CD3E", "CD4", "CD8A"]}
    >>> tested = [*sets["keratins"], *sets["immune"], "ACTB", "GAPDH", "ERBB2", "ESR1"]
    >>> sti.tl.enrichment(["KRT5", "KRT14", "KRT17"], sets, background=tested)["gene_set"].tolist()
    ['keratins']
    """
    tested = list(dict.fromkeys(background))
    unknown = sorted(set(genes) - set(tested))
    if unknown or not len(genes):
        raise ValueError(
            f"Expected genes of the background, found {len(unknown) or 'none'} others, such as {unknown[:3]}. The "
            "background is all genes that were tested."
        )
    libraries = _libraries(gene_sets)
    if libraries is None:
        return _tested(cast(GeneSets, gene_sets), tested, set(genes), least)
    frames = []
    for library, sets in libraries.items():
        try:
            frame = _tested(sets, tested, set(genes), least)
        except (FileNotFoundError, ValueError) as error:
            error.add_note(f"while testing the library {library!r}")
            raise
        frame.insert(0, "library", library)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _libraries(gene_sets: GeneSets | Libraries) -> Libraries | None:
    """Return the libraries by name, `None` if the sets are of one library."""
    if not isinstance(gene_sets, Mapping):
        return None
    kinds = {isinstance(values, Mapping | str | Path) for values in gene_sets.values()}
    if len(kinds) > 1:
        raise ValueError(
            "Expected `gene_sets` as sets of genes by name, or as libraries (dicts or GMT files) by name, found both."
        )
    return cast(Libraries, gene_sets) if kinds == {True} else None


def _tested(gene_sets: GeneSets, tested: Sequence[str], chosen: set[str], least: int) -> pd.DataFrame:
    """Test the sets of one library."""
    among = set(tested)
    unique = {name: dict.fromkeys(members) for name, members in _read(gene_sets).items()}
    in_background = {name: [gene for gene in members if gene in among] for name, members in unique.items()}
    sets = {name: members for name, members in in_background.items() if len(members) >= least}
    if not sets:
        raise ValueError(f"No set has {least} genes of the background. Are names of the same kind (symbols)?")
    shared = [[gene for gene in members if gene in chosen] for members in sets.values()]
    both, of_set = (np.array([len(members) for members in lists]) for lists in (shared, sets.values()))
    # other cells of the 2 x 2 table: only in the set, only in `genes`, in neither
    rest, without = of_set - both, len(chosen) - both
    neither = len(tested) - of_set - without
    p_value = hypergeom.sf(both - 1, len(tested), of_set, len(chosen))
    with np.errstate(divide="ignore", invalid="ignore"):
        odds_ratio = both * neither / (rest * without)
    frame = pd.DataFrame(
        {
            "gene_set": list(sets),
            "n_overlap": both,
            "n_set": of_set,
            "odds_ratio": odds_ratio,
            "p_value": p_value,
            "q_value": false_discovery_control(p_value),
            "genes": [",".join(members) for members in shared],
        }
    )
    return frame[both > 0].sort_values("p_value", kind="stable").reset_index(drop=True)


def _read(gene_sets: GeneSets) -> Mapping[str, Sequence[str]]:
    """Return the genes of each set."""
    if isinstance(gene_sets, Mapping):
        return gene_sets
    path = Path(gene_sets)
    if not path.is_file():
        raise FileNotFoundError(f"No GMT file of gene sets at {path}. Such files are published by MSigDB and Enrichr.")
    with reading(path, what="gene sets, one per line (GMT)"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    sets: dict[str, list[str]] = {}
    for row, line in enumerate(lines, 1):
        name, *rest = (field.strip() for field in line.split("\t"))
        if not line.strip():
            continue
        if len(rest) < 2:
            raise ValueError(
                f"Expected a name, a description and genes, separated by tabs, in line {row} of {path}, found "
                f"{line[:60]!r}."
            )
        members = [_WEIGHT.sub("", field) for field in rest[1:] if field]
        if sets.setdefault(name, members) != members:
            raise ValueError(f"Expected one set per name in {path}, found two different ones of {name!r}. Rename one.")
    if not sets:
        raise ValueError(f"Expected gene sets, one per line (GMT), in {path}, found none.")
    return sets
