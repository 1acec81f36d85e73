"""Cells of four types in a synthetic tissue: what their nuclei look like, and the genes that mark them."""

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
    """What nuclei of a type look like.

    Attributes
    ----------
    radius_um
        Mean radius of a circle of their area, µm.
    aspect
        Least and greatest ratio of the long to the short axis.
    darkness
        Mean haematoxylin, as the painter draws it.
    subtypes
        What a single-cell reference calls them.
    """

    radius_um: float
    aspect: tuple[float, float]
    darkness: float
    subtypes: tuple[str, ...]


#: the paper's four classes
LOOKS = {
    "cancer epithelial": Look(4.8, (1.0, 1.35), 80.0, ("luminal cancer", "basal cancer")),
    "endothelial": Look(2.8, (3.4, 4.6), 165.0, ("endothelial",)),
    "immune": Look(2.6, (1.0, 1.15), 170.0, ("T cell", "B cell", "macrophage")),
    "stromal": Look(3.4, (1.9, 2.7), 112.0, ("fibroblast", "pericyte")),
}
TYPES = tuple(LOOKS)
#: transcripts of a marker in a cell of its type, and in another's
MARKER_MEAN, OTHER_MEAN = 6.0, 0.25
#: nuclei stand apart by this part of the sum of their radii, at least
_APART = 1.0


def marker_names(n_markers: int) -> list[str]:
    """Names of the markers, type by type."""
    return [f"{name.replace(' ', '_').upper()}_{number:02d}" for name in TYPES for number in range(1, n_markers + 1)]


def give_types(tissue: Tissue, nuclei: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give nuclei a type each, and the look of it.

    Parameters
    ----------
    tissue
        Where they are: stroma has spindles and vessels, what is not stroma is tumour; immune cells gather where nuclei
        are dense.
    nuclei
        ``(n, 6)`` as `scatter_nuclei` places them.

    Returns
    -------
    Those that have room, ``(m, 6)``, and their types, ``int64 (m,)``, numbers of `TYPES`.
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
    found = np.column_stack([points, radius * np.sqrt(aspect), radius / np.sqrt(aspect), nuclei[:, 4], darkness])
    apart = _with_room(found, generator)
    return found[apart], types[apart]


def _with_room(nuclei: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Nuclei that none of those chosen before is too near to, in random order."""
    reach = nuclei[:, 2:4].mean(axis=1)
    near = KDTree(nuclei[:, :2]).query_pairs(2 * _APART * reach.max(), output_type="ndarray")
    distance = np.hypot(*(nuclei[near[:, 0], :2] - nuclei[near[:, 1], :2]).T)
    near = near[distance < _APART * reach[near].sum(axis=1)]
    neighbours: list[list[int]] = [[] for _ in nuclei]
    for one, other in near.tolist():
        neighbours[one].append(other)
        neighbours[other].append(one)
    chosen = np.zeros(len(nuclei), dtype=bool)
    for number in generator.permutation(len(nuclei)).tolist():
        chosen[number] = not chosen[neighbours[number]].any()
    return chosen


def draw_markers(nuclei: np.ndarray, types: np.ndarray, *, n_markers: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scatter the markers' transcripts within nuclei.

    Returns
    -------
    Places ``(n, 2)``, pixels of the H&E, and numbers of markers, as `marker_names` orders them.
    """
    generator = np.random.default_rng([seed, 41])
    counts = _counts(types, n_markers, generator)
    owners, markers = (np.repeat(index, counts.ravel()) for index in np.indices(counts.shape).reshape(2, -1))
    # evenly within an ellipse a little smaller than the nucleus
    radius, turn = 0.9 * np.sqrt(generator.random(len(owners))), generator.uniform(0, 2 * np.pi, len(owners))
    along = nuclei[owners, 2:4] * np.column_stack([radius * np.cos(turn), radius * np.sin(turn)])
    angle = np.radians(nuclei[owners, 4])
    cosine, sine = np.cos(angle), np.sin(angle)
    away = np.column_stack([along[:, 0] * cosine - along[:, 1] * sine, along[:, 0] * sine + along[:, 1] * cosine])
    return nuclei[owners, :2] + away, markers


def _counts(types: np.ndarray, n_markers: int, generator: np.random.Generator) -> np.ndarray:
    """Transcripts of every cell and marker, ``(n_cells, n_types * n_markers)``."""
    own = np.repeat(np.arange(len(TYPES)), n_markers) == types[:, None]
    return generator.poisson(np.where(own, MARKER_MEAN, OTHER_MEAN))


def synthetic_reference(*, n_cells: int = 800, n_markers: int = 5, n_genes: int = 0, seed: int = 0) -> ad.AnnData:
    """Make a single-cell reference of the cells that `synthetic_xenium` paints, by finer names.

    Parameters
    ----------
    n_cells
        Cells, as many of each type.
    n_markers
        Marker genes a type, the same as of the section.
    n_genes
        Further genes, ``SIGNAL001`` and so on, which tell types nothing.
    seed
        Decides the counts.

    Returns
    -------
    ``X`` CSR of counts; ``obs["cell_type"]``: finer types, such as ``"T cell"``; ``uns["merge"]``: the section's type
    of each.

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
    subtypes = [LOOKS[TYPES[number]].subtypes for number in types]
    names = [str(generator.choice(list(choices))) for choices in subtypes]
    genes = [*marker_names(n_markers), *(f"SIGNAL{number:03d}" for number in range(1, n_genes + 1))]
    table = ad.AnnData(
        sp.csr_matrix(np.hstack([counts, other]), dtype=np.int32),
        pd.DataFrame({"cell_type": pd.Categorical(names)}, index=[f"cell_{number}" for number in range(n_cells)]),
        pd.DataFrame(index=genes),
    )
    table.uns["merge"] = {subtype: name for name, look in LOOKS.items() for subtype in look.subtypes}
    return table
