"""Feature space of the heads: embeddings, standardized and reduced, and how strange a tile is to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.utils.extmath import randomized_svd

Standardize = Literal["section", "cohort"]
#: tiles used to find principal components; more tiles hardly change them
_MOST_TILES = 20_000
#: tiles per copied block of embeddings
_BLOCK = 4_096
#: least number of tiles for a section's mean and deviation
LEAST_TILES = 20
#: least deviation of a feature in distances, as a share of the median deviation
_LEAST_DEVIATION = 0.1


class SectionScale(NamedTuple):
    """Mean and deviation that standardize embeddings.

    - `mean`, `deviation`: ``float32 (n_features,)``. Constant features have an infinite deviation, so they become 0.
    """

    mean: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class FeatureSpace:
    """Standardization and principal components, fitted on the training tiles.

    - `mean`, `deviation`: ``float32 (n_features,)`` over the training tiles.
    - `components`: ``float32 (n_features, n_components)``: projection, in units of the largest component's deviation.
      Components are not whitened. Under one weight decay, small components then count for little, as in ridge
      regression. This scores better (docs, "Design decisions").
    - `usual_distance`: ``float32 (1,)``: 95th percentile of the distances of training tiles from the tiles of other
      sections. It is the unit of `strangeness`.
    - `directions`, `variances`: ``float32 (n_features, n_directions)`` and ``(n_directions + 1,)``: shrunk covariance
      of the training tiles, standardized by the cohort. The last variance applies to all other directions.
    - `weight`: ``float32 (n_features,)``: factor on the standardized features that gives each extractor the same share
      of the variance.
    - `standardize`: ``"section"``: standardize each section by its own mean and deviation. This removes effects of
      staining and scanner on the whole section. ``"cohort"``: use the mean and deviation of the training tiles.
    """

    mean: np.ndarray
    deviation: np.ndarray
    components: np.ndarray
    usual_distance: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    weight: np.ndarray
    standardize: Standardize = "section"

    @classmethod
    def fit(
        cls,
        sections: Mapping[str, np.ndarray],
        *,
        n_components: int,
        standardize: Standardize,
        seed: int,
        widths: Sequence[int] | None = None,
    ) -> FeatureSpace:
        """Fit the space on a cohort.

        - `sections`: embeddings of each section, ``float32 (n_tiles, n_features)``.
        - `n_components`: number of components to keep, at most the number of tiles minus one.
        - `standardize`: ``"section"`` or ``"cohort"``: source of the mean and deviation of a section.
        - `seed`: seed of the randomized decomposition.
        - `widths`: number of features of each extractor, if there are several.
        - returns: the space.
        """
        n_tiles = sum(map(len, sections.values()))
        if n_tiles < 2:
            raise ValueError(
                f"Expected two tiles or more to learn from, found {n_tiles} in the sections {list(sections)}. Add "
                "sections or tiles to the cohort."
            )
        mean = sum(values.sum(axis=0, dtype=np.float64) for values in sections.values()) / n_tiles
        square = sum(((values - mean) ** 2).sum(axis=0, dtype=np.float64) for values in sections.values())
        deviation = np.maximum(np.sqrt(square / n_tiles), 1e-6)
        mean, deviation = mean.astype(np.float32), deviation.astype(np.float32)
        empty = np.zeros((0, 0), np.float32)
        weight = equal_shares(widths or [len(mean)])
        space = cls(mean, deviation, empty, empty, empty, empty, weight, standardize)
        random = np.random.default_rng(seed)
        share = min(1.0, _MOST_TILES / n_tiles)
        chosen = {
            name: np.sort(random.permutation(len(values))[: max(2, int(share * len(values)))])
            for name, values in sections.items()
        }
        sample = np.concatenate(
            [
                space.standardized(values[chosen[name]], space.scale(values, section=name))
                for name, values in sections.items()
            ]
        )
        rank = min(n_components, len(sample) - 1, sample.shape[1])
        _, singular, directions = randomized_svd(sample, rank, random_state=seed, n_iter=4)
        deviations = singular / np.sqrt(len(sample))
        by_cohort = {name: space._by_cohort(values) for name, values in sections.items()}
        covariance, usual = fit_strangeness(by_cohort, seed=seed)
        return cls(
            mean,
            deviation,
            # memory order as in a model file, because the last bit of a matrix product depends on it
            np.ascontiguousarray(directions.T / max(deviations[0], 1e-6), dtype=np.float32),
            np.array([usual], dtype=np.float32),
            np.ascontiguousarray(covariance.directions),
            covariance.variances,
            weight,
            standardize,
        )

    def scale(self, values: np.ndarray, *, section: str | None = None) -> SectionScale:
        """Return the mean and deviation that standardize a section.

        - `values`: embeddings of the whole section, ``float32 (n_tiles, n_features)``.
        - `section`: name of the section, for error messages.
        """
        if self.standardize == "cohort":
            return _without_constants(self.mean, self.deviation)
        if len(values) < LEAST_TILES:
            raise ValueError(
                f"The model standardizes each section by itself, which takes at least {LEAST_TILES} tiles, found "
                f"{len(values)}{f' in section {section!r}' if section else ''}. "
                f'Fit with `standardize="cohort"` for sections that small, or leave them out.'
            )
        # in blocks, to avoid a copy of all embeddings of the section
        sums = [values[rows].sum(axis=0, dtype=np.float64) for rows in _rows(len(values))]
        mean = (np.sum(sums, axis=0) / len(values)).astype(np.float32)
        squares = [((values[rows] - mean) ** 2).sum(axis=0, dtype=np.float64) for rows in _rows(len(values))]
        return _without_constants(mean, np.sqrt(np.sum(squares, axis=0) / len(values)).astype(np.float32))

    def standardized(self, values: np.ndarray, scale: SectionScale | None = None) -> np.ndarray:
        """Standardize embeddings, ``float32 (n_tiles, n_features)``.

        - `values`: embeddings of a whole section, or of any tiles if `scale` is given. Numpy or JAX arrays.
        - `scale`: mean and deviation of the section. By default, computed from `values`.
        """
        mean, deviation = self.scale(values) if scale is None else scale
        return ((values - mean) / deviation * self.weight).astype(np.float32)

    def reduce(self, values: np.ndarray, scale: SectionScale | None = None) -> np.ndarray:
        """Project embeddings to components, ``float32 (n_tiles, n_components)``. For `scale`, see `standardized`."""
        scale = self.scale(values) if scale is None else scale
        if len(values) <= _BLOCK:
            return self.standardized(values, scale) @ self.components
        reduced = np.empty((len(values), self.components.shape[1]), dtype=np.float32)
        for rows in _rows(len(values)):
            reduced[rows] = self.standardized(values[rows], scale) @ self.components
        return reduced

    def strangeness(self, values: np.ndarray) -> np.ndarray:
        """Compute how far tiles lie from the training tiles. Above 1 is farther than 95 % of the training tiles.

        - `values`: embeddings, ``float32 (n_tiles, n_features)``.
        - returns: ``float32 (n_tiles,)``: Mahalanobis distance of the embeddings from the mean of the training tiles,
          in units of `usual_distance`.

        Lee et al. 2018, "A simple unified framework for detecting out-of-distribution samples", without classes.
        Embeddings are always standardized by the cohort here, so that a section that is strange as a whole gets high
        values.
        """
        covariance = Covariance(self.directions, self.variances)
        blocks = (self._by_cohort(values[rows]) for rows in _rows(len(values)))
        distance = np.concatenate([distances(block, covariance) for block in blocks])
        return (distance / self.usual_distance[0]).astype(np.float32)

    def _by_cohort(self, values: np.ndarray) -> np.ndarray:
        # features that hardly vary in training get a least deviation; otherwise any new value would be far away
        return (values - self.mean) / np.maximum(self.deviation, _LEAST_DEVIATION * np.median(self.deviation))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the space by name, for a model file."""
        return {f"features.{item.name}": getattr(self, item.name) for item in fields(self)[:-1]}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], *, standardize: Standardize) -> FeatureSpace:
        """Build a space from what `arrays` returned."""
        # files of models with one extractor may lack the weights, which are then 1
        arrays = {"features.weight": np.ones_like(arrays["features.mean"]), **arrays}
        named: dict[str, Any] = {item.name: arrays[f"features.{item.name}"] for item in fields(cls)[:-1]}
        return cls(**named, standardize=standardize)


