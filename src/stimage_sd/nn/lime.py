"""LIME on images: perturbed copies of an image, and the linear model that stands for the network near it.

Ribeiro et al. 2016, "Why should I trust you?", as the package `lime` has it: the draws, the distances, the kernel, the
choice of segments and the ridge regression are those of ``lime_image.LimeImageExplainer.explain_instance``, to which
results are equal. What differs is how the work is done: perturbed images are built many at a time, each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.metrics import pairwise_distances
from sklearn.utils import check_random_state

#: `lime_image`'s
KERNEL_WIDTH = 0.25
#: more segments than any image has: all are in the linear model
ALL_SEGMENTS = 100_000


def perturbations(n_samples: int, n_segments: int, *, seed: int) -> np.ndarray:
    """Draw which segments each perturbed image shows.

    Parameters
    ----------
    n_samples
        Perturbed images.
    n_segments
        Segments of the image.
    seed
        The `random_state` of ``lime_image.LimeImageExplainer``, whose draws these are.

    Returns
    -------
    ``int (n_samples, n_segments)``: 1 for shown, 0 for hidden; the first image shows all.

    Raises
    ------
    ValueError
        If there are no samples or no segments.

    Examples
    --------
    >>> perturbations(3, 4, seed=0)[0]
    array([1, 1, 1, 1])
    """
    if n_samples < 1 or n_segments < 1:
        raise ValueError(f"Expected at least one sample and one segment, found {n_samples} and {n_segments}.")
    random = check_random_state(seed)
    random.randint(0, high=1000)  # lime's seed of a segmentation that it is not asked for
    shown = random.randint(0, 2, n_samples * n_segments).reshape(n_samples, n_segments)
    shown[0] = 1
    return shown


def hidden_image(image: np.ndarray, segments: np.ndarray, color: int | Sequence[int] | None) -> np.ndarray:
    """Give the image that shows through where segments are hidden.

    Parameters
    ----------
    image
        ``uint8 (..., 3)``.
    segments
        ``int (...)``: number of each pixel's segment; pixels of negative number are never hidden.
    color
        One number for all channels, or one a channel; `None`: each segment's mean, rounded down, as in `lime`.

    Returns
    -------
    ``uint8 (..., 3)``.

    Examples
    --------
    >>> image = np.array([[[0, 0, 0], [9, 9, 9]]], np.uint8)
    >>> hidden_image(image, np.array([[0, 0]]), None)[0, 0]
    array([4, 4, 4], dtype=uint8)
    """
    hidden = image.copy()
    if color is not None:
        hidden[:] = color
        return hidden
    inside = segments >= 0
    numbers, pixels = segments[inside], image[inside]
    counts = np.maximum(np.bincount(numbers), 1)
    means = np.stack([np.bincount(numbers, pixels[:, channel]) / counts for channel in range(3)], axis=1)
    hidden[inside] = means[numbers].astype(np.uint8)
    return hidden


def perturbed_images(image: np.ndarray, hidden: np.ndarray, segments: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Build perturbed images.

    Parameters
    ----------
    image, hidden
        ``uint8 (height, width, 3)``: what shown and what hidden segments look like.
    segments
        ``int (height, width)``: number of each pixel's segment; pixels of negative number are always shown.
    shown
        ``(n_images, n_segments)`` of `perturbations`.

    Returns
    -------
    ``uint8 (n_images, height, width, 3)``.

    Examples
    --------
    >>> image = np.full((1, 2, 3), 9, np.uint8)
    >>> perturbed_images(image, image * 0, np.array([[0, 1]]), np.array([[1, 0]]))[0, 0, :, 0]
    array([9, 0], dtype=uint8)
    """
    n_segments = shown.shape[1]
    # the last column is that of negative numbers; all bits of a byte, so that what differs is switched on by one `and`
    masks = np.full((len(shown), n_segments + 1), 255, dtype=np.uint8)
    masks[:, :n_segments] *= shown.astype(bool)
    visible = np.take(masks, np.where(segments >= 0, segments, n_segments).ravel(), axis=1)
    differs = (image ^ hidden).reshape(-1, 3)
    images = np.empty((*visible.shape, 3), dtype=np.uint8)
    for channel in range(3):
        np.bitwise_and(visible, differs[:, channel], out=images[..., channel])
    images ^= hidden.reshape(-1, 3)
    return images.reshape(len(shown), *image.shape)


