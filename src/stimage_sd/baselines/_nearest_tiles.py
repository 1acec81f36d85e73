"""Predict the mean of the training tiles with the most similar embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from sklearn.neighbors import NearestNeighbors

from stimage_sd.baselines._space import Standardize, fit_space, reduce, reduce_measured
from stimage_sd.models._recipe import (
    Arrays,
    Need,
    SectionData,
    Target,
    TrainingSection,
    as_counts,
    check_choice,
    check_positive,
    count_arrays,
    targets,
)


@dataclass(frozen=True)
class NearestTiles:
    """Mean log count of the `k` training tiles whose embeddings are nearest.

    Attributes
    ----------
    k
        Number of neighbors, at most the number of training tiles.
    metric
        ``"cosine"`` or ``"euclidean"`` distance between principal components.
    n_components, standardize, target
        As in `Ridge`.

    Examples
    --------
    >>> import stimage_sd as sti
    >>> sti.baselines.NearestTiles(k=30).metric
    'cosine'
    """

    k: int = 50
    metric: Literal["cosine", "euclidean"] = "cosine"
    n_components: int = 256
    standardize: Standardize = "section"
    target: Target = "log1p"

    name: ClassVar[str] = "nearest_tiles"
    needs: ClassVar[frozenset[Need]] = frozenset({"embeddings"})

    def __post_init__(self) -> None:
        check_positive(self, "k", "n_components")
        check_choice(self, "metric", ["cosine", "euclidean"])
        check_choice(self, "standardize", ["section", "cohort"])
        check_choice(self, "target", ["log1p", "lognorm"])

    def fit(self, sections: Sequence[TrainingSection], *, seed: int) -> dict[str, np.ndarray]:
        """Keep the training tiles (see `Recipe`)."""
        space = fit_space(sections, n_components=self.n_components, standardize=self.standardize, seed=seed)
        keys = reduce_measured(space, sections, self.standardize)
        return {
            **space,
            "keys": keys.astype(np.float32),
            "values": targets(sections, self.target),
            **count_arrays(sections, self.target),
        }

    def mean(self, learned: Arrays, section: SectionData) -> np.ndarray:
        """Average over the neighbors (see `Recipe`)."""
        keys, values = learned["keys"], learned["values"]
        search = NearestNeighbors(n_neighbors=min(self.k, len(keys)), metric=self.metric).fit(keys)
        nearest = search.kneighbors(reduce(learned, section, self.standardize), return_distance=False)
        average = np.stack([values[rows].mean(axis=0) for rows in nearest])
        return as_counts(average, learned)
