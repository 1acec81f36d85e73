"""Ridge regression of many targets at once, for every penalty and rank from one eigendecomposition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Sums over observations that ridge regression needs, which add up over parts of the data.

    Attributes
    ----------
    n
        Observations.
    features
        Sum of the features, ``float64 (n_features,)``.
    targets
        Sum of the targets, ``float64 (n_targets,)``.
    gram
        Sum of the features' products, ``float64 (n_features, n_features)``.
    cross
        Sum of products of features and targets, ``float64 (n_features, n_targets)``.

    Examples
    --------
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
        """Sum over observations, ``(n, n_features)`` and ``(n, n_targets)``."""
        features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
        return cls(
            len(features), features.sum(axis=0), targets.sum(axis=0), features.T @ features, features.T @ targets
        )

    def __add__(self, other: Moments) -> Moments:
        """Of both parts together."""
        return Moments(
            self.n + other.n,
            self.features + other.features,
            self.targets + other.targets,
            self.gram + other.gram,
            self.cross + other.cross,
        )


@dataclass(frozen=True)
class RidgePath:
    """Ridge regression for every penalty and rank: the features' covariance in its own axes.

    Attributes
    ----------
    centre, intercept
        Means of the features, ``(n_features,)``, and of the targets, ``(n_targets,)``.
    values, vectors
        Eigenvalues and eigenvectors of the centred features' products.
    products
        ``(n_features, n_targets)``: products of centred features and targets, in the eigenvectors' axes.
    n
        Observations.

    Notes
    -----
    Izenman 1975, "Reduced-rank regression for the multivariate linear model": the fitted values are projected on
    their leading principal directions.

    Examples
    --------
    >>> import numpy as np
    >>> path = RidgePath.solve(Moments.of(np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [3.0], [5.0]])))
    >>> path.coefficients(0.0).round(6).tolist()
    [[2.0]]
    """

    centre: np.ndarray
    intercept: np.ndarray
    values: np.ndarray
    vectors: np.ndarray
    products: np.ndarray
    n: int

    @classmethod
    def solve(cls, moments: Moments) -> RidgePath:
        """Decompose what was summed."""
        centre, intercept = moments.features / moments.n, moments.targets / moments.n
        gram = moments.gram - moments.n * np.outer(centre, centre)
        cross = moments.cross - moments.n * np.outer(centre, intercept)
        values, vectors = np.linalg.eigh(gram)
        return cls(centre, intercept, np.maximum(values, 0), vectors, vectors.T @ cross, moments.n)

    @property
    def variance(self) -> float:
        """Total variance of the features."""
        return float(self.values.sum() / self.n)

    def coefficients(self, penalty: float, rank: int | None = None) -> np.ndarray:
        """Solve for a penalty: ``(n_features, n_targets)``, of at most `rank` directions of the targets."""
        turned = self._turned(penalty)
        if rank is not None and rank < min(turned.shape):
            directions = self._directions(turned)[:rank]
            turned = (turned @ directions.T) @ directions
        return self.vectors @ turned

    def patterns(self, penalty: float, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Take the coefficients apart into the patterns that targets share.

        Parameters
        ----------
        penalty
            As for `coefficients`.
        rank
            Patterns at most.

        Returns
        -------
        basis
            ``(n_features, rank)``: from centred features to patterns, the one of largest variance first.
        loadings
            ``(rank, n_targets)``: orthonormal rows; ``basis @ loadings`` is ``coefficients(penalty, rank)``.
        """
        turned = self._turned(penalty)
        directions = self._directions(turned)[:rank]
        return self.vectors @ (turned @ directions.T), directions

    def _turned(self, penalty: float) -> np.ndarray:
        # directions without variance get nothing at a penalty of 0
        known = self.values > 1e-10 * self.values.max(initial=0)
        return np.where(known, 1 / np.where(known, self.values + penalty, 1), 0)[:, None] * self.products

    def _directions(self, turned: np.ndarray) -> np.ndarray:
        # of the fitted values, whose columns are `turned` in units of each component's length; by the smaller of the
        # two products, since only the targets' side of the decomposition is needed
        fitted = np.sqrt(self.values)[:, None] * turned
        if fitted.shape[0] < fitted.shape[1]:
            _, _, directions = np.linalg.svd(fitted, full_matrices=False)
            return directions
        _, vectors = np.linalg.eigh(fitted.T @ fitted)
        return vectors[:, ::-1].T
