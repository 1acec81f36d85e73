"""Projection of embedding components to the expression patterns that the heads of an ensemble take as input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SharedPatterns:
    """Directions of the components along which the expression of many genes varies, for each member.

    Attributes
    ----------
    basis
        ``float32 (n_members, n_components, rank)``.
    center
        ``float32 (n_members, n_components)``: mean of each member's training tiles.
    """

    basis: np.ndarray
    center: np.ndarray

    @property
    def rank(self) -> int:
        """Number of patterns."""
        return self.basis.shape[-1]

    def of(self, members: Sequence[int]) -> SharedPatterns:
        """Return the patterns of some members."""
        return SharedPatterns(self.basis[list(members)], self.center[list(members)])

    def project(self, reduced: np.ndarray, *, members: Sequence[int] | None = None) -> np.ndarray:
        """Project components to the patterns of each member.

        Parameters
        ----------
        reduced
            ``float32 (n_tiles, n_components)``.
        members
            Indices of the members. Default: all.

        Returns
        -------
        ``float32 (n_members, n_tiles, rank)``.
        """
        chosen = slice(None) if members is None else list(members)
        basis, center = self.basis[chosen], self.center[chosen]
        return reduced @ basis - center[:, None, :] @ basis
