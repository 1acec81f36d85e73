from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.color import rgb2hed

from stimage_sd.image import keypoints, nuclear_contrast, patches, registration
from stimage_sd.image.keypoints import Picture
from stimage_sd.image.patches import apply


def similarity(angle: float, scale: float, x: float, y: float) -> np.ndarray:
    turn = scale * np.exp(1j * angle)
    return np.array([[turn.real, -turn.imag, x], [turn.imag, turn.real, y], [0, 0, 1.0]])


def points_of(seed: int, n: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1000, (n, 2))


angles = st.floats(-np.pi, np.pi)
scales = st.floats(0.25, 4.0)
shifts = st.floats(-500, 500)
similarities = st.builds(similarity, angles, scales, shifts, shifts)
affines = st.builds(
    lambda base, shear, stretch: base @ np.array([[stretch, shear, 0], [0, 1, 0], [0, 0, 1.0]]),
    similarities,
    st.floats(-0.5, 0.5),
    st.floats(0.5, 2.0),
)
seeds = st.integers(0, 1000)

# --------------------------------------------------------------------------------------------------
# fitting


@given(similarities, seeds)
def test_exact_pairs_give_back_their_similarity(matrix: np.ndarray, seed: int) -> None:
    source = points_of(seed)
    for kind in ("similarity", "affine"):
        np.testing.assert_allclose(registration.fit(source, apply(matrix, source), kind), matrix, atol=1e-7)


@given(affines, seeds)
def test_exact_pairs_give_back_their_affine(matrix: np.ndarray, seed: int) -> None:
    source = points_of(seed)
    np.testing.assert_allclose(registration.fit(source, apply(matrix, source), "affine"), matrix, atol=1e-6)


@given(similarities, similarities, seeds)
def test_fits_compose_and_invert(first: np.ndarray, second: np.ndarray, seed: int) -> None:
    start = points_of(seed)
    middle = apply(first, start)
    end = apply(second, middle)
    one, two = (registration.fit(a, b, "similarity") for a, b in ((start, middle), (middle, end)))
    np.testing.assert_allclose(registration.fit(start, end, "similarity"), two @ one, atol=1e-6)
    np.testing.assert_allclose(registration.fit(middle, start, "similarity") @ one, np.eye(3), atol=1e-6)


@pytest.mark.parametrize("kind", ["similarity", "affine"])
def test_noisy_pairs_are_fitted_as_the_normal_equations_say(kind: registration.TransformKind) -> None:
    source = points_of(1, 50)
    target = apply(similarity(2.0, 1.3, 40, -9), source) + np.random.default_rng(2).normal(0, 5, source.shape)
    x, y, one, zero = *source.T, np.ones(50), np.zeros(50)
    if kind == "similarity":
        design = np.vstack([np.column_stack([x, -y, one, zero]), np.column_stack([y, x, zero, one])])
        order = [[0, 1, 2], [1, 0, 3]]
    else:
        rows = np.column_stack([x, y, one])
        design = np.block([[rows, np.zeros((50, 3))], [np.zeros((50, 3)), rows]])
        order = [[0, 1, 2], [3, 4, 5]]
    best = np.linalg.solve(design.T @ design, design.T @ target.T.ravel())
    expected = np.vstack([best[order], [0, 0, 1]])
    if kind == "similarity":
        expected[0, 1] *= -1
    np.testing.assert_allclose(registration.fit(source, target, kind), expected, atol=1e-6)


def test_a_pair_without_weight_does_not_count() -> None:
    source, matrix = points_of(3), similarity(0.4, 0.8, 5, 6)
    target = apply(matrix, source)
    target[0] += 1000
    weights = np.ones(len(source))
    weights[0] = 0
    np.testing.assert_allclose(registration.fit(source, target, "similarity", weights), matrix, atol=1e-7)


