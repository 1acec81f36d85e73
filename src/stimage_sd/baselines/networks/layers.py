"""Layers that several of the published networks share."""

from __future__ import annotations

from flax import nnx


def batch_norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Return a batch normalization with torch's momentum.

    Examples
    --------
    >>> batch_norm(4, nnx.Rngs(0)).momentum
    0.9
    """
    return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
