"""Writer of feature-barcode matrices in the HDF5 format of 10x Genomics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp


def write_10x_h5(
    path: Path,
    counts: sp.csr_matrix,
    barcodes: pd.Index,
    genes: pd.Index,
    *,
    attributes: Mapping[str, Any],
    feature_types: list[str] | None = None,
) -> None:
    """Write a matrix in version 3 of the format.

    The file holds genes × barcodes by columns. The same arrays are barcodes × genes by rows.

    - `path`: file to write.
    - `counts`: ``(n_barcodes, n_genes)``.
    - `barcodes`: names of the spots, bins or cells.
    - `genes`: names of the features.
    - `attributes`: further attributes of the file, such as software, chemistry and library.
    - `feature_types`: one type per feature. By default ``"Gene Expression"``.
    """
    counts = sp.csr_matrix(counts)
    counts.sort_indices()
    types = feature_types if feature_types is not None else ["Gene Expression"] * len(genes)
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        file.attrs["version"] = 2
        for name, value in attributes.items():
            file.attrs[name] = value
        matrix = file.create_group("matrix")
        matrix["barcodes"] = barcodes.to_numpy().astype("S")
        matrix["data"] = counts.data.astype(np.int32)
        matrix["indices"] = counts.indices.astype(np.int64)
        matrix["indptr"] = counts.indptr.astype(np.int64)
        matrix["shape"] = np.array([counts.shape[1], counts.shape[0]], dtype=np.int32)
        features = matrix.create_group("features")
        features["_all_tag_keys"] = np.array([b"genome"])
        features["feature_type"] = np.array([kind.encode() for kind in types])
        features["genome"] = np.full(len(genes), b"synthetic")
        features["id"] = np.array([f"SYNG{gene:011d}".encode() for gene in range(1, len(genes) + 1)])
        features["name"] = genes.to_numpy().astype("S")
