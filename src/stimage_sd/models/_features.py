"""The space a head works in: embeddings, standardised, reduced to their principal components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.utils.extmath import randomized_svd

from stimage_sd.models._strangeness import Covariance, distances, fit_strangeness

Standardize = Literal["section", "cohort"]
#: tiles that principal components are found on; more hardly turn them
_MOST_TILES = 20_000
#: tiles whose embeddings are copied at a time
_BLOCK = 4_096
#: fewer tiles than this do not tell a section's mean and deviation
LEAST_TILES = 20
#: share of the median deviation that a feature's is taken to be at least, where distances are measured
_LEAST_DEVIATION = 0.1


class SectionScale(NamedTuple):
    """What embeddings are standardised by.

    Attributes
    ----------
    mean, deviation
        ``float32 (n_features,)``; infinite is the deviation of a feature that is constant, and so says nothing.
    """

    mean: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class FeatureSpace:
    """Standardisation and principal components, fitted on the training tiles.

    Attributes
    ----------
    mean, deviation
        ``float32 (n_features,)`` over the training tiles.
    components
        ``float32 (n_features, n_components)``: projection, in units of the largest component's deviation.
        The components are not whitened: under one weight decay small components then count for little, as
        in ridge regression, which is measurably better (docs, "Design decisions").
    usual_distance
        ``float32 (1,)``: 95th percentile of training tiles' distance from the other sections' tiles, the unit of
        `strangeness`.
    directions, variances
        ``float32 (n_features, n_directions)`` and ``(n_directions + 1,)``: the covariance of the training tiles,
        standardised by the cohort, shrunk; the last variance is that of all other directions.
    weight
        ``float32 (n_features,)``: what standardised features are multiplied by, so that each extractor's have the same
        share of the variance.
    standardize
        ``"section"``: a section's embeddings are standardised by its own mean and deviation, which takes out
        what staining and scanner add to all its tiles alike. ``"cohort"``: by the training tiles'.
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
        """Find the space on a cohort.

        Parameters
        ----------
        sections
            Embeddings of each section, ``float32 (n_tiles, n_features)``.
        n_components
            Dimensions to reduce to, at most one less than tiles.
        standardize
            Whose mean and deviation to standardise a section by.
        seed
            Seed of the randomised decomposition.
        widths
            Features of each extractor, where there are several side by side.

        Returns
        -------
        The space.
        """
        n_tiles = sum(map(len, sections.values()))
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
            [space.standardized(values[chosen[name]], space.scale(values)) for name, values in sections.items()]
        )
        rank = min(n_components, len(sample) - 1, sample.shape[1])
        _, singular, directions = randomized_svd(sample, rank, random_state=seed, n_iter=4)
        deviations = singular / np.sqrt(len(sample))
        by_cohort = {name: space._by_cohort(values) for name, values in sections.items()}
        covariance, usual = fit_strangeness(by_cohort, seed=seed)
        return cls(
            mean,
            deviation,
            # in the order that a model file has it: a matrix product's last bit depends on it
            np.ascontiguousarray(directions.T / max(deviations[0], 1e-6), dtype=np.float32),
            np.array([usual], dtype=np.float32),
            np.ascontiguousarray(covariance.directions),
            covariance.variances,
            weight,
            standardize,
        )

    def scale(self, values: np.ndarray) -> SectionScale:
        """What a section, ``float32 (n_tiles, n_features)``, is standardised by.

        Raises
        ------
        ValueError
            If the section has too few tiles to be standardised by itself.
        """
        if self.standardize == "cohort":
            return _without_constants(self.mean, self.deviation)
        if len(values) < LEAST_TILES:
            raise ValueError(
                f"The model standardises each section by itself, which takes at least {LEAST_TILES} tiles, found "
                f'{len(values)}. Fit with `standardize="cohort"` for sections that small.'
            )
        # a block at a time: a section's embeddings are copied nowhere as a whole
        sums = [values[rows].sum(axis=0, dtype=np.float64) for rows in _rows(len(values))]
        mean = (np.sum(sums, axis=0) / len(values)).astype(np.float32)
        squares = [((values[rows] - mean) ** 2).sum(axis=0, dtype=np.float64) for rows in _rows(len(values))]
        return _without_constants(mean, np.sqrt(np.sum(squares, axis=0) / len(values)).astype(np.float32))

    def standardized(self, values: np.ndarray, scale: SectionScale | None = None) -> np.ndarray:
        """Standardise embeddings, ``float32 (n_tiles, n_features)``.

        Parameters
        ----------
        values
            Embeddings of one whole section, or, by the `scale` of their section, of any tiles; JAX's arrays too.
        scale
            What to standardise by; that of `values` by default.

        Raises
        ------
        ValueError
            If the section has too few tiles to be standardised by itself.
        """
        mean, deviation = self.scale(values) if scale is None else scale
        return ((values - mean) / deviation * self.weight).astype(np.float32)

    def reduce(self, values: np.ndarray, scale: SectionScale | None = None) -> np.ndarray:
        """Bring embeddings into the space, ``float32 (n_tiles, n_components)``; for `scale` see `standardized`."""
        scale = self.scale(values) if scale is None else scale
        if len(values) <= _BLOCK:
            return self.standardized(values, scale) @ self.components
        reduced = np.empty((len(values), self.components.shape[1]), dtype=np.float32)
        for rows in _rows(len(values)):
            reduced[rows] = self.standardized(values[rows], scale) @ self.components
        return reduced

    def strangeness(self, values: np.ndarray) -> np.ndarray:
        """How far tiles lie from the training tiles: above 1, farther than 95 % of those.

        Parameters
        ----------
        values
            Embeddings, ``float32 (n_tiles, n_features)``.

        Returns
        -------
        ``float32 (n_tiles,)``: Mahalanobis distance of the embeddings from the training tiles' mean, in units of the
        95th percentile of training tiles, each measured by the other sections.

        Notes
        -----
        Lee et al. 2018, "A simple unified framework for detecting out-of-distribution samples", without classes.
        Embeddings are standardised by the cohort here, whatever `standardize` is: a section that is strange as a
        whole is to show.
        """
        covariance = Covariance(self.directions, self.variances)
        blocks = (self._by_cohort(values[rows]) for rows in _rows(len(values)))
        found = np.concatenate([distances(block, covariance) for block in blocks])
        return (found / self.usual_distance[0]).astype(np.float32)

    def _by_cohort(self, values: np.ndarray) -> np.ndarray:
        # what was all but constant in training is measured by what others vary: any value of it would be far away
        return (values - self.mean) / np.maximum(self.deviation, _LEAST_DEVIATION * np.median(self.deviation))

    def arrays(self) -> dict[str, np.ndarray]:
        """The space's arrays by name, for a model file."""
        return {f"features.{item.name}": getattr(self, item.name) for item in fields(self)[:-1]}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], *, standardize: Standardize) -> FeatureSpace:
        """The inverse of `arrays`."""
        # files of one extractor need not say that all features weigh the same
        arrays = {"features.weight": np.ones_like(arrays["features.mean"]), **arrays}
        named: dict[str, Any] = {item.name: arrays[f"features.{item.name}"] for item in fields(cls)[:-1]}
        return cls(**named, standardize=standardize)


def _without_constants(mean: np.ndarray, deviation: np.ndarray) -> SectionScale:
    """Infinite deviation where it is next to none: what is constant says nothing."""
    return SectionScale(mean, np.where(deviation > 1e-6, deviation, np.float32(np.inf)))


def _rows(n_tiles: int) -> Iterator[slice]:
    """Blocks of tiles."""
    return (slice(start, min(start + _BLOCK, n_tiles)) for start in range(0, max(n_tiles, 1), _BLOCK))


def equal_shares(widths: Sequence[int]) -> np.ndarray:
    """Weights of standardised features, so that each extractor's have the same share of the variance, ``float32``."""
    shares = [np.full(width, np.sqrt(sum(widths) / (len(widths) * width))) for width in widths]
    return np.concatenate(shares).astype(np.float32)
