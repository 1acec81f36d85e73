"""LIME on images: perturbed copies of an image, and a local linear model of the network.

Source: Ribeiro et al. 2016, "Why should I trust you?", as implemented in the package `lime`. Draws, distances, kernel
and ridge regression equal ``lime_image.LimeImageExplainer.explain_instance``, with equal results. Here perturbed images
are built once and in batches. Pairs of opposite images need fewer images for the same accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.linalg import hadamard
from sklearn.metrics import pairwise_distances
from sklearn.utils import check_random_state

#: kernel width of `lime_image`
KERNEL_WIDTH = 0.25
#: pairs of images per segment from which the variance of the weights is known
_LEAST_PAIRS = 1.25


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


def paired_perturbations(n_samples: int, n_segments: int, *, seed: int) -> np.ndarray:
    """Draw perturbed images in pairs that show opposite segments, with segments that are orthogonal to each other.

    Each design is a Hadamard matrix and its negative, with random rows, columns and signs. In a whole design, what two
    segments do together cancels in the weight of each, as in folded screening designs (Plackett & Burman 1946, Box &
    Hunter 1961). Independent draws need several times as many images for the same accuracy.

    - `n_samples`: largest number of perturbed images. An even number gives one less.
    - `n_segments`: number of segments of the image.
    - `seed`: random seed.
    - returns: ``int (n_samples, n_segments)``: 1 for shown, 0 for hidden. The first image shows all segments, and two
      images in a row after it are a pair.

    >>> shown = paired_perturbations(9, 4, seed=0)
    >>> (shown[1::2] + shown[2::2]).tolist() == [[1] * 4] * 4
    True
    """
    if n_samples < 1 or n_segments < 1:
        raise ValueError(f"Expected at least one sample and one segment, found {n_samples} and {n_segments}.")
    random = np.random.default_rng(seed)
    n_pairs, order = (n_samples - 1) // 2, 1 << (n_segments - 1).bit_length()
    signs = [
        hadamard(order)[random.permutation(order)][:, random.permutation(order)[:n_segments]]
        * random.choice([-1, 1], n_segments)
        for _ in range(-(-n_pairs // order))
    ]
    half = np.concatenate([np.empty((0, n_segments)), *signs])[:n_pairs]
    pairs = np.stack([half, -half], axis=1).reshape(-1, n_segments)
    return np.concatenate([np.ones((1, n_segments)), pairs > 0]).astype(np.int64)


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
class LeftOut:
    """Linear models of network outputs as functions of the shown segments, and what each perturbed image changes.

    - `weights`: ``float64 (n_segments, n_outputs)``: weight of each segment per output.
    - `intercepts`: ``float64 (n_outputs,)``.
    - `variances`: variance of the weights over draws of perturbed images, of the same shape.
    - `r2`: held-out R², ``float64 (n_outputs,)``: each image is predicted by the model of all others. Weighted by the
      kernel, without the unperturbed image. NaN for a constant output.
    """

    weights: np.ndarray
    intercepts: np.ndarray
    variances: np.ndarray
    r2: np.ndarray


def leave_one_out(shown: np.ndarray, outputs: np.ndarray) -> LeftOut:
    """Fit LIME's linear models, and without each perturbed image in turn.

    The unperturbed image belongs to every draw and is never left out.

    - `shown`: shown segments per image, ``(n_samples, n_segments)``, from `perturbations`.
    - `outputs`: network outputs, ``(n_samples, n_outputs)``.
    - returns: weights, their variance and held-out R².

    Ridge regression without one sample has residual ``e / (1 - h)`` there, with the residual ``e`` and leverage ``h``
    of all samples. The weights change by ``(X'WX + I)^-1 x w e / (1 - h)``. No model is fitted twice.

    >>> shown = perturbations(200, 3, seed=0)
    >>> left_out = leave_one_out(shown, shown @ [[2.0], [0.0], [-1.0]])
    >>> bool(left_out.r2[0] > 0.99)
    True
    """
    ridge = _Ridge(shown, outputs, _kernel(_distances(shown), KERNEL_WIDTH))
    leverage = (ridge.of_change * ridge.segments).sum(axis=1, keepdims=True) + ridge.share
    errors = (ridge.residuals / (1 - leverage))[1:]
    variances = (ridge.of_change[1:] ** 2).T @ errors**2
    return LeftOut(ridge.weights, ridge.intercepts, variances, _held_out_r2(outputs[1:], errors, ridge.share[1:]))


def leave_pairs_out(shown: np.ndarray, outputs: np.ndarray) -> LeftOut:
    """Fit LIME's linear models of pairs of perturbed images, and without each pair in turn.

    The unperturbed image only gives the distances. It lies far from all others, so a model that also fits it has
    errors at each of them, which are no variance over draws. A model without pairs S has the residuals
    ``(I - H)^-1 e`` there, with the residuals ``e`` and the block ``H`` of the hat matrix of all pairs. Times the
    residuals ``e`` they estimate the variance of a pair without bias, also with few more pairs than segments. The
    jackknife, their square, is several times too large there.

    - `shown`: shown segments per image, ``(n_samples, n_segments)``, from `paired_perturbations`.
    - `outputs`: network outputs, ``(n_samples, n_outputs)``.
    - returns: weights, their variance and held-out R². The variance is infinite with fewer pairs than 1.25 times
      the segments.

    >>> shown = paired_perturbations(257, 3, seed=0)
    >>> left_out = leave_pairs_out(shown, shown @ [[2.0], [0.0], [-1.0]])
    >>> bool(left_out.r2[0] > 0.99)
    True
    """
    proximity = _kernel(_distances(shown), KERNEL_WIDTH)[1:]
    ridge = _Ridge(shown[1:], outputs[1:], proximity)
    of_change, change, segments, share, residuals = (
        part.reshape(-1, 2, part.shape[1])
        for part in (ridge.of_change, ridge.change, proximity[:, None] * ridge.segments, ridge.share, ridge.residuals)
    )
    hat = change @ segments.transpose(0, 2, 1) + share.transpose(0, 2, 1)
    errors = np.linalg.solve(np.eye(2) - hat, residuals)
    variances = sum(
        (of_change[:, one] * of_change[:, other]).T @ (errors[:, one] * residuals[:, other])
        for one, other in product((0, 1), repeat=2)
    )
    if len(errors) < _LEAST_PAIRS * shown.shape[1]:
        variances = np.full_like(variances, np.inf)
    r2 = _held_out_r2(outputs[1:], errors.reshape(outputs[1:].shape), ridge.share)
    return LeftOut(ridge.weights, ridge.intercepts, variances, r2)


class _Ridge:
    """Ridge regression of the outputs on the shown segments, with an intercept and weights per image.

    - `shown`, `outputs`: as in `leave_one_out`.
    - `proximity`: weight per image, ``float64 (n_samples,)``.
    """

    def __init__(self, shown: np.ndarray, outputs: np.ndarray, proximity: np.ndarray) -> None:
        weight = proximity[:, None]
        self.share = weight / weight.sum()
        means = [(self.share * part).sum(axis=0) for part in (shown, outputs)]
        self.segments, values = shown - means[0], outputs - means[1]
        self.change = self.segments @ np.linalg.inv((weight * self.segments).T @ self.segments + np.eye(shown.shape[1]))
        self.of_change = weight * self.change
        self.weights = self.of_change.T @ values
        self.intercepts = means[1] - means[0] @ self.weights
        self.residuals = values - self.segments @ self.weights


def _held_out_r2(found: np.ndarray, errors: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Compute R² of images from their errors in models without them. NaN for a constant output."""
    center = (share * found).sum(axis=0) / share.sum()
    scale = np.where(np.ptp(found, axis=0) > 0, (share * (found - center) ** 2).sum(axis=0), np.nan)
    return np.asarray(1 - (share * errors**2).sum(axis=0) / scale)


def stability(weights: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Estimate the correlation of scores with those from infinitely many perturbed images.

    - `weights`: weights of the segments, ``float64 (n_segments, n_outputs)``.
    - `variances`: their variances over draws of perturbed images.
    - returns: ``float64 (n_outputs,)``: square root of the share of the weights' variance between segments that is
      not variance over draws. 0 if nothing remains. NaN for fewer than three segments or if all weights are equal.

    >>> stability(np.array([[0.0], [1.0], [2.0]]), np.full((3, 1), 0.19))
    array([0.9])
    """
    n_segments, n_outputs = weights.shape
    if n_segments < 3:
        return np.full(n_outputs, np.nan)
    spread = weights.var(axis=0, ddof=1)
    spread = np.where(spread > (1e-12 * np.abs(weights).max(axis=0)) ** 2, spread, np.nan)
    # an estimate of a variance without bias can be a little below 0
    return np.sqrt((1 - variances.mean(axis=0) / spread).clip(0, 1))


def _distances(shown: np.ndarray) -> np.ndarray:
    """Compute the cosine distance of each image from the first one."""
    return pairwise_distances(shown, shown[:1], metric="cosine").ravel()


def _kernel(distances: np.ndarray, width: float) -> np.ndarray:
    return np.sqrt(np.exp(-(distances**2) / width**2))
