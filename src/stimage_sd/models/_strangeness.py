"""Strangeness: Mahalanobis distance of embeddings from the training tiles under a shrunk covariance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from sklearn.utils.extmath import randomized_svd

#: tiles used to estimate the covariance; more tiles hardly change it
_MOST_TILES = 2_000
#: maximum number of principal components with separate variances, and minimum number of tiles per component
_MOST_COMPONENTS, _TILES_A_COMPONENT = 128, 4
#: folds, which are groups of sections or parts of a single section
_FOLDS = 3


class Covariance(NamedTuple):
    """Shrunk covariance of standardized embeddings: principal components, and one variance for the rest.

    Attributes
    ----------
    directions
        ``float32 (n_features, n_components)``, orthonormal.
    variances
        ``float32 (n_components + 1,)``: variance along each component, then along every other direction.
    """

    directions: np.ndarray
    variances: np.ndarray


def shrunk_covariance(standardized: np.ndarray, *, seed: int, as_of: int | None = None) -> Covariance:
    """Estimate the covariance of embeddings, shrunk toward a multiple of the identity matrix.

    Parameters
    ----------
    standardized
        ``(n_tiles, n_features)``, of mean 0.
    seed
        Seed of the randomized decomposition.
    as_of
        Number of tiles in the formula for the shrinkage. Default: the number of tiles given.

    Returns
    -------
    The covariance. With all components it is the estimate of Ledoit and Wolf (2004, "A well-conditioned estimator for
    large-dimensional covariance matrices"). With fewer components, their formula uses equal variances for the rest.
    """
    n_tiles, n_features = standardized.shape
    rank = max(1, min(_MOST_COMPONENTS, n_tiles // _TILES_A_COMPONENT, n_features))
    _, singular, directions = randomized_svd(standardized, rank, random_state=seed, n_iter=4)
    values = singular.astype(np.float64) ** 2 / n_tiles
    lengths = (np.asarray(standardized, dtype=np.float64) ** 2).sum(axis=1)
    total, rest = lengths.sum() / n_tiles, n_features - rank
    left = max(total - values.sum(), 0.0) / max(rest, 1)
    shrinkage = _shrinkage(lengths, (values**2).sum() + rest * left**2, n_features, as_of or n_tiles)
    variances = (1 - shrinkage) * np.append(values, left) + shrinkage * total / n_features
    return Covariance(directions.T.astype(np.float32), np.maximum(variances, 1e-12).astype(np.float32))


def _shrinkage(lengths: np.ndarray, squares: float, n_features: int, as_of: int) -> float:
    """Compute the weight of the identity matrix from squared tile lengths and the covariance's squared entries."""
    n_tiles = len(lengths)
    off = squares - (lengths.sum() / n_tiles) ** 2 / n_features
    error = ((lengths**2).sum() / n_tiles - squares) / as_of
    return float(np.clip(error / off, 0, 1)) if off > 1e-12 else 1.0


def distances(standardized: np.ndarray, covariance: Covariance) -> np.ndarray:
    """Compute the Mahalanobis distance of embeddings from 0.

    Parameters
    ----------
    standardized
        ``(n_tiles, n_features)``.
    covariance
        The covariance.

    Returns
    -------
    ``float64 (n_tiles,)``.
    """
    n_features, n_components = covariance.directions.shape
    along = (standardized @ covariance.directions).astype(np.float64)
    squares = (along**2 / covariance.variances[:-1]).sum(axis=1)
    if n_components < n_features:
        beyond = (standardized**2).sum(axis=1, dtype=np.float64) - (along**2).sum(axis=1)
        squares += np.maximum(beyond, 0) / covariance.variances[-1]
    return np.sqrt(squares)


def fit_strangeness(sections: Mapping[str, np.ndarray], *, seed: int) -> tuple[Covariance, float]:
    """Estimate the covariance of the training tiles, and the usual distance of unseen tiles.

    Parameters
    ----------
    sections
        Embeddings of each section, standardized by the cohort.
    seed
        Seed of the choice of tiles and of the decompositions.

    Returns
    -------
    covariance
        Covariance of all tiles.
    usual
        95th percentile of the tiles' distances. Each tile is measured by the covariance of the other sections, or of
        the other parts of a single section. With fewer tiles than features, tiles lie closer under their own covariance
        than new tiles do.
    """
    n_tiles = sum(map(len, sections.values()))
    random = np.random.default_rng([seed, 3])
    share = min(1.0, _MOST_TILES / n_tiles)
    chosen = [
        values[np.sort(random.permutation(len(values))[: max(2, round(share * len(values)))])]
        for values in sections.values()
    ]
    tiles = np.concatenate(chosen)
    if len(chosen) > 1:
        fold = np.repeat(np.arange(len(chosen)), list(map(len, chosen))) % min(_FOLDS, len(chosen))
    else:
        fold = np.arange(len(tiles)) * _FOLDS // len(tiles)
    covariance = shrunk_covariance(tiles, seed=seed)
    unseen = [_left_out(tiles[fold != one], tiles[fold == one], as_of=len(tiles), seed=seed) for one in np.unique(fold)]
    return covariance, max(float(np.percentile(np.concatenate(unseen), 95)), 1e-12)


def _left_out(others: np.ndarray, tiles: np.ndarray, *, as_of: int, seed: int) -> np.ndarray:
    """Compute distances of tiles by the mean, deviation and covariance of the other tiles."""
    mean, deviation = others.mean(axis=0), others.std(axis=0)
    # features that hardly vary among the others keep the cohort's deviation, which is 1
    deviation = np.where(deviation > 0.1, deviation, 1).astype(others.dtype)
    # less shrinkage gives longer distances, so shrink as for the covariance of all tiles
    covariance = shrunk_covariance((others - mean) / deviation, seed=seed, as_of=as_of)
    return distances((tiles - mean) / deviation, covariance)
