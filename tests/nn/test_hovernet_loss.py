"""HoVer-Net's losses against plain numpy, and what they leave out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from stimage_sd.nn.hovernet_loss import IGNORED, CellTargets, balanced_weights, cell_losses


def example(seed: int = 0, side: int = 12) -> tuple[tuple[np.ndarray, ...], CellTargets]:
    random = np.random.default_rng(seed)
    maps = tuple(random.normal(size=(2, side, side, n)).astype(np.float32) for n in (2, 2, 4))
    types = random.integers(0, 4, (2, side, side))
    nuclear = (types > 0).astype(np.float32)
    hv = random.uniform(-1, 1, (2, side, side, 2)).astype(np.float32) * nuclear[..., None]
    return maps, CellTargets(nuclear, hv, types.astype(np.int32), np.ones(2, np.float32))


def dice(logits: np.ndarray, labels: np.ndarray) -> float:
    probability = scipy.special.softmax(logits, axis=-1)
    truth = np.eye(logits.shape[-1])[labels]
    both, either = (probability * truth).sum((0, 1, 2)), (probability + truth).sum((0, 1, 2))
    return float((1 - (2 * both + 1e-3) / (either + 1e-3)).mean())


def cross_entropy(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    logs = scipy.special.log_softmax(logits, axis=-1)
    return float(-(np.take_along_axis(logs, labels[..., None], -1)[..., 0] * weights[labels]).mean())


def test_losses_equal_numpys() -> None:
    (nuclear, hv, types), targets = example()
    weights = np.array([0.5, 1.0, 2.0, 3.0])
    found = cell_losses((nuclear, hv, types), targets, weights)
    inside = targets.nuclear.astype(int)
    np.testing.assert_allclose(
        found.nuclear, cross_entropy(nuclear, inside, np.ones(2)) + dice(nuclear, inside), rtol=1e-4
    )
    np.testing.assert_allclose(
        found.types, cross_entropy(types, targets.types, weights) + dice(types, targets.types), rtol=1e-4
    )
    places = np.arange(5) - 2
    x, y = np.meshgrid(places, places)
    kernel = x / np.maximum(x**2 + y**2, 1)
    error = 0.0
    for axis, of in enumerate((kernel, kernel.T)):
        slopes = np.stack([scipy.ndimage.correlate(d, of, mode="constant") for d in (hv - targets.hv)[..., axis]])
        error += (slopes**2 * targets.nuclear).sum() / targets.nuclear.sum()
    np.testing.assert_allclose(found.distances, ((hv - targets.hv) ** 2).mean() + 2 * error, rtol=1e-4)


def test_uncertain_types_are_left_out_where_types_are_learned_alone() -> None:
    (nuclear, hv, types), targets = example()
    unsure = targets.types.copy()
    unsure[:, :6] = IGNORED
    before = cell_losses((nuclear, hv, types), targets._replace(types=unsure), np.ones(4))
    other = types.copy()
    other[:, :6] += np.random.default_rng(1).normal(size=other[:, :6].shape)
    after = cell_losses((nuclear, hv, other), targets._replace(types=unsure), np.ones(4))
    np.testing.assert_allclose(before, after, rtol=1e-6)
    whole = cell_losses((nuclear, hv, types), targets, np.ones(4))
    np.testing.assert_allclose(before.nuclear, whole.nuclear, rtol=1e-6)
    np.testing.assert_allclose(before.distances, whole.distances, rtol=1e-6)


def test_tiles_that_fill_up_a_batch_count_for_nothing() -> None:
    (nuclear, hv, types), targets = example()
    half = targets._replace(weight=np.array([1, 0], np.float32))
    alone = CellTargets(*(part[:1] for part in targets))
    np.testing.assert_allclose(
        cell_losses((nuclear, hv, types), half, np.ones(4)),
        cell_losses(tuple(maps[:1] for maps in (nuclear, hv, types)), alone, np.ones(4)),
        rtol=1e-5,
    )


def test_perfect_maps_have_no_loss() -> None:
    _, targets = example()
    sure = [
        jnp.where(np.eye(n)[labels] > 0, 30.0, -30.0)
        for n, labels in ((2, targets.nuclear.astype(int)), (4, targets.types))
    ]
    assert sum(cell_losses((sure[0], targets.hv, sure[1]), targets, np.ones(4))) < 1e-4


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6).filter(any))
def test_weights_average_to_one(pixels: list[int]) -> None:
    weights = balanced_weights(np.array(pixels))
    np.testing.assert_allclose((weights * pixels).sum() / sum(pixels), 1, rtol=1e-4)
    assert all((weight > 0) == (count > 0) for weight, count in zip(weights, pixels, strict=True))
