"""Four cell types of a synthetic tissue: appearance of their nuclei, and marker genes."""

from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import KDTree

from stimage_sd.datasets._tissue_painter import Tissue


@dataclass(frozen=True)
class Look:
    """Appearance of the nuclei of a cell type.

    - `radius_um`: mean radius of a circle with the area of the nucleus, µm.
    - `aspect`: smallest and largest ratio of long to short axis.
    - `darkness`: mean gray value of hematoxylin that the painter draws.
    - `subtypes`: names of the type in a single-cell reference.
    """

    radius_um: float
    aspect: tuple[float, float]
    darkness: float
    subtypes: tuple[str, ...]


#: appearance of the four classes of the paper
LOOKS = {
    "cancer epithelial": Look(4.8, (1.0, 1.35), 80.0, ("luminal cancer", "basal cancer")),
    "endothelial": Look(2.8, (3.4, 4.6), 165.0, ("endothelial",)),
    "immune": Look(2.6, (1.0, 1.15), 170.0, ("T cell", "B cell", "macrophage")),
    "stromal": Look(3.4, (1.9, 2.7), 112.0, ("fibroblast", "pericyte")),
}
TYPES = tuple(LOOKS)
#: mean transcripts per marker in a cell of its type, and in other cells
MARKER_MEAN, OTHER_MEAN = 6.0, 0.25
#: smallest distance between nuclei, as a share of the sum of their radii
_APART = 1.0


def marker_names(n_markers: int) -> list[str]:
    """Return the names of the markers, type by type."""
    return [f"{name.replace(' ', '_').upper()}_{marker:02d}" for name in TYPES for marker in range(1, n_markers + 1)]


def give_types(tissue: Tissue, nuclei: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assign a cell type to each nucleus, and the appearance of the type.

    - `tissue`: the tissue decides the types. Stroma has stromal and endothelial cells, the rest is cancer. Immune cells
      gather where nuclei are dense.
    - `nuclei`: ``(n, 6)`` nuclei from `scatter_nuclei`.
    - returns: the nuclei that do not overlap, ``(m, 6)``, and their types as indices into `TYPES`, ``int64 (m,)``.
    """
    generator = np.random.default_rng([tissue.seed, 40])
    points = nuclei[:, :2]
    stroma, density = tissue.at("stroma", points), tissue.at("density", points)
    immune = 0.1 + 0.5 * density**2
    chances = np.column_stack([(1 - stroma) * (1 - immune), 0.3 * stroma, immune, 0.7 * stroma * (1 - immune)])
    edges = np.cumsum(chances / chances.sum(axis=1, keepdims=True), axis=1)
    types = np.minimum((generator.random(len(nuclei))[:, None] > edges).sum(axis=1), len(TYPES) - 1)

    looks = [LOOKS[name] for name in TYPES]
    radius = np.array([look.radius_um for look in looks])[types] / tissue.mpp
    radius *= np.exp(generator.normal(0.0, 0.08, len(nuclei)))
    low, high = np.array([look.aspect for look in looks])[types].T
    aspect = generator.uniform(low, high)
    darkness = np.clip(generator.normal(np.array([look.darkness for look in looks])[types], 8.0), 60.0, 190.0)
    typed = np.column_stack([points, radius * np.sqrt(aspect), radius / np.sqrt(aspect), nuclei[:, 4], darkness])
    apart = _with_room(typed, generator)
    return typed[apart], types[apart]


def _with_room(nuclei: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a mask of nuclei that do not overlap, chosen in random order."""
    reach = nuclei[:, 2:4].mean(axis=1)
    near = KDTree(nuclei[:, :2]).query_pairs(2 * _APART * reach.max(), output_type="ndarray")
    distance = np.hypot(*(nuclei[near[:, 0], :2] - nuclei[near[:, 1], :2]).T)
    near = near[distance < _APART * reach[near].sum(axis=1)]
    neighbors: list[list[int]] = [[] for _ in nuclei]
    for one, other in near.tolist():
        neighbors[one].append(other)
        neighbors[other].append(one)
    chosen = np.zeros(len(nuclei), dtype=bool)
    for nucleus in generator.permutation(len(nuclei)).tolist():
        chosen[nucleus] = not chosen[neighbors[nucleus]].any()
    return chosen


def draw_markers(nuclei: np.ndarray, types: np.ndarray, *, n_markers: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scatter the transcripts of the markers within nuclei.

    - returns: positions ``(n, 2)``, pixels of the H&E, and indices of the markers in the order of `marker_names`.
    """
    generator = np.random.default_rng([seed, 41])
    counts = _counts(types, n_markers, generator)
    owners, markers = (np.repeat(index, counts.ravel()) for index in np.indices(counts.shape).reshape(2, -1))
    # uniform within an ellipse a little smaller than the nucleus
    radius, turn = 0.9 * np.sqrt(generator.random(len(owners))), generator.uniform(0, 2 * np.pi, len(owners))
    along = nuclei[owners, 2:4] * np.column_stack([radius * np.cos(turn), radius * np.sin(turn)])
    angle = np.radians(nuclei[owners, 4])
    cosine, sine = np.cos(angle), np.sin(angle)
    away = np.column_stack([along[:, 0] * cosine - along[:, 1] * sine, along[:, 0] * sine + along[:, 1] * cosine])
    return nuclei[owners, :2] + away, markers


def _counts(types: np.ndarray, n_markers: int, generator: np.random.Generator) -> np.ndarray:
    """Draw transcripts per cell and marker, ``(n_cells, n_types * n_markers)``."""
    is_marker = np.repeat(np.arange(len(TYPES)), n_markers) == types[:, None]
    return generator.poisson(np.where(is_marker, MARKER_MEAN, OTHER_MEAN))


def synthetic_reference(*, n_cells: int = 800, n_markers: int = 5, n_genes: int = 0, seed: int = 0) -> ad.AnnData:
    """Make a single-cell reference for the cells of `synthetic_xenium`, with finer cell types.

    Parameters
    ----------
    n_cells
        Number of cells, split equally among the types.
    n_markers
        Marker genes per type. Use the same number as for the section.
    n_genes
        Number of further genes, ``SIGNAL001`` and so on. They do not depend on the type.
    seed
        Seed of the counts.

    Returns
    -------
    An `AnnData` with counts as CSR in ``X`` and finer types such as ``"T cell"`` in ``obs["cell_type"]``.
    ``uns["merge"]`` maps each finer type to the type in the section.

    Examples
    --------
    >>> reference = synthetic_reference(n_cells=40)
    >>> reference.uns["merge"]["T cell"], reference.n_vars
    ('immune', 20)
    """
    generator = np.random.default_rng([seed, 42])
    types = np.arange(n_cells) % len(TYPES)
    counts = _counts(types, n_markers, generator)
    other = generator.poisson(1.0, (n_cells, n_genes))
    subtypes = [LOOKS[TYPES[kind]].subtypes for kind in types]
    names = [str(generator.choice(list(choices))) for choices in subtypes]
    genes = [*marker_names(n_markers), *(f"SIGNAL{gene:03d}" for gene in range(1, n_genes + 1))]
    table = ad.AnnData(
        sp.csr_matrix(np.hstack([counts, other]), dtype=np.int32),
        pd.DataFrame({"cell_type": pd.Categorical(names)}, index=[f"cell_{row}" for row in range(n_cells)]),
        pd.DataFrame(index=genes),
    )
    table.uns["merge"] = {subtype: name for name, look in LOOKS.items() for subtype in look.subtypes}
    return table
