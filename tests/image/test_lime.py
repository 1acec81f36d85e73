"""LIME's numerics against the package `lime`: the same explanation from the same seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lime.lime_image import LimeImageExplainer
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from stimage_sd.image import lime

#: of eight segments
CARRIED = np.array([3.0, -1.0, 0.5, 0.0, 2.0, -2.0, 0.25, 1.0])


@pytest.fixture(scope="module")
def tile() -> tuple[np.ndarray, np.ndarray]:
    """An image and its eight segments."""
    random = np.random.default_rng(0)
    image = random.integers(1, 256, (24, 40, 3), dtype=np.uint8)
    segments = np.repeat(np.repeat(np.arange(8).reshape(2, 4), 12, axis=0), 10, axis=1)
    return image, segments


def network(images: np.ndarray) -> np.ndarray:
    """Two outputs that are no linear function of what is hidden."""
    blocks = images.reshape(len(images), 2, 12, 4, 10, 3).mean(axis=(2, 4, 5)).reshape(len(images), 8) / 255
    first = np.tanh(blocks @ CARRIED) + blocks[:, 0] * blocks[:, 4]
    return np.stack([first, np.exp(-blocks.sum(axis=1) / 8)], axis=1)


def by_lime(
    image: np.ndarray, segments: np.ndarray, classifier: Callable, *, seed: int, hide_color: object
) -> tuple[np.ndarray, np.ndarray]:
    explainer = LimeImageExplainer(random_state=seed)
    found = explainer.explain_instance(
        image, classifier, labels=(0, 1), top_labels=None, hide_color=hide_color, num_samples=300,
        segmentation_fn=lambda _: segments,
    )  # fmt: skip
    weights = np.zeros((segments.max() + 1, 2))
    for label in (0, 1):
        for segment, weight in found.local_exp[label]:
            weights[segment, label] = weight
    return weights, np.array([found.intercept[0], found.intercept[1]])


@pytest.mark.parametrize("hide_color", [0, None, (200, 180, 220)])
@pytest.mark.parametrize("seed", [0, 7])
def test_explanations_are_limes(tile: tuple, seed: int, hide_color: object) -> None:
    image, segments = tile
    expected, intercepts = by_lime(image, segments, network, seed=seed, hide_color=hide_color)
    shown = lime.perturbations(300, 8, seed=seed)
    hidden = lime.hidden_image(image, segments, hide_color)
    found = lime.leave_one_out(shown, network(lime.perturbed_images(image, hidden, segments, shown)))
    np.testing.assert_allclose(found.weights, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.intercepts, intercepts, atol=1e-10)
    assert np.abs(expected).max() > 1e-4


def test_pixels_of_no_segment_are_never_hidden(tile: tuple) -> None:
    image, segments = tile
    segments = np.where(segments == 3, -1, np.minimum(segments, 2))
    shown = np.array([[0, 0, 0], [1, 1, 1]])
    hidden = lime.hidden_image(image, segments, 0)
    first, second = lime.perturbed_images(image, hidden, segments, shown)
    np.testing.assert_array_equal(first[segments < 0], image[segments < 0])
    assert not first[segments >= 0].any()
    np.testing.assert_array_equal(second, image)


def copies_of(tile: tuple, *, n_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    image, segments = tile
    shown = lime.perturbations(n_samples, 8, seed=seed)
    return shown, network(lime.perturbed_images(image, lime.hidden_image(image, segments, 0), segments, shown))


def test_more_copies_begin_with_the_same_copies() -> None:
    np.testing.assert_array_equal(lime.perturbations(300, 8, seed=4)[:60], lime.perturbations(60, 8, seed=4))


def test_leaving_one_out_equals_fits_without_each_copy(tile: tuple) -> None:
    shown, outputs = copies_of(tile, n_samples=40, seed=2)
    found = lime.leave_one_out(shown, outputs)
    distances = 1 - np.sqrt(shown.mean(axis=1))  # the cosine with a vector of ones
    weight = np.sqrt(np.exp(-(distances**2) / 0.25**2))
    changes, errors = [], []
    for left_out in range(1, 40):
        rows = np.delete(np.arange(40), left_out)
        model = Ridge(alpha=1).fit(shown[rows], outputs[rows], sample_weight=weight[rows])
        changes.append(found.weights - model.coef_.T)
        errors.append(outputs[left_out] - model.predict(shown[left_out : left_out + 1])[0])
    np.testing.assert_allclose(found.variances, np.square(changes).sum(axis=0), rtol=1e-8)
    expected = r2_score(outputs[1:], outputs[1:] - np.array(errors), sample_weight=weight[1:], multioutput="raw_values")
    np.testing.assert_allclose(found.r2, expected, atol=1e-10)


@pytest.mark.parametrize(("n_samples", "output"), [(30, 0), (60, 0), (400, 1), (800, 1)])
def test_stability_is_the_correlation_with_many_copies(tile: tuple, n_samples: int, output: int) -> None:
    reference = lime.leave_one_out(*copies_of(tile, n_samples=20_000, seed=0)).weights
    estimated, true = [], []
    for seed in range(1, 31):
        one = lime.leave_one_out(*copies_of(tile, n_samples=n_samples, seed=seed))
        estimated.append(lime.stability(one.weights, one.variances)[output])
        true.append(np.corrcoef(one.weights[:, output], reference[:, output])[0, 1])
    assert np.mean(estimated) == pytest.approx(np.mean(true), abs=0.03)
    assert 0.7 < np.mean(true) < 0.995


def pairs_of(tile: tuple, *, n_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    image, segments = tile
    shown = lime.paired_perturbations(n_samples, 8, seed=seed)
    return shown, network(lime.perturbed_images(image, lime.hidden_image(image, segments, 0), segments, shown))


@given(n_segments=st.integers(1, 70), n_samples=st.integers(1, 300), seed=st.integers(0, 5))
def test_pairs_show_opposite_and_whole_designs_orthogonal_segments(n_segments: int, n_samples: int, seed: int) -> None:
    shown = lime.paired_perturbations(n_samples, n_segments, seed=seed)
    assert n_samples - 1 <= len(shown) <= n_samples
    assert shown[0].all()
    np.testing.assert_array_equal(shown[1::2] + shown[2::2], 1)
    longer = lime.paired_perturbations(n_samples + 40, n_segments, seed=seed)
    np.testing.assert_array_equal(longer[: len(shown)], shown)
    order = 1 << (n_segments - 1).bit_length()
    signs = 2 * lime.paired_perturbations(2 * order + 1, n_segments, seed=seed)[1:] - 1
    np.testing.assert_array_equal(signs.T @ signs, 2 * order * np.eye(n_segments))


def test_leaving_pairs_out_equals_fits_without_each_pair(tile: tuple) -> None:
    shown, outputs = pairs_of(tile, n_samples=41, seed=2)
    found = lime.leave_pairs_out(shown, outputs)
    distances = 1 - np.sqrt(shown.mean(axis=1))
    weight = np.sqrt(np.exp(-(distances**2) / 0.25**2))
    every = Ridge(alpha=1).fit(shown[1:], outputs[1:], sample_weight=weight[1:])
    np.testing.assert_allclose(found.weights, every.coef_.T, atol=1e-10)
    np.testing.assert_allclose(found.intercepts, every.intercept_, atol=1e-10)
    errors = []
    for left_out in range(1, 41, 2):
        rows = np.delete(np.arange(1, 41), [left_out - 1, left_out])
        model = Ridge(alpha=1).fit(shown[rows], outputs[rows], sample_weight=weight[rows])
        errors.extend(outputs[left_out : left_out + 2] - model.predict(shown[left_out : left_out + 2]))
    expected = r2_score(outputs[1:], outputs[1:] - np.array(errors), sample_weight=weight[1:], multioutput="raw_values")
    np.testing.assert_allclose(found.r2, expected, atol=1e-10)
    few = lime.leave_pairs_out(shown[:19], outputs[:19])
    assert np.isinf(few.variances).all()
    assert (lime.stability(few.weights, few.variances) == 0).all()


def interacting(shown: np.ndarray, *, seed: int) -> np.ndarray:
    """Outputs of 30 segments, with what pairs and triples of segments do together."""
    random = np.random.default_rng(seed)
    signs = 2.0 * shown - 1
    pairs = (signs @ random.normal(0, 0.25, (30, 20))) * (signs @ random.normal(0, 0.25, (30, 20)))
    triples = signs[:, :10] * signs[:, 10:20] * signs[:, 20:]
    return (signs @ random.normal(size=30) + 2 * pairs.sum(axis=1) + triples @ random.normal(0, 0.3, 10))[:, None]


@pytest.mark.parametrize("n_samples", [129, 193, 385])
def test_stability_of_pairs_is_the_correlation_with_many_pairs(n_samples: int) -> None:
    estimated, true, independent = [], [], []
    for seed in range(6):
        many = lime.paired_perturbations(20_001, 30, seed=99)
        reference = lime.leave_pairs_out(many, interacting(many, seed=seed)).weights[:, 0]
        for draw in range(5):
            shown = lime.paired_perturbations(n_samples, 30, seed=draw)
            one = lime.leave_pairs_out(shown, interacting(shown, seed=seed))
            estimated.append(lime.stability(one.weights, one.variances)[0])
            true.append(np.corrcoef(one.weights[:, 0], reference)[0, 1])
            shown = lime.perturbations(n_samples, 30, seed=draw)
            other = lime.leave_one_out(shown, interacting(shown, seed=seed)).weights[:, 0]
            independent.append(np.corrcoef(other, reference)[0, 1])
    assert np.mean(estimated) == pytest.approx(np.mean(true), abs=0.04)
    assert 1 - np.mean(true) < 0.5 * (1 - np.mean(independent))


def test_stability_that_is_not_defined() -> None:
    weights = np.array([[1.0, 4.0], [2.0, 4.0], [4.0, 4.0]])
    assert np.isnan(lime.stability(weights, weights * 0)).tolist() == [False, True]
    assert lime.stability(weights, weights * 100)[0] == 0
    assert np.isnan(lime.stability(weights[:2], weights[:2] * 0)).all()
    constant = lime.leave_one_out(lime.perturbations(30, 4, seed=0), np.ones((30, 1)))
    assert np.isnan(constant.r2).all()


def test_no_samples_or_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="found 0 and 4"):
        lime.perturbations(0, 4, seed=0)
