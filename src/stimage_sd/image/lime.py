"""LIME on images: perturbed copies of an image, and a local linear model of the network.

Source: Ribeiro et al. 2016, "Why should I trust you?", as implemented in the package `lime`. Draws, distances, kernel,
choice of segments and ridge regression equal ``lime_image.LimeImageExplainer.explain_instance``, with equal results.
Here perturbed images are built once and in batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.metrics import pairwise_distances
from sklearn.utils import check_random_state

#: kernel width of `lime_image`
KERNEL_WIDTH = 0.25
#: more segments than any image has, so that the linear model uses all of them
ALL_SEGMENTS = 100_000


def perturbations(n_samples: int, n_segments: int, *, seed: int) -> np.ndarray:
    """Draw the segments that each perturbed image shows.

    - `n_samples`: number of perturbed images.
    - `n_segments`: number of segments of the image.
    - `seed`: random seed, same as `random_state` of ``lime_image.LimeImageExplainer``.
    - returns: ``int (n_samples, n_segments)``: 1 for shown, 0 for hidden. The first image shows all segments.

    >>> perturbations(3, 4, seed=0)[0]
    array([1, 1, 1, 1])
    """
    if n_samples < 1 or n_segments < 1:
        raise ValueError(f"Expected at least one sample and one segment, found {n_samples} and {n_segments}.")
    random = check_random_state(seed)
    random.randint(0, high=1000)  # lime draws a segmentation seed first, even if it is unused
    shown = random.randint(0, 2, n_samples * n_segments).reshape(n_samples, n_segments)
    shown[0] = 1
    return shown


def hidden_image(image: np.ndarray, segments: np.ndarray, color: int | Sequence[int] | None) -> np.ndarray:
    """Return the image that replaces hidden segments.

    - `image`: original image, ``uint8 (..., 3)``.
    - `segments`: segment number per pixel, ``int (...)``. Pixels with a negative number are never hidden.
    - `color`: one value for all channels, or one value per channel. `None` uses the mean of each segment, rounded down
      as in `lime`.
    - returns: ``uint8 (..., 3)``.

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
    """Build perturbed images from shown and hidden segments.

    - `image`, `hidden`: images for shown and for hidden segments, ``uint8 (height, width, 3)``.
    - `segments`: segment number per pixel, ``int (height, width)``. Pixels with a negative number are always shown.
    - `shown`: shown segments per image, ``(n_images, n_segments)``, from `perturbations`.
    - returns: ``uint8 (n_images, height, width, 3)``.

    >>> image = np.full((1, 2, 3), 9, np.uint8)
    >>> perturbed_images(image, image * 0, np.array([[0, 1]]), np.array([[1, 0]]))[0, 0, :, 0]
    array([9, 0], dtype=uint8)
    """
    n_segments = shown.shape[1]
    # the last column is for negative numbers; masks set all bits, so that one `and` selects the differing bits
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
    """Linear models of network outputs as functions of the shown segments.

    - `weights`: ``float64 (n_segments, n_outputs)``: weight of each segment per output, 0 for segments not in the
      model.
    - `intercepts`: ``float64 (n_outputs,)``.
    - `scores`: ``float64 (n_outputs,)``: R² weighted by the kernel.
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
    """Fit linear models to network outputs for perturbed images, with `LimeBase` from `lime`.

    - `shown`: shown segments per image, ``(n_samples, n_segments)``, from `perturbations`.
    - `outputs`: network outputs, ``(n_samples, n_outputs)``.
    - `kernel_width`: width of the exponential kernel, which weights images by cosine distance from the first image.
    - `feature_selection`: method of `lime` to select segments: ``"auto"``, ``"none"``, ``"forward_selection"``,
      ``"highest_weights"`` or ``"lasso_path"``.
    - `n_features`: maximum number of segments in a linear model.
    - returns: the models.

    >>> shown = perturbations(200, 3, seed=0)
    >>> surrogate = fit_surrogate(shown, shown @ [[2.0], [0.0], [-1.0]])
    >>> bool((abs(surrogate.weights.ravel() - [2, 0, -1]) < 0.2).all())
    True
    """
    from lime.lime_base import LimeBase

    base = LimeBase(partial(_kernel, width=kernel_width), random_state=0)
    distances = pairwise_distances(shown, shown[:1], metric="cosine").ravel()
    n_outputs = outputs.shape[1]
    surrogate = Surrogate(np.zeros((shown.shape[1], n_outputs)), np.zeros(n_outputs), np.zeros(n_outputs))
    for output in range(n_outputs):
        intercept, chosen, score, _ = base.explain_instance_with_data(
            shown, outputs, distances, output, n_features, feature_selection=feature_selection
        )
        for segment, weight in chosen:
            surrogate.weights[segment, output] = weight
        surrogate.intercepts[output], surrogate.scores[output] = intercept, score
    return surrogate


def _kernel(distances: np.ndarray, width: float) -> np.ndarray:
    return np.sqrt(np.exp(-(distances**2) / width**2))


def agreement(weights: np.ndarray) -> np.ndarray:
    """Compute the mean correlation between explanations of the same outputs.

    - `weights`: weights of several explanations, such as different seeds, ``float64 (n_explanations, n_segments,
      n_outputs)``.
    - returns: ``float64 (n_outputs,)``: mean of Pearson's correlation over all pairs of explanations. NaN if an
      explanation is constant, or for fewer than two explanations or three segments.

    >>> agreement(np.array([[[0.0], [1.0], [2.0]], [[0.0], [2.0], [4.0]]]))
    array([1.])
    """
    n_explanations, n_segments, n_outputs = weights.shape
    if n_explanations < 2 or n_segments < 3:
        return np.full(n_outputs, np.nan)
    centered = weights - weights.mean(axis=1, keepdims=True)
    length = np.sqrt((centered**2).sum(axis=1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = centered / np.where(length > 1e-12 * np.abs(weights).max(initial=0), length, np.nan)
    first, second = np.triu_indices(n_explanations, 1)
    return np.einsum("pso,pso->po", unit[first], unit[second]).mean(axis=0)
