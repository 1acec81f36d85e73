"""Truth of all synthetic sections: dependence of genes on the tissue, and counts.

Three fields of a tissue drive its picture and its genes. Genes with the same ``gene_seed`` depend on the fields in the
same way on all platforms. A model trained on one platform can therefore be scored on another.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from stimage_sd.datasets._tissue_painter import Tissue

#: fields that drive the picture and the genes
FIELDS = ("density", "size", "stroma")
#: diameter of the spot for the mean count of a gene, µm
SPOT_UM = 55.0


def check_folder(path: str | Path) -> Path:
    """Return the path of a new or empty folder, or raise `FileExistsError`. The folder is not created."""
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"Expected an empty or new folder, found something at {path}. Choose another folder, or empty it."
        )
    return path


def draw_genes(n_genes: int, seed: int) -> pd.DataFrame:
    """Draw the dependence of genes on the tissue.

    - `n_genes`: number of genes. A third of the genes, ``NOISE...``, do not depend on the tissue.
    - `seed`: the ``gene_seed``.
    - returns: one row per gene, with ``intercept`` (log mean of a spot of 55 µm), one coefficient per field, and
      ``dispersion``, the r of NB(r, p). A coefficient is per standard deviation of the field from 0.5.
    """
    generator = np.random.default_rng([seed, 20])
    n_noise = n_genes // 3
    n_signal = n_genes - n_noise
    # One field, in turn, has a large coefficient for each gene. The other fields have small coefficients.
    coefficients = generator.normal(0.0, 0.15, (n_signal, len(FIELDS)))
    leading = np.arange(n_signal) % len(FIELDS)
    signs = generator.choice([-1.0, 1.0], n_signal)
    coefficients[np.arange(n_signal), leading] = signs * generator.uniform(0.5, 1.0, n_signal)
    names = [f"SIGNAL{gene:03d}" for gene in range(1, n_signal + 1)]
    names += [f"NOISE{gene:03d}" for gene in range(1, n_noise + 1)]
    frame = pd.DataFrame(
        np.vstack([coefficients, np.zeros((n_noise, len(FIELDS)))]),
        columns=list(FIELDS),
        index=pd.Index(names, name="gene"),
    )
    frame.insert(0, "intercept", generator.uniform(1.0, 3.5, n_genes))
    frame["dispersion"] = generator.uniform(4.0, 20.0, n_genes)
    return frame


def log_mean(tissue: Tissue, points: np.ndarray, genes: pd.DataFrame) -> np.ndarray:
    """Return the natural log of the mean counts of a 55 µm spot, ``(n, n_genes)``, at points ``(n, 2)`` x, y, px."""
    fields = np.stack([tissue.at(name, points) for name in FIELDS], axis=1)
    return genes["intercept"].to_numpy() + _standardized(fields) @ genes[list(FIELDS)].to_numpy().T


def draw_spot_counts(
    tissue: Tissue, centers: np.ndarray, names: pd.Index, genes: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, sp.csr_matrix]:
    """Draw the negative binomial counts of spots of 55 µm.

    - `tissue`: the tissue.
    - `centers`: centers of the spots, ``(n_spots, 2)`` x, y, px.
    - `names`: one name per spot.
    - `genes`: genes from `draw_genes`.
    - `seed`: seed of the counts.
    - returns: a table and the counts. The table has one row per spot, with the fields, 0 to 1, and ``size_factor``. The
      counts are ``int32 (n_spots, n_genes)``.
    """
    generator = np.random.default_rng([seed, 21])
    spots = pd.DataFrame({name: tissue.at(name, centers) for name in FIELDS}, index=names)
    spots["size_factor"] = np.exp(generator.normal(0.0, 0.15, len(spots)))
    mean = spots["size_factor"].to_numpy()[:, None] * np.exp(log_mean(tissue, centers, genes))
    dispersion = genes["dispersion"].to_numpy()
    return spots, sp.csr_matrix(
        generator.negative_binomial(dispersion, dispersion / (dispersion + mean)), dtype=np.int32
    )


def _standardized(fields: np.ndarray) -> np.ndarray:
    # A field is uniform on 0 to 1, so its standard deviation is the square root of 1 / 12.
    return (fields - 0.5) * np.sqrt(12.0)
