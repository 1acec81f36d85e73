"""What all synthetic sections share: how genes depend on the tissue, and the counts that follow.

Three fields of a tissue drive its picture and its genes. Genes of one ``gene_seed`` depend on them in the same
way on every platform, so that a model trained on one can be scored on another.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from stimage_sd.datasets._tissue_painter import Tissue

#: what tissue is drawn from, and what drives the genes
FIELDS = ("density", "size", "stroma")
#: diameter of the spot to which a gene's mean belongs, µm
SPOT_UM = 55.0


def check_folder(path: str | Path) -> Path:
    """Return a folder to write to, or raise `FileExistsError` where something is there; nothing is made."""
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"Expected an empty or new folder, found something at {path}. Choose another, or empty it."
        )
    return path


def draw_genes(n_genes: int, seed: int) -> pd.DataFrame:
    """Draw how genes depend on the tissue.

    Parameters
    ----------
    n_genes
        Genes, a third of them ``NOISE...``, which depend on nothing.
    seed
        The ``gene_seed``.

    Returns
    -------
    A row a gene: ``intercept`` (log mean of a spot of 55 µm), a coefficient a field, as of its deviation from 0.5
    in standard deviations, and ``dispersion``, the r of NB(r, p).
    """
    generator = np.random.default_rng([seed, 20])
    n_noise = n_genes // 3
    n_signal = n_genes - n_noise
    # One field leads in each gene, in turn, and the others have a minor part.
    coefficients = generator.normal(0.0, 0.15, (n_signal, len(FIELDS)))
    leading = np.arange(n_signal) % len(FIELDS)
    signs = generator.choice([-1.0, 1.0], n_signal)
    coefficients[np.arange(n_signal), leading] = signs * generator.uniform(0.5, 1.0, n_signal)
    names = [f"SIGNAL{number:03d}" for number in range(1, n_signal + 1)]
    names += [f"NOISE{number:03d}" for number in range(1, n_noise + 1)]
    frame = pd.DataFrame(
        np.vstack([coefficients, np.zeros((n_noise, len(FIELDS)))]),
        columns=list(FIELDS),
        index=pd.Index(names, name="gene"),
    )
    frame.insert(0, "intercept", generator.uniform(1.0, 3.5, n_genes))
    frame["dispersion"] = generator.uniform(4.0, 20.0, n_genes)
    return frame


def log_mean(tissue: Tissue, points: np.ndarray, genes: pd.DataFrame) -> np.ndarray:
    """Return the natural log of the mean counts of a spot of 55 µm, ``(n, n_genes)``, at ``(n, 2)`` points x, y, px."""
    fields = np.stack([tissue.at(name, points) for name in FIELDS], axis=1)
    return genes["intercept"].to_numpy() + _standardised(fields) @ genes[list(FIELDS)].to_numpy().T


def draw_spot_counts(
    tissue: Tissue, centres: np.ndarray, names: pd.Index, genes: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, sp.csr_matrix]:
    """Draw the negative binomial counts of spots of 55 µm.

    Parameters
    ----------
    tissue
        What they stand on.
    centres
        ``(n_spots, 2)`` x, y, px.
    names
        A name a spot.
    genes
        As `draw_genes` draws them.
    seed
        Decides the counts.

    Returns
    -------
    A row a spot, with the fields, 0 to 1, and ``size_factor``; and the counts, ``int32 (n_spots, n_genes)``.
    """
    generator = np.random.default_rng([seed, 21])
    spots = pd.DataFrame({name: tissue.at(name, centres) for name in FIELDS}, index=names)
    spots["size_factor"] = np.exp(generator.normal(0.0, 0.15, len(spots)))
    mean = spots["size_factor"].to_numpy()[:, None] * np.exp(log_mean(tissue, centres, genes))
    dispersion = genes["dispersion"].to_numpy()
    return spots, sp.csr_matrix(
        generator.negative_binomial(dispersion, dispersion / (dispersion + mean)), dtype=np.int32
    )


def _standardised(fields: np.ndarray) -> np.ndarray:
    # A field is uniform on 0 to 1: its standard deviation is the root of 1 / 12.
    return (fields - 0.5) * np.sqrt(12.0)
