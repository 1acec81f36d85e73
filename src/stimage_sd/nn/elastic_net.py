"""Elastic-net logistic regression of many targets on the same features, all targets at once.

The objective is scikit-learn's: ``C * sum of log-losses + (1 - l1_ratio) / 2 * |w|² + l1_ratio * |w|₁``, the
intercept not penalised. It is minimised by accelerated proximal gradient steps, restarted where a target's
objective rises. A plain step is as long as the largest eigenvalue of the features' covariance allows, and
embeddings have eigenvalues that lie five orders of magnitude apart. The steps here are therefore taken in the
metric of that covariance, which bounds the Hessian of every target (the logistic's curvature is at most 1/4):
its leading eigenvectors are found once and shared, the rest is bounded by its largest eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: up to so many features, or rows, every eigenvector is found
_EXACT = 1024
#: how many leading ones are found otherwise
_RANK = 512
#: steps that a target's objective must stand still for, and inner iterations a step at most
_STILL, _INNER = 3, 60
_MOST_CAUTION = 8.0


@dataclass(frozen=True)
class ElasticNetFit:
    """What `fit` found.

    Attributes
    ----------
    coefficients
        ``float32 (n_targets, n_features)``.
    intercepts
        ``float32 (n_targets,)``; minus or plus infinity for a target with one class only.
    objective
        ``float64 (n_targets,)``.
    converged
        ``bool (n_targets,)``: whether the objective stood still before the steps were over.
    n_iterations
        Steps taken.
    """

    coefficients: np.ndarray
    intercepts: np.ndarray
    objective: np.ndarray
    converged: np.ndarray
    n_iterations: int


class _Metric(NamedTuple):
    """``tail * (I - V V') + V diag(leading) V'``, with V of orthonormal columns."""

    directions: jax.Array
    leading: jax.Array
    tail: jax.Array


class _Point(NamedTuple):
    """Coefficients ``(n_features, n_targets)``, intercepts, and the margins they give, ``(n_rows, n_targets)``."""

    weights: jax.Array
    intercepts: jax.Array
    margins: jax.Array


class _Inner(NamedTuple):
    """What the inner solver hands from step to step: the scaled dual, and the penalty a target."""

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
    """The objective of each target, in float64.

    Parameters
    ----------
    features
        ``(n_rows, n_features)``.
    labels
        ``bool (n_rows, n_targets)``.
    coefficients, intercepts
        ``(n_targets, n_features)`` and ``(n_targets,)``, finite.
    C
        Inverse of the strength of regularisation.
    l1_ratio
        Share of the penalty that is on absolute values.

    Returns
    -------
    ``float64 (n_targets,)``.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import elastic_net
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
    """Fit an elastic-net logistic regression a target.

    Parameters
    ----------
    features
        ``(n_rows, n_features)``; standardise them, since one penalty is on all.
    labels
        ``bool (n_rows, n_targets)``.
    C
        Inverse of the strength of regularisation, as scikit-learn has it.
    l1_ratio
        Share of the penalty that is on absolute values, from 0 (ridge) to 1 (lasso).
    tolerance
        A target is done when its objective changes by less than this share, several steps in a row.
    max_iterations
        Steps at most.
    seed
        Seed of the search for eigenvectors.
    progress
        Is told, after every step, how many targets were done by it.

    Returns
    -------
    The fit. A target with one class only has coefficients of zero and an infinite intercept: the probability that
    maximises its likelihood is 0 or 1.

    Raises
    ------
    ValueError
        If shapes do not fit, numbers are not finite, or an option is out of range.

    Notes
    -----
    Beck and Teboulle 2009, with the restart of O'Donoghue and Candès 2015; the bound on the curvature is Böhning's
    (1992). Each step's lasso in the shared metric is solved by ADMM, warm from the step before. Objectives are
    summed in float64, the rest is float32.

    Examples
    --------
    >>> import numpy as np
    >>> from stimage_sd.nn import elastic_net
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
        # centred, the features and the intercept have no curvature in common
        means = features.mean(axis=0, dtype=np.float64)
        centred = jnp.asarray((features - means).astype(np.float32))
        problem = _Problem(centred, _metric(centred, C, l1_ratio, seed), C, l1_ratio)
        found = problem.minimise(
            labels[:, varied], intercepts[varied], tolerance=tolerance, max_iterations=max_iterations, progress=progress
        )
        weights[:, varied], centred_intercepts, objectives[varied], converged[varied], steps = found
        intercepts[varied] = centred_intercepts - means @ weights[:, varied]
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


def _metric(centred: jax.Array, C: float, l1_ratio: float, seed: int) -> _Metric:
    """A bound of every target's Hessian: that of the logistic's largest curvature, and the ridge."""
    eigenvalues, directions, tail = _spectrum(centred, seed)
    ridge = 1 - l1_ratio
    # without a ridge, directions that no row has would have no length; a little is given to all
    least = max(ridge, 1e-5 * C / 4 * float(eigenvalues.max()), 1e-12)
    leading = np.maximum(C / 4 * eigenvalues + ridge, least)
    return _Metric(
        jnp.asarray(directions), jnp.asarray(leading, jnp.float32), jnp.float32(max(C / 4 * tail + ridge, least))
    )


def _spectrum(centred: jax.Array, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Leading eigenvalues and eigenvectors of the features' Gram matrix, and a bound of the other eigenvalues."""
    n_rows, n_features = centred.shape
    if min(n_rows, n_features) <= _EXACT:
        values = np.asarray(centred, dtype=np.float64)
        small = values.T @ values if n_features <= n_rows else values @ values.T
        eigenvalues, vectors = np.linalg.eigh(small)
        present = eigenvalues > 1e-7 * max(eigenvalues[-1], 1e-30)
        present[-1] = True
        eigenvalues, vectors = np.maximum(eigenvalues[present], 0), vectors[:, present]
        if n_features > n_rows:
            vectors = values.T @ vectors / np.sqrt(np.maximum(eigenvalues, 1e-30))
        return eigenvalues, vectors.astype(np.float32), 0.0
    gram = centred.T @ centred if n_features <= n_rows else None

    def times(block: jax.Array) -> jax.Array:
        return centred.T @ (centred @ block) if gram is None else gram @ block

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
    # power iteration comes from below
    return np.maximum(eigenvalues, 0), np.asarray(directions), 1.1 * largest


# --------------------------------------------------------------------------------------------------
# the steps


@dataclass
class _Problem:
    centred: jax.Array
    metric: _Metric
    C: float
    l1_ratio: float

    def minimise(
        self,
        labels: np.ndarray,
        intercepts: np.ndarray,
        *,
        tolerance: float,
        max_iterations: int,
        progress: Callable[[int], object] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Weights, intercepts, objectives, whether they stand still, and the steps taken."""
        n_features, n_targets = self.centred.shape[1], labels.shape[1]
        weights = np.zeros((n_features, n_targets), np.float32)
        intercepts, objectives = intercepts.copy(), np.zeros(n_targets)
        converged = np.zeros(n_targets, dtype=bool)
        columns, still = np.arange(n_targets), np.zeros(n_targets, dtype=int)
        best = self._start(intercepts)
        ahead, inner = best, self._inner_start(n_targets)
        value = self._value(best, labels)
        # lengths of Nesterov's sequence, and by how much the metric is stretched, a target
        length, caution = np.ones(n_targets), np.ones(n_targets)
        for step in range(1, max_iterations + 1):
            before, chosen = best, labels[:, columns]
            found, inner = _step(
                self.centred,
                self.metric,
                chosen,
                ahead,
                inner,
                jnp.asarray(caution, jnp.float32),
                self.C,
                self.l1_ratio,
            )
            reached = self._value(found, chosen)
            worse = ~(reached <= value)
            # a step that was not accelerated goes wrong by a bound that is too low; else by rounding, at the end
            astray = worse & (length == 1)
            rounding = astray & (caution >= _MOST_CAUTION)
            still = np.where((np.abs(reached - value) <= tolerance * value) | rounding, still + 1, 0)
            caution = np.where(astray, np.minimum(2 * caution, _MOST_CAUTION), caution)
            longer = np.where(worse, 1.0, (1 + np.sqrt(1 + 4 * length**2)) / 2)
            momentum = np.where(worse, 0.0, (length - 1) / longer)
            length, value = longer, np.minimum(value, np.where(worse, value, reached))
            best, ahead = _advance(before, found, jnp.asarray(worse), jnp.asarray(momentum, jnp.float32))
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
                # what is done is left behind; halving keeps the number of shapes to compile small
                best, ahead = (_Point(*(array[..., left] for array in point)) for point in (best, ahead))
                inner = _Inner(*(array[..., left] for array in inner))
                columns, still = columns[left], still[left]
                value, length, caution = value[left], length[left], caution[left]
        return weights, intercepts, objectives, converged, step

    def _start(self, intercepts: np.ndarray) -> _Point:
        n_rows, n_features = self.centred.shape
        first = jnp.asarray(intercepts)
        return _Point(
            jnp.zeros((n_features, len(first)), jnp.float32), first, jnp.broadcast_to(first, (n_rows, len(first)))
        )

    def _inner_start(self, n_targets: int) -> _Inner:
        penalty = jnp.sqrt(self.metric.tail * self.metric.leading.max())
        return _Inner(
            jnp.zeros((self.centred.shape[1], n_targets), jnp.float32), jnp.full(n_targets, penalty, jnp.float32)
        )

    def _value(self, point: _Point, labels: np.ndarray) -> np.ndarray:
        return _objective(
            np.asarray(point.margins), labels, np.asarray(point.weights), C=self.C, l1_ratio=self.l1_ratio
        )


@jax.jit
def _advance(before: _Point, found: _Point, worse: jax.Array, momentum: jax.Array) -> tuple[_Point, _Point]:
    """The better of two points, and the point to step from next."""
    best = _Point(*(jnp.where(worse, old, new) for old, new in zip(before, found, strict=True)))
    ahead = _Point(*(new + momentum * (new - old) for old, new in zip(before, best, strict=True)))
    return best, ahead


@jax.jit
def _step(
    centred: jax.Array,
    metric: _Metric,
    labels: jax.Array,
    start: _Point,
    inner: _Inner,
    caution: jax.Array,
    C: float,
    l1_ratio: float,
) -> tuple[_Point, _Inner]:
    """One proximal step in the metric."""
    residuals = jax.nn.sigmoid(start.margins) - labels
    # written so that the long side is contracted in the order it lies in memory
    gradient = C * (residuals.T @ centred).T + (1 - l1_ratio) * start.weights
    intercepts = start.intercepts - residuals.mean(axis=0) / (0.25 * caution)
    weights, inner = _lasso_in_metric(metric, start.weights, gradient, inner, caution, l1_ratio)
    return _Point(weights, intercepts, centred @ weights + intercepts), inner


def _lasso_in_metric(
    metric: _Metric, start: jax.Array, gradient: jax.Array, inner: _Inner, caution: jax.Array, l1: float
) -> tuple[jax.Array, _Inner]:
    """Minimise ``gradient · x + |x - start|² / 2 in the metric + l1 |x|₁`` by ADMM, a column a target."""
    directions, leading = metric.directions, metric.leading[:, None]
    # a ridge alone has its minimum in closed form: the penalty of the splitting is then nothing
    penalty = jnp.where(l1 > 0, inner.penalty, 1e-6 * metric.tail)
    flat = 1 / (caution * metric.tail + penalty)
    bent = 1 / (caution * leading + penalty) - flat

    def iterate(state: tuple) -> tuple:
        number, split, dual, _, _, _ = state
        # solved for the way from the start, which stays exact where the start itself is much longer
        right = penalty * (split - start - dual) - gradient
        solved = start + flat * right + directions @ (bent * (directions.T @ right))
        shrunk = jnp.sign(solved + dual) * jnp.maximum(jnp.abs(solved + dual) - l1 / penalty, 0)
        apart = jnp.linalg.norm(solved - shrunk, axis=0)
        moved = jnp.linalg.norm(shrunk - split, axis=0)
        # to a twentieth of the step's own length, or to rounding
        small = 0.05 * jnp.linalg.norm(shrunk - start, axis=0) + 1e-6 * jnp.linalg.norm(shrunk, axis=0)
        return number + 1, shrunk, dual + solved - shrunk, apart, moved, jnp.all((apart <= small) & (moved <= small))

    def unfinished(state: tuple) -> jax.Array:
        return (state[0] < _INNER) & ~state[5]

    nothing = jnp.zeros(start.shape[1])
    _, weights, dual, apart, moved, _ = jax.lax.while_loop(
        unfinished, iterate, (0, start, inner.dual, nothing, nothing, jnp.asarray(False))
    )
    # the splitting's two residuals are kept alike, which is what makes it fast
    change = jnp.where(apart > 3 * moved, 2.0, jnp.where(moved > 3 * apart, 0.5, 1.0))
    return weights, _Inner(dual / change, inner.penalty * change)
