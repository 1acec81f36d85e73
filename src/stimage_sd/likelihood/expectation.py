"""Expected log counts under negative binomial distributions."""

from __future__ import annotations

import numpy as np

#: step of the trapezoidal rule over the log of the integration variable; the error falls exponentially in 1 / step
_STEP = 0.4
#: limits beyond which the integrand is below 1e-9: e^-e^v at the top, (scale x mean) e^v at the bottom
_HIGHEST, _MARGIN = 3.1, 21.0
#: entries per block
_BLOCK = 1 << 18


def expected_log1p(mean: np.ndarray, variance: np.ndarray, *, scale: np.ndarray | float = 1.0) -> np.ndarray:
    r"""Compute the expectation of ``log(1 + scale * count)`` under negative binomials.

    Scores on log-normalized counts should compare with this expectation, not with the logarithm of the mean. For low
    counts the logarithm mostly tells zero from nonzero, so its expectation depends on depth.

    Parameters
    ----------
    mean, variance
        Mean and variance of the counts, of any common shape. A variance at or below the mean is treated as Poisson.
    scale
        Factor applied to counts before the logarithm, such as a common total over the spot's total. It is broadcast.

    Returns
    -------
    Expectations, ``float64``, of the shape of `mean`.

    Notes
    -----
    Frullani's integral is :math:`\log(1 + y) = \int_0^\infty (1 - e^{-ty})\,e^{-t}/t\,dt`. Its expectation needs only
    the Laplace transform :math:`(1 + \frac{\mu}{r}(1 - e^{-u}))^{-r}` of the distribution. Over :math:`\log t` the
    integrand is smooth and vanishes at both ends, so the trapezoidal rule converges exponentially, here to 1e-5.

    Examples
    --------
    >>> import numpy as np
    >>> expected_log1p(np.array([2.0]), np.array([4.0])).round(4).tolist()
    [0.8931]
    """
    mean, variance = np.asarray(mean, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    scales = np.broadcast_to(np.asarray(scale, dtype=np.float64), mean.shape)
    values = np.stack([mean, scales])
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        raise ValueError(
            "Expected means and scales that are finite and no less than 0, found means from "
            f"{mean.min():.3g} to {mean.max():.3g} and scales from {scales.min():.3g} to {scales.max():.3g}."
        )
    flat = np.empty(mean.size)
    for start in range(0, mean.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        flat[part] = _integrate(mean.ravel()[part], variance.ravel()[part], scales.ravel()[part])
    return flat.reshape(mean.shape)


def _integrate(mean: np.ndarray, variance: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # mean / r: the excess of the variance over the mean, relative to the mean (0 for a Poisson)
    excess = np.maximum(variance / np.maximum(mean, 1e-300) - 1.0, 1e-9)
    total = np.zeros_like(mean)
    lowest = -np.log(max(float((scale * mean).max(initial=0)), 1e-300)) - _MARGIN
    for v in np.arange(min(lowest, 0.0), _HIGHEST, _STEP):
        t = np.exp(v)
        transform = -(mean / excess) * np.log1p(-excess * np.expm1(-t * scale))
        total -= np.exp(-t) * np.expm1(transform)
    return total * _STEP
