"""Convert transformations to matrices of x and y, and apply them to points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from spatialdata.transformations import BaseTransformation

_XYZ = ("x", "y", "z")
#: decimals that transformed positions in px are rounded to
_DECIMALS = 6


def affine(transformation: BaseTransformation, name: str) -> NDArray[np.float64]:
    """Return a transformation as a ``(3, 3)`` matrix of x and y."""
    try:
        whole = np.asarray(transformation.to_affine_matrix(_XYZ, _XYZ), dtype=np.float64)
    except ValueError as error:
        raise ValueError(_refusal(transformation, name, str(error))) from error
    if whole[:2, 2].any():
        raise ValueError(_refusal(transformation, name, "x and y depend on z"))
    return whole[np.ix_([0, 1, 3], [0, 1, 3])]


def _refusal(transformation: BaseTransformation, name: str, why: str) -> str:
    return (
        f"Expected an affine transformation of x and y for {name!r}, found {type(transformation).__name__} ({why}). "
        "Resample the element first, for instance with `spatialdata.rasterize`."
    )


def apply(matrix: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Apply a ``(3, 3)`` or ``(2, 3)`` matrix to points ``(n, 2)``."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def apply_rounded(matrix: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Apply a matrix to points and round the result, unless the matrix is the identity.

    Without rounding, floating-point noise would reorder points of the same row or column.
    """
    return points if np.array_equal(matrix, np.eye(3)) else np.round(apply(matrix, points), _DECIMALS)


def scale_of(matrix: NDArray[np.float64]) -> float:
    """Return the scale of a matrix: the square root of its absolute determinant."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def turned(matrix: NDArray[np.float64]) -> bool:
    """Return whether a matrix rotates, shears or mirrors by more than 0.001."""
    return bool(
        max(abs(matrix[0, 1]), abs(matrix[1, 0])) > 1e-3 * scale_of(matrix) or min(matrix[0, 0], matrix[1, 1]) <= 0
    )
