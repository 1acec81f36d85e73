"""From components of the embeddings to the patterns of expression that an ensemble's heads see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SharedPatterns:
    """A few directions of the components, each member's own: those along which the expression of many genes varies.

    Attributes
    ----------
    basis
        ``float32 (n_members, n_components, rank)``.
    centre
        ``float32 (n_members, n_components)``: the mean of the tiles that a member was trained on.
    """

    basis: np.ndarray
    centre: np.ndarray

    @property
    def rank(self) -> int:
        """Number of patterns."""
        return self.basis.shape[-1]

    def project(self, reduced: np.ndarray, *, members: Sequence[int] | None = None) -> np.ndarray:
        """Bring components into each member's patterns.

        Parameters
        ----------
        reduced
            ``float32 (n_tiles, n_components)``.
        members
            Which members; all by default.

        Returns
        -------
        ``float32 (n_members, n_tiles, rank)``.
        """
        chosen = slice(None) if members is None else list(members)
        basis, centre = self.basis[chosen], self.centre[chosen]
        return reduced @ basis - centre[:, None, :] @ basis
