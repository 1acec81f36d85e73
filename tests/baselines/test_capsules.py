"""Capsules and dynamic convolution against loops in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stimage_sd.baselines.networks.capsules import CapsuleEncoder, CapsuleRouting, squash
from stimage_sd.baselines.networks.thitogene import DynamicConvolution


def squashed(vector: np.ndarray) -> np.ndarray:
    length = np.sqrt((vector**2).sum())
    return (1 - 1 / np.exp(length)) * vector / length


def test_squash_is_its_formula_and_has_a_gradient_at_zero() -> None:
    vectors = np.random.default_rng(0).normal(0, 2, (5, 3)).astype(np.float32)
    np.testing.assert_allclose(squash(jnp.asarray(vectors)), [squashed(vector) for vector in vectors], rtol=1e-5)
    assert float(squash(jnp.zeros(3)).sum()) == 0
    gradient = jax.jacobian(squash)(jnp.zeros(3))
    np.testing.assert_allclose(gradient, np.eye(3), atol=1e-6)


def test_routing_is_its_loop() -> None:
    random = np.random.default_rng(1)
    layer = CapsuleRouting(4, 3, 5, 6, rngs=nnx.Rngs(0))
    layer.votes.set_value(jnp.asarray(random.normal(0, 0.7, (5, 4, 3, 6)), jnp.float32))
    layer.bias.set_value(jnp.asarray(random.normal(0, 0.3, (5, 4)), jnp.float32))
    matrices, bias = np.asarray(layer.votes[...], np.float64), np.asarray(layer.bias[...], np.float64)
    capsules = random.normal(size=(2, 4, 3)).astype(np.float32)
    expected = np.zeros((2, 5, 6))
    for sample, inputs in enumerate(capsules.astype(np.float64)):
        votes = np.array([[inputs[i] @ matrices[k, i] for i in range(4)] for k in range(5)])
        agreement = np.zeros((5, 4))
        for k in range(5):
            for i in range(4):
                agreement[k, i] = sum(votes[k, i] @ votes[k, other] for other in range(4)) / np.sqrt(6)
        for k in range(5):
            total = np.zeros(6)
            for i in range(4):
                share = np.exp(agreement[k, i]) / np.exp(agreement[:, i]).sum()
                total += (share + bias[k, i]) * votes[k, i]
            expected[sample, k] = squashed(total)
    np.testing.assert_allclose(layer(jnp.asarray(capsules)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_takes_pictures_of_eleven_pixels_and_no_less() -> None:
    lengths = np.linalg.norm(CapsuleEncoder(11, 2, 3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 11, 11, 2))), axis=-1)
    assert lengths.shape == (2, 3)
    assert (lengths < 1).all()
    with pytest.raises(ValueError, match="11 px or more for the capsules' convolutions, found 10 px"):
        CapsuleEncoder(10, 2, 3, 4, rngs=nnx.Rngs(0))


def test_a_dynamic_convolution_is_a_convolution_by_the_kernel_of_its_picture() -> None:
    random = np.random.default_rng(2)
    layer = DynamicConvolution(3, 5, side=2, n_kernels=4, rngs=nnx.Rngs(0))
    layer.eval()
    for attention in (layer.to_inputs, layer.to_outputs, layer.to_places, layer.to_kernels):
        attention.bias.set_value(jnp.asarray(random.normal(size=attention.bias.shape), jnp.float32))
    pictures = random.normal(size=(2, 4, 6, 3)).astype(np.float32)
    found = np.asarray(layer(jnp.asarray(pictures)))
    assert found.shape == (2, 2, 3, 5)

    def dense(value: np.ndarray, linear: nnx.Linear) -> np.ndarray:
        return value @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])

    for picture, convolved in zip(pictures, found, strict=True):
        seen = picture.mean(axis=(0, 1)) @ np.asarray(layer.squeeze.kernel[...])
        seen = np.maximum(seen / np.sqrt(1 + 1e-5), 0)
        inputs, outputs, places = (
            1 / (1 + np.exp(-dense(seen, attention)))
            for attention in (layer.to_inputs, layer.to_outputs, layer.to_places)
        )
        shares = np.exp(dense(seen, layer.to_kernels))
        kernel = np.tensordot(shares / shares.sum(), np.asarray(layer.kernels[...]), axes=1).reshape(2, 2, 3, 5)
        kernel = kernel * places.reshape(2, 2, 1, 1) * inputs[None, None, :, None] * outputs
        expected = [
            [(picture[2 * y : 2 * y + 2, 2 * x : 2 * x + 2, :, None] * kernel).sum(axis=(0, 1, 2)) for x in range(3)]
            for y in range(2)
        ]
        np.testing.assert_allclose(convolved, expected, rtol=1e-4, atol=1e-5)