@given(similarities, seeds)
def test_the_similarity_of_a_third_of_the_pairs_is_found_among_wrong_ones(matrix: np.ndarray, seed: int) -> None:
    random = np.random.default_rng(seed)
    source = random.uniform(0, 1000, (90, 2))
    target = apply(matrix, source)
    wrong = np.arange(90) % 3 > 0
    target[wrong] = random.uniform(target.min(), target.max(), (wrong.sum(), 2))
    tolerance = 2.0
    found, inliers = registration.agree(source, target, tolerance=tolerance, seed=0, n_samples=20_000)
    assert inliers[~wrong].all()
    assert np.abs(apply(found, source) - apply(matrix, source)).max() < tolerance


def test_a_mirrored_picture_is_no_similarity() -> None:
    source = points_of(4, 60)
    _, inliers = registration.agree(source, source * [1, -1], tolerance=2.0, seed=0)
    assert inliers.sum() < 10


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_pairs_agree_on_nothing(n: int) -> None:
    matrix, inliers = registration.agree(np.ones((n, 2)), np.ones((n, 2)), tolerance=2.0, seed=0)
    assert not inliers.any()
    np.testing.assert_array_equal(matrix, np.eye(3))


def test_pairs_that_share_a_point_count_once() -> None:
    source = np.repeat(points_of(5, 10), 3, axis=0)
    _, inliers = registration.settle(source, source, np.eye(3), kind="similarity", tolerance=2.0)
    assert inliers.sum() == 10


def test_settling_finds_the_affine_from_a_rough_start() -> None:
    source = points_of(6, 100)
    matrix = similarity(0.3, 1.1, 20, 30) @ np.array([[1, 0.002, 0], [0, 1, 0], [0, 0, 1.0]])
    found, inliers = registration.settle(
        source, apply(matrix, source), similarity(0.3, 1.1, 21, 29), kind="affine", tolerance=5.0
    )
    assert inliers.sum() >= 98  # two points that fall on one pixel count once
    np.testing.assert_allclose(apply(found, source), apply(matrix, source), atol=0.01)


# --------------------------------------------------------------------------------------------------
# contrast


def test_hematoxylin_is_that_of_scikit_image() -> None:
    rgb = np.random.default_rng(0).integers(30, 255, (40, 50, 3), dtype=np.uint8)
    mine = nuclear_contrast.hematoxylin(np.moveaxis(rgb, -1, 0))
    theirs = np.maximum(rgb2hed(rgb)[..., 0], 0)
    some = theirs > 0.02
    ratio = mine[some] / theirs[some]
    assert some.mean() > 0.2
    assert ratio.std() < 0.02 * ratio.mean()
    assert (mine[theirs == 0] < 0.05).all()


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 20), st.integers(5, 40))
def test_windows_cover_every_pixel_once(height: int, width: int, margin: int, side: int) -> None:
    seen = np.zeros((height, width), int)
    for core, around in nuclear_contrast.windows((height, width), margin=margin, side=side):
        seen[core] += 1
        assert seen[around][nuclear_contrast.inner(core, around)].shape == seen[core].shape
    assert (seen == 1).all()


