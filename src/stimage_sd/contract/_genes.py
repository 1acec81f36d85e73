"""Find the genes among the features of a table, and unify their names."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: feature type of genes, and column of feature types, as named by 10x Genomics' software
GENES, FEATURE_TYPES = "Gene Expression", "feature_types"

#: an Ensembl id with a version, of any species
_VERSIONED = r"^(ENS[A-Z]*\d{11})\.\d+$"


def without_versions(names: pd.Index) -> pd.Index:
    """Return gene names with the version of Ensembl ids removed, as it differs between releases.

    >>> without_versions(pd.Index(["ENSG00000141736.14", "ENSMUSG00000062312.8", "RP11-34P13.7"])).tolist()
    ['ENSG00000141736', 'ENSMUSG00000062312', 'RP11-34P13.7']
    """
    if not len(names):
        return names
    return pd.Index(names.astype(str).str.replace(_VERSIONED, r"\1", regex=True), name=names.name)


def are_genes(var: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which features are genes and not antibodies, guides or controls, by ``var["feature_types"]``.

    Without that column all features are genes.

    >>> are_genes(pd.DataFrame({"feature_types": ["Gene Expression", "Antibody Capture"]})).tolist()
    [True, False]
    """
    if FEATURE_TYPES not in var:
        return np.ones(len(var), dtype=bool)
    kinds = var[FEATURE_TYPES].astype(object)
    genes = kinds.eq(GENES)
    # concatenated tables may lack the type of some features
    return (genes | kinds.isna() if genes.any() else genes | True).to_numpy(dtype=bool)
