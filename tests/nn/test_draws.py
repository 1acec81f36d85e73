"""Initial weights: the numbers of `jax.random.normal`, whatever the shape, compiled or not."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from stimage_sd._draws import normal


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 3, 2, 5), (130,)])
def test_numbers_are_those_of_jax(shape: tuple[int, ...]) -> None:
    key = jax.random.key(7)
    expected = np.float32(0.02) * np.asarray(jax.random.normal(key, shape))
    drawn = normal(key, shape, deviation=0.02)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(drawn), expected)


def test_inside_compiled_functions_and_for_shapes_alone() -> None:
    key = jax.random.key(3)
    compiled = jax.jit(lambda key: normal(key, (5, 7), deviation=0.1))(key)
    np.testing.assert_allclose(compiled, normal(key, (5, 7), deviation=0.1), rtol=1e-6)
    assert jax.eval_shape(lambda: normal(jax.random.key(0), (5, 7))).shape == (5, 7)
