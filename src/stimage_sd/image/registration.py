"""Registration of two images of one tissue by its nuclei.

The input are numpy images, the result is a 3 × 3 matrix. Points are ``(x, y)`` in pixels from the image corner. The
center of the first pixel is at 0.5, as in SpatialData. OpenCV puts it at 0, and this module applies the shift.

SIFT features (Lowe 2004) of coarse copies are matched. RANSAC finds the similarity that most matches agree on (Fischler
and Bolles 1981). Small patches rich in nuclei are then searched in the other image by normalized cross-correlation,
from coarse to fine, and the transformation is fitted to the positions found. With a wrong alignment the patches are
found at random positions, so the share of patches that agree identifies a correct alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from stimage_sd.image.keypoints import Features, Picture, detect, match
from stimage_sd.image.patches import PATCH, apply, find_patches

TransformKind = Literal["similarity", "affine"]

#: longest sides of the coarse copies for features, tried in turn, px: first single nuclei, then their arrangement
_COARSE_SIDES = (2000, 1000)
#: smallest number of matches that do not agree by chance
_FEWEST_MATCHES = 5
#: smallest and largest factor between the scales of the images
_SCALES = (0.2, 5.0)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Alignment of a moving image with a fixed image, with measures of its quality.

    - `matrix`: transformation ``float64 (3, 3)``, moving px to fixed px.
    - `residual_px`: median distance of clearly found patches from their position under a transformation fitted without
      them, fixed px. Infinite for too few patches.
    - `n_inliers`: number of clearly found patches within the tolerance of the transformation.
    - `n_patches`: number of clearly found patches.
    - `n_matches`: number of matched features that agree on the coarse transformation.
    - `mirrored`: whether the moving image shows the tissue from behind.
    - `inverted`: whether bright areas in one image are dark in the other.
    """

    matrix: np.ndarray
    residual_px: float = np.inf
    n_inliers: int = 0
    n_patches: int = 0
    n_matches: int = 0
    mirrored: bool = False
    inverted: bool = False


# --------------------------------------------------------------------------------------------------
# transformations from paired points


def fit(source: np.ndarray, target: np.ndarray, kind: TransformKind, weights: np.ndarray | None = None) -> np.ndarray:
    """Fit a transformation to paired points by weighted least squares.

    - `source`, `target`: points, ``(n, 2)``. At least 2 pairs for a similarity and 3 for an affine transformation.
    - `kind`: ``"similarity"`` (rotation, one scale and shift, without mirroring) or ``"affine"``.
    - `weights`: weights, ``(n,)``, not negative. All 1 by default.
    - returns: matrix ``float64 (3, 3)``, source to target.

    >>> square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> fit(square, 2 * square + [3, 4], "similarity").round(6) + 0.0
    array([[2., 0., 3.],
           [0., 2., 4.],
           [0., 0., 1.]])
    """
    weights = np.ones(len(source)) if weights is None else weights
    share = (weights / weights.sum())[:, None]
    middle = (share * source).sum(axis=0), (share * target).sum(axis=0)
    left, right = source - middle[0], target - middle[1]
    if kind == "affine":
        root = np.sqrt(share)
        linear = np.linalg.lstsq(root * left, root * right, rcond=None)[0].T
    else:
        spread = max(float((share * left**2).sum()), 1e-12)
        cosine = float((share * left * right).sum()) / spread
        sine = float((share[:, 0] * (left[:, 0] * right[:, 1] - left[:, 1] * right[:, 0])).sum()) / spread
        linear = np.array([[cosine, -sine], [sine, cosine]])
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, middle[1] - linear @ middle[0]
    return matrix


