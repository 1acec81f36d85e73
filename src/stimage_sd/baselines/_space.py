"""Standardize, weight and reduce the embeddings of one or several extractors into one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from sklearn.utils.extmath import randomized_svd

from stimage_sd.models._features import LEAST_TILES, equal_shares
from stimage_sd.models._recipe import Arrays, SectionData, TrainingSection

Standardize = Literal["section", "cohort"]
#: number of tiles or features up to which components are exact
_EXACT = 1000


def fit_space(
    sections: Sequence[TrainingSection], *, n_components: int, standardize: Standardize, seed: int
) -> dict[str, np.ndarray]:
    """Compute mean, deviation and principal components of the training tiles.

    Parameters
    ----------
    sections
        The training sections.
    n_components
        Number of components to keep, less than the number of tiles.
    standardize
        ``"section"`` standardizes each section by its own mean and deviation over all tiles. ``"cohort"`` uses those of
        the training tiles.
    seed
        Seed of the decomposition.

    Returns
    -------
    ``space.mean`` and ``space.deviation``, ``float32 (n_features,)``. ``space.weight`` per feature, so that all
    extractors have the same share of the variance. ``space.center``, ``(n_features,)``, and ``space.components``,
    ``(n_features, n_components)``.
    """
    joined = [np.concatenate(section.embeddings, axis=1)[section.rows] for section in sections]
    together = np.concatenate(joined).astype(np.float64)
    widths = [block.shape[1] for block in sections[0].embeddings]
    space = {
        "space.mean": together.mean(axis=0).astype(np.float32),
        "space.deviation": np.maximum(together.std(axis=0), 1e-6).astype(np.float32),
        "space.weight": equal_shares(widths),
    }
    values = np.concatenate([standardized(space, section, standardize)[section.rows] for section in sections])
    space["space.center"] = values.mean(axis=0)
    values = values - space["space.center"]
    rank = min(n_components, len(values) - 1, values.shape[1])
    if min(values.shape) <= _EXACT:
        _, _, directions = np.linalg.svd(values, full_matrices=False)
    else:
        _, _, directions = randomized_svd(values, rank, random_state=seed, n_iter=7)
    space["space.components"] = np.ascontiguousarray(directions[:rank].T)
    return space


def standardized(space: Arrays, section: SectionData, standardize: Standardize) -> np.ndarray:
    """Return the standardized, weighted embeddings of a whole section, ``float32 (n_tiles, n_features)``."""
    values = np.concatenate(section.embeddings, axis=1).astype(np.float32)
    if standardize == "cohort":
        return (values - space["space.mean"]) / space["space.deviation"] * space["space.weight"]
    if len(values) < LEAST_TILES:
        raise ValueError(
            f"The recipe standardizes each section by itself, which takes at least {LEAST_TILES} tiles, found "
            f"{len(values)}{f' in section {section.name!r}' if section.name else ''}. "
            f'Give it `standardize="cohort"` for sections that small.'
        )
    deviation = values.std(axis=0)
    # set features that are constant in the section to 0
    return (
        np.where(deviation > 1e-6, (values - values.mean(axis=0)) / np.maximum(deviation, 1e-6), 0)
        * space["space.weight"]
    )


def reduce_measured(space: Arrays, sections: Sequence[TrainingSection], standardize: Standardize) -> np.ndarray:
    """Project the measured tiles of all sections into the space, ``float32 (n_measured, n_components)``."""
    return np.concatenate([reduce(space, section, standardize)[section.rows] for section in sections])


def reduce(space: Arrays, section: SectionData, standardize: Standardize) -> np.ndarray:
    """Project a whole section into the space, ``float32 (n_tiles, n_components)``."""
    return (standardized(space, section, standardize) - space["space.center"]) @ space["space.components"]
