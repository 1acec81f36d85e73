"""How far embeddings lie from those of the training tiles: Mahalanobis distance under a shrunk covariance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from sklearn.utils.extmath import randomized_svd

#: tiles that the covariance is found on; more hardly turn it
_MOST_TILES = 2_000
#: principal components that have a variance of their own, and tiles that each of them takes at least
_MOST_COMPONENTS, _TILES_A_COMPONENT = 128, 4
#: groups of sections, or parts of a single one, that are left out in turn
_FOLDS = 3


class Covariance(NamedTuple):
    """Covariance of standardised embeddings, shrunk: some principal components, and one variance for the rest.

    Attributes
    ----------
    directions
        ``float32 (n_features, n_components)``, orthonormal.
    variances
        ``float32 (n_components + 1,)`` along them, and along each direction that is left out.
    """

    directions: np.ndarray
    variances: np.ndarray


def shrunk_covariance(standardized: np.ndarray, *, seed: int, as_of: int | None = None) -> Covariance:
    """Find the covariance of embeddings, shrunk towards a multiple of the unit matrix.

    Parameters
    ----------
    standardized
        ``(n_tiles, n_features)``, of mean 0.
    seed
        Seed of the randomised decomposition.
    as_of
        Shrunk as a covariance of so many tiles is; of their own number by default.

    Returns
    -------
    The covariance. Where it keeps all components it is Ledoit and Wolf's (2004, "A well-conditioned estimator for
    large-dimensional covariance matrices"); otherwise the variances left out are taken as all alike in their formula.
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
    """Weight of the unit matrix, of tiles' squared lengths and the sum of the covariance's squared entries."""
    n_tiles = len(lengths)
    off = squares - (lengths.sum() / n_tiles) ** 2 / n_features
    error = ((lengths**2).sum() / n_tiles - squares) / as_of
    return float(np.clip(error / off, 0, 1)) if off > 1e-12 else 1.0


def distances(standardized: np.ndarray, covariance: Covariance) -> np.ndarray:
    """Mahalanobis distance of embeddings from 0.

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
    """Find the covariance of the training tiles, and the distance that is usual for tiles it has not seen.

    Parameters
    ----------
    sections
        Embeddings of each section, standardised by the cohort.
    seed
        Seed of the choice of tiles, where there are many, and of decompositions.

    Returns
    -------
    covariance
        Of all tiles.
    usual
        95th percentile of the tiles' distances, each by the covariance of the other sections (of the other parts of a
        single one): under a covariance of fewer tiles than features its own tiles lie nearer than new ones do.
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
    """Distances of tiles by the mean, deviation and covariance of others."""
    mean, deviation = others.mean(axis=0), others.std(axis=0)
    # what hardly varies among the others keeps the cohort's deviation, which is 1
    deviation = np.where(deviation > 0.1, deviation, 1).astype(others.dtype)
    # what is shrunk less has longer distances, so these are to be shrunk as the covariance of all is
    covariance = shrunk_covariance((others - mean) / deviation, seed=seed, as_of=as_of)
    return distances((tiles - mean) / deviation, covariance)
