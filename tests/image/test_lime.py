"""LIME's numerics against the package `lime`: the same explanation from the same seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
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
    image: np.ndarray, segments: np.ndarray, classifier: Callable, *, seed: int, hide_color: object, **options: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    explainer = LimeImageExplainer(random_state=seed, feature_selection=options.pop("feature_selection", "auto"))
    found = explainer.explain_instance(
        image, classifier, labels=(0, 1), top_labels=None, hide_color=hide_color, num_samples=300,
        segmentation_fn=lambda _: segments, **options,
    )  # fmt: skip
    weights = np.zeros((segments.max() + 1, 2))
    for label in (0, 1):
        for segment, weight in found.local_exp[label]:
            weights[segment, label] = weight
    # it keeps the last label's score
    return weights, np.array([found.intercept[0], found.intercept[1]]), found.score


@pytest.mark.parametrize("hide_color", [0, None, (200, 180, 220)])
@pytest.mark.parametrize("seed", [0, 7])
def test_explanations_are_limes(tile: tuple, seed: int, hide_color: object) -> None:
    image, segments = tile
    expected, intercepts, score = by_lime(image, segments, network, seed=seed, hide_color=hide_color)
    shown = lime.perturbations(300, 8, seed=seed)
    hidden = lime.hidden_image(image, segments, hide_color)
    found = lime.fit_surrogate(shown, network(lime.perturbed_images(image, hidden, segments, shown)))
    np.testing.assert_allclose(found.weights, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.intercepts, intercepts, atol=1e-10)
    assert found.scores[1] == pytest.approx(score, abs=1e-10)
    assert np.abs(expected).max() > 1e-4


@pytest.mark.parametrize(("n_features", "selection"), [(3, "auto"), (5, "highest_weights"), (4, "lasso_path")])
def test_the_choice_of_segments_is_limes(tile: tuple, n_features: int, selection: str) -> None:
    image, segments = tile
    expected, *_ = by_lime(
        image, segments, network, seed=1, hide_color=0, num_features=n_features, feature_selection=selection
    )
    shown = lime.perturbations(300, 8, seed=1)
    images = lime.perturbed_images(image, lime.hidden_image(image, segments, 0), segments, shown)
    found = lime.fit_surrogate(shown, network(images), n_features=n_features, feature_selection=selection)
    np.testing.assert_allclose(found.weights, expected, rtol=0, atol=1e-10)
    assert ((found.weights != 0).sum(axis=0) <= n_features).all()


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
    np.testing.assert_allclose(found.weights, lime.fit_surrogate(shown, outputs).weights, rtol=0, atol=1e-10)
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
