"""What the logarithm of a count is expected to be, where the count has a negative binomial distribution."""

from __future__ import annotations

import numpy as np

#: step of the sum over the logarithm of the integration variable; the rule converges exponentially in its inverse
_STEP = 0.4
#: beyond these the integrand is below 1e-9: e^-e^v above, (scale x mean) e^v below
_HIGHEST, _MARGIN = 3.1, 21.0
#: entries at a time
_BLOCK = 1 << 18


def expected_log1p(mean: np.ndarray, variance: np.ndarray, *, scale: np.ndarray | float = 1.0) -> np.ndarray:
    r"""Expectation of ``log(1 + scale * count)`` under negative binomials.

    It is what a score on log-normalised counts asks of a prediction. The logarithm of the mean is not: the logarithm of
    few counts is mostly whether there are any, so that it depends on depth where the mean over the depth does not.

    Parameters
    ----------
    mean, variance
        Of the counts, any shape, the same; where the variance is not above the mean, the count is Poisson's.
    scale
        What counts are multiplied by before the logarithm, such as a common total over a spot's own; broadcast.

    Returns
    -------
    ``float64``, of the shape of `mean`.

    Raises
    ------
    ValueError
        If a mean or scale is negative or not finite.

    Notes
    -----
    By Frullani's integral :math:`\log(1 + y) = \int_0^\infty (1 - e^{-ty})\,e^{-t}/t\,dt`, whose expectation needs
    nothing of the distribution but its Laplace transform :math:`(1 + \frac{\mu}{r}(1 - e^{-u}))^{-r}`. Over
    :math:`\log t` the integrand is smooth and vanishes at both ends, where the trapezoidal rule converges
    exponentially: here to 1e-5.

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
    # mean over r, which is the variance's excess over the mean, in means; 0 would be Poisson's
    excess = np.maximum(variance / np.maximum(mean, 1e-300) - 1.0, 1e-9)
    total = np.zeros_like(mean)
    lowest = -np.log(max(float((scale * mean).max(initial=0)), 1e-300)) - _MARGIN
    for v in np.arange(min(lowest, 0.0), _HIGHEST, _STEP):
        t = np.exp(v)
        transform = -(mean / excess) * np.log1p(-excess * np.expm1(-t * scale))
        total -= np.exp(-t) * np.expm1(transform)
    return total * _STEP
