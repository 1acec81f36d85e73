"""Saliency: completeness of integrated gradients, and closed forms of small networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stimage_sd.nn.parts import Part
from stimage_sd.nn.saliency import Differentiable, grad_cam, integrated_gradients


class Small(nnx.Module):
    """A convolution, and what is pooled of it."""

    def __init__(self) -> None:
        self.convolution = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))

    def parts(self) -> list[Part]:
        return [
            Part((self.convolution,), lambda tiles: jax.nn.softplus(self.convolution(tiles))),
            Part((), lambda value: (value**2).mean(axis=(1, 2))),
        ]

    def __call__(self, tiles: jax.Array) -> jax.Array:
        first, second = self.parts()
        return second.run(first.run(tiles))


class Whole(nnx.Module):
    """A network that is one part."""

    def __call__(self, tiles: jax.Array) -> jax.Array:
        return tiles.mean(axis=(1, 2))


@pytest.fixture(scope="module")
def networks() -> list[Differentiable]:
    return [Differentiable(Small(), lambda tiles: tiles / 255), Differentiable(Whole(), lambda tiles: tiles / 128 - 1)]


@pytest.fixture(scope="module")
def tiles() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (2, 12, 12, 3), np.uint8), random.integers(0, 256, (1, 8, 8, 3), np.uint8)]


def predict(own: list) -> jax.Array:
    return jnp.stack([jnp.exp(own[0].sum(axis=1) / 8) + own[1][:, 0], jnp.tanh(own[0][:, 5] * own[1][:, 1])], axis=1)


@pytest.mark.slow
def test_integrated_gradients_add_up_to_what_the_tile_adds(networks: list, tiles: list) -> None:
    found = integrated_gradients(networks, tiles, predict, baseline=[np.float32(255)] * 2, n_steps=64)

    def value(images: list) -> np.ndarray:
        own = [network.embed(one).reshape(1, -1) for network, one in zip(networks, images, strict=True)]
        return np.asarray(predict(own))[0]

    expected = value(tiles) - value([np.full_like(one, 255) for one in tiles])
    assert [one.shape for one in found] == [(2, 2, 12, 12), (2, 1, 8, 8)]
    total = sum(one.sum(axis=(1, 2, 3)) for one in found)
    np.testing.assert_allclose(total, expected, rtol=1e-3)
    # the second output sees the second field of view alone
    assert np.abs(found[0][1, 0]).max() < 1e-9 < np.abs(found[0][1, 1]).max()


def test_integrated_gradients_of_a_linear_network_are_its_terms(networks: list, tiles: list) -> None:
    found = integrated_gradients(
        networks[1:], tiles[1:], lambda own: own[0][:, :1], baseline=[np.float32(0)], n_steps=3
    )
    np.testing.assert_allclose(found[0][0, 0], tiles[1][0, ..., 0] / 128 / 64, rtol=1e-5)


@pytest.mark.slow
def test_steps_do_not_depend_on_how_many_are_computed_at_a_time(networks: list, tiles: list) -> None:
    one, five = (
        integrated_gradients(networks, tiles, predict, baseline=[np.float32(0)] * 2, n_steps=5, batch_size=size)
        for size in (1, 5)
    )
    for first, second in zip(one, five, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-8)


def test_grad_cam_is_its_formula(networks: list, tiles: list) -> None:
    found = grad_cam(networks[:1], tiles[:1], lambda own: own[0][:, :2])[0]
    value = np.asarray(jax.nn.softplus(networks[0].module.convolution(jnp.asarray(tiles[0], jnp.float32) / 255)))
    for output in (0, 1):  # of the first field of view: mean of squares, whose gradient is 2 a / (y x)
        weight = 2 * value[0, ..., output].mean() / 144
        np.testing.assert_allclose(found[output, 0], np.maximum(weight * value[0, ..., output], 0), rtol=1e-4)
    assert not found[:, 1].any()


def test_networks_without_a_map_are_refused(networks: list, tiles: list) -> None:
    with pytest.raises(ValueError, match="several parts"):
        grad_cam(networks, tiles, predict)
    with pytest.raises(ValueError, match="at least one step"):
        integrated_gradients(networks, tiles, predict, baseline=[np.float32(0)] * 2, n_steps=0)
