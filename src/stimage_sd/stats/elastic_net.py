"""Elastic-net logistic regression of many targets on the same features, all targets at once.

The objective is that of scikit-learn, ``C * sum of log-losses + (1 - l1_ratio) / 2 * |w|² + l1_ratio * |w|₁``, without
a penalty on the intercept. It is minimized by accelerated proximal gradient steps, restarted where the objective of a
target rises. The largest eigenvalue of the feature covariance limits the length of a plain step, and eigenvalues of
embeddings span five orders of magnitude. The steps are therefore taken in the metric of that covariance. It bounds the
Hessian of every target, because the curvature of the logistic function is at most 1/4. The leading eigenvectors are
computed once for all targets, and the remaining eigenvalues are bounded by their largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: number of features or rows up to which all eigenvectors are computed
_EXACT = 1024
#: number of leading eigenvectors for larger problems
_RANK = 512
#: steps without change that mark a target as converged; maximum number of inner iterations per step
_STILL, _INNER = 3, 60
_MOST_CAUTION = 8.0


@dataclass(frozen=True)
class ElasticNetFit:
    """Result of `fit`.

    - `coefficients`: ``float32 (n_targets, n_features)``.
    - `intercepts`: ``float32 (n_targets,)``, minus or plus infinity for targets with one class only.
    - `objective`: ``float64 (n_targets,)``.
    - `converged`: ``bool (n_targets,)``: whether the objective stopped changing before the last step.
    - `n_iterations`: steps taken.
    """

    coefficients: np.ndarray
    intercepts: np.ndarray
    objective: np.ndarray
    converged: np.ndarray
    n_iterations: int


class _Metric(NamedTuple):
    """Metric ``tail * (I - V V') + V diag(leading) V'``, where V has orthonormal columns."""

    directions: jax.Array
    leading: jax.Array
    tail: jax.Array


class _Point(NamedTuple):
    """Coefficients ``(n_features, n_targets)``, intercepts, and their margins, ``(n_rows, n_targets)``."""

    weights: jax.Array
    intercepts: jax.Array
    margins: jax.Array


class _Inner(NamedTuple):
    """State of the inner solver between steps: the scaled dual and one penalty per target."""

    dual: jax.Array
    penalty: jax.Array


def objective(
    features: np.ndarray,
    labels: np.ndarray,
    coefficients: np.ndarray,
    intercepts: np.ndarray,
    *,
    C: float = 0.1,
    l1_ratio: float = 0.5,
) -> np.ndarray:
    """Compute the objective of each target, in float64.

    - `features`: ``(n_rows, n_features)``.
    - `labels`: ``bool (n_rows, n_targets)``.
    - `coefficients`, `intercepts`: ``(n_targets, n_features)`` and ``(n_targets,)``, finite.
    - `C`: inverse of the strength of regularization.
    - `l1_ratio`: share of the L1 penalty.
    - returns: ``float64 (n_targets,)``.

    >>> import numpy as np
    >>> from stimage_sd.stats import elastic_net
    >>> nothing = np.zeros((1, 2))
    >>> elastic_net.objective(np.eye(2), np.array([[True], [False]]), nothing, np.zeros(1), C=1.0).round(3).tolist()
    [1.386]
    """
    weights = np.asarray(coefficients, dtype=np.float64).T
    margins = np.asarray(features, dtype=np.float64) @ weights + np.asarray(intercepts, dtype=np.float64)
    return _objective(margins, labels, weights, C=C, l1_ratio=l1_ratio)


def _objective(
    margins: np.ndarray, labels: np.ndarray, weights: np.ndarray, *, C: float, l1_ratio: float
) -> np.ndarray:
    loss = np.logaddexp(0, margins).sum(axis=0, dtype=np.float64) - np.where(labels, margins, 0).sum(
        axis=0, dtype=np.float64
    )
    squared = np.square(weights, dtype=np.float64).sum(axis=0)
    return C * loss + (1 - l1_ratio) / 2 * squared + l1_ratio * np.abs(weights).sum(axis=0, dtype=np.float64)


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    C: float = 0.1,
    l1_ratio: float = 0.5,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> ElasticNetFit:
    """Fit one elastic-net logistic regression per target.

    - `features`: ``(n_rows, n_features)``. Standardize them, because all features share one penalty.
    - `labels`: ``bool (n_rows, n_targets)``.
    - `C`: inverse of the strength of regularization, as in scikit-learn.
    - `l1_ratio`: share of the L1 penalty, from 0 (ridge) to 1 (lasso).
    - `tolerance`: relative change of the objective below which a target counts as unchanged. It must stay below for
      three steps.
    - `max_iterations`: maximum number of steps.
    - `seed`: seed of the eigenvector computation.
    - `progress`: function called with the number of newly converged targets, before the first step and after steps that
      add any.
    - returns: the fit. Targets with one class only get coefficients of zero and an infinite intercept, for a
      probability of 0 or 1.

    Accelerated steps follow Beck and Teboulle 2009, with the restart of O'Donoghue and Candès 2015. The bound on the
    curvature is from Böhning 1992. ADMM solves the lasso of each step in the shared metric, started from the previous
    step. Objectives are summed in float64, all else is float32.

    >>> import numpy as np
    >>> from stimage_sd.stats import elastic_net
    >>> features = np.random.default_rng(0).standard_normal((200, 3))
    >>> found = elastic_net.fit(features, features[:, :1] > 0, C=1.0)
    >>> int(np.argmax(found.coefficients[0])), bool(found.converged[0])
    (0, True)
    """
    features, labels = _checked(features, labels, C, l1_ratio, tolerance, max_iterations)
    shares = labels.mean(axis=0)
    varied = (shares > 0) & (shares < 1)
    weights = np.zeros((features.shape[1], labels.shape[1]), dtype=np.float32)
    with np.errstate(divide="ignore"):
        intercepts = (np.log(shares) - np.log1p(-shares)).astype(np.float32)
    objectives, converged, steps = np.zeros(labels.shape[1]), ~varied, 0
    if progress is not None:
        progress(int(converged.sum()))
    if varied.any():
        # centering removes the curvature between features and intercept
        means = features.mean(axis=0, dtype=np.float64)
        centered = jnp.asarray((features - means).astype(np.float32))
        problem = _Problem(centered, _metric(centered, C, l1_ratio, seed), C, l1_ratio)
        solution = problem.minimize(
            labels[:, varied], intercepts[varied], tolerance=tolerance, max_iterations=max_iterations, progress=progress
        )
        weights[:, varied], centered_intercepts, objectives[varied], converged[varied], steps = solution
        intercepts[varied] = centered_intercepts - means @ weights[:, varied]
    return ElasticNetFit(np.ascontiguousarray(weights.T), intercepts, objectives, converged, steps)


def _checked(
    features: np.ndarray, labels: np.ndarray, C: float, l1_ratio: float, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or labels.ndim != 2 or len(features) != len(labels) or 0 in features.shape:
        raise ValueError(
            "Expected `features` (n_rows, n_features) and `labels` (n_rows, n_targets) of the same rows, found shapes "
            f"{features.shape} and {labels.shape}."
        )
    if not np.isfinite(features).all():
        raise ValueError("Expected `features` to be finite, found NaN or infinity among them.")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("Expected `labels` to be bool, or 0 and 1, found other values.")
    if not (np.isfinite(C) and C > 0):
        raise ValueError(f"Expected `C` to be positive, found {C}.")
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"Expected `l1_ratio` between 0 and 1, found {l1_ratio}.")
    if not tolerance > 0 or max_iterations < 1:
        raise ValueError(
            "Expected `tolerance` to be positive and `max_iterations` of at least 1, found "
            f"{tolerance} and {max_iterations}."
        )
    return features, labels.astype(bool)


# --------------------------------------------------------------------------------------------------
# the metric


def _metric(centered: jax.Array, C: float, l1_ratio: float, seed: int) -> _Metric:
    """Return a bound of the Hessian of all targets, from the largest logistic curvature and the ridge."""
    eigenvalues, directions, tail = _spectrum(centered, seed)
    ridge = 1 - l1_ratio
    # without a ridge, directions absent from all rows would have zero length, so a small floor is added
    least = max(ridge, 1e-5 * C / 4 * float(eigenvalues.max()), 1e-12)
    leading = np.maximum(C / 4 * eigenvalues + ridge, least)
    return _Metric(
        jnp.asarray(directions), jnp.asarray(leading, jnp.float32), jnp.float32(max(C / 4 * tail + ridge, least))
    )


def _spectrum(centered: jax.Array, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return leading eigenvalues and eigenvectors of the features' Gram matrix, and a bound of the others."""
    n_rows, n_features = centered.shape
    if min(n_rows, n_features) <= _EXACT:
        values = np.asarray(centered, dtype=np.float64)
        small = values.T @ values if n_features <= n_rows else values @ values.T
        eigenvalues, vectors = np.linalg.eigh(small)
        present = eigenvalues > 1e-7 * max(eigenvalues[-1], 1e-30)
        present[-1] = True
        eigenvalues, vectors = np.maximum(eigenvalues[present], 0), vectors[:, present]
        if n_features > n_rows:
            vectors = values.T @ vectors / np.sqrt(np.maximum(eigenvalues, 1e-30))
        return eigenvalues, vectors.astype(np.float32), 0.0
    gram = centered.T @ centered if n_features <= n_rows else None

    def times(block: jax.Array) -> jax.Array:
        return centered.T @ (centered @ block) if gram is None else gram @ block

    random = np.random.default_rng(seed)
    block = jnp.asarray(random.standard_normal((n_features, _RANK), dtype=np.float32))
    for _ in range(3):
        block = jnp.linalg.qr(times(block))[0]
    eigenvalues, rotation = np.linalg.eigh(np.asarray(block.T @ times(block), dtype=np.float64))
    directions = block @ jnp.asarray(rotation, jnp.float32)
    vector = jnp.asarray(random.standard_normal((n_features, 1), dtype=np.float32))
    largest = 0.0
    for _ in range(20):
        vector = vector - directions @ (directions.T @ vector)
        product = times(vector / jnp.maximum(jnp.linalg.norm(vector), 1e-30))
        vector = product - directions @ (directions.T @ product)
        largest = max(largest, float(jnp.linalg.norm(vector)))
    # power iteration approaches the eigenvalue from below
    return np.maximum(eigenvalues, 0), np.asarray(directions), 1.1 * largest


# --------------------------------------------------------------------------------------------------
# the steps


@dataclass
class _Problem:
    centered: jax.Array
    metric: _Metric
    C: float
    l1_ratio: float

    def minimize(
        self,
        labels: np.ndarray,
        intercepts: np.ndarray,
        *,
        tolerance: float,
        max_iterations: int,
        progress: Callable[[int], object] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Return weights, intercepts, objectives, convergence per target, and the number of steps."""
        n_features, n_targets = self.centered.shape[1], labels.shape[1]
        weights = np.zeros((n_features, n_targets), np.float32)
        intercepts, objectives = intercepts.copy(), np.zeros(n_targets)
        converged = np.zeros(n_targets, dtype=bool)
        columns, still = np.arange(n_targets), np.zeros(n_targets, dtype=int)
        best = self._start(intercepts)
        ahead, inner = best, self._inner_start(n_targets)
        value = self._value(best, labels)
        # Nesterov step length and stretch of the metric, one per target
        length, caution = np.ones(n_targets), np.ones(n_targets)
        for step in range(1, max_iterations + 1):
            before, chosen = best, labels[:, columns]
            candidate, inner = _step(
                self.centered,
                self.metric,
                chosen,
                ahead,
                inner,
                jnp.asarray(caution, jnp.float32),
                self.C,
                self.l1_ratio,
            )
            reached = self._value(candidate, chosen)
            worse = ~(reached <= value)
            # a plain step fails if the bound is too low, or from rounding near the optimum
            astray = worse & (length == 1)
            rounding = astray & (caution >= _MOST_CAUTION)
            still = np.where((np.abs(reached - value) <= tolerance * value) | rounding, still + 1, 0)
            caution = np.where(astray, np.minimum(2 * caution, _MOST_CAUTION), caution)
            longer = np.where(worse, 1.0, (1 + np.sqrt(1 + 4 * length**2)) / 2)
            momentum = np.where(worse, 0.0, (length - 1) / longer)
            length, value = longer, np.minimum(value, np.where(worse, value, reached))
            best, ahead = _advance(before, candidate, jnp.asarray(worse), jnp.asarray(momentum, jnp.float32))
            done = still >= _STILL
            n_new = int((done & ~converged[columns]).sum())
            converged[columns] = done | converged[columns]
            if progress is not None and n_new:
                progress(n_new)
            left = ~converged[columns]
            fewer = 2 * left.sum() <= len(columns)
            if fewer or step == max_iterations:
                weights[:, columns], intercepts[columns] = np.asarray(best.weights), np.asarray(best.intercepts)
                objectives[columns] = value
            if not left.any():
                break
            if fewer:
                # drop converged targets; dropping half at a time limits the number of compiled shapes
                best, ahead = (_Point(*(array[..., left] for array in point)) for point in (best, ahead))
                inner = _Inner(*(array[..., left] for array in inner))
                columns, still = columns[left], still[left]
                value, length, caution = value[left], length[left], caution[left]
        return weights, intercepts, objectives, converged, step

    def _start(self, intercepts: np.ndarray) -> _Point:
        n_rows, n_features = self.centered.shape
        first = jnp.asarray(intercepts)
        return _Point(
            jnp.zeros((n_features, len(first)), jnp.float32), first, jnp.broadcast_to(first, (n_rows, len(first)))
        )

    def _inner_start(self, n_targets: int) -> _Inner:
        penalty = jnp.sqrt(self.metric.tail * self.metric.leading.max())
        return _Inner(
            jnp.zeros((self.centered.shape[1], n_targets), jnp.float32), jnp.full(n_targets, penalty, jnp.float32)
        )

    def _value(self, point: _Point, labels: np.ndarray) -> np.ndarray:
        return _objective(
            np.asarray(point.margins), labels, np.asarray(point.weights), C=self.C, l1_ratio=self.l1_ratio
        )


@jax.jit
def _advance(before: _Point, after: _Point, worse: jax.Array, momentum: jax.Array) -> tuple[_Point, _Point]:
    """Return the better of two points, and the start of the next step."""
    best = _Point(*(jnp.where(worse, old, new) for old, new in zip(before, after, strict=True)))
    ahead = _Point(*(new + momentum * (new - old) for old, new in zip(before, best, strict=True)))
    return best, ahead


@jax.jit
def _step(
    centered: jax.Array,
    metric: _Metric,
    labels: jax.Array,
    start: _Point,
    inner: _Inner,
    caution: jax.Array,
    C: float,
    l1_ratio: float,
) -> tuple[_Point, _Inner]:
    """Take one proximal step in the metric."""
    residuals = jax.nn.sigmoid(start.margins) - labels
    # contract the long side in memory order
    gradient = C * (residuals.T @ centered).T + (1 - l1_ratio) * start.weights
    intercepts = start.intercepts - residuals.mean(axis=0) / (0.25 * caution)
    weights, inner = _lasso_in_metric(metric, start.weights, gradient, inner, caution, l1_ratio)
    return _Point(weights, intercepts, centered @ weights + intercepts), inner


def _lasso_in_metric(
    metric: _Metric, start: jax.Array, gradient: jax.Array, inner: _Inner, caution: jax.Array, l1: float
) -> tuple[jax.Array, _Inner]:
    """Minimize ``gradient · x + |x - start|² / 2 in the metric + l1 |x|₁`` by ADMM, one column per target."""
    directions, leading = metric.directions, metric.leading[:, None]
    # a pure ridge has a closed-form minimum, so the splitting penalty is almost zero
    penalty = jnp.where(l1 > 0, inner.penalty, 1e-6 * metric.tail)
    flat = 1 / (caution * metric.tail + penalty)
    bent = 1 / (caution * leading + penalty) - flat

    def iterate(state: tuple) -> tuple:
        iteration, split, dual, _, _, _ = state
        # solve for the change from the start, which stays exact if the start is much longer than the change
        right = penalty * (split - start - dual) - gradient
        solved = start + flat * right + directions @ (bent * (directions.T @ right))
        shrunk = jnp.sign(solved + dual) * jnp.maximum(jnp.abs(solved + dual) - l1 / penalty, 0)
        apart = jnp.linalg.norm(solved - shrunk, axis=0)
        moved = jnp.linalg.norm(shrunk - split, axis=0)
        # stop at a twentieth of the step length, or at rounding
        small = 0.05 * jnp.linalg.norm(shrunk - start, axis=0) + 1e-6 * jnp.linalg.norm(shrunk, axis=0)
        return iteration + 1, shrunk, dual + solved - shrunk, apart, moved, jnp.all((apart <= small) & (moved <= small))

    def unfinished(state: tuple) -> jax.Array:
        return (state[0] < _INNER) & ~state[5]

    nothing = jnp.zeros(start.shape[1])
    _, weights, dual, apart, moved, _ = jax.lax.while_loop(
        unfinished, iterate, (0, start, inner.dual, nothing, nothing, jnp.asarray(False))
    )
    # ADMM is fast while its two residuals are of similar size
    change = jnp.where(apart > 3 * moved, 2.0, jnp.where(moved > 3 * apart, 0.5, 1.0))
    return weights, _Inner(dual / change, inner.penalty * change)