def nuclei(shape: tuple[int, int] = (900, 850), *, seed: int = 0, radius: float = 4.0) -> np.ndarray:
    """Bright discs on a dark ground that fades to one side, ``uint8``."""
    random = np.random.default_rng(seed)
    field = np.zeros(shape, np.uint8)
    for _ in range(shape[0] * shape[1] // 350):
        center = random.uniform((0, 0), shape[::-1])
        axes = random.uniform(0.7, 1.5, 2) * radius
        color = int(random.integers(90, 200))
        cv2.ellipse(
            field, tuple(center.astype(int)), tuple(axes.astype(int)), random.uniform(0, 180), 0, 360, color, -1
        )
    light = cv2.GaussianBlur(field, (0, 0), 0.8).astype(np.float32)
    return np.clip(light + 20 + random.normal(0, 3, shape), 0, 255).astype(np.uint8)


def picture(intensity: np.ndarray) -> Picture:
    padding = nuclear_contrast.find_padding(intensity)
    return Picture(nuclear_contrast.nuclear_contrast(intensity, padding, nucleus_px=8.0), padding)


@pytest.fixture(scope="module")
def tissue() -> Picture:
    return picture(nuclei())


def test_contrast_does_not_see_the_lamp() -> None:
    even = nuclei((400, 500)).astype(np.float32)
    lamp = np.linspace(0.5, 1.2, 500, dtype=np.float32)
    contrasts = [picture((image).astype(np.uint8)).contrast for image in (even, even * lamp)]
    assert np.corrcoef(contrasts[0].ravel(), contrasts[1].ravel())[0, 1] > 0.97


def test_contrast_has_no_seams(tissue: Picture) -> None:
    # a picture that begins elsewhere is cut into other squares
    other = picture(nuclei()[200:, 150:]).contrast
    difference = np.abs(tissue.contrast[200:, 150:].astype(int) - other)[120:-120, 120:-120]
    assert np.percentile(difference, 99.9) <= 4


def test_padding_is_what_is_flat_at_the_border_only() -> None:
    image = nuclei((400, 600))
    image[:, 500:] = 17
    image[150:200, 150:200] = 17
    padding = nuclear_contrast.find_padding(image)
    assert padding[:, 510:].all()
    assert not padding[:, :480].any()


# --------------------------------------------------------------------------------------------------
# features and patches


def near(mine: keypoints.Features, theirs: keypoints.Features) -> tuple[float, float]:
    """Share of features with one of the other image at the same place, and these' median distance of descriptors."""
    away = np.linalg.norm(mine.points[:, None] - theirs.points[None], axis=2)
    turned = np.abs(np.angle(np.exp(1j * (mine.angles[:, None] - theirs.angles[None]))))
    away[turned > 0.2] = np.inf
    nearest = away.argmin(axis=1)
    close = away[np.arange(len(away)), nearest] < 1.0
    apart = np.linalg.norm(mine.descriptors[close] - theirs.descriptors[nearest[close]], axis=1)
    return float(close.mean()), float(np.median(apart))


def test_features_seen_from_behind_and_inverted_are_those_of_the_turned_picture(tissue: Picture) -> None:
    part = Picture(np.ascontiguousarray(tissue.contrast[:400, :400]), tissue.padding[:400, :400])
    plain = keypoints.detect(part)
    behind = Picture(np.ascontiguousarray(part.contrast[::-1]), np.ascontiguousarray(part.padding[::-1]))
    flipped = keypoints.detect(behind)
    share, apart = near(plain.mirrored(), keypoints.replace(flipped, points=flipped.points - [0, 400]))
    assert share > 0.7
    assert apart < 0.2
    share, apart = near(plain.inverted(), keypoints.detect(Picture(255 - part.contrast, part.padding)))
    assert share > 0.8
    assert apart < 0.2


def test_matches_are_each_others_nearest(tissue: Picture) -> None:
    features = keypoints.detect(tissue, most=600)
    half = len(features.points) // 2
    mine, theirs = (
        keypoints.Features(*(value[part] for value in vars(features).values()))
        for part in (slice(None, half), slice(half, None))
    )
    found = keypoints.match(mine, theirs, ratio=0.95)
    distance = np.linalg.norm(mine.descriptors[:, None].astype(float) - theirs.descriptors[None], axis=2)
    expected = {
        (row, int(column))
        for row, column in enumerate(distance.argmin(axis=1))
        if distance[:, column].argmin() == row
        and distance[row, column] < 0.95 * np.partition(distance[row], 1)[1] - 1e-6
    }
    assert expected
    assert expected <= set(zip(*(index.tolist() for index in found), strict=True))
    assert len(found[0]) <= len(expected) + 2


def moved(matrix: np.ndarray, shape: tuple[int, int], *, seed: int = 0) -> Picture:
    """The tissue as another instrument sees it: `matrix` maps the pixels of the tissue to those of this image."""
    center = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    there = (np.linalg.inv(center) @ matrix @ center)[:2]
    image = cv2.warpAffine(nuclei(), there, shape[::-1], flags=cv2.INTER_LINEAR).astype(np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 0.7) + np.random.default_rng(seed).normal(0, 5, shape)
    return picture(np.clip(image, 0, 255).astype(np.uint8))


def test_patches_are_found_where_they_are(tissue: Picture) -> None:
    matrix = similarity(0.6, 0.9, 300, -80)
    source, target = patches.find_patches(moved(matrix, (1200, 1200)), tissue, np.linalg.inv(matrix))
    assert len(source) > 50
    assert np.median(np.linalg.norm(apply(np.linalg.inv(matrix), source) - target, axis=1)) < 0.2


# --------------------------------------------------------------------------------------------------
# the whole way


def accept(found: registration.Alignment) -> bool:
    return found.n_inliers >= 20 and found.n_inliers >= 0.3 * found.n_patches


def error(found: registration.Alignment, truth: np.ndarray) -> float:
    places = np.random.default_rng(0).uniform(150, 700, (100, 2))
    return float(np.median(np.linalg.norm(apply(found.matrix, apply(truth, places)) - places, axis=1)))


@pytest.mark.slow
@pytest.mark.parametrize(("angle", "scale", "inverted"), [(3.1, 1.0, False), (-1.5, 0.5, True), (0.8, 1.9, False)])
def test_a_similarity_is_found_whatever_its_angle_scale_and_polarity(
    tissue: Picture, angle: float, scale: float, inverted: bool
) -> None:
    middle = np.array([425.0, 450.0])
    matrix = similarity(angle, scale, 0, 0)
    side = int(1300 * scale)
    matrix[:2, 2] = side / 2 - matrix[:2, :2] @ middle
    moving = moved(matrix, (side, side))
    if inverted:
        moving = Picture(255 - moving.contrast, moving.padding)
    found = registration.align(moving, tissue, accept=accept)
    assert error(found, matrix) < 0.5
    assert found.residual_px < 1.0
    assert (found.inverted, found.mirrored) == (inverted, False)


@pytest.mark.slow
def test_a_slide_from_behind_is_found(tissue: Picture) -> None:
    matrix = similarity(2.0, 0.9, 0, 0) @ np.diag([1, -1, 1])
    matrix[:2, 2] = 625 - matrix[:2, :2] @ [425, 450]
    found = registration.align(moved(matrix, (1250, 1250)), tissue, accept=accept)
    assert found.mirrored
    assert np.linalg.det(found.matrix[:2, :2]) < 0
    assert error(found, matrix) < 0.5


@pytest.mark.slow
def test_a_sheared_image_is_found_by_an_affine(tissue: Picture) -> None:
    matrix = similarity(0.5, 1.0, 0, 0) @ np.array([[1.02, 0.03, 0], [0, 0.99, 0], [0, 0, 1]])
    matrix[:2, 2] = 625 - matrix[:2, :2] @ [425, 450]
    moving = moved(matrix, (1250, 1250))
    found = registration.align(moving, tissue, accept=accept, kind="affine")
    assert error(found, matrix) < 0.5
    assert error(registration.align(moving, tissue, accept=accept), matrix) > 2.0


@pytest.mark.slow
def test_other_tissue_is_not_accepted(tissue: Picture) -> None:
    found = registration.align(picture(nuclei(seed=9)), tissue, accept=accept)
    assert not accept(found)


def test_one_seed_draws_the_same_samples() -> None:
    random = np.random.default_rng(0)
    source, target = random.uniform(0, 500, (2, 200, 2))
    one, two, other = (
        registration.agree(source, target, tolerance=30.0, seed=seed, n_samples=5_000) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert (one[0] != other[0]).any()
