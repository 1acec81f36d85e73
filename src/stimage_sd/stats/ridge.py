"""Ridge regression of many targets, with one eigendecomposition for all penalties and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Sums over observations for ridge regression, which can be added over parts of the data.

    - `n`: number of observations.
    - `features`: sum of the features, ``float64 (n_features,)``.
    - `targets`: sum of the targets, ``float64 (n_targets,)``.
    - `gram`: sum of the features' products, ``float64 (n_features, n_features)``.
    - `cross`: sum of products of features and targets, ``float64 (n_features, n_targets)``.

    >>> import numpy as np
    >>> half = Moments.of(np.array([[1.0], [2.0]]), np.array([[2.0], [4.0]]))
    >>> (half + half).n
    4
    """

    n: int
    features: np.ndarray
    targets: np.ndarray
    gram: np.ndarray
    cross: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, targets: np.ndarray) -> Moments:
        """Compute the sums for features ``(n, n_features)`` and targets ``(n, n_targets)``."""
        features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
        return cls(
            len(features), features.sum(axis=0), targets.sum(axis=0), features.T @ features, features.T @ targets
        )

    def __add__(self, other: Moments) -> Moments:
        """Return the sums of both parts together."""
        return Moments(
            self.n + other.n,
            self.features + other.features,
            self.targets + other.targets,
            self.gram + other.gram,
            self.cross + other.cross,
        )


@dataclass(frozen=True)
class RidgePath:
    """Ridge regression for all penalties and ranks, in the eigenvectors of the feature covariance.

    - `center`, `intercept`: means of the features, ``(n_features,)``, and of the targets, ``(n_targets,)``.
    - `values`, `vectors`: eigenvalues and eigenvectors of the Gram matrix of the centered features.
    - `products`: ``(n_features, n_targets)``: products of centered features and targets, in eigenvector coordinates.
    - `n`: number of observations.

    Reduced ranks follow Izenman 1975, "Reduced-rank regression for the multivariate linear model". Fitted values are
    projected on their leading principal directions.

    >>> import numpy as np
    >>> path = RidgePath.solve(Moments.of(np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [3.0], [5.0]])))
    >>> path.coefficients(0.0).round(6).tolist()
    [[2.0]]
    """

    center: np.ndarray
    intercept: np.ndarray
    values: np.ndarray
    vectors: np.ndarray
    products: np.ndarray
    n: int

    @classmethod
    def solve(cls, moments: Moments) -> RidgePath:
        """Compute the eigendecomposition from the sums."""
        center, intercept = moments.features / moments.n, moments.targets / moments.n
        gram = moments.gram - moments.n * np.outer(center, center)
        cross = moments.cross - moments.n * np.outer(center, intercept)
        values, vectors = np.linalg.eigh(gram)
        return cls(center, intercept, np.maximum(values, 0), vectors, vectors.T @ cross, moments.n)

    @property
    def variance(self) -> float:
        """Return the total variance of the features."""
        return float(self.values.sum() / self.n)

    def coefficients(self, penalty: float, rank: int | None = None) -> np.ndarray:
        """Return coefficients ``(n_features, n_targets)`` for a penalty, with at most `rank` target directions."""
        turned = self._turned(penalty)
        if rank is not None and rank < min(turned.shape):
            directions = self._directions(turned)[:rank]
            turned = (turned @ directions.T) @ directions
        return self.vectors @ turned

    def patterns(self, penalty: float, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Split the coefficients into patterns that targets share.

        Parameters
        ----------
        penalty
            Penalty, as for `coefficients`.
        rank
            Maximum number of patterns.

        Returns
        -------
        basis
            ``(n_features, rank)``: map from centered features to patterns, largest variance first.
        loadings
            ``(rank, n_targets)``, orthonormal rows. ``basis @ loadings`` equals ``coefficients(penalty, rank)``.
        """
        turned = self._turned(penalty)
        directions = self._directions(turned)[:rank]
        return self.vectors @ (turned @ directions.T), directions

    def _turned(self, penalty: float) -> np.ndarray:
        # directions without variance get a coefficient of 0, even at a penalty of 0
        known = self.values > 1e-10 * self.values.max(initial=0)
        return np.where(known, 1 / np.where(known, self.values + penalty, 1), 0)[:, None] * self.products

    def _directions(self, turned: np.ndarray) -> np.ndarray:
        # Principal directions of the fitted values. Only the target side is needed, so the smaller problem is solved.
        fitted = np.sqrt(self.values)[:, None] * turned
        if fitted.shape[0] < fitted.shape[1]:
            _, _, directions = np.linalg.svd(fitted, full_matrices=False)
            return directions
        _, vectors = np.linalg.eigh(fitted.T @ fitted)
        return vectors[:, ::-1].T
