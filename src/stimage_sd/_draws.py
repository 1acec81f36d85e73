"""Random initial weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def normal(key: Array, shape: tuple[int, ...], *, deviation: float = 1.0) -> Array:
    """Draw float32 numbers of a normal distribution: those of `jax.random.normal`, without compiling for each shape.

    A compilation takes most of a second, and a network has dozens of shapes. The numbers of a key do not depend on how
    many are drawn, so that drawing the next power of two and dropping the rest compiles once per power.

    >>> normal(jax.random.key(0), (2, 3)).shape
    (2, 3)
    """
    if isinstance(key, jax.core.Tracer):  # inside a compiled function, or where only shapes are asked for
        return deviation * jax.random.normal(key, shape, jnp.float32)
    n = math.prod(shape)
    drawn = np.asarray(jax.random.normal(key, (1 << max(n - 1, 0).bit_length(),), jnp.float32))
    return jnp.asarray(np.float32(deviation) * drawn[:n].reshape(shape))
