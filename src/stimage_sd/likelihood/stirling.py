"""Stirling's formula for ``lgamma``: its error and the slope of that error, accurate in float32."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)

# Chebyshev fits of delta(z)/u and w(z)/u^2 on u = 1/z in [0, 1], lowest order first (`stirling_error` and
# `stirling_error_slope`). The largest relative errors are 1e-9 and 1.1e-8, below float32 rounding.
_STIRLING_ERROR = (
    0.08333333339578258,
    -1.150781365532661e-08,
    -0.0027774458678570734,
    -3.314633842258169e-06,
    0.0008056161200513372,
    1.369064895441237e-05,
    -0.0008473984904036785,
    0.0008570552913439802,
    -0.00039366920006323944,
    7.361111474927509e-05,
)
_STIRLING_ERROR_SLOPE = (
    0.08333333414905988,
    -1.5860553612487152e-07,
    -0.00832836029959682,
    -5.78043398011306e-05,
    0.004276264367558689,
    -0.0006899833818314205,
    -0.004527921659703761,
    0.005375438966171571,
    -0.0027037875608366003,
    0.0005386440322955065,
)


def stirling_error(z: Array) -> Array:
    """Return the error of Stirling's formula, ``lgamma(z) - (z - 1/2) log z + z - log(2 pi) / 2``, z >= 1."""
    u = 1 / z
    return u * _polynomial(_STIRLING_ERROR, u)


def stirling_error_slope(z: Array) -> Array:
    """Return minus the derivative of `stirling_error`, ``log z - 1 / (2 z) - digamma(z)``, z >= 1."""
    u = 1 / z
    return u * u * _polynomial(_STIRLING_ERROR_SLOPE, u)


def _polynomial(coefficients: tuple[float, ...], u: Array) -> Array:
    total = jnp.full_like(u, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * u + coefficient
    return total