def agree(
    source: np.ndarray,
    target: np.ndarray,
    *,
    tolerance: float,
    seed: int,
    prior: tuple[np.ndarray, np.ndarray] | None = None,
    n_samples: int = 100_000,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the similarity that most pairs of points agree on, by RANSAC on samples of two pairs.

    - `source`, `target`: ``(n, 2)`` points.
    - `tolerance`: distance within which a pair agrees, target px.
    - `seed`: seed of the sampling.
    - `prior`: scale ``(n,)`` and rotation ``(n,)``, radians, known per pair. Samples that contradict them are skipped.
    - `n_samples`: number of samples.
    - returns: the matrix ``(3, 3)`` and the pairs that agree with it, ``bool (n,)``. No pair agrees if no similarity
      was found. Of pairs that share a point only the nearest counts.
    """
    nothing = np.eye(3), np.zeros(len(source), bool)
    if len(source) < 2:
        return nothing
    random = np.random.default_rng(seed)
    first, second = random.integers(0, len(source), (2, n_samples))
    start, end = source @ [1, 1j], target @ [1, 1j]
    apart = np.abs(start[second] - start[first]) > 4 * tolerance
    first, second = first[apart], second[apart]
    factor = (end[second] - end[first]) / (start[second] - start[first])
    sane = (np.abs(factor) > _SCALES[0]) & (np.abs(factor) < _SCALES[1])
    if prior is not None:
        told = prior[0] * np.exp(1j * prior[1])
        for one in (first, second):
            ratio = factor / told[one]
            sane &= (np.abs(np.log(np.abs(ratio) + 1e-12)) < 0.5) & (np.abs(np.angle(ratio)) < 0.35)
    factor, first = factor[sane][:4000], first[sane][:4000]
    if not len(factor):
        return nothing
    shift = end[first] - factor * start[first]
    score = np.empty(len(factor))
    for begin in range(0, len(factor), 256):
        block = slice(begin, begin + 256)
        away = np.abs(factor[block, None] * start + shift[block, None] - end)
        score[block] = np.maximum(1 - (away / tolerance) ** 2, 0).sum(axis=1)
    best = int(score.argmax())
    matrix = np.array(
        [
            [factor[best].real, -factor[best].imag, shift[best].real],
            [factor[best].imag, factor[best].real, shift[best].imag],
            [0, 0, 1],
        ]
    )
    return settle(source, target, matrix, kind="similarity", tolerance=tolerance)


def settle(
    source: np.ndarray, target: np.ndarray, matrix: np.ndarray, *, kind: TransformKind, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fit repeatedly to the pairs that agree, with Tukey's biweight.

    - `source`, `target`: ``(n, 2)`` points.
    - `matrix`: initial matrix, ``(3, 3)``.
    - `kind`: kind of transformation.
    - `tolerance`: distance within which a pair agrees, target px.
    - returns: the matrix ``(3, 3)`` and the pairs that agree with it, ``bool (n,)``. Of pairs that share a point only
      the nearest counts.
    """
    fewest = 3 if kind == "similarity" else 6
    inliers = np.zeros(len(source), bool)
    for _ in range(20):
        away = np.linalg.norm(apply(matrix, source) - target, axis=1)
        inliers = _once(away < tolerance, source, target, away)
        if inliers.sum() < fewest:
            break
        weights = (1 - (away[inliers] / tolerance) ** 2) ** 2 + 1e-6
        previous, matrix = matrix, fit(source[inliers], target[inliers], kind, weights)
        if np.abs(apply(matrix, source) - apply(previous, source)).max() < 1e-3:
            break
    return matrix, inliers


def _once(inliers: np.ndarray, source: np.ndarray, target: np.ndarray, away: np.ndarray) -> np.ndarray:
    """Keep the nearest of the pairs that share a point in either image, because SIFT repeats points."""
    kept = np.flatnonzero(inliers)
    kept = kept[np.argsort(away[kept], kind="stable")]
    for points in (source, target):
        kept = kept[np.sort(np.unique(points[kept].round(), axis=0, return_index=True)[1])]
    single = np.zeros_like(inliers)
    single[kept] = True
    return single


# --------------------------------------------------------------------------------------------------
# full registration


def align(
    moving: Picture,
    fixed: Picture,
    *,
    accept: Callable[[Alignment], bool],
    kind: TransformKind = "similarity",
    tolerance: float = 3.0,
    seed: int = 0,
) -> Alignment:
    """Align a moving image with a fixed image.

    Same polarity and one image inverted are tried first, then both with the moving image mirrored.

    - `moving`, `fixed`: the images, at about the same resolution. A factor of 4 in either direction is tolerated.
    - `accept`: function that returns whether an alignment is good enough to stop.
    - `kind`: kind of transformation.
    - `tolerance`: distance within which a patch agrees with the transformation, fixed px.
    - `seed`: seed of the random sampling. The same seed gives the same result.
    - returns: the first accepted alignment, or else the alignment with the most inliers. Without any candidate, the
      identity with no inliers.
    """
    best = Alignment(np.eye(3))
    for candidate in _candidates(moving, fixed, seed=seed):
        refined = _refine(moving, fixed, candidate, kind=kind, tolerance=tolerance, seed=seed)
        if accept(refined):
            return refined
        if (refined.n_inliers, refined.n_matches) > (best.n_inliers, best.n_matches):
            best = refined
    return best


def _candidates(moving: Picture, fixed: Picture, *, seed: int) -> Iterator[Alignment]:
    """Yield coarse alignments by features, better polarity first per resolution, mirrored images last."""
    pairs: list[tuple[Features, Features, np.ndarray, np.ndarray]] = []
    for mirrored in (False, True):
        for index, side in enumerate(_COARSE_SIDES):
            if index == len(pairs):  # computed on demand, because the first resolution is usually enough
                coarse = [picture.shrunk(max(picture.contrast.shape) / side) for picture in (moving, fixed)]
                shrink, grow = coarse[0].scale_from(moving), np.linalg.inv(coarse[1].scale_from(fixed))
                pairs.append((detect(coarse[0]), detect(coarse[1]), shrink, grow))
            mine, theirs, shrink, grow = pairs[index]
            candidates = []
            for inverted in (False, True):
                seen = mine.mirrored() if mirrored else mine
                matrix, n_matches = _agree_on_features(seen.inverted() if inverted else seen, theirs, seed=seed)
                matrix = grow @ matrix @ np.diag([1.0, -1.0 if mirrored else 1.0, 1.0]) @ shrink
                candidates.append(Alignment(matrix, n_matches=n_matches, mirrored=mirrored, inverted=inverted))
            candidates.sort(key=lambda candidate: -candidate.n_matches)
            yield from (candidate for candidate in candidates if candidate.n_matches >= _FEWEST_MATCHES)


def _agree_on_features(moving: Features, fixed: Features, *, seed: int) -> tuple[np.ndarray, int]:
    mine, theirs = match(moving, fixed)
    prior = fixed.sizes[theirs] / moving.sizes[mine], fixed.angles[theirs] - moving.angles[mine]
    matrix, inliers = agree(moving.points[mine], fixed.points[theirs], tolerance=5.0, seed=seed, prior=prior)
    return matrix, int(inliers.sum())


def _refine(
    moving: Picture, fixed: Picture, start: Alignment, *, kind: TransformKind, tolerance: float, seed: int
) -> Alignment:
    """Refine a coarse alignment by patches at quarter, half and full resolution, and judge the result."""
    matrix = start.matrix
    # a similarity cannot mirror, so mirror the moving points first
    side = np.diag([1.0, -1.0 if start.mirrored else 1.0, 1.0])
    for factor in (4.0, 2.0, 1.0, 1.0):
        if min(fixed.contrast.shape) < 4 * PATCH * factor:
            continue
        small = fixed.shrunk(factor)
        shrink = small.scale_from(fixed)
        source, target = find_patches(moving, small, shrink @ matrix, inverted=start.inverted)
        source, target = apply(side, source), apply(np.linalg.inv(shrink), target)
        transform, inliers = agree(source, target, tolerance=tolerance * factor, seed=seed)
        if inliers.sum() < _FEWEST_MATCHES:
            continue
        if kind == "affine" and inliers.sum() >= 4 * _FEWEST_MATCHES:
            transform, _ = settle(source, target, transform, kind=kind, tolerance=tolerance * factor)
        matrix = transform @ side
    source, target = find_patches(moving, fixed, matrix, inverted=start.inverted)
    judged = _judge(replace(start, matrix=matrix @ side), apply(side, source), target, kind=kind, tolerance=tolerance)
    return replace(judged, matrix=judged.matrix @ side)


def _judge(
    alignment: Alignment, source: np.ndarray, target: np.ndarray, *, kind: TransformKind, tolerance: float
) -> Alignment:
    """Fit once more, and measure every fifth of the patches against a fit to the other patches."""
    if len(source) < 2 * _FEWEST_MATCHES:
        return replace(alignment, n_patches=len(source))
    matrix, inliers = settle(source, target, alignment.matrix, kind=kind, tolerance=tolerance)
    fold = np.arange(len(source)) % 5
    away = np.empty(len(source))
    for part in range(5):
        others = fold != part
        partial, _ = settle(source[others], target[others], alignment.matrix, kind=kind, tolerance=tolerance)
        away[~others] = np.linalg.norm(apply(partial, source[~others]) - target[~others], axis=1)
    return replace(
        alignment,
        matrix=matrix,
        residual_px=float(np.median(away)),
        n_inliers=int((inliers & (away < tolerance)).sum()),
        n_patches=len(source),
    )