def _without_constants(mean: np.ndarray, deviation: np.ndarray) -> SectionScale:
    """Set the deviation of constant features to infinity, so that they become 0."""
    return SectionScale(mean, np.where(deviation > 1e-6, deviation, np.float32(np.inf)))


def _rows(n_tiles: int) -> Iterator[slice]:
    """Return slices of blocks of tiles."""
    return (slice(start, min(start + _BLOCK, n_tiles)) for start in range(0, max(n_tiles, 1), _BLOCK))


def equal_shares(widths: Sequence[int]) -> np.ndarray:
    """Return ``float32`` feature weights that give each extractor the same share of the variance."""
    shares = [np.full(width, np.sqrt(sum(widths) / (len(widths) * width))) for width in widths]
    return np.concatenate(shares).astype(np.float32)


#: tiles used to estimate the covariance; more tiles hardly change it
_MOST_FOR_COVARIANCE = 2_000
#: maximum number of principal components with separate variances, and minimum number of tiles per component
_MOST_COMPONENTS, _TILES_A_COMPONENT = 128, 4
#: folds, which are groups of sections or parts of a single section
_FOLDS = 3


class Covariance(NamedTuple):
    """Shrunk covariance of standardized embeddings: principal components, and one variance for the rest.

    - `directions`: ``float32 (n_features, n_components)``, orthonormal.
    - `variances`: ``float32 (n_components + 1,)``: variance along each component, then along every other direction.
    """

    directions: np.ndarray
    variances: np.ndarray


def shrunk_covariance(standardized: np.ndarray, *, seed: int, as_of: int | None = None) -> Covariance:
    """Estimate the covariance of embeddings, shrunk toward a multiple of the identity matrix.

    - `standardized`: ``(n_tiles, n_features)``, of mean 0.
    - `seed`: seed of the randomized decomposition.
    - `as_of`: number of tiles in the formula for the shrinkage. Default: the number of tiles given.
    - returns: the covariance. With all components it is the estimate of Ledoit and Wolf (2004, "A well-conditioned
      estimator for large-dimensional covariance matrices"). With fewer components, their formula uses equal variances
      for the rest.
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

    - `standardized`: ``(n_tiles, n_features)``.
    - `covariance`: the covariance.
    - returns: ``float64 (n_tiles,)``.
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
    share = min(1.0, _MOST_FOR_COVARIANCE / n_tiles)
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
