"""Expression patterns that genes share: how they are found, and components of embeddings projected to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce as fold
from operator import add

import numpy as np
import scipy.sparse as sp

from stimage_sd.stats.ridge import Moments, RidgePath
from stimage_sd.stats.spatial import pearson


@dataclass(frozen=True)
class SharedPatterns:
    """Directions of the components along which the expression of many genes varies, for each member.

    - `basis`: ``float32 (n_members, n_components, rank)``.
    - `center`: ``float32 (n_members, n_components)``: mean of each member's training tiles.
    """

    basis: np.ndarray
    center: np.ndarray

    @property
    def rank(self) -> int:
        """Number of patterns."""
        return self.basis.shape[-1]

    def of(self, members: Sequence[int]) -> SharedPatterns:
        """Return the patterns of some members."""
        return SharedPatterns(self.basis[list(members)], self.center[list(members)])

    def project(self, reduced: np.ndarray, *, members: Sequence[int] | None = None) -> np.ndarray:
        """Project components to the patterns of each member.

        - `reduced`: ``float32 (n_tiles, n_components)``.
        - `members`: indices of the members. Default: all.
        - returns: ``float32 (n_members, n_tiles, rank)``.
        """
        chosen = slice(None) if members is None else list(members)
        basis, center = self.basis[chosen], self.center[chosen]
        return reduced @ basis - center[:, None, :] @ basis


#: candidate penalties, in multiples of the total variance of the features
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
#: number of splits, and of held-out tiles per split, used to choose the penalty (more hardly change the choice)
_MOST_SPLITS, _MOST_TILES = 5, 1_000
#: number of tiles per block of dense counts
_BLOCK = 4_096


def find_patterns(
    features: np.ndarray, counts: sp.csr_matrix, size_factors: np.ndarray, held_out: np.ndarray, *, rank: int
) -> SharedPatterns:
    """Find the expression patterns that genes share on the training tiles of each member.

    - `features`: ``float32 (n_tiles, n_components)``.
    - `counts`: ``(n_tiles, n_genes)`` sparse.
    - `size_factors`: ``(n_tiles,)``, ones if size factors are not used.
    - `held_out`: ``bool (n_members, n_tiles)``: tiles that a member does not learn from.
    - `rank`: number of patterns, limited to the number of genes and of components.
    - returns: the patterns, scaled so that the largest has unit standard deviation. The ridge penalty is the one with
      the highest mean Pearson correlation on held-out tiles.
    """
    splits, split_of = np.unique(held_out, axis=0, return_inverse=True)
    paths = _paths(features, counts, size_factors, splits)
    rank = min(rank, features.shape[1], counts.shape[1])
    penalty = _choose_penalty(features, counts, size_factors, splits, paths, rank)
    projections = []
    for path in paths:
        basis, _ = path.patterns(penalty * path.variance, rank)
        # standard deviation of each pattern over the training tiles, from the covariance of the features
        spread = np.sqrt((((path.vectors.T @ basis) ** 2) * path.values[:, None]).sum(axis=0) / path.n)
        projections.append((basis / max(spread.max(initial=0.0), 1e-12), path.center))
    members = split_of.ravel()
    return SharedPatterns(
        np.stack([basis for basis, _ in projections]).astype(np.float32)[members],
        np.stack([center for _, center in projections]).astype(np.float32)[members],
    )


def _paths(
    features: np.ndarray, counts: sp.csr_matrix, size_factors: np.ndarray, splits: np.ndarray
) -> list[RidgePath]:
    """Solve the ridge regression per split, summing tiles that share the same splits once."""
    groups, group_of = np.unique(splits.T, axis=0, return_inverse=True)
    moments = []
    for group in range(len(groups)):
        rows = np.flatnonzero(group_of.ravel() == group)
        parts = (Moments.of(features[block], target) for block, target in _targets(rows, counts, size_factors))
        moments.append(fold(add, parts))
    return [
        RidgePath.solve(fold(add, (part for part, held in zip(moments, groups[:, split], strict=True) if not held)))
        for split in range(len(splits))
    ]


def _targets(
    rows: np.ndarray, counts: sp.csr_matrix, size_factors: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield log counts in blocks of tiles."""
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        yield block, np.log1p(counts[block].toarray() / size_factors[block, None])


def _choose_penalty(
    features: np.ndarray,
    counts: sp.csr_matrix,
    size_factors: np.ndarray,
    splits: np.ndarray,
    paths: list[RidgePath],
    rank: int,
) -> float:
    """Return the penalty that predicts held-out tiles best, in multiples of the total variance."""
    scores = np.zeros(len(_PENALTIES))
    for split, path in list(zip(splits, paths, strict=True))[:_MOST_SPLITS]:
        rows = np.flatnonzero(split)
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MOST_TILES)).astype(int)]
        wanted = np.concatenate([target for _, target in _targets(rows, counts, size_factors)])
        for place, penalty in enumerate(_PENALTIES):
            basis, loadings = path.patterns(penalty * path.variance, rank)
            agreement = pearson(features[rows] @ basis @ loadings, wanted)
            scores[place] += np.nanmean(agreement) if np.isfinite(agreement).any() else 0.0
    return _PENALTIES[int(np.argmax(scores))]