@dataclass(frozen=True)
class Surrogate:
    """Linear models of outputs by which segments are shown.

    Attributes
    ----------
    weights
        ``float64 (n_segments, n_outputs)``: how much of an output a segment carries; 0 for those left out.
    intercepts
        ``float64 (n_outputs,)``.
    scores
        ``float64 (n_outputs,)``: R², weighted by the kernel.
    """

    weights: np.ndarray
    intercepts: np.ndarray
    scores: np.ndarray


def fit_surrogate(
    shown: np.ndarray,
    outputs: np.ndarray,
    *,
    kernel_width: float = KERNEL_WIDTH,
    feature_selection: str = "auto",
    n_features: int = ALL_SEGMENTS,
) -> Surrogate:
    """Fit linear models to a network's outputs for perturbed images, by `lime`'s own `LimeBase`.

    Parameters
    ----------
    shown
        ``(n_samples, n_segments)`` of `perturbations`.
    outputs
        ``(n_samples, n_outputs)``.
    kernel_width
        Width of the exponential kernel that weighs images by their cosine distance from the first.
    feature_selection
        How `lime` chooses segments: ``"auto"``, ``"none"``, ``"forward_selection"``, ``"highest_weights"`` or
        ``"lasso_path"``.
    n_features
        Segments that a linear model may have.

    Returns
    -------
    The models.

    Examples
    --------
    >>> shown = perturbations(200, 3, seed=0)
    >>> surrogate = fit_surrogate(shown, shown @ [[2.0], [0.0], [-1.0]])
    >>> bool((abs(surrogate.weights.ravel() - [2, 0, -1]) < 0.2).all())
    True
    """
    from lime.lime_base import LimeBase

    base = LimeBase(partial(_kernel, width=kernel_width), random_state=0)
    distances = pairwise_distances(shown, shown[:1], metric="cosine").ravel()
    n_outputs = outputs.shape[1]
    found = Surrogate(np.zeros((shown.shape[1], n_outputs)), np.zeros(n_outputs), np.zeros(n_outputs))
    for number in range(n_outputs):
        intercept, chosen, score, _ = base.explain_instance_with_data(
            shown, outputs, distances, number, n_features, feature_selection=feature_selection
        )
        for segment, weight in chosen:
            found.weights[segment, number] = weight
        found.intercepts[number], found.scores[number] = intercept, score
    return found


def _kernel(distances: np.ndarray, width: float) -> np.ndarray:
    return np.sqrt(np.exp(-(distances**2) / width**2))


def agreement(weights: np.ndarray) -> np.ndarray:
    """How alike explanations of the same outputs are.

    Parameters
    ----------
    weights
        ``float64 (n_explanations, n_segments, n_outputs)``, such as by different seeds.

    Returns
    -------
    ``float64 (n_outputs,)``: the mean of Pearson's correlation over all pairs of explanations; NaN where one of them is
    constant, or there are fewer than two explanations or three segments.

    Examples
    --------
    >>> agreement(np.array([[[0.0], [1.0], [2.0]], [[0.0], [2.0], [4.0]]]))
    array([1.])
    """
    n_explanations, n_segments, n_outputs = weights.shape
    if n_explanations < 2 or n_segments < 3:
        return np.full(n_outputs, np.nan)
    centred = weights - weights.mean(axis=1, keepdims=True)
    length = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = centred / np.where(length > 1e-12 * np.abs(weights).max(initial=0), length, np.nan)
    first, second = np.triu_indices(n_explanations, 1)
    return np.einsum("pso,pso->po", unit[first], unit[second]).mean(axis=0)
